"""Kernel distances between two sets of images, KID and CMMD, with the standard errors of `metrics`.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), of features x of the images and y of the reference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hyper_sd.metrics import GROUPS, Jackknifed

_ROWS = 1024  # of a kernel matrix that are in memory at once


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3, the kernel of KID (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 10^2)) - 1, the kernel of CMMD (Jayasumana et al. 2024) less its ones: they cancel, their rounding would not."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    return torch.expm1(-squares / 200)


class Mmd:
    """MMD^2 to a reference (M, D), whose own term is computed once."""

    def __init__(self, reference: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], *, unbiased: bool, scale: float = 1.0):
        self._reference, self._kernel, self._unbiased, self._scale = reference.float(), kernel, unbiased, scale
        everything = torch.ones(len(reference), 1, dtype=torch.float64)
        sums, diagonal = self._within(self._reference, everything)
        self._own = float(self._mean_within(sums, diagonal, torch.tensor(len(reference))))

    @classmethod
    def kid(cls, reference: Tensor) -> "Mmd":
        """The unbiased estimate on all features at once, not the mean over random subsets."""
        return cls(reference, polynomial, unbiased=True)

    @classmethod
    def cmmd(cls, reference: Tensor) -> "Mmd":
        """1000 times the biased estimate, for unit vectors."""
        return cls(reference, gaussian, unbiased=False, scale=1000.0)

    def jackknife(self, features: Tensor, num_groups: int = GROUPS) -> Jackknifed:
        """The distance of features (B, D), and without each group; feature i is in group i mod G."""
        features = features.float()
        groups = torch.nn.functional.one_hot(torch.arange(len(features)) % num_groups, num_groups).double()
        sums, diagonal = self._within(features, groups)
        across = torch.cat([self._kernel(rows, self._reference).double().mean(1) for rows in features.split(_ROWS)]) @ groups
        sizes = groups.sum(0)
        without = (
            sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal(),
            diagonal.sum() - diagonal,
            across.sum() - across,
            len(features) - sizes,
        )
        value = self._distance(sums.sum(), diagonal.sum(), across.sum(), torch.tensor(len(features)))
        return Jackknifed(float(value), self._distance(*without))

    def _distance(self, within: Tensor, diagonal: Tensor, across: Tensor, num: Tensor) -> Tensor:
        return self._scale * (self._mean_within(within, diagonal, num) + self._own - 2 * across / num)

    def _mean_within(self, sums: Tensor, diagonal: Tensor, num: Tensor) -> Tensor:
        return (sums - diagonal) / (num * (num - 1)) if self._unbiased else sums / num**2

    def _within(self, features: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of k(x, x') over pairs of groups (G, G), and of k(x, x) over groups (G,), float64; `groups` (B, G) is 1 where x is in."""
        sums, diagonal = 0, 0
        for start in range(0, len(features), _ROWS):
            rows, members = features[start : start + _ROWS], groups[start : start + _ROWS]
            kernel = self._kernel(rows, features).double()
            sums = sums + members.T @ (kernel @ groups)
            diagonal = diagonal + kernel.diagonal(start) @ members
        assert isinstance(sums, Tensor) and isinstance(diagonal, Tensor)
        return sums, diagonal
