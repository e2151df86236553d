"""The same set wherever it lies: a real S3 server on the loopback, a web server, and stores that refuse."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fsspec.registry import _registry as registry
from stores import KEYS, bucket, moto
from test_shards import META, contents, make_sample, run_python, same, write

from data_tools import cli
from data_tools.merge import merge
from data_tools.reshard import reshard
from v4e.data.disk import scratch
from v4e.data.places import _connected, place, put_new, read_bytes, read_many, read_range, shown, sizes, system
from v4e.data.shards import SetMeta, ShardSet, ShardWriter, finish
from v4e.data.stream import Stream
from v4e.errors import DataError


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on a moto server; every process that inherits the environment reaches it."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with bucket(server.get_host_and_port()[1]) as url:
        yield url
    server.stop()


@pytest.fixture
def url(s3, request) -> str:
    return f"{s3}/{request.node.name}".replace("[", "-").replace("]", "")


def stored(url: str) -> dict[str, bytes]:
    """What :func:`contents` gives of a local folder."""
    folder = place(url)
    return {name: read_bytes(folder / name) for name in sizes(folder) if not name.endswith("_stats.json")}


# ------------------------------------------------------------------------------------------------------ a set on S3


def test_a_set_on_s3_is_the_set_on_disk(url, tmp_path):
    local, remote = write(tmp_path / "set"), write(url)
    assert stored(url) == contents(local.folder) and remote.identity == local.identity
    again = ShardSet.open(url, verify="index")
    for i in (6, 0, 3):
        same(make_sample(i), again.sample(i), make_sample(i).encoded.clip_Cthw.bfloat16().dtype)
    assert again.sample(4, pictures=True).target.frames_T3HW.equal(make_sample(4).target.frames_T3HW)
    assert json.loads(read_bytes(place(url) / "000-000000_stats.json"))["samples"] == 3
    assert not list(scratch(place(url)).glob(".tmp-*"))


def test_training_reads_a_set_on_s3(url, tmp_path):
    local, remote = (
        Stream(write(folder), seed=3, batch=4, micro_batch=2, pictures=True) for folder in (tmp_path / "set", url)
    )
    for step in range(3):
        for a, b in zip(local.step(step), remote.step(step), strict=True):
            assert (a.weights, a.positions) == (b.weights, b.positions)
            for x, y in zip(a.samples, b.samples, strict=True):
                assert x.key == y.key and x.encoded.clip_Cthw.equal(y.encoded.clip_Cthw)


def test_other_settings_are_refused_on_s3(url):
    write(url)
    other = SetMeta(META.kind, META.student, META.teacher, {"guidance": 6.0, "seed": 0})
    with pytest.raises(DataError, match=f"{url}/settings.json.*settings.guidance was 5.5 and is now 6.0"):
        ShardWriter(url, other, samples_per_shard=3)


def test_several_writers_fill_one_bucket(url, tmp_path):
    for folder in (url, tmp_path):
        for part in (1, 0):
            with ShardWriter(folder, META, part=part, manifest=False) as writer:
                for i in range(part, 6, 2):
                    writer.add(make_sample(i))
        assert finish(folder).keys == ["s0000", "s0002", "s0004", "s0001", "s0003", "s0005"]
    assert stored(url) == contents(tmp_path)


def test_merging_and_resharding_between_disk_and_s3(url, tmp_path):
    """Up, down and inside the store: the same set each time."""
    sources = []
    for n, folder in enumerate((tmp_path / "a", f"{url}/b")):
        with ShardWriter(folder, META, samples_per_shard=2) as writer:
            for i in range(3 * n, 3 * n + 3):
                writer.add(make_sample(i))
        sources.append(folder)
    local, remote = merge(sources, tmp_path / "all"), merge(sources, f"{url}/all")
    merged = {"merged.json": read_bytes(tmp_path / "all/merged.json")}
    assert stored(f"{url}/all") == contents(local.folder) | merged and remote.keys == [f"s{i:04d}" for i in range(6)]
    assert stored(f"{url}/new") == {} and reshard(remote.folder, f"{url}/new", 3).identity
    assert stored(f"{url}/new") == contents(reshard(local.folder, tmp_path / "new", 3).folder) | {
        "resharded.json": read_bytes(tmp_path / "new/resharded.json")
    }


# ---------------------------------------------------------------------------------------- killed, doubled, damaged

UPLOADS = """
    import os, sys, threading
    from test_shards import META, ShardWriter, make_sample
    from v4e.data import disk
    put, left = disk.put_new, int(sys.argv[2])
    def put_or_stop(*args):
        global left
        if not left:
            print("begun", flush=True)
            threading.Event().wait()
        left -= 1
        put(*args)
    disk.put_new = put_or_stop
    with ShardWriter(sys.argv[1], META, samples_per_shard=3) as writer:
        for i in range(7):
            writer.add(make_sample(i))
