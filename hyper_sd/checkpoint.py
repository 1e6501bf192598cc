"""Checkpoints that are complete or not there: temporary name, fsync, manifest with checksums, rename. Safetensors and json only."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hyper_sd.files import fsync

MANIFEST = "manifest.json"
_ADAPTERS, _OPTIMIZER, _STATE = "adapters.safetensors", "optimizer.safetensors", "state.json"
_NAMES = (_ADAPTERS, _OPTIMIZER, _STATE)
_PARTIAL = ".tmp"


@dataclass(frozen=True)
class Checkpoint:
    """Every state that matters after `step` steps of a stage. Random draws and the data position follow from the step.

    By role: `updates` that were made or skipped, those `skipped`, and the skipped ones `in_a_row` at the end. `history` is what the
    stage's guard has seen, `bad_samples` how many the stage has met.
    """

    step: int
    adapters: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    updates: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)
    in_a_row: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    bad_samples: int = 0


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that cannot be written; the message names the file."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int, keep_every: int | None = None) -> Path:
    """Write `<folder>/step_<step>`; older ones are removed only after the new one is complete.

    The newest `keep_last` stay, and those whose step is a multiple of `keep_every`; those above `step`, which a resumed run has passed
    over, go. Raises CheckpointError if the file system refuses;
    the checkpoints before are then as they were.
    """
    final = folder / f"step_{checkpoint.step:08d}"
    partial = final.with_suffix(_PARTIAL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        partial.mkdir()
        _write(partial, checkpoint)
        _remove(final)  # a damaged one that was passed over
        os.replace(partial, final)
        fsync(folder)
        _prune(folder, checkpoint.step, keep_last, keep_every)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final} cannot be saved: {error}; the checkpoints before it are untouched") from error
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are named on the way and passed over."""
    for path in _complete(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            print(f"passing over a damaged checkpoint: {error}", flush=True)
    return None


def saved_adapters(folder: Path) -> set[str] | None:
    """The adapters of the newest checkpoint whose file of them can be opened; None if there is none. Reads no tensor."""
    for path in _complete(folder):
        try:
            with safe_open(path / _ADAPTERS, framework="pt") as file:
                names = file.keys()
            return {name.partition("/")[0] for name in names}
        except (SafetensorError, OSError):
            continue
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises CheckpointError, naming the file, if any file differs from the manifest or is of another format."""
    try:
        checksums = {name: str(entry["sha256"]) for name, entry in json.loads((path / MANIFEST).read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {error!r}") from error
    for name in _NAMES:
        if not (path / name).is_file() or name not in checksums or _sha256(path / name) != checksums[name]:
            raise CheckpointError(f"{path / name} is missing or does not match its checksum")
    flat, optimizer = _read_tensors(path / _ADAPTERS), _read_tensors(path / _OPTIMIZER)
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        adapter, _, name = key.partition("/")
        adapters.setdefault(adapter, {})[name] = value
    try:
        state = json.loads((path / _STATE).read_text())
        counts = [{str(role): int(count) for role, count in state.get(key, {}).items()} for key in ("updates", "skipped", "in_a_row")]
        history = [{str(name): float(value) for name, value in row.items()} for row in state.get("history", [])]
        return Checkpoint(int(state["step"]), adapters, optimizer, *counts, history=history, bad_samples=int(state.get("bad_samples", 0)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / _STATE} is not the state of a checkpoint: {error!r}") from error


def _write(partial: Path, checkpoint: Checkpoint) -> None:
    flat = {f"{adapter}/{name}": value for adapter, tensors in checkpoint.adapters.items() for name, value in tensors.items()}
    counts = {"updates": checkpoint.updates, "skipped": checkpoint.skipped, "in_a_row": checkpoint.in_a_row}
    state = json.dumps({"step": checkpoint.step, **counts, "history": checkpoint.history, "bad_samples": checkpoint.bad_samples})
    contents = (_safetensors(flat), _safetensors(checkpoint.optimizer), [state.encode()])
    manifest = {name: _write_file(partial / name, pieces) for name, pieces in zip(_NAMES, contents, strict=True)}
    _write_file(partial / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    fsync(partial)


def _write_file(file: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Its size and SHA-256, taken on the way to the disk: nothing is read again, and what memory held is what is vouched for."""
    digest = hashlib.sha256()
    with file.open("xb") as out:
        for piece in pieces:
            out.write(piece)
            digest.update(piece)
        out.flush()
        os.fsync(out.fileno())
        return {"bytes": out.tell(), "sha256": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of float32 tensors, piece by piece; the library's `save_file` writes it whole, and tells nobody its bytes."""
    header, end = {}, 0
    for name, value in tensors.items():
        assert value.dtype == torch.float32, name
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    yield len(text).to_bytes(8, "little")
    yield text
    for value in tensors.values():
        yield value.reshape(-1).numpy().data


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error


def _complete(folder: Path) -> list[Path]:
    """Checkpoints from the newest to the oldest, half-written ones left out."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), reverse=True)


def _prune(folder: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Called once `step` is saved. What is above it is damaged: the run has passed over it and gone back."""
    steps = {int(path.name.removeprefix("step_")): path for path in _complete(folder)}
    for above in (path for number, path in steps.items() if number > step):
        _remove(above)
    for old, path in [row for row in steps.items() if row[0] <= step][keep_last:]:
        if keep_every is None or old % keep_every:
            _remove(path)


def _remove(path: Path) -> None:
    """By way of the temporary name: a removal that is cut short leaves nothing that looks complete."""
    if path.exists():
        doomed = path.with_suffix(_PARTIAL + ".old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def _remove_partial(folder: Path) -> None:
    for left in folder.glob(f"step_*{_PARTIAL}*"):
        shutil.rmtree(left)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
