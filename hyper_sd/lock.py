"""Who is writing to a directory, of a run or a cache: one process at a time, over all hosts that share the disk."""

import json
import os
import socket
import sys
import tempfile
import threading
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

LOCK = "lock.json"
BEAT_S = 10.0  # the owner touches the file so often
STALE_S = 60.0  # an owner on another host that has not for so long is gone
_CLOCK_SHIFT_S = 60.0  # a process's start time is computed from the clock, which may be set meanwhile
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Lock:
    """`<folder>/lock.json`, made by the one process that may write there; `key` is what names the folder.

    It is stale where its owner is gone: on the same machine if no process has the owner's id and start time; elsewhere, where
    process ids say nothing, if the file was not touched for STALE_S seconds by the clock of the file system itself.
    """

    def __init__(self, folder: Path, key: str = "run.dir"):
        self._file = folder / LOCK
        self._key = key
        self._released = threading.Event()
        self._mine = ""

    def refuse(self) -> None:
        """Raise ValueError if another process that is alive holds the lock. Changes nothing."""
        text = self._read()
        if text is not None and (why := self._alive(text)) is not None:
            raise ValueError(
                f"{self._key}={self._file.parent} is in use by {_describe(text)}: {why}; wait for it, end it, or set another {self._key}"
            )

    def take(self) -> None:
        """Raises ValueError as `refuse` does, also if another process takes it at this very moment."""
        self.refuse()
        self._mine = json.dumps(_own())
        while not self._create():
            self.refuse()
            self._discard_stale()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if self._mine and self._read() == self._mine:
            self._file.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Only if there is none; the file system decides who is first."""
        try:
            with self._file.open("x") as file:
                file.write(self._mine)
        except FileExistsError:
            return False
        return True

    def _discard_stale(self) -> None:
        """Move a stale lock away; what another process put there meanwhile is put back."""
        text, aside = self._read(), self._file.with_name(f".{LOCK}.{uuid.uuid4().hex}")
        if text is None or self._alive(text) is not None:
            return
        try:
            os.rename(self._file, aside)
        except FileNotFoundError:
            return
        if aside.read_text() == text:
            aside.unlink()
        else:
            os.rename(aside, self._file)

    def _alive(self, text: str) -> str | None:
        """Why the owner counts as alive; None if the lock is stale."""
        owner = _parse(text)
        if owner.get("machine") == _machine():
            began, noted = _started(owner.get("pid")), owner.get("process_started")
            same = began is not None and isinstance(noted, float) and abs(began - noted) < _CLOCK_SHIFT_S
            return "that process is running" if same else None
        silent = self._silent_s()
        if silent > STALE_S:
            return None
        return f"it is on another machine and was heard of {silent:.0f} s ago; after {STALE_S:.0f} s of silence it counts as gone"

    def _silent_s(self) -> float:
        """Seconds since the owner touched the file; both times are the file system's, so the clocks of hosts may differ."""
        with tempfile.NamedTemporaryFile(dir=self._file.parent, prefix=f".{LOCK}.") as now:
            try:
                return os.stat(now.name).st_mtime - self._file.stat().st_mtime
            except FileNotFoundError:
                return float("inf")

    def _read(self) -> str | None:
        try:
            return self._file.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                owner = self._read()
                if owner is not None and owner != self._mine and not self._released.is_set():
                    print(f"error: {self._key}={self._file.parent} was taken over by {_describe(owner)}", file=sys.stderr, flush=True)
                    os._exit(1)  # this process was silent for so long that it counted as gone; a save would mix two runs
                os.utime(self._file)
            except OSError:
                continue  # a disk that is away for a while; there is nobody to tell


def _own() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:500],
        "machine": _machine(),
        "process_started": _started(os.getpid()),
    }


def _machine() -> str:
    """Where process ids mean the same: this start of this host, and in a container its own ids."""
    try:
        return f"{socket.gethostname()} {_BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: object) -> float | None:
    """When the process began; None if there is none, or it has ended and waits to be collected."""
    try:
        process = psutil.Process(pid if isinstance(pid, int) else -1)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError):
        return None


def _parse(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _describe(text: str) -> str:
    owner = _parse(text)
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
