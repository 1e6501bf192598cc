"""`fit`: the one training loop of all stages."""

import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from hyper_sd.bad_steps import BadSteps, poisoned
from hyper_sd.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, save_checkpoint
from hyper_sd.config import EngineConfig, StagePlan
from hyper_sd.data.base import Samples, Source
from hyper_sd.engine import Engine
from hyper_sd.objective import Batch, Context, Objective, Shared, Stage
from hyper_sd.randomness import Draws
from hyper_sd.roles import Role
from hyper_sd.stop import Stop
from hyper_sd.teachers.base import Teacher
from hyper_sd.watchdog import READING, TRAINING, Watchdog

COLLAPSED = 0.3  # of the teacher's standard deviation
LOG_EVERY = 10  # steps between two rows of metrics: the only moments at which the device is waited for


@dataclass(frozen=True)
class Feed:
    """Positions of the run's sample stream to micro-batches of latents and conditions, with the draws of exactly those samples."""

    source: Source
    teacher: Teacher
    seed: int

    @torch.no_grad()
    def batch(self, samples: Samples, positions: Sequence[int], step: int) -> Batch:
        device = self.teacher.device
        if samples.latents is not None:
            self._check_latents(samples.latents)
            x0 = samples.latents.to(device)
        else:
            assert samples.images is not None, "a sample is an image or a latent"
            x0 = self.teacher.encode_images(samples.images)
        encoded = samples.conds if samples.conds is not None else self.teacher.encode_prompts(samples.captions)
        cond = tuple(part.to(device) for part in encoded)
        return Batch(x0, cond, self.teacher.uncond(len(positions)), Draws(self.seed, step, tuple(positions)))

    def _check_latents(self, latents: Tensor) -> None:
        if latents.shape[1:] != self.teacher.latent_shape:
            raise ValueError(
                f"data.path holds latents of shape {tuple(latents.shape[1:])}, but this teacher's are {self.teacher.latent_shape}; "
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


class Observer(Protocol):
    """What a run does beside training. Called in every process; `step` counts the stage's finished steps."""

    def started(self, job: Job, step: int) -> None: ...

    def logged(self, job: Job, step: int, values: dict[str, float]) -> None: ...

    def stepped(self, job: Job, step: int) -> None: ...

    def saved(self, job: Job, step: int, seconds: float, num_bytes: int) -> None: ...


def fit(job: Job, engine: Engine, stop: Stop, observer: Observer, watchdog: Watchdog) -> bool:
    """Train a stage to its last step, from its newest checkpoint if there is one.

    Returns False if it was told to stop before; the state is saved either way. Raises FloatingPointError if loss or gradient is not
    finite for too long, after which nothing is saved, and CheckpointError where saving fails and is not to be forgiven.
    """
    objectives = job.stage.objectives(job.context)
    _start_optimizers(job, engine, objectives)
    bad_steps = BadSteps(engine, job.plan, job.feed.source, job.folder, job.first_position)
    start = _restore(job, engine, bad_steps)
    observer.started(job, start)
    with Prefetcher(job, engine, start) as prefetcher, Meter(job, engine, start, bad_steps) as meter:
        saver = Saver(job, engine, observer, meter)
        for step in range(start, job.plan.max_steps):
            watchdog.beat(job.first_step + step, READING)
            micro_batches = prefetcher.take(step)
            watchdog.beat(job.first_step + step, TRAINING)
            for objective in objectives:
                if step % objective.every == 0:
                    meter.add(step, *update(objective, micro_batches, engine))
            job.stage.after_step(job.context, step)
            done = step + 1
            if values := meter.row(done):
                observer.logged(job, done, values)
            observer.stepped(job, done)
            stopped = engine.any(stop.received is not None)
            saver.save_if_due(done, stopped=stopped)
            if stopped and done < job.plan.max_steps:
                return False
    return True


def update(objective: Objective, micro_batches: Sequence[tuple[Batch, Shared]], engine: Engine) -> tuple[Role, dict[str, Tensor]]:
    """All micro-batches of one objective, then one optimizer step: accumulation can neither reorder updates nor change them."""
    logs: dict[str, Tensor] = {}
    for batch, shared in micro_batches:
        loss = objective.loss(batch, shared)
        engine.backward(objective.trains, poisoned(loss.value))
        for name, value in {"loss": loss.value, **loss.logs}.items():
            logs[name] = logs.get(name, 0) + value.detach() / len(micro_batches)
    some = micro_batches[0][0].x0
    logs["lr"] = some.new_full((), engine.learning_rate(objective.trains))
    logs["grad_norm"] = engine.step(objective.trains).detach()
    return objective.trains, logs


class Prefetcher:
    """Reads the next step's samples while this one is trained on."""

    def __init__(self, job: Job, engine: Engine, start: int):
        self._job, self._engine = job, engine
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next = self._read(start)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[tuple[Batch, Shared]]:
        """This process's micro-batches of a stage's step, each with an empty dict for what objectives share."""
        read = self._next
        if step + 1 < self._job.plan.max_steps:
            self._next = self._read(step + 1)
        feed, run_step = self._job.feed, self._job.first_step + step
        return [(feed.batch(future.result(), positions, run_step), {}) for positions, future in read]

    def _read(self, step: int) -> list[tuple[range, Future[Samples]]]:
        start = self._job.first_position + step * self._job.plan.batch_size
        positions = self._engine.micro_batches(self._job.plan.batch_size, start)
        return [(part, self._reader.submit(self._job.feed.source.batch, part)) for part in positions]


class Meter:
    """Averages what objectives report and draws the progress bar; waits for the device only every LOG_EVERY steps, and at a checkpoint."""

    def __init__(self, job: Job, engine: Engine, start: int, bad_steps: BadSteps):
        self._job, self._engine, self._logged, self._bad_steps = job, engine, start, bad_steps
        self._pending: list[tuple[str, dict[str, Tensor]]] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._since = time.monotonic()
        self._bar = tqdm(
            total=job.plan.max_steps, initial=start, desc=job.plan.name, unit="step", disable=not engine.is_main, mininterval=1
        )

    def add(self, step: int, role: Role, logs: dict[str, Tensor]) -> None:
        name = "+".join(role)
        self._bad_steps.add(step, name, logs["loss"], logs["grad_norm"])
        self._pending.append((name, logs))

    def look(self) -> BadSteps:
        """Wait for the device; what skipped updates reported is left out of the means."""
        pending, self._pending = self._pending, []
        for (role, logs), made in zip(pending, self._bad_steps.look(), strict=True):
            for name, value in logs.items() if made else ():
                self._sums.setdefault(f"{role}/{name}", []).append(value)
        return self._bad_steps

    def row(self, done: int) -> dict[str, float] | None:
        """Means since the last row, over steps and processes, at every LOG_EVERY-th and the last step; else None."""
        self._bar.update()
        if done % LOG_EVERY and done != self._job.plan.max_steps:
            return None
        skipped = self.look().skipped
        values = {name: self._engine.mean(torch.stack(parts).mean()).item() for name, parts in self._sums.items()}
        values |= {f"{role}/skipped": float(number) for role, number in skipped.items()}
        now = time.monotonic()
        values["samples_per_s"] = (done - self._logged) * self._job.plan.batch_size / (now - self._since)
        self._sums, self._since, self._logged = {}, now, done
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
    """A student whose samples lose their spread is lost long before its loss shows it."""
    for name, spread in values.items():
        role, _, kind = name.rpartition("/")
        if kind == "std_sample" and spread < COLLAPSED * values.get(f"{role}/std_real", 0.0):
            warnings.warn(
                f"{key}: the student collapses: at step {step} its samples have a standard deviation of {spread:.3g}, the teacher's "
                f"estimates {values[f'{role}/std_real']:.3g}; lower {key}.optimizer.lr or raise {key}.fake_updates",
                stacklevel=2,
            )


class Saver:
    """Checkpoints after every so many steps or seconds, whichever comes first; the main process's clock decides for all."""

    def __init__(self, job: Job, engine: Engine, observer: Observer, meter: Meter):
        self._job, self._engine, self._observer, self._meter = job, engine, observer, meter
        self._config: EngineConfig = engine.config
        self._last = time.monotonic()

    def save_if_due(self, done: int, *, stopped: bool) -> None:
        """Saves also if the run was `stopped`, and after the last step."""
        due = done % self._config.checkpoint_every_steps == 0
        seconds = self._config.checkpoint_every_seconds
        if seconds is not None and self._engine.any(self._engine.is_main and time.monotonic() - self._last > seconds):
            due = True
        if due or stopped or done == self._job.plan.max_steps:
            self._save(done, forgiving=self._config.on_save_error == "continue" and not stopped)
            self._last = time.monotonic()

    def _save(self, step: int, *, forgiving: bool) -> None:
        """Raises CheckpointError, in every process, if it fails and `forgiving` is false."""
        started, error = time.monotonic(), None
        optimizer, updates = self._engine.state_dict()
        bad = self._meter.look()
        if self._engine.is_main:
            roles, stage = self._job.context.roles, self._job.stage
            adapters = {adapter: roles.state_dict(adapter) for adapter in (*stage.adapters, *roles.attached)}
            checkpoint = Checkpoint(step, adapters, optimizer, updates, bad.skipped, bad.in_a_row)
            try:
                path = save_checkpoint(
                    checkpoints(self._job.folder), checkpoint, keep_last=self._config.keep_last, keep_every=self._config.keep_every
                )
                num_bytes = sum(file.stat().st_size for file in path.iterdir())
                self._observer.saved(self._job, step, time.monotonic() - started, num_bytes)
            except CheckpointError as failed:
                error = failed
        if not self._engine.any(error is not None):
            return
        if forgiving:
            if error is not None:
                print(f"{error}; training goes on (engine.on_save_error=continue)", file=sys.stderr, flush=True)
        else:
            raise error or CheckpointError(f"the main process could not save step {step} of {self._job.plan.key}")


def checkpoints(folder: Path) -> Path:
    return folder / "checkpoints"


def _start_optimizers(job: Job, engine: Engine, objectives: Sequence[Objective]) -> None:
    engine.drop_optimizers()
    roles, plan = job.context.roles, job.plan
    roles.trainable(tuple(adapter for objective in objectives for adapter in objective.trains))
    for objective in objectives:
        params = {f"{adapter}/{name}": p for adapter in objective.trains for name, p in roles.tensors(adapter).items()}
        optimizer = plan.optimizers.get(objective.trains[-1], plan.optimizer)
        engine.train(objective.trains, params, optimizer, plan.lr_scheduler, -(-plan.max_steps // objective.every))


def _restore(job: Job, engine: Engine, bad_steps: BadSteps) -> int:
    checkpoint = latest_checkpoint(checkpoints(job.folder))
    if checkpoint is None:
        return 0
    for adapter, tensors in checkpoint.adapters.items():
        job.context.roles.load_state_dict(adapter, tensors)
    engine.load_state_dict(checkpoint.optimizer, checkpoint.updates)
    bad_steps.restore(checkpoint.skipped, checkpoint.in_a_row)
    return checkpoint.step
