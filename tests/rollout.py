"""TCD sampling written with the training network's own parts: what the stock sampler is held against."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser
from hyper_sd.guidance import Cond
from hyper_sd.roles import Role


def rollout(
    denoiser: Denoiser,
    role: Role,
    noise: Tensor,
    timesteps: Sequence[int],
    cond: Cond,
    *,
    eta: float = 0.0,
    w: Tensor | None = None,
    uncond: Cond | None = None,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """What TCDScheduler does, with the training network: clean latents (B, C, H, W) from noise at timesteps[0].

    Every step jumps to s = floor((1 - eta) t_next) and is renoised from s to t_next with `fresh(step)`, standard normal like noise
    (needed where eta > 0); the last step jumps to the clean end.
    """
    x = noise
    for step, t in enumerate(timesteps):
        at = torch.full((len(x),), t, device=x.device)
        prediction = denoiser(role, x, at, cond, w=w, uncond=uncond)
        if step + 1 == len(timesteps):
            return denoiser.jump(prediction, torch.full_like(at, -1))
        following = torch.full_like(at, timesteps[step + 1])
        if eta == 0:
            x = denoiser.jump(prediction, following)
            continue
        assert fresh is not None, "eta > 0 needs fresh noise"
        s = ((1 - eta) * following).floor().long()
        x = _renoise(denoiser, denoiser.jump(prediction, s), s, following, fresh(step))
    return x


def _renoise(denoiser: Denoiser, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Forward diffusion from s to t >= s: x_t = (alpha_t / alpha_s) x_s + sqrt(1 - alpha_t^2 / alpha_s^2) noise."""
    (alpha_s, _), (alpha_t, _) = denoiser.schedule(s[:1]), denoiser.schedule(t[:1])
    ratio = (alpha_t / alpha_s).to(x_s)
    return ratio * x_s + (1 - ratio.square()).sqrt() * noise
