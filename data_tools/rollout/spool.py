"""What is finished of a set: units in ``.units``, each a file, then shards of them, each seen whole or not at all.

All of it lies in the set's folder, here or behind a URL, so that any machine can go on; but for the claims, which are
locks, and tars that are being packed: of a URL these are in a local folder.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from data_tools.rollout.plan import MANIFEST, SHARDS_FROM, Claims, Plan
from v4e.data.disk import (
    TEMPORARY,
    agree,
    digest_of,
    hash_of,
    publish,
    readable,
    scratch,
    to_json,
    writable,
    write_atomically,
)
from v4e.data.members import MEMBERS, WORDS
from v4e.data.places import (
    NotFoundError,
    Place,
    exists,
    is_remote,
    make_folder,
    names,
    patiently,
    read_bytes,
    read_many,
    remove,
    shown,
)
from v4e.data.shards import Index, SetMeta, ShardInfo, ShardSet, finish, index_path, write_shard
from v4e.errors import DataError

UNITS, IDS = ".units", "triplets.json"


class Made(NamedTuple):
    """A finished sample: its key, its task, and its members as they go into a tar."""

    key: str
    task: str
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class Reject:
    """A triplet that cannot be used: why, and the hash of what was tried."""

    key: str
    reason: str
    inputs: str = ""


@dataclass(frozen=True)
class Unit:
    """A unit's outcome; every triplet of it is in one of the two. ``seconds`` went into it."""

    made: Sequence[Made] = ()
    rejects: Sequence[Reject] = ()
    seconds: float = 0.0

    def to_bytes(self) -> bytes:
        """A digest, a line of json, and the members one after the other."""
        rows = [[m.key, m.task, {kind: len(content) for kind, content in m.members.items()}] for m in self.made]
        head = to_json({"samples": rows, "rejects": [asdict(r) for r in self.rejects], "seconds": self.seconds})
        body = b"".join([head, b"\n", *(content for m in self.made for content in m.members.values())])
        return digest_of(body) + body

    @staticmethod
    def from_bytes(content: bytes, where: str) -> "Unit":
        """Inverse of :meth:`to_bytes`; DataError when they are not the bytes that were written."""
        if digest_of(content[16:]) != content[:16]:
            raise DataError("its bytes are not those that were written", where=where)
        head, _, body = content[16:].partition(b"\n")
        rows, at, made = json.loads(head), 0, []
        for key, task, sizes in rows["samples"]:
            members = {}
            for kind, size in sizes.items():
                members[kind], at = body[at : at + size], at + size
            made.append(Made(key, task, members))
        return Unit(made, [Reject(**r) for r in rows["rejects"]], rows["seconds"])


