"""The choice of samplers: guidance of the un-distilled teacher, eta and start timestep of the final adapter, on a draw of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hyper_sd.config import EvalConfig
from hyper_sd.image_metrics import ImageMetrics
from hyper_sd.measure import Draw, Evaluator, Job, Row, make_draw
from hyper_sd.metrics import Jackknifed
from hyper_sd.sample import Recipe, Sampler, tcd_row

Key = tuple[str, int, float]  # whose row, its steps, and what tells the alternatives of a sweep apart: guidance, eta or start
SWEEP_DRAW = 1 << 20  # the draw that settings are chosen on; no evaluation has so many draws
_WEAKER = (0.0, 0.25, 0.5, 1.0)  # alternatives to the teacher's guidance at few steps, as shares of (w - 1)
_AROUND = (0.5, 1.0, 1.5)  # alternatives at the teacher's full steps, to show that its guidance is a fair one
_ETAS = (0.0, 0.3, 0.6, 1.0)
_STARTS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the schedule's length
_NEARLY_AS_RIGHT = 0.02  # accuracy
_UNDISTILLED = (1, 2)  # step counts of the un-distilled teacher that gaps are measured against
TEACHER, FINAL = "teacher", "final"


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
        jobs |= {(FINAL, n, number): Job(final.file, row) for n in recipe for number, row in _variants(recipe[n]).items()}
    rows = evaluator.measure(jobs, draws, ends, metrics, title="choosing the samplers")
    best = {
        (owner, n): _best(
            {key: row for key, row in rows.items() if key[:2] == (owner, n)}, (FINAL, n, _number(recipe[n])) if owner == FINAL else None
        )
        for owner, n in {key[:2] for key in rows}
    }
    best[TEACHER, cfg.teacher_steps] = _teacher_key(evaluator, cfg.teacher_steps, 1.0)  # given, not chosen
    return Choice(
        guidance={n: best[TEACHER, n][2] for n in _UNDISTILLED},
        final={n: rows[best[FINAL, n]].sampler if (FINAL, n) in best else row for n, row in recipe.items()},
        rows=[_sweep_row(key, row, key == best[key[:2]]) for key, row in rows.items()],
    )


def _teacher_key(evaluator: Evaluator, num_steps: int, share: float) -> Key:
    return TEACHER, num_steps, 1 + share * (evaluator.guidance - 1)


def _best(rows: Mapping[Key, Row], own: Key | None = None) -> Key:
    """The lowest FD. For the final adapter, whose file says what `own` does, among those that are nearly as often right as the best,
    since FD can gain from leaving the caption; and `own` unless another is lower by more than a standard error of their difference."""

    def figure(key: Key, name: str) -> float:
        return rows[key].to_json()[name]

    if own is None:
        return min(rows, key=lambda key: figure(key, "frechet"))
    floor = max(figure(key, "accuracy") for key in rows) - _NEARLY_AS_RIGHT
    eligible = [key for key in rows if figure(key, "accuracy") >= floor]
    best = min(eligible, key=lambda key: figure(key, "frechet"))
    return best if own not in eligible or _is_lower(rows[best].frechet, rows[own].frechet) else own


def _is_lower(one: Jackknifed | None, other: Jackknifed | None) -> bool:
    assert one is not None and other is not None
    difference = Jackknifed(one.value - other.value, one.without - other.without)
    return difference.value < -difference.standard_error


def _number(row: Sampler) -> float:
    """What tells a row from its alternatives: the start timestep of one step, eta of more."""
    if row.scheduler != "TCDScheduler":
        return 0.0
    if row.num_steps > 1:
        return row.eta or 0.0
    return row.timesteps[0] if row.timesteps else row.config["num_train_timesteps"] - 1


def _variants(row: Sampler) -> dict[float, Sampler]:
    """A row and its alternatives by their number; only TCD has any."""
    if row.scheduler != "TCDScheduler":
        return {_number(row): row}
    if row.num_steps > 1:
        return {eta: replace(row, eta=eta) for eta in sorted({*_ETAS, _number(row)})}
    num_steps, solver_steps = row.config["num_train_timesteps"], row.config["original_inference_steps"]
    starts = {round(share * solver_steps) * (num_steps // solver_steps) - 1 for share in _STARTS} | {int(_number(row))}
    rows = {start: tcd_row(row.config, 1, solver_steps=solver_steps, eta=0.0, start=start) for start in sorted(starts, reverse=True)}
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
