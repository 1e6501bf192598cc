"""A server on this machine that speaks as much of the Hugging Face hub's API as reading data sets needs.

/api/datasets/<id>[/revision/<rev>]           what is in it, and the commit
/api/datasets/<id>/tree/<rev>[/<folder>]      its files
/api/datasets/<id>/paths-info/<rev>           sizes of some, by POST
/datasets/<id>/resolve/<rev>/<file>           content, by ranges, with ETag and X-Repo-Commit
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+)/?(?P<path>.*))?$")
_RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")


class Hub(ThreadingHTTPServer):
    """Every directory owner/name below `root` is a data set, the same at every revision; the next `failures` requests get a 503."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.failures = root, 0
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, cache: Path) -> dict[str, str]:
        """What makes a process take it for the hub."""
        rest = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
        return rest | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def running(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

    def _answer(self, body: bytes) -> None:
        address = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {address} {self.headers.get('Range', '')}".strip())
        if self.server.failures > 0:
            self.server.failures -= 1
            self._send(503, b"")
        elif match := _RESOLVE.match(address):
            self._resolve(self.server.root / match["repo"] / match["path"])
        elif match := _API.match(address):
            self._api(match["repo"], match["what"] or "revision", match["path"] or "", body)
        else:
            self._send(404, b"")

    def _resolve(self, file: Path) -> None:
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if file.parent.is_dir() else "RepoNotFound"})
            return
        data = file.read_bytes()
        facts = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "Content-Disposition": "inline"}
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            facts["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self._send(206 if start < len(data) else 416, data[start : end + 1], facts)
        else:
            self._send(200, data, facts)

    def _api(self, repo: str, what: str, path: str, body: bytes) -> None:
        folder = self.server.root / repo
        if not folder.is_dir():
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*"))]
        if what == "revision":
            siblings = [{"rfilename": name} for name in names if (folder / name).is_file()]
            self._json({"_id": "0", "id": repo, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": siblings})
        elif what == "tree":
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            below = [name for name in names if (folder / name).is_relative_to(folder / path)]
            found = [name for name in below if name != path and (deep or (folder / name).parent == folder / path)]
            if found:
                self._json([_entry(folder, name) for name in found])
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            text = body.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            self._json([_entry(folder, name) for name in wanted if name in names])

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if file.is_dir():
        return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
    return {"type": "file", "path": name, "oid": _oid(file), "size": file.stat().st_size}


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
