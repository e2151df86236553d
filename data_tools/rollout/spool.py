"""What is finished of a set: units in ``.units``, each a file, then shards of them, each seen whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data_tools.rollout.plan import MANIFEST, SHARDS_FROM, Claims, Plan
from v4e.data.disk import TEMPORARY, agree, digest_of, hash_of, readable, to_json, writable, write_atomically
from v4e.data.members import MEMBERS, WORDS
from v4e.data.places import read_bytes
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
        folder: of the set; made if missing.
        plan: its units and shards.
        meta: what it is; a folder begun with another one is refused.

    Raises:
        DataError: the folder was begun with other settings or triplets.
    """

    def __init__(self, folder: Path, plan: Plan, meta: SetMeta, dtype: torch.dtype) -> None:
        self.folder, self.plan, self.meta = folder, plan, meta
        with writable(folder):
            (folder / UNITS).mkdir(parents=True, exist_ok=True)
            agree(folder / "settings.json", {**meta.to_dict(), "layout": _layout(plan, dtype)})
            self._agree_on_triplets()
        self.claims = Claims(folder / ".claims")

    # What is there -------------------------------------------------------------------------------------------------

    def has(self, unit: int) -> bool:
        """Whether a unit is safe. Its shard's index appears before its file goes, so this order misses nothing."""
        return self._path(unit).exists() or self.is_packed(self.plan.shard_of(unit))

    def is_packed(self, shard: int) -> bool:
        return index_path(self.tar(shard)).exists() and self.tar(shard).exists()

    def missing(self) -> list[int]:
        """Units that are not safe yet, from two listings."""
        saved = set(os.listdir(self.folder / UNITS))
        packed = self._packed()
        return [
            unit
            for shard in self.plan.shards
            if shard not in packed
            for unit in self.plan.units_of(shard)
            if self._path(unit).name not in saved
        ]

    def outcome(self, unit: int, kinds: Sequence[str] = MEMBERS) -> Unit:
        """What became of a unit that is safe; ``kinds`` are the members that are read of it, if it is packed.

        Raises:
            DataError: its bytes are damaged.
        """
        path = self._path(unit)
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # it has been packed, perhaps just now
            return self._from_shard(unit, kinds)
        return Unit.from_bytes(content, str(path))

    def rejects(self) -> list[Reject]:
        """All triplets of the packed shards that could not be used."""
        return [r for shard in self.plan.shards for r in read_rejects(self.tar(shard))]

    def tar(self, shard: int) -> Path:
        return self.folder / f"000-{shard:06d}.tar"

    # What is done --------------------------------------------------------------------------------------------------

    def save(self, unit: int, outcome: Unit) -> None:
        """Make a unit safe, and pack its shard when it was the last one."""
        with writable(self.folder):
            write_atomically(self._path(unit), outcome.to_bytes())
        self.pack(self.plan.shard_of(unit))

    def pack(self, shard: int) -> None:
        """Make a shard of its units, when all are there; several ranks may try at once."""
        units = self.plan.units_of(shard)
        with self.claims.take(SHARDS_FROM + shard, wait=True), writable(self.folder):
            if not self.is_packed(shard) and all(self._path(u).exists() for u in units):
                outcomes = [self.outcome(u) for u in units]
                self._write_rejects(shard, [r for o in outcomes for r in o.rejects])
                write_shard(self.tar(shard), (m for o in outcomes for m in o.made), sum(o.seconds for o in outcomes))
            if self.is_packed(shard):
                for unit in units:
                    self._path(unit).unlink(missing_ok=True)

    def drop(self, unit: int) -> None:
        """Forget a unit, to be done again; the others of its shard stay safe."""
        shard = self.plan.shard_of(unit)
        with self.claims.take(SHARDS_FROM + shard, wait=True), writable(self.folder):
            (self.folder / "manifest.json").unlink(missing_ok=True)
            others = [u for u in self.plan.units_of(shard) if u != unit]
            if self.is_packed(shard):
                for other in others:
                    write_atomically(self._path(other), self._from_shard(other, MEMBERS).to_bytes())
                index_path(self.tar(shard)).unlink()
                self.tar(shard).unlink()
            self._path(unit).unlink(missing_ok=True)

    def finish(self) -> bool:
        """Write the manifest if every shard is there; whether it is."""
        if len(self._packed()) < len(self.plan.shards):
            return False
        with self.claims.take(MANIFEST, wait=True), writable(self.folder):
            if not (self.folder / "manifest.json").exists() and len(finish(self.folder).shards) < len(self.plan.shards):
                (self.folder / "manifest.json").unlink()
                fix = "run v4e-shards verify with --repair, then this command again"
                raise DataError("a shard is not whole", where=str(self.folder), fix=fix)
            for path in (self.folder / UNITS).glob(f"{TEMPORARY}*"):  # of ranks that were killed
                path.unlink(missing_ok=True)
        return True

    # Details -------------------------------------------------------------------------------------------------------

    def _path(self, unit: int) -> Path:
        return unit_path(self.folder, unit)

    def _packed(self) -> set[int]:
        names = set(os.listdir(self.folder))
        return {shard for shard in self.plan.shards if {(tar := self.tar(shard)).name, index_path(tar).name} <= names}

    def _from_shard(self, unit: int, kinds: Sequence[str]) -> Unit:
        tar = self.tar(self.plan.shard_of(unit))
        content = read_bytes(index_path(tar))
        index = Index(index_path(tar), content)
        shard = ShardSet(self.folder, self.meta, [ShardInfo(tar.name, len(index), index.bytes, hash_of(content))])
        keys, made = {triplet.id for triplet in self.plan.unit(unit)}, []
        for row in (row for row, key in enumerate(index.keys) if key in keys):
            members = {kind: shard.raw(row, kind) or b"" for kind in index.members(row) if kind in kinds}
            made.append(Made(index.keys[row], json.loads(members[WORDS])["task"], members))
        return Unit(made, [r for r in read_rejects(tar) if r.key in keys])

    def _write_rejects(self, shard: int, rejects: Sequence[Reject]) -> None:
        path = rejects_path(self.tar(shard))
        path.unlink(missing_ok=True)
        if rejects:
            write_atomically(path, b"".join(to_json(asdict(r)) + b"\n" for r in rejects))

    def _agree_on_triplets(self) -> None:
        """Units are made of consecutive triplets, so another list would make other units."""
        path, now = self.folder / IDS, [t.id for t in self.plan.triplets]
        if not path.exists():
            return write_atomically(path, to_json(now))
        with readable(str(path)):
            before = json.loads(read_bytes(path))
        if before != now:
            new, gone = (sorted(set(a) - set(b)) for a, b in ((now, before), (before, now)))
            raise DataError(
                f"this folder was begun with other triplets: {len(before)} were listed and {len(now)} are now, "
                f"new: {_some(new)}, gone: {_some(gone)}",
                where=str(path),
                fix="roll new triplets into a folder of their own; v4e-shards merge joins the two",
            )
        return None


