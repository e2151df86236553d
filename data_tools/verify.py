"""`v4e-shards verify`: read every byte of a set and say what is wrong with it; `--repair` mends what can be mended.

A folder that `ingest` wrote is checked too: every line of its list, every byte of its pictures.

Nothing stops at the first fault: a set of a thousand shards should be mended once, not a thousand times. Every byte is
held against something: the index against the manifest, members against the index, and what lies between them (tar
headers, padding, the end) against what the writer puts there, which index and names determine.
"""

import argparse
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from xxhash import xxh3_128_digest

from data_tools.ingest.sources import count
from data_tools.ingest.triplets import LIST, verify_triplets
from v4e.data.disk import TEMPORARY, digest_of, hash_of, readable
from v4e.data.index import Member
from v4e.data.members import PICTURES, WORDS, declared, refuse_nonfinite, unpack
from v4e.data.places import Place, exists, listable, place, read_bytes, read_range, sizes
from v4e.data.shards import (
    BLOCK,
    SHARD,
    Index,
    SetMeta,
    ShardInfo,
    ShardSet,
    finished_indexes,
    index_path,
    read_manifest,
    tar_header,
)
from v4e.data.soundness import check_shapes
from v4e.errors import ConfigError, DataError
from v4e.journal import progress
from v4e.nouns import Clip, Grid, Sample
from v4e.verbs import Codec

X = TypeVar("X")
Y = TypeVar("Y")
WINDOW = 16  # samples a worker may be ahead by
SHORTEST_END, LONGEST_END = 2 * BLOCK, 1 << 20  # bytes of zeros; tar programs round files up to 10 kB


@dataclass(frozen=True)
class Problem:
    """One fault: a short name to count, a sentence that says where; shard, key and its row there, as far as known."""

    kind: str
    detail: str
    shard: str = ""
    key: str = ""
    row: int = -1


