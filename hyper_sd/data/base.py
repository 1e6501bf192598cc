"""What a source of training samples is.

A run asks for samples by position 0, 1, 2, ...: the count of samples it has used so far, over all processes and stages. A
source is a pure function of (seed, position), so any process reads any slice and going on needs no state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from hyper_sd.guidance import Cond
from hyper_sd.instances import Instances
from hyper_sd.randomness import Purpose, fold

T = TypeVar("T")

REPLACEMENTS = 16  # samples that are tried in the place of a bad one


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out: its name, a reason of a few words, and what the library said."""

    name: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"data.path: {self.name}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class BadSampleError(ValueError):
    """A sample cannot be used; the run may go on without it."""

    def __init__(self, name: str, reason: str, detail: object = ""):
        self.sample = BadSample(name, reason, str(detail)[:300])
        super().__init__(str(self.sample))


@dataclass(frozen=True)
class Samples:
    """B samples: images (B, 3, H, W) in [0, 1], or latents (B, C, h, w), scaled, both float32; captions alone where the teacher draws x0.

    conds, where the source has them, are the teacher's conditions of the captions. sizes (B, 6) are what SDXL is told of an image:
    original size, crop corner and target size in pixels, each (height, width). bad are those that samples of this batch stand in for.
    instances are the objects of each image, where the source has `categories` of them. names say where each sample comes from, in
    sources that read files.
    """

    captions: list[str]
    images: Tensor | None = None
    latents: Tensor | None = None
    conds: Cond | None = None
    sizes: Tensor | None = None
    bad: tuple[BadSample, ...] = ()
    instances: tuple[Instances, ...] = ()
    names: tuple[str, ...] = ()

    def pinned(self) -> "Samples":
        """The same in page-locked memory, from which a GPU copies while it computes."""
        pin = {name: value.pin_memory() for name in ("images", "latents", "sizes") if (value := getattr(self, name)) is not None}
        conds = None if self.conds is None else tuple(part.pin_memory() for part in self.conds)
        return replace(self, **pin, conds=conds)


class Encoder(Protocol):
    """What made prepared samples: the part of a teacher that sources know."""

    def encode_images(self, images: Tensor) -> Tensor: ...

    def encode_prompts(self, prompts: list[str]) -> Cond: ...


class Source(Protocol):
    @property
    def num_samples(self) -> int | None:
        """How many different samples there are; None for a source without an end."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Positions come in groups of so many, from 0 on, and a batch must lie in one; None: any positions make a batch."""
        ...

    @property
    def bad(self) -> Sequence[BadSample]:
        """What was left out when the source was opened."""
        ...

    @property
    def categories(self) -> tuple[str, ...]:
        """What the labels of its samples' instances name; none: it has no instances."""
        ...

    def batch(self, positions: Sequence[int]) -> Samples:
        """The samples at these positions; ValueError, naming data.path, if neither one nor any in its place can be read."""
        ...

    def check(self, encoder: Encoder) -> None:
        """Raise ValueError if prepared samples were made by other weights than these."""
        ...


class SourceDefaults:
    """What most sources have none of."""

    batch_size: int | None = None
    bad: Sequence[BadSample] = ()
    categories: tuple[str, ...] = ()

    def check(self, encoder: Encoder) -> None:
        pass


class Order(Protocol):
    def index(self, position: int) -> int:
        """The sample at a position."""
        ...

    def replacement(self, position: int, draw: int) -> int:
        """The sample that is tried in its place when those before it were bad: a function of (seed, position, draw)."""
        ...


class Rows:
    """Reads rows in an order by `num_workers` threads (0: in the caller's), and puts another in the place of a bad one."""

    def __init__(self, order: Order, num_workers: int):
        self._order = order
        self._map = threaded_map(num_workers)

    def read(self, read: Callable[[int, int], T], positions: Sequence[int]) -> tuple[list[T], tuple[BadSample, ...]]:
        """`read(index, position)` of every position, and the bad samples that were met."""
        found = list(self._map(lambda position: self._row(read, position), positions))
        return [row for row, _ in found], tuple(sample for _, bad in found for sample in bad)

    def _row(self, read: Callable[[int, int], T], position: int) -> tuple[T, list[BadSample]]:
        bad: list[BadSample] = []
        index = self._order.index(position)
        for draw in range(REPLACEMENTS):
            try:
                return read(index, position), bad
            except BadSampleError as error:
                bad.append(error.sample)
            index = self._order.replacement(position, draw)
        raise ValueError(f"{bad[0]}; {REPLACEMENTS - 1} samples in its place cannot be used either")


def pick_caption(captions: Sequence[str], seed: int, position: int) -> int:
    """Which of a sample's captions goes with a position."""
    return fold(seed, Purpose.CAPTION, position) % len(captions)


def threaded_map(num_workers: int) -> Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]:
    """`map`, or an ordered map over that many threads; decoding an image releases the interpreter's lock."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="data").map if num_workers > 0 else map
