"""A Hugging Face Hub of this process, as far as its client asks: files are listed, read in parts and committed."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
from huggingface_hub import HfFileSystem

from v4e.data.places import _connected

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """One branch, main, of one dataset, lab/edits; every file a plain one. Each commit replaces or removes files."""

    files: dict[str, bytes] = {}
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/datasets/lab/edits/resolve/main/(.+)", path):
            return self._file(found[1])
        if found := re.fullmatch(r"/api/datasets/lab/edits/tree/main/?(.*)", path):
            return self._tree(found[1])
        if re.fullmatch(r"/api/datasets/lab/edits(/revision/main)?", path):
            return self._json({"id": "lab/edits", "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        return self._missing("RepoNotFound" if "lab/edits" not in path else "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/datasets/lab/edits/preupload/main":
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": f["path"], **plain} for f in json.loads(body)["files"]]})
        if path == "/api/datasets/lab/edits/paths-info/main":
            wanted = parse_qs(body.decode())["paths"]
            return self._json([_entry(name, self.files[name]) for name in wanted if name in self.files])
        if path == "/api/datasets/lab/edits/commit/main":
            return self._commit([json.loads(line) for line in body.splitlines()])
        return self._missing("RepoNotFound")

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _commit(self, lines: list[dict]) -> None:
        with self.lock:
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.files[value["path"]] = base64.b64decode(value["content"])
            for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
                del self.files[value["path"]]
        self._json({"commitUrl": f"https://huggingface.co/datasets/lab/edits/commit/{COMMIT}", "commitOid": COMMIT})

    def _tree(self, folder: str) -> None:
        start = f"{folder}/" if folder else ""
        inside = {name: content for name, content in self.files.items() if name.startswith(start)}
        if not inside and folder:
            return self._missing("EntryNotFound")
        if parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() == "true":
            return self._json([_entry(name, content) for name, content in sorted(inside.items())])
        here = {n: c for n, c in inside.items() if "/" not in n[len(start) :]}
        below = sorted({start + n[len(start) :].partition("/")[0] for n in inside.keys() - here.keys()})
        folders = [{"type": "directory", "path": name, "oid": COMMIT, "size": 0} for name in below]
        return self._json([*folders, *(_entry(name, content) for name, content in sorted(here.items()))])

    def _file(self, name: str) -> None:
        if name not in self.files:
            return self._missing("EntryNotFound")
        content, asked = self.files[name], re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and int(asked[1]) >= len(content):
            return self._send(416, b"")
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(206 if asked else 200, part, **etag)

    def _missing(self, why: str) -> None:
        self._send(404, json.dumps({"error": why}).encode(), **{"X-Error-Code": why})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": blob}


@contextmanager
def hub() -> Iterator[str]:
    """The dataset's URL; the client finds the server by fsspec's own configuration."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Hub,), {"files": {}}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": "none"})
        _forget_connections()
        yield "hf://datasets/lab/edits"
    _forget_connections()
    server.shutdown()
    server.server_close()


def _forget_connections() -> None:
    _connected.cache_clear()
    HfFileSystem.clear_instance_cache()
