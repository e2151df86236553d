"""`v4e-shards verify --repair`: keep every good sample of a damaged set, drop the others, and have them made again.

Nothing is dropped without evidence: bytes that were read and are wrong. What a disk or a network would not give is
left as it is. Nothing is deleted either: files that are replaced are kept in ``.damaged``, and ``dropped.jsonl`` names
each sample that went. A shard is written whole under a name of its own before the damaged one is taken away, so that a
repair may be killed at any moment and simply be run again.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace

from xxhash import xxh3_128_hexdigest

from data_tools.verify import Problem, Report, check_samples, listed, read_index
from v4e.data.disk import copy, hash_of, lock, scratch, to_json, writable, write_atomically
from v4e.data.members import WORDS
from v4e.data.places import (
    Place,
    exists,
    is_remote,
    make_folder,
    names,
    opened,
    place,
    reaching,
    read_bytes,
    read_range,
    remove,
    sizes,
    system,
)
from v4e.data.shards import FORMAT, SHARD, Index, SetMeta, ShardInfo, ShardSet, finish, index_path, write_shard
from v4e.errors import DataError

ASIDE, LOG = ".damaged", "dropped.jsonl"
WITHOUT_EVIDENCE = ("unread", "unlisted shard", "temporary file", "settings", "manifest")


@dataclass
class Repair:
    """What was done.

    Args:
        restored: files whose bytes are again those that were written.
        dropped: samples that went, with the fault that each had.
        left: faults that a repair does not touch.
        whole: whether the set has a manifest.
    """

    restored: list[str] = field(default_factory=list)
    dropped: list[Problem] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)
    whole: bool = False

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield from (f"restored: {name}" for name in self.restored)
        yield from (f"dropped: {p.shard}, key {p.key or 'unknown'}: {p.kind}" for p in self.dropped)
        yield from (f"left as it is: {p.detail}" for p in self.left)
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(p.kind for p in self.dropped).items()))
        kinds = f" ({kinds})" if kinds else ""
        yield f"{len(self.dropped)} samples dropped{kinds}, {len(self.restored)} files restored"
        if not self.whole:
            yield "the set is unfinished: run again the command that wrote it, or seal what is left with --seal"


@dataclass(frozen=True)
class Salvage:
    """A damaged shard as far as it can be read: its index, if any, and the fault of each row that must go.

    ``torn``: something between the samples is not as the writer left it.
    """

    shard: ShardInfo
    index: Index | None
    bad: dict[int, Problem]
    torn: bool = False

    @property
    def kept(self) -> list[int]:
        return [row for row in range(len(self.index or ())) if row not in self.bad]


def repair(folder: str | Place, report: Report, *, most: float = 0.1, seal: bool = False) -> Repair:
    """Mend a set as far as its own bytes allow.

    Args:
        report: what `verify` found there.
        most: share of the set's samples that may be dropped; beyond that something else is wrong than a few bytes.
        seal: write a manifest over what is left, instead of leaving the set to be filled up again.

    Raises:
        DataError: more would be dropped, a writer is at work, the disk is full, or the folder cannot be written.
    """
    make_folder(folder := place(folder))
    meta, shards = listed(folder, [])
    done = Repair(left=[p for p in report.problems if p.kind in WITHOUT_EVIDENCE])
    damaged = {p.shard for p in report.problems} - {p.shard for p in done.left}
    hurt = [s for s in shards if s.name in damaged]
    with ExitStack() as held, writable(folder):
        for part in sorted({s.name.split("-")[0] for s in shards}):
            held.enter_context(lock(scratch(folder) / f".lock-{part}"))
        done.restored += [index_path(folder / s.name).name for s in hurt if _restore_index(folder, s)]
        salvages = [_salvage(folder, meta, s, report.problems) for s in hurt]
        _keep_one_of_each(folder, shards, salvages, report.problems)
        done.dropped = [p for s in salvages for p in s.bad.values()]
        lost = [p for p in done.dropped if p.kind != "double key"]  # of those, one stays
        _refuse_too_many(len(lost), sum(s.samples for s in shards), most, folder)
        if done.dropped or "manifest" in report.counts:
            remove(folder / "manifest.json")
        _log(folder / LOG, done.dropped)
        for salvage in salvages:
            done.restored += _mend(folder, meta, salvage)
    if seal and not exists(folder / "manifest.json"):
        finish(folder)
    done.whole = exists(folder / "manifest.json")
    return done


def _refuse_too_many(dropped: int, samples: int, most: float, folder: Place) -> None:
    if dropped > most * samples:
        raise DataError(
            f"{dropped} of {samples} samples would be dropped, which is more than the share of {most:g}",
            where=str(folder),
            fix="nothing was dropped; is the disk well? allow it with --most-dropped 1",
        )


def _log(path: Place, dropped: Sequence[Problem]) -> None:
    """One line a sample, after those of earlier repairs."""
    if dropped:
        before = read_bytes(path) if exists(path) else b""
        write_atomically(path, before + b"".join(to_json(asdict(p)) + b"\n" for p in dropped))


# ------------------------------------------------------------------------------------------------------ indexes


def _restore_index(folder: Place, shard: ShardInfo) -> bool:
    """Make a damaged index again from its tar; the manifest's hash proves that it is the old one, to the byte."""
    tar = folder / shard.name
    with suppress(DataError):
        read_index(tar, shard)
        return False
    for content in _indexes_of(tar):
        if hash_of(content) == shard.index:
            _set_aside(index_path(tar))
            write_atomically(index_path(tar), content)
            return True
    return False


