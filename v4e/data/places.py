"""Where things lie: a local path, or a URL that fsspec reaches (s3://, gs://, hf://; http(s):// to read).

Both kinds have pathlib's interface, a URL as a ``upath.UPath``, so that names are put together without asking which it
is; bytes are read and written by the functions here alone, which turn whatever a network says into a DataError.
Credentials come from the environment or from fsspec's own configuration, never from a URL, and are never written down.
"""

import errno
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from typing_extensions import TypeIs
from upath import UPath

from v4e.data import buffers
from v4e.errors import DataError, V4EError

BACKENDS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
CREATES = ("s3", "gs")  # stores that refuse, themselves, to write over an object
TOGETHER = 64  # files asked for at once
CHUNK = 1 << 23
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a store is asked again

Place = Path | UPath
T = TypeVar("T")
REFUSED = {*range(400, 500)} - {408, 425, 429}  # what http says of a request that need not be made again


class NotFoundError(DataError):
    """Nothing is there."""


class PassingError(DataError):
    """A network or a store failed in a way that may pass."""


def place(where: str | Place) -> Place:
    """A local path as a Path, a URL as a UPath.

    Raises:
        DataError: a URL of another kind (webdataset's ``pipe:`` would run a shell), or one that carries a password.
    """
    if isinstance(where, UPath):
        return where
    text = str(where).strip()
    if not re.match(r"pipe:|[A-Za-z][\w+.-]*:[:/]", text):
        return Path(where)
    scheme, _, rest = text.partition("://")
    if scheme not in BACKENDS:
        known = ", ".join(f"{name}://" for name in BACKENDS)
        raise DataError("neither a local path nor a URL that v4e reads", where=shown(text), fix=f"use one of {known}")
    if "@" in rest.split("/")[0]:
        raise DataError("a URL must not carry credentials", where=shown(text), fix="set them in the environment")
    with reaching(text):
        return UPath(text.rstrip("/"))


def is_remote(where: Place) -> TypeIs[UPath]:
    """Whether it is reached over a network."""
    return not isinstance(where, Path)


def shown(where: object) -> str:
    """A path, URL or message as it may be logged: without passwords and signed queries."""
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1?...", re.sub(r"://[^/\s@]*@", "://...@", str(where)))


@contextmanager
def reaching(where: object, doing: str = "read") -> Iterator[None]:
    """Whatever a disk, a store or its library says, as one DataError; FileExistsError is for the caller to judge.

    Backends raise what they like, from botocore's to aiohttp's own, so nothing narrower than Exception would do.
    """
    try:
        yield
    except (V4EError, FileExistsError):
        raise
    except Exception as error:
        raise _in_words(error, where, doing) from error


def _in_words(error: Exception, where: object, doing: str) -> DataError:
    at, scheme = shown(where), str(where).partition("://")[0]
    if isinstance(error, ImportError):
        package = BACKENDS.get(scheme, scheme)
        return DataError(f"{scheme}:// needs {package}", where=at, fix=f"pip install {package}")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"cannot be {doing}: {_said(error)}", where=at)
    if isinstance(error, PermissionError):
        return DataError(f"access is denied: {_said(error)}", where=at, fix=_access(scheme))
    if isinstance(error, OSError):
        passes = scheme in BACKENDS and error.errno != errno.EINVAL  # EINVAL: no such range
        return (PassingError if passes else DataError)(f"cannot be {doing}: {_said(error)}", where=at)
    kind = DataError if getattr(error, "status", None) in REFUSED else PassingError
    return kind(f"cannot be reached: {_said(error)}", where=at, fix=_access(scheme))


