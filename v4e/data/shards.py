"""Shards: samples in tar files that stock webdataset opens, written so that a crash can lose work but never spoil it.

A folder holds, for each shard, ``NAME.tar``, ``NAME.index.json`` (where each member lies, its size and its hash) and
``NAME_stats.json``; ``settings.json`` says what the set was begun with, and ``manifest.json``, written last, says that
it is whole. The hashes form a chain: manifest -> index -> member. ``docs/shards.md`` has the format in full.
"""

import json
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from v4e.data.disk import (
    TEMPORARY,
    agree,
    digest_of,
    hash_of,
    lock,
    plain_folder,
    read_bytes,
    readable,
    settle,
    to_json,
    writable,
    write_atomically,
)
from v4e.data.members import MEMBERS, PICTURES, check_key, pack, unpack
from v4e.errors import ConfigError, DataError
from v4e.nouns import Grid, Sample

FORMAT = 1
SHARD = re.compile(r"\d{3,}-\d{6,}\.tar")
BLOCK = tarfile.BLOCKSIZE
_REDO = "copy it again, or delete this shard, its index and manifest.json and run the command that wrote the set again"

Setting = str | int | float | bool


@dataclass(frozen=True)
class SetMeta:
    """What a set is, and the settings it was made with; equal settings are what lets a writer go on.

    Args:
        kind: what the samples carry, such as ``rollout`` or ``pretrain``.
        student: grid of ``Encoded.clip_Cthw``.
        teacher: grid of the teacher's clip; None where there is no teacher.
        settings: everything else that changes a sample's bytes.
    """

    kind: str
    student: Grid
    teacher: Grid | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def settings_hash(self) -> str:
        """Sixteen hex digits that change when anything here does."""
        return hash_of(to_json(self.to_dict()))[:16]

    def to_dict(self) -> dict[str, object]:
        """Plain values, for json."""
        return {**asdict(self), "settings": dict(self.settings)}

    @staticmethod
    def from_dict(values: Mapping, where: str) -> "SetMeta":
        """Inverse of :meth:`to_dict`; DataError when it is not one."""
        with readable(where):
            student, teacher = _grid(values["student"]), values["teacher"]
            return SetMeta(str(values["kind"]), student, teacher and _grid(teacher), dict(values["settings"]))


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the manifest knows it: file name, samples, size in bytes, hash of its index."""

    name: str
    samples: int
    bytes: int
    index: str


@dataclass(frozen=True)
class Member:
    """A file inside a tar: where its content begins, how long it is, blake2b of it (16 bytes)."""

    offset: int
    size: int
    hash: bytes


class Index:
    """Where each member of one shard lies; held as arrays, about 200 bytes a sample.

    Raises:
        DataError: unreadable, or it names a key or a kind of member that cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.where, self.bytes = str(path), 0
        with readable(self.where):
            body = json.loads(read_bytes(path))
            rows, self.bytes = body["samples"], int(body["bytes"])
            self.keys = [str(key) for key, _ in rows]
            self._place = np.full((len(rows), len(MEMBERS), 2), -1, dtype=np.int64)
            self._hash = np.zeros((len(rows), len(MEMBERS), 16), dtype=np.uint8)
            for row, (_, members) in enumerate(rows):
                for kind, (offset, size, digest) in members.items():
                    self._place[row, MEMBERS.index(kind)] = offset, size
                    self._hash[row, MEMBERS.index(kind)] = np.frombuffer(bytes.fromhex(digest), np.uint8)
        for key in self.keys:
            check_key(key, self.where)

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, row: int, kind: str) -> Member | None:
        """Where the row's member of this kind lies; None when the sample has none."""
        column = MEMBERS.index(kind)
        offset, size = self._place[row, column].tolist()
        return None if offset < 0 else Member(offset, size, self._hash[row, column].tobytes())

    def members(self, row: int) -> dict[str, Member]:
        """All members of a row, in the order they lie in the tar."""
        return {kind: m for kind in MEMBERS if (m := self.member(row, kind))}


