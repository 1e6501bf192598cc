"""The commands of the README: prepare with several processes, killed and continued, then train on the cache."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_sd.lock import LOCK
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


@pytest.mark.slow
def test_a_second_command_on_the_same_directory_is_refused_and_one_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    teacher, photos, out = tiny_sd15(tmp_path / "teacher"), numbered(tmp_path / "photos", 40), tmp_path / "cache"
    first = start(teacher, photos, out)
    wait_for(lambda: len(list(out.glob("*.tar"))) >= 1, first)
    first.send_signal(signal.SIGSTOP)  # it is alive, and not done before the second has looked
    options = ("data=folder", f"data.path={photos}", "shard_size=4", "encode_batch=2")
    with pytest.raises(ValueError, match=rf"out={out} is in use by process {first.pid} on .*; wait for it, end it, or set another out"):
        made(teacher, out, Processes(cpu_threads=1), *options)
    assert json.loads((out / LOCK).read_text())["pid"] == first.pid
    first.kill()
    first.wait()
    left = out / ".00000-00009.tar.1.partial"
    left.write_bytes(b"half a shard")
    assert made(teacher, out, Processes(cpu_threads=1), *options).num_samples == 40
    assert not left.exists() and not (out / LOCK).exists()


def test_a_directory_with_nothing_but_a_lock_of_a_killed_command_is_empty(tmp_path: Path) -> None:
    teacher, photos, out = tiny_sd15(tmp_path / "teacher"), numbered(tmp_path / "photos", 2), tmp_path / "cache"
    out.mkdir()
    (out / LOCK).write_text("")  # killed before it had written anything
    with pytest.raises(ValueError, match=r"out=.*cache is in use by"):
        made(teacher, out, Processes(cpu_threads=1), "data=folder", f"data.path={photos}", "sheet=0")
    os.utime(out / LOCK, (0, 0))
    assert made(teacher, out, Processes(cpu_threads=1), "data=folder", f"data.path={photos}", "sheet=0").num_samples == 2
