"""Reading ahead of what trains."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hyper_sd.data.base import Samples, Source


class Prefetcher:
    """Reads the samples of the next `ahead` steps while one is trained on; `waited_s` is how long `take` stood still for them.

    positions(step) are this process's micro-batches; pin puts what was read in page-locked memory.
    """

    def __init__(self, source: Source, positions: Callable[[int], Sequence[range]], steps: Iterable[int], *, ahead: int, pin: bool):
        self._source, self._positions, self._ahead, self._pin = source, positions, ahead, pin
        self._steps = iter(steps)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._read: deque[list[tuple[range, Future[Samples]]]] = deque()
        self.waited_s = 0.0
        self._fill()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def take(self) -> list[tuple[range, Samples]]:
        """The next step's positions and samples, one pair a micro-batch."""
        parts = self._read.popleft()
        self._fill()
        since = time.monotonic()
        read = [(positions, future.result()) for positions, future in parts]
        self.waited_s += time.monotonic() - since
        return read

    def _fill(self) -> None:
        while len(self._read) < self._ahead and (step := next(self._steps, None)) is not None:
            self._read.append([(part, self._reader.submit(self._samples, part)) for part in self._positions(step)])

    def _samples(self, positions: Sequence[int]) -> Samples:
        samples = self._source.batch(positions)
        return samples.pinned() if self._pin else samples
