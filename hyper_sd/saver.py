"""When a stage is saved, and all that a checkpoint of it holds."""

import sys
import time
from pathlib import Path

from hyper_sd.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from hyper_sd.config import EngineConfig
from hyper_sd.engine import Engine
from hyper_sd.job import Job, Observer
from hyper_sd.meter import Meter


class Saver:
    """Checkpoints after every so many steps or seconds, whichever comes first; the main process's clock decides for all."""

    def __init__(self, job: Job, engine: Engine, observer: Observer, meter: Meter):
        self._job, self._engine, self._observer, self._meter = job, engine, observer, meter
        self._config: EngineConfig = engine.config
        self._last = time.monotonic()

    def save_if_due(self, done: int, *, stopped: bool, ended: bool) -> None:
        """Saves also if the run was `stopped`, and after the stage's last step."""
        due = done % self._config.checkpoint_every_steps == 0
        seconds = self._config.checkpoint_every_seconds
        if seconds is not None and self._engine.any(self._engine.is_main and time.monotonic() - self._last > seconds):
            due = True
        if due or stopped or ended:
            self._save(done, forgiving=self._config.on_save_error == "continue" and not stopped)
            self._last = time.monotonic()

    def _save(self, step: int, *, forgiving: bool) -> None:
        """Raises CheckpointError, in every process, if it fails and `forgiving` is false."""
        started, error = time.monotonic(), None
        checkpoint = self._state(step)
        if self._engine.is_main:
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

    def _state(self, step: int) -> Checkpoint:
        """Called in every process. Raises RuntimeError if their adapters are not the same."""
        job, roles = self._job, self._job.context.roles
        names = (*job.stage.adapters, *roles.attached)
        if different := [name for name in names if not self._engine.same(roles.params((name,)))]:
            raise RuntimeError(
                f"{job.plan.key}: the processes hold different weights of {', '.join(different)} at step {step}; nothing was saved"
            )
        optimizer, updates = self._engine.state_dict()
        bad = self._meter.look(step)
        kept, history = ((job.guard.keeps,), job.guard.history) if job.guard is not None else ((), [])
        adapters = {name: roles.state_dict(name) for name in (*names, *kept)} if self._engine.is_main else {}
        return Checkpoint(step, adapters, optimizer, updates, bad.skipped, bad.in_a_row, history, job.feed.bad.num)


def checkpoints(folder: Path) -> Path:
    """Where a stage's checkpoints lie."""
    return folder / "checkpoints"
