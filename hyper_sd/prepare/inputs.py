"""What can be prepared: a folder, a Hugging Face data set, tar shards, prompts.

An input is a list of units that processes share out. A unit gives its entries in one order, always, and from any entry on, so that
preparing can be interrupted anywhere and gives the same files with any number of processes.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from hyper_sd.config import DataConfig
from hyper_sd.data import captions, storage, tar
from hyper_sd.data.base import BadSample, BadSampleError
from hyper_sd.data.folder import entries
from hyper_sd.data.images import decode
from hyper_sd.data.prompts import read_prompts
from hyper_sd.data.webdataset import read_captions, read_image_bytes


@dataclass(frozen=True)
class Item:
    """An entry with its captions; `image` decodes it, None where the teacher is to draw it. Raises BadSampleError."""

    name: str
    captions: tuple[str, ...]
    image: Callable[[], Image.Image] | None


Entry = Item | BadSample


@dataclass(frozen=True)
class Unit:
    """`entries(start)` are those from number `start` on; num_entries where it is known."""

    entries: Callable[[int], Iterator[Entry]]
    num_entries: int | None = None


def units(cfg: DataConfig, shard_size: int) -> list[Unit]:
    """The units of the data that `cfg` describes. Raises ValueError, naming the key, for what cannot be prepared."""
    if not cfg.path and cfg.kind in ("folder", "hf", "webdataset", "prompts"):
        raise ValueError(f"data.path must be set for data={cfg.kind}")
    path = str(cfg.path)
    match cfg.kind:
        case "folder":
            return _ranges([_folder_item(entry, cfg) for entry in entries(path, cfg.caption_column)], shard_size)
        case "prompts":
            prompts = enumerate(read_prompts(path, cfg.caption_column))
            found: list[Entry] = [p if isinstance(p, BadSample) else Item(f"prompt {number} of {path}", p, None) for number, p in prompts]
            return _ranges(found, shard_size)
        case "webdataset":
            return [Unit(partial(_tar_items, shard, cfg)) for shard in tar.shards(path)]
        case "hf":
            return _hf_units(cfg, shard_size)
        case _:
            raise ValueError(f"data={cfg.kind} cannot be prepared; choose data=folder, hf, webdataset or prompts")


def _ranges(found: Sequence[Entry], size: int) -> list[Unit]:
    if not found:
        raise ValueError("data.path holds nothing to prepare")
    parts = [found[start : start + size] for start in range(0, len(found), size)]
    return [Unit(lambda start, part=part: iter(part[start:]), len(part)) for part in parts]


def _folder_item(entry: Any, cfg: DataConfig) -> Entry:
    if isinstance(entry, BadSample):
        return entry
    return Item(str(entry.file), entry.captions, partial(decode, entry.file, str(entry.file), cfg.min_side))


def _tar_items(shard: str, cfg: DataConfig, start: int) -> Iterator[Entry]:
    with storage.local_copy(shard) as copy:
        samples, bad = tar.samples(shard, copy)
        for number, sample in enumerate([*samples, *bad]):
            if number >= start:
                yield sample if isinstance(sample, BadSample) else _tar_item(sample, cfg, copy)


def _tar_item(sample: tar.TarSample, cfg: DataConfig, copy: str) -> Entry:
    try:
        texts = read_captions(sample, cfg.caption_column, copy)
        data = read_image_bytes(sample, copy)
    except BadSampleError as error:
        return error.sample
    return Item(str(sample), texts, lambda: decode(io.BytesIO(data), str(sample), cfg.min_side))


def _hf_units(cfg: DataConfig, shard_size: int) -> list[Unit]:
    """One unit a data file, or shard_size rows where all were downloaded; images stay bytes, decoded with the same care as others."""
    dataset = _load_hf(cfg)
    columns = dataset.column_names
    for key, column in (("data.image_column", cfg.image_column), ("data.caption_column", cfg.caption_column)):
        if columns is not None and column not in columns:
            raise ValueError(f"{key}={column}: the data set has the columns {', '.join(columns)}")
    if cfg.streaming:
        num = dataset.num_shards
        return [Unit(partial(_hf_items, dataset.decode(False).shard(num, index), f"file {index}", cfg)) for index in range(num)]
    num = -(-len(dataset) // shard_size)
    parts = [dataset.shard(num, index) for index in range(num)]
    return [Unit(partial(_hf_items, part.to_iterable_dataset().decode(False), f"part {n}", cfg), len(part)) for n, part in enumerate(parts)]


def _load_hf(cfg: DataConfig) -> Any:
    import datasets

    folder = Path(str(cfg.path))
    options: dict[str, Any] = {"split": cfg.split, "streaming": cfg.streaming}
    try:
        if (folder / "state.json").is_file():  # save_to_disk
            return datasets.load_dataset("arrow", data_files=sorted(map(str, folder.glob("*.arrow"))), **options)
        return datasets.load_dataset(str(cfg.path), name=cfg.subset, revision=cfg.revision, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"data.path={cfg.path}, data.split={cfg.split}: the data set cannot be opened: {error}") from error


def _hf_items(dataset: Any, part: str, cfg: DataConfig, start: int) -> Iterator[Entry]:
    for number, row in enumerate(_hf_rows(dataset, part, cfg, start), start=start):
        name = f"row {number} of {part} of {cfg.path}"
        try:
            texts = captions.from_value(row[cfg.caption_column], name)
            yield Item(name, texts, _hf_image(row[cfg.image_column], name, cfg))
        except BadSampleError as error:
            yield error.sample


def _hf_rows(dataset: Any, part: str, cfg: DataConfig, start: int) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset.skip(start) if start else dataset
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"data.path={cfg.path}: {part} cannot be read: {error}; the same command goes on") from error


def _hf_image(value: Any, name: str, cfg: DataConfig) -> Callable[[], Image.Image]:
    """Files are opened for a data set of this machine only: what comes from elsewhere has no business with local paths."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and isinstance(path, str) and Path(str(cfg.path)).is_dir() and not storage.is_remote(path):
        return partial(decode, Path(path), name, cfg.min_side)
    if not isinstance(data, bytes):
        raise BadSampleError(name, "no image", "the column holds no bytes of an image file")
    return lambda: decode(io.BytesIO(data), name, cfg.min_side)
