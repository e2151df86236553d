"""Shards: samples in tar files that stock webdataset opens, written so that a crash can lose work but never spoil it.

A folder holds, for each shard, ``NAME.tar``, ``NAME.index.json`` (where each member lies, its size and its hash) and
``NAME_stats.json``; ``settings.json`` says what the set was begun with, and ``manifest.json``, written last, says that
it is whole. The hashes form a chain: manifest -> index -> member. ``docs/shards.md`` has the format in full.
"""

import json
import re
import tarfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal, overload
from uuid import uuid4

import numpy as np
import torch
from xxhash import xxh3_128_hexdigest

from v4e.data.cache import Remote, ShardCache
from v4e.data.disk import (
    TEMPORARY,
    agree,
    hash_of,
    lock,
    publish,
    readable,
    scratch,
    settle,
    to_json,
    writable,
    write_atomically,
)
from v4e.data.index import REDO, Index, announce_members, check_members, index_path, read_members
from v4e.data.members import MEMBERS, PICTURES, check_key, pack, unpack
from v4e.data.places import (
    NotFoundError,
    Place,
    exists,
    is_remote,
    listable,
    make_folder,
    patiently,
    place,
    read_bytes,
    read_many,
    remove,
    sizes,
)
from v4e.errors import ConfigError, DataError
from v4e.nouns import Grid, Sample

FORMAT = 1
SHARD = re.compile(r"\d{3,}-\d{6,}\.tar")
BLOCK = tarfile.BLOCKSIZE
UNSEEN = tuple(kind for kind in MEMBERS if kind not in PICTURES)  # what training reads
INDEXED = 300_000  # samples of which an open set keeps the index in memory, about 100 MB

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


class ShardWriter:
    """Writes samples into shards, each appearing under its name only when it is whole and on disk.

    Reopening an unfinished folder goes on after its finished shards: ``done`` holds the keys that are safe. Called
    again with the same samples in the same order, less those that are done, it makes the same bytes.

    Use as a context manager: leaving it well writes the manifest, leaving it by an error drops the shard begun.

    Args:
        folder: a local one, made when missing, or a URL; shards for a URL are made in a local folder and uploaded.
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
        folder: str | Place,
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
        self.folder, self.meta, self.dtype, self.part = place(folder), meta, dtype, part
        self.samples_per_shard, self.max_bytes, self._manifest = samples_per_shard, max_bytes, manifest
        with writable(self.folder):
            make_folder(self.folder)
            self._scratch = scratch(self.folder)
        self._lock = lock(self._scratch / f".lock-{part:03d}")  # of other machines that write to a URL, see put_new
        self._shard: _Shard | None = None
        with self._dropping_on_error():
            layout = {"samples_per_shard": samples_per_shard, "max_bytes": max_bytes, "dtype": str(dtype)}
            agree(self.folder / "settings.json", {**meta.to_dict(), "layout": layout})
            self._finished, self.done = set[str](), set[str]()
            for name, index in finished_indexes(self.folder):
                self._finished.add(name)
                self.done.update(index.keys)
            self._drop_unfinished()

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
        self._refuse_key(sample.key)
        self.add_packed(sample.key, sample.task, pack(sample, self.dtype))

    def add_packed(self, key: str, task: str, members: Mapping[str, bytes]) -> None:
        """Append a sample as :func:`pack` made it, or as another set holds it.

        Raises:
            DataError: its key was written before or is no legal name, the disk is full.
        """
        self._refuse_key(key)
        with self._dropping_on_error():
            self._shard = self._shard or self._begin()
        with self._dropping_on_error(key):
            self._shard.add(key, task, members)
        self.done.add(key)
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

    def _refuse_key(self, key: str) -> None:
        check_key(key, str(self.folder))
        if key in self.done:
            raise DataError(f"key {key!r} was written before", where=str(self.folder), fix="make the ids unique")

    def _begin(self) -> "_Shard":
        remove(self.folder / "manifest.json")  # the set is growing: no longer whole
        names = (f"{self.part:03d}-{number:06d}.tar" for number in range(len(self._finished) + 1))
        return _Shard(self.folder / next(name for name in names if name not in self._finished))

    def _drop_unfinished(self) -> None:
        """Remove what a killed writer of this part left: temporary files, and tars whose index never came."""
        for path in self._scratch.glob(f"{TEMPORARY}{self.part:03d}-*"):
            path.unlink()
        for name in sizes(self.folder):
            if name.startswith(f"{self.part:03d}-") and SHARD.fullmatch(name) and name not in self._finished:
                remove(self.folder / name)
                remove(index_path(self.folder / name))

    @contextmanager
    def _dropping_on_error(self, key: str = "") -> Iterator[None]:
        """A shard that could not be written whole must not be gone on with."""
        try:
            with writable(self._shard.path if self._shard else self.folder, key):
                yield
        except BaseException:
            self.abandon()
            raise


def write_shard(
    path: Place, samples: Iterable[tuple[str, str, Mapping[str, bytes]]], seconds: Callable[[], float] = float
) -> None:
    """A whole shard of packed samples, each a key, a task and members.

    Args:
        seconds: asked when all are drawn, how many went into making them before.
    """
    shard = _Shard(path)
    try:
        for key, task, members in samples:
            with writable(path, key):
                shard.add(key, task, members)
        with writable(path):
            shard.finish(seconds())
    except BaseException:
        shard.drop()
        raise


def tar_header(name: str, size: int) -> bytes:
    """A member's header; owner, mode and time keep their defaults, so that the same samples make the same bytes."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header.tobuf(tarfile.USTAR_FORMAT)


