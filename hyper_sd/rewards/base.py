"""What a reward is, rewards that share a tower, and the differentiable half of an image processor.

Images are float (B, 3, H, W) in [0, 1] everywhere; a model's own size and normalisation are made here, on tensors, so that gradients
reach the pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from hyper_sd.config import RewardConfig
from hyper_sd.objective import WeightedReward

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Reward(Protocol):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 (B,), higher is better, of images (B, 3, H, W) in [0, 1] and their prompts; gradients flow to the images."""
        ...


class Tower(Protocol):
    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, 3, H, W) in [0, 1]."""
        ...


T = TypeVar("T", bound=Tower)


class TowerReward(ABC, Generic[T]):
    """A reward that needs of an image only what a tower makes of it; `Rewards` runs a tower once for all rewards on it."""

    def __init__(self, tower: T):
        self.tower = tower

    @abstractmethod
    def score_embedded(self, embedded: Tensor, prompts: Sequence[str]) -> Tensor:
        """`score` of images that the tower has embedded as (B, D)."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_embedded(self.tower.embed(images), prompts)


@dataclass(frozen=True)
class Rewards:
    """Several rewards by name, scored together."""

    rewards: Mapping[str, Reward]

    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every reward's `score`; a tower that several stand on runs once."""
        embedded: dict[Tower, Tensor] = {}
        scores = {}
        for name, reward in self.rewards.items():
            if isinstance(reward, TowerReward):
                if reward.tower not in embedded:
                    embedded[reward.tower] = reward.tower.embed(images)
                scores[name] = reward.score_embedded(embedded[reward.tower], prompts)
            else:
                scores[name] = reward.score(images, prompts)
        return scores

    def weighted(self, configs: Mapping[str, RewardConfig]) -> dict[str, WeightedReward]:
        """Those named in `configs`, as terms of a stage's loss."""
        return {name: _weighted(self.rewards[name], config) for name, config in configs.items()}


def _weighted(reward: Reward, config: RewardConfig) -> WeightedReward:
    if isinstance(reward, TowerReward):
        return WeightedReward(reward.score_embedded, config.weight, config.alpha, embed=reward.tower.embed)
    return WeightedReward(reward.score, config.weight, config.alpha)


def crop(images: Tensor, side: int) -> Tensor:
    """Resize so that the shorter side is `side`, and crop the centre: (B, 3, side, side), as the processor of CLIP does."""
    height, width = images.shape[-2:]
    short = min(height, width)
    resized = resize(images, int(side * height / short), int(side * width / short))
    top, left = (resized.shape[-2] - side) // 2, (resized.shape[-1] - side) // 2
    return resized[..., top : top + side, left : left + side]


def pad(images: Tensor, side: int) -> Tensor:
    """Resize so that the longer side is `side`, and pad with black: (B, 3, side, side), as HPS v2 does."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    resized = resize(images, round(height * scale), round(width * scale))
    missing_height, missing_width = side - resized.shape[-2], side - resized.shape[-1]
    left, top = missing_width // 2, missing_height // 2
    return functional.pad(resized, (left, missing_width - left, top, missing_height - top))


def resize(images: Tensor, height: int, width: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
    """With antialiasing, in [0, 1], as PIL computes it: rows, cut to [0, 1], then columns."""
    rows = saturate(functional.interpolate(images, (images.shape[-2], width), mode=mode, antialias=True))
    return saturate(functional.interpolate(rows, (height, width), mode=mode, antialias=True))


def saturate(images: Tensor) -> Tensor:
    """Values cut to [0, 1] as pixels are, gradients passed on as if they were not: a clamp would lose those of saturated pixels."""
    return images + (images.clamp(0, 1) - images).detach()


def normalise(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(images - mean) / std of each channel."""
    mean_and_std = _on_device(tuple(mean), tuple(std), images.device, images.dtype)
    return (images - mean_and_std[0]) / mean_and_std[1]


@cache
@torch.inference_mode(False)  # or what an evaluation asked for first could not be trained through
def _on_device(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(2, 3, 1, 1): copied to a GPU once, since each copy waits for the work queued there."""
    return torch.tensor([mean, std], device=device, dtype=dtype)[:, :, None, None]
