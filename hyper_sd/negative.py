"""Does a negative prompt still work? How often the judge finds an object that the negative prompt names."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hyper_sd.data.scenes import EMPTY, NUM_PLACES, Scenes, captions, phrases, sample_scenes
from hyper_sd.measure import Evaluator, Job
from hyper_sd.randomness import Purpose, fold
from hyper_sd.sample import adapter, decode, quiet, sample

_DRAW = 1 << 23  # of scenes that no other evaluation draws


@dataclass(frozen=True)
class NegativePrompts:
    """Shares of `prompts` scenes of two objects in which the judge finds the second, without and with a negative prompt that names it."""

    adapter: str
    prompts: int
    steps: int
    guidance: float
    found_without: float
    found_with: float


def negative_prompts(evaluator: Evaluator, job: Job, num: int, seed: int) -> NegativePrompts:
    """Sample one row with no negative prompt and with the second object's phrase as one, on the same prompts and noise."""
    assert evaluator.judge is not None and job.sampler.guidance_scale > 1
    seed = fold(seed, Purpose.SAMPLE, _DRAW)
    scenes = _two_objects(seed, num)
    share = evaluator.processes.share(num)
    prompts, named = captions(scenes)[share], [objects[1] for objects in phrases(scenes)][share]
    rates = []
    with quiet(), adapter(evaluator.pipe, job.lora):
        for negatives in (None, named):
            index = range(share.start, share.stop)
            latents = sample(
                evaluator.pipe, prompts, job.sampler, seed=seed, index=index, negatives=negatives, batch_size=evaluator.batch_size
            )
            attributes = evaluator.judge.attributes(decode(evaluator.pipe, latents, evaluator.batch_size))
            seen = finds_second(attributes, scenes.rows(np.arange(num)[share]))
            rates.append(float(evaluator.processes.join(seen.float(), num).mean()))
    return NegativePrompts("teacher" if job.lora is None else "final", num, job.sampler.num_steps, job.sampler.guidance_scale, *rates)


def _two_objects(seed: int, num: int) -> Scenes:
    scenes = sample_scenes(seed, np.arange(4 * num + 64))
    two = np.flatnonzero((scenes.shape != EMPTY).sum(axis=1) == 2)[:num]
    assert len(two) == num, "two thirds of the scenes have two objects"
    return scenes.rows(two)


def finds_second(attributes: Tensor, scenes: Scenes) -> Tensor:
    """Whether the judge's attributes (B, 13) have, at the second object's place, what the caption says of it; (B,) bool."""
    wanted, rows = scenes.labels(), torch.arange(len(attributes))
    others = wanted[:, :NUM_PLACES] != EMPTY
    others[rows, torch.from_numpy(scenes.first)] = False
    place = others.int().argmax(dim=1)
    columns = torch.stack([place, NUM_PLACES + place, 2 * NUM_PLACES + place], dim=1)
    return (attributes.gather(1, columns) == wanted.gather(1, columns)).all(dim=1)
