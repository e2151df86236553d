"""Shards of a store on this machine's disk: whole ones, a bounded number of bytes, shared by any ranks and jobs.

A shard is *claimed* by a file of its size, locked by whoever downloads it: that the kernel lets go of the lock when its
holder is killed is all there is to recover from. It appears under its name when it is whole; the least recently used
make room. Who reads a shard that another process evicts goes on reading, or fetches it again.
"""

import fcntl
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import IO, TypeVar

from upath import UPath

from v4e.data.disk import hash_of, settle, writable
from v4e.data.index import REDO
from v4e.data.places import CHUNK, PAUSES, NotFoundError, PassingError, patiently, read_range, refuse_at_exit
from v4e.errors import ConfigError, DataError

OURS = re.compile(r"[0-9a-f]{32}\.(tar|claim|part)")  # nothing else in the folder is counted or touched
POLL = 0.05  # seconds between looks at what another process is downloading
REMEMBERED = 60.0  # seconds for which a shard that could not be had is not asked for again
EVICTED = 5  # times that a shard may be evicted between its arrival and its use
DOWNLOADS = 4  # at once, in the background
FURTHEST = 2000  # steps that are looked ahead
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Remote:
    """A shard on a store.

    Args:
        at: its address.
        size: in bytes, from the manifest.
        version: changes when its bytes do: the hash of its index.
        check: DataError where a downloaded copy is not what the index says.
    """

    at: UPath
    size: int
    version: str
    check: Callable[[Path], None]

    @cached_property
    def name(self) -> str:
        """What its copy is called, less the ending."""
        return hash_of(f"{self.at} {self.version} {self.size}".encode())


