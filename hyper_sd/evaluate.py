"""What a run reached: its adapters at their few steps beside the teacher, and the report's numbers.

A Fréchet distance depends on the number of images and has a floor, so quality is the gap: gap(n) = (FD - FD of the teacher) / (FD of the
un-distilled teacher at min(n, 2) steps with its best guidance - FD of the teacher). That guidance, and eta and start timestep of the
final adapter, are chosen by the lowest FD on a draw of their own (hyper_sd/sweep.py); without one, the guidance is the lowest on the
evaluation itself, which can only make the gaps larger.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hyper_sd.change import changes
from hyper_sd.commands import DIVERSITY, EvaluateConfig, MetricsConfig
from hyper_sd.config import DataConfig, EvalConfig, RunConfig, TeacherConfig
from hyper_sd.data import Source, build_source
from hyper_sd.image_metrics import Figure, ImageMetrics, check_metrics, open_metrics
from hyper_sd.lora_file import inspect_lora, replace_recipe
from hyper_sd.measure import NUM_GRID, Draw, Evaluator, Job, Row, make_draw, reference_scenes, tensors_digest
from hyper_sd.metrics import mean_and_error
from hyper_sd.negative import NegativePrompts, negative_prompts
from hyper_sd.processes import Processes
from hyper_sd.sample import Recipe, read_recipe, recipe_to_json
from hyper_sd.structured import structured
from hyper_sd.sweep import FINAL, TEACHER, Adapter, Choice, choose
from hyper_sd.teachers import inspect_teacher

_BEST, _ALIKE = "teacher at its best guidance", "the stage before, sampled as the final adapter"
INIT = "init"  # the row of what a run started from
_MIN_PROMPTS = 4
NO_METRICS = MetricsConfig()


@dataclass(frozen=True)
class Evaluation:
    """Every row of an evaluation. `undistilled` is the teacher at 1 and 2 steps with its best guidance (empty without a judge).

    `alike` are rows of the stage before the final one, by its name, with the samplers that were chosen for the final adapter.
    """

    guidance: float
    teacher_steps: int
    teacher: dict[int, Row]
    undistilled: dict[int, Row]
    stages: dict[str, dict[int, Row]]
    alike: dict[str, dict[int, Row]]
    final: dict[int, Row]
    choice: Choice
    ceiling: dict[str, Tensor]
    facts: dict[str, Any]
    grid_prompts: list[str]
    negative_prompts: list[NegativePrompts]

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": {
                "guidance": self.guidance,
                **self._rows(self.teacher),
                "best_guidance": self._rows(self.undistilled),
            },
            "stages": {name: self._rows(rows) for name, rows in self.stages.items()},
            "final": self._rows(self.final),
            "changes": self._changes() if self.ceiling else {},
            "evaluation": self.facts | {"ceiling": {name: Figure(*mean_and_error(s)).to_json() for name, s in self.ceiling.items()}},
            "sampler": {
                "teacher": recipe_to_json(_samplers(self.teacher)),
                "stages": {name: recipe_to_json(_samplers(rows)) for name, rows in self.stages.items()},
                "final": recipe_to_json(_samplers(self.final)),
                "sweep": self.choice.rows,
            },
            "grid_prompts": self.grid_prompts,
            "negative_prompts": [asdict(result) for result in self.negative_prompts],
        }

    def grids(self) -> dict[str, dict[str, Tensor]]:
        """Columns of images by grid: "" is the final adapter's, then one a stage, and the un-distilled teacher's."""
        reference = {f"teacher {_steps(self.teacher_steps)}": self.teacher[self.teacher_steps].images}
        few = {f"teacher {_steps(n)}": row.images for n, row in _falling(self.teacher) if n != self.teacher_steps}
        grids = {name: {_steps(n): row.images for n, row in _falling(rows)} for name, rows in [("", self.final), *self.stages.items()]}
        return {name: reference | columns for name, columns in [*grids.items(), ("teacher", few)] if columns}

    def _changes(self) -> dict[str, Any]:
        return changes(self.stages, self.ceiling, self.teacher[self.teacher_steps], self.undistilled, self.alike)

    def _rows(self, rows: Mapping[int, Row]) -> dict[str, Any]:
        teacher = self.teacher[self.teacher_steps]
        return {str(n): row.to_json(teacher, self.undistilled.get(min(n, 2))) for n, row in rows.items()}


def evaluate_run(cfg: RunConfig, processes: Processes, source: Source | None = None, metrics: MetricsConfig = NO_METRICS) -> Evaluation:
    """Evaluate the files of a run: every stage at its own steps and the final adapter, by `metrics` and the run's own rewards.

    What the run started from goes before its stages, as `init`, so that the first of them has something to be compared with. Without a
    judge, prompts come from `source`.
    """
    run_dir = Path(cfg.run.dir)
    stages = {name: run_dir / name / "lora.safetensors" for name in cfg.stages}
    files = _started_from(cfg) | {name: file for name, file in stages.items() if file.is_file()}
    metrics = replace(metrics, names=tuple(dict.fromkeys((*cfg.judges, *metrics.names))), rewards=metrics.rewards | cfg.judges)
    return evaluate(cfg.teacher, cfg.eval, files, run_dir / "lora.safetensors", processes, source, metrics)


def _started_from(cfg: RunConfig) -> dict[str, Path]:
    """The file that the run was given, if it is still there and says how it is sampled."""
    if cfg.init is None or not Path(cfg.init).is_file():
        return {}
    info = inspect_lora(Path(cfg.init)).info
    return {INIT: Path(cfg.init)} if info is not None and info.recipe else {}


def evaluate_lora(cfg: EvaluateConfig, processes: Processes) -> Evaluation:
    """Evaluate one LoRA file at eval.steps beside its teacher. Raises ValueError for steps that its recipe does not have."""
    assert cfg.lora is not None
    facts, file = inspect_teacher(cfg.teacher), Path(cfg.lora)
    recipe = read_recipe(file, facts.fingerprint)
    if unknown := [n for n in cfg.eval.steps if n not in recipe]:
        raise ValueError(f"steps={list(cfg.eval.steps)}: lora={file} is made for {' or '.join(map(str, recipe))} steps, not for {unknown}")
    return evaluate(cfg.teacher, cfg.eval, {}, file, processes, _source(cfg.eval, cfg.data, facts.image_size), cfg.measured)


def evaluate_again(cfg: EvaluateConfig, processes: Processes) -> Evaluation:
    """Evaluate a run as `eval` says; its teacher, its data and its judge are its own, and its guidance unless another is given.

    The samplers that were chosen are written into the metadata of the final adapter, so that its users sample as it was measured.
    """
    assert cfg.run is not None
    run = read_run(Path(cfg.run))
    run = replace(
        run,
        run=replace(run.run, dir=cfg.run),
        eval=replace(
            cfg.eval,
            judge=run.eval.judge,
            guidance=run.eval.guidance if cfg.eval.guidance is None else cfg.eval.guidance,
            negatives=cfg.eval.negatives or run.eval.negatives,
        ),
    )
    evaluation = evaluate_run(run, processes, _source(run.eval, run.data, inspect_teacher(run.teacher).image_size), cfg.measured)
    final = Path(cfg.run) / "lora.safetensors"
    for file in (final, *Path(cfg.run).glob("*/lora.safetensors")) if processes.is_main else ():
        if tensors_digest(file) == tensors_digest(final):
            replace_recipe(file, recipe_to_json(evaluation.choice.final))
    return evaluation


def read_run(run_dir: Path) -> RunConfig:
    """The configuration a run was made with. Raises ValueError for a directory that holds no run."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run={run_dir}: there is no {file}; give the directory of a run, e.g. run=outputs/demo")
    return structured(RunConfig, OmegaConf.to_container(OmegaConf.load(file)))