"""


@pytest.mark.parametrize("uploads", [3, 4])  # the first is that of the settings
def test_killed_between_uploads(url, tmp_path, uploads):
    """Before the second tar, and between it and its index: what is done stays, the rest is made again."""
    process = run_python(UPLOADS, url, uploads)
    assert process.stdout.readline() == "begun\n", process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert ("000-000001.tar" in sizes(place(url))) == (uploads == 4) and list(scratch(place(url)).glob(".tmp-*"))
    with pytest.raises(DataError, match="no manifest.json, the set is unfinished"):
        ShardSet.open(url)
    with ShardWriter(url, META, samples_per_shard=3) as writer:
        assert writer.done == {"s0000", "s0001", "s0002"} and not list(scratch(place(url)).glob(".tmp-*"))
        assert "000-000001.tar" not in sizes(place(url))
        for i in range(3, 7):
            writer.add(make_sample(i))
    assert stored(url) == contents(write(tmp_path).folder)


def test_two_writers_of_one_part_on_one_machine(url):
    with ShardWriter(url, META), pytest.raises(DataError, match="another writer is at work"):
        ShardWriter(url, META)


def test_two_writers_of_one_part_on_two_machines(url, tmp_path, monkeypatch):
    """No lock reaches another machine: the second one may not write over what the first one made."""
    machines = iter([tmp_path / "a", tmp_path / "b"])

    def folder_of_machine(folder):
        (made := next(machines)).mkdir()
        return made

    monkeypatch.setattr("v4e.data.shards.scratch", folder_of_machine)
    first, second = (ShardWriter(url, META, samples_per_shard=1) for _ in range(2))
    monkeypatch.setattr("v4e.data.shards.scratch", lambda folder: tmp_path / "a")
    first.add(make_sample(0))
    before = stored(url)
    monkeypatch.setattr("v4e.data.shards.scratch", lambda folder: tmp_path / "b")
    with pytest.raises(DataError, match="000-000000.tar: another writer has made this file"):
        second.add(make_sample(1))
    first.abandon()
    assert stored(url) == before and finish(url).keys == ["s0000"]


def test_the_same_bytes_may_be_put_twice(url, tmp_path):
    """A request that is repeated because its answer was lost meets its own object."""
    (tmp_path / "file").write_bytes(b"tar")
    for _ in range(2):
        put_new(place(url) / "file", tmp_path / "file")
        put_new(place(url) / "index", b"index")
    for other in (b"tarred", b"rat"):
        with pytest.raises(DataError, match="another writer"):
            put_new(place(url) / "file", other)
    assert read_bytes(place(url) / "file") == b"tar"


def test_damage_on_s3_is_named(url):
    shards = write(url)
    tar, row = shards.folder / "000-000001.tar", shards.index(1).member(1, "encoded.safetensors")
    whole = bytearray(read_bytes(tar))
    whole[row.offset + 99] ^= 1
    tar.write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"000-000001.tar, key s0004.encoded.safetensors: its bytes are not those"):
        ShardSet.open(url).sample(4)
    assert ShardSet.open(url).sample(3).key == "s0003"
    tar.write_bytes(bytes(whole[:4000]))
    with pytest.raises(DataError, match="cut short: 4000 bytes"):
        ShardSet.open(url)
    with pytest.raises(DataError, match=r"key s0005.json: (the shard is cut short|cannot be read)"):
        ShardSet.open(url, verify="none").sample(5)
    tar.unlink()
    with pytest.raises(DataError, match="000-000001.tar: the shard is missing"):
        ShardSet.open(url)


# ---------------------------------------------------------------------------------------------- places themselves


def test_reading_whole_in_part_and_together(url, tmp_path):
    for folder in (place(url), tmp_path):
        for n in range(100):
            (folder / f"f{n:03d}").write_bytes(b"%03d" % n)
        assert read_range(folder / "f042", 1, 2) == b"42"
        assert sizes(folder) == {f"f{n:03d}": 3 for n in range(100)}
        assert list(read_many(folder / f"f{n:03d}" for n in range(100))) == [b"%03d" % n for n in range(100)]
        with pytest.raises(DataError, match="f100: cannot be read"):
            list(read_many(folder / f"f{n:03d}" for n in range(101)))


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(DataError, match=r"s3://nowhere/set: no manifest.json.*bucket does not exist"):
        ShardSet.open("s3://nowhere/set")
    with pytest.raises(DataError, match=r"s3://nowhere/set/settings.json: cannot be written.*bucket does not exist"):
        ShardWriter("s3://nowhere/set", META)


def test_a_missing_backend_is_named(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("v4e.data.places.fsspec.filesystem", missing)
    with pytest.raises(DataError, match=r"gs://b/set.*gs:// needs gcsfs.*pip install gcsfs"):
        ShardSet.open("gs://b/set")


@pytest.mark.parametrize("verb", ["verify", "stats", "evolve", "look"])
def test_a_client_that_is_not_installed_is_named_in_one_line(verb, monkeypatch, capsys):
    monkeypatch.delitem(registry, "gs", raising=False)  # fsspec keeps what another test has imported
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    _connected.cache_clear()
    assert cli.main([verb, "gs://bucket/set"]) == DataError.exit_code
    told = capsys.readouterr().err
    assert told.startswith("v4e-shards: gs://bucket/set") and "gs:// needs gcsfs (pip install gcsfs)" in told
    assert told.count("\n") == 1


def test_a_refusing_store_is_named(url, monkeypatch):
    from botocore.exceptions import NoCredentialsError

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentialsError

    monkeypatch.setattr(system(place(url)), "cat_file", refuse)
    with pytest.raises(DataError, match="NoCredentialsError: Unable to locate credentials.*AWS_PROFILE"):
        ShardSet.open(url)


def test_credentials_are_neither_taken_from_a_url_nor_shown(url):
    with pytest.raises(DataError, match="must not carry credentials.*environment") as told:
        ShardSet.open("https://me:secret@host/set")
    assert "secret" not in str(told.value)
    assert shown("GET https://h/a.tar?X-Amz-Signature=abc failed") == "GET https://h/a.tar?... failed"
    write(url)
    assert not any(secret.encode() in content for secret in KEYS.values() for content in stored(url).values())


# ------------------------------------------------------------------------------------------------------- the web


class Ranged(SimpleHTTPRequestHandler):
    """The standard library's file server, with ranges where ``ranged``."""

    ranged = True

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not (self.ranged and asked and path.is_file()):
            return super().do_GET()
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        part = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: object) -> None:
        """Silence."""


