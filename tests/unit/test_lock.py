"""One process at a time in a run's directory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hyper_sd.lock import LOCK, STALE_S, Lock

HOLD = "import sys, time; from pathlib import Path; from hyper_sd.lock import Lock; Lock(Path(sys.argv[1])).take(); print(); time.sleep(60)"


@contextmanager
def held(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The lock in another process."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def change(folder: Path, **values: Any) -> None:
    file = folder / LOCK
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_second_is_refused_with_the_owner_and_since_when(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        owner = json.loads((tmp_path / LOCK).read_text())
        for attempt in (Lock(tmp_path).refuse, Lock(tmp_path).take):
            with pytest.raises(ValueError, match=rf"run\.dir=.* in use by process {process.pid} on {owner['host']} since 20\d\d-.*T"):
                attempt()
        assert json.loads((tmp_path / LOCK).read_text()) == owner
    Lock(tmp_path).take()  # it was killed


def test_released_it_is_free(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_id_does_not_hold_it(tmp_path: Path) -> None:
    with held(tmp_path):
        started = json.loads((tmp_path / LOCK).read_text())["process_started"]
        change(tmp_path, process_started=started - 3600)
        Lock(tmp_path).take()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_an_owner_on_another_host_is_alive_as_long_as_it_is_heard_of(tmp_path: Path) -> None:
    with held(tmp_path):
        change(tmp_path, machine="elsewhere", host="node7")
        with pytest.raises(ValueError, match=r"on node7 since .*: it is on another machine and was heard of 0 s ago"):
            Lock(tmp_path).take()
        silent = time.time() - STALE_S - 1
        os.utime(tmp_path / LOCK, (silent, silent))
        Lock(tmp_path).take()


def test_what_is_no_lock_counts_until_it_is_old(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("")  # killed, or the disk was full, between making and filling it
    with pytest.raises(ValueError, match=r"run\.dir"):
        Lock(tmp_path).take()
    os.utime(tmp_path / LOCK, (0, 0))
    Lock(tmp_path).take()


def test_the_owner_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyper_sd.lock.BEAT_S", 0.01)
    lock = Lock(tmp_path)
    lock.take()
    os.utime(tmp_path / LOCK, (0, 0))
    until = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    lock.release()


def test_an_owner_that_was_given_up_ends(tmp_path: Path) -> None:
    """It slept for longer than STALE_S, another took the lock, and it wakes."""
    hurried = f"import hyper_sd.lock; hyper_sd.lock.BEAT_S = 0.05; {HOLD}"
    process = subprocess.Popen([sys.executable, "-c", hurried, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    (tmp_path / LOCK).unlink()
    Lock(tmp_path).take()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "was taken over by" in error
