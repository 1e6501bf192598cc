"""What a run reached: its adapters at their few steps beside the teacher, and the report's numbers.

A Fréchet distance depends on the number of images and has a floor, so quality is the gap: gap(n) = (FD - FD of the teacher) / (FD of the
un-distilled teacher at min(n, 2) steps with its best guidance - FD of the teacher). That guidance, and eta and start timestep of the
final adapter, are chosen by the lowest FD on a draw of their own (`_best` says when the final adapter leaves what its file says); without
one, the guidance is the lowest on the evaluation itself, which can only make the gaps larger.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from hyper_sd.metrics import Jackknifed, mean_and_error
from hyper_sd.negative import NegativePrompts, negative_prompts
from hyper_sd.processes import Processes
from hyper_sd.sample import Recipe, Sampler, read_recipe, recipe_to_json, tcd_row
from hyper_sd.structured import structured
from hyper_sd.teachers import inspect_teacher

Key = tuple[str, int, float]  # whose row, its steps, and what tells the alternatives of a sweep apart: guidance, eta or start

_TEACHER, _BEST, _FINAL = "teacher", "teacher at its best guidance", "final"
INIT = "init"  # the row of what a run started from
SWEEP_DRAW = 1 << 20  # the draw that settings are chosen on; no evaluation has so many draws
_WEAKER = (0.0, 0.25, 0.5, 1.0)  # alternatives to the teacher's guidance at few steps, as shares of (w - 1)
_AROUND = (0.5, 1.0, 1.5)  # alternatives at the teacher's full steps, to show that its guidance is a fair one
_ETAS = (0.0, 0.3, 0.6, 1.0)
_STARTS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the schedule's length
_NEARLY_AS_RIGHT = 0.02  # accuracy
NO_METRICS = MetricsConfig()
_UNDISTILLED = (1, 2)  # step counts of the un-distilled teacher that gaps are measured against


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, and how to sample with it at each step count."""

    file: Path
    recipe: Recipe


