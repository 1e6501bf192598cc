"""Captions as they stand in files: text, json, or a column of a table."""

import json
from typing import Any

from hyper_sd.data.base import BadSampleError

NO_CAPTION = "no caption"
EMPTY = "empty caption"


def from_text(data: bytes, name: str) -> tuple[str, ...]:
    """The whole text is one caption. Raises BadSampleError."""
    return from_value(_decoded(data, name), name)


def from_json(data: bytes, name: str, column: str = "text") -> tuple[str, ...]:
    """The value of `column`: a caption, or a list of several. Raises BadSampleError."""
    try:
        row = json.loads(_decoded(data, name))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadSampleError(name, "caption is not json", error) from error
    if not isinstance(row, dict):
        raise BadSampleError(name, "caption is not json", f"no object with a {column}")
    if column not in row:
        raise BadSampleError(name, NO_CAPTION, f"data.caption_column={column}, and the json has {', '.join(row)}")
    return from_value(row[column], name)


def from_value(value: Any, name: str) -> tuple[str, ...]:
    """A caption or a list of captions. Raises BadSampleError."""
    values = value if isinstance(value, list) else [value]
    if value is None or not values:
        raise BadSampleError(name, NO_CAPTION)
    if not all(isinstance(text, str) for text in values):
        raise BadSampleError(name, "caption is not text", repr(value))
    captions = tuple(text.strip() for text in values if text.strip())
    if not captions:
        raise BadSampleError(name, EMPTY)
    return captions


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(name, "caption is not UTF-8", error) from error
