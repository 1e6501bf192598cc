"""Remote shards, from a real server on this machine that fails now and then."""

import re
import resource
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from hyper_sd.config import DataConfig
from hyper_sd.data import build_source, storage
from hyper_sd.prepare.inputs import Item, units
from tests.caches import write_cache
from tests.shards import image_shard, number_of


class Server(ThreadingHTTPServer):
    """Serves a directory by ranges; the next `failures` requests are answered with 503 or cut off."""

    def __init__(self, root: Path, *, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.ranges, self.lengths, self.failures, self.requests = root, ranges, True, 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        self.server.requests += 1
        file = self.server.root / self.path.partition("?")[0].lstrip("/")
        if self.server.failures > 0:
            self.server.failures -= 1
            if self.server.failures % 2:
                self.send_error(503)
            else:  # half of an answer
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(b"x")
                self.close_connection = True
            return
        if not file.is_file():
            self.send_error(404)
            return
        data, asked = file.read_bytes(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            data = data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked and self.server.ranges else 200)
        if self.server.lengths:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_remote_raw_shards_are_the_local_ones(server: Server, tmp_path: Path) -> None:
    for number, part in enumerate((range(4), range(4, 7))):
        image_shard(tmp_path / f"{number}.tar", part)
    pattern = "{0..1}.tar"
    local, remote = (
        build_source(DataConfig(kind="webdataset", path=f"{root}/{pattern}", batch_size=4, num_workers=2), seed=0, image_size=16)
        for root in (tmp_path, server.url)
    )
    assert number_of(remote.batch(range(14))) == number_of(local.batch(range(14)))
    assert remote.batch(range(3)).captions == local.batch(range(3)).captions


def test_a_remote_cache_is_read_by_one_request_a_sample_and_survives_failures(server: Server, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", [[(64, 64)] * 5, [(64, 64)] * 4])
    cfg = DataConfig(kind="cache", path=f"{server.url}/cache", batch_size=4, num_workers=2)
    server.failures = 3
    remote = build_source(cfg, seed=0, image_size=64)
    before = server.requests
    samples = remote.batch(range(9))
    assert server.requests == before + 9
    local = build_source(DataConfig(kind="cache", path=str(tmp_path / "cache"), batch_size=4), seed=0, image_size=64).batch(range(9))
    assert samples.latents is not None and local.latents is not None and torch.equal(samples.latents, local.latents)
    server.failures = 4
    again = remote.batch(range(9))
    assert server.failures == 0 and again.bad == () and again.captions == samples.captions


def test_remote_shards_are_prepared_from_any_entry_on(server: Server, tmp_path: Path) -> None:
    image_shard(tmp_path / "a.tar", range(4))
    server.failures = 2
    (unit,) = units(DataConfig(kind="webdataset", path=f"{server.url}/a.tar", batch_size=1), shard_size=2)
    items = [item for item in unit.entries(1) if isinstance(item, Item)]
    assert [item.captions for item in items] == [(f"number {number}",) for number in (1, 2, 3)]
    assert [item.image().getpixel((0, 0)) for item in items if item.image] == [(number, 0, 0) for number in (1, 2, 3)]


def test_a_data_set_of_the_hub_is_not_trained_on_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"data=hf is not trained on as it is: scripts/prepare.py data=hf"):
        build_source(DataConfig(kind="hf", path="owner/name", batch_size=1), seed=0, image_size=16)


def test_what_cannot_be_reached_is_named_without_its_secrets(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 100)
    with pytest.raises(FileNotFoundError, match=r"http://127.0.0.1:\d+/absent.tar does not exist"):
        storage.read(f"{server.url.replace('//', '//user:password@')}/absent.tar?signature=secret", 0, 10)
    server.ranges = False
    with pytest.raises(OSError, match="does not answer requests for a part"):
        storage.read(f"{server.url}/a.tar", 5, 10)
    server.lengths = False
    with pytest.raises(OSError, match="does not say how long the file is"):
        storage.size(f"{server.url}/a.tar")
    assert storage.shown("https://me:pw@host:1/a/b.tar?X-Amz-Signature=1") == "https://host:1/a/b.tar"
    assert storage.shown("C:/photos/a.tar") == "C:/photos/a.tar"


def test_a_local_copy_is_whole_and_goes_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 100)
    server.failures = 2
    with storage.local_copy(f"{server.url}/a.tar") as copy:
        assert Path(copy).read_bytes() == (tmp_path / "a.tar").read_bytes() and Path(copy) != tmp_path / "a.tar"
    assert not Path(copy).exists()


def test_a_copy_that_finds_no_room_says_where_to_make_some(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(20_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        message = r"data.path=http.*/a.tar: no copy in .*; set TMPDIR to where 20000 bytes are free"
        with pytest.raises(ValueError, match=message), storage.local_copy(f"{server.url}/a.tar?signature=secret"):
            raise AssertionError("half a shard")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_server_that_is_not_there_is_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(storage, "_RETRIES", storage._RETRIES.new(total=1))
    storage._pool.cache_clear()
    try:
        with pytest.raises(ConnectionError, match=rf"http://127.0.0.1:{port}/a.tar cannot be reached"):
            storage.size(f"http://127.0.0.1:{port}/a.tar")
    finally:
        storage._pool.cache_clear()
