"""Updates that the engine skipped because loss or gradient was not finite: counted, and after too many in a row the end of the run."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyper_sd.config import StagePlan
from hyper_sd.data.base import Source
from hyper_sd.engine import Engine
from hyper_sd.files import write_json

FILE = "bad_steps.json"


def poisoned(loss: Tensor) -> Tensor:
    """The loss, with a gradient that is not finite where the loss is not: one test of the gradient then finds both."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


@dataclass(frozen=True)
class _Update:
    step: int
    role: str
    loss: Tensor
    grad_norm: Tensor


class BadSteps:
    """Whether updates were made is known on the device; `look` asks it, at moments when it is waited for anyway.

    Every process finds the same, since all have the same gradient. Counts are by role: `skipped` in the stage so far, and `in_a_row`.
    """

    def __init__(self, engine: Engine, plan: StagePlan, source: Source, folder: Path, first_position: int):
        self._engine, self._plan, self._source, self._folder = engine, plan, source, folder
        self._first_position = first_position
        self._pending: list[_Update] = []
        self._row: dict[str, list[_Update]] = {}
        self.skipped: dict[str, int] = {}
        self.in_a_row: dict[str, int] = {}

    def restore(self, skipped: Mapping[str, int], in_a_row: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = dict(skipped), dict(in_a_row)

    def add(self, step: int, role: str, loss: Tensor, grad_norm: Tensor) -> None:
        """`loss` is this process's, `grad_norm` that of all."""
        self._pending.append(_Update(step, role, loss, grad_norm))

    def look(self) -> list[bool]:
        """Whether each update since the last look was made, in their order.

        Raises FloatingPointError after engine.max_bad_steps skipped ones of a role in a row; a file then says which.
        """
        if not self._pending:
            return []
        updates, self._pending = self._pending, []
        made: list[bool] = torch.stack([update.grad_norm for update in updates]).isfinite().tolist()
        for update, good in zip(updates, made, strict=True):
            self._count(update, good)
        if not all(made) and self._engine.is_main:
            print(f"{self._plan.key}: {made.count(False)} updates were skipped: not finite", file=sys.stderr, flush=True)
        for role, number in self.in_a_row.items():
            if number >= self._engine.config.max_bad_steps:
                self._give_up(role)
        return made

    def _count(self, update: _Update, good: bool) -> None:
        if good:
            self.in_a_row[update.role], self._row[update.role] = 0, []
            self.skipped.setdefault(update.role, 0)
            return
        for counts in (self.skipped, self.in_a_row):
            counts[update.role] = counts.get(update.role, 0) + 1
        self._row.setdefault(update.role, []).append(update)

    def _give_up(self, role: str) -> None:
        rows = [self._describe(update) for update in self._row[role]]
        file = self._folder / FILE
        if self._engine.is_main:
            write_json(file, rows)
        limit = self._engine.config.max_bad_steps
        raise FloatingPointError(
            f"{self._plan.key}: the last {self.in_a_row[role]} updates of {role} were skipped because loss or gradient was not finite "
            f"(engine.max_bad_steps={limit}); {file} has their samples and losses. Lower {self._plan.key}.optimizer.lr, mend the "
            "data, or go on from an earlier checkpoint"
        )

    def _describe(self, update: _Update) -> dict[str, Any]:
        """The loss of each process and the samples it saw. Called in every process."""
        size, world = self._plan.batch_size, self._engine.world_size
        losses = self._engine.join(update.loss.reshape(1), world).tolist()
        start = self._first_position + update.step * size
        samples = range(start, start + size)
        return {
            "step": update.step,
            "role": update.role,
            "grad_norm": str(update.grad_norm.item()),  # json has no numbers that are not finite
            "losses": [str(loss) for loss in losses],
            "positions": [samples.start, samples.stop - 1],
            **self._read_again(samples),
        }

    def _read_again(self, positions: range) -> dict[str, Sequence[str]]:
        """What tells the samples of these positions from others."""
        if not self._engine.is_main:
            return {}
        try:
            samples = self._source.batch(positions)
        except ValueError as error:
            return {"captions": [str(error)]}
        return {"names": samples.names, "captions": samples.captions}