@dataclass
class Report:
    """What was read and what was wrong."""

    shards: int = 0
    samples: int = 0
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Faults by kind."""
        return Counter(p.kind for p in self.problems)

    def lines(self, most: int = 20) -> Iterator[str]:
        """For a terminal: what was read, the first faults, their counts."""
        yield f"{self.shards} shards, {self.samples} samples read, {self.decoded} decoded"
        yield from _first([f"{p.kind}: {p.detail}" for p in self.problems], most)
        yield from (f"{n} x {kind}" for kind, n in sorted(self.counts.items()))


def _first(lines: Sequence[str], most: int = 20) -> Iterator[str]:
    """For a terminal: not all of a million."""
    yield from lines[:most]
    if len(lines) > most:
        yield f"... and {len(lines) - most} more"


def psnr(a: Clip, b: Clip) -> float:
    """Peak signal-to-noise ratio of two clips of one size, in dB; infinite when they are equal."""
    error = (a.frames_T3HW.double() - b.frames_T3HW.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def verify(
    folder: str | Place,
    *,
    codec: Codec | None = None,
    decode: int = 16,
    least_psnr: float = 20.0,
    workers: int = 1,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Report:
    """Check hashes, tar structure, keys, tensors, shapes; with a codec also that latents are those of the pictures.

    A set without a readable manifest is checked by its indexes, and the manifest is the first of its problems.

    Args:
        codec: decodes the first and last frame of ``decode`` samples, evenly spread; of all samples if that is 0.
        least_psnr: in dB, below which a decoded frame does not count as its picture.
        workers: threads that read and check; the report is the same with any number.
        watch: wraps the sample numbers, for a progress bar.

    Raises:
        DataError: there is no set, or the store does not answer.
    """
    folder, report = place(folder), Report()
    whole, report.shards = _open(folder, report.problems)
    chosen = _spread(len(whole), decode or len(whole)) if codec else frozenset()
    for i, problems in check_samples(whole, workers, watch):
        report.samples += 1
        report.problems += problems
        if codec and i in chosen and not problems:
            report.decoded += 1
            report.problems += _check_pictures(whole, i, codec, least_psnr)
    return report


def check_samples(
    whole: ShardSet, workers: int = 1, watch: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Iterator[tuple[int, list[Problem]]]:
    """Each sample's number and what is wrong with it; with a shard's last sample also what follows that."""
    moved: set[str] = set()
    ends: dict[int, list[int]] = {}  # sample -> the shards that end with it: all but one of them empty
    for shard, n in enumerate(np.cumsum([s.samples for s in whole.shards])):
        ends.setdefault(max(0, int(n) - 1), []).append(shard)
    for i, problems in _in_order(lambda i: (i, _check_sample(whole, i)), watch(range(len(whole))), workers):
        behind = [problem for shard in ends.get(i, ()) for problem in _check_end(whole, shard)]
        yield i, [*_without_echoes(problems, moved), *_without_echoes(behind, moved)]


class _Notes:
    """Collects faults: ``with note(kind): check`` turns a DataError into a problem of that kind."""

    def __init__(self, shard: str = "", key: str = "", row: int = -1) -> None:
        self.problems: list[Problem] = []
        self._place = shard, key, row

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            self.problems.append(Problem(kind, str(error), *self._place))


# ------------------------------------------------------------------------------------------------ the whole set


def _open(folder: Place, problems: list[Problem]) -> tuple[ShardSet, int]:
    """The set without the shards of which nothing can be read, and how many it should have."""
    meta, shards = listed(folder, problems)
    there = sizes(folder) if listable(folder) else {s.name: s.bytes for s in shards}
    sound = []
    for shard in shards:
        note = _Notes(shard.name)
        with note("shard"):
            _check_size(folder / shard.name, shard, there)
        with note("index"):
            read_index(folder / shard.name, shard)
            sound += [replace(shard, bytes=there[shard.name])] if shard.name in there else []
        problems += note.problems
    problems += _strangers(folder, there, {s.name for s in shards})
    whole = ShardSet(folder, meta, sound)
    problems += _doubles(whole)
    return whole, len(shards)


def listed(folder: Place, problems: list[Problem]) -> tuple[SetMeta, list[ShardInfo]]:
    """What the manifest says; where it cannot be read, what settings and indexes say."""
    settings, note = folder / "settings.json", _Notes()
    with note("manifest"):
        meta, shards = read_manifest(folder)
        with note("settings"):
            if not exists(settings):
                raise DataError("is missing; without it nothing can be added", where=str(settings))
            if read_settings(settings) != meta:
                raise DataError("does not agree with the manifest", where=str(settings))
        problems += note.problems
        return meta, shards
    if not exists(settings):
        raise DataError(note.problems[0].detail)
    problems += note.problems
    names = [(name, index) for name, index in finished_indexes(folder)]
    hashes = (hash_of(read_bytes(index_path(folder / name))) for name, _ in names)
    infos = [ShardInfo(n, len(index), index.bytes, h) for (n, index), h in zip(names, hashes, strict=True)]
    return read_settings(settings), infos


def read_settings(path: Place) -> SetMeta:
    """What a folder was begun as; DataError when its settings cannot be read."""
    with readable(str(path)):
        return SetMeta.from_dict(json.loads(read_bytes(path)), str(path))


def read_index(tar: Place, shard: ShardInfo) -> Index:
    """A shard's index, held against the manifest; DataError naming the file."""
    path = index_path(tar)
    if hash_of(content := read_bytes(path)) != shard.index:
        raise DataError("the index is not the one the manifest names", where=str(path))
    if len(index := Index(path, content)) != shard.samples:
        raise DataError(f"does not hold {shard.samples} samples", where=str(path))
    return index


def _check_size(path: Place, shard: ShardInfo, there: Mapping[str, int]) -> None:
    if shard.name not in there:
        raise DataError("the shard is missing", where=str(path))
    if (size := there[shard.name]) != shard.bytes:
        raise DataError(f"the shard has {size} bytes, not {shard.bytes}", where=str(path))