def give_back(folder: Path, shard: str, good: Iterable[Made]) -> None:
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
    (folder / UNITS).mkdir(exist_ok=True)
    for at in range(first, min(first + size, len(ids)), batch):
        keys = ids[at : min(at + batch, first + size)]
        if all(key in made or key in rejects for key in keys):
            unit = Unit([made[k] for k in keys if k in made], [rejects[k] for k in keys if k in rejects])
            write_atomically(unit_path(folder, at // batch), unit.to_bytes())


def unit_path(folder: Path, unit: int) -> Path:
    return folder / UNITS / f"{unit:08d}.unit"


def rejects_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_rejects.jsonl")


def read_rejects(tar: Path) -> list[Reject]:
    """The triplets of a shard that could not be used."""
    path = rejects_path(tar)
    return [Reject(**json.loads(line)) for line in path.read_bytes().splitlines()] if path.exists() else []


def _unit_and_shard(settings: Mapping) -> tuple[int, int]:
    """Triplets of a unit and of a shard."""
    return settings["settings"]["batch"], settings["layout"]["samples_per_shard"]


def _layout(plan: Plan, dtype: torch.dtype) -> dict[str, object]:
    return {"samples_per_shard": plan.per_shard * plan.batch, "dtype": str(dtype)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5) or "none"
