"""Writing a cache part by part: a part is a tar shard, its rows of the index and what was dropped, and counts when all are there."""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from torch import Tensor

from hyper_sd.data.base import BadSample
from hyper_sd.data.cache import COLUMNS
from hyper_sd.files import fsync, replace_file, write_json
from hyper_sd.randomness import fold

PARTS = "parts"


@dataclass(frozen=True)
class PartName:
    """Part `number` of unit `unit`."""

    unit: int
    number: int

    def __str__(self) -> str:
        return f"{self.unit:05}-{self.number:05}"


@dataclass
class PartWriter:
    """Writes under another name until `close`; nothing of it is seen if it is not reached."""

    out: Path
    name: PartName
    rows: list[tuple[int, ...]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    dropped: list[BadSample] = field(default_factory=list)

    def __post_init__(self) -> None:
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")

    @property
    def _partial(self) -> Path:
        """A name of this process's own: one that was told to stop may still be removing its file when the next command writes."""
        return self.out / f".{self.name}.tar.{os.getpid()}.partial"

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk, which has been told
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, number: int, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """One sample: `info` has text, sizes and name; see `hyper_sd.data.cache`."""
        key = f"{self.name}-{number:06}"
        text, values = json.dumps(info, ensure_ascii=False).encode(), safetensors.torch.save(tensors)
        data = _member(f"{key}.json", text) + _member(f"{key}.sample.safetensors", values)
        start = len(_padded(text)) + tarfile.BLOCKSIZE  # of the tensors, behind their header
        content = data[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + start + len(values)]
        offset, (height, width) = self._file.tell() + tarfile.BLOCKSIZE, info["sizes"][4:]
        self.rows.append((offset, len(text), start, len(content), zlib.crc32(content), height, width))
        self.hashes.append(caption_hash(info["text"]))
        with writing(self.out):
            self._file.write(data)

    def close(self, num_read: int, last: bool) -> None:
        """Make it whole and give it its name."""
        with writing(self.out):
            self._close(num_read, last)

    def _close(self, num_read: int, last: bool) -> None:
        files: dict[str, Any] = {}
        if self.rows:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            with self._partial.open("rb") as file:
                files = {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            os.replace(self._partial, self.out / f"{self.name}.tar")
            fsync(self.out)
        columns = np.ascontiguousarray(np.array(self.rows, dtype=np.int64).reshape(-1, len(COLUMNS) - 1).T)  # safetensors ignores strides
        index = dict(zip(COLUMNS[1:], columns, strict=True)) | {"caption": np.array(self.hashes, dtype=np.uint64)}
        replace_file(self.out / PARTS / f"{self.name}.safetensors", safetensors.numpy.save(index))
        done = {"kept": len(self.rows), "read": num_read, "last": last, **files, "dropped": [asdict(sample) for sample in self.dropped]}
        write_json(self.out / PARTS / f"{self.name}.json", done)


@dataclass(frozen=True)
class Part:
    """A finished part."""

    name: PartName
    kept: int
    read: int
    last: bool
    dropped: tuple[BadSample, ...]
    shard: dict[str, Any] | None

    @classmethod
    def find(cls, out: Path, name: PartName) -> "Part | None":
        try:
            done = json.loads((out / PARTS / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        shard = {"name": f"{name}.tar", "bytes": done["bytes"], "sha256": done["sha256"]} if done["kept"] else None
        if shard is not None and (not (file := out / shard["name"]).is_file() or file.stat().st_size != shard["bytes"]):
            return None  # somebody took it away
        return cls(name, done["kept"], done["read"], done["last"], tuple(BadSample(**sample) for sample in done["dropped"]), shard)

    def index(self, out: Path) -> dict[str, np.ndarray]:
        return safetensors.numpy.load((out / PARTS / f"{self.name}.safetensors").read_bytes())


def finished(out: Path, unit: int) -> list[Part]:
    """The parts of a unit that are there, without a gap."""
    parts: list[Part] = []
    while not (parts and parts[-1].last) and (part := Part.find(out, PartName(unit, len(parts)))) is not None:
        parts.append(part)
    return parts


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """For writing to the cache: what the disk refuses is one clear error."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"out={out} cannot be written: {error}; what is finished is kept, the same command goes on") from error


def caption_hash(captions: Sequence[str]) -> int:
    """64 bits that tell captions apart."""
    digest = hashlib.blake2b("\0".join(captions).casefold().encode(), digest_size=8).digest()
    return fold(int.from_bytes(digest, "little"))


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)