class ShardWriter:
    """Writes samples into shards, each appearing under its name only when it is whole and on disk.

    Reopening an unfinished folder goes on after its finished shards: ``done`` holds the keys that are safe. Called
    again with the same samples in the same order, less those that are done, it makes the same bytes.

    Use as a context manager: leaving it well writes the manifest, leaving it by an error drops the shard begun.

    Args:
        folder: made when missing.
        meta: what the set is; must equal the one the folder was begun with.
        samples_per_shard: samples after which a shard is finished.
        max_bytes: finish it earlier when it has grown to this size; 0 for never.
        dtype: in which floating-point tensors are stored; noise levels stay fp32.
        part: number of this writer when several write one folder at once; their shards carry it in their names.
        manifest: write the manifest on leaving. Several writers leave it to a last :func:`finish`.

    Raises:
        DataError: other settings, a second writer of the same part, a full disk.
    """

    def __init__(
        self,
        folder: str | Path,
        meta: SetMeta,
        *,
        samples_per_shard: int = 1000,
        max_bytes: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        part: int = 0,
        manifest: bool = True,
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard = {samples_per_shard} must be at least 1")
        self.folder, self.meta, self.dtype, self.part = plain_folder(folder), meta, dtype, part
        self.samples_per_shard, self.max_bytes, self._manifest = samples_per_shard, max_bytes, manifest
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder / f".lock-{part:03d}")
        self._shard: _Shard | None = None
        with self._dropping_on_error():
            layout = {"samples_per_shard": samples_per_shard, "max_bytes": max_bytes, "dtype": str(dtype)}
            agree(self.folder / "settings.json", {**meta.to_dict(), "layout": layout})
            self._finished = set(finished(self.folder))
            self._drop_unfinished()
            self.done = {key for name in self._finished for key in Index(index_path(self.folder / name)).keys}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind:
            self.abandon()
        else:
            self.close()

    def add(self, sample: Sample) -> None:
        """Append a sample; on disk for good only once its shard is finished.

        Raises:
            DataError: its key was written before or is no legal name, a tensor is not finite, the disk is full.
        """
        check_key(sample.key, str(self.folder))
        if sample.key in self.done:
            raise DataError(f"key {sample.key!r} was written before", where=str(self.folder), fix="make the ids unique")
        members = pack(sample, self.dtype)
        with self._dropping_on_error():
            self._shard = self._shard or self._begin()
            self._shard.add(sample.key, sample.task, members)
        self.done.add(sample.key)
        if len(self._shard) >= self.samples_per_shard or 0 < self.max_bytes <= self._shard.size:
            self.flush()

    def flush(self) -> None:
        """Finish the shard begun, if any, whatever its size: its samples are safe afterwards."""
        if self._shard:
            with self._dropping_on_error():
                self._shard.finish()
            self._finished.add(self._shard.path.name)
            self._shard = None

    def close(self) -> None:
        """Finish the last shard and write the manifest."""
        try:
            self.flush()
            if self._manifest:
                finish(self.folder)
        finally:
            self._lock.close()

    def abandon(self) -> None:
        """Drop the shard begun and leave the folder unfinished; finished shards stay."""
        if self._shard:
            self._shard.drop()
            self.done -= set(self._shard.keys)
            self._shard = None
        self._lock.close()

    def _begin(self) -> "_Shard":
        (self.folder / "manifest.json").unlink(missing_ok=True)  # the set is growing: no longer whole
        names = (f"{self.part:03d}-{number:06d}.tar" for number in range(len(self._finished) + 1))
        return _Shard(self.folder / next(name for name in names if name not in self._finished))

    def _drop_unfinished(self) -> None:
        """Remove what a killed writer of this part left: temporary files, and tars whose index never came."""
        for path in self.folder.glob(f"{TEMPORARY}{self.part:03d}-*"):
            path.unlink()
        for path in self.folder.glob(f"{self.part:03d}-*.tar"):
            if path.name not in self._finished:
                path.unlink()
                index_path(path).unlink(missing_ok=True)

    @contextmanager
    def _dropping_on_error(self) -> Iterator[None]:
        """A shard that could not be written whole must not be gone on with."""
        try:
            with writable(self.folder):
                yield
        except BaseException:
            self.abandon()
            raise


def write_shard(path: Path, samples: Iterable[tuple[str, str, Mapping[str, bytes]]], seconds: float = 0.0) -> None:
    """A whole shard of packed samples, each a key, a task and members; ``seconds`` went into making them."""
    shard = _Shard(path, seconds)
    try:
        for key, task, members in samples:
            shard.add(key, task, members)
        shard.finish()
    except BaseException:
        shard.drop()
        raise


