"""The denoiser: the only door from the mathematics to the network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from hyper_sd.features import encoder_features
from hyper_sd.guidance import Cond, guided
from hyper_sd.roles import Role, Roles
from hyper_sd.schedule import PredictionType, Schedule, at_least_float32, per_sample, to_x0_eps

Forward = Callable[[Tensor, Tensor, Cond], Tensor]


class Prediction(NamedTuple):
    """A network's estimate of the clean latent and of the noise, at least float32, both shaped like x_t."""

    x0: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Denoiser:
    """Asked for a role at (x_t, t, cond) it answers (x0, eps), whatever the teacher predicts and whatever its schedule.

    `forward(x_t, t, cond)` calls the shared network with the active role's adapters, in the network's dtype; everything else
    runs in float32, or in float64 where x_t is. Raises ValueError for an eps teacher of zero terminal SNR.
    """

    forward: Forward
    roles: Roles
    schedule: Schedule
    prediction: PredictionType

    def __post_init__(self) -> None:
        self.schedule.check(self.prediction)

    def __call__(
        self, role: Role, x_t: Tensor, t: Tensor, cond: Cond, *, w: Tensor | None = None, uncond: Cond | None = None
    ) -> Prediction:
        """Predict (x0, eps) at x_t (B, C, H, W) and t (B,) in 0..T-1; with w (B,) the output is guided against `uncond`."""
        with self.roles.use(role):
            if w is None:
                output = self.forward(x_t, t, cond)
            else:
                assert uncond is not None, "guidance needs the unconditional embedding"
                output = guided(self.forward, x_t, t, cond, uncond, w)
        alpha, sigma = self._alpha_sigma(t, x_t)
        return Prediction(*to_x0_eps(output.to(alpha), x_t.to(alpha), alpha, sigma, self.prediction))

    def features(self, role: Role, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
        """What the network's down and middle blocks make of (x_t, t, cond), each (B, C_i, h_i, w_i); the up blocks are not run."""
        with self.roles.use(role):
            return encoder_features(self.roles.net, partial(self.forward, x_t, t, cond))

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps, with t (B,) in -1..T-1; t = -1 is the clean end."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def jump(self, prediction: Prediction, s: Tensor) -> Tensor:
        """The DDIM jump Psi: x_s = alpha(s) x0 + sigma(s) eps (paper Eq. 1), with s (B,) in -1..T-1."""
        return self.noise(prediction.x0, prediction.eps, s)

    def renoise(self, x_s: Tensor, s: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of x_s at s <= t with fresh noise: (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2) eps."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self._alpha_sigma(s, x_s), self._alpha_sigma(t, x_s)
        ratio = alpha_t / alpha_s
        return ratio * x_s + (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=0).sqrt() * eps

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule(t)
        dtype = at_least_float32(like)
        return per_sample(alpha, like).to(dtype), per_sample(sigma, like).to(dtype)
