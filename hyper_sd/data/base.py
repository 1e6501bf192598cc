"""What a source of training samples is.

A run asks for samples by position 0, 1, 2, ...: the count of samples it has used so far, over all processes and stages. A
source is a pure function of (seed, position), so any process reads any slice and going on needs no state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from hyper_sd.guidance import Cond
from hyper_sd.randomness import Purpose, fold


@dataclass(frozen=True)
class Samples:
    """B samples: either images (B, 3, H, W) in [0, 1] or latents (B, C, h, w), scaled, both float32.

    conds, where the source has them, are the teacher's conditions of the captions.
    """

    captions: list[str]
    images: Tensor | None = None
    latents: Tensor | None = None
    conds: Cond | None = None


class Source(Protocol):
    @property
    def num_samples(self) -> int | None:
        """How many different samples there are; None for a source without an end."""
        ...

    def batch(self, positions: Sequence[int]) -> Samples:
        """The samples at these positions; ValueError, naming data.path, if one cannot be read."""
        ...


class EpochOrder:
    """A shuffled pass over `num_samples` samples after the other: epoch e is the permutation of (seed, e)."""

    def __init__(self, num_samples: int, seed: int):
        self._num_samples = num_samples

        @lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
        def permutation(epoch: int) -> np.ndarray:
            return np.random.Generator(np.random.PCG64(fold(seed, Purpose.EPOCH_ORDER, epoch))).permutation(num_samples)

        self._permutation = permutation

    def index(self, position: int) -> int:
        """The sample at a position."""
        epoch, place = divmod(position, self._num_samples)
        return int(self._permutation(epoch)[place])


def threaded_map(num_workers: int) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """`map`, or an ordered map over that many threads; decoding an image releases the interpreter's lock."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="data").map if num_workers > 0 else map
