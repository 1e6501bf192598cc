"""Reading parts of files by their address: a local path, or http(s):// and s3:// by ranges, with retries.

No other scheme is opened; `pipe:` and the like run commands. Raises OSError for what cannot be reached after the retries.
"""

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

from hyper_sd.data import s3

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # a scheme has two letters at least; one letter is a drive
_REMOTE = ("http", "https", "s3")
_BLOCK = 1 << 23
_WALK = 1 << 18  # read ahead of a walk over tar headers
_RETRIES = urllib3.Retry(
    total=8, backoff_factor=0.1, backoff_max=20, backoff_jitter=0.1, status_forcelist=(408, 429, 500, 502, 503, 504), raise_on_status=False
)  # waits 0, 0.2, 0.4, ... 12.8 seconds


def is_remote(address: str) -> bool:
    """Raises ValueError, naming data.path, for a scheme that is not read."""
    match = _SCHEME.match(address)
    if match is None:
        return False
    if match[1] not in _REMOTE or not address[match.end() :].startswith("//"):
        raise ValueError(f"data.path={shown(address)}: {match[1]}: is not read; give a path with no scheme, or one of {', '.join(_REMOTE)}")
    if address.startswith("s3:") and "@" in urlsplit(address).netloc:
        raise ValueError(
            f"data.path={shown(address)}: credentials are taken from the environment, as by every S3 client, not from an address"
        )
    return True


def shown(address: str) -> str:
    """The address without what may be a secret: user, password and the signature in a query."""
    if _SCHEME.match(address) is None or "://" not in address:
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def size(address: str) -> int:
    """Bytes. Raises FileNotFoundError."""
    if not is_remote(address):
        return os.stat(address).st_size
    if address.startswith("s3:"):
        return s3.size(address, _RETRIES)
    response = _request("HEAD", address)
    length = response.headers.get("Content-Length")
    if length is None:
        raise OSError(f"{shown(address)}: the server does not say how long the file is, so it cannot be read in parts; download it first")
    return int(length)


def read(address: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`, fewer at the end of the file."""
    if not is_remote(address):
        with open(address, "rb") as file:
            file.seek(start)
            return file.read(length)
    if length == 0:
        return b""
    if address.startswith("s3:"):
        return s3.read(address, start, start + length, _RETRIES)
    response = _request("GET", address, {"Range": f"bytes={start}-{start + length - 1}"})
    if response.status == 416:  # behind the end
        return b""
    if response.status != 206:
        raise OSError(f"data.path: the server of {shown(address)} does not answer requests for a part of a file; download the shards")
    return response.data


def read_all(address: str) -> bytes:
    if not is_remote(address):
        return Path(address).read_bytes()
    return s3.read(address, None, None, _RETRIES) if address.startswith("s3:") else _request("GET", address).data


@contextmanager
def opened(address: str) -> Iterator[io.BufferedIOBase]:
    """A file to seek and read in."""
    if is_remote(address):
        yield io.BufferedReader(_RangeFile(address), _WALK)
    else:
        with open(address, "rb") as file:
            yield file


@contextmanager
def local_copy(address: str) -> Iterator[str]:
    """A local file with the content of the address, for as long as the context lasts.

    Raises ValueError where the directory of temporary files has no room for it.
    """
    if not is_remote(address):
        yield address
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
        total = size(address)
        for start in range(0, total, _BLOCK):
            data = read(address, start, min(_BLOCK, total - start))
            try:
                copy.write(data)
                copy.flush()
            except OSError as error:
                raise ValueError(
                    f"data.path={shown(address)}: no copy in {copy.name}: {error}; set TMPDIR to where {total} bytes are free"
                ) from error
        yield copy.name


class _RangeFile(io.RawIOBase):
    def __init__(self, address: str):
        self._address, self._size, self._at = address, size(address), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = read(self._address, self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@cache
def _pool() -> urllib3.PoolManager:
    return urllib3.PoolManager(maxsize=32, retries=_RETRIES, timeout=urllib3.Timeout(connect=10, read=60))


def _request(method: str, address: str, headers: dict[str, str] | None = None) -> urllib3.BaseHTTPResponse:
    try:
        response = _pool().request(method, address, headers={"Accept-Encoding": "identity", **(headers or {})})
    except urllib3.exceptions.HTTPError as error:
        raise ConnectionError(f"data.path: {shown(address)} cannot be reached: {type(error).__name__}") from error
    if response.status == 404:
        raise FileNotFoundError(f"data.path: {shown(address)} does not exist")
    if response.status >= 400 and response.status != 416:
        raise ConnectionError(f"data.path: {shown(address)} answers with status {response.status}")
    return response
