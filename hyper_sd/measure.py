"""Rows of an evaluation: a LoRA and a sampler, measured on draws of prompts and noise that all rows share.

Accuracy is the share of images in which the judge finds every attribute right. FD is the Fréchet distance of the judge's features to
those of fresh renders. mse_to_teacher is the mean squared distance of the latent to the end point of the teacher's own trajectory from
the same noise, at the teacher's guidance.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hyper_sd.commands import DIVERSITY
from hyper_sd.config import EvalConfig, TeacherConfig
from hyper_sd.data import Source
from hyper_sd.data.scenes import IMAGE_SIZE, captions, render, sample_scenes
from hyper_sd.image_metrics import Figure, ImageMetrics, reference_features
from hyper_sd.judge import Judge, all_right
from hyper_sd.metrics import Gaussian, Jackknifed, frechet_jackknife, gap, mean_and_error, mean_of_draws
from hyper_sd.paths import asset_dir
from hyper_sd.processes import Processes
from hyper_sd.randomness import Purpose, fold
from hyper_sd.sample import Sampler, adapter, decode, latent_shape, quiet, sample, teacher_row
from hyper_sd.teachers import load_sampler

K = TypeVar("K", bound=Hashable)

NUM_GRID = 8  # prompts of the grids: the first of the first draw
REFERENCE_SEED = 0xF1D  # of the renders that features are compared with
_REPEAT = 1 << 22  # tells the seeds of repeated prompts from those of draws


@dataclass(frozen=True)
class Draw:
    """The prompts and the noise that rows share; labels (B, 13) are what the judge should find."""

    seed: int
    prompts: list[str]
    labels: Tensor | None = None
    renders: Tensor | None = None


def make_draw(cfg: EvalConfig, number: int, num_prompts: int, source: Source | None = None) -> Draw:
    """Draw `number` of eval.seed: captions of scenes nobody trained on for the judge, else captions of the data source."""
    seed = fold(cfg.seed, Purpose.SAMPLE, number)
    if cfg.judge is not None:
        scenes = sample_scenes(seed, np.arange(num_prompts))
        return Draw(seed, captions(scenes), scenes.labels(), render(scenes))
    assert source is not None, "without a judge, prompts come from a data source"
    first = number * num_prompts
    positions = range(first, first + num_prompts)
    return Draw(seed, [caption for position in positions for caption in source.batch([position]).captions])  # of any size: one by one


def check_judge(cfg: EvalConfig, image_size: int) -> None:
    """Raise ValueError for a judge that does not know images of this many pixels a side."""
    if cfg.judge is not None and image_size != IMAGE_SIZE:
        raise ValueError(
            f"eval.judge={cfg.judge} knows images of {IMAGE_SIZE} pixels, this teacher draws {image_size}; set eval.judge=null"
        )


def teacher_guidance(teacher: TeacherConfig, cfg: EvalConfig) -> float:
    """The guidance scale that the teacher is sampled with."""
    return (teacher.guidance.min + teacher.guidance.max) / 2 if cfg.guidance is None else cfg.guidance


@dataclass(frozen=True)
class Job:
    """One row to measure: a LoRA file (None: the teacher) and a sampler."""

    lora: Path | None
    sampler: Sampler


@dataclass(frozen=True)
class Row:
    """One row over all draws; images (B, 3, H, W) are those of the grid."""

    sampler: Sampler
    right: Tensor | None
    frechet: Jackknifed | None
    error: Tensor | None
    images: Tensor
    metrics: dict[str, Figure] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Rewards' scores of every image."""
        return {name: figure.scores for name, figure in self.metrics.items() if figure.scores is not None}

    def to_json(self, teacher: "Row | None" = None, undistilled: "Row | None" = None) -> dict[str, Any]:
        """accuracy, frechet, gap and mse_to_teacher with standard errors, null where there is nothing to compare with, and metrics."""
        accuracy = mean_and_error(self.right) if self.right is not None else (None, None)
        frechet = (self.frechet.value, self.frechet.standard_error) if self.frechet is not None else (None, None)
        error = mean_and_error(self.error) if self.error is not None else (None, None)
        relative = self._gap(teacher, undistilled)
        names = ("accuracy", "frechet", "gap", "mse_to_teacher")
        values = dict(zip(names, (accuracy, frechet, relative, error), strict=True))
        return {
            **{name: value for name, (value, _) in values.items()},
            "standard_error": {name: se for name, (_, se) in values.items()},
            "guidance": self.sampler.guidance_scale,
            "metrics": {name: figure.to_json() for name, figure in self.metrics.items()},
        }

    def _gap(self, teacher: "Row | None", undistilled: "Row | None") -> tuple[float | None, float | None]:
        figures = [row.frechet if row is not None else None for row in (self, teacher, undistilled)]
        own, best, worst = figures
        if own is None or best is None or worst is None or worst.value <= best.value:
            return None, None  # a teacher that few steps do not hurt leaves no scale to measure on
        relative = gap(own, best, worst)
        return relative.value, relative.standard_error


