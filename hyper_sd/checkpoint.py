"""Checkpoints that are complete or not there: temporary name, fsync, manifest with checksums, rename. Safetensors and json only."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from hyper_sd.files import fsync

MANIFEST = "manifest.json"
_ADAPTERS, _OPTIMIZER, _STATE = "adapters.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Every state that matters after `step` steps of a stage. Random draws and the data position follow from the step.

    `history` is what the stage's guard has seen.
    """

    step: int
    adapters: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    updates: dict[str, int]
    history: list[dict[str, float]] = field(default_factory=list)


class CheckpointError(ValueError):
    """A checkpoint that is damaged; the message names the file."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int) -> Path:
    """Write `<folder>/step_<step>`; older ones beyond `keep_last` are removed only after the new one is complete."""
    final = folder / f"step_{checkpoint.step:08d}"
    partial = final.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    flat = {f"{adapter}/{name}": value for adapter, tensors in checkpoint.adapters.items() for name, value in tensors.items()}
    save_file(flat, partial / _ADAPTERS)
    save_file(checkpoint.optimizer, partial / _OPTIMIZER)
    (partial / _STATE).write_text(json.dumps({"step": checkpoint.step, "updates": checkpoint.updates, "history": checkpoint.history}))
    manifest = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)} for name in (_ADAPTERS, _OPTIMIZER, _STATE)
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*partial.iterdir(), partial):
        fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    fsync(folder)
    for old in _complete(folder)[keep_last:]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are named on the way and passed over."""
    for path in _complete(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            print(f"passing over a damaged checkpoint: {error}", flush=True)
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises CheckpointError, naming the file, if any file differs from the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from error
    for name in (_ADAPTERS, _OPTIMIZER, _STATE):
        if not (path / name).is_file() or name not in manifest or _sha256(path / name) != manifest[name]["sha256"]:
            raise CheckpointError(f"{path / name} is missing or does not match its checksum")
    state = json.loads((path / _STATE).read_text())
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path / _ADAPTERS).items():
        adapter, _, name = key.partition("/")
        adapters.setdefault(adapter, {})[name] = value
    return Checkpoint(state["step"], adapters, load_file(path / _OPTIMIZER), state["updates"], state["history"])


def _complete(folder: Path) -> list[Path]:
    """Checkpoints from the newest to the oldest, half-written ones left out."""
    return sorted((path for path in folder.glob("step_*") if path.suffix != ".tmp"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
