"""Which sample stands at which position, epoch after epoch: functions of the seed, so that going on is a lookup."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hyper_sd.randomness import Purpose, fold


class EpochOrder:
    """A shuffled pass over `num_samples` samples after the other: epoch e is the permutation of (seed, e)."""

    def __init__(self, num_samples: int, seed: int):
        self._num_samples, self._seed = num_samples, seed

        @lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
        def permutation(epoch: int) -> np.ndarray:
            return _permutation(num_samples, seed, Purpose.EPOCH_ORDER, epoch)

        self._permutation = permutation

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self._num_samples)
        return int(self._permutation(epoch)[place])

    def replacement(self, position: int, draw: int) -> int:
        return fold(self._seed, Purpose.REPLACEMENT, position, draw) % self._num_samples


class BucketOrder:
    """Groups of `batch_size` positions, each with samples of one bucket; buckets are arrays of sample indices.

    A bucket is a stream of its own epochs, as in EpochOrder, cut into groups: the n mod batch_size samples that an epoch of a
    bucket leaves over open its next one, so that each comes exactly once before any comes again. Epoch e of the whole has the
    groups floor(e n / batch_size) .. floor((e + 1) n / batch_size) - 1 of every bucket; which bucket is next is an order of (seed, e).
    """

    def __init__(self, buckets: Sequence[np.ndarray], batch_size: int, seed: int):
        self._buckets, self._batch_size, self._seed = buckets, batch_size, seed
        self._total = sum(map(len, buckets))
        self._orders = [EpochOrder(len(bucket), fold(seed, Purpose.BUCKET, number)) for number, bucket in enumerate(buckets)]

        @lru_cache(maxsize=2)
        def groups(epoch: int) -> np.ndarray:
            """(bucket, group of that bucket), one row a group of the epoch."""
            first, end = (np.array([e * len(bucket) // batch_size for bucket in buckets]) for e in (epoch, epoch + 1))
            number, before = _shuffled_turns(end - first, seed, Purpose.BUCKET, epoch)
            return np.stack([number, first[number] + before], axis=1)

        self._groups = groups

    def index(self, position: int) -> int:
        number, place = self._place(position)
        return int(self._buckets[number][self._orders[number].index(place)])

    def replacement(self, position: int, draw: int) -> int:
        number, _ = self._place(position)
        return int(self._buckets[number][self._orders[number].replacement(position, draw)])

    def _place(self, position: int) -> tuple[int, int]:
        """The bucket of a position, and the position in the bucket's own stream."""
        group, offset = divmod(position, self._batch_size)
        epoch = group * self._batch_size // self._total  # no epoch has more groups than this leaves to those before
        while self._before(epoch + 1) <= group:
            epoch += 1
        number, own_group = self._groups(epoch)[group - self._before(epoch)]
        return int(number), int(own_group) * self._batch_size + offset

    def _before(self, epoch: int) -> int:
        """Groups in all earlier epochs."""
        return sum(epoch * len(bucket) // self._batch_size for bucket in self._buckets)


class MixOrder:
    """Which source a group of positions comes from: of every BLOCK groups each source has its share, in an order of (seed, block)."""

    BLOCK = 1000

    def __init__(self, weights: Sequence[float], seed: int):
        exact = np.array(weights) / sum(weights) * self.BLOCK
        self.counts = np.maximum(np.floor(exact).astype(int), 1)
        for number in np.argsort(self.counts - exact, kind="stable")[: max(0, self.BLOCK - self.counts.sum())]:
            self.counts[number] += 1  # the largest remainders
        self.block = int(self.counts.sum())  # above BLOCK only where tiny weights were raised to one group

        @lru_cache(maxsize=2)
        def places(block: int) -> tuple[np.ndarray, np.ndarray]:
            """The source of every group of a block, and how many of that source come before it in the block."""
            return _shuffled_turns(self.counts, seed, Purpose.MIX, block)

        self._places = places

    def place(self, group: int) -> tuple[int, int]:
        """The source of a group, and the number of that group among the source's own."""
        block, offset = divmod(group, self.block)
        sources, before = self._places(block)
        number = int(sources[offset])
        return number, block * int(self.counts[number]) + int(before[offset])


def _shuffled_turns(counts: Sequence[int] | np.ndarray, *keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Turns in an order of the keys, counts[n] of them n's; and how many turns of the same n come before each."""
    turns = np.repeat(np.arange(len(counts)), counts)[_permutation(int(np.sum(counts)), *keys)]
    before = np.empty_like(turns)
    for number, count in enumerate(counts):
        before[turns == number] = np.arange(count)
    return turns, before


def _permutation(num: int, *keys: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(fold(*keys))).permutation(num)
