"""A bucket on a moto server of this process, empty whoever used moto before."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from v4e.data.places import _connected, place, system

moto = pytest.importorskip("moto.server")
S3FileSystem = pytest.importorskip("s3fs").S3FileSystem
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAtests", "AWS_SECRET_ACCESS_KEY": "hush-hush", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def bucket(port: int, **variables: str) -> Iterator[str]:
    """The bucket's URL; every process that inherits the environment reaches it.

    Moto keeps what is stored for all servers of a process, and v4e a connection to a server that may be gone.
    """
    endpoint = f"http://127.0.0.1:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, **variables, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        _forget_connections()
        system(place("s3://bucket/x")).mkdir("bucket")
        yield "s3://bucket"
    _forget_connections()


def _forget_connections() -> None:
    """v4e's own, and those that a test opens through UPath."""
    _connected.cache_clear()
    S3FileSystem.clear_instance_cache()
