"""The head that LAION's aesthetic predictor and ImageReward have in common: five linear layers in a row, from D features to a number."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hyper_sd.rewards.weights import load_module


def load_head(tensors: Mapping[str, Tensor], width: int, key: str) -> Any:
    """The head with the weights of `tensors`, whose names are layers.<place>.<weight or bias>."""
    return load_module(new_head(width), {name.removeprefix("layers."): value for name, value in tensors.items()}, key)


def new_head(width: int) -> nn.Sequential:
    """Places 1, 3 and 5 are the dropouts of training; there is no activation."""
    return nn.Sequential(
        *(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1)),
        *(nn.Linear(64, 16), nn.Linear(16, 1)),
    )
