"""Shards of a store on this disk: never more than the room, whoever shares the folder, is killed or does not answer."""

import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stores import bucket, moto
from test_shards import ShardSet, flip, run_python, write

from v4e.config import Loop, Share
from v4e.data.cache import Ahead, Remote, ShardCache
from v4e.data.index import Index, index_path
from v4e.data.mixture import Mixture, Order
from v4e.data.places import patiently, place, read_bytes, system
from v4e.data.stream import Stream
from v4e.errors import ConfigError, DataError
from v4e.train.meter import resident

serving = pytest.importorskip("werkzeug.serving")
N, EACH = 18, 2  # samples, and of a shard
QUICK = (0.01, 0.01, 0.01)  # pauses
Answer = Iterator[bytes] | list[bytes]
Fault = Callable[[Callable, dict, Callable], Answer]


@dataclass
class Faulty:
    """Moto's S3 with faults: of each object, one fault a GET until none is left."""

    app: Callable = field(default_factory=lambda: moto.DomainDispatcherApplication(moto.create_backend_app))
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    gets: Counter[str] = field(default_factory=Counter)

    def __call__(self, environ: dict, start: Callable) -> Answer:
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] != "GET":
            return self.app(environ, start)
        self.gets[name] += 1
        fault = self.faults[name].pop(0) if self.faults[name] else None
        return fault(self.app, environ, start) if fault else self.app(environ, start)


