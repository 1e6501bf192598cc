"""Micro-batches accumulate to the gradient of the large batch, because draws belong to samples and losses are means."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyper_sd.denoiser import Denoiser
from hyper_sd.objective import Context
from hyper_sd.stages.tscd import TSCD, GuidanceRange
from tests.networks import unet_batch, unet_denoiser

SAMPLES = range(8)


def gradients(stage: TSCD, denoiser: Denoiser, micro_batches: list[range]) -> list[Tensor]:
    """The mean of the micro-batches' gradients."""
    (only,) = stage.objectives(Context(denoiser, denoiser.roles))
    denoiser.roles.trainable(only.trains)
    params = denoiser.roles.params(only.trains)
    parts = [torch.autograd.grad(only.loss(unet_batch(samples, step=3), {}).value, params) for samples in micro_batches]
    return [torch.stack(same).mean(0) for same in zip(*parts, strict=True)]


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize(
    "changed", [{}, {"loss": "huber", "compare": "x0"}, {"offset_noise": 0.1, "empty_prompt_ratio": 0.4, "jump": "edge"}]
)
def test_micro_batches_make_the_gradient_of_the_batch(num_parts: int, changed: dict[str, Any]) -> None:
    stage = TSCD(segments=4, guidance=GuidanceRange(min=2.0, max=5.0), **changed)
    denoiser = unet_denoiser()
    size = len(SAMPLES) // num_parts
    whole = gradients(stage, denoiser, [SAMPLES])
    parts = gradients(stage, denoiser, [SAMPLES[i : i + size] for i in range(0, len(SAMPLES), size)])
    for one, other in zip(whole, parts, strict=True):
        assert bool(one.any())
        assert float((one - other).norm() / one.norm()) < 1e-4


def test_micro_batches_that_share_their_samples_do_not() -> None:
    """The equality above is no accident of the network: other samples, or the same twice, give another gradient."""
    stage, denoiser = TSCD(segments=4), unet_denoiser()
    whole = gradients(stage, denoiser, [SAMPLES])
    twice = gradients(stage, denoiser, [SAMPLES[:4], SAMPLES[:4]])
    assert all(float((one - other).norm() / one.norm()) > 1e-2 for one, other in zip(whole, twice, strict=True))
