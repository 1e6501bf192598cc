"""The procedural scenes as a source: rendered on the fly, without an end."""

from collections.abc import Sequence

import numpy as np
from torch.nn import functional

from hyper_sd.data.base import Samples, SourceDefaults
from hyper_sd.data.scenes import IMAGE_SIZE, captions, render, sample_scenes
from hyper_sd.randomness import Purpose, fold


class ScenesSource(SourceDefaults):
    """Position p is scene p of the run's own stream; scenes are enlarged or shrunk to the teacher's image size."""

    num_samples: int | None = None

    def __init__(self, seed: int, image_size: int):
        self._seed = fold(seed, Purpose.EPOCH_ORDER)  # apart from the scenes that evaluation draws with the plain seed
        self._image_size = image_size

    def batch(self, positions: Sequence[int]) -> Samples:
        scenes = sample_scenes(self._seed, np.asarray(positions))
        images = render(scenes)
        if self._image_size != IMAGE_SIZE:
            size = (self._image_size, self._image_size)
            images = functional.interpolate(images, size, mode="bilinear", antialias=True)
        return Samples(captions(scenes), images=images)
