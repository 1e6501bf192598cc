"""Rows of a table in jsonl, csv or parquet."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyper_sd.data.base import BadSample

TABLES = (".jsonl", ".csv", ".parquet")


def rows(file: Path, caption_column: str, *others: str) -> Iterator[dict[str, Any] | BadSample]:
    """Rows as dicts, or what is wrong with a line.

    Raises ValueError, naming data.path, for a file that cannot be read as a whole, and after the last row if none has the column of
    the captions, naming data.caption_column, or one of the others.
    """
    found: dict[str, None] = {}
    for row in _rows(file):
        if isinstance(row, dict):
            found |= dict.fromkeys(map(str, row))
        yield row
    has = f"{file} has the columns {', '.join(found)}"
    if found and caption_column not in found:
        raise ValueError(f"data.caption_column={caption_column}: {has}")
    if found and (missing := set(others) - found.keys()):
        raise ValueError(f"data.path: a column {missing.pop()} is needed, and {has}")


def _rows(file: Path) -> Iterator[dict[str, Any] | BadSample]:
    match file.suffix:
        case ".jsonl":
            yield from _jsonl(file)
        case ".csv":
            yield from _csv(file)
        case ".parquet":
            yield from _parquet(file)
        case _:
            raise ValueError(f"data.path={file} must end in one of {', '.join(TABLES)}")


def _jsonl(file: Path) -> Iterator[dict[str, Any] | BadSample]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield BadSample(f"{file} line {number}", "not a line of json", str(error))
                continue
            yield row if isinstance(row, dict) else BadSample(f"{file} line {number}", "not a line of json", "no object")


def _csv(file: Path) -> Iterator[dict[str, Any] | BadSample]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data.path={file} is not a csv file in UTF-8: {error}") from error


def _parquet(file: Path) -> Iterator[dict[str, Any] | BadSample]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data.path={file} is not a parquet file: {error}") from error
