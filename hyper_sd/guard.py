"""The guard against reward hacking: a reward that is never trained on, looked at while a stage trains.

Rewards can be raised without better images. What a reward cannot see of another then falls while it rises: so a stage ends when, several
looks in a row, the held-out reward has fallen and the trained ones have risen, and hands on what the held-out reward liked best.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hyper_sd.config import HELDOUT, EvalConfig, GuardConfig
from hyper_sd.files import write_json
from hyper_sd.job import BEST, Job
from hyper_sd.measure import Draw
from hyper_sd.processes import Processes
from hyper_sd.rewards import Rewards
from hyper_sd.sample import Recipe, decode, quiet, sample
from hyper_sd.teachers import Teacher

GUARD_DRAW = 1 << 21  # the draw of prompts that guards look at; no evaluation has so many


class HeldOutGuard:
    """Samples the draw's prompts with the training network in its dtype, and keeps the adapter whose held-out reward is highest.

    A row of `history` has the step, the held-out reward's mean over prompts and step counts, that of each trained reward by its name,
    and as `trained` their sum by `weights`. `rewards` has all of them, the held-out one among them.
    """

    def __init__(
        self,
        config: GuardConfig,
        evaluation: EvalConfig,
        rewards: Rewards,
        weights: Mapping[str, float],
        teacher: Teacher,
        recipe: Recipe,
        draw: Draw,
        processes: Processes,
    ):
        self._config, self._rewards, self._weights = config, rewards, weights
        self._batch_size = evaluation.images_at_once(teacher.image_size)
        self._teacher, self._recipe, self._draw, self._processes = teacher, recipe, draw, processes
        self.history: list[dict[str, float]] = []

    @property
    def stops(self) -> bool:
        return self._config.patience is not None and falls(self.history) >= self._config.patience

    @property
    def _best(self) -> float:
        """The step at which the held-out reward was highest; the first, if several are."""
        return max(self.history, key=lambda row: row[HELDOUT])["step"]

    def look(self, job: Job, step: int) -> None:
        due = step % self._config.every_steps == 0 or step == job.plan.max_steps
        if not due or (self.history and self.history[-1]["step"] == step):
            return
        row = {"step": step, **self._scores(job)}
        if row[HELDOUT] > max((seen[HELDOUT] for seen in self.history), default=float("-inf")):
            job.context.roles.copy(job.stage.exports[-1], BEST)
        self.history.append(row)
        self._write(job.folder)

    def hand_on(self, job: Job) -> None:
        if self._config.keep == "last":
            return
        last = self.history[-1]["step"]
        if self._processes.is_main and (self.stops or self._best != last):
            why = f": the held-out reward fell {self._config.patience} times in a row while the trained rewards rose" if self.stops else ""
            kept = f"the held-out reward was highest at step {self._best:g}, whose adapter is kept"
            print(f"{job.plan.name}: ended at step {last:g}{why}; {kept}", flush=True)
        job.context.roles.copy(BEST, job.stage.exports[-1])

    @torch.no_grad()
    def _scores(self, job: Job) -> dict[str, float]:
        """The means of every reward over the draw's prompts and the guard's step counts."""
        total = len(self._draw.prompts)
        share = self._processes.share(total)
        prompts = self._draw.prompts[share]
        scores: dict[str, list[torch.Tensor]] = {name: [] for name in self._rewards.rewards}
        for num_steps in self._config.steps:
            with quiet(), job.context.roles.use(job.stage.exports):
                latents = sample(
                    self._teacher.pipeline,
                    prompts,
                    self._recipe[num_steps],
                    seed=self._draw.seed,
                    index=range(total)[share],
                    image_size=self._teacher.image_size,
                    batch_size=self._batch_size,
                )
            images = decode(self._teacher.pipeline, latents, self._batch_size).to(self._teacher.device)
            chunks = [slice(start, start + self._batch_size) for start in range(0, len(prompts), self._batch_size)]
            parts = [self._rewards.scores(images[chunk], prompts[chunk]) for chunk in chunks]
            for name, seen in scores.items():
                seen.append(self._processes.join(torch.cat([part[name] for part in parts]), total))
        means = {name: float(torch.stack(parts).double().mean()) for name, parts in scores.items()}
        return {**means, "trained": sum(weight * means[name] for name, weight in self._weights.items())}

    def _write(self, folder: Path) -> None:
        if self._processes.is_main:
            kept = self._best if self._config.keep == "best" else self.history[-1]["step"]
            write_json(folder / "guard.json", {"history": self.history, "stopped": self.stops, "kept": kept})


def falls(history: list[dict[str, float]]) -> int:
    """How many times in a row, up to the last row, the held-out reward fell while the trained ones rose."""
    count = 0
    for before, after in zip(history[-2::-1], history[:0:-1], strict=True):
        if after[HELDOUT] >= before[HELDOUT] or after["trained"] <= before["trained"]:
            break
        count += 1
    return count
