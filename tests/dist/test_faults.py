"""Two real processes on gloo, one of which does something it should not."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest

from hyper_sd.bad_steps import FILE
from hyper_sd.checkpoint import latest_checkpoint
from tests.lives import living, running, wait_until
from tests.runs import ROOT, adapters, assert_same, finish, reached, start, train, wait_for
from tests.shards import write_latents, write_photo
from tests.tiny import tiny_sd15

LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2proc.yaml"))
ZERO2 = (*LAUNCH[:-1], str(ROOT / "configs" / "accelerate" / "deepspeed_zero2.yaml"), "--num_processes", "2", "--main_process_port", "0")
LONG = ("only=[tscd_8]", "engine.checkpoint_every_steps=1", "stages.tscd_8.max_steps=500")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "fault"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)], ids=["dies", "hangs"])
def test_the_others_end_with_the_name_of_a_rank_that(rank: int, fault: signal.Signals, teacher: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with running(teacher, run_dir, *LONG, "engine.timeout_seconds=4", world=2) as lives:
        lost, other = lives[rank], lives[1 - rank]
        wait_until(lambda: reached(run_dir, 2), other)
        lost.signal(fault)
        assert other.end(60) == 1
        assert lost.end(5) == -signal.SIGKILL  # a process that hangs is not left behind
        assert f"rank {rank} (process {lost.pid} on {os.uname().nodename}) died or hangs" in other.output
    status = json.loads((run_dir / "run.json").read_text())
    assert status["status"] == "failed" and f"rank {rank} " in status["error"] and "resume=auto" in status["continue"]


def train_with_broken_photos(teacher: Path, root: Path) -> None:
    photos = root / ("whole" if os.environ["RANK"] == "0" else "broken")
    train(teacher, root / "run", *LONG, "data=folder", f"data.path={photos}", "data.batch_size=2", "engine.timeout_seconds=12")


@pytest.mark.slow
def test_what_another_rank_meets_is_what_the_run_ended_by(teacher: Path, tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        for number in range(4):
            write_photo(tmp_path / name / f"{number}.png")
    for file in (tmp_path / "broken").glob("*.png"):
        file.write_bytes(b"not an image")
    with living(tmp_path / "log", train_with_broken_photos, teacher, tmp_path, world=2) as lives:
        assert [life.end(60) for life in lives] == [1, 1]
    assert f"rank 1 (process {lives[1].pid} on {os.uname().nodename}) died or hangs" in lives[0].output
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == "failed" and "unreadable image" in status["error"] and "broken" in status["error"]


def train_apart(teacher: Path, root: Path) -> None:
    train(teacher, root / os.environ["RANK"], "only=[tscd_8]", "resume=auto")


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_are_told_to_share_a_directory(teacher: Path, tmp_path: Path) -> None:
    whole = train(teacher, tmp_path / "0", "only=[tscd_8]")
    for file in (whole / "lora.safetensors", whole / "tscd_8" / "lora.safetensors"):
        file.unlink()
    with living(tmp_path / "log", train_apart, teacher, tmp_path, world=2) as lives:
        assert [life.end(60) for life in lives] == [1, 1]
    assert all("stages.tscd_8: the processes find different checkpoints" in life.output for life in lives)


@pytest.mark.slow
def test_a_rank_that_waits_for_its_samples_is_told_from_those_that_wait_for_it(teacher: Path, tmp_path: Path) -> None:
    photos, run_dir = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(8):
        write_photo(photos / f"{number}.png")
    data = ("data=folder", f"data.path={photos}", "data.batch_size=2")
    with running(teacher, run_dir, *LONG, *data, "engine.timeout_seconds=6", world=2) as lives:
        wait_until(lambda: reached(run_dir, 2), lives[0])
        pipe = photos / "pipe"
        os.mkfifo(pipe)  # nobody writes to it: who opens it to read waits for ever
        os.replace(pipe, photos / "0.png")
        assert [life.end(60) for life in lives] == [1, 1]
        (named,) = {rank for rank in (0, 1) if f"error: rank {rank} (process" in lives[0].output}
        assert f"error: rank {named} (process {lives[named].pid}" in lives[1].output
        assert "reading samples" in lives[1].output and "images.py" in lives[named].output


@pytest.mark.slow
def test_sigterm_to_the_launcher_and_what_run_json_says_to_type(teacher: Path, tmp_path: Path) -> None:
    run_dir, few = tmp_path / "run", ("only=[tscd_8]", "engine.checkpoint_every_steps=1", "stages.tscd_8.max_steps=24")
    with running(teacher, tmp_path / "straight", *few, world=2) as straight:
        assert [life.end() for life in straight] == [0, 0]
    launched = start(teacher, run_dir, *few, launcher=LAUNCH)
    checkpoints = run_dir / "tscd_8" / "checkpoints"
    wait_for(lambda: reached(run_dir, 2), launched)
    launched.send_signal(signal.SIGTERM)
    output, _ = launched.communicate(timeout=120)
    status = json.loads((run_dir / "run.json").read_text())
    assert status["status"] == "interrupted" and status["stopped_by"] == "SIGTERM", output[-2000:]
    saved = latest_checkpoint(checkpoints)
    assert saved is not None and 2 <= saved.step < 24 and f"step_{saved.step:08d}" in {path.name for path in checkpoints.iterdir()}

    words = shlex.split(status["continue"])
    assert {*LAUNCH[1:], *few, "resume=auto"} <= set(words)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=status["directory"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run_dir / "run.json").read_text())["resumed_from"] == [saved.step]
    assert_same(adapters(tmp_path / "straight"), adapters(run_dir))


@pytest.mark.slow
def test_a_launcher_that_restarts_its_processes_goes_on(teacher: Path, tmp_path: Path) -> None:
    """It keeps its store, in which the first life has left addresses and an alarm."""
    run_dir, few = tmp_path / "run", ("only=[tscd_8]", "engine.checkpoint_every_steps=1", "stages.tscd_8.max_steps=24")
    with running(teacher, tmp_path / "straight", *few, world=2) as straight:
        assert [life.end() for life in straight] == [0, 0]
    launcher = (*LAUNCH, "--main_process_port", "0", "--max_restarts", "1")
    launched = start(teacher, run_dir, *few, "engine.timeout_seconds=12", "resume=auto", launcher=launcher)
    wait_for(lambda: reached(run_dir, 2), launched)
    (second,) = (process for process in psutil.Process(launched.pid).children() if process.environ().get("RANK") == "1")
    second.kill()
    output = finish(launched)
    assert f"rank 1 (process {second.pid} on {os.uname().nodename}) died or hangs" in output  # in the first life
    status = json.loads((run_dir / "run.json").read_text())
    assert status["status"] == "finished" and len(status["resumed_from"]) == 1
    assert_same(adapters(tmp_path / "straight"), adapters(run_dir))


@pytest.mark.slow
def test_a_sample_that_is_not_finite_in_one_rank_skips_the_update_in_all(teacher: Path, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data", num=16, bad=(5,))
    settings = ("only=[tscd_8]", *data, "data.batch_size=4", "stages.tscd_8.max_steps=8")
    with running(teacher, tmp_path / "two", *settings, world=2) as lives:
        assert [life.end() for life in lives] == [0, 0]
    one = train(teacher, tmp_path / "one", *settings)
    assert_same(adapters(one), adapters(tmp_path / "two"), tolerance=5e-3)
    finish(start(teacher, tmp_path / "zero2", *settings, launcher=ZERO2))
    assert_same(adapters(one), adapters(tmp_path / "zero2"), tolerance=5e-3)
    skipped = [skipped_updates(run) for run in (one, tmp_path / "two", tmp_path / "zero2")]
    assert skipped == [2, 2, 2]  # 32 samples are two epochs of 16


@pytest.mark.slow
def test_ranks_stop_together_after_too_many_bad_steps(teacher: Path, tmp_path: Path) -> None:
    data = write_latents(tmp_path / "data", num=4, bad=(0,))
    settings = ("only=[tscd_8]", *data, "data.batch_size=4", "stages.tscd_8.max_steps=40", "engine.max_bad_steps=3")
    run_dir = tmp_path / "run"
    with running(teacher, run_dir, *settings, world=2) as lives:
        assert [life.end() for life in lives] == [1, 1]
        assert all("FloatingPointError" in life.output and "engine.max_bad_steps=3" in life.output for life in lives)
    rows = json.loads((run_dir / "tscd_8" / FILE).read_text())
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) >= 3
    for row in rows:
        assert row["positions"] == [4 * row["step"], 4 * row["step"] + 3] and row["grad_norm"] == "nan"
        assert sorted(np.isfinite([float(loss) for loss in row["losses"]])) == [False, True]  # that of each rank
        assert sorted(row["captions"]) == ["sample 0", "sample 1", "sample 2", "sample 3"]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "failed"


def skipped_updates(run_dir: Path) -> int:
    last = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "student/skipped" in line][-1]
    return int(last["student/skipped"])