@dataclass(frozen=True)
class Evaluator:
    """A teacher's stock pipeline, with the judge and the features of `eval.reference` fresh renders it compares with.

    Every process samples and judges its share of the prompts and then holds the same rows.
    """

    pipe: Any
    guidance: float
    teacher_steps: int
    image_size: int | None
    batch_size: int
    judge: Judge | None
    reference: Gaussian | None
    processes: Processes
    done: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def open(cls, teacher: TeacherConfig, cfg: EvalConfig, processes: Processes) -> "Evaluator":
        """Raises ValueError, naming the key, for a judge that does not know the pipeline's images."""
        pipe = load_sampler(teacher, processes.device)
        judge, reference = None, None
        side = latent_shape(pipe, teacher.image_size)[1] * pipe.vae_scale_factor
        check_judge(cfg, side)
        if cfg.judge is not None:
            judge = Judge.load(asset_dir("judge"))
            features = partial(_on_cpu, judge.features)
            reference = Gaussian.fit(reference_features(features, reference_scenes, cfg.reference, processes, chunk=512))
        return cls(
            pipe,
            teacher_guidance(teacher, cfg),
            cfg.teacher_steps,
            teacher.image_size,
            cfg.images_at_once(side),
            judge,
            reference,
            processes,
        )

    def teacher_row(self, num_steps: int, guidance: float | None = None) -> Sampler:
        return teacher_row(self.pipe.scheduler.config, num_steps, self.guidance if guidance is None else guidance)

    def measure(
        self,
        jobs: Mapping[K, Job],
        draws: Sequence[Draw],
        ends: Sequence[Tensor] | None = None,
        metrics: ImageMetrics | None = None,
        title: str = "evaluation",
    ) -> dict[K, Row]:
        """One row a job. `ends` are the end points that the draws' first latents are compared with. Nothing is sampled twice."""
        asked = [[draw.seed, len(draw.prompts)] for draw in draws], ends is not None, metrics is not None
        names = {key: json.dumps([_identity(job), *asked], sort_keys=True) for key, job in jobs.items()}
        pending = {names[key]: job for key, job in jobs.items() if names[key] not in self.done}
        repeats = _repeats(draws[0], metrics)
        total = sum(_cost(job.sampler) for job in pending.values()) * sum(len(draw.prompts) for draw in [*draws, *repeats])
        with quiet(), self._bar(total, title) as bar:
            for lora in dict.fromkeys(job.lora for job in pending.values()):
                with adapter(self.pipe, lora):
                    for name, job in pending.items():
                        if job.lora == lora:
                            self.done[name] = self._row(job.sampler, draws, ends, metrics, bar)
        return {key: self.done[name] for key, name in names.items()}

    def end_points(self, draws: Sequence[Draw], num: int | None = None) -> list[Tensor]:
        """The teacher's clean latents for the first `num` prompts of every draw, at twice the steps of its row: where trajectories end."""
        row = self.teacher_row(2 * self.teacher_steps)
        draws = [replace(draw, prompts=draw.prompts[:num]) for draw in draws]
        total = sum(len(draw.prompts) for draw in draws) * _cost(row)
        with quiet(), self._bar(total, "the teacher's end points") as bar:
            return [self._sample(row, draw, bar) for draw in draws]

    def floor(self, draws: Sequence[Draw]) -> tuple[float | None, float | None]:
        """FD and accuracy of the renders of the draws' own scenes: what a perfect sampler would get with as many images."""
        if self.judge is None:
            return None, None
        scores = [self._judged(draw.renders[self._share(draw)], draw) for draw in draws if draw.renders is not None]
        return mean_of_draws([frechet for _, frechet in scores]).value, float(torch.cat([right for right, _ in scores]).float().mean())

    def _row(self, sampler: Sampler, draws: Sequence[Draw], ends: Sequence[Tensor] | None, metrics: ImageMetrics | None, bar: Any) -> Row:
        right, frechet, error, measured, grid = [], [], [], [], None
        for number, draw in enumerate(draws):
            latents = self._sample(sampler, draw, bar)
            if ends is not None:
                error.append((latents[: len(ends[number])] - ends[number]).square().flatten(1).mean(1))
            grid = decode(self.pipe, latents[:NUM_GRID], self.batch_size) if grid is None else grid
            if self.judge is None and metrics is None:
                continue
            images = self._decode_share(latents, draw)
            if self.judge is not None:
                for scores, score in zip((right, frechet), self._judged(images, draw), strict=True):
                    scores.append(score)
            if metrics is not None:
                measured.append(metrics.measure(images, draw.prompts[self._share(draw)], len(draw.prompts)))
        assert grid is not None
        return Row(
            sampler,
            right=torch.cat(right) if right else None,
            frechet=mean_of_draws(frechet) if frechet else None,
            error=torch.cat(error) if error else None,
            images=grid,
            metrics=metrics.figures(measured, self._seeds(sampler, draws[0], metrics, bar)) if metrics is not None else {},
        )

    def _seeds(self, sampler: Sampler, draw: Draw, metrics: ImageMetrics, bar: Any) -> Tensor | None:
        """Features (S, P, D) of the draw's first P prompts with S seeds each."""
        repeats = _repeats(draw, metrics)
        seeds = [metrics.features(self._decode_share(self._sample(sampler, r, bar), r), len(r.prompts)) for r in repeats]
        return torch.stack(seeds) if seeds else None

    def _decode_share(self, latents: Tensor, draw: Draw) -> Tensor:
        return decode(self.pipe, latents[self._share(draw)], self.batch_size)

    def ceiling(self, draws: Sequence[Draw], metrics: ImageMetrics | None) -> dict[str, Tensor]:
        """The rewards' scores of the renders of the draws' own scenes; empty without them."""
        if metrics is None:
            return {}
        rendered = [(draw, draw.renders[self._share(draw)]) for draw in draws if draw.renders is not None]
        measured = [metrics.measure(images, draw.prompts[self._share(draw)], len(draw.prompts)) for draw, images in rendered]
        return metrics.scores(measured) if measured else {}

    def _bar(self, total: int, title: str) -> "tqdm[Any]":
        """Of the main process; into a log file a line every half minute, and none of what is done sooner."""
        own, pace = self.processes.is_main, 0.0 if sys.stderr.isatty() else 30.0
        return tqdm(total=total, unit="forward", unit_scale=True, desc=title, disable=not own, mininterval=pace or 0.1, delay=pace)

    def _share(self, draw: Draw) -> slice:
        return self.processes.share(len(draw.prompts))

    def _sample(self, sampler: Sampler, draw: Draw, bar: Any) -> Tensor:
        """The latents of the whole draw."""
        cost = _cost(sampler) * self.processes.world_size
        bar.set_postfix_str(f"{sampler.num_steps} steps of {sampler.scheduler.removesuffix('Scheduler')}", refresh=False)
        share, total = self._share(draw), len(draw.prompts)
        latents = sample(
            self.pipe,
            draw.prompts[share],
            sampler,
            seed=draw.seed,
            index=range(total)[share],
            image_size=self.image_size,
            batch_size=self.batch_size,
            advance=lambda n: bar.update(n * cost),
        )
        return self.processes.join(latents, total)

    @torch.inference_mode()
    def _judged(self, images: Tensor, draw: Draw) -> tuple[Tensor, Jackknifed]:
        """Which images of the whole draw are right, and their Fréchet distance, from this process's share of the images."""
        assert self.judge is not None and self.reference is not None and draw.labels is not None
        features, found = (
            self.processes.join(torch.cat([measure(chunk) for chunk in images.split(512)]), len(draw.prompts))
            for measure in (self.judge.features, self.judge.attributes)
        )
        return all_right(found, draw.labels), frechet_jackknife(features, self.reference)