def _strangers(folder: Place, there: Mapping[str, int], known: set[str]) -> Iterator[Problem]:
    """Shards that the manifest does not list, and what killed writers left."""
    whole = {n for n in there if SHARD.fullmatch(n) and index_path(Path(n)).name in there}
    for name in sorted(whole - known):
        yield Problem("unlisted shard", f"{folder / name}: a whole shard that the manifest does not list", name)
    for name in sorted(n for n in there if n.startswith(TEMPORARY)):
        fix = "left by a killed writer (delete it if no writer is at work)"
        yield Problem("temporary file", f"{folder / name}: {fix}")


def _doubles(whole: ShardSet) -> Iterator[Problem]:
    """Every sample whose key an earlier one has."""
    if len(set(map(hash, whole.keys))) == len(whole):  # eight bytes a key where a dict of them would take a hundred
        return
    seen: dict[str, str] = {}
    for shard, index in zip(whole.shards, whole.indexes, strict=True):
        for row, key in enumerate(index.keys):
            if key in seen:
                where = f"{whole.folder / shard.name}, key {key}"
                yield Problem("double key", f"{where}: {seen[key]} has it too", shard.name, key, row)
            seen.setdefault(key, shard.name)


# --------------------------------------------------------------------------------------------------- one sample


def _check_sample(whole: ShardSet, i: int) -> list[Problem]:
    """All that is wrong with one sample and with the bytes around its members."""
    shard, row = whole.locate(i)
    index, info = whole.index(shard), whole.shards[shard]
    note, members = _Notes(info.name, index.keys[row], row), index.members(row)
    start, end = _reach(index, row)
    with note("unread"):
        content = memoryview(read_range(whole.folder / info.name, start, max(0, min(end, info.bytes) - start)))
        with note("tar structure"):
            _check_frame(index, row, content, whole.place(i))
        with note("hash"):
            held = {kind: _cut(content, m, start, f"{whole.place(i)}.{kind}") for kind, m in members.items()}
            _check_content(index.keys[row], held, whole.meta, whole.place(i), note)
    return note.problems


def _reach(index: Index, row: int) -> tuple[int, int]:
    """Where a sample's bytes begin and end, its first header and last padding included."""
    members = list(index.members(row).values())
    if not members:
        return 0, 0
    return members[0].offset - BLOCK, members[-1].offset + _padded(members[-1].size)


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _cut(content: memoryview, member: Member, start: int, where: str) -> memoryview:
    part = content[member.offset - start : member.offset - start + member.size]
    if len(part) != member.size:
        raise DataError(f"the shard is cut short: {len(part)} of {member.size} bytes", where=where)
    if digest_of(part) != member.hash or (member.quick and xxh3_128_digest(part) != member.quick):
        raise DataError("its bytes are not those that were written", where=where)
    return part


def _check_frame(index: Index, row: int, content: memoryview, where: str) -> None:
    """Headers and padding are those that the writer makes: stock tools see these members and no others."""
    at = start = _reach(index, row)[0]
    if row and start != _reach(index, row - 1)[1]:
        raise DataError("does not begin where the sample before it ends", where=where)
    for kind, m in index.members(row).items():
        name, found = f"{index.keys[row]}.{kind}", content[at - start : at - start + BLOCK]
        if m.offset != at + BLOCK:
            raise DataError(f"member {name!r} does not lie where the one before it ends", where=where)
        with readable(where):  # a size may be beyond what a header can say
            wanted = tar_header(name, m.size)
        if found != wanted:
            raise DataError(f"the header of {name!r} is {_in_words(bytes(found))}", where=where)
        at = m.offset + _padded(m.size)
        if any(content[m.offset + m.size - start : at - start]):
            raise DataError(f"the padding after {name!r} is not empty", where=where)