class _Shard:
    """One tar being written under a temporary name."""

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        self.path, self.keys, self.size = path, [], 0
        self._rows: list[list[object]] = []
        self._counts, self._tasks = Counter[str](), Counter[str]()
        self._began = time.monotonic() - seconds
        self._temporary = path.with_name(f"{TEMPORARY}{path.name}")
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115  (closed by finish or drop)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: str, task: str, members: Mapping[str, bytes]) -> None:
        row = {kind: self._put(f"{key}.{kind}", content) for kind, content in members.items()}
        self.keys.append(key)
        self._rows.append([key, row])
        self._counts.update(members.keys())
        self._tasks[task] += 1

    def finish(self) -> None:
        """Tar, then index: the index is what says that the shard is whole."""
        self._file.write(bytes(2 * BLOCK))
        self.size += 2 * BLOCK
        settle(self._file)
        self._file.close()
        os.replace(self._temporary, self.path)
        write_atomically(self.path.with_name(f"{self.path.stem}_stats.json"), to_json(self._stats()))
        write_atomically(index_path(self.path), to_json({"format": FORMAT, "bytes": self.size, "samples": self._rows}))

    def drop(self) -> None:
        """Take away all traces; a full disk may also have stopped the index after the tar."""
        with suppress(OSError):  # its buffer may have nowhere to go
            self._file.close()
        for path in (self._temporary, self.path):
            path.unlink(missing_ok=True)

    def _put(self, name: str, content: bytes) -> list[object]:
        header = tarfile.TarInfo(name)  # owner, mode and time keep their defaults: the same samples make the same bytes
        header.size = len(content)
        self._file.write(header.tobuf(tarfile.USTAR_FORMAT))
        self._file.write(content)
        self._file.write(bytes(-len(content) % BLOCK))
        place = self.size + BLOCK
        self.size = place + len(content) + -len(content) % BLOCK
        return [place, len(content), hash_of(content)]

    def _stats(self) -> dict[str, object]:
        seconds = time.monotonic() - self._began
        return {
            "samples": len(self),
            "bytes": self.size,
            "seconds": round(seconds, 3),
            "samples_per_second": round(len(self) / max(seconds, 1e-9), 3),
            "members": dict(sorted(self._counts.items())),
            "tasks": dict(sorted(self._tasks.items())),
        }


def finish(folder: str | Path) -> "ShardSet":
    """Write the manifest over all finished shards of a folder, in the order of their names.

    Raises:
        DataError: nothing was begun there, or two shards hold the same key.
    """
    folder = plain_folder(folder)
    settings = folder / "settings.json"
    if not settings.is_file():
        raise DataError("no set was begun here", where=str(folder), fix="write shards first, with v4e-shards rollout")
    with readable(str(settings)):
        meta = SetMeta.from_dict(json.loads(read_bytes(settings)), str(settings))
    indexes = {name: Index(index_path(folder / name)) for name in finished(folder)}
    refuse_doubles({name: index.keys for name, index in indexes.items()}, folder)
    shards = [ShardInfo(n, len(i), i.bytes, hash_of(read_bytes(index_path(folder / n)))) for n, i in indexes.items()]
    manifest = {
        "format": FORMAT,
        **meta.to_dict(),
        "settings_hash": meta.settings_hash,
        "samples": sum(s.samples for s in shards),
        "shards": [asdict(s) for s in shards],
    }
    with writable(folder):
        write_atomically(folder / "manifest.json", to_json(manifest, indent=1))
    return ShardSet.open(folder)


