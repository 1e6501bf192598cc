"""Contrastive training of the embedded rewards on rendered scenes, and what they may be trusted with.

A caption has to find its render among all renders of the batch, its own scene with one attribute changed, and its own render
spoilt by blur, noise or a second exposure; a render has to find its caption among all captions and those of the changed scenes.
Pairs that match by chance count neither way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hyper_sd.data.scenes import BACKGROUNDS, COLORS, EMPTY, SHAPES, Scenes, captions, render, sample_scenes
from hyper_sd.judge import all_right
from hyper_sd.randomness import generator
from hyper_sd.rewards.embedded import EmbeddedKind, EmbeddedReward, new_reward, words
from tools.embedded_teacher.trainer import Plan, fit

TEMPERATURE = 0.07


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`seed` is of the weights and of the scenes; no other model of the project was trained with it."""

    seed: int
    batch: int
    steps: int
    lr: float = 2e-3


RECIPES: Mapping[EmbeddedKind, Recipe] = {
    "embedded": Recipe(seed=61, batch=128, steps=900),
    "embedded_heldout": Recipe(seed=83, batch=80, steps=900),
}
WEAK = Recipe(seed=59, batch=32, steps=200)


def train(kind: EmbeddedKind, workdir: Path) -> EmbeddedReward:
    recipe = RECIPES[kind]

    def loss(reward: EmbeddedReward, scenes: Scenes, step: int) -> Tensor:
        return contrastive_loss(reward, scenes, change_one(scenes, recipe.seed, step), generator(recipe.seed, step))

    return _fit(kind, recipe, loss, workdir)


def train_weak(workdir: Path) -> EmbeddedReward:
    """The model of `embedded`, which was shown nothing but clean renders, and not for long: a reward that can be hacked."""
    return _fit("embedded", WEAK, lambda reward, scenes, _: told_apart(reward, render(scenes), captions(scenes), scenes.labels()), workdir)


def _fit(kind: EmbeddedKind, recipe: Recipe, loss: Callable[[EmbeddedReward, Scenes, int], Tensor], workdir: Path) -> EmbeddedReward:
    torch.manual_seed(recipe.seed)
    reward = new_reward(kind)

    def loss_at(step: int) -> Tensor:
        index = np.arange(step * recipe.batch, (step + 1) * recipe.batch)
        return loss(reward, sample_scenes(recipe.seed, index), step)

    fit(Plan(name=kind, steps=recipe.steps, lr=recipe.lr, ema_decay=0.995, weight_decay=0.02), reward, loss_at, workdir)
    return reward


def contrastive_loss(reward: EmbeddedReward, scenes: Scenes, changed: Scenes, draw: torch.Generator) -> Tensor:
    clean = render(scenes)
    images = torch.cat([grain(clean, draw), grain(render(changed), draw), spoil(clean, draw)])
    return told_apart(reward, images, captions(scenes) + captions(changed), torch.cat([scenes.labels(), changed.labels()]))


def told_apart(reward: EmbeddedReward, images: Tensor, prompts: Sequence[str], labels: Tensor) -> Tensor:
    """The loss of finding each prompt's image, which has its place and its labels, among all, and its prompt among all prompts."""
    logits = reward.embed_images(images) @ reward.embed_words(words(prompts)).T / TEMPERATURE
    rows = len(labels)
    matches = all_right(labels.repeat_interleave(rows, 0), labels.repeat(rows, 1)).reshape(rows, rows)
    matches.fill_diagonal_(False)
    spoilt = torch.zeros(len(images) - rows, rows, dtype=torch.bool)  # a spoilt render is nobody's
    logits = logits.masked_fill(torch.cat([matches, spoilt]), -1e4)
    target = torch.arange(rows)
    return functional.cross_entropy(logits[:rows], target) + functional.cross_entropy(logits.T, target)


def change_one(scenes: Scenes, seed: int, step: int) -> Scenes:
    """Another value for one attribute of every scene: shape, colour, size or place of an object, or the background."""
    draw = np.random.default_rng((seed, step))
    shape, color, size = scenes.shape.copy(), scenes.color.copy(), scenes.size.copy()
    background, first = scenes.background.copy(), scenes.first.copy()
    for row in range(len(scenes)):
        place = int(draw.choice(np.flatnonzero(scenes.shape[row] != EMPTY)))
        kind = ("place", "shape", "shape", "color", "size", "background")[draw.integers(6)]
        other = int(draw.integers(1, 64))
        if kind == "shape":
            shape[row, place] = (shape[row, place] + 1 + other % (len(SHAPES) - 1)) % len(SHAPES)
        elif kind == "color":
            color[row, place] = (color[row, place] + 1 + other % (len(COLORS) - 1)) % len(COLORS)
        elif kind == "size":
            size[row, place] = 1 - size[row, place]
        elif kind == "background":
            background[row] = (background[row] + 1 + other % (len(BACKGROUNDS) - 1)) % len(BACKGROUNDS)
        else:
            free = np.flatnonzero(scenes.shape[row] == EMPTY)
            to = int(free[other % len(free)])
            for values in (shape, color, size):
                values[row, [place, to]] = values[row, [to, place]]
            if first[row] == place:
                first[row] = to
    return replace(scenes, shape=shape, color=color, size=size, background=background, first=first)


def spoil(images: Tensor, draw: torch.Generator) -> Tensor:
    """Blur, coarse noise or a second exposure of another scene, one for each image, at a random strength."""
    num = len(images)
    strength = 0.35 + 0.65 * torch.rand(num, 1, 1, 1, generator=draw)
    kind = torch.randint(3, (num, 1, 1, 1), generator=draw)
    blurred = functional.avg_pool2d(functional.pad(images, (3, 3, 3, 3), mode="replicate"), 7, 1)
    coarse = functional.interpolate(torch.randn(num, 3, 8, 8, generator=draw), scale_factor=4, mode="bicubic")
    noisy = (images + 0.35 * coarse).clamp(0, 1)
    exposed = 0.5 * (images + images.roll(1, 0))
    worse = torch.where(kind == 0, blurred, torch.where(kind == 1, noisy, exposed))
    return grain(images + strength * (worse - images), draw)


def grain(images: Tensor, draw: torch.Generator) -> Tensor:
    """A little pixel noise and blur, which are no fault: a decoder leaves as much."""
    num = len(images)
    soft = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = images + 0.3 * torch.rand(num, 1, 1, 1, generator=draw) * (soft - images)
    return images + 0.03 * torch.rand(num, 1, 1, 1, generator=draw) * torch.randn(images.shape, generator=draw)


@torch.no_grad()
def measure(reward: EmbeddedReward, recipe: Recipe, num: int = 2000) -> dict[str, float]:
    """On scenes it was not trained on: mean scores, and how often the caption's own render scores above another image."""
    seed = recipe.seed + 1
    scenes = sample_scenes(seed, np.arange(num))
    prompts, images = captions(scenes), render(scenes)
    own = reward.score(images, prompts)
    others = {
        "one_attribute_changed": render(change_one(scenes, seed, 0)),
        "spoilt": spoil(images, generator(seed)),
        "other_scene": images.roll(1, 0),
    }
    scores = {name: reward.score(other, prompts) for name, other in others.items()}
    return {
        "fresh_renders": own.mean().item(),
        "fresh_renders_std": own.std().item(),
        **{name: score.mean().item() for name, score in scores.items()},
        **{f"above_{name}": (own > score).float().mean().item() for name, score in scores.items()},
        "parameters": sum(param.numel() for param in reward.parameters()),
        "steps": recipe.steps,
    }