class Plain(Ranged):
    ranged = False


@pytest.fixture
def serve():
    servers = []

    def start(handler: type, folder: Path) -> str:
        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_set_on_a_web_server(tmp_path, serve):
    local = write(tmp_path / "set")
    remote = ShardSet.open(f"{serve(Ranged, tmp_path)}/set")
    assert remote.identity == local.identity and remote.keys == local.keys
    same(make_sample(5), remote.sample(5), local.sample(5).encoded.clip_Cthw.dtype)
    with pytest.raises(DataError, match="can be read but not written"):
        ShardWriter(str(remote.folder), META)
    (local.folder / "000-000001.tar").unlink()
    with pytest.raises(DataError, match="000-000001.tar, key s0004.json: cannot be read"):
        remote.sample(4)


def test_a_web_server_without_ranges_is_refused(tmp_path, serve):
    write(tmp_path)
    with pytest.raises(DataError, match="sends whole files when asked for a part"):
        ShardSet.open(serve(Plain, tmp_path)).sample(0)


def test_a_connection_outlives_a_fork(url):
    shards = write(url)
    assert shards.sample(0).key == "s0000"
    if not (child := os.fork()):
        os._exit(0 if shards.sample(1).key == "s0001" else 1)
    for _ in range(300):
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
    assert found == (child, 0)
