"""The directory of a run: who owns it, how it stands (run.json), its configuration and its metrics."""

import json
import os
import resource
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hyper_sd.config import RunConfig
from hyper_sd.files import write_json

_STATUS_EVERY_S = 5.0


class RunFolder:
    """Only the main process writes. Raises ValueError, before anything is written, for a directory that may not be used."""

    def __init__(self, config: RunConfig):
        self.path = Path(config.run.dir)
        self._refuse(config)
        earlier = self._read_status()
        self._started = self._written = time.monotonic()
        self._wall_s = float(earlier.get("wall_s", 0.0))
        self._peak_rss = int(earlier.get("peak_rss_bytes", 0))
        self.resumed_from: list[int] = list(earlier.get("resumed_from", []))
        self.metrics = self.path / "metrics.jsonl"

    def create(self, config: RunConfig) -> None:
        text = yaml.safe_dump(_plain(asdict(config)), sort_keys=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(text)
        except OSError as error:
            raise ValueError(f"run.dir={self.path} cannot be written: {error}; set another run.dir") from error
        self.write_status("running")

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
            "continue": None if status == "finished" else _continue_command(),
            "resumed_from": self.resumed_from,
            "wall_s": round(self.wall_s, 1),
            "peak_rss_bytes": self.peak_rss_bytes,
        }
        write_json(self.path / "run.json", content)
        self._written = time.monotonic()

    def keep_status(self, **facts: Any) -> None:
        """Refresh a running status, at most every few seconds."""
        if time.monotonic() - self._written > _STATUS_EVERY_S:
            self.write_status("running", **facts)

    def append_metrics(self, row: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop rows after the run's step `step`, which will be written again."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
        partial = self.metrics.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, self.metrics)

    def _refuse(self, config: RunConfig) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run.dir={self.path} is a file; give a directory")
        if config.resume == "never" and self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"run.dir={self.path} is not empty and resume=never; set resume=auto to go on with it, or another run.dir")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"run.dir={self.path} cannot be written: no permission in {parent}; set another run.dir")

    def _read_status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return {}


def _continue_command() -> str:
    """The command line of this process, as it must be typed to go on."""
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("resume=")]
    words = [*sys.argv[:1], *overrides, "resume=auto"]
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else [Path(sys.executable).name]
    return shlex.join([*launcher, *words])


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["run_step"])
    except (ValueError, KeyError):
        return sys.maxsize  # half a line: the process was killed while it wrote


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
