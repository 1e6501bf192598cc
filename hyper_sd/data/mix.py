"""Several sources in one stream, each with its share."""

from collections.abc import Sequence

from hyper_sd.data.base import BadSample, Encoder, Samples, Source
from hyper_sd.data.order import MixOrder


class MixSource:
    """Groups of `batch_size` positions, each from one source, so that sources may differ in shape and kind.

    Of every 1,000 groups a source has its share by weight, and its own stream goes on from one of its groups to the next: every
    source keeps its own exact epochs.
    """

    categories: tuple[str, ...] = ()

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], batch_size: int, seed: int):
        self._sources, self._order = sources, MixOrder(weights, seed)
        self.batch_size = batch_size
        counts = [source.num_samples for source in sources]
        self.num_samples = None if None in counts else sum(count for count in counts if count is not None)
        self.bad: Sequence[BadSample] = [sample for source in sources for sample in source.bad]

    def batch(self, positions: Sequence[int]) -> Samples:
        groups = {position // self.batch_size for position in positions}
        if len(groups) > 1:
            raise ValueError(f"data.sources: a batch must lie in one group of data.batch_size={self.batch_size} positions")
        number, group = self._order.place(groups.pop())
        return self._sources[number].batch([group * self.batch_size + position % self.batch_size for position in positions])

    def check(self, encoder: Encoder) -> None:
        for source in self._sources:
            source.check(encoder)
