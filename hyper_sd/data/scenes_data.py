"""The procedural scenes as a source: rendered on the fly, without an end."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hyper_sd.data.base import Samples, SourceDefaults
from hyper_sd.data.scenes import EMPTY, IMAGE_SIZE, SHAPES, Scenes, captions, masks, render, sample_scenes
from hyper_sd.instances import Instances
from hyper_sd.randomness import Purpose, fold


class ScenesSource(SourceDefaults):
    """Position p is scene p of the run's own stream; scenes are enlarged or shrunk to the teacher's image size.

    With `instances` each has the masks of its objects, whose categories are the shapes.
    """

    num_samples: int | None = None

    def __init__(self, seed: int, image_size: int, instances: bool = False):
        self._seed = fold(seed, Purpose.EPOCH_ORDER)  # apart from the scenes that evaluation draws with the plain seed
        self._image_size = image_size
        self.categories = SHAPES if instances else ()

    def batch(self, positions: Sequence[int]) -> Samples:
        scenes = sample_scenes(self._seed, np.asarray(positions))
        instances = scene_instances(scenes, self._image_size) if self.categories else ()
        return Samples(captions(scenes), images=_resized(render(scenes), self._image_size), instances=instances)


def scene_instances(scenes: Scenes, image_size: int) -> tuple[Instances, ...]:
    """The objects of every scene, by place; a mask has the pixels of which the object covers at least half."""
    shape = torch.from_numpy(scenes.shape)
    covered = _resized(masks(scenes), image_size) >= 0.5
    return tuple(Instances(covered[row][there], shape[row][there].long()) for row, there in enumerate(shape != EMPTY))


def _resized(images: Tensor, image_size: int) -> Tensor:
    if image_size == IMAGE_SIZE:
        return images
    return functional.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
