"""Where each member of a shard lies, and reading members so that no damage passes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from xxhash import xxh3_128_digest

from v4e.data.disk import digest_of, readable
from v4e.data.members import MEMBERS, check_key
from v4e.data.places import Place, announce, is_remote, patiently, read_bytes, read_range
from v4e.errors import DataError

REDO = "copy it again, or delete this shard, its index and manifest.json and run the command that wrote the set again"
GAP = {False: 1 << 16, True: 1 << 20}  # bytes that are rather read than skipped, on a disk and over a network
P = TypeVar("P", Path, Place)
_COLUMN = {kind: column for column, kind in enumerate(MEMBERS)}


def index_path(tar: P) -> P:
    """Where a shard's index lies."""
    return tar.with_suffix(".index.json")


@dataclass(frozen=True)
class Member:
    """A file inside a tar: where its content begins, how long it is, blake2b and xxh3 of it (16 bytes each).

    The first pins it, the second finds accidents at memory's speed; sets older than it have none.
    """

    offset: int
    size: int
    hash: bytes
    quick: bytes | None = None


class Index:
    """Where each member of one shard lies; held as arrays, about 350 bytes a sample.

    Args:
        path: of the index file.
        content: of the file, where it was read already.

    Raises:
        DataError: unreadable, or it names a key or a kind of member that cannot be.
    """

    def __init__(self, path: Place, content: bytes | None = None) -> None:
        self.where = str(path)
        content = read_bytes(path) if content is None else content
        with readable(self.where):
            body = json.loads(content)
            rows, self.bytes = body["samples"], int(body["bytes"])
            self.keys = [str(key) for key, _ in rows]
            at = _columns(rows)
            found = [member for _, members in rows for member in members.values()]
            where = tuple(np.array(at, dtype=np.intp).reshape(-1, 2).T)
            self._place = np.full((len(rows), len(MEMBERS), 2), -1, dtype=np.int64)
            self._place[where] = np.array([m[:2] for m in found], dtype=np.int64).reshape(-1, 2)
            self._hash = _scattered([digest for _, _, digest in found], where, len(rows))
            self._quick = _scattered(body["quick"], where, len(rows)) if "quick" in body else None
        for key in self.keys:
            check_key(key, self.where)

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, row: int, kind: str) -> Member | None:
        """Where the row's member of this kind lies; None when the sample has none."""
        return self.members(row, (kind,)).get(kind)

    def members(self, row: int, kinds: Sequence[str] = MEMBERS) -> dict[str, Member]:
        """The members of these kinds that a row has, in the order they lie in the tar."""
        places, strong = self._place[row].tolist(), self._hash[row].tobytes()
        quick = None if self._quick is None else self._quick[row].tobytes()
        found = {}
        for kind in kinds:
            offset, size = places[column := _COLUMN[kind]]
            if offset >= 0:
                digest = slice(16 * column, 16 * column + 16)
                found[kind] = Member(offset, size, strong[digest], quick and quick[digest])
        return found


def read_members(path: Place, where: str, wanted: Mapping[str, Member], strong: bool) -> dict[str, memoryview]:
    """The members of one sample, in as few reads as their places allow."""
    found = {}
    for run in _runs(list(wanted.items()), GAP[is_remote(path)]):
        start, end = run[0][1].offset, run[-1][1].offset + run[-1][1].size
        try:
            content = patiently(partial(read_range, path, start, end - start))
        except DataError as error:
            raise type(error)(error.what, where=f"{where}.{run[0][0]}", fix=error.fix) from error
        for kind, m in run:
            part = content[m.offset - start : m.offset - start + m.size]
            found[kind] = _checked(part, m, strong, f"{where}.{kind}")
    return found


def announce_members(path: Place, wanted: Mapping[str, Member]) -> None:
    """Say that these members are read soon."""
    for run in _runs(list(wanted.items()), GAP[is_remote(path)]):
        announce(path, run[0][1].offset, run[-1][1].offset + run[-1][1].size - run[0][1].offset)


def check_members(tar: Place, index: Index) -> None:
    """Every member of a shard, as if each sample were read; DataError naming the first that is damaged."""
    for row, key in enumerate(index.keys):
        read_members(tar, f"{tar}, key {key}", index.members(row), strong=False)


def _runs(wanted: Sequence[tuple[str, Member]], gap: int) -> Iterator[list[tuple[str, Member]]]:
    """Members that lie close enough together to be read at once."""
    run: list[tuple[str, Member]] = []
    for kind, member in wanted:
        if run and not 0 <= member.offset - run[-1][1].offset - run[-1][1].size <= gap:
            yield run
            run = []
        run.append((kind, member))
    if run:
        yield run


def _checked(content: memoryview, member: Member, strong: bool, where: str) -> memoryview:
    if len(content) != member.size:
        raise DataError(f"the shard is cut short: {len(content)} of {member.size} bytes", where=where, fix=REDO)
    quick = member.quick and not strong
    if (xxh3_128_digest(content) != member.quick) if quick else (digest_of(content) != member.hash):
        raise DataError("its bytes are not those that were written", where=where, fix=REDO)
    return content


def _columns(rows: Sequence[tuple[str, Mapping]]) -> list[tuple[int, int]]:
    """(row, column) of each member; ValueError naming the sample of one that no sample has."""
    try:
        return [(row, _COLUMN[kind]) for row, (_, members) in enumerate(rows) for kind in members]
    except KeyError as error:
        key = next(key for key, members in rows if members.keys() - _COLUMN.keys())
        raise ValueError(f"key {key} has a member {error}, which no sample has") from error


def _scattered(digests: Sequence[str], where: tuple[np.ndarray, ...], rows: int) -> np.ndarray:
    """Hex digests of 16 bytes at their (row, column)."""
    table = np.zeros((rows, len(MEMBERS), 16), dtype=np.uint8)
    table[where] = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 16)
    return table
