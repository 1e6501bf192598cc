"""The denoiser against diffusers' schedulers, and guidance."""

import pytest
import torch
from diffusers import TCDScheduler
from torch import Tensor

from hyper_sd.denoiser import Denoiser
from hyper_sd.guidance import guided
from hyper_sd.randomness import normal
from hyper_sd.roles import Roles
from hyper_sd.schedule import PredictionType
from tests.networks import (
    SHAPE,
    TINY_SPEC,
    TinyNet,
    constant_x0_denoiser,
    sd_schedule,
    sd_scheduler,
    tiny_batch,
    tiny_denoiser,
)

DIFFUSERS_NAME = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
PREDICTIONS = list(DIFFUSERS_NAME)
TEACHERS = [("eps", False), ("v", False), ("x0", False), ("v", True), ("x0", True)]  # and whether of zero terminal SNR
STEPS = [1, 2, 4, 5, 8, 40]


def sample(denoiser: Denoiser, x_t: Tensor, timesteps: list[int], cond: tuple[Tensor, ...]) -> list[Tensor]:
    """Our DDIM: jump from each timestep to the next, and from the last to the clean end; all points on the way."""
    points = []
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        prediction = denoiser((), x_t, torch.full((len(x_t),), t), cond)
        x_t = denoiser.jump(prediction, torch.full((len(x_t),), s))
        points.append(x_t)
    return points


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("prediction", "zero_snr"), TEACHERS)
@torch.no_grad()
def test_jumps_are_those_of_trailing_ddim(steps: int, prediction: PredictionType, zero_snr: bool) -> None:
    denoiser = tiny_denoiser(prediction=prediction, zero_snr=zero_snr)
    scheduler = sd_scheduler(prediction_type=DIFFUSERS_NAME[prediction], rescale_betas_zero_snr=zero_snr)
    scheduler.set_timesteps(steps)
    batch = tiny_batch(range(2))
    x_t = start = normal((3,), range(2), SHAPE).double()
    points = sample(denoiser, start, scheduler.timesteps.tolist(), batch.cond)
    for t, point in zip(scheduler.timesteps, points, strict=True):
        with denoiser.roles.use(()):
            output = denoiser.forward(x_t, t.expand(2), batch.cond)
        x_t = scheduler.step(output, t, x_t).prev_sample
        torch.testing.assert_close(point, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@torch.no_grad()
def test_jumps_are_those_of_tcd_at_eta_0_on_the_training_grid(steps: int, prediction: PredictionType) -> None:
    denoiser = tiny_denoiser(prediction=prediction)
    scheduler = TCDScheduler.from_config(sd_scheduler().config, prediction_type=DIFFUSERS_NAME[prediction], original_inference_steps=40)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    batch = tiny_batch(range(2))
    x_t = start = normal((3,), range(2), SHAPE).double()
    points = sample(denoiser, start, scheduler.timesteps.tolist(), batch.cond)
    for t, point in zip(scheduler.timesteps, points, strict=True):
        with denoiser.roles.use(()):
            output = denoiser.forward(x_t, t.expand(2), batch.cond)
        x_t = scheduler.step(output, t, x_t, eta=0.0).prev_sample
        torch.testing.assert_close(point, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_noise_is_add_noise_of_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    t = torch.tensor([0, 1, 24, 499, 998, 999])
    x0, eps = normal((1,), range(6), SHAPE).to(dtype), normal((2,), range(6), SHAPE).to(dtype)
    x_t = tiny_denoiser().noise(x0, eps, t)
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t, sd_scheduler().add_noise(x0, eps, t), rtol=tolerance, atol=tolerance)


def test_noise_at_the_clean_end_is_noise_at_the_first_step() -> None:
    denoiser, x0, eps = tiny_denoiser(), *normal((1,), range(2), (1, *SHAPE)).double()
    assert torch.equal(denoiser.noise(x0, eps, torch.tensor([-1])), denoiser.noise(x0, eps, torch.tensor([0])))


@pytest.mark.parametrize(("prediction", "zero_snr"), TEACHERS)
def test_every_jump_of_a_constant_x0_network_is_exact(prediction: PredictionType, zero_snr: bool) -> None:
    x0 = normal((1,), [0], SHAPE)[0].double()
    denoiser = constant_x0_denoiser(x0, prediction, zero_snr=zero_snr)
    eps = normal((2,), range(7), SHAPE).double()
    t = torch.tensor([999, 999, 999, 500, 500, 24, 0])
    s = torch.tensor([998, 250, -1, 499, -1, 3, -1])
    cond = (torch.zeros(7, 5, dtype=torch.float64),)
    prediction_at_t = denoiser((), denoiser.noise(x0.expand_as(eps), eps, t), t, cond)
    torch.testing.assert_close(prediction_at_t.x0, x0.expand_as(eps), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(denoiser.jump(prediction_at_t, s), denoiser.noise(x0.expand_as(eps), eps, s), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_an_eps_denoiser_of_zero_terminal_snr_is_refused() -> None:
    net = TinyNet()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Denoiser(net, Roles(net, TINY_SPEC, ("student",)), sd_schedule(zero_snr=True), "eps")


@torch.no_grad()
def test_a_bf16_network_answers_in_float32() -> None:
    net = TinyNet().bfloat16()
    denoiser = Denoiser(lambda x, t, c: net(x.bfloat16(), t, (c[0].bfloat16(),)), Roles(net, TINY_SPEC, ()), sd_schedule(), "eps")
    batch = tiny_batch(range(3), dtype=torch.float32)
    t = torch.tensor([999, 500, 0])
    prediction = denoiser((), batch.x0, t, batch.cond, w=torch.full((3,), 4.0), uncond=batch.uncond)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    alpha, sigma = (value.float()[:, None, None, None] for value in denoiser.schedule(t))
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, batch.x0, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_guidance_is_one_call_that_moves_away_from_uncond_by_each_samples_w() -> None:
    net, calls = TinyNet().double(), []

    def forward(x_t: Tensor, t: Tensor, cond: tuple[Tensor, ...]) -> Tensor:
        calls.append(len(x_t))
        return net(x_t, t, cond)

    batch, t, w = tiny_batch(range(3)), torch.tensor([10, 500, 999]), torch.tensor([0.0, 1.0, 7.5])
    found = guided(forward, batch.x0, t, batch.cond, batch.uncond, w)
    assert calls == [6]
    c, u = net(batch.x0, t, batch.cond), net(batch.x0, t, batch.uncond)
    for row, scale in enumerate(w):
        torch.testing.assert_close(found[row], u[row] + scale * (c[row] - u[row]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], u[0])
    torch.testing.assert_close(found[1], c[1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@torch.no_grad()
def test_guidance_of_raw_outputs_is_guidance_of_x0_and_eps(prediction: PredictionType) -> None:
    denoiser, batch = tiny_denoiser(prediction=prediction), tiny_batch(range(3))
    t, w = torch.tensor([10, 500, 999]), torch.tensor([2.0, 4.0, 8.0])
    found = denoiser((), batch.x0, t, batch.cond, w=w, uncond=batch.uncond)
    c, u = (denoiser((), batch.x0, t, cond) for cond in (batch.cond, batch.uncond))
    scale = w[:, None, None, None]
    torch.testing.assert_close(found.x0, u.x0 + scale * (c.x0 - u.x0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.eps, u.eps + scale * (c.eps - u.eps), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_role_decides_who_answers() -> None:
    denoiser, batch, t = tiny_denoiser(), tiny_batch(range(2)), torch.tensor([10, 999])
    answers = [denoiser(role, batch.x0, t, batch.cond).eps for role in ((), ("student",), ("target",), ())]
    assert torch.equal(answers[0], answers[3])
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[1], answers[2])