class ShardSet:
    """A whole set, read at random by offset; holds no open files, so it may cross threads and forks.

    Attributes:
        folder, meta, shards: where it is, what it is, what it is made of.
        keys: every sample's key, in the set's order.
    """

    def __init__(self, folder: Path, meta: SetMeta, shards: Sequence[ShardInfo]) -> None:
        self.folder, self.meta, self.shards = folder, meta, tuple(shards)
        self.indexes = [Index(index_path(folder / s.name)) for s in shards]
        self._starts = np.cumsum([0, *(len(i) for i in self.indexes)])
        self.keys: list[str] = [key for index in self.indexes for key in index.keys]

    @staticmethod
    def open(folder: str | Path, verify: Literal["index", "none"] = "index") -> "ShardSet":
        """Read the manifest and the indexes.

        Args:
            folder: a local folder.
            verify: ``index`` compares each index's hash and each tar's size with the manifest, and refuses a key met
                twice; it reads no sample. ``none`` leaves damage to be found sample by sample.

        Raises:
            DataError: no manifest, another format, a missing, changed or truncated shard.
        """
        folder = plain_folder(folder)
        meta, shards = read_manifest(folder)
        for shard in shards if verify == "index" else ():
            check_shard(folder, shard)
        whole = ShardSet(folder, meta, shards)
        if verify == "index":
            whole.refuse_doubles()
        return whole

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def identity(self) -> str:
        """Sixteen hex digits that change when any byte of the set does: what a checkpoint should remember."""
        return hash_of(to_json([self.meta.settings_hash, [asdict(s) for s in self.shards]]))[:16]

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the shard that holds sample ``i``, and its row there."""
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, i - int(self._starts[shard])

    def place(self, i: int) -> str:
        """Where sample ``i`` is, in words for a message."""
        return f"{self.folder / self.shards[self.locate(i)[0]].name}, key {self.keys[i]}"

    def refuse_doubles(self) -> None:
        """DataError naming a key that two samples share, and their shards."""
        refuse_doubles({s.name: i.keys for s, i in zip(self.shards, self.indexes, strict=True)}, self.folder)

    def kinds(self, i: int) -> list[str]:
        """Kinds of members that sample ``i`` has."""
        shard, row = self.locate(i)
        return list(self.indexes[shard].members(row))

    def raw(self, i: int, kind: str) -> bytes | None:
        """One member's bytes, checked against their hash; None when the sample has no such member.

        Raises:
            DataError: the shard is missing or cut short, or the bytes are not those that were written.
        """
        shard, row = self.locate(i)
        member = self.indexes[shard].member(row, kind)
        return member and _read_member(self.folder / self.shards[shard].name, member, f"{self.place(i)}.{kind}")

    def sample(self, i: int, pictures: bool = False) -> Sample:
        """Read one sample; tensors as they were stored, pictures only when asked for.

        Raises:
            DataError: naming shard and key, when any of the bytes read is damaged.
        """
        kinds = [k for k in MEMBERS if pictures or k not in PICTURES]
        return unpack(self.keys[i], {k: m for k in kinds if (m := self.raw(i, k)) is not None}, self.place(i))


def refuse_doubles(keys: Mapping[str, Sequence[str]], folder: Path) -> None:
    """DataError naming a key that two samples share, and their shards."""
    seen: dict[str, str] = {}
    for shard, names in keys.items():
        for key in names:
            if key in seen:
                raise DataError(f"key {key!r} occurs twice, in {seen[key]} and {shard}", where=str(folder))
            seen[key] = shard


def finished(folder: Path) -> list[str]:
    """Names of the shards that are whole: their index exists and agrees with the tar's size."""
    return sorted(path.name for path in folder.glob("*.tar") if SHARD.fullmatch(path.name) and _is_whole(path))


def _grid(values: Mapping) -> Grid:
    return Grid(values["T"], values["H"], values["W"], tuple(values["stride"]), tuple(values["patch"]))


def read_manifest(folder: Path) -> tuple[SetMeta, list[ShardInfo]]:
    """What a finished folder says it holds.

    Raises:
        DataError: no folder, no manifest, another format, or names that are no shard's.
    """
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise DataError("no such shard folder", where=str(folder), fix="make it with v4e-shards rollout")
    if not path.is_file():
        raise DataError(
            "no manifest.json, the set is unfinished", where=str(folder), fix="run again the command that wrote it"
        )
    with readable(str(path)):
        body = json.loads(read_bytes(path))
        if body["format"] != FORMAT:
            raise DataError(f"format {body['format']}, but this v4e reads format {FORMAT}", where=str(path))
        shards = [ShardInfo(**s) for s in body["shards"]]
    if strange := [s.name for s in shards if not SHARD.fullmatch(s.name)]:
        raise DataError(f"{strange[0]!r} is no shard's name", where=str(path))
    return SetMeta.from_dict(body, str(path)), shards


def check_shard(folder: Path, shard: ShardInfo) -> None:
    """Index as hashed in the manifest, tar of the right size; DataError naming the file."""
    path = folder / shard.name
    if hash_of(read_bytes(index_path(path))) != shard.index:
        raise DataError("the index is not the one the manifest names", where=str(index_path(path)), fix=_REDO)
    if not path.is_file():
        raise DataError("the shard is missing", where=str(path), fix=_REDO)
    if (size := path.stat().st_size) != shard.bytes:
        raise DataError(f"the shard is cut short: {size} bytes of {shard.bytes}", where=str(path), fix=_REDO)


def _read_member(path: Path, member: Member, where: str) -> bytes:
    """pread and not mmap: a file cut short while mapped kills the process instead of raising an error."""
    try:
        with open(path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), member.size, member.offset)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where) from error
    if len(content) != member.size:
        raise DataError(f"the shard is cut short: {len(content)} of {member.size} bytes", where=where, fix=_REDO)
    if digest_of(content) != member.hash:
        raise DataError("its bytes are not those that were written", where=where, fix=_REDO)
    return content


def index_path(tar: Path) -> Path:
    """Where a shard's index lies."""
    return tar.with_suffix(".index.json")


def _is_whole(tar: Path) -> bool:
    try:
        return json.loads(index_path(tar).read_bytes())["bytes"] == tar.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False