def patiently(work: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
    """What a network may fail at, tried again after longer and longer pauses, no two processes at the same instant.

    Raises:
        DataError: it failed each time, or in a way that does not pass; or the program is ending, and nobody waits.
    """
    for pause in pauses:
        refuse_at_exit()
        try:
            return work()
        except PassingError:
            time.sleep(pause * random.uniform(0.5, 1.5))
    return work()


def refuse_at_exit() -> None:
    """DataError in a thread that outlives the program's own: it would keep the process from ending."""
    if not threading.main_thread().is_alive():
        raise DataError("the program ends")


def read_bytes(where: Place) -> bytes:
    """A file's content; DataError when it cannot be read."""
    with reaching(where):
        return system(where).cat_file(where.path) if is_remote(where) else where.read_bytes()


def opened(where: Place) -> IO[bytes]:
    """A file to read from as it is needed; DataError when it is not there."""
    with reaching(where):
        return cast(IO[bytes], system(where).open(where.path, "rb") if is_remote(where) else open(where, "rb"))


def read_range(where: Place, offset: int, size: int) -> memoryview:
    """A part of a file, shorter where the file ends, which the caller may write to; DataError when it cannot be read.

    Locally pread and not mmap: a file cut short while mapped kills the process instead of raising an error.
    """
    with reaching(where):
        if is_remote(where):
            return memoryview(bytearray(_remote_range(where, offset, size)))
        content = buffers.take(size)
        file = os.open(where, os.O_RDONLY)
        try:
            return content[: os.preadv(file, [content], offset)]
        finally:
            os.close(file)


def announce(where: Place, offset: int, size: int) -> None:
    """Let the kernel fetch from a disk what is read soon: exactly that, without anybody waiting for it."""
    if is_remote(where):
        return
    with reaching(where):
        file = os.open(where, os.O_RDONLY)
        try:
            os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def read_many(places: Iterable[Place]) -> Iterator[bytes]:
    """The contents of many small files in order, from a store many at a time."""
    rest = iter(places)
    while batch := list(islice(rest, TOGETHER)):
        yield from _read_together([p for p in batch if is_remote(p)]) if is_remote(batch[0]) else map(read_bytes, batch)


def exists(where: Place) -> bool:
    """Whether a file or folder is there."""
    with reaching(where):
        return _asked_anew(where).exists(where.path) if is_remote(where) else where.exists()


def sizes(folder: Place) -> dict[str, int]:
    """Names and sizes of a folder's files, from one listing; nothing where there is no folder.

    Raises:
        DataError: the store, or its bucket, cannot be reached; http(s) has no listings.
    """
    if not listable(folder):
        raise DataError("http(s) has no listings", where=shown(folder), fix="copy the folder to a disk or a store")
    try:
        with reaching(folder):
            if is_remote(folder):
                entries = _asked_anew(folder).ls(folder.path, detail=True)
                return {_name(e["name"]): e["size"] for e in entries if e["type"] == "file"}
            return dict(_local_sizes(cast(Path, folder)))
    except NotFoundError:
        return {}


def _local_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process renamed or removed it since it was listed
                if entry.is_file():
                    yield entry.name, entry.stat().st_size


def names(folder: Place) -> set[str]:
    """Names in a folder, from one listing that looks at no file; nothing where there is no folder."""
    if is_remote(folder):
        return set(sizes(folder))
    with reaching(folder):
        return set(os.listdir(folder)) if folder.is_dir() else set()


def listable(where: Place) -> bool:
    """Whether it can be asked what a folder holds."""
    return not is_remote(where) or where.protocol not in ("http", "https")


def make_folder(folder: Place) -> None:
    """A folder to write into; stores have none to make, and must hold the bucket already.

    Raises:
        DataError: http(s), which is only read.
    """
    if not listable(folder):
        raise DataError("http(s):// can be read but not written", where=shown(folder), fix="write to a disk or a store")
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def put(where: UPath, content: bytes) -> None:
    """Write an object, over an older one; seen whole or not at all."""
    with reaching(where, "written"):
        system(where).pipe_file(where.path, content)


def put_new(where: UPath, source: Path | bytes) -> None:
    """Upload, but never over other content: what stands where a store knows no locks.

    Raises:
        DataError: something else has this name already.
    """
    try:
        with reaching(where, "written"):
            _create(where, source)
    except FileExistsError as error:
        if not _holds(where, source):  # a request repeated after a lost answer meets its own object
            raise DataError(
                "another writer has made this file", where=shown(where), fix="let one process alone write a part"
            ) from error


def fetch(source: Place, target: Path) -> None:
    """A file onto this disk: a link where there can be one, else every byte."""
    with reaching(source):
        if is_remote(source):
            return system(source).get_file(source.path, str(target))
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return None


def copy_inside(source: UPath, target: UPath) -> None:
    """Let a store copy an object; no byte passes this machine."""
    with reaching(source, "copied"):
        system(source).cp_file(source.path, target.path)


def remove(where: Place) -> None:
    """Delete a file if it is there."""
    if not is_remote(where):
        return where.unlink(missing_ok=True)
    with reaching(where):
        if system(where).exists(where.path):
            system(where).rm_file(where.path)
    return None


def system(where: UPath) -> Any:
    """The connection to a store, whose methods are made at run time; one a process, for they do not outlive a fork."""
    return _connected(where.protocol, os.getpid())


def _asked_anew(where: UPath) -> Any:
    """A connection that has forgotten what a folder held: the Hub's keeps listings whatever it is told."""
    (there := system(where)).invalidate_cache(where.path)
    return there


@lru_cache(maxsize=8)
def _connected(protocol: str, _pid: int) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)


def _remote_range(where: UPath, offset: int, size: int) -> bytes:
    content = system(where).cat_file(where.path, start=offset, end=offset + size)
    if len(content) > size:
        raise DataError("the server sends whole files when asked for a part", where=shown(where), fix="copy the set")
    return content


def _read_together(places: Sequence[UPath]) -> Iterator[bytes]:
    with reaching(places[0].parent):
        there = system(places[0])
        found = there.cat([p.path for p in places], on_error="return")
    for at in places:
        with reaching(at):
            if isinstance(content := found[there._strip_protocol(at.path)], Exception):
                raise content
            yield content


def _create(where: UPath, source: Path | bytes) -> None:
    there = system(where)
    mode = "create" if where.protocol in CREATES else "overwrite"
    if mode == "overwrite" and there.exists(where.path):
        raise FileExistsError(shown(where))
    if isinstance(source, bytes):
        there.pipe_file(where.path, source, mode=mode)
    else:
        there.put_file(str(source), where.path, mode=mode)


def _holds(where: UPath, source: Path | bytes) -> bool:
    """Whether the object is what was to be written."""
    if isinstance(source, bytes):
        return read_bytes(where) == source
    size = source.stat().st_size
    starts = range(0, size, CHUNK)
    with reaching(where):
        return system(where).size(where.path) == size and all(
            read_range(source, at, CHUNK) == read_range(where, at, min(CHUNK, size - at)) for at in starts
        )


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _said(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text if isinstance(error, OSError) else f"{type(error).__name__}: {text}")


def _access(scheme: str) -> str:
    known = {"s3": "AWS_PROFILE or AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS", "hf": "HF_TOKEN"}
    return f"set {known[scheme]} in the environment" if scheme in known else "check the address"
