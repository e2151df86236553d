"""A Google Cloud Storage of this process: gcp-storage-emulator, taught to refuse what is there already."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec
import pytest
from typing_extensions import override

from v4e.data.places import _connected, place, system

# Asked of Google by gRPC otherwise, once a call and without an emulator: whether a bucket has real folders.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
GCSFileSystem = pytest.importorskip("gcsfs").GCSFileSystem
emulated: Any = pytest.importorskip("gcp_storage_emulator.server")
kept: Any = pytest.importorskip("gcp_storage_emulator.storage")
Conflict = pytest.importorskip("gcp_storage_emulator.exceptions").Conflict
PRECONDITION_FAILED = 412


class Store(kept.Storage):
    """The emulator's store, with the one precondition that v4e relies on: ifGenerationMatch=0, only if not there."""

    creating = refused = False

    def create_file(self, bucket: str, name: str, *args: Any, **kwargs: Any) -> None:
        self.refused = self.creating and name in self.objects.get(bucket, {})
        if self.refused:
            raise Conflict(name)
        super().create_file(bucket, name, *args, **kwargs)


class Handler(emulated.RequestHandler):
    """Tells the store of the precondition, and the client that it failed."""

    @override
    def do_POST(self) -> None:
        self._upload(super().do_POST)

    @override
    def do_PUT(self) -> None:
        self._upload(super().do_PUT)

    def _upload(self, answer: Callable[[], None]) -> None:
        self.storage.creating = "0" in parse_qs(urlsplit(self.path).query).get("ifGenerationMatch", ())
        answer()
        self.storage.creating = self.storage.refused = False

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(PRECONDITION_FAILED if self.storage.refused else code, message)


@contextmanager
def bucket() -> Iterator[str]:
    """The bucket's URL; the client finds the server by fsspec's own configuration."""
    server = HTTPServer(("127.0.0.1", 0), partial(Handler, Store(use_memory_fs=True)))
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        patch.setitem(fsspec.config.conf, "gs", {"endpoint_url": endpoint, "token": "anon", "project": "lab"})
        _forget_connections()
        system(place("gs://edits/x")).mkdir("edits")
        yield "gs://edits"
    _forget_connections()
    server.shutdown()
    server.server_close()


def _forget_connections() -> None:
    _connected.cache_clear()
    GCSFileSystem.clear_instance_cache()
