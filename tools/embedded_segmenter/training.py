"""A small Mask2Former for the embedded teacher's scenes, trained by its own loss on renders, and what it may be trusted with."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from hyper_sd.config import SegmenterConfig
from hyper_sd.data.scenes import IMAGE_SIZE, SHAPES, render, sample_scenes
from hyper_sd.data.scenes_data import scene_instances
from hyper_sd.randomness import fold, generator
from hyper_sd.rewards.segmenter import build_segmenter
from tools.embedded_reward.training import grain, spoil
from tools.embedded_teacher.trainer import Plan, fit

PATCH = 2  # pixels; masks are of half the image's size


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`seed` is of the weights and of the scenes; no other model of the project was trained with it."""

    seed: int = 107
    batch: int = 32
    steps: int = 1800
    lr: float = 1e-3


def new_model() -> Mask2FormerForUniversalSegmentation:
    """A model with random weights."""
    backbone = SwinConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        embed_dim=24,
        depths=[1, 1, 2, 1],
        num_heads=[2, 2, 4, 4],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        dim_feedforward=96,
        encoder_layers=1,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=8,
        feature_strides=[PATCH, 2 * PATCH, 4 * PATCH, 8 * PATCH],
        common_stride=PATCH,
        train_num_points=256,
        id2label=dict(enumerate(SHAPES)),
        label2id={name: number for number, name in enumerate(SHAPES)},
    )
    return Mask2FormerForUniversalSegmentation(config)


def train(workdir: Path, recipe: Recipe = Recipe()) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(recipe.seed)
    model = new_model()

    def loss_at(step: int) -> Tensor:
        scenes = sample_scenes(recipe.seed, np.arange(step * recipe.batch, (step + 1) * recipe.batch))
        images = grain(render(scenes), generator(recipe.seed, step))
        torch.manual_seed(fold(recipe.seed, step) % 2**32)  # the points of masks that its own loss compares
        objects = scene_instances(scenes, IMAGE_SIZE)
        masks, labels = [one.masks.float() for one in objects], [one.labels for one in objects]
        return model(pixel_values=2 * images - 1, mask_labels=masks, class_labels=labels).loss.squeeze()

    fit(Plan(name="segmenter", steps=recipe.steps, lr=recipe.lr, ema_decay=0.995, weight_decay=0.02), model, loss_at, workdir)
    return model


def save(model: Mask2FormerForUniversalSegmentation, path: Path) -> None:
    """Float16 weights, config.json and preprocessor_config.json, as transformers names them."""
    deepcopy(model).half().save_pretrained(path)
    processor = {
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


@torch.no_grad()
def measure(path: Path, num: int = 500, recipe: Recipe = Recipe()) -> dict[str, float]:
    """The saved model's mean loss on scenes it was not trained on: of their renders, of those spoilt, and of another scene's."""
    scenes = sample_scenes(recipe.seed + 1, np.arange(num))
    segmenter = build_segmenter(SegmenterConfig(path=str(path), file="model.safetensors"), SHAPES, torch.device("cpu"))
    images, objects = render(scenes), scene_instances(scenes, IMAGE_SIZE)
    others = {"spoilt": spoil(images, generator(recipe.seed)), "other_scene": images.roll(1, 0)}
    losses = {name: segmenter.loss(other, objects) for name, other in {"renders": images, **others}.items()}
    return {
        **{name: loss.mean().item() for name, loss in losses.items()},
        **{f"below_{name}": (losses["renders"] < losses[name]).float().mean().item() for name in others},
        "parameters": sum(value.numel() for value in new_model().parameters()),
        **{f"trained_{name}": value for name, value in asdict(recipe).items()},
    }
