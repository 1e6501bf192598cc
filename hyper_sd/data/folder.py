"""A directory of images with captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hyper_sd.data import captions
from hyper_sd.data.base import BadSample, BadSampleError, Rows, Samples, SourceDefaults, pick_caption
from hyper_sd.data.images import IMAGE_SUFFIXES, Placed, decode, place
from hyper_sd.data.order import EpochOrder
from hyper_sd.data.tables import TABLES, rows

METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class Entry:
    """An image file and its captions."""

    file: Path
    captions: tuple[str, ...]


class FolderSource(SourceDefaults):
    """Images (jpg, jpeg, png, webp) in a directory and below it, each with its caption, at one square size."""

    def __init__(self, path: str, seed: int, image_size: int, num_workers: int = 0, caption_column: str = "text", min_side: int = 0):
        found = list(entries(path, caption_column))
        self._entries = [entry for entry in found if isinstance(entry, Entry)]
        self.bad = [entry for entry in found if isinstance(entry, BadSample)]
        if not self._entries:
            raise ValueError(f"data.path={path}: no image has a caption (first: {self.bad[0]})")
        self.num_samples = len(self._entries)
        self._seed, self._image_size, self._min_side = seed, image_size, min_side
        self._rows = Rows(EpochOrder(self.num_samples, seed), num_workers)

    def batch(self, positions: Sequence[int]) -> Samples:
        read, bad = self._rows.read(self._read, positions)
        sizes = torch.tensor([image.sizes for _, _, image in read], dtype=torch.float32)
        texts, names = [text for _, text, _ in read], tuple(name for name, _, _ in read)
        return Samples(texts, torch.stack([image.tensor() for _, _, image in read]), sizes=sizes, bad=bad, names=names)

    def _read(self, index: int, position: int) -> tuple[str, str, Placed]:
        entry = self._entries[index]
        placed = place(decode(entry.file, str(entry.file), self._min_side), self._image_size, self._image_size)
        return str(entry.file), entry.captions[pick_caption(entry.captions, self._seed, position)], placed


def entries(path: str, caption_column: str = "text") -> Iterator[Entry | BadSample]:
    """The images of a directory with their captions, or what is wrong with them.

    Captions are in metadata.jsonl, .csv or .parquet at the top (columns `file_name` and `caption_column`), or, where there is none,
    beside every image in a .txt or .json file of the same name. Raises ValueError, naming data.path, for a directory that is
    missing or holds no image.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"data.path={path} is not a directory")
    tables = [file for suffix in TABLES if (file := root / f"{METADATA}{suffix}").is_file()]
    if tables:
        return _listed(root, tables[0], caption_column)
    files = sorted(f for f in root.rglob("*") if f.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"data.path={path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return (_beside(file, caption_column) for file in files)


def _beside(file: Path, column: str) -> Entry | BadSample:
    text, table = file.with_suffix(".txt"), file.with_suffix(".json")
    try:
        if text.is_file():
            return Entry(file, captions.from_text(text.read_bytes(), str(file)))
        if table.is_file():
            return Entry(file, captions.from_json(table.read_bytes(), str(file), column))
        return BadSample(str(file), captions.NO_CAPTION, "put a .txt or .json of the same name beside it, or write metadata.jsonl")
    except BadSampleError as error:
        return error.sample


def _listed(root: Path, table: Path, column: str) -> Iterator[Entry | BadSample]:
    for number, row in enumerate(rows(table, column, "file_name"), start=1):
        if isinstance(row, BadSample):
            yield row
            continue
        name, where = row.get("file_name"), f"{table} row {number}"
        file = root / name if isinstance(name, str) else root
        if not file.resolve().is_relative_to(root.resolve()) or not file.is_file():
            yield BadSample(where, "no such file", f"file_name {name!r} in this directory")
            continue
        try:
            yield Entry(file, captions.from_value(row.get(column), where))
        except BadSampleError as error:
            yield error.sample