class _Shard:
    """One tar being written under a temporary name, in the folder itself or, for a URL, in a local one.

    The name is nobody else's: two may write one shard at once where there are no locks.
    """

    def __init__(self, path: Place) -> None:
        self.path, self.keys, self.size = path, [], 0
        self._rows: list[list[object]] = []
        self._quick: list[str] = []
        self._counts, self._tasks = Counter[str](), Counter[str]()
        self._began = time.monotonic()
        self._temporary = scratch(path.parent) / f"{TEMPORARY}{path.name}-{uuid4().hex}"
        self._placed: list[Place] = []
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115  (closed by finish or drop)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: str, task: str, members: Mapping[str, bytes]) -> None:
        row = {kind: self._put(f"{key}.{kind}", content) for kind, content in members.items()}
        self.keys.append(key)
        self._rows.append([key, row])
        self._counts.update(members.keys())
        self._tasks[task] += 1

    def finish(self, before: float = 0.0) -> None:
        """Tar, statistics, index: the index is what says that the shard is whole.

        Args:
            before: seconds that went into its samples before it was begun.
        """
        self._began -= before
        self._file.write(bytes(2 * BLOCK))
        self.size += 2 * BLOCK
        settle(self._file)
        self._file.close()
        self._place(self.path, self._temporary)
        write_atomically(self.path.with_name(f"{self.path.stem}_stats.json"), to_json(self._stats()))
        self._place(index_path(self.path), to_json(self._index()))
        self._temporary.unlink(missing_ok=True)

    def drop(self) -> None:
        """Take away all traces; a full disk may also have stopped the index after the tar."""
        with suppress(OSError):  # its buffer may have nowhere to go
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        with suppress(DataError):  # a store that refused the index may refuse this too; the next writer removes it
            for path in self._placed:
                remove(path)

    def _place(self, path: Place, source: Path | bytes) -> None:
        publish(path, source)
        self._placed.append(path)

    def _put(self, name: str, content: bytes) -> list[object]:
        self._file.write(tar_header(name, len(content)))
        self._file.write(content)
        self._file.write(bytes(-len(content) % BLOCK))
        place = self.size + BLOCK
        self.size = place + len(content) + -len(content) % BLOCK
        self._quick.append(xxh3_128_hexdigest(content))
        return [place, len(content), hash_of(content)]

    def _index(self) -> dict[str, object]:
        return {"format": FORMAT, "bytes": self.size, "samples": self._rows, "quick": self._quick}

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


