"""Stable Diffusion 1.5 and every pipeline of its class, whatever its image size, latent channels and vocabulary."""

from functools import cached_property

import torch
from torch import Tensor

from hyper_sd.guidance import Cond
from hyper_sd.teachers.base import Teacher


class Sd15Teacher(Teacher):
    """cond = (text embeddings (B, L, D),)."""

    pipeline_class = "StableDiffusionPipeline"
    architecture = "stable-diffusion-v1/lora"
    unused_components = ("safety_checker", "feature_extractor", "image_encoder")

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        (text,) = cond
        return self.net(x_t.to(self.dtype), t, encoder_hidden_states=text.to(self.dtype), return_dict=False)[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        return (self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)[0],)

    def uncond(self, batch: int) -> Cond:
        return (self._empty.expand(batch, -1, -1),)

    @cached_property
    def _empty(self) -> Tensor:
        return self.encode_prompts([""])[0]