def broken(_app: Callable, _environ: dict, start: Callable) -> Answer:
    """The server's own error."""
    start("500 Internal Server Error", [("Content-Type", "application/xml")])
    return [b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"]


def altered(change: Callable[[bytes], bytes]) -> Fault:
    """An answer that is not what is stored."""

    def fault(app: Callable, environ: dict, start: Callable) -> Answer:
        told: list = []
        body = change(b"".join(app(environ, lambda *words: told.extend(words))))
        start(told[0], [(k, str(len(body)) if k.lower() == "content-length" else v) for k, v in told[1]])
        return [body]

    return fault


cut = altered(lambda body: body[: len(body) // 2])
flipped = altered(lambda body: body[:900] + bytes([body[900] ^ 1]) + body[901:])


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    app = Faulty()
    made = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=moto.MotoRequestHandler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    with bucket(made.server_port, AWS_MAX_ATTEMPTS="1"):
        yield app
    made.shutdown()


@pytest.fixture(scope="module")
def url(server) -> str:
    write("s3://bucket/set", n=N, per_shard=EACH)
    return "s3://bucket/set"


@pytest.fixture(autouse=True)
def healthy(server) -> None:
    server.faults.clear()
    server.gets.clear()


def opened(url: str, folder: Path, shards: float = 4, pauses: tuple[float, ...] = QUICK) -> ShardSet:
    """The set, through a cache with room for so many shards."""
    room = max(s.bytes for s in ShardSet.open(url, verify="none").shards) * shards
    return ShardSet.open(url, cache=ShardCache(folder, int(room), pauses))


def taken(folder: Path) -> int:
    """Bytes of copies and claims between two changes, of which each removes or adds more than one file."""
    with open(folder / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.glob("*.*") if path.suffix in (".tar", ".claim"))


@pytest.fixture
def watched(tmp_path) -> Iterator[list[int]]:
    """How full the folder ``cache`` was, looked at all the time."""
    seen, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            if (tmp_path / "cache").exists():
                seen.append(taken(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    over.set()
    watcher.join()


# ---------------------------------------------------------------------------------------------------- one reader


def test_training_through_a_cache_smaller_than_the_set(url, tmp_path, server, watched):
    """Three epochs: the samples of a local set in the same order, each shard downloaded once an epoch at most."""
    remote, local = opened(url, tmp_path / "cache"), write(tmp_path / "local", n=N, per_shard=EACH)
    streams = [Stream(Mixture((s,), window=2), seed=1, batch=6, micro_batch=3) for s in (remote, local)]
    server.gets.clear()
    for step in range(9):
        for a, b in zip(*(stream.step(step) for stream in streams), strict=True):
            assert a.weights == b.weights == (1.0, 1.0, 1.0) and a.positions == b.positions
            for x, y in zip(a.samples, b.samples, strict=True):
                assert x.key == y.key and x.encoded.clip_Cthw.equal(y.encoded.clip_Cthw)
    for stream in streams:
        stream.close()
    tars = {name: count for name, count in server.gets.items() if name.endswith(".tar")}
    assert len(tars) == N // EACH and max(tars.values()) <= 4  # of a fourth epoch the first were asked for ahead
    assert 0 < max(watched) <= remote.cache.room < sum(s.bytes for s in remote.shards)


def test_a_whole_set_that_fits_is_downloaded_once(url, tmp_path, server):
    remote = opened(url, tmp_path / "cache", shards=N)
    stream = Stream(remote, seed=1, batch=6, micro_batch=3)
    server.gets.clear()
    for step in range(9):
        stream.step(step)
    stream.close()
    remote.cache.close()
    assert {count for name, count in server.gets.items() if name.endswith(".tar")} == {1}
    again = opened(url, tmp_path / "cache", shards=N)
    server.gets.clear()
    assert again.sample(7).key == "s0007" and not any(name.endswith(".tar") for name in server.gets)


def test_the_least_recently_used_give_way(url, tmp_path):
    remote = opened(url, tmp_path / "cache", shards=2)
    a, b, c = (remote.remote(n) for n in range(3))
    held = {}
    for shard in (a, b, a, c):
        held[shard.name] = remote.cache.get(shard)
        time.sleep(0.02)  # the clock of file systems ticks at 250 Hz
    assert held[a.name].is_file() and held[c.name].is_file() and not held[b.name].exists()


def test_another_set_under_the_same_address_is_another_shard(url, tmp_path):
    remote = opened(url, tmp_path / "cache")
    shard = remote.remote(0)
    newer = Remote(shard.at, shard.size, "0" * 32, shard.check)
    assert newer.name != shard.name and remote.cache.get(newer) != remote.cache.get(shard)


def test_what_lies_beside_is_left_alone_and_what_was_killed_is_swept(url, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "thesis.tar").write_bytes(bytes(10**6))
    for end in ("claim", "part"):
        (folder / f"{'0' * 32}.{end}").write_bytes(bytes(10**6))
    remote = opened(url, folder, shards=1)
    assert {p.name for p in folder.iterdir()} == {"thesis.tar", ".lock"}
    assert [remote.sample(i).key for i in (0, 17)] == ["s0000", "s0017"]
    assert (folder / "thesis.tar").stat().st_size == 10**6


def test_a_copy_evicted_before_it_is_opened_is_fetched_again(url, tmp_path):
    remote = opened(url, tmp_path / "cache")
    unlucky = iter([True, True, False])

    def work(copy: Path) -> bytes:
        if next(unlucky):
            copy.unlink()
        return read_bytes(copy)

    assert remote.cache.use(remote.remote(3), work) == read_bytes(place(url) / "000-000003.tar")
    with pytest.raises(DataError, match=r"000-000003.tar: is evicted before it can be read.*disk_cache_bytes"):
        remote.cache.use(remote.remote(3), lambda copy: copy.unlink() or read_bytes(copy))


def test_rooms_that_are_too_small_are_refused(url, tmp_path):
    with pytest.raises(ConfigError, match="loop.disk_cache_bytes: a cache of 0 bytes"):
        ShardCache(tmp_path, 0)
    remote = opened(url, tmp_path, shards=0.5)
    with pytest.raises(DataError, match=r"000-000000.tar: a shard of \d+ bytes does not fit into a cache of"):
        remote.sample(0)
    wide = Mixture((opened(url, tmp_path, shards=6.5),), window=4)
    with pytest.raises(ConfigError, match=r"take \d+ bytes, the cache holds \d+.*use loop.window=3, or enlarge"):
        Stream(wide, seed=0, batch=2, micro_batch=1)
    room = sum(s.bytes for s in remote.shards)
    loop = Loop(mixture=[Share(url)], window=3, disk_cache=str(tmp_path), disk_cache_bytes=room)
    assert Mixture.of(loop).sets[0].cache.room == room and not Mixture.of(Loop(data=url)).sets[0].cache


# ----------------------------------------------------------------------------------------------- looking ahead


@dataclass
class Asked:
    """A cache that only hears what it is asked for."""

    room: int
    names: list[str] = field(default_factory=list)

    def ask(self, shard: Remote) -> None:
        self.names.append(shard.at)


def test_as_much_is_asked_for_ahead_as_three_quarters_of_the_room_hold():
    """Steps need shards a a b c d e..., each of 10 bytes; of a room of 40, 30 are for what is ahead."""
    shards = {name: Remote(name, 10, "", print) for name in "abcdefgh"}
    cache, needed = Asked(40), ["a", "a", "b", "c", "d", "e", "f", "g", "h"]
    ahead = Ahead(cache, lambda step: [shards[needed[step % 9]]], every=8)
    told = []
    for step in (0, 1, 2, 3, 7, 2):  # one after the other, further on, and back
        cache.names.clear()
        ahead.move(step)
        told.append("".join(cache.names))
    assert told == ["abc", "", "d", "e", "gha", "bcd"]
    small = Asked(10**6)
    Ahead(small, lambda step: [shards[needed[step % 9]]], every=8).move(0)
    assert "".join(small.names) == "abcdefgh"  # all there are, once


def test_shards_are_there_before_they_are_needed(url, tmp_path):
    remote = opened(url, tmp_path / "cache", shards=6)
    mixture = Mixture((remote,), window=2)
    stream, order = Stream(mixture, seed=1, batch=1, micro_batch=1, workers=1), Order(mixture, 1, 1)
    stream.step(0)
    soon = {remote.locate(order[p].index)[0] for p in range(7)}
    deadline = time.monotonic() + 20
    wanted = {tmp_path / "cache" / f"{remote.remote(n).name}.tar" for n in soon}
    while not all(p.is_file() for p in wanted) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(soon) == 4 and all(p.is_file() for p in wanted)
    stream.close()


# ------------------------------------------------------------------------------------- several ranks, kill -9


def test_ranks_and_jobs_share_a_folder(url, tmp_path, watched):
    """Four caches, as those of four processes, with room for two shards: all read all, and the bound holds."""
    caches = [opened(url, tmp_path / "cache", shards=2, pauses=()) for _ in range(4)]
    found: list[list[str]] = [[] for _ in caches]

    def read(which: int) -> None:
        for n in range(N):
            found[which].append(caches[which].sample((5 * n * (which + 1) + which) % N).key)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[f"s{(5 * n * (w + 1) + w) % N:04d}" for n in range(N)] for w in range(4)]
    assert max(watched) <= caches[0].cache.room
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".claim", ".part")]


def test_two_who_want_one_shard_download_it_once(url, tmp_path, server):
    caches = [opened(url, tmp_path / "cache") for _ in range(3)]
    server.gets.clear()
    threads = [threading.Thread(target=c.cache.get, args=(c.remote(4),)) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert server.gets["000-000004.tar"] == 1


def test_a_killed_reader_is_taken_over_from(url, tmp_path, server, monkeypatch):
    """Killed with a claim held and half a shard on the disk."""
    monkeypatch.setattr("v4e.data.cache.CHUNK", 4000)
    stuck, remote = threading.Event(), opened(url, tmp_path / "cache", shards=1)
    server.faults["000-000005.tar"] = [_through, _through, lambda *words: stuck.wait(60) and broken(*words)]
    if not (child := os.fork()):
        remote.cache.get(remote.remote(5))
        os._exit(1)
    part = tmp_path / "cache" / f"{remote.remote(5).name}.part"
    while server.gets["000-000005.tar"] < 3:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    stuck.set()
    assert part.is_file() and taken(tmp_path / "cache") == remote.remote(5).size  # its claim still counts
    other = opened(url, tmp_path / "cache", shards=1)
    assert other.sample(10).key == "s0010"  # of shard 5
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {"", ".tar"}


def _through(app: Callable, environ: dict, start: Callable) -> Answer:
    return app(environ, start)


# --------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", [broken, cut, flipped], ids=["500", "cut short", "flipped"])
def test_faults_that_pass_are_waited_out(url, tmp_path, server, fault):
    remote = opened(url, tmp_path / "cache")
    server.faults["000-000002.tar"] = [fault] * (1 if fault is flipped else 3)
    assert remote.cache.get(remote.remote(2)).read_bytes() == read_bytes(place(url) / "000-000002.tar")
    assert remote.sample(4).key == "s0004"


@pytest.mark.parametrize(
    ("fault", "why"), [(broken, "cannot be read: "), (cut, "cannot be reached: ")], ids=["500", "cut short"]
)
def test_a_shard_that_cannot_be_had_is_named(url, tmp_path, server, fault, why):
    """Its samples are quarantined with the reason, and the store is not asked again for each of them."""
    remote = opened(url, tmp_path / "cache", shards=N)
    server.faults["000-000002.tar"] = [fault] * 1000
    stream = Stream(remote, seed=0, batch=N, micro_batch=N, workers=2)
    (piece,) = stream.step(0)
    stream.close()
    assert {s.key for s, w in zip(piece.samples, piece.weights, strict=True) if not w} == {"s0004", "s0005"}
    assert stream.quarantined.keys() == {"s0004", "s0005"}
    assert all(f"000-000002.tar: {why}" in told for told in stream.quarantined.values())
    assert server.gets["000-000002.tar"] <= 2 * (len(QUICK) + 1)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".claim", ".part")]


def test_a_disk_that_fills_up_costs_the_shards_samples(url, tmp_path, monkeypatch):
    remote, copied = opened(url, tmp_path / "cache", shards=N), ShardCache._copy

    def copy(self, shard: Remote, part: Path) -> None:
        if shard.at.name == "000-000002.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        copied(self, shard, part)

    monkeypatch.setattr(ShardCache, "_copy", copy)
    stream = Stream(remote, seed=0, batch=N, micro_batch=N, workers=2)
    (piece,) = stream.step(0)
    stream.close()
    assert {s.key for s, w in zip(piece.samples, piece.weights, strict=True) if not w} == {"s0004", "s0005"}
    assert all("the disk is full" in told for told in stream.quarantined.values())
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix in (".claim", ".part")]


