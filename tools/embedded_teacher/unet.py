"""The UNet2DConditionModel of the embedded teacher: eps prediction on SD1.5's betas, guidance from caption dropout."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from hyper_sd.data.scenes import captions, sample_scenes
from hyper_sd.randomness import generator
from tools.embedded_teacher.text import HIDDEN, tokenize
from tools.embedded_teacher.trainer import Plan, fit
from tools.embedded_teacher.vae import LATENT_CHANNELS, encode_scenes

SEED = 31
BATCH = 64
BANK = 48 * 1024  # scenes encoded once, before training
CAPTION_DROPOUT = 0.15


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 128),
        layers_per_block=1,
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,  # the number of heads, in diffusers' naming
        norm_num_groups=16,
    )


def train_unet(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    workdir: Path,
    plan: Plan,
) -> None:
    """Train `unet` in place on latents of scenes and their captions."""
    vae, text_encoder = vae.eval(), text_encoder.eval()
    latents, ids = _bank(vae, tokenizer)
    empty = tokenize(tokenizer, [""])
    alphas_cumprod = noise_schedule().alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = snr.clamp(0.1, 5) / snr  # Min-SNR at low noise; the floor keeps the high noise, where the layout is decided, from vanishing

    def loss_at(step: int) -> Tensor:
        draw = generator(SEED, step)
        rows = torch.randint(len(latents), (BATCH,), generator=draw)
        t = torch.randint(1000, (BATCH,), generator=draw)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=draw)
        drop = torch.rand(BATCH, generator=draw) < CAPTION_DROPOUT
        with torch.no_grad():
            cond = text_encoder(torch.where(drop[:, None], empty, ids[rows])).last_hidden_state
        alpha_bar = alphas_cumprod[t][:, None, None, None]
        x_t = alpha_bar.sqrt() * latents[rows].float() + (1 - alpha_bar).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(x_t, t, cond).sample
        error = output.float() - noise
        return (weight[t] * error.square().mean((1, 2, 3))).mean()

    fit(plan, unet, loss_at, workdir)


def _bank(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    latents, ids = [], []
    for start in range(0, BANK, 64):
        index = np.arange(start, start + 64)
        latents.append(encode_scenes(vae, SEED, index).half())
        ids.append(tokenize(tokenizer, captions(sample_scenes(SEED, index))))
    return torch.cat(latents), torch.cat(ids)
