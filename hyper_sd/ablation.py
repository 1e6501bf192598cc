"""The plan of stages against one single stage with as many optimizer steps and samples, over several training seeds."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hyper_sd.config import RunConfig, RunDirConfig
from hyper_sd.engine import Engine
from hyper_sd.files import replace_file, write_json
from hyper_sd.measure import Draw, Evaluator, Job, Row, make_draw
from hyper_sd.plan import LORA, train_plan
from hyper_sd.processes import Processes
from hyper_sd.sample import lcm_row, read_recipe
from hyper_sd.teachers import inspect_teacher

SEGMENTED, SINGLE = "segmented", "single_stage"
_METRICS = {"mse_to_teacher": "distance to the teacher's end point", "accuracy": "accuracy", "frechet": "Fréchet distance"}


def run_ablation(config: RunConfig) -> None:
    """Train both plans with every seed (finished runs are kept), measure all on one draw, and write ablation.json and ablation.md."""
    check_equal_cost(config)
    engine = Engine(config.engine)
    finished = [train_plan(run, engine) is not None for _, _, run in runs_of(config)]
    if all(finished):
        results = measure(config, engine)
        if engine.is_main:
            folder, text = Path(config.run.dir), table(results)
            write_json(folder / "ablation.json", results)
            replace_file(folder / "ablation.md", text.encode())
            print(text, flush=True)
    engine.close()


def check_equal_cost(config: RunConfig) -> None:
    """Raise ValueError unless both plans take as many optimizer steps and as many samples."""
    costs = []
    for stages in (config.stages, config.baseline):
        costs.append((sum(s.max_steps for s in stages.values()), sum(s.max_steps * s.batch_size for s in stages.values())))
    if costs[0] != costs[1]:
        raise ValueError(
            f"baseline: takes {costs[1][0]} steps and {costs[1][1]} samples, the stages {costs[0][0]} and {costs[0][1]}; "
            "make max_steps and batch_size add up to the same"
        )


def runs_of(config: RunConfig) -> Iterator[tuple[str, int, RunConfig]]:
    """(plan, seed, its run) for every seed, each in a directory of its own."""
    for seed in range(config.seed, config.seed + (config.seeds or 1)):
        for plan, stages in ((SEGMENTED, config.stages), (SINGLE, config.baseline)):
            run_dir = RunDirConfig(dir=str(Path(config.run.dir) / f"{plan}_seed{seed}"))
            yield plan, seed, replace(config, name=f"{plan}_seed{seed}", seed=seed, run=run_dir, stages=stages, baseline={}, seeds=None)


def measure(config: RunConfig, processes: Processes) -> dict[str, Any]:
    """Figures by plan, row and seed; every row on the same prompts and the same noise."""
    draw = make_draw(config.eval, 0, config.eval.prompts)
    evaluator = Evaluator.open(config.teacher, config.eval, processes)
    jobs = {(plan, row, seed): job for plan, seed, run in runs_of(config) for row, job in _jobs(plan, run, evaluator).items()}
    rows = evaluator.measure(jobs, [draw], evaluator.end_points([draw]))
    return {
        "seeds": config.seeds or 1,
        "prompts": config.eval.prompts,
        "teacher_guidance": evaluator.guidance,
        "teacher": _figures(_teacher(evaluator, config, draw)),
        SEGMENTED: _by_row(rows, SEGMENTED),
        SINGLE: _by_row(rows, SINGLE),
    }


def table(results: Mapping[str, Any]) -> str:
    """Means over the seeds and their standard deviations, as markdown."""
    teacher = results["teacher"]
    lines = [
        f"{results['seeds']} training seeds, {results['prompts']} prompts, the same prompts and noise in every row. Mean ± "
        "standard deviation over the seeds. The teacher at full steps: "
        f"accuracy {teacher['accuracy']:.3f}, Fréchet distance {teacher['frechet']:.3f}.",
        "",
        "| row | metric | segmented | single stage |",
        "|---|---|---|---|",
    ]
    for row, single in _PAIRS.items():
        for metric in _COMPARED[row]:
            cells = [_cell(results[SEGMENTED][row][metric]), _cell(results[SINGLE][single][metric])]
            lines.append(f"| {row} | {_METRICS[metric]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


_PAIRS = {  # a row of the segmented plan, and the row of the single stage it is compared with
    "stage k = 4 at 4 steps": "4 steps",
    "stage k = 2 at 2 steps": "2 steps",
    "final at 4 steps": "4 steps",
    "final at 2 steps": "2 steps",
    "final at 1 step": "1 step",
}
_COMPARED = {row: tuple(_METRICS) if row.startswith("final") else ("mse_to_teacher",) for row in _PAIRS}


def _jobs(plan: str, run: RunConfig, evaluator: Evaluator) -> dict[str, Job]:
    """What one run is measured at: the single stage by LCM's sampler on the training grid, with the same start for one step."""
    folder, base = Path(run.run.dir), evaluator.pipe.scheduler.config
    if plan == SINGLE:
        (stage,) = run.stages.values()
        n = stage.method.get("solver_steps", 40)
        rows = {
            4: lcm_row(base, 4, solver_steps=n),
            2: lcm_row(base, 2, solver_steps=n),
            1: lcm_row(base, 1, solver_steps=n, start=run.eval.start),
        }
        return {f"{steps} step{'s' if steps > 1 else ''}": Job(folder / LORA, row) for steps, row in rows.items()}
    fingerprint = inspect_teacher(run.teacher).fingerprint
    final = read_recipe(folder / LORA, fingerprint)
    jobs = {f"final at {steps} step{'s' if steps > 1 else ''}": Job(folder / LORA, final[steps]) for steps in (4, 2, 1)}
    for name, stage in run.stages.items():
        k = stage.method["segments"]
        if f"stage k = {k} at {k} steps" in _PAIRS:
            file = folder / name / LORA
            jobs[f"stage k = {k} at {k} steps"] = Job(file, read_recipe(file, fingerprint)[k])
    return jobs


def _teacher(evaluator: Evaluator, config: RunConfig, draw: Draw) -> Row:
    return evaluator.measure({"": Job(None, evaluator.teacher_row(config.eval.teacher_steps))}, [draw])[""]


def _by_row(rows: Mapping[tuple[str, str, int], Row], plan: str) -> dict[str, dict[str, list[float]]]:
    """{row: {metric: one value a seed}}."""
    result: dict[str, dict[str, list[float]]] = {}
    for (owner, name, _), row in rows.items():
        if owner == plan:
            for metric, value in _figures(row).items():
                result.setdefault(name, {}).setdefault(metric, []).append(value)
    return result


def _figures(row: Row) -> dict[str, float]:
    figures = row.to_json()
    return {metric: figures[metric] for metric in _METRICS if figures[metric] is not None}


def _cell(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"