@dataclass(frozen=True)
class Choice:
    """What a sweep chose: the un-distilled teacher's guidance by step count, and the final adapter's recipe; rows are all it tried."""

    guidance: dict[int, float]
    final: Recipe
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """Every row of an evaluation. `undistilled` is the teacher at 1 and 2 steps with its best guidance (empty without a judge)."""

    guidance: float
    teacher_steps: int
    teacher: dict[int, Row]
    undistilled: dict[int, Row]
    stages: dict[str, dict[int, Row]]
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
            "changes": changes(self.stages, self.ceiling, self.teacher[self.teacher_steps], self.undistilled) if self.ceiling else {},
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
    """Evaluate a run as `eval` says; its teacher, its data and its judge are its own.

    The samplers that were chosen are written into the metadata of the final adapter, so that its users sample as it was measured.
    """
    assert cfg.run is not None
    run = read_run(Path(cfg.run))
    run = replace(
        run,
        run=replace(run.run, dir=cfg.run),
        eval=replace(cfg.eval, judge=run.eval.judge, negatives=cfg.eval.negatives or run.eval.negatives),
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
    _check_prompts(cfg, source)
    facts = inspect_teacher(teacher)
    check_metrics(metrics, facts.image_size)
    adapters = {name: Adapter(file, read_recipe(file, facts.fingerprint)) for name, file in stages.items()}
    last = None if final is None else Adapter(final, read_recipe(final, facts.fingerprint))
    evaluator = Evaluator.open(teacher, cfg, processes)
    draws = [make_draw(cfg, number, cfg.prompts, source) for number in range(cfg.draws)]
    ends = evaluator.end_points(draws)
    opened = _open_metrics(metrics, cfg, source, processes)
    choice = choose(evaluator, cfg, draws, ends, last, opened)
    if last is not None:  # the last stage's adapter is the final one
        digest = tensors_digest(last.file)
        adapters = {name: replace(a, recipe=choice.final) if tensors_digest(a.file) == digest else a for name, a in adapters.items()}

    steps = sorted(cfg.steps, reverse=True)
    jobs = {(_TEACHER, n): Job(None, evaluator.teacher_row(n)) for n in (cfg.teacher_steps, *steps)}
    jobs |= {(_BEST, n): Job(None, evaluator.teacher_row(n, w)) for n, w in choice.guidance.items()}
    jobs |= {(f"stage {name}", n): Job(a.file, row) for name, a in adapters.items() for n, row in a.recipe.items()}
    if last is not None:
        jobs |= {(_FINAL, n): Job(last.file, row) for n, row in choice.final.items() if n in steps}
    rows = evaluator.measure(jobs, draws, ends, opened)

    def of(name: str) -> dict[int, Row]:
        return {n: row for (owner, n), row in rows.items() if owner == name}

    return Evaluation(
        guidance=evaluator.guidance,
        teacher_steps=cfg.teacher_steps,
        teacher=of(_TEACHER),
        undistilled=of(_BEST),
        stages={name: of(f"stage {name}") for name in adapters},
        final=of(_FINAL),
        choice=choice,
        ceiling=evaluator.ceiling(draws, opened),
        facts=_facts(evaluator, cfg, draws, started) | _metrics_facts(metrics),
        grid_prompts=draws[0].prompts[:NUM_GRID],
        negative_prompts=_negative_prompts(evaluator, cfg, last, choice.final),
    )


def _negative_prompts(evaluator: Evaluator, cfg: EvalConfig, final: Adapter | None, recipe: Recipe) -> list[NegativePrompts]:
    """For the final adapter's rows that have guidance, and if there is one, for the teacher."""
    rows = [recipe[n] for n in cfg.steps if n in recipe and recipe[n].guidance_scale > 1]
    if cfg.negatives == 0 or evaluator.judge is None or final is None or not rows:
        return []
    jobs = [Job(None, evaluator.teacher_row(cfg.teacher_steps)), *(Job(final.file, row) for row in rows)]
    return [negative_prompts(evaluator, job, cfg.negatives, cfg.seed) for job in jobs if job.sampler.guidance_scale > 1]


def choose(
    evaluator: Evaluator,
    cfg: EvalConfig,
    draws: list[Draw],
    ends: list[Tensor] | None,
    final: Adapter | None,
    metrics: ImageMetrics | None = None,
) -> Choice:
    """Choose by the lowest FD, on a draw of eval.sweep_prompts; with 0 of them only the un-distilled teacher's guidance, on `draws`."""
    recipe = {} if final is None else final.recipe
    if evaluator.judge is None:
        return Choice({}, recipe, [])
    teacher_keys = [_teacher_key(evaluator, n, share) for n in _UNDISTILLED for share in _WEAKER]
    if cfg.sweep_prompts:
        draws, ends, metrics = [make_draw(cfg, SWEEP_DRAW, cfg.sweep_prompts)], None, None
        teacher_keys += [_teacher_key(evaluator, cfg.teacher_steps, share) for share in _AROUND]
    jobs = {key: Job(None, evaluator.teacher_row(key[1], key[2])) for key in teacher_keys}
    if cfg.sweep_prompts and final is not None:
        jobs |= {(_FINAL, n, number): Job(final.file, row) for n in recipe for number, row in _variants(recipe[n]).items()}
    rows = evaluator.measure(jobs, draws, ends, metrics, title="choosing the samplers")
    best = {
        (owner, n): _best({key: row for key, row in rows.items() if key[:2] == (owner, n)}, recipe[n] if owner == _FINAL else None)
        for owner, n in {key[:2] for key in rows}
    }
    best[_TEACHER, cfg.teacher_steps] = _teacher_key(evaluator, cfg.teacher_steps, 1.0)  # given, not chosen
    return Choice(
        guidance={n: best[_TEACHER, n][2] for n in _UNDISTILLED},
        final={n: rows[best[_FINAL, n]].sampler if (_FINAL, n) in best else row for n, row in recipe.items()},
        rows=[_sweep_row(key, row, key == best[key[:2]]) for key, row in rows.items()],
    )


def _teacher_key(evaluator: Evaluator, num_steps: int, share: float) -> Key:
    return _TEACHER, num_steps, 1 + share * (evaluator.guidance - 1)


def _best(rows: Mapping[Key, Row], own: Sampler | None = None) -> Key:
    """The lowest FD. For the final adapter, whose file says `own`, among those that are nearly as often right as the best, since FD can
    gain from leaving the caption; and `own` unless another is lower by more than a standard error of their difference."""

    def figure(key: Key, name: str) -> float:
        return rows[key].to_json()[name]

    if own is None:
        return min(rows, key=lambda key: figure(key, "frechet"))
    floor = max(figure(key, "accuracy") for key in rows) - _NEARLY_AS_RIGHT
    eligible = [key for key in rows if figure(key, "accuracy") >= floor]
    best = min(eligible, key=lambda key: figure(key, "frechet"))
    stay = next((key for key in eligible if rows[key].sampler == own), None)
    return best if stay is None or _is_lower(rows[best].frechet, rows[stay].frechet) else stay


def _is_lower(one: Jackknifed | None, other: Jackknifed | None) -> bool:
    assert one is not None and other is not None
    difference = Jackknifed(one.value - other.value, one.without - other.without)
    return difference.value < -difference.standard_error


def _variants(row: Sampler) -> dict[float, Sampler]:
    """The alternatives of one row: several start timesteps for one step, several eta for more; only TCD has them."""
    if row.scheduler != "TCDScheduler":
        return {0.0: row}
    if row.num_steps > 1:
        return {eta: replace(row, eta=eta) for eta in _ETAS}
    num_steps, solver_steps = row.config["num_train_timesteps"], row.config["original_inference_steps"]
    starts = [round(share * solver_steps) * (num_steps // solver_steps) - 1 for share in _STARTS]
    rows = {start: tcd_row(row.config, 1, solver_steps=solver_steps, eta=0.0, start=start) for start in starts}
    return {start: replace(alternative, guidance_scale=row.guidance_scale) for start, alternative in rows.items()}


def _sweep_row(key: Key, row: Row, chosen: bool) -> dict[str, Any]:
    figures, sampler = row.to_json(), row.sampler
    return {
        "adapter": key[0],
        "steps": key[1],
        "guidance": sampler.guidance_scale,
        "eta": sampler.eta,
        "start": sampler.timesteps[0] if sampler.timesteps else None,
        "accuracy": figures["accuracy"],
        "frechet": figures["frechet"],
        "chosen": chosen,
    }


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


def _check_prompts(cfg: EvalConfig, source: Source | None) -> None:
    if cfg.judge is not None and cfg.prompts < 4:
        raise ValueError(f"eval.prompts must be at least 4, for a Fréchet distance: got {cfg.prompts}")
    if cfg.judge is None and source is None:
        raise ValueError("eval.judge=null takes its prompts from the data: choose data=folder or data=webdataset and set data.path")


def _samplers(rows: Mapping[int, Row]) -> Recipe:
    return {n: row.sampler for n, row in rows.items()}


def _falling(rows: Mapping[int, Row]) -> list[tuple[int, Row]]:
    return sorted(rows.items(), key=lambda item: -item[0])


def _steps(num: int) -> str:
    return f"{num} step{'s' if num > 1 else ''}"
