"""A signal while a run is evaluated."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from hyper_sd.checkpoint import latest_checkpoint
from tests.lives import Life, running, wait_until
from tests.runs import train
from tests.tiny import tiny_sd15

SETTINGS = ("only=[tscd_8]", "stages.tscd_8.max_steps=2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)], ids=["one process", "two processes"])
def test_a_signal_ends_the_evaluation_in_good_order_and_it_is_done_again(
    world: int, number: signal.Signals, teacher: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with running(teacher, run_dir, *SETTINGS, "eval.prompts=99999", world=world) as lives:
        wait_until(lambda: '"evaluating"' in status_text(run_dir), lives[0])
        for life in lives:
            life.signal(number)
        assert [life.end(60) for life in lives] == [0] * world, [life.output[-1000:] for life in lives]
    status = json.loads(status_text(run_dir))
    assert (status["status"], status["stopped_by"]) == ("interrupted", number.name) and "resume=auto" in status["continue"]
    assert "all stages are trained, but not evaluated" in lives[0].output and not (run_dir / "lock.json").exists()
    assert (run_dir / "lora.safetensors").exists() and not (run_dir / "report.json").exists()
    train(teacher, run_dir, *SETTINGS, "eval.prompts=4", "resume=auto")
    assert json.loads(status_text(run_dir))["status"] == "finished" and (run_dir / "report.json").exists()


@pytest.mark.slow
def test_when_its_time_is_over_two_processes_stop_at_one_step_and_save(teacher: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with running(teacher, run_dir, *SETTINGS, "engine.max_seconds=0.001", world=2) as lives:
        assert [life.end() for life in lives] == [0, 0], [life.output[-1000:] for life in lives]
    status, saved = json.loads(status_text(run_dir)), latest_checkpoint(run_dir / "tscd_8" / "checkpoints")
    assert (status["status"], status["stopped_by"]) == ("interrupted", "engine.max_seconds=0.001") and "resume=auto" in status["continue"]
    assert saved is not None and saved.step == 1


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_when_another_has_ended_ends_like_it(teacher: Path, tmp_path: Path) -> None:
    """It waits for the other's share of the images, and learns of its end before it gets a signal of its own."""
    run_dir = tmp_path / "run"
    with running(teacher, run_dir, *SETTINGS, "eval.prompts=16", world=2) as (first, second):
        wait_until(lambda: '"evaluating"' in status_text(run_dir), first)
        first.signal(signal.SIGSTOP)
        wait_until(lambda: rests(second), second)
        first.signal(signal.SIGTERM)
        first.signal(signal.SIGCONT)
        assert first.end(60) == 0, first.output[-1000:]
        time.sleep(1)
        second.signal(signal.SIGTERM)
        assert second.end(60) == 0, second.output[-1000:]
    assert json.loads(status_text(run_dir))["status"] == "interrupted"


def rests(life: Life) -> bool:
    """Whether it computes nothing for half a second."""
    process = psutil.Process(life.pid)
    before = process.cpu_times()
    time.sleep(0.5)
    return process.cpu_times()[:2] == before[:2]


def status_text(run_dir: Path) -> str:
    file = run_dir / "run.json"
    return file.read_text() if file.exists() else ""
