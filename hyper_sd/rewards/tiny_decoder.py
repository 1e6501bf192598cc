"""A tiny decoder of latents, for rewards in the place of the teacher's VAE: diffusers' AutoencoderTiny, such as TAESD.

Its weights are a fiftieth of an AutoencoderKL's decoder, and so is about what it computes; its images lack fine texture. Sampling and
evaluation never use it.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from hyper_sd.config import FilesConfig
from hyper_sd.rewards.weights import check, find, load_module, read


class TinyDecoder:
    """A frozen float32 AutoencoderTiny."""

    def __init__(self, model: Any):
        self._model = model

    def decode(self, latents: Tensor) -> Tensor:
        """Float32 images (B, 3, H, W), in [0, 1] but for what overshoots, of scaled latents; gradients flow to the latents."""
        return self._model.decode(latents.float() / self._model.config.scaling_factor, return_dict=False)[0] / 2 + 0.5


def load_tiny_decoder(files: FilesConfig, device: torch.device, key: str) -> TinyDecoder:
    """The decoder in a directory or on the hub, on `device`."""
    model: Any = AutoencoderTiny.from_config(_facts(files, key))
    return TinyDecoder(load_module(model, read(find(files, key), key), key).to(device))


def check_tiny_decoder(files: FilesConfig, image_size: int, latent_shape: Sequence[int], key: str) -> None:
    """Raise ValueError unless it decodes latents of this shape (C, h, w) to images of this side. No weight is loaded."""
    facts = _facts(files, key)
    if facts.get("_class_name") != AutoencoderTiny.__name__:
        raise ValueError(f"{key}.path={files.path} holds a {facts.get('_class_name')}; it must be an {AutoencoderTiny.__name__}")
    with torch.device("meta"):
        model: Any = AutoencoderTiny.from_config(facts)
    scale = model.config.upsampling_scaling_factor ** (len(model.config.num_decoder_blocks) - 1)
    given, wanted = (model.config.latent_channels, scale), (latent_shape[0], image_size // latent_shape[1])
    if given != wanted:
        raise ValueError(
            f"{key}.path={files.path} decodes latents of {given[0]} channels, {given[1]} pixels to each; the teacher's have {wanted[0]} "
            f"channels and {wanted[1]} pixels; choose the tiny decoder of this family, or {key}=null"
        )
    check(files, key)


def _facts(files: FilesConfig, key: str) -> dict[str, Any]:
    with find(files, key, "config.json").open() as file:
        return json.load(file)
