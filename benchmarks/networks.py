"""The networks that the benchmarks run on, with a condition of the right shape: full-size configurations with random weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hyper_sd.guidance import Cond
from hyper_sd.paths import asset_dir
from hyper_sd.schedule import Schedule

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
NUM_TOKENS = 77  # of CLIP's text encoders
SDXL_POOLED = 1280


@dataclass(frozen=True)
class Network:
    """A frozen UNet in one dtype and how it is called."""

    net: UNet2DConditionModel
    num_tokens: int
    forward: Callable[[Tensor, Tensor, Cond], Tensor]

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def latents(self, batch: int) -> Tensor:
        """A float32 stand-in for clean latents, (B, C, h, w)."""
        side = self.net.config["sample_size"]
        return torch.randn(batch, self.net.config["in_channels"], side, side, device=self.device)

    def cond(self, batch: int) -> Cond:
        """A stand-in for the condition: text embeddings, and for SDXL the pooled embedding and the time ids."""
        text = torch.randn(batch, self.num_tokens, self.net.config["cross_attention_dim"], device=self.device)
        if self.net.config["addition_embed_type"] is None:
            return (text,)
        side = 8 * self.net.config["sample_size"]
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=self.device).expand(batch, -1)
        return text, torch.randn(batch, SDXL_POOLED, device=self.device), time_ids


def network_config(teacher: Literal["embedded", "sd15_random", "sdxl_random"]) -> tuple[dict[str, Any], int]:
    """The UNet's configuration and the number of text tokens it attends to."""
    if teacher == "embedded":
        unet, text_encoder = (json.loads((asset_dir("teacher") / part / "config.json").read_text()) for part in ("unet", "text_encoder"))
        return {key: value for key, value in unet.items() if not key.startswith("_")}, text_encoder["max_position_embeddings"]
    return (SD15_UNET if teacher == "sd15_random" else SDXL_UNET), NUM_TOKENS


def sd_schedule() -> Schedule:
    """Stable Diffusion's betas: linear in their square roots from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return Schedule.from_alphas_cumprod((1 - betas).cumprod(0))


def build_network(config: dict[str, Any], num_tokens: int, device: torch.device, dtype: torch.dtype) -> Network:
    """A UNet of this configuration with random weights, in eval; on the meta device it takes no memory."""
    with device:
        net = UNet2DConditionModel(**config)
    net = net.eval().requires_grad_(False)
    if dtype != torch.float32:
        net.to(dtype)  # pyright: ignore[reportArgumentType]

    def forward(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        text, *added = (c.to(dtype) for c in cond)
        kwargs = {"text_embeds": added[0], "time_ids": added[1]} if added else None
        return net(x_t.to(dtype), t, encoder_hidden_states=text, added_cond_kwargs=kwargs, return_dict=False)[0]

    return Network(net, num_tokens, forward)
