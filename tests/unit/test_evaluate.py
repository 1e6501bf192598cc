import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from hyper_sd.cli import compose
from hyper_sd.commands import DiversityConfig, EvaluateConfig, MetricsConfig
from hyper_sd.config import DataConfig, EvalConfig, FeaturesConfig, RewardConfig, TeacherConfig, run_config
from hyper_sd.data import Samples
from hyper_sd.evaluate import Evaluation, check_shares, evaluate, evaluate_again, evaluate_lora, evaluate_run, read_run
from hyper_sd.measure import Evaluator, Job, Row, make_draw
from hyper_sd.metrics import Jackknifed
from hyper_sd.processes import Processes
from hyper_sd.report import table, write
from hyper_sd.sample import read_recipe, recipe_to_json, stage_recipe, tcd_row
from hyper_sd.stages.tscd import STEP_COUNTS
from hyper_sd.structured import resolved, structured
from hyper_sd.sweep import _best
from hyper_sd.teachers import inspect_teacher
from tests.adapters import teacher_config, write_adapter
from tests.released import write_reward
from tests.tiny import BETAS, tiny_sd15

PROMPTS = ("a red circle", "a blue square", "a blue circle on a red background", "circle", "square", "a red square")
METRICS = {"accuracy", "frechet", "gap", "mse_to_teacher"}


@dataclass(frozen=True)
class Captions:
    """A source with captions alone."""

    num_samples: int | None = len(PROMPTS)

    def batch(self, positions: Any) -> Samples:
        return Samples([PROMPTS[position % len(PROMPTS)] for position in positions])


