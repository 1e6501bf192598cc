"""`fit`: the one training loop of all stages."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from hyper_sd.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from hyper_sd.config import EngineConfig, StagePlan
from hyper_sd.data import BadSamples, Prefetcher, Samples, Source
from hyper_sd.engine import Engine, StopSignal
from hyper_sd.objective import Batch, Context, Objective, Shared, Stage
from hyper_sd.randomness import Draws
from hyper_sd.roles import Role
from hyper_sd.teachers.base import Teacher

COLLAPSED = 0.3  # variety of the student's samples, relative to that of the data
LOG_EVERY = 10  # steps between two rows of metrics: the only moments at which the device is waited for


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
    def batch(self, samples: Samples, positions: Sequence[int], step: int) -> Batch:
        self.bad.add(samples)
        encoded = samples.conds if samples.conds is not None else self.teacher.encode_prompts(samples.captions)
        cond = tuple(part.to(self.teacher.device, non_blocking=True) for part in encoded)
        uncond = self.teacher.uncond(len(positions))
        if samples.sizes is not None:
            cond, uncond = (self.teacher.with_sizes(parts, samples.sizes) for parts in (cond, uncond))
        draws = Draws(self.seed, step, tuple(positions))
        return Batch(self._x0(samples, positions), cond, uncond, draws, tuple(samples.captions))

    def _x0(self, samples: Samples, positions: Sequence[int]) -> Tensor:
        if samples.latents is not None:
            self._check_latents(samples)
            return samples.latents.to(self.teacher.device, non_blocking=True)
        if samples.images is not None:
            return self.teacher.encode_images(samples.images)
        return self.draw(samples.captions, positions).to(self.teacher.device)

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

    Its whole state is `history`, a row for every look, and the adapter `keeps`; both are part of checkpoints.
    """

    history: list[dict[str, float]]
    keeps: str

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


def fit(job: Job, engine: Engine, stop: StopSignal, observer: Observer) -> bool:
    """Train a stage to its last step, or until its guard ends it, from its newest checkpoint if there is one.

    Returns False if a stop signal ended it first; the state is saved either way. Raises FloatingPointError on a loss that is not
    finite, after which nothing is saved.
    """
    objectives = job.stage.objectives(job.context)
    done = start = _restore(job, engine, objectives)
    observer.started(job, start)
    saver = Saver(job, engine)
    ended = _ended(job, start)
    with _reading(job, engine, start) as reading, Meter(job, engine, start) as meter:
        while not ended:
            step, done = done, done + 1
            run_step = job.first_step + step
            micro_batches: list[tuple[Batch, Shared]] = [(job.feed.batch(read, part, run_step), {}) for part, read in reading.take()]
            for objective in objectives:
                if step % objective.every == 0:
                    meter.add(*update(objective, micro_batches, engine))
            job.stage.after_step(job.context, step)
            if values := meter.row(done, reading.waited_s):
                observer.logged(job, done, values)
            observer.stepped(job, done)
            ended = _ended(job, done)
            stopped = engine.any(stop.received is not None)
            saver.save_if_due(done, force=stopped or ended)
            if stopped and not ended:
                return False
    if job.guard is not None:
        job.guard.hand_on(job)
    observer.finished(job, done)
    return True


def _ended(job: Job, done: int) -> bool:
    """Whether the stage is over, by its plan or by its guard, which looks first."""
    if job.guard is not None:
        job.guard.look(job, done)
    return done == job.plan.max_steps or (job.guard is not None and job.guard.stops)


def update(objective: Objective, micro_batches: Sequence[tuple[Batch, Shared]], engine: Engine) -> tuple[Role, dict[str, Tensor]]:
    """All micro-batches of one objective, then one optimizer step: accumulation can neither reorder updates nor change them."""
    logs: dict[str, Tensor] = {}
    engine.begin(objective.trains)
    for batch, shared in micro_batches:
        loss = objective.loss(batch, shared)
        engine.backward(objective.trains, loss.value)
        for name, value in {"loss": loss.value, **loss.logs}.items():
            logs[name] = logs.get(name, 0) + value.detach() / len(micro_batches)
    some = micro_batches[0][0].x0
    logs["lr"] = some.new_full((), engine.learning_rate(objective.trains))
    logs["grad_norm"] = engine.step(objective.trains).detach()
    return objective.trains, logs