class Spool:
    """A set on its way.

    Args:
        folder: of the set, a local one, made if missing, or a URL.
        plan: its units and shards.
        meta: what it is; a folder begun with another one is refused.

    Raises:
        DataError: the folder was begun with other settings or triplets, or cannot be written.
    """

    def __init__(self, folder: Place, plan: Plan, meta: SetMeta, dtype: torch.dtype) -> None:
        self.folder, self.plan, self.meta = folder, plan, meta
        with writable(folder):
            make_folder(folder / UNITS)
            agree(folder / "settings.json", {**meta.to_dict(), "layout": _layout(plan, dtype)})
            self._agree_on_triplets()
            self.claims = Claims(scratch(folder) / ".claims", everywhere=not is_remote(folder))
        self._opened = lru_cache(maxsize=8)(self._open)
        self._counts, self._counted = Counter[str](), set[int]()

    # What is there -------------------------------------------------------------------------------------------------

    def has(self, unit: int) -> bool:
        """Whether a unit is safe. Its shard's index appears before its file goes, so this order misses nothing."""
        return exists(self._path(unit)) or self.is_packed(self.plan.shard_of(unit))

    def is_packed(self, shard: int) -> bool:
        return exists(index_path(self.tar(shard))) and exists(self.tar(shard))

    def missing(self) -> Iterator[int]:
        """Units that are not safe yet."""
        return itertools.filterfalse(self.safe(), self.plan.units)

    def safe(self) -> Callable[[int], bool]:
        """What tells whether a unit is safe, from two listings."""
        saved = names(self.folder / UNITS)  # before the shards: a unit's file goes when its shard is there
        packed = self._packed()
        return lambda unit: self.plan.shard_of(unit) in packed or self._path(unit).name in saved

    def outcome(self, unit: int, kinds: Sequence[str] = MEMBERS) -> Unit:
        """What became of a unit that is safe; ``kinds`` are the members that are read of it, if it is packed.

        Raises:
            DataError: its bytes are damaged.
        """
        path = self._path(unit)
        try:
            content = read_bytes(path)
        except NotFoundError:  # it has been packed, perhaps just now
            return self._from_shard(unit, kinds)
        return Unit.from_bytes(content, shown(path))

    def rejects(self) -> list[Reject]:
        """All triplets of the packed shards that could not be used."""
        there = names(self.folder)
        paths = (path for shard in self.plan.shards if (path := rejects_path(self.tar(shard))).name in there)
        return [reject for content in read_many(paths) for reject in _rejects_in(content)]

    def tally(self) -> Counter[str]:
        """Samples, bytes, seconds of work and rejects of all packed shards, by the ``_stats.json`` beside them.

        Each is read once; what is no sample of a packed shard was of no use.
        """
        for shard in sorted(self._packed() - self._counted):
            sheet = self._sheet(shard)
            triplets = sum(map(self.plan.size_of, self.plan.units_of(shard)))
            self._counts.update({k: sheet[k] for k in ("samples", "bytes", "seconds")})
            self._counts["rejects"] += triplets - sheet["samples"]
            self._counted.add(shard)
        return self._counts

    def tar(self, shard: int) -> Place:
        return self.folder / f"000-{shard:06d}.tar"

    # What is done --------------------------------------------------------------------------------------------------

    def save(self, unit: int, outcome: Unit) -> None:
        """Make a unit safe, and pack its shard when it was the last one."""
        content = outcome.to_bytes()
        with writable(self._path(unit)):
            patiently(lambda: write_atomically(self._path(unit), content))  # the teacher's work is worth some waiting
        self.pack(self.plan.shard_of(unit))

    def pack(self, shard: int) -> None:
        """Make a shard of its units, when all are there; several ranks may try at once."""
        units = self.plan.units_of(shard)
        with self.claims.take(SHARDS_FROM + shard, wait=True), writable(self.folder):
            if not self.is_packed(shard) and {self._path(u).name for u in units} <= names(self.folder / UNITS):
                seconds: list[float] = []
                write_shard(self.tar(shard), self._samples(shard, seconds), lambda: sum(seconds))
            if self.is_packed(shard):
                for unit in units:
                    remove(self._path(unit))

    def drop(self, unit: int) -> None:
        """Forget a unit, to be done again; the others of its shard stay safe."""
        shard = self.plan.shard_of(unit)
        with self.claims.take(SHARDS_FROM + shard, wait=True), writable(self.folder):
            others = [u for u in self.plan.units_of(shard) if u != unit]
            if self.is_packed(shard):
                for other in others:
                    write_atomically(self._path(other), self._from_shard(other, MEMBERS).to_bytes())
            tar = self.tar(shard)
            with self.claims.take(MANIFEST, wait=True):  # nobody may write one meanwhile
                # The index goes before its tar: a tar alone is no shard.
                for path in (self.folder / "manifest.json", index_path(tar), tar, self._path(unit)):
                    remove(path)
            self._opened.cache_clear()

    def finish(self) -> bool:
        """Write the manifest if every shard is there; whether it is."""
        if len(self._packed()) < len(self.plan.shards):
            return False
        with self.claims.take(MANIFEST, wait=True), writable(self.folder):
            if len(self._packed()) < len(self.plan.shards):
                return False  # a unit was dropped meanwhile, by a rank that will do it again
            manifest = self.folder / "manifest.json"
            if not exists(manifest) and len(finish(self.folder).shards) < len(self.plan.shards):
                remove(manifest)
                fix = "run v4e-shards verify with --repair, then this command again"
                raise DataError("a shard is not whole", where=shown(self.folder), fix=fix)
            self._tidy()
        return True

    def _tidy(self) -> None:
        """Remove what ranks that were killed had begun."""
        begun = [self.folder / UNITS / name for name in names(self.folder / UNITS) if name.startswith(TEMPORARY)]
        if self.claims.work or is_remote(self.folder):  # else somebody may still be at it, of no use though it be
            begun += scratch(self.folder).glob(f"{TEMPORARY}000-*")
        for path in begun:
            remove(path)

    # Details -------------------------------------------------------------------------------------------------------

    def _path(self, unit: int) -> Place:
        return unit_path(self.folder, unit)

    def _packed(self) -> set[int]:
        there = names(self.folder)
        return {shard for shard in self.plan.shards if {(tar := self.tar(shard)).name, index_path(tar).name} <= there}

    def _sheet(self, shard: int) -> Mapping:
        """A shard's statistics; what its index says of them where they are lost."""
        tar = self.tar(shard)
        try:
            with readable(shown(path := tar.with_name(f"{tar.stem}_stats.json"))):
                return json.loads(read_bytes(path))
        except DataError:
            index = self._opened(shard)[0].index(0)
            return {"samples": len(index), "bytes": index.bytes, "seconds": 0.0}

    def _open(self, shard: int) -> tuple[ShardSet, list[Reject]]:
        """A packed shard as a set of its own, and what was of no use."""
        tar = self.tar(shard)
        content = read_bytes(index_path(tar))
        index = Index(index_path(tar), content)
        info = ShardInfo(tar.name, len(index), index.bytes, hash_of(content))
        return ShardSet(self.folder, self.meta, [info]), read_rejects(tar)

    def _from_shard(self, unit: int, kinds: Sequence[str]) -> Unit:
        shard, rejects = self._opened(self.plan.shard_of(unit))
        index, keys, made = shard.index(0), {triplet.id for triplet in self.plan.unit(unit)}, []
        for row in (row for row, key in enumerate(index.keys) if key in keys):
            members = {kind: shard.raw(row, kind) or b"" for kind in index.members(row) if kind in kinds}
            made.append(Made(index.keys[row], json.loads(members[WORDS])["task"], members))
        return Unit(made, [r for r in rejects if r.key in keys])

    def _samples(self, shard: int, seconds: list[float]) -> Iterator[Made]:
        """What goes into a shard, in memory one unit at a time; its rejects are written in the end."""
        rejects: list[Reject] = []
        for unit in self.plan.units_of(shard):
            outcome = self.outcome(unit)
            rejects += outcome.rejects
            seconds.append(outcome.seconds)
            yield from outcome.made
        self._write_rejects(shard, rejects)

    def _write_rejects(self, shard: int, rejects: Sequence[Reject]) -> None:
        path = rejects_path(self.tar(shard))
        remove(path)
        if rejects:
            write_atomically(path, b"".join(to_json(asdict(r)) + b"\n" for r in rejects))

    def _agree_on_triplets(self) -> None:
        """Units are made of consecutive triplets, so another list would make other units."""
        path, listed = self.folder / IDS, b"[%b]" % b",".join(to_json(t.id) for t in self.plan.triplets)
        if not exists(path):
            return publish(path, listed)
        if (stored := read_bytes(path)) != listed:
            with readable(shown(path)):
                before, now = json.loads(stored), json.loads(listed)
            new, gone = (sorted(set(a) - set(b)) for a, b in ((now, before), (before, now)))
            raise DataError(
                f"this folder was begun with other triplets: {len(before)} were listed and {len(now)} are now, "
                f"new: {_some(new)}, gone: {_some(gone)}",
                where=shown(path),
                fix="roll new triplets into a folder of their own; v4e-shards merge joins the two",
            )
        return None


