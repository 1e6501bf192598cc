"""Reward models by kind. A new kind is a new file, and a case in `_check` and in `_build`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from hyper_sd.config import HELDOUT, FilesConfig, RewardConfig
from hyper_sd.paths import asset_dir
from hyper_sd.rewards.base import Reward, Rewards, TowerReward
from hyper_sd.rewards.weights import check, check_clip, find

__all__ = ["Reward", "Rewards", "TowerReward", "build_reward", "build_rewards", "check_reward", "check_rewards"]


def build_reward(config: RewardConfig, device: torch.device, key: str = "reward") -> Reward:
    """One reward model on `device`, frozen, in float32; ValueErrors name `key`, where the configuration is."""
    check_reward(config, key)
    return _build(config, device, key, _towers(device))


def build_rewards(configs: Mapping[str, RewardConfig], device: torch.device) -> Rewards:
    """Several by name; those on the same CLIP files share one model. Everything that can be refused is refused before weights load."""
    check_rewards(configs)
    towers = _towers(device)
    return Rewards({name: _build(config, device, _key(name), towers) for name, config in configs.items()})


def check_rewards(configs: Mapping[str, RewardConfig]) -> None:
    """`check_reward` of several by name."""
    for name, config in configs.items():
        check_reward(config, _key(name))


def check_reward(config: RewardConfig, key: str = "reward") -> None:
    """Raise ValueError for a file that is missing or has another checksum. No weight is loaded; what is on the hub is fetched."""
    match config.kind:
        case "clip_score" | "pickscore":
            check_clip(config.files, key)
        case "aesthetic":
            check_clip(_base(config, key), f"{key}.base")
            check(config, key)
        case "hps_v2" | "image_reward":
            check(_base(config, key), f"{key}.base")
            check(config, key)
        case "embedded" | "embedded_heldout":
            check(_embedded(config), key)


def _key(name: str) -> str:
    """Where a run's configuration has the reward of this name."""
    return name if name == HELDOUT else f"rewards.{name}"


def _build(config: RewardConfig, device: torch.device, key: str, towers: Callable[[FilesConfig, str], Any]) -> Reward:
    match config.kind:
        case "clip_score":
            from hyper_sd.rewards.clip_score import ClipScore

            return ClipScore(towers(config.files, key))
        case "pickscore":
            from hyper_sd.rewards.pickscore import PickScore

            return PickScore(towers(config.files, key))
        case "aesthetic":
            from hyper_sd.rewards.aesthetic import load_aesthetic

            return load_aesthetic(config, towers(_base(config, key), f"{key}.base"), key)
        case "hps_v2":
            from hyper_sd.rewards.hps_v2 import load_hps_v2

            return load_hps_v2(config, _base(config, key), device, key)
        case "image_reward":
            from hyper_sd.rewards.image_reward import load_image_reward

            return load_image_reward(config, _base(config, key), device, key)
        case "embedded" | "embedded_heldout":
            from hyper_sd.rewards.embedded import load_reward

            return load_reward(config.kind, find(_embedded(config), key), key).to(device)


def _towers(device: torch.device) -> Callable[[FilesConfig, str], Any]:
    """What loads a CLIP model, each set of files once."""
    from hyper_sd.rewards.clip import ClipTower, load_tower

    loaded: dict[FilesConfig, ClipTower] = {}

    def tower(files: FilesConfig, key: str) -> ClipTower:
        if files not in loaded:
            loaded[files] = load_tower(files, device, key)
        return loaded[files]

    return tower


def _embedded(config: RewardConfig) -> FilesConfig:
    """The file in a directory, or the one that comes with the package."""
    folder = asset_dir("reward") if config.path is None else config.path
    return replace(config.files, path=str(folder), file=f"{config.kind}.safetensors")


def _base(config: RewardConfig, key: str) -> FilesConfig:
    if config.base is None:
        what = "the CLIP model under the head" if config.kind == "aesthetic" else "the tokenizer"
        raise ValueError(f"{key}.base must be set for kind={config.kind}: the files of {what}; see configs/reward/")
    return config.base
