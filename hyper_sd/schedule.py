"""alpha(t) and sigma(t), the conversions between what networks predict, and the solver grid.

Time: `tau` counts 1..T from the clean end, as the paper does, and 0 is the clean end itself. The network is given
t = tau - 1 in 0..T-1, and t = -1 is the clean end, whose alpha is that of t = 0: Stable Diffusion's schedulers end there too
(`set_alpha_to_one=False`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["eps", "v", "x0", "flow"]
_MIN_EPS_ALPHA = 1e-3  # SD's schedule ends at 0.068; some schedulers write 2e-4 where they mean zero


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = alpha(t) x0 + sigma(t) eps for t in 0..T-1; calling it answers (alpha, sigma) in float64, shaped like t."""

    alphas: Tensor
    sigmas: Tensor
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> "Schedule":
        """A variance-preserving schedule: alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar; alphas_cumprod has shape (T,)."""
        alpha_bar = alphas_cumprod.double()
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @property
    def num_steps(self) -> int:
        return len(self.alphas)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.device not in self._tables:  # a copy at every call would stall a GPU
            self._tables[t.device] = self.alphas.to(t.device), self.sigmas.to(t.device)
        alphas, sigmas = self._tables[t.device]
        index = t.clamp(min=0)
        return alphas[index], sigmas[index]

    def check(self, prediction: PredictionType) -> None:
        """Raise ValueError for an eps teacher of zero terminal SNR, where x0 = (x_t - sigma eps) / alpha has no value at T."""
        alpha = float(self.alphas[-1])
        if prediction == "eps" and alpha < _MIN_EPS_ALPHA:
            raise ValueError(
                f"teacher.path: a teacher that predicts eps needs a schedule with signal left at its end: got alpha(T)={alpha:.3g} "
                "(zero terminal SNR), where x0 = (x_t - sigma eps) / alpha divides by zero; use a teacher that predicts v or x0, or "
                "a scheduler config with rescale_betas_zero_snr=false"
            )


def to_x0_eps(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: PredictionType) -> tuple[Tensor, Tensor]:
    """The (x0, eps) with x_t = alpha x0 + sigma eps that a network output stands for.

    eps: x0 = (x_t - sigma eps) / alpha.  x0: eps = (x_t - alpha x0) / sigma.
    v = alpha eps - sigma x0 on a variance-preserving schedule.  flow = eps - x0 on any schedule.
    """
    if prediction == "eps":
        return (x_t - sigma * output) / alpha, output
    if prediction == "x0":
        return output, (x_t - alpha * output) / sigma
    if prediction == "v":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    return (x_t - sigma * output) / (alpha + sigma), (x_t + alpha * output) / (alpha + sigma)


@dataclass(frozen=True)
class SolverGrid:
    """N solver points tau_i = T i / N for i = 1..N, cut into k segments of N / k points; tau_0 = 0 is the clean end.

    A point on a segment's edge belongs to the segment below it, so every point has a neighbour u inside its own segment. With
    i counted from 1: u = tau_(i-1), and the edge is tau_j with j = (ceil(i / L) - 1) L, L = N / k (paper Eq. 11, made safe on
    the edges). Raises ValueError where k does not divide N or N does not divide T.
    """

    num_steps: int
    solver_steps: int
    segments: int

    def __post_init__(self) -> None:
        total, n, k = self.num_steps, self.solver_steps, self.segments
        for name, value in (("solver_steps", n), ("segments", k)):
            if value < 1:
                raise ValueError(f"stage.{name} must be at least 1: got {name}={value}")
        aligned = _nearest(range(k, total + 1, k), total, n)
        try_steps = [f"solver_steps={aligned}"] if aligned else []
        if n % k:
            tries = " or ".join([*try_steps, f"segments={_nearest(range(1, k), n, k)}"])
            raise ValueError(f"stage.segments must divide stage.solver_steps: got segments={k}, solver_steps={n}; try {tries}")
        if total % n:
            tries = " or ".join(try_steps or ["another stage.segments"])
            raise ValueError(f"stage.solver_steps must divide the teacher's {total} steps: got solver_steps={n}; try {tries}")

    def tau(self, index: Tensor) -> Tensor:
        return index * (self.num_steps // self.solver_steps)

    def edge_index(self, index: Tensor) -> Tensor:
        """The index j of the lower edge of the segment that holds point `index` (1..N)."""
        length = self.solver_steps // self.segments
        return (index - 1) // length * length


def _nearest(candidates: Iterable[int], number: int, near: int) -> int | None:
    """The candidate that divides `number` and lies nearest to `near`."""
    return min((c for c in candidates if number % c == 0), key=lambda c: abs(c - near), default=None)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) to (B, 1, ..., 1), so that it broadcasts over `like`."""
    return torch.reshape(values, (-1, *[1] * (like.ndim - 1)))


def at_least_float32(like: Tensor) -> torch.dtype:
    """The dtype the formulas run in: float32 for a half-precision network, float64 where everything is."""
    return torch.promote_types(like.dtype, torch.float32)