def _indexes_of(tar: Place) -> Iterator[bytes]:
    """The indexes that a writer would have made, of now and of before it knew xxh3; none when the tar is torn."""
    rows, quick = dict[str, dict[str, Sequence[object]]](), list[str]()
    with (
        suppress(tarfile.TarError, DataError, OSError),
        opened(tar) as raw,
        tarfile.open(fileobj=raw, mode="r:") as file,
    ):
        for info in file:
            key, _, kind = info.name.partition(".")
            content = bytes(read_range(tar, info.offset_data, info.size))
            rows.setdefault(key, {})[kind] = [info.offset_data, info.size, hash_of(content)]
            quick.append(xxh3_128_hexdigest(content))
        body = {"format": FORMAT, "bytes": sizes(tar.parent)[tar.name], "samples": [*rows.items()]}
        yield from map(to_json, ({**body, "quick": quick}, body))


def _best_index(tar: Place) -> tuple[Index | None, str]:
    """An index that may be damaged, with its hash: a row whose content has the hash it names is good all the same."""
    with suppress(DataError):
        content = read_bytes(index_path(tar))
        return Index(index_path(tar), content), hash_of(content)
    return None, ""


# ------------------------------------------------------------------------------------------------------ samples


def _salvage(folder: Place, meta: SetMeta, shard: ShardInfo, known: Iterable[Problem]) -> Salvage:
    """Read a damaged shard once more, for what is good in it."""
    tar = folder / shard.name
    index, digest = _best_index(tar)
    if index is None:
        lost = Problem("index", f"{index_path(tar)}: neither it nor the tar says what was in the shard", shard.name)
        return Salvage(shard, None, dict.fromkeys(range(-shard.samples, 0), lost))
    if (size := sizes(folder).get(tar.name)) is None:
        gone = {row: Problem("shard", f"{tar}: is missing", shard.name, k, row) for row, k in enumerate(index.keys)}
        return Salvage(shard, index, gone)
    alone = replace(shard, samples=len(index), bytes=size, index=digest)
    found = [p for _, problems in check_samples(ShardSet(folder, meta, [alone])) for p in problems]
    found += [p for p in known if p.kind == "decode" and p.shard == shard.name]
    _refuse_unread(found)
    bad = {p.row: p for p in found if p.row >= 0 and p.kind != "tar structure"}
    return Salvage(alone, index, bad, size != shard.bytes or any(p.kind == "tar structure" for p in found))


