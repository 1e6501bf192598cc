"""Classifier-free guidance in the convention g: output = uncond + w (cond - uncond), so w = 1 is off."""

from collections.abc import Callable

import torch
from torch import Tensor

from hyper_sd.schedule import at_least_float32, per_sample

Cond = tuple[Tensor, ...]


def guided(forward: Callable[[Tensor, Tensor, Cond], Tensor], x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: Tensor) -> Tensor:
    """One batched network call for both branches, then u + w (c - u) with one w a sample; w has shape (B,).

    A raw output may be guided whatever it predicts: x0 and eps are affine in it and the two weights sum to one.
    """
    both = tuple(torch.cat([u, c]) for u, c in zip(uncond, cond, strict=True))
    output = forward(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    out_uncond, out_cond = output.to(at_least_float32(output)).chunk(2)
    return out_uncond + per_sample(w, x_t).to(out_cond) * (out_cond - out_uncond)
