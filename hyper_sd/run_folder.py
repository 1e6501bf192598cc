"""The directory of a run: who owns it, how it stands (run.json), its configuration and its metrics."""

import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from hyper_sd.config import RunConfig
from hyper_sd.files import remove_partial, replace_file, write_json
from hyper_sd.lock import LOCK, Lock
from hyper_sd.resume import CONFIG, accepted_changes, config_to_yaml

_STATUS_EVERY_S = 5.0
_UNTRAINED = (LOCK, "config.yaml", "run.json")  # all that a run which failed before its first step has written
_DEVICES = "CUDA_VISIBLE_DEVICES"


class RunFolder:
    """Only the main process writes, but for the error that ends a run.

    Raises ValueError, before anything is written, for a directory that may not be used. `base` is the teacher's fingerprint. Once
    the run has begun, a file that only informs and cannot be written is reported and left out.
    """

    def __init__(self, config: RunConfig, base: Mapping[str, str]):
        self.path = Path(config.run.dir)
        self._lock = Lock(self.path)
        self._refuse(config)
        earlier = self._read_status()
        self._changed: list[str] = list(earlier.get("changed", []))
        if config.resume == "auto":
            self._changed += accepted_changes(self.path, config, base, earlier.get("base", {}))
        self._base = dict(base)
        self._started = self._written = time.monotonic()
        self._wall_s = float(earlier.get("wall_s", 0.0))
        self._peak_rss = int(earlier.get("peak_rss_bytes", 0))
        self.resumed_from: list[int] = list(earlier.get("resumed_from", []))
        self.metrics = self.path / "metrics.jsonl"
        self._reported: set[str] = set()

    def create(self, config: RunConfig) -> None:
        """Take the directory for this process; `release` gives it back."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            remove_partial(self.path)
            replace_file(self.path / CONFIG, config_to_yaml(config).encode())
        except OSError as error:
            self.release()
            raise ValueError(f"run.dir={self.path} cannot be written: {error}; set another run.dir") from error
        self.write_status("running")

    def release(self) -> None:
        self._lock.release()

    @property
    def wall_s(self) -> float:
        """Seconds of work on this run, over all its processes' lives."""
        return self._wall_s + time.monotonic() - self._started

    @property
    def peak_rss_bytes(self) -> int:
        """The largest resident memory of the main process so far."""
        unit = 1 if sys.platform == "darwin" else 1024
        return max(self._peak_rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def write_status(self, status: str, **facts: Any) -> None:
        """run.json: how the run stands, and what to type to go on."""
        content = {
            "status": status,
            **facts,
            "continue": None if status == "finished" else continue_command(),
            "directory": os.getcwd(),
            "resumed_from": self.resumed_from,
            "changed": self._changed,
            "base": self._base,
            "wall_s": round(self.wall_s, 1),
            "peak_rss_bytes": self.peak_rss_bytes,
        }
        with self.informing("run.json"):
            write_json(self.path / "run.json", content)
        self._written = time.monotonic()

    def note_failure(self, message: str, **facts: Any) -> None:
        """What ended the run, from any process. The first to be noted stays: what the others then meet follows from it."""
        noted = self._read_status()
        if noted and noted["status"] != "failed":
            rest = {name: value for name, value in noted.items() if name != "status"}
            with self.informing("run.json"):
                write_json(self.path / "run.json", {"status": "failed", "error": message, **rest, **facts})

    def keep_status(self, **facts: Any) -> None:
        """Refresh a running status, at most every few seconds."""
        if time.monotonic() - self._written > _STATUS_EVERY_S:
            self.write_status("running", **facts)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """A row that does not fit on the disk any more leaves no half of it."""
        with self.informing("metrics.jsonl"), self.metrics.open("ab", buffering=0) as file:
            line, end = (json.dumps(row) + "\n").encode(), file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError("the disk is full")
            except OSError:
                file.truncate(end)
                raise

    def rewind_metrics(self, step: int) -> None:
        """Drop rows after the run's step `step`, which will be written again."""
        with self.informing("metrics.jsonl"):
            lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                replace_file(self.metrics, "".join(f"{line}\n" for line in kept).encode())

    @contextmanager
    def informing(self, what: str) -> Iterator[None]:
        """For writing what people read: no reason to end a training, but one to say so, once."""
        try:
            yield
        except OSError as error:
            if what not in self._reported:
                print(f"{self.path}: {what} cannot be written: {error}; training goes on without it", file=sys.stderr, flush=True)
            self._reported.add(what)

    def _refuse(self, config: RunConfig) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run.dir={self.path} is a file; give a directory")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"run.dir={self.path} cannot be written: no permission in {parent}; set another run.dir")
        self._lock.refuse()
        if config.resume == "never" and self.path.exists() and any(path.name not in _UNTRAINED for path in self.path.iterdir()):
            raise ValueError(f"run.dir={self.path} is not empty and resume=never; set resume=auto to go on with it, or another run.dir")

    def _read_status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return {}


def continue_command() -> str:
    """The command line that started this process, launcher and all, as it must be typed to go on."""
    script, *arguments = sys.argv
    overrides = [argument for argument in arguments if not argument.startswith("resume=")]
    devices = os.environ.get(_DEVICES)  # which a Makefile or a user may have set before the command
    before = [] if devices is None else ["env", f"{_DEVICES}={devices}"]
    return shlex.join([*before, *_words_before(script), script, *overrides, "resume=auto"])


def _words_before(script: str) -> list[str]:
    """The interpreter, or the launcher with its options: what stands before the script in the command of the parent, or of this process."""
    own = psutil.Process()
    for process in (own.parent(), own):
        try:
            words = process.cmdline() if process is not None else []
        except psutil.Error:
            continue
        if script in words[1:]:
            return words[: words.index(script, 1)]
    return [sys.executable]


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["run_step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # half a line: the process was killed while it wrote
