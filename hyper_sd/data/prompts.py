"""Prompts without images: the teacher draws x0 itself."""

from collections.abc import Sequence
from pathlib import Path

from hyper_sd.data import captions
from hyper_sd.data.base import BadSample, BadSampleError, Rows, Samples, SourceDefaults, pick_caption
from hyper_sd.data.order import EpochOrder
from hyper_sd.data.tables import TABLES, rows


class PromptsSource(SourceDefaults):
    """Prompts of a file, in an order of (seed, epoch)."""

    def __init__(self, path: str, seed: int, caption_column: str = "text"):
        found = read_prompts(path, caption_column)
        self._prompts = [prompt for prompt in found if not isinstance(prompt, BadSample)]
        self.bad = [prompt for prompt in found if isinstance(prompt, BadSample)]
        if not self._prompts:
            raise ValueError(f"data.path={path} holds no prompt" + (f" (first: {self.bad[0]})" if self.bad else ""))
        self.num_samples = len(self._prompts)
        self._seed = seed
        self._rows = Rows(EpochOrder(self.num_samples, seed), num_workers=0)

    def batch(self, positions: Sequence[int]) -> Samples:
        texts, bad = self._rows.read(self._read, positions)
        return Samples(texts, bad=bad)

    def _read(self, index: int, position: int) -> str:
        texts = self._prompts[index]
        return texts[pick_caption(texts, self._seed, position)]


def read_prompts(path: str, caption_column: str = "text") -> list[tuple[str, ...] | BadSample]:
    """The prompts of a .txt file, one a line, or of the column of a .jsonl, .csv or .parquet table; ValueError naming data.path."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"data.path={path} is not a file; give a .txt with one prompt a line, or one of {', '.join(TABLES)}")
    if file.suffix != ".txt":
        named = ((row, f"{file} row {number}") for number, row in enumerate(rows(file, caption_column), start=1))
        return [row if isinstance(row, BadSample) else _prompt(row.get(caption_column), name) for row, name in named]
    lines = ((line, f"{file} line {number}") for number, line in enumerate(file.read_bytes().splitlines(), start=1) if line.strip())
    return [_line(line, name) for line, name in lines]


def _line(line: bytes, name: str) -> tuple[str, ...] | BadSample:
    try:
        return captions.from_text(line, name)
    except BadSampleError as error:
        return error.sample


def _prompt(value: object, name: str) -> tuple[str, ...] | BadSample:
    try:
        return captions.from_value(value, name)
    except BadSampleError as error:
        return error.sample