def _source(cfg: EvalConfig, data: DataConfig, image_size: int) -> Source | None:
    return build_source(data, seed=cfg.seed, image_size=image_size) if cfg.judge is None else None


def evaluate(
    teacher: TeacherConfig,
    cfg: EvalConfig,
    stages: Mapping[str, Path],
    final: Path | None,
    processes: Processes,
    source: Source | None = None,
    metrics: MetricsConfig = NO_METRICS,
) -> Evaluation:
    """Measure LoRA files, by name, and one file as the final adapter, on the same prompts and noise.

    Every file is sampled by the recipe in its metadata; eval.steps picks rows of the final adapter's. Raises ValueError, before a
    weight is loaded, for a file that is no LoRA of this teacher or carries no recipe.
    """
    started = time.monotonic()
    check_prompts(cfg)
    check_shares(cfg, metrics.names, processes.world_size)
    if cfg.prompts == 0:
        raise ValueError("eval.prompts=0: there is nothing to evaluate on")
    if cfg.judge is None and source is None:
        raise ValueError("eval.judge=null takes its prompts from the data: choose data=folder or data=webdataset and set data.path")
    facts = inspect_teacher(teacher)
    check_metrics(metrics, facts.image_size)
    adapters = {name: Adapter(file, read_recipe(file, facts.fingerprint)) for name, file in stages.items()}
    last = None if final is None else Adapter(final, read_recipe(final, facts.fingerprint))
    evaluator = Evaluator.open(teacher, cfg, processes)
    draws = [make_draw(cfg, number, cfg.prompts, source) for number in range(cfg.draws)]
    ends = evaluator.end_points(draws, cfg.end_points)
    opened = _open_metrics(metrics, cfg, source, processes)
    choice = choose(evaluator, cfg, draws, ends, last, opened)
    if last is not None:  # the last stage's adapter is the final one
        digest = tensors_digest(last.file)
        adapters = {name: replace(a, recipe=choice.final) if tensors_digest(a.file) == digest else a for name, a in adapters.items()}

    steps = sorted(cfg.steps, reverse=True)
    jobs = {(TEACHER, n): Job(None, evaluator.teacher_row(n)) for n in (cfg.teacher_steps, *steps)}
    jobs |= {(_BEST, n): Job(None, evaluator.teacher_row(n, w)) for n, w in choice.guidance.items()}
    jobs |= {(f"stage {name}", n): Job(a.file, row) for name, a in adapters.items() for n, row in a.recipe.items()}
    before = _before_final(adapters, last)
    if before is not None:
        jobs |= {(_ALIKE, n): Job(adapters[before].file, row) for n, row in choice.final.items() if n in adapters[before].recipe}
    if last is not None:
        jobs |= {(FINAL, n): Job(last.file, row) for n, row in choice.final.items() if n in steps}
    rows = evaluator.measure(jobs, draws, ends, opened)

    def of(name: str) -> dict[int, Row]:
        return {n: row for (owner, n), row in rows.items() if owner == name}

    return Evaluation(
        guidance=evaluator.guidance,
        teacher_steps=cfg.teacher_steps,
        teacher=of(TEACHER),
        undistilled=of(_BEST),
        stages={name: of(f"stage {name}") for name in adapters},
        alike={} if before is None else {before: of(_ALIKE)},
        final=of(FINAL),
        choice=choice,
        ceiling=evaluator.ceiling(draws, opened),
        facts=_facts(evaluator, cfg, draws, started) | _metrics_facts(metrics),
        grid_prompts=draws[0].prompts[:NUM_GRID],
        negative_prompts=_negative_prompts(evaluator, cfg, last, choice.final),
    )