def _in_words(header: bytes) -> str:
    """What a tar header says, for a message."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        return f"none ({error})"
    return f"that of {info.name!r}, type {info.type!r}, {info.size} bytes"


def _check_content(key: str, held: Mapping[str, memoryview], meta: SetMeta, where: str, note: _Notes) -> None:
    """What the members hold, once their bytes are known to be those that were written."""
    with note("picture"):
        for kind in PICTURES:
            if kind in held:
                _check_png(held[kind], meta.student, f"{where}.{kind}")
        with note("unreadable"):
            sample = unpack(key, held, where)
            with note("tensors"):
                _check_promise(sample, held[WORDS], where)
            with note("shape"):
                check_shapes(sample, meta.student, meta.teacher, where)


def _check_png(content: memoryview, grid: Grid, where: str) -> None:
    """A PNG of the grid's size, by its first bytes: a bomb is refused before it is unpacked."""
    head = bytes(content[:24])
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or len(head) < 24:
        raise DataError("is no PNG", where=where)
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    if (height, width) != (grid.H, grid.W):
        raise DataError(f"is {height}x{width}, not {grid.H}x{grid.W}", where=where)


def _check_promise(sample: Sample, words: memoryview, where: str) -> None:
    """Texts are texts, and tensors are finite and as KEY.json declares them."""
    with readable(where):
        promised = json.loads(bytes(words))["tensors"]
        texts = [sample.instruction, sample.evolution, sample.task]
        parts = {name: vars(p) for name in ("encoded", "rollout") if (p := getattr(sample, name)) is not None}
        held = {name: declared(tensors) for name, tensors in parts.items()}
    if not all(isinstance(text, str) for text in texts):
        raise DataError("instruction, evolution and task are not all text", where=where)
    if held != promised:
        wrong = sorted(n for n in held.keys() | promised.keys() if held.get(n) != promised.get(n))
        raise DataError(f"types or shapes of {', '.join(wrong)} are not the declared ones", where=where)
    for name, tensors in parts.items():
        refuse_nonfinite(tensors, f"{where}.{name}")


def _check_pictures(whole: ShardSet, i: int, codec: Codec, least: float) -> list[Problem]:
    """First and last decoded frame of the clip's latents are source and edited image."""
    (shard, row), where = whole.locate(i), whole.place(i)
    note = _Notes(whole.shards[shard].name, whole.keys[i], row)
    with note("decode"):
        sample = whole.sample(i, pictures=True)
        if not (sample.encoded and sample.source and sample.target):
            return []
        clip = codec.decode(sample.encoded.clip_Cthw[None].float())[0]
        for name, frame, picture in (("source", 0, sample.source), ("target", -1, sample.target)):
            if (found := psnr(clip.frame(frame), picture)) < least:
                raise DataError(f"the latents decode to the {name} at {found:.1f} dB only, not {least:g}", where=where)
    return note.problems


# ------------------------------------------------------------------------------------------------- shards' ends


def _check_end(whole: ShardSet, shard: int) -> list[Problem]:
    """After the last sample comes the end of the tar and nothing else: zeros, at least two blocks of them."""
    index, info = whole.index(shard), whole.shards[shard]
    end = _reach(index, len(index) - 1)[1] if len(index) else 0
    note = _Notes(info.name)
    with note("unread"):
        tail = bytes(read_range(whole.folder / info.name, end, min(LONGEST_END, max(0, info.bytes - end) + BLOCK)))
        with note("tar structure"):
            _check_tail(tail, str(whole.folder / info.name))
    return note.problems


def _check_tail(tail: bytes, where: str) -> None:
    if not SHORTEST_END <= len(tail) < LONGEST_END:
        raise DataError("the tar does not end where its samples do", where=where)
    if any(tail):
        at = next(at for at in range(0, len(tail), BLOCK) if any(tail[at : at + BLOCK]))
        found = _in_words(tail[at : at + BLOCK])
        raise DataError(f"a member that the index does not name follows the last sample: {found}", where=where)


