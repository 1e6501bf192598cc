"""A signal while a run is evaluated."""

import json
import signal
from pathlib import Path

import pytest

from tests.lives import running, wait_until
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


def status_text(run_dir: Path) -> str:
    file = run_dir / "run.json"
    return file.read_text() if file.exists() else ""