def test_room_that_others_have_claimed_is_not_given_twice(url, tmp_path, monkeypatch):
    """A claim takes no blocks of the disk until its shard has come."""
    remote = opened(url, tmp_path, shards=N)
    cache, size = remote.cache, remote.shards[0].bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * size))
    with cache._alone():
        assert cache._make_room(size)
        with open(tmp_path / f"{'0' * 32}.claim", "wb") as claim:
            fcntl.flock(claim, fcntl.LOCK_EX)
            claim.truncate(2 * size + 1)
            with pytest.raises(DataError, match=f"the disk has {size - 1} bytes left, a shard needs {size}"):
                cache._make_room(size)
            (tmp_path / f"{'0' * 32}.part").write_bytes(b"1")  # what has come is no longer of the free bytes
            assert cache._make_room(size)


def test_a_missing_shard_is_named_at_once(server, tmp_path):
    write("s3://bucket/gone", n=4, per_shard=EACH)
    remote = opened("s3://bucket/gone", tmp_path / "cache", pauses=(60.0,))
    system(place("s3://bucket/gone")).rm_file("bucket/gone/000-000001.tar")
    with pytest.raises(DataError, match="s3://bucket/gone/000-000001.tar: cannot be read"):
        remote.sample(2)


def test_a_truncated_object_is_named(server, tmp_path):
    """One that the listing showed whole when the run began."""
    write("s3://bucket/torn", n=4, per_shard=EACH)
    remote, at = opened("s3://bucket/torn", tmp_path / "cache", pauses=()), place("s3://bucket/torn/000-000001.tar")
    at.write_bytes(read_bytes(at)[:3000])
    with pytest.raises(DataError, match=r"torn/000-000001.tar: the shard is cut short: 3000 bytes of \d+"):
        remote.sample(3)
    assert remote.sample(1).key == "s0001"


