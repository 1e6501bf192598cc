"""Files that are whole or not there: a temporary sibling, flushed to the disk, then renamed."""

import json
import os
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` under the name `path`; what was there before stays until the new file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write it at once: whole, each of them
    try:
        partial.write_bytes(content)
        fsync(partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(folder: Path) -> None:
    """What processes that were killed have left in a directory that now only this process writes to."""
    for file in folder.rglob(".*.partial"):
        file.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Raises ValueError for numbers that are not finite, which json cannot hold."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


_umask = os.umask(0)  # it can only be read by setting it, which is safe while there is one thread: now
os.umask(_umask)


def share(path: Path) -> None:
    """Give a file or a directory the permissions of any other: temporary ones, and those of safetensors, are for their owner alone."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask)


def fsync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