def _refuse_unread(found: Iterable[Problem]) -> None:
    """What the disk or the store would not give this time may well be good."""
    if unread := next((p for p in found if p.kind in WITHOUT_EVIDENCE), None):
        raise DataError(f"{unread.detail}; nothing was dropped", fix="run the same command again")


def _keep_one_of_each(
    folder: Place, shards: Sequence[ShardInfo], salvages: Sequence[Salvage], known: Iterable[Problem]
) -> None:
    """Of samples with one key the first good one stays."""
    doubled = {p.key: p for p in known if p.kind == "double key"}
    hurt, kept = {s.shard.name: s for s in salvages}, set[str]()
    for shard in shards if doubled else ():
        salvage = hurt.get(shard.name)
        keys = (salvage.index.keys if salvage.index else []) if salvage else Index(index_path(folder / shard.name)).keys
        for row, key in enumerate(keys):
            if key in doubled and not (salvage and row in salvage.bad):
                if key in kept and salvage:
                    salvage.bad[row] = replace(doubled[key], shard=shard.name, row=row)
                kept.add(key)


# ------------------------------------------------------------------------------------------------------ writing


def _mend(folder: Place, meta: SetMeta, salvage: Salvage) -> list[str]:
    """Write what is good and set the damaged files aside; names of files whose bytes are the old ones again."""
    tar = folder / salvage.shard.name
    if salvage.bad:
        _write_kept(folder, meta, salvage)
        _set_aside(index_path(tar), tar)
        return []
    if not salvage.torn:
        return []
    _set_aside(tar, keep=True)
    index = read_bytes(index_path(tar))
    _write_again(tar, _packed(folder, meta, salvage))
    write_atomically(index_path(tar), index)  # that of an older writer says less
    return [tar.name]


def _write_again(tar: Place, samples: Iterable[tuple[str, str, Mapping[str, bytes]]]) -> None:
    """In the place of the damaged one, at once; a store that writes over nothing by itself is told to."""
    write_shard(local := scratch(tar.parent) / tar.name, samples)
    if is_remote(tar):
        with reaching(tar, "written"):
            system(tar).put_file(str(local), tar.path)
        for path in (local, index_path(local), local.with_name(f"{local.stem}_stats.json")):
            path.unlink()


def _write_kept(folder: Place, meta: SetMeta, salvage: Salvage) -> None:
    """In a set that `rollout` fills every shard has its name, so samples wait as units for those that are missing."""
    if exists(folder / "triplets.json"):
        from data_tools.rollout.spool import Made, give_back  # imports the models, which takes seconds

        give_back(folder, salvage.shard.name, (Made(*parts) for parts in _packed(folder, meta, salvage)))
    elif salvage.kept:
        write_shard(folder / _free_name(folder, salvage.shard.name), _packed(folder, meta, salvage))


def _packed(folder: Place, meta: SetMeta, salvage: Salvage) -> Iterator[tuple[str, str, Mapping[str, bytes]]]:
    """Keys, tasks and members of what is kept, as they lie in the tar; nothing is encoded again."""
    shard = ShardSet(folder, meta, [salvage.shard])
    for row in salvage.kept:
        members = {kind: bytes(content) for kind, content in shard.members(row).items()}
        yield shard.keys[row], json.loads(members[WORDS])["task"], members


def _free_name(folder: Place, name: str) -> str:
    """A name after all others of its part."""
    part = name.split("-")[0]
    tars = [n for n in names(folder) if n.startswith(f"{part}-") and SHARD.fullmatch(n)]
    numbers = [int(n.removesuffix(".tar").split("-")[1]) for n in tars]
    return f"{part}-{max(numbers, default=-1) + 1:06d}.tar"


def _set_aside(*files: Place, keep: bool = False) -> None:
    """Move files into ``.damaged``, in this order; with ``keep`` they also stay where they are."""
    for file in (f for f in files if exists(f)):
        make_folder(file.parent / ASIDE)
        copy(file, file.parent / ASIDE / file.name)
        if not keep:
            remove(file)
