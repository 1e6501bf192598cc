"""The AutoencoderKL of the embedded teacher: 32x32 pixels to 8x8 latents, then every latent channel scaled to unit variance."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hyper_sd.data.scenes import render, sample_scenes
from hyper_sd.randomness import generator
from tools.embedded_teacher.trainer import Plan, fit

SEED = 11
LATENT_CHANNELS = 12
KL_WEIGHT = 2e-5
BATCH = 32
DECODER_FIRST = 10_000  # batch of scenes with which the decoder alone begins
LATENT_NOISE = 0.05


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_vae(workdir: Path, steps: int) -> AutoencoderKL:
    torch.manual_seed(SEED)
    vae = build_vae()
    with torch.no_grad():  # a posterior of unit variance drowns the signal at first, and nothing is learned
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0

    def loss_at(step: int) -> Tensor:
        pixels = 2 * render(sample_scenes(SEED, np.arange(step * BATCH, (step + 1) * BATCH))) - 1
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator(SEED, step))
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        error = decoded - pixels
        return error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * kl

    fit(Plan(name="vae", steps=steps, lr=1.5e-3), vae, loss_at, workdir)
    standardise(vae)
    return vae


def train_decoder(vae: AutoencoderKL, workdir: Path, steps: int) -> None:
    """Train the decoder on, in place, on latents that stay as they are, with as much noise as sampling leaves."""
    vae.eval()
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])

    def loss_at(step: int) -> Tensor:
        index = np.arange((DECODER_FIRST + step) * BATCH, (DECODER_FIRST + step + 1) * BATCH)
        latents = encode_scenes(vae, SEED, index)
        latents = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator(SEED, DECODER_FIRST + step))
        error = vae.decode(latents).sample - (2 * render(sample_scenes(SEED, index)) - 1)
        return error.square().mean() + 0.1 * error.abs().mean()

    fit(Plan(name="decoder", steps=steps, lr=8e-4, ema_decay=0.99), decoder, loss_at, workdir)


@torch.no_grad()
def standardise(vae: AutoencoderKL) -> None:
    """Fold a shift and a scale per latent channel into the two 1x1 convolutions around the latent, so that scaling_factor is 1."""
    latents = torch.cat([encode_scenes(vae, SEED + 1, np.arange(start, start + 256)) for start in range(0, 4096, 256)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    quant.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    quant.bias[:LATENT_CHANNELS] = (quant.bias[:LATENT_CHANNELS] - mean) / std
    quant.bias[LATENT_CHANNELS:] -= 2 * std.log()


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, seed: int, index: np.ndarray) -> Tensor:
    return vae.encode(2 * render(sample_scenes(seed, index)) - 1).latent_dist.mean


@torch.no_grad()
def psnr(vae: AutoencoderKL, num: int = 1024) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions, range [0, 1]."""
    pixels = render(sample_scenes(SEED + 2, np.arange(num)))
    decoded = (vae.decode(vae.encode(2 * pixels - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
    return float((-10 * (decoded - pixels).square().mean((1, 2, 3)).log10()).mean())