def give_back(folder: Place, shard: str, good: Iterable[Made]) -> None:
    """Take a packed shard apart into its units; those that lack a sample are left out, so that they are made again.

    Args:
        folder: of a set that `rollout` wrote.
        shard: name of the tar; it and its index are the caller's to take away, afterwards.
        good: the samples of it that may stay.
    """
    settings = json.loads(read_bytes(folder / "settings.json"))
    ids, batch, size = json.loads(read_bytes(folder / IDS)), *_unit_and_shard(settings)
    first, made = int(shard[4:10]) * size, {m.key: m for m in good}
    rejects = {r.key: r for r in read_rejects(folder / shard)}
    make_folder(folder / UNITS)
    for at in range(first, min(first + size, len(ids)), batch):
        keys = ids[at : min(at + batch, first + size)]
        if all(key in made or key in rejects for key in keys):
            unit = Unit([made[k] for k in keys if k in made], [rejects[k] for k in keys if k in rejects])
            write_atomically(unit_path(folder, at // batch), unit.to_bytes())


def unit_path(folder: Place, unit: int) -> Place:
    return folder / UNITS / f"{unit:08d}.unit"


def rejects_path(tar: Place) -> Place:
    return tar.with_name(f"{tar.stem}_rejects.jsonl")


def read_rejects(tar: Place) -> list[Reject]:
    """The triplets of a shard that could not be used."""
    try:
        return _rejects_in(read_bytes(rejects_path(tar)))
    except NotFoundError:
        return []


def _rejects_in(content: bytes) -> list[Reject]:
    return [Reject(**json.loads(line)) for line in content.splitlines()]


def _unit_and_shard(settings: Mapping) -> tuple[int, int]:
    """Triplets of a unit and of a shard."""
    return settings["settings"]["batch"], settings["layout"]["samples_per_shard"]


def _layout(plan: Plan, dtype: torch.dtype) -> dict[str, object]:
    return {"samples_per_shard": plan.per_shard * plan.batch, "dtype": str(dtype)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5) or "none"
