"""Train the judge on rendered scenes and measure what it may be trusted with."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hyper_sd.data.scenes import EMPTY, NUM_PLACES, render, sample_scenes
from hyper_sd.judge import NUM_FEATURES, Judge, all_right
from hyper_sd.randomness import generator
from tools.embedded_teacher.trainer import Plan, fit

SEED = 41
BATCH = 96
NOISE = 0.03  # pixel noise on the renders, so that the judge does not lean on exact pixel values


def train_judge(workdir: Path, steps: int) -> Judge:
    torch.manual_seed(SEED)
    pupil = _Pupil()
    judge = pupil.judge

    def loss_at(step: int) -> Tensor:
        scenes = sample_scenes(SEED, np.arange(step * BATCH, (step + 1) * BATCH))
        images = render(scenes)
        draw = generator(SEED, step)
        images = images + NOISE * torch.rand(BATCH, 1, 1, 1, generator=draw) * torch.randn(images.shape, generator=draw)
        labels = scenes.labels()
        logits, clouds = pupil(images)
        loss = (clouds - torch.from_numpy(scenes.clouds).float()).square().mean()
        for column, (scores, label) in enumerate(zip(logits, labels.T, strict=True)):
            present = labels[:, column % NUM_PLACES] != EMPTY
            judged = present if NUM_PLACES <= column < 3 * NUM_PLACES else torch.ones_like(present)
            loss = loss + (nn.functional.cross_entropy(scores, label, reduction="none") * judged).sum() / judged.sum()
        return loss

    fit(Plan(name="judge", steps=steps, lr=2e-3, ema_decay=0.995, weight_decay=0.01), pupil, loss_at, workdir)
    standardise(judge)
    return judge


class _Pupil(nn.Module):
    """The judge with a head that reads the clouds back, which keeps their contrast in its features, and is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = Judge()
        self.clouds = nn.Conv2d(NUM_FEATURES, 1, 2, 2)

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        return self.judge(images), self.clouds(self.judge.maps(images))[:, 0]


@torch.no_grad()
def standardise(judge: Judge) -> None:
    """Give every feature unit variance on renders, so that none outweighs the others in a Fréchet distance."""
    features = torch.cat([judge.features(render(sample_scenes(SEED + 2, np.arange(i, i + 512)))) for i in range(0, 8192, 512)])
    judge.feature_std *= features.std(dim=0).clamp(min=1e-3 * float(features.std()))


@torch.no_grad()
def measure_judge(judge: Judge, num: int = 4000) -> dict[str, float]:
    """Accuracy on fresh renders, on permuted captions, with one attribute changed, and of the shape on blurred renders."""
    scenes = sample_scenes(SEED + 1, np.arange(num))
    images, labels = render(scenes), scenes.labels()
    found = judge.attributes(images)
    small = nn.functional.interpolate(images, scale_factor=0.25, mode="area")
    blurred = judge.attributes(nn.functional.interpolate(small, size=images.shape[-1], mode="bilinear"))
    present = labels[:, :NUM_PLACES] != EMPTY
    return {
        "fresh_renders": all_right(found, labels).float().mean().item(),
        "permuted_captions": all_right(found, scenes.labels().roll(1, dims=0)).float().mean().item(),
        "one_attribute_changed": all_right(found, change_one(labels)).float().mean().item(),
        "shape_on_blurred": (blurred[:, :NUM_PLACES] == labels[:, :NUM_PLACES])[present].float().mean().item(),
    }


def change_one(labels: Tensor) -> Tensor:
    """Change one attribute of every scene to another value: shape, colour or size of an object, or the background."""
    changed = labels.clone()
    for row in range(len(labels)):
        places = (labels[row, :NUM_PLACES] != EMPTY).nonzero()[:, 0].tolist()
        draw = np.random.default_rng(row)
        place, kind = places[draw.integers(len(places))], draw.integers(4)
        column, num = [(place, EMPTY), (NUM_PLACES + place, 8), (2 * NUM_PLACES + place, 2), (3 * NUM_PLACES, 5)][kind]
        changed[row, column] = (labels[row, column] + 1 + draw.integers(num - 1)) % num
    return changed
