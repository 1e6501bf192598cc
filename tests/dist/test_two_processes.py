"""Two real processes on gloo."""

import json
from pathlib import Path

import pytest

from hyper_sd.checkpoint import load_checkpoint
from tests.runs import ROOT, adapters, assert_same, finish, start, train
from tests.tiny import tiny_sd15

LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2proc.yaml"))


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path: Path) -> None:
    teacher, settings = tiny_sd15(tmp_path / "teacher"), ("eval.prompts=5", "stages.score.adversarial={weight: 0.1, real: data}")
    one = train(teacher, tmp_path / "one", *settings)
    finish(start(teacher, tmp_path / "two", *settings, launcher=LAUNCH))
    assert_same(adapters(one), adapters(tmp_path / "two"), tolerance=5e-3)
    heads = [load_checkpoint(run / "score" / "checkpoints" / "step_00000004").adapters["heads"] for run in (one, tmp_path / "two")]
    assert_same(*heads, tolerance=5e-3)
    alone, shared = (json.loads((run / "report.json").read_text()) for run in (one, tmp_path / "two"))
    assert alone["evaluation"]["processes"] == 1 and shared["evaluation"]["processes"] == 2
    for steps in ("1", "2", "4"):  # the teacher's rows depend on no training; five prompts do not divide by two
        distances = [report["teacher"][steps]["mse_to_teacher"] for report in (alone, shared)]
        assert distances[0] > 0 and distances[1] == pytest.approx(distances[0], rel=1e-3)
    engine = json.loads((tmp_path / "two" / "run.json").read_text())["engine"]
    assert engine["world_size"] == 2 and engine["backend"] == "gloo"
