"""Classes of runs that must agree: interrupted and straight, accumulated and whole, checkpointed and plain."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from hyper_sd.checkpoint import load_checkpoint
from tests.runs import ADVERSARIAL, STAGES, adapters, assert_same, train
from tests.tiny import tiny_sd15


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def straight(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(teacher, tmp_path_factory.mktemp("straight") / "run")


def test_a_run_repeats_bit_for_bit(teacher: Path, straight: Path, tmp_path: Path) -> None:
    assert_same(adapters(straight), adapters(train(teacher, tmp_path / "again")))


def test_another_seed_is_another_run(teacher: Path, straight: Path, tmp_path: Path) -> None:
    other = adapters(train(teacher, tmp_path / "other", "seed=1", "only=[tscd_8]"))
    assert any(not torch.equal(value, other[name]) for name, value in adapters(straight).items() if name.startswith("tscd_8/"))


def test_stopped_by_sigterm_and_continued_is_the_straight_run(teacher: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "tscd_4" / "checkpoints" / "step_00000002"

    def stop() -> None:
        while not checkpoint.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    train(teacher, run_dir)
    stopper.join()
    status = json.loads((run_dir / "run.json").read_text())
    assert status["status"] == "interrupted" and status["stopped_by"] == "SIGTERM" and "resume=auto" in status["continue"]
    assert not (run_dir / "lora.safetensors").exists()

    train(teacher, run_dir, "resume=auto")
    status = json.loads((run_dir / "run.json").read_text())
    assert status["status"] == "finished"
    assert len(status["resumed_from"]) == 1 and 6 <= status["resumed_from"][0] < 24
    assert_same(adapters(straight), adapters(run_dir))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["run_step"] for row in rows if "checkpoint_s" not in row]
    assert steps == sorted(set(steps)) and steps[-1] == 24


def test_a_damaged_checkpoint_is_passed_over(teacher: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = train(teacher, tmp_path / "run", "only=[tscd_8]")
    (run_dir / "tscd_8" / "lora.safetensors").unlink()
    newest = sorted((run_dir / "tscd_8" / "checkpoints").iterdir())[-1] / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    train(teacher, run_dir, "only=[tscd_8]", "resume=auto")
    assert "optimizer.safetensors" in capsys.readouterr().out
    repaired, whole = adapters(run_dir), adapters(straight)
    assert_same({n: v for n, v in repaired.items() if n.startswith("tscd_8/")}, {n: v for n, v in whole.items() if n.startswith("tscd_8/")})


def test_score_and_discriminator_continued_in_the_middle_of_a_cycle_is_the_straight_run(teacher: Path, tmp_path: Path) -> None:
    every = ("engine.checkpoint_every_steps=3", "engine.checkpoint_every_seconds=null")  # the student is updated at steps 0, 2 and 4
    changes = (*ADVERSARIAL, "stages.score.real_score=consistency", *every)
    straight = train(teacher, tmp_path / "straight", *changes)
    again = shutil.copytree(straight, tmp_path / "again")
    for file in (again / "lora.safetensors", again / "score" / "lora.safetensors"):
        file.unlink()
    shutil.rmtree(again / "score" / "checkpoints" / "step_00000006")
    train(teacher, again, *changes, "resume=auto")
    assert json.loads((again / "run.json").read_text())["resumed_from"] == [4 + 3]
    assert_same(adapters(straight), adapters(again))
    last = [load_checkpoint(run / "score" / "checkpoints" / "step_00000006").adapters for run in (straight, again)]
    assert {"student", "target", "fake", "consistency", "heads"} == last[0].keys()
    for name, tensors in last[0].items():
        assert_same(tensors, last[1][name])


def test_finished_stages_are_not_trained_again(teacher: Path, tmp_path: Path) -> None:
    run_dir = train(teacher, tmp_path / "run")
    written = {stage: (run_dir / stage / "lora.safetensors").stat().st_mtime_ns for stage in STAGES}
    train(teacher, run_dir, "resume=auto")
    assert written == {stage: (run_dir / stage / "lora.safetensors").stat().st_mtime_ns for stage in STAGES}


def test_accumulation_is_the_large_batch(teacher: Path, straight: Path, tmp_path: Path) -> None:
    accumulated = train(teacher, tmp_path / "run", "engine.accumulation=2", "only=[tscd_8]")
    whole = {name: value for name, value in adapters(straight).items() if name.startswith("tscd_8/")}
    parts = {name: value for name, value in adapters(accumulated).items() if name.startswith("tscd_8/")}
    assert_same(whole, parts, tolerance=1e-3)


def test_gradient_checkpointing_changes_nothing(teacher: Path, straight: Path, tmp_path: Path) -> None:
    checkpointed = train(teacher, tmp_path / "run", "engine.gradient_checkpointing=true", "only=[tscd_8]")
    whole = {name: value for name, value in adapters(straight).items() if name.startswith("tscd_8/")}
    parts = {name: value for name, value in adapters(checkpointed).items() if name.startswith("tscd_8/")}
    assert_same(whole, parts, tolerance=1e-5)


def test_a_later_stage_starts_from_a_file(teacher: Path, straight: Path, tmp_path: Path) -> None:
    init = straight / "tscd_4" / "lora.safetensors"
    short = train(teacher, tmp_path / "short", "only=[tscd_2,tscd_1]", f"init={init}")
    assert (short / "tscd_1" / "lora.safetensors").exists() and not (short / "tscd_8").exists()
