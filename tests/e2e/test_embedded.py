"""What is shipped: the embedded teacher and the judge."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from hyper_sd.data.scenes import IMAGE_SIZE, captions, render, sample_scenes
from hyper_sd.judge import Judge, all_right
from hyper_sd.paths import asset_dir
from tools.embedded_teacher.judge import measure_judge

NUM = 256


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(asset_dir("judge"))


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(asset_dir("teacher"), dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    return all_right(judge.attributes(images), labels).float().mean().item()


def test_the_judge_can_be_trusted(judge: Judge) -> None:
    figures = measure_judge(judge, num=2000)
    assert figures["fresh_renders"] >= 0.99
    assert figures["permuted_captions"] <= 0.02
    assert figures["one_attribute_changed"] <= 0.05
    assert figures["shape_on_blurred"] < 0.7


def test_the_teacher_is_a_stock_pipeline_of_safetensors(pipe: Any) -> None:
    assert isinstance(pipe.unet, UNet2DConditionModel) and isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.text_encoder, CLIPTextModel) and isinstance(pipe.tokenizer, CLIPTokenizer)
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.scheduler.config.beta_schedule == "scaled_linear"
    files = [file for file in Path(asset_dir("teacher")).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}
    assert sum(file.stat().st_size for file in files) <= 16e6


@torch.inference_mode()
def test_reconstructions_are_right(pipe: Any, judge: Judge) -> None:
    scenes = sample_scenes(7, np.arange(NUM))
    pixels = render(scenes)
    decoded = []
    for part in pixels.split(64):
        decoded.append((pipe.vae.decode(pipe.vae.encode(2 * part - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1))
    images = torch.cat(decoded)
    psnr = -10 * (images - pixels).square().mean((1, 2, 3)).log10()
    assert psnr.mean() >= 30
    assert accuracy(judge, images, scenes.labels()) >= 0.95


@pytest.mark.slow
@torch.inference_mode()
def test_the_teacher_draws_what_it_is_told_and_needs_its_steps(pipe: Any, judge: Judge) -> None:
    scenes = sample_scenes(8, np.arange(64))
    labels, prompts = scenes.labels(), captions(scenes)
    reached = {}
    for steps, guidance in ((25, 3.0), (1, 1.0)):
        draw = torch.Generator().manual_seed(0)
        images = pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=draw, output_type="pt").images
        assert images.shape == (64, 3, IMAGE_SIZE, IMAGE_SIZE)
        reached[steps] = accuracy(judge, images, labels)
    assert reached[25] >= 0.85
    assert reached[1] < reached[25] - 0.2
