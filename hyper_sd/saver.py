"""When a stage is saved, all that a checkpoint of it holds, and the thread that writes it while training goes on."""

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hyper_sd.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from hyper_sd.config import EngineConfig
from hyper_sd.engine import Engine
from hyper_sd.host_copies import HostCopies
from hyper_sd.job import BEST, Job, Observer
from hyper_sd.meter import Meter


@dataclass(frozen=True)
class _Written:
    seconds: float
    num_bytes: int


class Saver:
    """Checkpoints after every so many steps or seconds, whichever comes first; the main process's clock decides for all.

    Training stands still only while the state is copied. The main process writes one copy at a time, in a thread: the next save waits
    for it, and so does whoever leaves the context. That a write failed is known to all processes after the step that it failed in.
    """

    def __init__(self, job: Job, engine: Engine, observer: Observer, meter: Meter):
        self._job, self._engine, self._observer, self._meter = job, engine, observer, meter
        self._config: EngineConfig = engine.config
        self._copies, self._thread = HostCopies(engine.device), ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[_Written] | None = None
        self._step, self._copied_s = 0, 0.0  # of the checkpoint that is written, or was last
        self._last = time.monotonic()

    def after_step(self, done: int, *, stop: bool, ended: bool) -> bool:
        """Save if it is time, if any process is told to `stop`, or if the stage has `ended`; returns whether one is.

        In the last two cases the checkpoint is complete on return. Raises CheckpointError, in every process, where saving fails and
        is not to be forgiven.
        """
        stopped, late, failed = self._engine.any_each(stop, self._late, self._look())
        forgiving = self._config.on_save_error == "continue"
        if failed:
            self._settle(forgiving=forgiving)
        if done % self._config.checkpoint_every_steps == 0 or late or stopped or ended:
            self._settle(forgiving=forgiving)
            self._save(done)
        if stopped or ended:
            self._settle(forgiving=forgiving and not stopped)
        return stopped

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        if (error := self._outcome()) is not None:  # what ends the stage goes before it
            print(error, file=sys.stderr, flush=True)

    @property
    def _late(self) -> bool:
        seconds = self._config.checkpoint_every_seconds
        return self._engine.is_main and seconds is not None and time.monotonic() - self._last > seconds

    def _look(self) -> bool:
        """Whether the checkpoint that is written has failed; one that is complete is reported."""
        if self._writing is None or not self._writing.done():
            return False
        if self._writing.exception() is not None:
            return True
        self._outcome()
        return False

    def _settle(self, *, forgiving: bool) -> None:
        """Wait for the checkpoint that is written. Raises CheckpointError, in every process, if it fails and `forgiving` is false."""
        error = self._outcome()
        if not self._engine.any(error is not None):
            return
        if not forgiving:
            raise error or CheckpointError(f"the main process could not save step {self._step} of {self._job.plan.key}")
        if error is not None:
            print(f"{error}; training goes on (engine.on_save_error=continue)", file=sys.stderr, flush=True)

    def _outcome(self) -> CheckpointError | None:
        """Wait for the checkpoint that is written, if there is one, and report it, or return its error."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        started = time.monotonic()
        try:
            written = writing.result()
        except CheckpointError as error:
            return error
        held_s = self._copied_s + time.monotonic() - started
        self._observer.saved(self._job, self._step, held_s, written.seconds, written.num_bytes)
        return None

    def _save(self, step: int) -> None:
        """Copy the state and begin to write it."""
        started = self._last = time.monotonic()
        self._step, checkpoint = step, self._state(step)
        if self._engine.is_main:
            self._writing = self._thread.submit(self._write, checkpoint)
        self._copied_s = time.monotonic() - started

    def _write(self, checkpoint: Checkpoint) -> _Written:
        started, config = time.monotonic(), self._config
        path = save_checkpoint(checkpoints(self._job.folder), checkpoint, keep_last=config.keep_last, keep_every=config.keep_every)
        return _Written(time.monotonic() - started, sum(file.stat().st_size for file in path.iterdir()))

    def _state(self, step: int) -> Checkpoint:
        """Called in every process. Raises RuntimeError if their adapters are not the same."""
        job, roles = self._job, self._job.context.roles
        names = (*job.stage.adapters, *roles.attached)
        if different := [name for name in names if not self._engine.same(roles.params((name,)))]:
            raise RuntimeError(
                f"{job.plan.key}: the processes hold different weights of {', '.join(different)} at step {step}; nothing was saved"
            )
        optimizer, updates = self._engine.state_dict(self._copies.take)
        bad = self._meter.look(step)
        kept, history = ((BEST,), list(job.guard.history)) if job.guard is not None else ((), [])
        adapters = {name: self._copy(name) for name in (*names, *kept)} if self._engine.is_main else {}
        self._copies.wait()
        return Checkpoint(step, adapters, optimizer, updates, dict(bad.skipped), dict(bad.in_a_row), history, job.feed.bad.num)

    def _copy(self, adapter: str) -> dict[str, Tensor]:
        tensors = self._job.context.roles.tensors(adapter)
        return {name: self._copies.take(f"{adapter}/{name}", value) for name, value in tensors.items()}


def checkpoints(folder: Path) -> Path:
    """Where a stage's checkpoints lie."""
    return folder / "checkpoints"
