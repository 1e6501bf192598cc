"""A plan of stages against others that give the student as many updates and samples, over several training seeds.

`stages` is the full plan, `plans` are the others. A row of the table is the final adapter at one step count, the adapter that a score
stage started from, or a stage of k segments at k steps, beside which stands what the other plans end with at k steps.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hyper_sd.config import RunConfig, StagePlan
from hyper_sd.engines import start_engine
from hyper_sd.files import replace_file, write_json
from hyper_sd.measure import Evaluator, Job, Row, make_draw
from hyper_sd.objective import Stage
from hyper_sd.plan import LORA, train_plan
from hyper_sd.plan_checks import check_plan
from hyper_sd.processes import Processes
from hyper_sd.sample import Recipe, lcm_row, read_recipe
from hyper_sd.stages.tscd import TSCD
from hyper_sd.structured import build_target
from hyper_sd.teachers import inspect_teacher

FULL = "full"
_METRICS = {"mse_to_teacher": "distance to the teacher's end point", "accuracy": "accuracy", "frechet": "Fréchet distance"}


def run_ablation(config: RunConfig) -> None:
    """Train every plan with every seed (finished runs are kept), measure all on the same draws, and write ablation.json and ablation.md."""
    check_plans(config)
    check_equal_cost(config)
    engine = start_engine(config.engine)
    if all(train_plan(run, engine) for _, _, run in runs_of(config)):
        results = measure(config, engine)
        if engine.is_main:
            folder, text = Path(config.run.dir), table(results)
            write_json(folder / "ablation.json", results)
            replace_file(folder / "ablation.md", text.encode())
            print(text, flush=True)
    engine.close()


def check_equal_cost(config: RunConfig) -> None:
    """Raise ValueError unless every plan takes as many updates of the student, and as many samples for them, as the stages do."""
    wanted = _cost(config.stages)
    for name, stages in config.plans.items():
        if (cost := _cost(stages)) != wanted:
            raise ValueError(
                f"plans.{name}: takes {cost[0]} updates of the student and {cost[1]} samples, the stages {wanted[0]} and {wanted[1]}; "
                "make max_steps and batch_size add up to the same"
            )


def check_plans(config: RunConfig) -> None:
    """Raise ValueError, naming the key, if a stage of any plan cannot run; before the first of them is trained."""
    if config.only is not None or config.init is not None:
        raise ValueError(f"only, init: plans are compared from the first stage to the last; got only={config.only} and init={config.init}")
    if config.eval.judge is None or config.eval.prompts == 0:
        judge, prompts = config.eval.judge or "null", config.eval.prompts
        raise ValueError(
            f"eval.judge={judge}, eval.prompts={prompts}: plans are compared by the judge's figures; for a teacher that the judge does not "
            "know, train each plan by itself, with a run.dir of its own"
        )
    facts = inspect_teacher(config.teacher)
    for plan, _, run in runs_of(replace(config, seeds=1)):
        try:
            check_plan(run, facts)
        except ValueError as error:
            raise ValueError(str(error) if plan == FULL else str(error).replace("stages.", f"plans.{plan}.")) from None


def _cost(stages: Mapping[str, StagePlan]) -> tuple[int, int]:
    updates = [(-(-plan.max_steps // _method(plan).student_every), plan.batch_size) for plan in stages.values()]
    return sum(number for number, _ in updates), sum(number * size for number, size in updates)


def runs_of(config: RunConfig) -> Iterator[tuple[str, int, RunConfig]]:
    """(plan, seed, its run) for every seed, each in a directory of its own."""
    for seed in range(config.seed, config.seed + (config.seeds or 1)):
        for plan, stages in {FULL: config.stages, **config.plans}.items():
            run_dir = replace(config.run, dir=str(Path(config.run.dir) / f"{plan}_seed{seed}"))
            yield plan, seed, replace(config, name=f"{plan}_seed{seed}", seed=seed, run=run_dir, stages=stages, plans={}, seeds=None)


def measure(config: RunConfig, processes: Processes) -> dict[str, Any]:
    """Figures by plan, row and seed; every row on the same prompts and the same noise."""
    draws = [make_draw(config.eval, number, config.eval.prompts) for number in range(config.eval.draws)]
    evaluator = Evaluator.open(config.teacher, config.eval, processes)
    jobs = {(plan, row, seed): job for plan, seed, run in runs_of(config) for row, job in _jobs(run, evaluator).items()}
    rows = evaluator.measure(jobs, draws, evaluator.end_points(draws, config.eval.end_points))
    return {
        "seeds": config.seeds or 1,
        "prompts": config.eval.prompts * config.eval.draws,
        "teacher_guidance": evaluator.guidance,
        "teacher": _figures(evaluator.measure({"": Job(None, evaluator.teacher_row(config.eval.teacher_steps))}, draws)[""]),
        "plans": {plan: _by_row(rows, plan) for plan in (FULL, *config.plans)},
    }


def table(results: Mapping[str, Any]) -> str:
    """Means over the seeds and their standard deviations, as markdown."""
    teacher, plans = results["teacher"], results["plans"]
    lines = [
        f"{results['seeds']} training seeds, {results['prompts']} prompts, the same prompts and noise in every row. Mean ± "
        "standard deviation over the seeds. The teacher at full steps: "
        f"accuracy {teacher['accuracy']:.3f}, Fréchet distance {teacher['frechet']:.3f}.",
        "",
        f"| row | metric | {' | '.join(plans)} |",
        "|---|---" + "|---" * len(plans) + "|",
    ]
    for row in plans[FULL]:
        beside = row if row.startswith(("final", "before")) else f"final at {row.rpartition(' at ')[2]}"
        for metric, title in _METRICS.items():
            own = plans[FULL][row].get(metric)
            others = [rows.get(beside, {}).get(metric) for plan, rows in plans.items() if plan != FULL]
            lines.append(f"| {row} | {title} | {' | '.join(map(_cell, (own, *others)))} |")
    return "\n".join(lines) + "\n"


def _jobs(run: RunConfig, evaluator: Evaluator) -> dict[str, Job]:
    """What one run is measured at, by row."""
    folder, fingerprint = Path(run.run.dir), inspect_teacher(run.teacher).fingerprint
    files = {name: folder / name / LORA for name in run.stages}
    recipes = {name: read_recipe(file, fingerprint) for name, file in files.items()}
    stages = {name: _method(plan) for name, plan in run.stages.items()}
    *earlier, last = stages
    if not earlier and isinstance(stages[last], TSCD):
        recipes[last] = _single_stage(stages[last], run.eval.start, evaluator)
    jobs = {}
    for name in earlier:
        if (k := stages[name].segments) > 1:
            jobs[f"stage k = {k} at {_steps(k)}"] = Job(files[name], recipes[name][k])
    if earlier and not isinstance(stages[last], TSCD):
        before = earlier[-1]
        jobs |= {f"before {last} at {_steps(n)}": Job(files[before], row) for n, row in recipes[before].items()}
    return jobs | {f"final at {_steps(n)}": Job(files[last], row) for n, row in recipes[last].items()}


def _method(plan: StagePlan) -> Stage:
    return build_target(plan.method, plan.key)


def _single_stage(stage: Stage, start: int | None, evaluator: Evaluator) -> Recipe:
    """A consistency model of one stage is sampled as such models are: by LCM's sampler, on the training grid."""
    base = evaluator.pipe.scheduler.config
    return {steps: lcm_row(base, steps, solver_steps=stage.solver_steps, start=start if steps == 1 else None) for steps in (1, 2, 4, 8)}


def _steps(number: int) -> str:
    return f"{number} step{'s' if number > 1 else ''}"


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


def _cell(values: list[float] | None) -> str:
    if values is None:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"
