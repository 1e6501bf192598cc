"""What may change when a run goes on, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from hyper_sd.checkpoint import latest_checkpoint, save_checkpoint
from hyper_sd.cli import compose
from hyper_sd.config import RunConfig, run_config
from hyper_sd.resume import accepted_changes, config_to_yaml
from tests.runs import adapters, assert_same, overrides, train
from tests.tiny import tiny_sd15

SHORT = ("only=[tscd_8,tscd_4]", "stages.tscd_8.max_steps=2", "stages.tscd_4.max_steps=2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def straight(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(teacher, tmp_path_factory.mktemp("straight") / "run", *SHORT)


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """The straight run as it stood in the middle of its second stage."""
    run_dir = shutil.copytree(straight, tmp_path / "run")
    for file in (run_dir / "lora.safetensors", run_dir / "tscd_4" / "lora.safetensors"):
        file.unlink()
    return run_dir


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ("lora.rank=8", "lora.rank: 4 -> 8"),
        ("lora.targets=[to_q,to_k]", "-> ['to_q', 'to_k']"),
        ("stages.tscd_4.ema_decay=0.5", "stages.tscd_4.ema_decay: 0.6 -> 0.5"),
        ("stages.tscd_4.optimizer.lr=0.5", "-> 0.5"),
        ("data.batch_size=8", "stages.tscd_4.batch_size: 4 -> 8"),
        ("seed=3", "seed: 0 -> 3"),
        ("only=[tscd_8]", "only: ['tscd_8', 'tscd_4'] -> ['tscd_8']"),
        ("~stages.score", "-> nothing"),
    ],
)
def test_other_settings_are_refused_with_both_values(change: str, values: str, teacher: Path, stopped: Path) -> None:
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"holds a run with other settings") as error:
        train(teacher, stopped, *SHORT, change, "resume=auto")
    assert values in str(error.value) and f"'run.accept_changed=[{change.split('=')[0].strip('~')}"[:30] in str(error.value)
    assert before == {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}


def test_another_base_model_is_refused_even_at_the_same_path(teacher: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"teacher\.path: {teacher} -> {tmp_path / 'other'}"):
        train(tiny_sd15(tmp_path / "other", seed=1), stopped, *SHORT, "resume=auto")
    (tmp_path / "moved").mkdir()
    other = tiny_sd15(tmp_path / "moved" / "teacher", prediction_type="v_prediction")
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    config["teacher"]["path"] = str(other)
    (stopped / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"teacher\.base\.prediction: eps -> v"):
        train(other, stopped, *SHORT, "resume=auto")


def test_what_is_accepted_is_noted_and_need_not_be_accepted_again(teacher: Path, stopped: Path) -> None:
    change = "stages.tscd_4.ema_decay=0.5"
    train(teacher, stopped, *SHORT, change, "run.accept_changed=[stages.tscd_4]", "resume=auto")
    train(teacher, stopped, *SHORT, change, "resume=auto")
    assert json.loads((stopped / "run.json").read_text())["changed"] == ["stages.tscd_4.ema_decay: 0.6 -> 0.5"]


def test_a_guard_may_be_taken_off_a_stage_that_has_begun_or_put_on(teacher: Path, tmp_path: Path) -> None:
    guard = ("stages.refl.guard.patience=null", "stages.refl.guard.keep=last", "stages.refl.guard.every_steps=1")
    settings = ("only=[refl]", "stages.refl.rollout=[1]", "engine.checkpoint_every_seconds=null")
    run_dir = train(teacher, tmp_path / "run", *settings, *guard)
    expected = adapters(run_dir)  # such a guard only looks
    for change in (("stages.refl.guard=null",), guard):
        shutil.rmtree(run_dir / "refl" / "checkpoints" / "step_00000004")
        for file in (run_dir / "lora.safetensors", run_dir / "refl" / "lora.safetensors"):
            file.unlink()
        train(teacher, run_dir, *settings, *change, "run.accept_changed=[stages.refl.guard]", "resume=auto")
        assert_same(expected, adapters(run_dir))
    assert [row["step"] for row in json.loads((run_dir / "refl" / "guard.json").read_text())["history"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("begun_with", [False, True])
def test_a_stage_goes_on_with_the_adapters_that_its_checkpoints_have(begun_with: bool, teacher: Path, stopped: Path) -> None:
    """Also where the change that makes it another is accepted; nothing is written then."""
    with_heads = "stages.tscd_4.adversarial={weight: 0.1}"
    if begun_with:
        (stopped / "config.yaml").write_text(config_to_yaml(run_config(compose("train", overrides(teacher, stopped, *SHORT, with_heads)))))
        folder = stopped / "tscd_4" / "checkpoints"
        saved = latest_checkpoint(folder)
        assert saved is not None
        save_checkpoint(folder, replace(saved, adapters={**saved.adapters, "heads": {"w": torch.ones(1)}}), keep_last=2)
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    lists = ["student, target", "heads, student, target"]
    are, has = reversed(lists) if begun_with else lists
    with pytest.raises(ValueError, match=rf"stages\.tscd_4: the checkpoints in .* are of {are}, but .* has {has}; give the settings"):
        train(teacher, stopped, *SHORT, *(() if begun_with else (with_heads,)), "run.accept_changed=[stages.tscd_4]", "resume=auto")
    assert before == {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}


def test_how_and_where_it_runs_may_change(teacher: Path, straight: Path, stopped: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    stopped.rename(moved)
    free = ("eval.steps=[1]", "engine.checkpoint_every_steps=50", "engine.max_seconds=1000", "engine.keep_last=5", "name=other")
    train(teacher, moved, *SHORT, *free, "tracker=tensorboard", "resume=auto")
    assert_same(adapters(straight), adapters(moved))


def test_what_a_guard_samples_is_held_and_how_data_are_read_is_free(tmp_path: Path) -> None:
    def run_of(*overrides: str) -> RunConfig:
        return run_config(compose("train", ["recipe=smoke", *overrides]))

    (tmp_path / "config.yaml").write_text(config_to_yaml(run_of()))
    (tmp_path / "tscd_8").mkdir()
    (tmp_path / "tscd_8" / "lora.safetensors").touch()
    free = ("+data.prefetch=7", "data.num_workers=3", "+data.max_bad_fraction=0.5", "decode.slice=3", "eval.prompts=16")
    assert accepted_changes(tmp_path, run_of(*free), {}, {}) == []
    with pytest.raises(ValueError, match=r"eval\.seed: 1000 -> 9"):
        accepted_changes(tmp_path, run_of("eval.seed=9"), {}, {})
    (tmp_path / "config.yaml").write_text(config_to_yaml(run_of("only=[tscd_8]")))
    assert accepted_changes(tmp_path, run_of("only=[tscd_8]", "eval.seed=9"), {}, {}) == []


def test_a_run_that_trained_nothing_yet_may_begin_anew(teacher: Path, tmp_path: Path) -> None:
    first = train(teacher, tmp_path / "run", *SHORT, "engine.max_seconds=0.0001", "engine.on_save_error=stop")
    saved = latest_checkpoint(first / "tscd_8" / "checkpoints")
    status = json.loads((first / "run.json").read_text())
    assert saved is not None and saved.step == 1
    assert status["status"] == "interrupted" and status["stopped_by"] == "engine.max_seconds=0.0001"
    shutil.rmtree(first / "tscd_8")
    train(teacher, first, *SHORT, "seed=7", "resume=auto")
