"""Reward models by kind. A new one is a new file and one line in `build_reward`."""

import torch

from hyper_sd.config import RewardConfig
from hyper_sd.paths import asset_dir
from hyper_sd.rewards.base import Reward

__all__ = ["Reward", "build_reward"]


def build_reward(config: RewardConfig, device: torch.device) -> Reward:
    """The reward model, frozen, on `device`."""
    match config.kind:
        case "embedded" | "embedded_heldout":
            from hyper_sd.rewards.embedded import load_reward

            return load_reward(config.kind, asset_dir("reward")).to(device)
