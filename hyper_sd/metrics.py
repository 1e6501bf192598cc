"""Numbers of an evaluation: the Fréchet distance, the gap, and their standard errors from one set of paired prompts.

Standard errors come from a delete-a-group jackknife: prompts are cut into groups, a figure is computed again without each group, and
se^2 = (G - 1) / G sum_g (figure_g - mean)^2. The groups are the same in every row of a draw, so what rows share cancels in the gap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 16


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and a square root (D, D) of the covariance of some features, float64; the root is symmetric."""

    mean: Tensor
    cov: Tensor
    root: Tensor

    @classmethod
    def of_moments(cls, num: int, total: Tensor, products: Tensor) -> "Gaussian":
        """From the sum of the features (D,) and of their outer products (D, D); the covariance is divided by num - 1."""
        mean = total / num
        cov = (products - num * torch.outer(mean, mean)) / (num - 1)
        return cls(mean, cov, symmetric_root(cov))

    @classmethod
    def fit(cls, features: Tensor) -> "Gaussian":
        """From features (B, D), B >= 2; they are centred first, so that a large mean costs no digits."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        cov = centred.T @ centred / (len(features) - 1)
        return cls(mean, cov, symmetric_root(cov))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), where the last trace is the nuclear norm of C_a^1/2 C_b^1/2."""
    cross = torch.linalg.svdvals(a.root @ b.root).sum()
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)


@dataclass(frozen=True)
class Jackknifed:
    """A figure of all prompts, and of all but each group (G,), float64."""

    value: float
    without: Tensor

    @property
    def standard_error(self) -> float:
        num = len(self.without)
        return float(((num - 1) / num * (self.without - self.without.mean()).square().sum()).sqrt())


def frechet_jackknife(features: Tensor, reference: Gaussian, num_groups: int = GROUPS) -> Jackknifed:
    """The Fréchet distance of features (B, D) to the reference; prompt i is in group i mod G."""
    features = features.double() - reference.mean
    centred = Gaussian(torch.zeros_like(reference.mean), reference.cov, reference.root)
    groups = [features[group::num_groups] for group in range(num_groups)]
    products = torch.stack([group.T @ group for group in groups])
    totals = torch.stack([group.sum(0) for group in groups])
    num = len(features)
    value = frechet(Gaussian.of_moments(num, totals.sum(0), products.sum(0)), centred)
    without = [
        frechet(Gaussian.of_moments(num - len(group), totals.sum(0) - total, products.sum(0) - product), centred)
        for group, total, product in zip(groups, totals, products, strict=True)
    ]
    return Jackknifed(value, torch.tensor(without, dtype=torch.float64))


def mean_of_draws(draws: list[Jackknifed]) -> Jackknifed:
    """The mean over independent draws; its leave-outs are those of every draw, each with the other draws complete."""
    value = sum(draw.value for draw in draws) / len(draws)
    without = torch.cat([value + (draw.without - draw.value) / len(draws) for draw in draws])
    return Jackknifed(value, without)


def gap(row: Jackknifed, teacher: Jackknifed, undistilled: Jackknifed) -> Jackknifed:
    """(FD - FD of the teacher) / (FD of the un-distilled teacher at few steps - FD of the teacher)."""
    value = (row.value - teacher.value) / (undistilled.value - teacher.value)
    return Jackknifed(value, (row.without - teacher.without) / (undistilled.without - teacher.without))


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of independent values (B,) and its standard error; a single value has none."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