def test_damage_in_the_store_costs_one_sample(server, tmp_path):
    """A shard that is twice downloaded with the same fault is kept, and the sample found when it is read."""
    local = write(tmp_path / "local", n=4, per_shard=EACH)
    tar = local.folder / "000-000001.tar"
    flip(tar, Index(index_path(tar)).member(1, "encoded.safetensors").offset + 200)
    there = system(place("s3://bucket/x"))
    for path in local.folder.iterdir():
        there.put_file(str(path), f"bucket/bad/{path.name}")
    stream = Stream(opened("s3://bucket/bad", tmp_path / "cache"), seed=0, batch=4, micro_batch=4)
    (piece,) = stream.step(0)
    stream.close()
    assert sum(piece.weights) == 3 and stream.quarantined.keys() == {"s0003"}
    assert "000-000001.tar, key s0003.encoded.safetensors: its bytes" in stream.quarantined["s0003"]
    assert server.gets["000-000001.tar"] == 2


def test_a_store_that_fails_for_a_moment_loses_no_sample_without_a_cache(url, server, monkeypatch):
    monkeypatch.setattr("v4e.data.index.patiently", partial(patiently, pauses=QUICK))
    stream = Stream(url, seed=0, batch=N, micro_batch=N)
    server.faults["000-000002.tar"] = [broken, broken]
    (piece,) = stream.step(0)
    stream.close()
    assert set(piece.weights) == {1.0} and not stream.quarantined


SERVER = """
    import logging, signal
    logging.disable()  # nobody reads what it says, and a full pipe would stop it
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    signal.pause()
"""


@pytest.mark.slow
def test_memory_stays_flat_through_a_cache(server, tmp_path, monkeypatch):
    """Two thousand steps, each of which downloads and evicts; the store is another process."""
    there = run_python(SERVER)
    with bucket(int(there.stdout.readline())):
        write("s3://bucket/set", n=N, per_shard=EACH)
        stream = Stream(Mixture((opened("s3://bucket/set", tmp_path),), window=2), seed=0, batch=2, micro_batch=2)
        held = []
        for step in range(2000):
            (piece,) = stream.step(step)
            assert piece.weights == (1.0, 1.0)
            held.append(resident("VmRSS") / 1e6)
        stream.close()
    there.kill()
    there.communicate()
    peaks = [max(held[n : n + 50]) for n in range(500, 2000, 50)]
    growth = float(np.polyfit(range(len(peaks)), peaks, 1)[0]) * 20
    print(f"{growth:.2f} MB in 1,000 steps")
    assert growth < 1


def test_the_sets_of_these_tests_are_of_use(url):
    """Shards are alike in size, so that rooms can be told in shards."""
    sizes = [s.bytes for s in ShardSet.open(url).shards]
    assert len(sizes) == N // EACH and max(sizes) < 1.5 * min(sizes)