def _on_cpu(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Features by the judge, which stays on the CPU, of images from wherever they are."""
    return features(images.cpu())


def reference_scenes(index: np.ndarray) -> Tensor:
    """Renders (B, 3, 32, 32) of scenes that no draw has."""
    return render(sample_scenes(REFERENCE_SEED, index))


def _repeats(draw: Draw, metrics: ImageMetrics | None) -> list[Draw]:
    """The same few prompts with several seeds, for the diversity between them."""
    if metrics is None or DIVERSITY not in metrics.cfg.names:
        return []
    cfg = metrics.cfg.diversity
    return [Draw(fold(draw.seed, _REPEAT, number), draw.prompts[: cfg.prompts]) for number in range(cfg.seeds)]


def _cost(sampler: Sampler) -> int:
    """Network evaluations a sample."""
    return sampler.num_steps * (2 if sampler.guidance_scale > 1 else 1)


def _identity(job: Job) -> list[Any]:
    """Equal for jobs whose images are equal: the same tensors, whatever the file is called and says, and the same sampler."""
    weights = "" if job.lora is None else tensors_digest(job.lora)
    return [weights, job.sampler.num_steps, job.sampler.to_json()]


def tensors_digest(file: Path) -> str:
    """SHA-256 of a safetensors file after its header."""
    with file.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()
