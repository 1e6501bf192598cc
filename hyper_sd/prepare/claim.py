"""Whose cache a directory holds, and which command writes to it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyper_sd.commands import PrepareConfig
from hyper_sd.data import storage
from hyper_sd.files import remove_partial, write_json
from hyper_sd.lock import LOCK, Lock
from hyper_sd.prepare.inputs import Unit
from hyper_sd.prepare.shards import writing
from hyper_sd.processes import Processes

SETTINGS = "prepare.json"


@contextmanager
def claimed(out: Path, settings: dict[str, Any], processes: Processes) -> Iterator[None]:
    """The directory for the processes of this command alone, as long as the context lasts.

    Raises ValueError, before anything is written, if another command writes to it or it holds anything but a beginning of this cache.
    """
    lock = Lock(out, key="out")
    lock.refuse()
    _require_same(out, settings)
    processes.barrier()  # all have looked before one writes
    try:
        if processes.is_main:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
                lock.take()
                write_json(out / SETTINGS, settings)
                remove_partial(out)
        processes.barrier()  # it is taken before the others write
        yield
    finally:
        lock.release()


def identity(cfg: PrepareConfig, parts: list[Unit]) -> dict[str, Any]:
    """What decides the content of the cache; to go on with other values, or with files added, would mix two caches."""
    values = asdict(cfg)
    names = ("kind", "path", "caption_column", "image_column", "min_side", "split", "subset", "revision", "streaming")
    data = {name: values["data"][name] for name in names}
    if cfg.data.kind == "prompts":
        data["teacher_steps"] = cfg.data.teacher_steps
    kept = ("buckets", "filters", "scorer", "embeddings", "dtype", "shard_size", "seed", "teacher")
    found = {"units": len(parts), "known_entries": sum(part.num_entries or 0 for part in parts)}
    data |= {"path": storage.shown(str(cfg.data.path))}
    return {"data": data, "found": found, **{name: values[name] for name in kept}}


def _require_same(out: Path, settings: dict[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a directory")
    earlier = out / SETTINGS
    if not earlier.is_file():
        if out.is_dir() and any(LOCK not in path.name for path in out.iterdir()):
            raise ValueError(f"out={out} is not empty and holds no {SETTINGS} of an earlier start; give another directory")
        return
    begun = json.loads(earlier.read_text())
    wanted = json.loads(json.dumps(settings))
    if different := [name for name in sorted({*begun, *wanted}) if begun.get(name) != wanted.get(name)]:
        name = different[0]
        raise ValueError(
            f"out={out} was begun with {name}={begun.get(name)}, now {name}={wanted.get(name)}; give another directory, or delete this one"
        )