class ShardCache:
    """A folder of downloaded shards.

    Args:
        folder: made when missing; other files in it are left alone.
        room: bytes that its shards, whole and in the making, may take.
        pauses: seconds before each new attempt.

    Raises:
        ConfigError: no room is given.
    """

    def __init__(self, folder: str | Path, room: int, pauses: Sequence[float] = PAUSES) -> None:
        if room < 1:
            raise ConfigError(f"a cache of {room} bytes", where="loop.disk_cache_bytes", fix="say how many it may hold")
        self.folder, self.room = Path(folder), room
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pauses = pauses
        self._failed: dict[str, tuple[float, DataError]] = {}
        self._asked: dict[str, Future[Path]] = {}
        self._lock = Lock()  # of _asked
        self._downloads = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="v4e-cache")
        with self._alone():
            self._sweep()

    def ask(self, shard: Remote) -> None:
        """Download in the background what will be needed soon; what goes wrong is said when it is."""
        with self._lock:
            for name in [name for name, future in self._asked.items() if future.done()]:
                del self._asked[name]
            if shard.name not in self._asked:
                self._asked[shard.name] = self._downloads.submit(self.get, shard)

    def use(self, shard: Remote, work: Callable[[Path], Answer]) -> Answer:
        """What ``work`` makes of the shard's copy.

        Raises:
            DataError: the shard cannot be had, or ``work`` says so.
        """
        for _ in range(EVICTED):
            copy = self.get(shard)
            try:
                return work(copy)
            except NotFoundError:
                continue  # another process has evicted it meanwhile
        raise DataError("is evicted before it can be read", where=str(shard.at), fix="enlarge loop.disk_cache_bytes")

    def get(self, shard: Remote) -> Path:
        """The shard's copy, downloaded first where there is none; marked as used now.

        Raises:
            DataError: it cannot be had, for the reason said; for a minute no further attempt is made.
        """
        copy = self.folder / f"{shard.name}.tar"
        while not _touched(copy):
            refuse_at_exit()
            self._refuse_failed(shard)
            claim = self._claim(shard)
            if claim is None:
                time.sleep(POLL)
                continue
            with claim:
                self._download(shard, copy)
        return copy

    def close(self) -> None:
        """Begin no further download."""
        self._downloads.shutdown(wait=True, cancel_futures=True)

    def _refuse_failed(self, shard: Remote) -> None:
        when, error = self._failed.get(shard.name, (0.0, None))
        if error and time.monotonic() - when < REMEMBERED:
            raise error

    def _claim(self, shard: Remote) -> IO[bytes] | None:
        """The right to download a shard, and the room; None where another has it, or as long as there is no room.

        Raises:
            DataError: it is larger than the cache, or than what is left of the disk.
        """
        if shard.size > self.room:
            what = f"a shard of {shard.size} bytes does not fit into a cache of {self.room}"
            raise DataError(what, where=str(shard.at), fix="enlarge loop.disk_cache_bytes")
        with self._alone(), ExitStack() as undo:
            path = self.folder / f"{shard.name}.claim"
            claim = _locked(path)
            if claim is None:
                return None
            undo.callback(_give_up, claim)
            if _touched(path.with_suffix(".tar")) or not self._make_room(shard.size):
                return None
            claim.truncate(shard.size)
            undo.pop_all()
            return claim

    def _make_room(self, size: int) -> bool:
        """Whether there is room for so many bytes now; the least recently used copies give way."""
        self._sweep()
        held = sorted(self._held(), key=lambda entry: entry[1].st_mtime_ns)
        taken = sum(status.st_size for _, status in held)
        for path, status in held:
            if taken + size <= self.room:
                break
            if path.suffix == ".tar":
                path.unlink()
                taken -= status.st_size
        claims = {path: status.st_size for path, status in held if path.suffix == ".claim"}
        coming = sum(claimed - _size(path.with_suffix(".part")) for path, claimed in claims.items())
        if taken + size <= self.room and (free := shutil.disk_usage(self.folder).free - coming) < size:
            raise DataError(f"the disk has {free} bytes left, a shard needs {size}", where=str(self.folder))
        return taken + size <= self.room

    def _held(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Copies, and claims, which are as large as the copies they will become."""
        for entry in os.scandir(self.folder):
            if OURS.fullmatch(entry.name) and not entry.name.endswith(".part"):
                yield Path(entry.path), entry.stat()

    def _sweep(self) -> None:
        """Remove what killed processes left: claims that nobody holds."""
        for path in [path for path, _ in self._held() if path.suffix == ".claim"]:
            if claim := _locked(path):
                path.with_suffix(".part").unlink(missing_ok=True)
                _give_up(claim)

    def _download(self, shard: Remote, copy: Path) -> None:
        part, whole = copy.with_suffix(".part"), False
        try:
            self._fill(shard, part)
            whole = True
        except DataError as error:
            self._failed[shard.name] = time.monotonic(), error
            raise
        finally:
            with self._alone():
                if whole:
                    os.replace(part, copy)
                part.unlink(missing_ok=True)
                copy.with_suffix(".claim").unlink()

    def _fill(self, shard: Remote, part: Path) -> None:
        """Every byte, once more where they are not those that were written.

        A second copy with the same fault is kept: the shard itself has it, and each sample is checked when it is read.
        """
        for last in (False, True):
            with writable(part):
                self._copy(shard, part)
            try:
                return shard.check(part)
            except DataError:
                if last:
                    return None
        return None

    def _copy(self, shard: Remote, part: Path) -> None:
        with open(part, "wb") as file:
            for at in range(0, shard.size, CHUNK):
                size = min(CHUNK, shard.size - at)
                file.write(patiently(partial(_chunk, shard, at, size), self._pauses))
            settle(file)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread, process or job changes what the folder holds meanwhile."""
        with open(self.folder / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Ahead:
    """Asks for shards before they are needed: as far ahead as the shards that are needed until then fill the room.

    Args:
        cache: where they are to be.
        needed: the shards that a step of this rank needs.
        every: how many shards there are at all.
    """

    def __init__(self, cache: ShardCache, needed: Callable[[int], Iterable[Remote]], every: int) -> None:
        self._cache, self._needed, self._every = cache, needed, every
        self._room = cache.room * 3 // 4  # the rest is for what other ranks are at
        self._restart(0)

    def move(self, step: int) -> None:
        """This step is next."""
        if not self._first <= step <= self._first + len(self._steps):
            self._restart(step)
        while self._first < step:
            self._leave()
        while self._bytes < self._room and len(self._uses) < self._every and len(self._steps) < FURTHEST:
            self._enter()

    def _restart(self, step: int) -> None:
        self._first, self._bytes = step, 0
        self._steps: deque[list[Remote]] = deque()
        self._uses: Counter[str] = Counter()

    def _enter(self) -> None:
        shards = list(self._needed(self._first + len(self._steps)))
        self._steps.append(shards)
        for shard in shards:
            if not self._uses[shard.name]:
                self._bytes += shard.size
                self._cache.ask(shard)
            self._uses[shard.name] += 1

    def _leave(self) -> None:
        for shard in self._steps.popleft():
            self._uses[shard.name] -= 1
            if not self._uses[shard.name]:
                del self._uses[shard.name]
                self._bytes -= shard.size
        self._first += 1


def _chunk(shard: Remote, at: int, size: int) -> memoryview:
    content = read_range(shard.at, at, size)
    if len(content) < size:
        what = f"the shard is cut short: {at + len(content)} bytes of {shard.size}"
        raise PassingError(what, where=str(shard.at), fix=REDO)
    return content


def _touched(path: Path) -> bool:
    """Whether it is there; if so, it counts as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _give_up(claim: IO[bytes]) -> None:
    """Take a claim away and let its lock go; only where nobody else can be claiming."""
    Path(claim.name).unlink()
    claim.close()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _locked(path: Path) -> IO[bytes] | None:
    """A file made or opened and locked; None where another holds its lock."""
    file = open(path, "ab")  # noqa: SIM115  (held by the caller)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
