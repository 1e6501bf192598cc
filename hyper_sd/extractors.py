"""Feature extractors: what a distance between sets of images is measured on. Any function of that type may be given instead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyper_sd.config import FeaturesConfig
from hyper_sd.data.scenes import IMAGE_SIZE
from hyper_sd.judge import Judge
from hyper_sd.paths import asset_dir
from hyper_sd.rewards.weights import check, check_clip, find, is_directory

Extractor = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] to features (B, D)


def check_extractor(cfg: FeaturesConfig, image_size: int, key: str = "features") -> None:
    """Raise ValueError for files that are missing or not the pinned ones, and for images the features do not suit."""
    match cfg.kind:
        case "judge":
            if image_size != IMAGE_SIZE:
                raise ValueError(f"{key}=judge knows images of {IMAGE_SIZE} pixels, this teacher draws {image_size}; choose {key}=clip")
        case "clip":
            check_clip(cfg.files, key)
        case "inception":
            if cfg.sha256 is None or not is_directory(cfg.files, key):
                raise ValueError(
                    f"{key}=inception is a program: it is read from a local directory only, and {key}.sha256 must be its checksum"
                )
            check(cfg.files, key)


def build_extractor(cfg: FeaturesConfig, device: torch.device, key: str = "features") -> Extractor:
    """The extractor of checked files, frozen, on `device`."""
    match cfg.kind:
        case "judge":
            return Judge.load(asset_dir("judge")).to(device).features
        case "clip":
            from hyper_sd.rewards.clip import load_tower

            return load_tower(cfg.files, device, key).embed
        case "inception":
            return _inception(torch.jit.load(find(cfg.files, key), map_location=device).eval())


def _inception(network: Any) -> Extractor:
    """The Inception of published FIDs as TorchScript: it takes uint8 images of any size and returns 2048 features."""

    def features(images: Tensor) -> Tensor:
        return network((images * 255).round().clamp(0, 255).to(torch.uint8), return_features=True)

    return features
