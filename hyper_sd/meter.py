"""What a run reports while it trains: means of the logs, a progress bar, and a warning of collapse."""

import time
import warnings

import torch
from torch import Tensor
from tqdm import tqdm

from hyper_sd.bad_steps import BadSteps
from hyper_sd.engine import Engine
from hyper_sd.job import Job
from hyper_sd.roles import Role

COLLAPSED = 0.3  # of the variety that samples should have
_ALIKE = {"variety": "its samples hardly differ from each other", "std_sample": "its samples are flat beside the teacher's estimates"}
LOG_EVERY = 10  # steps between two rows of metrics: the only moments at which the device is waited for


class Meter:
    """Averages what objectives report and draws the progress bar; waits for the device only every LOG_EVERY steps, and at a checkpoint."""

    def __init__(self, job: Job, engine: Engine, start: int, bad_steps: BadSteps):
        self._job, self._engine, self._logged, self._bad_steps = job, engine, start, bad_steps
        self._pending: list[tuple[str, dict[str, Tensor]]] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._since, self._waited_s = time.monotonic(), 0.0
        self._bar = tqdm(
            total=job.plan.max_steps, initial=start, desc=job.plan.name, unit="step", disable=not engine.is_main, mininterval=1
        )

    def add(self, step: int, role: Role, logs: dict[str, Tensor]) -> None:
        name = "+".join(role)
        self._bad_steps.add(step, name, logs["loss"], logs["grad_norm"])
        self._pending.append((name, logs))

    def look(self, done: int) -> BadSteps:
        """Wait for the device; what skipped updates reported is left out of the means. Counts bad samples. Called in every process."""
        pending, self._pending = self._pending, []
        for (role, logs), made in zip(pending, self._bad_steps.look(), strict=True):
            for name, value in logs.items() if made else ():
                self._sums.setdefault(f"{role}/{name}", []).append(value)
        bad = self._job.feed.bad
        met = self._engine.mean(torch.tensor(float(bad.take()), device=self._engine.device)).item() * self._engine.world_size
        bad.count(round(met), done * self._job.plan.batch_size)
        return self._bad_steps

    def row(self, done: int, waited_s: float, *, ended: bool) -> dict[str, float] | None:
        """Means since the last row, over steps and processes, at every LOG_EVERY-th step and when the stage has ended; else None.

        `waited_s` are the seconds that this process has waited for data so far; bad_samples and skipped count from the stage's start.
        """
        self._bar.update()
        if done % LOG_EVERY and not ended:
            return None
        skipped = self.look(done).skipped
        values = {name: self._engine.mean(torch.stack(parts).mean()).item() for name, parts in self._sums.items()}
        values |= {f"{role}/skipped": float(number) for role, number in skipped.items()}
        now = time.monotonic()
        values["samples_per_s"] = (done - self._logged) * self._job.plan.batch_size / (now - self._since)
        waited = (waited_s - self._waited_s) / (now - self._since)
        values["bad_samples"] = float(self._job.feed.bad.num)
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
    """A student whose samples are all alike, or flatter than what the teacher makes of them, is lost long before its loss shows it."""
    for name, value in values.items():
        role, _, figure = name.rpartition("/")
        against = values.get(f"{role}/std_real", 0.0) if figure == "std_sample" else 1.0  # latents are scaled to unit variance
        if figure in ("variety", "std_sample") and value < COLLAPSED * against:
            warnings.warn(
                f"{key}: the student collapses: at step {step} {_ALIKE[figure]} ({figure} {value:.2g}); lower {key}.optimizer.lr or raise "
                f"{key}.fake_updates",
                stacklevel=2,
            )
