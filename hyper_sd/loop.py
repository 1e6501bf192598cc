"""`fit`: the one training loop of all stages."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hyper_sd.bad_steps import BadSteps, poisoned
from hyper_sd.checkpoint import latest_checkpoint, saved_adapters
from hyper_sd.config import StagePlan
from hyper_sd.data import Prefetcher
from hyper_sd.engine import Engine
from hyper_sd.job import BEST, Job, Observer
from hyper_sd.meter import Meter
from hyper_sd.objective import Batch, Objective, Shared, Stage
from hyper_sd.roles import Role
from hyper_sd.saver import Saver, checkpoints
from hyper_sd.stop import Stop
from hyper_sd.watchdog import READING, TRAINING, Watchdog


def fit(job: Job, engine: Engine, stop: Stop, observer: Observer, watchdog: Watchdog) -> bool:
    """Train a stage to its last step, or until its guard ends it, from its newest checkpoint if there is one.

    Returns False if it was told to stop before; the state is saved either way. Raises FloatingPointError if loss or gradient is not
    finite for too long, after which nothing is saved, and CheckpointError where saving fails and is not to be forgiven.
    """
    objectives = job.stage.objectives(job.context)
    bad_steps = BadSteps(engine, job.plan, job.feed.source, job.folder, job.first_position)
    done = start = _restore(job, engine, objectives, bad_steps)
    observer.started(job, start)
    ended = _ended(job, start)
    with (
        _reading(job, engine, start) as reading,
        Meter(job, engine, start, bad_steps) as meter,
        Saver(job, engine, observer, meter) as saver,
    ):
        while not ended:
            step, done = done, done + 1
            run_step = job.first_step + step
            watchdog.beat(run_step, READING)
            micro_batches: list[tuple[Batch, Shared]] = [
                (job.feed.batch(read, part, run_step, latents=job.stage.uses_latents), {}) for part, read in reading.take()
            ]
            watchdog.beat(run_step, TRAINING)
            for objective in objectives:
                if step % objective.every == 0:
                    meter.add(step, *update(objective, micro_batches, engine))
            job.stage.after_step(job.context, step)
            ended = _ended(job, done)
            if values := meter.row(done, reading.waited_s, ended=ended):
                observer.logged(job, done, values)
            observer.stepped(job, done)
            stopped = saver.after_step(done, stop=stop.received is not None, ended=ended)
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
        engine.backward(objective.trains, poisoned(loss.value))
        for name, value in {"loss": loss.value, **loss.logs}.items():
            logs[name] = logs.get(name, 0) + value.detach() / len(micro_batches)
    some = micro_batches[0][0].x0
    logs["lr"] = some.new_full((), engine.learning_rate(objective.trains))
    logs["grad_norm"] = engine.step(objective.trains).detach()
    return objective.trains, logs


def check_checkpoint(folder: Path, plan: StagePlan, stage: Stage) -> None:
    """Raise ValueError if a stage's newest checkpoint is of other adapters than the stage has, as an accepted change may make it."""
    saved, own = saved_adapters(checkpoints(folder)), {*stage.adapters, *stage.modules}
    if saved is not None and saved - {BEST} != own:
        raise ValueError(
            f"{plan.key}: the checkpoints in {folder} are of {', '.join(sorted(saved - {BEST}))}, but with the settings of now the stage "
            f"has {', '.join(sorted(own))}; give the settings of {plan.key} that it began with, or set another run.dir"
        )


def _restore(job: Job, engine: Engine, objectives: Sequence[Objective], bad_steps: BadSteps) -> int:
    """The stage's state as its newest checkpoint has it; returns the step to go on from."""
    engine.drop_optimizers()
    checkpoint = latest_checkpoint(checkpoints(job.folder))
    step = checkpoint.step if checkpoint is not None else 0
    if not engine.same([torch.full((), float(step), device=engine.device)]):
        raise ValueError(
            f"{job.plan.key}: the processes find different checkpoints in {job.folder}; run.dir must be a directory they share"
        )
    for adapter, tensors in checkpoint.adapters.items() if checkpoint else ():
        if adapter != BEST or job.guard is not None:  # a guard may be taken off a stage that has begun
            job.context.roles.load_state_dict(adapter, tensors)
    _start_optimizers(job, engine, objectives)  # after the adapters: an engine may copy what it trains
    job.feed.bad.restore(checkpoint.bad_samples if checkpoint else 0)
    if checkpoint is None:
        return 0
    engine.load_state_dict(checkpoint.optimizer, checkpoint.updates)
    bad_steps.restore(checkpoint.skipped, checkpoint.in_a_row)
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
