"""What a reward is."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """A frozen judgement of images by their prompts; higher is better."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Float32 (B,) of images (B, 3, H, W) in [0, 1], with a gradient to the images."""
        ...