# ------------------------------------------------------------------------------------------------------- small


def _without_echoes(problems: list[Problem], moved: set[str]) -> Iterator[Problem]:
    """A member too many or too few moves all that follow it: where bytes are wrong too, only a shard's first counts."""
    torn = any(p.kind == "hash" for p in problems)
    for p in problems:
        if p.kind != "tar structure" or not (p.shard in moved and (torn or not p.key)):
            yield p
        if p.kind == "tar structure":
            moved.add(p.shard)


def _in_order(check: Callable[[X], Y], items: Iterable[X], workers: int) -> Iterator[Y]:
    """What ``check`` says of each item, in their order; threads are never far ahead, so that memory stays small."""
    if workers < 2:
        yield from map(check, items)
        return
    stream = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        while window := list(islice(stream, WINDOW * workers)):
            yield from pool.map(check, window)


def _spread(n: int, wanted: int) -> frozenset[int]:
    """``wanted`` of n numbers, evenly spread."""
    return frozenset(i * n // wanted for i in range(wanted)) if n > wanted else frozenset(range(n))


# -------------------------------------------------------------------------------------------------------- verb


def codec_of(folder: str, whole: SetMeta | None = None) -> Codec | None:
    """The codec of a model's folder, or None; its libraries are slow to import and seldom needed.

    Raises:
        ConfigError: it is not the one with which the set was made, so that nothing could be said of the set.
    """
    if not folder:
        return None
    from data_tools.rollout import content_hash
    from v4e.models.codec import WanCodec
    from v4e.pipelines import CODEC_PARTS

    made_with = whole.settings.get("codec") if whole else None
    if made_with and (found := content_hash(folder, CODEC_PARTS)) != made_with:
        raise ConfigError(f"this codec is {found}, the set was made with {made_with}", where=f"--codec {folder}")
    return WanCodec.load(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards verify`."""
    parser.add_argument("folder", help="shard folder or URL, or one that ingest wrote")
    parser.add_argument("--codec", default="", help="model folder; some samples are decoded and compared")
    parser.add_argument("--decode", type=int, default=16, help="how many of them; 0 for all")
    parser.add_argument("--least-psnr", type=float, default=20.0, help="in dB, of a decoded frame against its picture")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and check")
    parser.add_argument("--repair", action="store_true", help="drop what is bad, so that it is made again")
    parser.add_argument("--seal", action="store_true", help="after a repair: call whole what is left")
    parser.add_argument("--most-dropped", type=float, default=0.1, help="share of samples that a repair may drop")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    if is_ingested(folder := place(args.folder)):
        return _verify_edits(folder, args)
    codec = codec_of(args.codec, listed(place(args.folder), [])[0] if args.codec else None)
    report = verify(
        args.folder,
        codec=codec,
        decode=args.decode,
        least_psnr=args.least_psnr,
        workers=args.workers,
        watch=lambda numbers: progress(numbers, "verify"),
    )
    print("\n".join(report.lines()))
    if args.repair and report.problems:
        from data_tools.repair import repair

        print("\n".join(repair(args.folder, report, most=args.most_dropped, seal=args.seal).lines()))
    return DataError.exit_code if report.problems else 0


def is_ingested(folder: Place) -> bool:
    """Whether a folder holds edits and no shards."""
    return exists(folder / LIST) and not exists(folder / "settings.json")


def _verify_edits(folder: Place, args: argparse.Namespace) -> int:
    if args.codec or args.repair:
        raise ConfigError(
            "--codec and --repair are for shards", where=str(folder), fix="docs/ingest.md says how edits are mended"
        )
    total = count(str(folder / LIST))
    found = [*verify_triplets(folder, workers=args.workers, watch=lambda lines: progress(lines, "verify", total=total))]
    print("\n".join([*_first(found), f"{len(found)} faults in {folder / LIST} and its pictures"]))
    return DataError.exit_code if found else 0
