"""What a run shows while it trains: metrics.jsonl, a tracker, grids of fixed prompts, and run.json kept up to date."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hyper_sd.config import RunConfig
from hyper_sd.engine import Engine
from hyper_sd.job import Job
from hyper_sd.measure import Draw, teacher_guidance
from hyper_sd.report import save_grid
from hyper_sd.roles import Role
from hyper_sd.run_folder import RunFolder
from hyper_sd.sample import Recipe, Sampler, decode, sample, teacher_row
from hyper_sd.teachers import Teacher


class Recorder:
    """The observer of a run's training. Only the main process writes; the others wait for its grids, or draw with it."""

    def __init__(self, config: RunConfig, engine: Engine, folder: RunFolder, teacher: Teacher, recipe: Callable[[str], Recipe], draw: Draw):
        self._config, self._engine, self._folder = config, engine, folder
        self._teacher, self._recipe, self._draw = teacher, recipe, draw
        self._reference: dict[str, Tensor] = {}
        self._tracker = Tracker(config, folder.path) if engine.is_main else None

    def started(self, job: Job, step: int) -> None:
        if self._engine.is_main:
            if step > 0:
                self._folder.resumed_from.append(job.first_step + step)
            self._folder.rewind_metrics(job.first_step + step)
            self._folder.write_status("running", stage=job.plan.name, step=step)

    def logged(self, job: Job, step: int, values: dict[str, float]) -> None:
        if self._tracker is None:
            return
        self._folder.append_metrics({"run_step": job.first_step + step, "stage": job.plan.name, "step": step, **values})
        self._folder.keep_status(stage=job.plan.name, step=step)
        self._tracker.log({f"{job.plan.name}/{name}": value for name, value in values.items()}, job.first_step + step)

    def stepped(self, job: Job, step: int) -> None:
        every = self._config.eval.every_steps
        if every is not None and step % every == 0 and step < job.plan.max_steps:
            self._show_grid(job, step)

    def finished(self, job: Job, step: int) -> None:
        self._show_grid(job, step)

    def saved(self, job: Job, step: int, held_s: float, write_s: float, num_bytes: int) -> None:
        cost = {"checkpoint_s": round(held_s, 4), "checkpoint_write_s": round(write_s, 4), "checkpoint_bytes": num_bytes}
        self._folder.append_metrics({"run_step": job.first_step + step, "stage": job.plan.name, "step": step, **cost})

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()

    def _show_grid(self, job: Job, step: int) -> None:
        if self._tracker is not None or self._engine.collective_forward:
            columns = self._columns(job)
            if self._tracker is not None:
                with self._folder.informing("grid.png"):
                    save_grid(job.folder / "grid.png", columns, self._draw.prompts)
                    self._tracker.image(f"{job.plan.name}/grid", job.folder / "grid.png", job.first_step + step)
        self._engine.barrier()

    def _columns(self, job: Job) -> dict[str, Tensor]:
        """The fixed prompts at every step count beside the teacher, sampled with the training network itself."""
        pipe, teacher_steps = self._teacher.pipeline, self._config.eval.teacher_steps
        if not self._reference:
            row = teacher_row(pipe.scheduler.config, teacher_steps, teacher_guidance(self._config.teacher, self._config.eval))
            self._reference = {f"teacher {teacher_steps} steps": self._images(job, (), row)}
        recipe = sorted(self._recipe(job.plan.name).items(), reverse=True)
        columns = {
            f"{num_steps} step{'s' if num_steps > 1 else ''}": self._images(job, job.stage.exports, row) for num_steps, row in recipe
        }
        return self._reference | columns

    def _images(self, job: Job, role: Role, row: Sampler) -> Tensor:
        pipe, batch_size = self._teacher.pipeline, self._config.eval.images_at_once(self._teacher.image_size)
        with job.context.roles.use(role):
            latents = sample(
                pipe, self._draw.prompts, row, seed=self._draw.seed, image_size=self._teacher.image_size, batch_size=batch_size
            )
        return decode(pipe, latents, batch_size)


class Tracker:
    """tensorboard or wandb through accelerate's trackers; a tracker that fails never stops training."""

    def __init__(self, config: RunConfig, folder: Path):
        self._tracker: Any = None
        self._image_options: dict[str, str] = {}
        match config.tracker.kind:
            case "tensorboard":
                from accelerate.tracking import TensorBoardTracker

                self._tracker = TensorBoardTracker(config.tracker.project, logging_dir=folder)
                self._image_options = {"dataformats": "NHWC"}
            case "wandb":
                from accelerate.tracking import WandBTracker

                self._tracker = WandBTracker(config.tracker.project, dir=str(folder), name=config.name, config=asdict(config))
        self._try(lambda: self._tracker.start())

    def log(self, values: dict[str, float], step: int) -> None:
        self._try(lambda: self._tracker.log(values, step=step))

    def image(self, name: str, path: Path, step: int) -> None:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._try(lambda: self._tracker.log_images({name: pixels[None]}, step=step, **self._image_options))

    def close(self) -> None:
        self._try(lambda: self._tracker.finish())

    def _try(self, action: Callable[[], None]) -> None:
        if self._tracker is None:
            return
        try:
            action()
        except Exception as error:
            print(f"tracker: {error}; no more is sent to it", flush=True)
            self._tracker = None
