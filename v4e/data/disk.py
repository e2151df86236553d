"""Files that are seen whole or not at all, and disk troubles in the user's words."""

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from v4e.data.places import (
    Place,
    copy_inside,
    exists,
    fetch,
    is_remote,
    put,
    put_new,
    read_bytes,
    shown,
)
from v4e.errors import DataError, V4EError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp-"  # what a killed writer leaves begins with this


def write_atomically(path: Place, content: bytes, *, durable: bool = True) -> None:
    """Write a file that is seen whole or not at all, even after a power cut unless ``durable`` is false.

    Stores show an object only when it is whole.
    """
    if is_remote(path):
        return put(path, content)
    writer = f"{os.getpid()}-{threading.get_ident()}"  # two may begin one file at once
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{writer}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                settle(file)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)
    return None


def scratch(folder: Place) -> Path:
    """Where files of a folder are begun: in itself; for a URL in a local folder of its own, the same in every run.

    Its place is that of the standard library's temporary files, which TMPDIR moves.

    Raises:
        DataError: somebody else owns it.
    """
    if not is_remote(folder):
        return folder
    local = Path(tempfile.gettempdir()) / f"v4e-{os.getuid()}-{hash_of(str(folder).encode())[:12]}"
    local.mkdir(mode=0o700, exist_ok=True)
    if local.lstat().st_uid != os.getuid() or local.is_symlink():
        raise DataError("belongs to somebody else", where=str(local), fix="set TMPDIR to a folder of yours")
    return local


def publish(target: Place, source: Path | bytes) -> None:
    """Show a finished file under its name; on a store never over another writer's."""
    if is_remote(target):
        put_new(target, source)
    elif isinstance(source, bytes):
        write_atomically(target, source)
    else:
        os.replace(source, target)
        flush(target.parent)


def copy(source: Place, target: Place) -> None:
    """The same bytes under another name, seen whole or not at all; by a link, or inside a store, where that can be.

    Raises:
        DataError: the source cannot be read, or the target cannot be written.
    """
    if is_remote(source) and is_remote(target) and source.protocol == target.protocol:
        return copy_inside(source, target)
    temporary = scratch(target.parent) / f"{TEMPORARY}{target.name}"
    temporary.unlink(missing_ok=True)
    fetch(source, temporary)
    publish(target, temporary)
    temporary.unlink(missing_ok=True)
    return None


def settle(file: IO[bytes]) -> None:
    """Return when what was written is on the disk and not only in memory."""
    file.flush()
    os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Make a file, or the renames in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def share(path: Path) -> None:
    """Let whoever may read a file's folder read the file; safetensors writes it for its owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def agree(path: Place, settings: Mapping[str, object]) -> None:
    """Write settings down when work begins; refuse to go on with others later.

    Raises:
        DataError: they differ; both values of each are named.
    """
    now = json.loads(to_json(settings))
    if not exists(path):
        return publish(path, to_json(now))
    with readable(shown(path)):
        before = json.loads(read_bytes(path))
    if changed := sorted(_differences(before, now)):
        raise DataError(
            f"this folder was begun with other settings: {'; '.join(changed)}",
            where=shown(path),
            fix="go on with the old settings, or write to a new folder",
        )
    return None


def to_json(value: object, indent: int | None = None) -> bytes:
    """Deterministic UTF-8 json."""
    separators = None if indent else (",", ":")
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, allow_nan=False).encode()


def write_lines(path: Place, rows: Iterable[Mapping[str, object]]) -> None:
    """A jsonl file, whole or not at all."""
    write_atomically(path, b"".join(to_json(row) + b"\n" for row in rows))


def digest_of(content: bytes | memoryview) -> bytes:
    """blake2b, 16 bytes: about 1 GB/s on one core, so every read can afford the strong hash."""
    return hashlib.blake2b(content, digest_size=16).digest()


def hash_of(content: bytes) -> str:
    """:func:`digest_of` as 32 hex digits."""
    return digest_of(content).hex()


def lock(path: Path) -> IO[bytes]:
    """Take a lock until the file is closed; the kernel lets it go when its holder is killed.

    Raises:
        DataError: somebody else holds it, or the file system knows no locks.
    """
    file = open(path, "ab")  # noqa: SIM115  (held by the caller)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise DataError("another writer is at work here", where=str(path.parent), fix="wait for it") from error
    except OSError as error:
        file.close()
        fix = "mount it with flock, or take another disk"
        raise DataError(f"cannot be locked: {error.strerror}", where=str(path), fix=fix) from error
    return file


@contextmanager
def writable(path: Place, key: str = "") -> Iterator[None]:
    """A full or failing disk as one DataError that names the file or folder, and the sample that was being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = _is_full(error)
        what = "the disk is full; the file begun is lost, finished ones are safe" if full else f"cannot write: {error}"
        where = f"{shown(path)}, key {key}" if key else shown(path)
        raise DataError(what, where=where, fix="make room and run the same command again" * full) from error


def _is_full(error: Exception) -> bool:
    """Rust's errors, and those that `shutil.copytree` collects, have the number in their words alone."""
    told = [f"[Errno {number}]" for number in NO_ROOM] + [f"(os error {number})" for number in NO_ROOM]
    return getattr(error, "errno", None) in NO_ROOM or any(word in str(error) for word in told)


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Whatever a parser says of broken content, as one DataError that names the file."""
    try:
        yield
    except V4EError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SyntaxError, SafetensorError) as error:
        raise DataError(f"not readable: {type(error).__name__}: {error}", where=where) from error


def _differences(before: object, now: object, at: str = "") -> Iterator[str]:
    """``key was A and is now B`` for every leaf that is not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{at}.{key}".lstrip("."))
    elif before != now:
        yield f"{at} was {before!r} and is now {now!r}"
