"""The ingested folder: `triplets.jsonl` and its pictures, read and written one row at a time."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from xxhash import xxh3_128_hexdigest

from data_tools.ingest.pictures import Rejected, Size, decode, fit_to
from v4e.data.disk import TEMPORARY, flush, hash_of, lock, readable, scratch, settle, to_json
from v4e.data.places import Place, exists, is_remote, opened, place, reaching, read_bytes, shown, system
from v4e.errors import DataError
from v4e.nouns import Clip

X = TypeVar("X")
Y = TypeVar("Y")
LIST = "triplets.jsonl"
PICTURES = ("source", "edited", "mask")
STATE = ("size", "mtime", "ETag", "etag", "LastModified", "last_modified", "md5Hash", "blob_id")


@dataclass(frozen=True)
class Triplet:
    """A checked edit.

    Args:
        id: legal as a sample's key.
        source, edited: the files as they came; :meth:`read_source` makes them upright RGB of ``size``.
        task: kind of edit; empty until said by the data or by the evolution writer.
        evolution: what happens between the two images; empty until `v4e-shards evolve` has run.
        writer: who wrote ``evolution``, with its version.
        mask: picture of where the edit is, if the data said so.
        extra: what else the row held; carried along, never read.
        stamp: changes when the row or one of its files does.
        size: height and width of its bucket.
        hashes: xxh3 of each picture's bytes, by its name; what was changed since is refused.
        look: perceptual hashes of source and edited image, 16 hex digits each.
        repeats: id of an earlier triplet that is the same, or looks it.
    """

    id: str
    instruction: str
    source: Place
    edited: Place
    task: str = ""
    evolution: str = ""
    writer: str = ""
    mask: Place | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    stamp: str = ""
    size: Size | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    look: str = ""
    repeats: str = ""

    @property
    def files(self) -> dict[str, Place]:
        """The pictures it has, by name."""
        return {name: path for name in PICTURES if (path := getattr(self, name))}

    def read_source(self, size: Size | None = None) -> Clip:
        """The source as an image, scaled and cropped to ``size`` or to its bucket; DataError names key and file."""
        return self._read("source", size)

    def read_target(self, size: Size | None = None) -> Clip:
        """The edited image, likewise."""
        return self._read("edited", size)

    def _read(self, name: str, size: Size | None) -> Clip:
        path = self.files[name]
        where = f"{shown(path)}, key {self.id}"
        try:
            content = read_bytes(path)
        except DataError as error:
            raise type(error)(error.what, where=where, fix=error.fix or "run ingest again") from error.__cause__
        if self.hashes and xxh3_128_hexdigest(content) != self.hashes[name]:
            fix = "run ingest again; a copy that ingest made is to be deleted first"
            raise DataError("the picture has changed since it was ingested", where=where, fix=fix)
        try:
            picture, _ = decode(content, max_pixels=1 << 62)  # its pixels were counted when it was taken
        except Rejected as why:
            raise DataError(f"not readable: {why.detail}", where=where) from why
        wanted = size or self.size
        pixels = np.array(fit_to(picture, wanted) if wanted else picture)
        return Clip(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous())


def iterate(folder: str | Place) -> Iterator[Triplet]:
    """The triplets of an ingested folder one by one, in the order of their source.

    Raises:
        DataError: nothing was ingested there, or a line is damaged; it names the line.
    """
    for line, base, where in _lines(folder):
        yield from_row(line, base, where)


def _lines(folder: str | Place) -> Iterator[tuple[bytes, Place, str]]:
    """The list line by line, each with what its files are relative to, and where it stands."""
    path = place(folder) / LIST
    if not exists(path):
        raise DataError(f"no {LIST}", where=shown(folder), fix="make it with v4e-shards ingest")
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            yield line, path.parent, f"{shown(path)}, line {number}"


def sole_writer(folder: Place) -> IO[bytes]:
    """The one lock of all that rewrite an ingested folder's list, each of which would undo what another wrote.

    Raises:
        DataError: another ingest or evolve is at work there.
    """
    return lock(scratch(folder) / ".triplets.lock")


def write_triplets(folder: str | Place, triplets: Iterable[Triplet]) -> None:
    """Replace the list of an ingested folder at once; ``triplets`` may be read from the old one meanwhile."""
    base = place(folder)
    with replacing(base / LIST) as file:
        for triplet in triplets:
            file.write(to_row(triplet, base))


def verify_triplets(
    folder: str | Place, *, workers: int = 2, watch: Callable[[Iterable], Iterable] = iter
) -> Iterator[str]:
    """Read the list and every byte of every picture again; yields a sentence, with file and key, for each fault.

    Args:
        watch: wraps the lines, for a progress bar.

    Raises:
        DataError: nothing was ingested there.
    """
    seen: set[int] = set()  # hashes of the ids: eight bytes each
    with ThreadPoolExecutor(workers) as pool:
        for read, problems in in_order(pool, _problems, watch(_lines(folder)), 4 * workers):
            if isinstance(read, Triplet) and hash(read.id) in seen:
                problems = [f"{shown(place(folder) / LIST)}, key {read.id}: an earlier line has this id", *problems]
            seen |= {hash(read.id)} if isinstance(read, Triplet) else set()
            yield from problems


def in_order(pool: ThreadPoolExecutor, work: Callable[[X], Y], items: Iterable[X], ahead: int) -> Iterator[Y]:
    """``pool.map`` that draws at most ``ahead`` items before their results are taken."""
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:  # after an error nobody waits for these
            future.cancel()


def from_row(line: bytes, base: Place, where: str) -> Triplet:
    """A triplet of its line, held against its ``check``; DataError names ``where``. Lines of your own need none."""
    with readable(where):
        row = json.loads(line)
        if (check := row.pop("check", "")) and check != hash_of(to_json(row)):
            fix = "take the line out and run ingest again, or take the check out to keep what was changed"
            raise DataError(f"key {row.get('id')}: not the line that was written", where=where, fix=fix)
        files = {k: base / row[k] if row[k] else None for k in PICTURES}
        size = tuple(row["size"]) if row.get("size") else None
        return Triplet(**{**row, **files, "size": size})


def to_row(triplet: Triplet, base: Place) -> bytes:
    """A triplet as its line, files relative to ``base``."""
    files = {k: str(p).removeprefix(f"{base}/") if (p := getattr(triplet, k)) else None for k in PICTURES}
    row = {**vars(triplet), **files}
    return to_json({**row, "check": hash_of(to_json(row))}) + b"\n"


@contextmanager
def replacing(path: Place) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when it is whole and on the disk.

    Raises:
        DataError: on a store, where no lock is seen by all machines: another writer has replaced it meanwhile.
    """
    temporary, before = scratch(path.parent) / f"{TEMPORARY}{path.name}-{os.getpid()}", _state(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            settle(file)
        _move(temporary, path, before)
    finally:
        temporary.unlink(missing_ok=True)


def _move(temporary: Path, path: Place, before: str) -> None:
    if is_remote(path):
        if _state(path) != before:
            fix = "run the same command again; nothing that was finished is lost"
            raise DataError("another writer has replaced it meanwhile", where=shown(path), fix=fix)
        with reaching(path, "written"):
            return system(path).put_file(str(temporary), path.path)
    os.replace(temporary, path)
    return flush(path.parent)


def _state(path: Place) -> str:
    """Of an object on a store, what changes when it is replaced."""
    if not is_remote(path) or not exists(path):
        return ""
    with reaching(path):
        return repr({key: value for key, value in system(path).info(path.path).items() if key in STATE})


def _problems(line: tuple[bytes, Place, str]) -> tuple[Triplet | None, list[str]]:
    """The triplet of a line, if it is one, and what is wrong with it."""
    try:
        triplet = from_row(*line)
    except DataError as error:
        return None, [str(error)]
    return triplet, _faults(triplet)


def _faults(triplet: Triplet) -> list[str]:
    found = []
    for name, path in triplet.files.items():
        try:
            changed = xxh3_128_hexdigest(read_bytes(path)) != triplet.hashes.get(name)
            wrong = "changed since it was taken" if changed and triplet.hashes else ""
        except DataError as error:
            wrong = error.what
        if wrong:
            found.append(f"{shown(path)}, key {triplet.id}: {wrong}")
    return found
