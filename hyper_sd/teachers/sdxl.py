"""Stable Diffusion XL base and every pipeline of its class."""

from functools import cached_property

import torch
from torch import Tensor

from hyper_sd.guidance import Cond
from hyper_sd.teachers.base import Teacher


class SdxlTeacher(Teacher):
    """cond = (text embeddings (B, L, D), pooled embedding (B, P), time ids (B, 6)).

    The time ids are original size, crop corner and target size, each (height, width): those of the samples where data have them,
    else those of the stock pipeline at the teacher's own size.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    architecture = "stable-diffusion-xl-v1-base/lora"
    unused_components = ("feature_extractor", "image_encoder")

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, pooled, time_ids = (c.to(self.dtype) for c in cond)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.net(x_t.to(self.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        text, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return text, pooled, self._time_ids.expand(len(prompts), -1)

    def uncond(self, batch: int) -> Cond:
        text, pooled = self._negative
        return text.expand(batch, -1, -1), pooled.expand(batch, -1), self._time_ids.expand(batch, -1)

    def with_sizes(self, cond: Cond, sizes: Tensor) -> Cond:
        text, pooled, _ = cond
        return text, pooled, sizes.to(self.device, torch.float32, non_blocking=True)

    @cached_property
    def _negative(self) -> tuple[Tensor, Tensor]:
        """Zeros, or the embeddings of "" where the pipeline's `force_zeros_for_empty_prompt` is false."""
        with torch.no_grad():
            _, text, _, pooled = self.pipeline.encode_prompt([""], device=self.device, do_classifier_free_guidance=True)
        return text, pooled

    @cached_property
    def _time_ids(self) -> Tensor:
        size = (self.image_size, self.image_size)
        return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
