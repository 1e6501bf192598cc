"""A run that is killed again and again is the run that was left alone."""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from hyper_sd.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from tests.lives import Life, living, running, wait_until
from tests.runs import adapters, assert_same, train
from tests.tiny import tiny_sd15

KILLS = 20
PATIENCE_S = 120


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_twenty_times_also_inside_a_save_is_the_straight_run(tmp_path: Path) -> None:
    teacher, run_dir, rng = tiny_sd15(tmp_path / "teacher"), tmp_path / "run", random.Random(0)
    settings = ("only=[tscd_1,score]", "stages.tscd_1.max_steps=18", "stages.score.max_steps=24", "engine.checkpoint_every_steps=1")
    straight = train(teacher, tmp_path / "straight", *settings)
    inside = 0
    for kill in range(KILLS):
        with running(teacher, run_dir, *settings, "resume=auto") as (life,):
            if kill % 4 in (0, 1):  # only after a whole save
                wait_for_a_save(run_dir, life)
            if kill % 2:  # at any moment: while loading, between two steps, in a step, while a stage ends
                time.sleep(rng.uniform(0, 0.5))
            else:
                wait_until(lambda: partial(run_dir), life)
            life.kill()
            assert life.end() == -signal.SIGKILL, f"the run was over before kill {kill}"
        inside += partial(run_dir)
    assert inside >= KILLS // 4
    assert not (run_dir / "lora.safetensors").exists()
    with running(teacher, run_dir, *settings, "resume=auto") as (life,):
        assert life.end() == 0, life.output
    assert_same(adapters(straight), adapters(run_dir))
    assert not partial(run_dir)


def train_with_a_disk_that_hangs(file: Path, teacher: Path, run_dir: Path, *extra: str) -> None:
    """`file` is never opened."""

    def wait(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and args[0] == str(file):
            print("inside a save", flush=True)
            time.sleep(PATIENCE_S)

    sys.addaudithook(wait)
    train(teacher, run_dir, *extra)


def kill_inside_a_save(run_dir: Path, step: int, name: str, ranks: tuple[int, ...], *args: object) -> tuple[list[int], str]:
    """The exit codes of two processes of which some are killed while a checkpoint is half written; what the last one said."""
    file = run_dir / "score" / "checkpoints" / f"step_{step:08d}.tmp" / name
    with living(run_dir.with_name(f"log.{step}"), train_with_a_disk_that_hangs, file, *args, world=2) as lives:
        wait_until(lambda: "inside a save" in lives[0].output, lives[0])
        for rank in ranks:
            lives[rank].kill()
        codes = [life.end(60) for life in lives]
        assert partial(run_dir)
        return codes, lives[-1].output


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_killed_inside_a_save_are_the_straight_run(tmp_path: Path) -> None:
    """First the one that writes, which the other notices, then both at once; bit for bit, since both runs have two processes."""
    teacher, run_dir = tiny_sd15(tmp_path / "teacher"), tmp_path / "run"
    settings = ("only=[score]", "stages.score.max_steps=6", "engine.checkpoint_every_steps=1")
    with running(teacher, tmp_path / "straight", *settings, world=2) as lives:
        assert [life.end() for life in lives] == [0, 0], lives[0].output
    settings = (*settings, "engine.timeout_seconds=20", "resume=auto")
    codes, output = kill_inside_a_save(run_dir, 3, "optimizer.safetensors", (0,), teacher, run_dir, *settings)
    assert codes == [-signal.SIGKILL, 1] and "rank 0 (process" in output
    codes, _ = kill_inside_a_save(run_dir, 5, "manifest.json", (0, 1), teacher, run_dir, *settings)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    with running(teacher, run_dir, *settings, world=2) as lives:
        assert [life.end() for life in lives] == [0, 0], lives[0].output
    assert json.loads((run_dir / "run.json").read_text())["resumed_from"] == [2, 4]
    assert_same(adapters(tmp_path / "straight"), adapters(run_dir))
    assert not partial(run_dir)


def wait_for_a_save(run_dir: Path, life: Life) -> None:
    before = complete(run_dir)
    wait_until(lambda: complete(run_dir) - before, life)


def complete(run_dir: Path) -> set[Path]:
    return {path for path in run_dir.glob("*/checkpoints/step_*") if path.suffix == ""}


def partial(run_dir: Path) -> bool:
    return any(run_dir.glob("*/checkpoints/step_*.tmp"))


def make(step: int) -> Checkpoint:
    tensors = {"a.lora_A.weight": torch.full((2, 3), float(step))}
    return Checkpoint(step, {"student": tensors}, {"student/exp_avg/a": torch.ones(2, 3)}, {"student": step})


def save_and_die(folder: Path, at: int) -> None:
    """Saves step 3 and kills itself at the `at`-th thing that it asks of the file system."""
    save_checkpoint(folder, make(1), keep_last=2)
    save_checkpoint(folder, make(2), keep_last=2)
    asked = itertools.count()
    watched = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree")

    def watch(event: str, _: object) -> None:
        if event in watched and next(asked) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save_checkpoint(folder, make(3), keep_last=2)


@pytest.mark.slow
def test_killed_at_every_point_of_a_save_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    found = []
    for at in range(200):
        folder = tmp_path / str(at)
        with living(tmp_path / "log", save_and_die, folder, at) as (life,):
            code = life.end()
        newest = latest_checkpoint(folder)
        assert newest is not None and torch.equal(newest.adapters["student"]["a.lora_A.weight"], torch.full((2, 3), float(newest.step)))
        found.append(newest.step)
        for path in folder.glob("step_*[0-9]"):
            load_checkpoint(path)  # an old one is not left half removed under its name
        save_checkpoint(folder, make(4), keep_last=2)
        assert not list(folder.glob("*.tmp*"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and len(found) > 15
    assert found == sorted(found) and set(found) == {2, 3}
