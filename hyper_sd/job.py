"""What the training loop is given: a stage, the samples it sees, and who watches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hyper_sd.config import StagePlan
from hyper_sd.data import BadSamples, Samples, Source
from hyper_sd.objective import Batch, Context, Stage
from hyper_sd.randomness import Draws
from hyper_sd.teachers.base import Teacher

BEST = "best"  # the adapter that a guard keeps


@dataclass(frozen=True)
class Feed:
    """Positions of the run's sample stream to micro-batches of latents and conditions, with the draws of exactly those samples.

    `draw(prompts, positions)` makes the teacher's own latents, for data without images. `prefetch` steps are read ahead.
    """

    source: Source
    teacher: Teacher
    seed: int
    bad: BadSamples
    draw: Callable[[Sequence[str], Sequence[int]], Tensor]
    prefetch: int = 2

    @torch.no_grad()
    def batch(self, samples: Samples, positions: Sequence[int], step: int, *, latents: bool = True) -> Batch:
        """Without `latents`, x0 is zeros unless the data hold prepared ones: nothing is encoded or drawn."""
        self.bad.add(samples)
        encoded = samples.conds if samples.conds is not None else self.teacher.encode_prompts(samples.captions)
        cond = tuple(part.to(self.teacher.device, non_blocking=True) for part in encoded)
        uncond = self.teacher.uncond(len(positions))
        if samples.sizes is not None:
            cond, uncond = (self.teacher.with_sizes(parts, samples.sizes) for parts in (cond, uncond))
        draws = Draws(self.seed, step, tuple(positions))
        x0 = self._x0(samples, positions) if latents or samples.latents is not None else self._zeros(samples)
        return Batch(x0, cond, uncond, draws, tuple(samples.captions), samples.instances)

    def _x0(self, samples: Samples, positions: Sequence[int]) -> Tensor:
        if samples.latents is not None:
            self._check_latents(samples)
            return samples.latents.to(self.teacher.device, non_blocking=True)
        if samples.images is not None:
            return self.teacher.encode_images(samples.images)
        return self.draw(samples.captions, positions).to(self.teacher.device)

    def _zeros(self, samples: Samples) -> Tensor:
        channels, *size = self.teacher.latent_shape
        if samples.images is not None:  # of another size than the teacher's own, perhaps
            size = [pixels * own // self.teacher.image_size for pixels, own in zip(samples.images.shape[2:], size, strict=True)]
        return torch.zeros(len(samples.captions), channels, *size, device=self.teacher.device)

    def _check_latents(self, samples: Samples) -> None:
        assert samples.latents is not None
        latents = samples.latents
        own = self.teacher.latent_shape
        expected = own if samples.sizes is None else (own[0], *latents.shape[2:])  # prepared sizes may differ from the teacher's own
        if latents.shape[1:] != expected:
            raise ValueError(
                f"data.path holds latents of shape {tuple(latents.shape[1:])}, but this teacher's are {own}; "
                "they were prepared for another teacher or image size: change data.path, teacher.path or teacher.image_size"
            )


@dataclass(frozen=True)
class Job:
    """One stage to be trained. The run has taken `first_step` steps and used `first_position` samples before it."""

    stage: Stage
    plan: StagePlan
    context: Context
    feed: Feed
    folder: Path
    first_step: int = 0
    first_position: int = 0
    guard: "Guard | None" = None


class Guard(Protocol):
    """Watches a stage by what it is not trained on. What it says is the same in every process.

    Its whole state is `history`, a row for every look, and the adapter BEST; both are part of checkpoints.
    """

    history: list[dict[str, float]]

    @property
    def stops(self) -> bool:
        """Whether the stage must end, after what was seen last."""
        ...

    def look(self, job: Job, step: int) -> None:
        """Called after every step, and before the first."""
        ...

    def hand_on(self, job: Job) -> None:
        """The stage has ended: leave the best that was seen in the adapter that is exported."""
        ...


class Observer(Protocol):
    """What a run does beside training. Called in every process; `step` counts the stage's finished steps."""

    def started(self, job: Job, step: int) -> None: ...

    def logged(self, job: Job, step: int, values: dict[str, float]) -> None: ...

    def stepped(self, job: Job, step: int) -> None: ...

    def finished(self, job: Job, step: int) -> None: ...

    def saved(self, job: Job, step: int, held_s: float, write_s: float, num_bytes: int) -> None:
        """A checkpoint is complete: training stood still for `held_s`, and it took `write_s` to write. In the main process alone."""
        ...