class Meter:
    """Averages what objectives report and draws the progress bar; waits for the device only every LOG_EVERY steps."""

    def __init__(self, job: Job, engine: Engine, start: int):
        self._job, self._engine, self._logged = job, engine, start
        self._sums: dict[str, list[Tensor]] = {}
        self._since, self._waited_s = time.monotonic(), 0.0
        self._bar = tqdm(
            total=job.plan.max_steps, initial=start, desc=job.plan.name, unit="step", disable=not engine.is_main, mininterval=1
        )

    def add(self, role: Role, logs: dict[str, Tensor]) -> None:
        for name, value in logs.items():
            self._sums.setdefault(f"{'+'.join(role)}/{name}", []).append(value)

    def row(self, done: int, waited_s: float) -> dict[str, float] | None:
        """Means since the last row, over steps and processes, at every LOG_EVERY-th and the last step; else None.

        `waited_s` are the seconds that this process has waited for data so far; bad_samples counts those of all processes.
        """
        self._bar.update()
        if done % LOG_EVERY and done != self._job.plan.max_steps:
            return None
        values = {name: self._engine.mean(torch.stack(parts).mean()).item() for name, parts in self._sums.items()}
        now = time.monotonic()
        values["samples_per_s"] = (done - self._logged) * self._job.plan.batch_size / (now - self._since)
        num_bad, waited = self._job.feed.bad.take(), (waited_s - self._waited_s) / (now - self._since)
        values["bad_samples"] = self._engine.mean(torch.tensor(float(num_bad), device=self._engine.device)).item() * self._engine.world_size
        values["data_wait"] = self._engine.mean(torch.tensor(waited, device=self._engine.device)).item()
        self._sums, self._since, self._waited_s, self._logged = {}, now, waited_s, done
        if bad := [name for name, value in values.items() if value != value or abs(value) == float("inf")]:
            raise FloatingPointError(
                f"{self._job.plan.key}: {bad[0]} is not finite at step {done}; lower {self._job.plan.key}.optimizer.lr or check the data"
            )
        warn_of_collapse(self._job.plan.key, values, done)
        losses = {name: f"{value:.4g}" for name, value in values.items() if name.endswith("/loss")}
        self._bar.set_postfix({**losses, "samples/s": f"{values['samples_per_s']:.1f}"}, refresh=False)
        return values

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def warn_of_collapse(key: str, values: dict[str, float], step: int) -> None:
    """A student whose samples are all alike is lost long before its loss shows it."""
    for name, variety in values.items():
        if name.endswith("/variety") and variety < COLLAPSED:
            warnings.warn(
                f"{key}: the student collapses: at step {step} its samples differ from each other {variety:.2g} times as much as the "
                f"training data do; lower {key}.optimizer.lr or raise {key}.fake_updates",
                stacklevel=2,
            )


class Saver:
    """Checkpoints after every so many steps or seconds, whichever comes first; the main process's clock decides for all."""

    def __init__(self, job: Job, engine: Engine):
        self._job, self._engine = job, engine
        self._config: EngineConfig = engine.config
        self._last = time.monotonic()

    def save_if_due(self, done: int, *, force: bool) -> None:
        due = done % self._config.checkpoint_every_steps == 0
        seconds = self._config.checkpoint_every_seconds
        if seconds is not None and self._engine.any(self._engine.is_main and time.monotonic() - self._last > seconds):
            due = True
        if due or force:
            save(self._job, self._engine, done)
            self._last = time.monotonic()


def save(job: Job, engine: Engine, step: int) -> None:
    """Called in every process; the main one writes. Raises RuntimeError if their adapters are not the same."""
    roles, names = job.context.roles, (*job.stage.adapters, *job.context.roles.attached)
    if different := [name for name in names if not engine.same(roles.params((name,)))]:
        raise RuntimeError(
            f"{job.plan.key}: the processes hold different weights of {', '.join(different)} at step {step}; nothing was saved"
        )
    optimizer, updates = engine.state_dict()
    if engine.is_main:
        kept, history = ((job.guard.keeps,), job.guard.history) if job.guard is not None else ((), [])
        adapters = {name: roles.state_dict(name) for name in (*names, *kept)}
        checkpoint = Checkpoint(step, adapters, optimizer, updates, history)
        save_checkpoint(checkpoints(job.folder), checkpoint, keep_last=engine.config.keep_last)
    engine.barrier()


def checkpoints(folder: Path) -> Path:
    return folder / "checkpoints"


def _restore(job: Job, engine: Engine, objectives: Sequence[Objective]) -> int:
    """The stage's state as its newest checkpoint has it; returns the step to go on from."""
    engine.drop_optimizers()
    checkpoint = latest_checkpoint(checkpoints(job.folder))
    for adapter, tensors in checkpoint.adapters.items() if checkpoint else ():
        job.context.roles.load_state_dict(adapter, tensors)
    _start_optimizers(job, engine, objectives)  # after the adapters: an engine may copy what it trains
    if checkpoint is None:
        return 0
    engine.load_state_dict(checkpoint.optimizer, checkpoint.updates)
    if job.guard is not None:
        job.guard.history[:] = checkpoint.history
    return checkpoint.step


def _start_optimizers(job: Job, engine: Engine, objectives: Sequence[Objective]) -> None:
    roles, plan = job.context.roles, job.plan
    roles.trainable(tuple(adapter for objective in objectives for adapter in objective.trains))
    for objective in objectives:
        params = {f"{adapter}/{name}": p for adapter in objective.trains for name, p in roles.tensors(adapter).items()}
        optimizer = plan.optimizers.get(objective.trains[-1], plan.optimizer)
        engine.train(objective.trains, params, optimizer, plan.lr_scheduler, -(-plan.max_steps // objective.every))


def _reading(job: Job, engine: Engine, start: int) -> Prefetcher:
    def positions(step: int) -> list[range]:
        return engine.micro_batches(job.plan.batch_size, job.first_position + step * job.plan.batch_size)

    steps = range(start, job.plan.max_steps)
    return Prefetcher(job.feed.source, positions, steps, ahead=job.feed.prefetch, pin=engine.device.type == "cuda")
