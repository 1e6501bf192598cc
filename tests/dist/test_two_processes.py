"""Two real processes on gloo."""

import json
from pathlib import Path

import pytest

from tests.runs import ROOT, adapters, assert_same, finish, start, train
from tests.tiny import tiny_sd15

LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2proc.yaml"))


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path: Path) -> None:
    teacher = tiny_sd15(tmp_path / "teacher")
    one = train(teacher, tmp_path / "one")
    finish(start(teacher, tmp_path / "two", launcher=LAUNCH))
    assert_same(adapters(one), adapters(tmp_path / "two"), tolerance=5e-3)
    engine = json.loads((tmp_path / "two" / "run.json").read_text())["engine"]
    assert engine["world_size"] == 2 and engine["backend"] == "gloo"
