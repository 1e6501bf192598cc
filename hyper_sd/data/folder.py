"""A directory of images with captions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hyper_sd.data.base import EpochOrder, Samples, threaded_map
from hyper_sd.data.images import IMAGE_SUFFIXES, read_image

METADATA = "metadata.jsonl"


class FolderSource:
    """Images (jpg, jpeg, png, webp) in a directory and below it, each with its caption.

    Captions are in `metadata.jsonl` at the top, one {"file_name": ..., "text": ...} a line, or, where there is no such file,
    beside every image in a .txt file of the same name. Raises ValueError, naming data.path, for a missing directory, an empty
    one, and images without a caption.
    """

    def __init__(self, path: str, seed: int, image_size: int, num_workers: int = 0):
        root = Path(path)
        if not root.is_dir():
            raise ValueError(f"data.path={path} is not a directory")
        metadata = root / METADATA
        self._files = list(_listed(root) if metadata.is_file() else _beside(root))
        if not self._files:
            raise ValueError(f"data.path={path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self.num_samples = len(self._files)
        self._image_size = image_size
        self._order = EpochOrder(self.num_samples, seed)
        self._map = threaded_map(num_workers)

    def batch(self, positions: Sequence[int]) -> Samples:
        files, captions = zip(*(self._files[self._order.index(position)] for position in positions), strict=True)
        return Samples(list(captions), images=torch.stack(list(self._map(self._read, files))))

    def _read(self, file: Path) -> Tensor:
        return read_image(file, str(file), self._image_size)


def _beside(root: Path) -> list[tuple[Path, str]]:
    """Images with the caption files beside them, sorted by path."""
    files = sorted(f for f in root.rglob("*") if f.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and f.is_file())
    missing = [str(f.relative_to(root)) for f in files if not f.with_suffix(".txt").is_file()]
    if missing:
        raise ValueError(
            f"data.path={root}: {len(missing)} of {len(files)} images have no caption (first: {missing[0]}); "
            f"put a .txt file of the same name beside each, or write {METADATA}"
        )
    return [(f, f.with_suffix(".txt").read_text(encoding="utf-8").strip()) for f in files]


def _listed(root: Path) -> Iterator[tuple[Path, str]]:
    """Images and captions in the order of metadata.jsonl."""
    for number, line in enumerate((root / METADATA).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"data.path={root}: {METADATA} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not isinstance(row.get("text"), str):
            raise ValueError(f'{where} must be {{"file_name": "...", "text": "..."}}: got {line[:200]}')
        file = root / row["file_name"]
        if not file.resolve().is_relative_to(root.resolve()) or not file.is_file():
            raise ValueError(f"{where}: there is no file {row['file_name']} in this directory")
        yield file, row["text"]