def _before_final(adapters: Mapping[str, Adapter], last: Adapter | None) -> str | None:
    """The name of the stage before the one that made the final adapter, if it too is for several step counts."""
    final = None if last is None else tensors_digest(last.file)
    pairs = ((before, after) for before, after in pairwise(adapters) if len(adapters[before].recipe) > 1)
    return next((before for before, after in pairs if tensors_digest(adapters[after].file) == final), None)


def _negative_prompts(evaluator: Evaluator, cfg: EvalConfig, final: Adapter | None, recipe: Recipe) -> list[NegativePrompts]:
    """For the final adapter's rows that have guidance, and if there is one, for the teacher."""
    rows = [recipe[n] for n in cfg.steps if n in recipe and recipe[n].guidance_scale > 1]
    if cfg.negatives == 0 or evaluator.judge is None or final is None or not rows:
        return []
    jobs = [Job(None, evaluator.teacher_row(cfg.teacher_steps)), *(Job(final.file, row) for row in rows)]
    return [negative_prompts(evaluator, job, cfg.negatives, cfg.seed) for job in jobs if job.sampler.guidance_scale > 1]


def _facts(evaluator: Evaluator, cfg: EvalConfig, draws: list[Draw], started: float) -> dict[str, Any]:
    floor, floor_accuracy = evaluator.floor(draws)
    return {
        "prompts": cfg.prompts,
        "draws": cfg.draws,
        "floor": floor,
        "floor_accuracy": floor_accuracy,
        "sweep_prompts": cfg.sweep_prompts,
        "reference": cfg.reference if cfg.judge is not None else None,
        "judge": cfg.judge,
        "seed": cfg.seed,
        "end_point_steps": 2 * cfg.teacher_steps,
        "end_points": min(cfg.end_points or cfg.prompts, cfg.prompts),
        "wall_s": round(time.monotonic() - started, 1),
        "device": str(evaluator.pipe.device),
        "processes": evaluator.processes.world_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _open_metrics(metrics: MetricsConfig, cfg: EvalConfig, source: Source | None, processes: Processes) -> ImageMetrics | None:
    """The metrics, with distances to fresh renders where the judge's scenes are drawn, else to the images of the data."""
    if not metrics.names:
        return None
    if cfg.judge is not None:
        return open_metrics(metrics, reference_scenes, cfg.reference, processes)
    assert source is not None
    num_real = min(cfg.reference, source.num_samples or cfg.reference)
    return open_metrics(metrics, partial(_real_images, source), num_real, processes)


def _real_images(source: Source, index: np.ndarray) -> Tensor:
    images = source.batch(index.tolist()).images
    if images is None:
        raise ValueError("data.path holds latents, and metrics are distances to images; point data.path at the images themselves")
    return images


def _metrics_facts(metrics: MetricsConfig) -> dict[str, Any]:
    return {
        "rewards": {name: asdict(reward) for name, reward in metrics.chosen_rewards.items()},
        "features": None if metrics.extractor is None else asdict(metrics.extractor),
        "diversity": asdict(metrics.diversity) if DIVERSITY in metrics.names else None,
    }


def check_prompts(cfg: EvalConfig) -> None:
    """Raise ValueError for too few prompts to measure a Fréchet distance on."""
    for name in ("prompts", "sweep_prompts"):
        if cfg.judge is not None and 0 < getattr(cfg, name) < _MIN_PROMPTS:
            raise ValueError(f"eval.{name} must be at least {_MIN_PROMPTS}, for a Fréchet distance, or 0: got {getattr(cfg, name)}")


def check_shares(cfg: EvalConfig, metrics: Collection[str], num_processes: int) -> None:
    """Raise ValueError where `metrics` would find no image in some process."""
    if metrics and 0 < cfg.prompts < num_processes:
        raise ValueError(
            f"eval.prompts={cfg.prompts}: every process measures a share of the images, so there must be as many as the {num_processes} "
            "processes at least, or none"
        )


def _samplers(rows: Mapping[int, Row]) -> Recipe:
    return {n: row.sampler for n, row in rows.items()}


def _falling(rows: Mapping[int, Row]) -> list[tuple[int, Row]]:
    return sorted(rows.items(), key=lambda item: -item[0])


def _steps(num: int) -> str:
    return f"{num} step{'s' if num > 1 else ''}"