def settings(**changes: Any) -> EvalConfig:
    plain = EvalConfig(prompts=6, every_steps=None, steps=(1, 2), teacher_steps=4, judge=None, seed=5, batch_size=4, reference=300)
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return teacher_config(tiny_sd15(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def files(teacher: TeacherConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A chain of two stages, and a final adapter with the weights of the last."""
    folder = tmp_path_factory.mktemp("run")
    recipes = {
        name: stage_recipe(BETAS, (k,) if k > 1 else STEP_COUNTS, solver_steps=8, eta=0.5) for name, k in (("tscd_2", 2), ("tscd_1", 1))
    }
    for seed, (name, recipe) in enumerate(recipes.items()):
        write_adapter(folder / name / "lora.safetensors", teacher, recipe, stage=name, seed=seed)
    return {name: folder / name / "lora.safetensors" for name in recipes}


@pytest.fixture(scope="module")
def judged(teacher: TeacherConfig, files: dict[str, Path]) -> Evaluation:
    return evaluate(teacher, settings(judge="embedded", prompts=16, draws=2, sweep_prompts=8), files, files["tscd_1"], Processes(1))


@pytest.fixture(scope="module")
def unjudged(teacher: TeacherConfig, files: dict[str, Path]) -> Evaluation:
    return evaluate(teacher, settings(), files, files["tscd_1"], Processes(1), Captions())


def test_the_report_has_the_rows_of_its_contract(judged: Evaluation, tmp_path: Path):
    facts = {"engine": {"type": "NO", "world_size": 1, "backend": "none"}, "resumed_from": [], "wall_s": 1.0, "peak_rss_bytes": 1}
    write(tmp_path, judged.to_json(), judged.grids(), facts)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["teacher"]["guidance"] == 3.0
    assert [name for name in report["teacher"] if name.isdigit()] == ["4", "2", "1"]
    assert {name: list(rows) for name, rows in report["stages"].items()} == {"tscd_2": ["2"], "tscd_1": ["1", "2", "4", "8"]}
    assert list(report["final"]) == ["1", "2"]
    rows = [*(report["teacher"][n] for n in "421"), report["stages"]["tscd_2"]["2"], *report["final"].values()]
    assert all(row.keys() >= METRICS for row in rows)
    assert all(isinstance(row[name], float) for row in rows for name in METRICS - {"gap"})
    assert report["evaluation"]["prompts"] == 16
    assert report["evaluation"]["draws"] == 2
    assert report["evaluation"]["floor"] > 0
    assert report["evaluation"]["floor_accuracy"] > 0.9
    assert len(report["grid_prompts"]) == 8
    assert report["engine"] == facts["engine"]
    assert report["sampler"]["stages"]["tscd_2"]["2"]["config"]["original_inference_steps"] == 8
    assert (tmp_path / "tscd_2" / "grid.png").exists()


def test_the_gap_is_measured_from_the_teacher_to_its_best_few_steps(judged: Evaluation):
    report = judged.to_json()
    best = report["teacher"]["best_guidance"]
    full = report["teacher"]["4"]
    for num_steps, row in report["final"].items():
        scale = best[num_steps]["frechet"] - full["frechet"]
        expected = (row["frechet"] - full["frechet"]) / scale if scale > 0 else None
        assert row["gap"] == (None if expected is None else pytest.approx(expected))
    assert full["gap"] in (0.0, None)


def test_the_sweep_is_reported_and_its_choice_used(judged: Evaluation):
    report = judged.to_json()
    sweep = report["sampler"]["sweep"]
    assert {(row["adapter"], row["steps"]) for row in sweep} == {
        *(("teacher", n) for n in (1, 2, 4)),
        *(("final", n) for n in (1, 2, 4, 8)),
    }
    for num_steps in (1, 2):
        guided = [row for row in sweep if (row["adapter"], row["steps"]) == ("teacher", num_steps)]
        assert [row["guidance"] for row in guided] == [1.0, 1.5, 2.0, 3.0]
        best = min(guided, key=lambda row: row["frechet"])
        assert [row["chosen"] for row in guided] == [row is best for row in guided]
        assert report["teacher"]["best_guidance"][str(num_steps)]["guidance"] == best["guidance"]
    starts = [row for row in sweep if (row["adapter"], row["steps"]) == ("final", 1)]
    assert [row["start"] for row in starts] == [999, 874, 749]
    chosen = next(row for row in starts if row["chosen"])
    assert report["sampler"]["final"]["1"]["timesteps"] == [chosen["start"]]
    etas = [row for row in sweep if (row["adapter"], row["steps"]) == ("final", 2)]
    assert [row["eta"] for row in etas] == [0.0, 0.3, 0.5, 0.6, 1.0]  # .5 is the file's own
    assert report["sampler"]["final"]["2"]["eta"] == next(row["eta"] for row in etas if row["chosen"])


def test_without_a_sweep_the_files_own_samplers_are_used(teacher: TeacherConfig, files: dict[str, Path]):
    report = evaluate(teacher, settings(judge="embedded"), {}, files["tscd_1"], Processes(1)).to_json()
    assert report["sampler"]["final"]["2"]["eta"] == 0.5
    assert {row["adapter"] for row in report["sampler"]["sweep"]} == {"teacher"}


def test_without_a_judge_rows_have_their_distance_and_images_alone(unjudged: Evaluation):
    report = unjudged.to_json()
    row = report["final"]["2"]
    assert [row[name] for name in ("accuracy", "frechet", "gap")] == [None] * 3
    assert row["mse_to_teacher"] > 0
    assert report["evaluation"]["floor"] is None
    assert report["grid_prompts"] == list(PROMPTS)
    grids = unjudged.grids()
    assert list(grids) == ["", "tscd_2", "tscd_1", "teacher"]
    assert list(grids[""]) == ["teacher 4 steps", "2 steps", "1 step"]
    assert grids[""]["1 step"].shape == (len(PROMPTS), 3, 32, 32)


def test_rows_are_paired(teacher: TeacherConfig, unjudged: Evaluation, files: dict[str, Path]):
    """The distance of a row is that of its latents from the end points of the same noise, prompt by prompt."""
    again = evaluate(teacher, settings(batch_size=3), {"tscd_2": files["tscd_2"]}, None, Processes(1), Captions())
    first, second = unjudged.stages["tscd_2"][2].error, again.stages["tscd_2"][2].error
    assert first is not None and second is not None
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    ends = unjudged.teacher[4].error
    few = unjudged.teacher[1].error
    assert ends is not None and few is not None
    assert ends.mean() < few.mean()


@pytest.mark.slow
def test_rows_have_the_metrics_that_were_named(teacher: TeacherConfig, files: dict[str, Path], tmp_path: Path):
    """With the judge's features, fid is the judge's own distance; the sweep's rows are not measured."""
    reward = write_reward("clip_score", tmp_path / "reward")
    metrics = MetricsConfig(
        names=("fid", "clip_score", "diversity"),
        rewards={"clip_score": reward},
        features=FeaturesConfig(kind="judge"),
        diversity=DiversityConfig(prompts=5, seeds=3),
    )
    cfg = settings(judge="embedded", prompts=16, draws=2, sweep_prompts=8)
    evaluation = evaluate(teacher, cfg, {}, files["tscd_1"], Processes(1), metrics=metrics)
    report = write(tmp_path, evaluation.to_json(), {}, {})
    rows = [report["final"]["2"], report["teacher"]["4"], report["teacher"]["best_guidance"]["1"]]
    for row in rows:
        assert list(row["metrics"]) == ["fid", "clip_score", "diversity"]
        assert row["metrics"]["fid"]["value"] == pytest.approx(row["frechet"], rel=1e-4)
        assert row["metrics"]["fid"]["standard_error"] == pytest.approx(row["standard_error"]["frechet"], rel=1e-3)
        assert row["metrics"]["clip_score"]["standard_error"] > 0
        assert 0 < row["metrics"]["diversity"]["value"] < 1
    assert rows[0]["metrics"]["clip_score"] != rows[1]["metrics"]["clip_score"]
    assert report["evaluation"]["rewards"]["clip_score"]["path"] == reward.path
    assert report["evaluation"]["features"]["kind"] == "judge"
    assert table(report).splitlines()[0].split()[-3:] == ["fid", "clip_score", "diversity"]
    assert "<th>clip_score</th>" in (tmp_path / "report.html").read_text()


def test_metrics_are_checked_before_anything_is_loaded(teacher: TeacherConfig, files: dict[str, Path]):
    missing = MetricsConfig(names=("mine",), rewards={"mine": RewardConfig(kind="clip_score", path="/nowhere", file="x", alpha=1.0)})
    with pytest.raises(ValueError, match=r"rewards\.mine\.path=/nowhere is no directory"):
        evaluate(teacher, settings(judge="embedded"), {}, files["tscd_1"], Processes(1), metrics=missing)


def test_other_draws_have_other_prompts_and_other_noise():
    cfg = settings(judge="embedded")
    first, second = (make_draw(cfg, number, 6) for number in (0, 1))
    assert first.seed != second.seed
    assert first.prompts != second.prompts
    assert make_draw(cfg, 0, 3).prompts == first.prompts[:3]
    assert make_draw(settings(), 1, 4, Captions()).prompts == [PROMPTS[i % 6] for i in range(4, 8)]


def test_equal_jobs_are_sampled_once(teacher: TeacherConfig, files: dict[str, Path]):
    evaluator = Evaluator.open(teacher, settings(), Processes(1))
    calls: list[int] = []
    evaluator.pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    copy = files["tscd_1"].with_name("copy.safetensors")
    copy.write_bytes(files["tscd_1"].read_bytes())
    row = tcd_row(BETAS, 2, solver_steps=8, eta=0.0)
    jobs = {"a": Job(files["tscd_1"], row), "b": Job(copy, row), "teacher": Job(None, row)}
    draws = [make_draw(settings(), 0, 4, Captions())]
    rows = evaluator.measure(jobs, draws)
    assert len(calls) == 2 * 2
    assert evaluator.measure(jobs, draws) == rows
    assert len(calls) == 2 * 2
    evaluator.measure(jobs, [make_draw(settings(), 1, 4, Captions())])
    assert len(calls) == 4 * 2
    assert torch.equal(rows["a"].images, rows["b"].images)
    assert not torch.equal(rows["a"].images, rows["teacher"].images)


def test_some_prompts_can_stand_for_all_in_the_distance_to_the_teacher(teacher: TeacherConfig, files: dict[str, Path]):
    draws = [make_draw(settings(), 0, 6, Captions())]
    job = {"": Job(files["tscd_1"], tcd_row(BETAS, 2, solver_steps=8, eta=0.0))}

    def error(num: int | None) -> torch.Tensor:
        evaluator = Evaluator.open(teacher, settings(), Processes(1))
        error = evaluator.measure(job, draws, evaluator.end_points(draws, num))[""].error
        assert error is not None
        return error

    assert len(error(None)) == 6
    torch.testing.assert_close(error(2), error(None)[:2])


def test_the_last_stage_is_compared_with_the_one_before_it_by_the_same_samplers(
    teacher: TeacherConfig, files: dict[str, Path], tmp_path: Path
):
    rewards = {"embedded_heldout": RewardConfig(kind="embedded_heldout", alpha=1.0)}
    stages = {}
    for seed, (name, eta) in enumerate((("refl", 1.0), ("score", 0.3))):
        stages[name] = tmp_path / name / "lora.safetensors"
        write_adapter(stages[name], teacher, stage_recipe(BETAS, (1, 2), solver_steps=8, eta=eta), stage=name, seed=seed)
    metrics = MetricsConfig(names=tuple(rewards), rewards=rewards)
    cfg = settings(judge="embedded", prompts=8, eta=1.0)
    found = evaluate(teacher, cfg, stages, stages["score"], Processes(1), metrics=metrics)
    alike = found.alike["refl"]
    assert [alike[n].sampler for n in (1, 2)] == [found.final[n].sampler for n in (1, 2)]
    assert alike[2].sampler.eta == 0.3 and found.stages["refl"][2].sampler.eta == 1.0
    change = found.to_json()["changes"]["score"]
    after, before = (row.scores["embedded_heldout"].mean() for row in (found.stages["score"][2], alike[2]))
    assert change["before"] == "refl"
    assert change["steps"]["2"]["rewards"]["embedded_heldout"]["difference"] == pytest.approx(float(after - before), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "embedded", "prompts": 3}, "eval.prompts must be at least 4"),
        ({"judge": "embedded", "sweep_prompts": 2}, "eval.sweep_prompts must be at least 4"),
        ({"prompts": 0}, "eval.prompts=0: there is nothing to evaluate on"),
        ({"judge": None}, "eval.judge=null takes its prompts from the data"),
    ],
)
def test_settings_that_cannot_be_evaluated(teacher: TeacherConfig, files: dict[str, Path], changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        evaluate(teacher, settings(**changes), files, None, Processes(1))


def test_every_process_needs_an_image_to_measure(teacher: TeacherConfig, files: dict[str, Path]):
    check_shares(settings(prompts=6), [], num_processes=8)
    check_shares(settings(prompts=6), ["embedded"], num_processes=6)
    check_shares(settings(prompts=0), ["embedded"], num_processes=8)
    processes = Processes(1)
    processes.world_size = 8
    metrics = MetricsConfig(names=("kid",), features=FeaturesConfig(kind="judge"))
    with pytest.raises(ValueError, match=r"eval.prompts=6: every process measures a share .* as many as the 8 processes"):
        evaluate(teacher, settings(prompts=6), files, None, processes, Captions(), metrics)


def test_the_judge_refuses_other_image_sizes(tmp_path: Path):
    large = teacher_config(tiny_sd15(tmp_path, image_size=64))
    with pytest.raises(ValueError, match=r"32 pixels, this teacher draws 64; set eval\.judge=null"):
        Evaluator.open(large, settings(judge="embedded"), Processes(1))


def test_an_adapter_of_another_teacher_is_refused(tmp_path: Path, files: dict[str, Path]):
    other = teacher_config(tiny_sd15(tmp_path, latent_channels=8))
    with pytest.raises(ValueError, match="another base model"):
        evaluate(other, settings(), files, None, Processes(1), Captions())


def test_a_file_without_a_recipe_is_refused(tmp_path: Path, teacher: TeacherConfig):
    write_adapter(tmp_path / "lora.safetensors", teacher, recipe={})
    with pytest.raises(ValueError, match=r"carries no sampler recipe \(metadata hyper_sd.sampler\)"):
        evaluate(teacher, settings(), {}, tmp_path / "lora.safetensors", Processes(1), Captions())


def test_a_run_is_evaluated_again_and_its_adapter_told_how_to_be_sampled(tmp_path: Path, teacher: TeacherConfig, files: dict[str, Path]):
    run = write_run(tmp_path / "run", teacher, files)
    weights = load_file(run / "lora.safetensors")
    data = DataConfig(kind="scenes", batch_size=1)
    cfg = settings(judge="embedded", prompts=8, sweep_prompts=8)
    evaluation = evaluate_again(
        EvaluateConfig(run=str(run), lora=None, steps=(1, 2), out=None, eval=cfg, teacher=replace(teacher, path="nowhere"), data=data),
        Processes(1),
    )
    report = evaluation.to_json()
    assert list(report["stages"]) == ["tscd_2", "tscd_1"]
    assert report["stages"]["tscd_1"]["1"] == report["final"]["1"]
    fingerprint = inspect_teacher(teacher).fingerprint
    recipe = read_recipe(run / "lora.safetensors", fingerprint)
    assert recipe == read_recipe(run / "tscd_1" / "lora.safetensors", fingerprint) == evaluation.choice.final
    assert recipe_to_json(recipe)["2"] == report["sampler"]["final"]["2"]
    assert list(read_recipe(run / "tscd_2" / "lora.safetensors", fingerprint)) == [2]
    after = load_file(run / "lora.safetensors")
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


def test_a_run_is_compared_with_what_it_started_from(tmp_path: Path, teacher: TeacherConfig, files: dict[str, Path]):
    run = read_run(write_run(tmp_path / "run", teacher, {"tscd_1": files["tscd_1"]}))
    plain = tmp_path / "plain.safetensors"  # does not say how it is sampled
    save_file(load_file(files["tscd_2"]), plain)
    run = replace(run, run=replace(run.run, dir=str(tmp_path / "run")), eval=settings(prompts=2), rewards={}, heldout=None)
    wanted = {files["tscd_2"]: {"init": ["2"]}, plain: {}, tmp_path / "gone": {}}
    for file, first in wanted.items():
        report = evaluate_run(replace(run, init=str(file)), Processes(1), Captions()).to_json()
        assert {name: list(rows) for name, rows in report["stages"].items()} == first | {"tscd_1": list(map(str, STEP_COUNTS))}


def test_a_directory_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no .*config\.yaml; give the directory of a run"):
        read_run(tmp_path)


def test_one_file_is_evaluated_at_the_steps_it_is_made_for(teacher: TeacherConfig, files: dict[str, Path]):
    data = DataConfig(kind="scenes", batch_size=1)
    cfg = EvaluateConfig(
        run=None, lora=str(files["tscd_2"]), steps=(2,), out=None, eval=settings(judge="embedded", steps=(2,)), teacher=teacher, data=data
    )
    report = evaluate_lora(cfg, Processes(1)).to_json()
    assert (list(report["final"]), report["stages"]) == (["2"], {})
    with pytest.raises(ValueError, match=r"steps=\[1, 2\]: lora=.* is made for 2 steps, not for \[1\]"):
        evaluate_lora(replace(cfg, eval=settings(judge="embedded")), Processes(1))


def test_a_run_or_a_file_not_both(teacher: TeacherConfig):
    for run, lora in (("a", "b"), (None, None)):
        with pytest.raises(ValueError, match="run, lora: give one of them"):
            EvaluateConfig(
                run=run, lora=lora, steps=(1,), out=None, eval=settings(), teacher=teacher, data=DataConfig(kind="scenes", batch_size=1)
            )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("out=x", r"out=x: is for lora=FILE; the report of a run is written into its own directory, run=r"),
        ("eval.eta=0.5", r"eval\.eta=0\.5: is for training; here an adapter is sampled as its file says"),
        ("eval.start=899", r"eval\.start=899: is for training"),
        ("eval.student_guidance=3", r"eval\.student_guidance=3\.0: is for training"),
        ("eval.every_steps=5", r"eval\.every_steps=5: is for training"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(override: str, message: str):
    with pytest.raises(ValueError, match=message):
        structured(EvaluateConfig, resolved(compose("evaluate", ["run=r", override])))


def write_run(folder: Path, teacher: TeacherConfig, files: dict[str, Path]) -> Path:
    """A finished run's directory, as far as an evaluation reads it."""
    config = run_config(compose("train", ["recipe=smoke", "~stages.tscd_8", "~stages.tscd_4", "run.dir=elsewhere"]))
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(asdict(replace(config, teacher=teacher))))
    for name, file in files.items():
        (folder / name).mkdir()
        shutil.copy(file, folder / name)
    shutil.copy(files["tscd_1"], folder)
    return folder


def test_the_final_adapter_leaves_its_own_sampler_only_for_a_clearly_better_one():
    def row(value: float, spread: float, right: float, eta: float) -> Row:
        sampler = tcd_row(BETAS, 2, solver_steps=8, eta=eta)
        without = value + spread * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        frechet = Jackknifed(value, without)
        return Row(sampler, torch.arange(100) < right * 100, frechet, None, torch.zeros(0))

    def chosen(*rows: Row) -> float:
        keyed = {("final", 2, number): row for number, row in enumerate(rows)}
        return keyed[_best(keyed, ("final", 2, 0))].sampler.eta

    assert chosen(row(2.0, 0.1, 0.9, 1.0), row(1.9, 0.4, 0.9, 0.0)) == 1.0  # within the error of the difference
    assert chosen(row(2.0, 0.1, 0.9, 1.0), row(1.0, 0.1, 0.9, 0.0)) == 0.0
    assert chosen(row(2.0, 0.1, 0.9, 1.0), row(1.0, 0.1, 0.8, 0.0)) == 1.0  # better images of something else
    assert chosen(row(2.0, 0.1, 0.5, 1.0), row(3.0, 0.1, 0.9, 0.0)) == 0.0