def layout_of(folder: Place) -> Mapping[str, object]:
    """How a set's tars were cut, and the type its tensors are stored in."""
    path = folder / "settings.json"
    with readable(str(path)):
        return dict(json.loads(read_bytes(path))["layout"])


def finish(folder: str | Place) -> "ShardSet":
    """Write the manifest over all finished shards of a folder, in the order of their names.

    Raises:
        DataError: nothing was begun there, or two shards hold the same key.
    """
    folder = place(folder)
    settings = folder / "settings.json"
    if not exists(settings):
        raise DataError("no set was begun here", where=str(folder), fix="write shards first, with v4e-shards rollout")
    with readable(str(settings)):
        meta = SetMeta.from_dict(json.loads(read_bytes(settings)), str(settings))
    shards, hashes = [], []
    for name, content, index in _whole_shards(folder):
        shards.append(ShardInfo(name, len(index), index.bytes, hash_of(content)))
        hashes.append(_key_hashes(index))
    _refuse_doubles([folder / s.name for s in shards], hashes)
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

    Opening reads the manifest and lists the folder; a shard's index is read, and held against the manifest, when the
    first of its samples is wanted. So a million samples open as fast as a thousand, and take as much memory.

    Attributes:
        folder, meta, shards: where it is, what it is, what it is made of.
        cache: where shards of a set behind a URL are downloaded to; without one each sample is a request.
    """

    def __init__(
        self, folder: Place, meta: SetMeta, shards: Sequence[ShardInfo], cache: ShardCache | None = None
    ) -> None:
        self.folder, self.meta, self.shards = folder, meta, tuple(shards)
        self.cache = cache if is_remote(folder) else None
        self._starts = [0, *accumulate(s.samples for s in shards)]
        largest = max((s.samples for s in shards), default=1)
        self.index = lru_cache(maxsize=max(8, INDEXED // max(1, largest)))(self._read_index)
        self.remote = lru_cache(maxsize=len(shards))(self._remote)
        self.tar = lru_cache(maxsize=len(shards))(self._tar)

    @staticmethod
    def open(
        folder: str | Place, verify: Literal["sizes", "index", "none"] = "sizes", cache: ShardCache | None = None
    ) -> "ShardSet":
        """Read the manifest.

        Args:
            folder: a local folder or a URL.
            verify: ``sizes`` looks in the folder's listing whether each tar is there and has its size (http has no
                listings: there nothing is looked at); ``index`` also reads every index and refuses a key met twice;
                ``none`` leaves damage to be found sample by sample.
            cache: to download whole shards to, where the folder is a URL.

        Raises:
            DataError: no manifest, another format, a missing, changed or truncated shard.
        """
        folder = place(folder)
        whole = ShardSet(folder, *read_manifest(folder), cache)
        if verify != "none" and listable(folder):
            check_sizes(folder, whole.shards)
        if verify == "index":
            whole.refuse_doubles()
        return whole

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def keys(self) -> "Keys":
        """Every sample's key, in the set's order."""
        return Keys(self)

    @property
    def indexes(self) -> Iterator[Index]:
        """Every shard's index, one after the other."""
        return map(self.index, range(len(self.shards)))

    @property
    def identity(self) -> str:
        """Sixteen hex digits that change when any byte of the set does: what a checkpoint should remember."""
        return hash_of(to_json([self.meta.settings_hash, [vars(s) for s in self.shards]]))[:16]

    def locate(self, i: int) -> tuple[int, int]:
        """Number of the shard that holds sample ``i``, and its row there."""
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def place(self, i: int) -> str:
        """Where sample ``i`` is, in words for a message."""
        return f"{self.tar(self.locate(i)[0])}, key {self.keys[i]}"

    def name(self, i: int) -> str:
        """The key of sample ``i``, or shard and row where the index that knows it is damaged."""
        try:
            return self.keys[i]
        except DataError:
            shard, row = self.locate(i)
            return f"{self.shards[shard].name.removesuffix('.tar')}-row-{row}"

    def refuse_doubles(self) -> None:
        """DataError naming a key that two samples share, and their shards; reads every index."""
        refuse_doubles([self])

    def kinds(self, i: int) -> list[str]:
        """Kinds of members that sample ``i`` has."""
        shard, row = self.locate(i)
        return list(self.index(shard).members(row))

    def raw(self, i: int, kind: str) -> bytes | None:
        """One member's bytes, checked against their strong hash; None when the sample has no such member.

        Raises:
            DataError: the shard is missing or cut short, or the bytes are not those that were written.
        """
        content = self.members(i, [kind], strong=True).get(kind)
        return None if content is None else bytes(content)

    def members(self, i: int, kinds: Sequence[str] = MEMBERS, strong: bool = False) -> dict[str, memoryview]:
        """The bytes of those members that a sample has, checked against their hashes; neighbours are read at once.

        Args:
            strong: check against blake2b and not against xxh3, which finds every accident but no forgery.

        Raises:
            DataError: the shard is missing or cut short, or the bytes are not those that were written.
        """
        shard, row = self.locate(i)
        wanted = self.index(shard).members(row, kinds)
        if self.cache:
            return self.cache.use(self.remote(shard), lambda tar: read_members(tar, self.place(i), wanted, strong))
        return read_members(self.tar(shard), self.place(i), wanted, strong)

    def sample(self, i: int, pictures: bool = False, finite: bool = False) -> Sample:
        """Read one sample; tensors as they were stored, pictures only when asked for.

        Args:
            finite: refuse numbers that are not.

        Raises:
            DataError: naming shard and key, when any of the bytes read is damaged.
        """
        kinds = MEMBERS if pictures else UNSEEN
        return unpack(self.keys[i], self.members(i, kinds), self.place(i), finite)

    def announce(self, i: int, pictures: bool = False) -> None:
        """Say that a sample is read soon, to a kernel that can fetch it meanwhile.

        Raises:
            DataError: the shard is missing, or its index is damaged.
        """
        if not is_remote(self.folder):
            shard, row = self.locate(i)
            announce_members(self.tar(shard), self.index(shard).members(row, MEMBERS if pictures else UNSEEN))

    def _read_index(self, shard: int) -> Index:
        """A shard's index, held against the manifest."""
        info = self.shards[shard]
        path = index_path(self.folder / info.name)
        if hash_of(content := patiently(lambda: read_bytes(path))) != info.index:
            raise DataError("the index is not the one the manifest names", where=str(path), fix=REDO)
        if len(index := Index(path, content)) != info.samples:
            raise DataError(f"does not hold {info.samples} samples", where=str(path), fix=REDO)
        return index

    def _tar(self, shard: int) -> Place:
        return self.folder / self.shards[shard].name

    def _remote(self, shard: int) -> Remote:
        info, at = self.shards[shard], self.tar(shard)
        assert is_remote(at)
        return Remote(at, info.bytes, info.index, lambda tar: check_members(tar, self.index(shard)))


