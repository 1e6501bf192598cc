"""Tiny randomly initialised pipelines of diffusers' real classes, saved to a directory; nothing is downloaded."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

VOCABULARY = ("a", "red", "blue", "circle", "square", "on", "background")
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MAX_LENGTH = 16


def tiny_sd15(
    path: Path,
    *,
    image_size: int = 32,
    latent_channels: int = 4,
    vocabulary: Sequence[str] = VOCABULARY,
    prediction_type: str = "epsilon",
    zero_snr: bool = False,
    seed: int = 0,
) -> Path:
    """A pipeline of Stable Diffusion 1.5's classes; its VAE shrinks images 4 times."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(path / "tokenizer", vocabulary)
    text_encoder = CLIPTextModel(_text_config(tokenizer, hidden=16))
    unet = UNet2DConditionModel(**_unet_config(image_size // 4, latent_channels), cross_attention_dim=16)
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )
    vae = _vae(latent_channels, scaling_factor=0.18215)
    StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(path)
    return path


def tiny_sdxl(path: Path, *, image_size: int = 32, force_zeros_for_empty_prompt: bool = True, seed: int = 0) -> Path:
    """A pipeline of Stable Diffusion XL's classes: two text encoders, and a UNet that is told pooled embedding and time ids."""
    torch.manual_seed(seed)
    tokenizers = [write_tokenizer(path / name, VOCABULARY) for name in ("tokenizer", "tokenizer_2")]
    first = CLIPTextModel(_text_config(tokenizers[0], hidden=16))
    second = CLIPTextModelWithProjection(_text_config(tokenizers[1], hidden=24))
    unet = UNet2DConditionModel(
        **_unet_config(image_size // 4, 4),
        cross_attention_dim=16 + 24,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    StableDiffusionXLPipeline(
        _vae(4, scaling_factor=0.13025),
        first,
        second,
        *tokenizers,
        unet,
        scheduler,
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    ).save_pretrained(path)
    return path


def tiny_decoder(path: Path, *, latent_channels: int = 4, seed: int = 0) -> Path:
    """An AutoencoderTiny for the latents of these pipelines, four pixels to each."""
    torch.manual_seed(seed)
    channels, blocks = (8, 8, 8), (1, 1, 1)
    AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        latent_channels=latent_channels,
    ).save_pretrained(path)
    return path


def write_tokenizer(path: Path, vocabulary: Sequence[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer with one token for every word of the vocabulary; other words fall apart into letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens, merges = letters + [f"{letter}</w>" for letter in letters], []
    for word in vocabulary:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(merges[-1])]
            tokens.append(pieces[0])
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in dict.fromkeys(merges)))
    tokenizer = CLIPTokenizer(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"), model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(path)
    return tokenizer


def _unet_config(sample_size: int, channels: int) -> dict[str, object]:
    return {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }


def _vae(latent_channels: int, scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    )


def _text_config(tokenizer: CLIPTokenizer, hidden: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
