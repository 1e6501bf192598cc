"""A disk that takes no checkpoint: what was saved before stays, and training stops or goes on as it was told."""

import json
import resource
import signal
from pathlib import Path

import pytest

from hyper_sd.checkpoint import latest_checkpoint
from tests.lives import living
from tests.runs import adapters, assert_same, train
from tests.tiny import tiny_sd15

SETTINGS = ("only=[tscd_8]", "stages.tscd_8.max_steps=3", "engine.checkpoint_every_steps=1")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def straight(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(teacher, tmp_path_factory.mktemp("straight") / "run", *SETTINGS)


def train_on_a_small_disk(limit: int, teacher: Path, run_dir: Path, *extra: str) -> None:
    """No file may grow beyond `limit` bytes: the kernel refuses the write that would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train(teacher, run_dir, *extra)


def too_small_for_a_checkpoint(straight: Path) -> int:
    """Enough for the LoRA that is exported, not for the adapters of a checkpoint."""
    return int(1.5 * (straight / "lora.safetensors").stat().st_size)


def saved_once(teacher: Path, run_dir: Path) -> dict[Path, bytes]:
    """The files of the first step's checkpoint, and a run that stopped after it."""
    train(teacher, run_dir, *SETTINGS, "engine.max_seconds=0.001")
    return checkpoint_files(run_dir)


def checkpoint_files(run_dir: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in (run_dir / "tscd_8" / "checkpoints").rglob("*") if file.is_file()}


@pytest.mark.parametrize("world", [1, 2])
def test_told_to_continue_it_trains_on_without_checkpoints(world: int, teacher: Path, straight: Path, tmp_path: Path) -> None:
    run_dir, limit = tmp_path / "run", too_small_for_a_checkpoint(straight)
    before = saved_once(teacher, run_dir)
    settings = (*SETTINGS, "engine.on_save_error=continue", "resume=auto")
    with living(tmp_path / "log", train_on_a_small_disk, limit, teacher, run_dir, *settings, world=world) as lives:
        assert [life.end() for life in lives] == [0] * world, lives[0].output
    main, *others = (life.output for life in lives)
    for step in (2, 3):
        assert f"step_{step:08d} cannot be saved: " in main
    assert main.count("File too large") == 2 and main.count("training goes on (engine.on_save_error=continue)") == 2
    assert not any("cannot be saved" in output for output in others)
    assert before == checkpoint_files(run_dir) and before
    assert_same(adapters(straight), adapters(run_dir), tolerance=0.0 if world == 1 else 5e-3)
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("world", [1, 2])
def test_told_to_stop_it_keeps_what_was_saved_and_goes_on_from_there(world: int, teacher: Path, straight: Path, tmp_path: Path) -> None:
    run_dir, limit = tmp_path / "run", too_small_for_a_checkpoint(straight)
    before = saved_once(teacher, run_dir)
    with living(tmp_path / "log", train_on_a_small_disk, limit, teacher, run_dir, *SETTINGS, "resume=auto", world=world) as lives:
        assert [life.end() for life in lives] == [1] * world
    assert "step_00000002 cannot be saved: " in lives[0].output and "File too large" in lives[0].output
    assert all("CheckpointError" in life.output for life in lives)
    status = json.loads((run_dir / "run.json").read_text())
    assert status["status"] == "failed" and "step_00000002 cannot be saved" in status["error"]
    assert before == checkpoint_files(run_dir)
    saved = latest_checkpoint(run_dir / "tscd_8" / "checkpoints")
    assert saved is not None and saved.step == 1
    if world == 1:
        train(teacher, run_dir, *SETTINGS, "resume=auto")
        assert_same(adapters(straight), adapters(run_dir))


def test_what_only_informs_is_left_out_when_it_cannot_be_written(teacher: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "metrics.jsonl").mkdir(parents=True)
    (run_dir / "tscd_8" / "grid.png").mkdir(parents=True)
    with living(tmp_path / "log", train, teacher, run_dir, *SETTINGS, "resume=auto") as (life,):
        assert life.end() == 0, life.output
    for name in ("metrics.jsonl", "grid.png"):
        assert life.output.count(f"{name} cannot be written: ") == 1
    assert_same(adapters(straight), adapters(run_dir))
