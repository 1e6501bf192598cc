"""A CLIP model as a tower that rewards stand on: images and prompts to unit vectors of one space."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from hyper_sd.config import FilesConfig
from hyper_sd.randomness import send
from hyper_sd.rewards.base import crop, normalise
from hyper_sd.rewards.weights import find, is_directory, load_model, read

_POSITIONS = "embeddings.position_ids"  # buffers that older files carry and the model makes itself


class ClipTower:
    """A frozen float32 CLIPModel; `fit` brings images to its square."""

    def __init__(self, model: Any, tokenizer: Any, fit: Callable[[Tensor, int], Tensor] = crop):
        self.model, self.tokenizer, self._fit = model, tokenizer, fit
        self._side: int = model.config.vision_config.image_size
        self._max_tokens: int = model.config.text_config.max_position_embeddings

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, 3, H, W) in [0, 1]; gradients flow to the images."""
        pixels = normalise(self._fit(images.float(), self._side))
        return functional.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D); tokens beyond the model's 77 are cut off. Padding changes nothing, since the text model is causal."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        sent = {name: send(value, self.model.logit_scale) for name, value in tokens.items()}
        features = self.model.get_text_features(**sent).pooler_output
        return functional.normalize(features, dim=1)

    def cosines(self, embedded: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine (B,) of each embedded image and its prompt."""
        return (embedded * self.embed_prompts(prompts)).sum(1)


def load_tower(files: FilesConfig, device: torch.device, key: str) -> ClipTower:
    """The CLIPModel in a directory or on the hub, with its tokenizer."""
    config = CLIPConfig.from_json_file(find(files, key, "config.json"))
    tensors = {name: value for name, value in read(find(files, key), key).items() if not name.endswith(_POSITIONS)}
    return ClipTower(load_model(CLIPModel, config, tensors, key).to(device), load_tokenizer(files, key))


def load_tokenizer(files: FilesConfig, key: str) -> Any:
    """CLIP's byte-pair tokenizer."""
    revision = None if is_directory(files, key) else files.revision
    return CLIPTokenizer.from_pretrained(str(files.path), revision=revision or "main")
