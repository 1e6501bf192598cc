"""Small networks and batches for the tests of the mathematics."""

from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from hyper_sd.denoiser import Denoiser, Forward
from hyper_sd.guidance import Cond
from hyper_sd.objective import Batch
from hyper_sd.randomness import Draws, normal
from hyper_sd.roles import LoraSpec, Roles
from hyper_sd.schedule import PredictionType, Schedule, per_sample, to_x0_eps

SHAPE = (3, 4, 4)
COND_SIZE = 5
TINY_SPEC = LoraSpec(rank=2, alpha=3.0)


class TinyNet(nn.Module):
    """Two layers that LoRA targets: a convolution of x_t, and a linear map of the condition whose weight turns with t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(SHAPE[0], SHAPE[0], 3, padding=1)
        self.to_q = nn.Linear(COND_SIZE, SHAPE[0])

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        (embedding,) = cond
        shift = self.to_q(embedding) * torch.cos(t / 100).to(embedding)[:, None]
        return self.conv1(x_t) + shift[:, :, None, None]


def sd_schedule(*, zero_snr: bool = False) -> Schedule:
    return Schedule.from_alphas_cumprod(sd_scheduler(rescale_betas_zero_snr=zero_snr).alphas_cumprod)


def sd_scheduler(**config: object) -> DDIMScheduler:
    """Stable Diffusion's DDIM as few-step users run it, with a float64 schedule."""
    scheduler = DDIMScheduler.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "timestep_spacing": "trailing",
            **config,
        }
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def tiny_denoiser(
    adapters: Sequence[str] = ("student", "target"),
    *,
    prediction: PredictionType = "eps",
    zero_snr: bool = False,
    forward: Forward | None = None,
) -> Denoiser:
    """A denoiser over a float64 TinyNet whose adapters are all different and far from zero."""
    net = TinyNet().double()
    roles = Roles(net, TINY_SPEC, adapters)
    for index, adapter in enumerate(adapters):
        randomise(roles, adapter, seed=index)
    return Denoiser(forward or net, roles, sd_schedule(zero_snr=zero_snr), prediction)


def constant_x0_denoiser(x0: Tensor, prediction: PredictionType, *, zero_snr: bool = False) -> Denoiser:
    """A denoiser that answers x0 (C, H, W) wherever it is asked, through a network output of the given kind."""
    schedule = sd_schedule(zero_snr=zero_snr)

    def forward(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (per_sample(value, x_t) for value in schedule(t))
        clean, eps = to_x0_eps(x0.expand_as(x_t), x_t, alpha, sigma, "x0")
        return from_x0_eps(clean, eps, alpha, sigma, prediction)

    return tiny_denoiser(prediction=prediction, zero_snr=zero_snr, forward=forward)


def randomise(roles: Roles, adapter: str, *, seed: int, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    state = {name: scale * torch.randn(value.shape, generator=generator) for name, value in roles.tensors(adapter).items()}
    roles.load_state_dict(adapter, state)


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return unet.eval()


def unet_denoiser(
    adapters: Sequence[str] = ("student", "target"), *, encoder_only: Sequence[str] = (), checkpointing: bool = False
) -> Denoiser:
    """A denoiser over the tiny UNet whose adapters are all different and not zero."""
    net = tiny_unet()
    roles = Roles(net, TINY_SPEC, adapters, encoder_only=encoder_only)
    for index, adapter in enumerate(adapters):
        randomise(roles, adapter, seed=index, scale=0.1)
    if checkpointing:
        roles.enable_gradient_checkpointing()
    return Denoiser(unet_forward(net), roles, sd_schedule(), "eps")


def unet_forward(net: UNet2DConditionModel) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    return lambda x_t, t, cond: net(x_t, t, cond[0]).sample


def tiny_batch(samples: Sequence[int] = range(8), *, step: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Latents, conditions and draws of these samples, each a function of its own index."""
    x0, cond = normal((1,), samples, SHAPE).to(dtype), normal((2,), samples, (COND_SIZE,)).to(dtype)
    return Batch(x0, (cond,), (torch.full_like(cond, 0.5),), Draws(seed, step, tuple(samples)))


def unet_batch(samples: Sequence[int] = range(4), *, step: int = 0) -> Batch:
    cond = normal((2,), samples, (3, 16))
    return Batch(normal((1,), samples, (4, 8, 8)), (cond,), (torch.zeros_like(cond),), Draws(0, step, tuple(samples)))


def from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: PredictionType) -> Tensor:
    """The network output that stands for (x0, eps): the inverse of `to_x0_eps`."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        return alpha * eps - sigma * x0
    return eps - x0
