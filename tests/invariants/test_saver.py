"""Checkpoints are written while training goes on, and nobody leaves before they are."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper_sd.bad_steps import FILE
from hyper_sd.checkpoint import latest_checkpoint, load_checkpoint
from tests.lives import living, wait_until
from tests.runs import assert_same, train
from tests.shards import write_latents
from tests.tiny import tiny_sd15

SETTINGS = ("only=[tscd_8]", "stages.tscd_8.max_steps=12", "engine.checkpoint_every_steps=5", "engine.keep_last=9")
PATIENCE_S = 60


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "tscd_8" / "checkpoints" / f"step_{step:08d}"


def train_on_a_slow_disk(teacher: Path, run_dir: Path, goes_on: Callable[[Path], bool], *extra: str) -> None:
    """The first checkpoint's first file opens when `goes_on(run_dir)`, or never."""
    slow = str(checkpoint(run_dir, 5).with_suffix(".tmp") / "adapters.safetensors")

    def wait(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and args[0] == slow:
            until = time.monotonic() + PATIENCE_S
            while not goes_on(run_dir):
                assert time.monotonic() < until, "training waits for its checkpoint"
                time.sleep(0.01)

    sys.addaudithook(wait)
    train(teacher, run_dir, *extra)


def ten_steps_are_done(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and '"step": 10' in metrics.read_text()


def given_up(run_dir: Path) -> bool:
    """The run has ended its training by an error, and would be gone if it did not wait; it owns the directory as long as it writes."""
    if not (run_dir / "tscd_8" / FILE).exists():
        return False
    time.sleep(0.5)
    assert (run_dir / "lock.json").exists(), "the directory was given away"
    return True


def half_a_second_later(run_dir: Path) -> bool:
    (run_dir / "writing").touch()
    time.sleep(0.5)
    return True


def test_training_goes_on_and_the_checkpoint_is_of_its_own_step(teacher: Path, tmp_path: Path) -> None:
    straight, run_dir = train(teacher, tmp_path / "straight", *SETTINGS), tmp_path / "run"
    with living(tmp_path / "log", train_on_a_slow_disk, teacher, run_dir, ten_steps_are_done, *SETTINGS) as (life,):
        assert life.end() == 0, life.output
    for step in (5, 10, 12):
        ours, theirs = (load_checkpoint(checkpoint(run, step)) for run in (run_dir, straight))
        assert_same(ours.optimizer, theirs.optimizer)
        for name, tensors in ours.adapters.items():
            assert_same(tensors, theirs.adapters[name])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    costs = {row["step"]: row for row in rows if "checkpoint_s" in row}
    assert list(costs) == [5, 10, 12] and all(row["checkpoint_bytes"] > 0 for row in costs.values())
    assert costs[5]["checkpoint_s"] < costs[5]["checkpoint_write_s"]  # its write waited for five steps, which did not wait for it
    assert costs[12]["checkpoint_s"] > costs[12]["checkpoint_write_s"]  # the stage waits for its last


def test_a_run_that_fails_first_finishes_its_checkpoint(teacher: Path, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data", num=4, bad=(0,))
    settings = (*SETTINGS, *data, "data.batch_size=4", "engine.max_bad_steps=8")  # seen with the metrics of step 10
    with living(tmp_path / "log", train_on_a_slow_disk, teacher, tmp_path / "run", given_up, *settings) as (life,):
        assert life.end() == 1
    assert "FloatingPointError" in life.output and "given away" not in life.output
    assert load_checkpoint(checkpoint(tmp_path / "run", 5)).step == 5


def test_a_signal_while_a_checkpoint_is_written_leaves_two(teacher: Path, tmp_path: Path) -> None:
    run_dir, long = tmp_path / "run", ("stages.tscd_8.max_steps=9999", "engine.checkpoint_every_steps=5")
    with living(tmp_path / "log", train_on_a_slow_disk, teacher, run_dir, half_a_second_later, *SETTINGS, *long) as (life,):
        wait_until((run_dir / "writing").exists, life)
        life.signal(signal.SIGTERM)
        assert life.end() == 0, life.output
    last = latest_checkpoint(run_dir / "tscd_8" / "checkpoints")
    assert load_checkpoint(checkpoint(run_dir, 5)).step == 5 and last is not None and last.step > 5
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"
