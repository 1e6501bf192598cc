"""The commands of the README: prepare with several processes, killed and continued, then train on the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_sd.processes import Processes
from tests.dist.test_two_processes import LAUNCH
from tests.runs import ROOT, finish, wait_for
from tests.tiny import tiny_sd15
from tests.unit.test_prepare import files_of, made, numbered


def start(teacher: Path, photos: Path, out: Path, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    given = ["data=folder", f"data.path={photos}", f"out={out}", "teacher=sd15", f"teacher.path={teacher}"]
    given += ["shard_size=4", "encode_batch=2", "cpu_threads=1"]
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "prepare.py"), *given]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_killed_and_continued_by_two_processes_it_is_the_same_cache(tmp_path: Path) -> None:
    teacher, photos = tiny_sd15(tmp_path / "teacher"), numbered(tmp_path / "photos", 40)
    two, one = tmp_path / "two", tmp_path / "one"
    process = start(teacher, photos, two)
    wait_for(lambda: len(list(two.glob("*.tar"))) >= 2, process)
    process.kill()
    process.wait()
    assert not (two / "dataset.json").exists()
    printed = finish(start(teacher, photos, two, LAUNCH))
    assert "kept 40 of 40 (100.0%) in 10 shards" in printed and "train on it with: data=cache" in printed
    made(teacher, one, Processes(cpu_threads=1), "data=folder", f"data.path={photos}", "shard_size=4", "encode_batch=2", "sheet=0")
    assert files_of(two) == files_of(one)