class Keys(Sequence[str]):
    """The keys of a set, in its order; each is looked up when it is asked for."""

    def __init__(self, of: ShardSet) -> None:
        self._set = of

    def __len__(self) -> int:
        return len(self._set)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        shard, row = self._set.locate(range(len(self))[i])
        return self._set.index(shard).keys[row]

    def __iter__(self) -> Iterator[str]:
        return (key for index in self._set.indexes for key in index.keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  (as a list's)


def _key_hashes(index: Index) -> np.ndarray:
    """Python's own 64-bit hash of each key: eight bytes a sample, where the keys would take a hundred."""
    return np.fromiter(map(hash, index.keys), np.int64, len(index))


def refuse_doubles(sets: Sequence[ShardSet]) -> None:
    """DataError naming a key that two samples share, and their shards; reads every index of the sets."""
    paths = [s.folder / shard.name for s in sets for shard in s.shards]
    _refuse_doubles(paths, [_key_hashes(index) for s in sets for index in s.indexes])


def _refuse_doubles(tars: Sequence[Place], hashes: Sequence[np.ndarray]) -> None:
    """Where two hashes are equal, the indexes are read again and the keys themselves compared."""
    every = np.sort(np.concatenate([np.empty(0, np.int64), *hashes]))
    suspects = set(every[1:][every[1:] == every[:-1]].tolist())
    seen: dict[str, Place] = {}
    for tar in [t for t, part in zip(tars, hashes, strict=True) if suspects and not suspects.isdisjoint(part.tolist())]:
        for key in Index(index_path(tar)).keys:
            if key in seen:
                raise DataError(f"key {key!r} occurs twice, in {_both(seen[key], tar)}", where=str(tar.parent))
            seen[key] = tar


def _both(a: Place, b: Place) -> str:
    return f"{a.name} and {b.name}" if a.parent == b.parent else f"{a} and {b}"


def finished(folder: Place) -> list[str]:
    """Names of the shards that are whole: their index exists and agrees with the tar's size."""
    return [name for name, _ in finished_indexes(folder)]


def finished_indexes(folder: Place) -> Iterator[tuple[str, Index]]:
    """The shards that are whole, in the order of their names, with their indexes."""
    return ((name, index) for name, _, index in _whole_shards(folder))


def _whole_shards(folder: Place) -> Iterator[tuple[str, bytes, Index]]:
    """Names, index files and indexes; from one listing, and from a store many indexes at a time."""
    there = sizes(folder)
    names = sorted(n for n in there if SHARD.fullmatch(n) and index_path(Path(n)).name in there)
    contents = read_many(index_path(folder / name) for name in names)
    for name, content in zip(names, contents, strict=True):
        with suppress(DataError):  # a torn index is none
            index = Index(index_path(folder / name), content)
            if index.bytes == there[name]:
                yield name, content, index


def _grid(values: Mapping) -> Grid:
    return Grid(values["T"], values["H"], values["W"], tuple(values["stride"]), tuple(values["patch"]))


def refuse_format(found: object, where: str) -> None:
    """DataError naming a format that this v4e does not read, with what to do about it."""
    if found == FORMAT and not isinstance(found, bool):
        return
    newer = isinstance(found, int) and found > FORMAT
    fix = "a newer v4e wrote it: update this one" if newer else "no v4e wrote such a one: make the set again"
    raise DataError(f"format {found!r}, but this v4e reads format {FORMAT}", where=where, fix=fix)


def read_manifest(folder: Place) -> tuple[SetMeta, list[ShardInfo]]:
    """What a finished folder says it holds.

    Raises:
        DataError: no folder, no manifest, another format, or names that are no shard's.
    """
    path = folder / "manifest.json"
    if not is_remote(folder) and not folder.is_dir():
        raise DataError("no such shard folder", where=str(folder), fix="make it with v4e-shards rollout")
    try:
        content = read_bytes(path)
    except NotFoundError as error:
        why = f", or nothing is there ({error.what})" if is_remote(folder) else ""
        raise DataError(
            f"no manifest.json, the set is unfinished{why}",
            where=str(folder),
            fix="run again the command that wrote it",
        ) from error
    with readable(str(path)):
        body = json.loads(content)
        refuse_format(body["format"], str(path))
        shards = [ShardInfo(**s) for s in body["shards"]]
    if strange := [s.name for s in shards if not SHARD.fullmatch(s.name)]:
        raise DataError(f"{strange[0]!r} is no shard's name", where=str(path))
    return SetMeta.from_dict(body, str(path)), shards


def check_sizes(folder: Place, shards: Iterable[ShardInfo]) -> None:
    """Each tar is there, of the size in the manifest, and has an index: from one listing. DataError naming the file."""
    there = sizes(folder)
    for shard in shards:
        size, index = there.get(shard.name), f"{shard.name.removesuffix('.tar')}.index.json"
        if size is None:
            raise DataError("the shard is missing", where=str(folder / shard.name), fix=REDO)
        if size != shard.bytes:
            what = f"the shard is cut short: {size} bytes of {shard.bytes}"
            raise DataError(what, where=str(folder / shard.name), fix=REDO)
        if index not in there:
            raise DataError("cannot be read: the index is missing", where=str(folder / index), fix=REDO)
