"""s3:// from a real S3 server on this machine (moto's) that fails now and then."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.registry import _registry
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from hyper_sd.config import DataConfig
from hyper_sd.data import build_source, s3, storage
from hyper_sd.prepare.inputs import units
from hyper_sd.processes import Processes
from tests.caches import write_cache
from tests.shards import image_shard, number_of
from tests.tiny import tiny_sd15
from tests.unit.test_prepare import latents_of, made

SECRET = "a-secret-that-nobody-may-read"
StartResponse = Callable[..., Any]


class Quiet(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


class Server:
    """S3 with the bucket `data`. The next `failures` requests are answered by 503, 500 and half of an answer in turns."""

    def __init__(self) -> None:
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.failures = self.requests = 0
        self.bucket = fsspec.filesystem("s3", key="me", secret=SECRET, endpoint_url=self.url, skip_instance_cache=True)
        self.bucket.mkdir("data", acl="public-read")

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        self.requests += 1
        if self.failures > 0:
            self.failures -= 1
            if self.failures % 3 == 0 and environ["REQUEST_METHOD"] == "GET":
                start_response("206 Partial Content", [("Content-Length", "1000000")])
                return [b"x"]
            start_response(("503 Slow Down", "500 Internal Server Error")[self.failures % 2], [("Content-Length", "0")])
            return []
        return self._s3(environ, start_response)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in (
        ("ACCESS_KEY_ID", "me"),
        ("SECRET_ACCESS_KEY", SECRET),
        ("ENDPOINT_URL", running.url),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3._filesystem.cache_clear()
    yield running
    running.failures = 0
    s3._filesystem.cache_clear()


def test_raw_shards_are_the_local_ones(server: Server, tmp_path: Path) -> None:
    for number, part in enumerate((range(4), range(4, 7))):
        server.bucket.put_file(image_shard(tmp_path / f"{number}.tar", part), f"data/raw/{number}.tar")
    server.failures = 3
    local, remote = (
        build_source(DataConfig(kind="webdataset", path=f"{root}/{{0..1}}.tar", batch_size=4, num_workers=2), seed=0, image_size=16)
        for root in (tmp_path, "s3://data/raw")
    )
    assert server.failures == 0
    assert number_of(remote.batch(range(14))) == number_of(local.batch(range(14)))
    assert remote.batch(range(3)).captions == local.batch(range(3)).captions


def test_a_cache_is_read_by_one_request_a_sample_and_survives_failures(server: Server, tmp_path: Path) -> None:
    server.bucket.put(str(write_cache(tmp_path / "cache", [[(64, 64)] * 5, [(64, 64)] * 4])), "data/", recursive=True)
    remote, local = (
        build_source(DataConfig(kind="cache", path=path, batch_size=4, num_workers=2), seed=0, image_size=64)
        for path in ("s3://data/cache", str(tmp_path / "cache"))
    )
    before = server.requests
    samples, expected = remote.batch(range(9)), local.batch(range(9))
    assert server.requests == before + 9
    assert samples.latents is not None and expected.latents is not None and torch.equal(samples.latents, expected.latents)
    server.failures = 6
    again = remote.batch(range(9))
    assert server.failures == 0 and again.bad == () and again.captions == samples.captions


def test_what_is_prepared_from_it_is_what_local_shards_make(server: Server, tmp_path: Path) -> None:
    teacher, processes = tiny_sd15(tmp_path / "teacher", image_size=32), Processes(cpu_threads=1)
    for number, part in enumerate((range(3), range(3, 6))):
        server.bucket.put_file(image_shard(tmp_path / f"{number}.tar", part), f"data/photos/{number}.tar")
    server.failures = 4
    for name, root in (("remote", "s3://data/photos"), ("local", tmp_path)):
        made(teacher, tmp_path / name, processes, "data=webdataset", f"data.path={root}/{{0..1}}.tar", "shard_size=2", "sheet=0")
    assert server.failures == 0
    remote, local = latents_of(tmp_path / "remote"), latents_of(tmp_path / "local")
    assert len(remote) == 6 and all(torch.equal(remote[caption], local[caption]) for caption in local)


def test_reads_behind_the_end_are_empty(server: Server) -> None:
    server.bucket.pipe_file("data/ten", b"0123456789")
    assert storage.size("s3://data/ten") == 10 and storage.read_all("s3://data/ten") == b"0123456789"
    assert storage.read("s3://data/ten", 8, 5) == b"89" and storage.read("s3://data/ten", 10, 5) == b""


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("s3://data/absent.tar", FileNotFoundError, "data.path: s3://data/absent.tar does not exist"),
        ("s3://absent/0.tar", FileNotFoundError, "data.path: s3://absent/0.tar does not exist"),
        ("s3://data/folder", FileNotFoundError, "data.path: s3://data/folder is no object but holds others"),
        (f"s3://me:{SECRET}@data/0.tar", ValueError, "data.path=s3://data/0.tar: credentials are taken from the environment"),
        ("s3://Not A Bucket/0.tar", ValueError, "is no address of an object; write s3://bucket/name"),
    ],
)
def test_what_is_not_there_is_named_without_its_secrets(server: Server, path: str, error: type[Exception], message: str) -> None:
    server.bucket.pipe_file("data/folder/0.tar", b"x")
    with pytest.raises(error, match=message) as raised:
        build_source(DataConfig(kind="webdataset", path=path, batch_size=1), seed=0, image_size=16)
    assert SECRET not in str(raised.value)


def test_without_credentials_it_says_where_they_are_looked_for(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.bucket.pipe_file("data/public", b"open", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=r"s3://data/public needs credentials, and there are none; set AWS_ACCESS_KEY_ID and"):
        storage.size("s3://data/public")
    s3._filesystem.cache_clear()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "true"})  # FSSPEC_S3_ANON=true, which is read when fsspec is imported
    assert storage.read_all("s3://data/public") == b"open"


def test_a_server_that_is_not_there_is_an_error_in_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RETRIES", storage._RETRIES.new(total=1))
    server.failures = before = 100
    with pytest.raises(ConnectionError, match=r"data.path: s3://data/ten cannot be reached") as raised:
        storage.size("s3://data/ten")
    assert before - server.failures == 2 and SECRET not in str(raised.value)


def test_without_the_extra_one_error_says_what_to_install(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # what an import of it then raises is what it raises where it is not installed
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r"s3:// needs the package s3fs; install it with pip install 'hyper-sd\[s3\]'"):
        units(DataConfig(kind="webdataset", path="s3://data/{0..9}.tar", batch_size=1), shard_size=10)
