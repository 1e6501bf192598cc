"""The objects of an image, as instance segmentation knows them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """N >= 1 objects of one image: masks (N, H, W), bool, and labels (N,), int64, places in the `categories` of their source."""

    masks: Tensor
    labels: Tensor
