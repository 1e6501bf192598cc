"""What may differ when a run goes on: where and how it runs, not what it trains."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hyper_sd.config import RunConfig

CONFIG = "config.yaml"
FREE = (
    *("name", "run", "resume", "engine", "eval", "tracker"),
    *("data.num_workers", "data.prefetch", "data.max_bad_fraction", "decode.slice"),
)
_GUARDED = ("eval.seed", "eval.judge", "eval.eta", "eval.start", "eval.student_guidance")  # what a guard samples, and how
_METHOD = ".method."  # how config.yaml groups what the command line calls stages.<name>.<key>


def config_to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def accepted_changes(folder: Path, config: RunConfig, base: Mapping[str, str], earlier_base: Mapping[str, str]) -> list[str]:
    """`<key>: <old> -> <new>` of every setting that differs from what the run began with and is named by `run.accept_changed`.

    `base` and `earlier_base` are fingerprints of the teacher. Raises ValueError, with both values, if other settings differ.
    """
    if not any(folder.glob("*/checkpoints/step_*")) and not any(folder.glob("*/lora.safetensors")):
        return []  # nothing was trained yet
    old = _settings(_read(folder / CONFIG), earlier_base or base)
    new = _settings(_plain(asdict(config)), base)
    held = _GUARDED if any(plan.guard is not None for plan in config.selected.values()) else ()
    keys = [
        key
        for key in dict.fromkeys((*old, *new))
        if old.get(key, "nothing") != new.get(key, "nothing") and (key in held or not _within(key, FREE))
    ]
    changed = {key: f"{key}: {old.get(key, 'nothing')} -> {new.get(key, 'nothing')}" for key in keys}
    if refused := [key for key in keys if not _within(key, config.run.accept_changed)]:
        raise ValueError(
            f"run.dir={folder} holds a run with other settings (old -> new): {'; '.join(changed[key] for key in refused)}. Give the old "
            f"ones, set another run.dir, or accept the new ones with 'run.accept_changed=[{','.join(refused)}]'"
        )
    return list(changed.values())


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file} says what the run began with and cannot be read: {error}; set another run.dir") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold the settings of a run; set another run.dir")
    return content


def _settings(config: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """Values by the key of the command line; the facts of the base model as teacher.base.<name>."""
    flat = dict(_flat(config, ()))
    return {key.replace(_METHOD, "."): value for key, value in flat.items()} | {f"teacher.base.{n}": v for n, v in base.items()}


def _flat(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, (*path, str(name)))
        else:
            yield ".".join((*path, str(name))), value


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
