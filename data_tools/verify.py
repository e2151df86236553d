"""`v4e-shards verify`: read every byte of a set and say what is wrong with it.

Nothing stops at the first fault: a set of a thousand shards should be mended once, not a thousand times.
"""

import argparse
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from v4e.data.disk import TEMPORARY, plain_folder, readable
from v4e.data.members import TENSORS, WORDS, declared, refuse_nonfinite, unpack
from v4e.data.shards import Index, ShardSet, check_shard, finished, index_path, read_manifest
from v4e.errors import DataError
from v4e.journal import progress
from v4e.nouns import Clip, Encoded, Grid, Rollout, Sample
from v4e.verbs import Codec


@dataclass(frozen=True)
class Problem:
    """One fault: a short name to count, and a sentence that says where."""

    kind: str
    detail: str


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
        yield from (f"{p.kind}: {p.detail}" for p in self.problems[:most])
        if len(self.problems) > most:
            yield f"... and {len(self.problems) - most} more"
        yield from (f"{n} x {kind}" for kind, n in sorted(self.counts.items()))


def psnr(a: Clip, b: Clip) -> float:
    """Peak signal-to-noise ratio of two clips of one size, in dB; infinite when they are equal."""
    error = (a.frames_T3HW.double() - b.frames_T3HW.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def verify(
    folder: str | Path,
    *,
    codec: Codec | None = None,
    decode: int = 16,
    least_psnr: float = 20.0,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Report:
    """Check hashes, tar structure, keys, tensors, shapes; with a codec also that latents are those of the pictures.

    Args:
        codec: decodes the first and last frame of ``decode`` samples, evenly spread.
        least_psnr: in dB, below which a decoded frame does not count as its picture.
        watch: wraps the sample numbers, for a progress bar.

    Raises:
        DataError: the manifest itself is missing or unreadable, so there is nothing to check against.
    """
    folder = plain_folder(folder)
    report, note = Report(), _Notes()
    whole = _open(folder, note)
    report.shards, report.problems = len(whole.shards), note.problems
    for shard, index in zip(whole.shards, whole.indexes, strict=True):
        with note("tar structure"):
            _walk(folder / shard.name, index)
    chosen = _spread(len(whole), decode) if codec else frozenset()
    for i in watch(range(len(whole))):
        report.samples += 1
        sample = _check_sample(whole, i, note)
        if sample and codec and i in chosen:
            report.decoded += 1
            with note("decode"):
                _check_pictures(sample, codec, least_psnr, whole.place(i))
    return report


class _Notes:
    """Collects faults: ``with note(kind): check`` turns a DataError into a problem of that kind."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            self.problems.append(Problem(kind, str(error)))


def _open(folder: Path, note: _Notes) -> ShardSet:
    """The set without the shards of which nothing can be read; whatever is wrong is noted."""
    meta, listed = read_manifest(folder)
    sound = []
    for shard in listed:
        with note("shard"):
            check_shard(folder, shard)
        with note("index"):
            if len(Index(index_path(folder / shard.name))) != shard.samples:
                raise DataError(f"does not hold {shard.samples} samples", where=str(index_path(folder / shard.name)))
            sound += [shard] if (folder / shard.name).is_file() else []
    _note_strangers(folder, {s.name for s in listed}, note)
    whole = ShardSet(folder, meta, sound)
    with note("double key"):
        whole.refuse_doubles()
    return whole


def _note_strangers(folder: Path, known: set[str], note: _Notes) -> None:
    for name in sorted(set(finished(folder)) - known):
        with note("unlisted shard"):
            raise DataError("a whole shard that the manifest does not list", where=str(folder / name))
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        with note("temporary file"):
            raise DataError("left by a killed writer", where=str(path), fix="delete it if no writer is at work")


def _walk(path: Path, index: Index) -> None:
    """The tar, as stock tools see it, holds exactly the members of the index, at their places.

    Raises:
        DataError: at the first difference, a path that leaves the folder and a link among them.
    """
    wanted = {f"{key}.{kind}": m for row, key in enumerate(index.keys) for kind, m in index.members(row).items()}
    with readable(str(path)):
        for info in _members_of(path):
            if not info.isreg() or (m := wanted.pop(info.name, None)) is None:
                raise DataError(f"member {info.name!r} is not one the index names", where=str(path))
            if (info.offset_data, info.size) != (m.offset, m.size):
                raise DataError(f"member {info.name!r} does not lie where the index says", where=str(path))
    if wanted:
        raise DataError(f"{len(wanted)} members are missing, {next(iter(wanted))} first", where=str(path))


def _members_of(path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield from tar
    except tarfile.TarError as error:
        raise DataError(f"no whole tar: {error}", where=str(path)) from error


def _check_sample(whole: ShardSet, i: int, note: _Notes) -> Sample | None:
    """The sample, or None when its bytes are damaged."""
    with note("hash"):
        contents = {kind: c for kind in whole.kinds(i) if (c := whole.raw(i, kind)) is not None}
        with note("tensors"):
            _check_tensors(contents, whole.place(i))
        with note("unreadable"):
            sample = unpack(whole.keys[i], contents, whole.place(i))
            with note("shape"):
                _check_shapes(sample, whole.meta.student, whole.meta.teacher, whole.place(i))
            return sample
    return None


def _check_tensors(contents: Mapping[str, bytes], where: str) -> None:
    """Every tensor finite and as KEY.json declares it."""
    with readable(where):
        promised = json.loads(contents[WORDS])["tensors"]
        held = {k.removesuffix(".safetensors"): load_tensors(c) for k, c in contents.items() if k in TENSORS}
    if promised.keys() != held.keys():
        raise DataError(f"declares {sorted(promised)} but holds {sorted(held)}", where=where)
    for name, tensors in held.items():
        refuse_nonfinite(tensors, f"{where}.{name}")
        if declared(tensors) != promised[name]:
            raise DataError(f"types or shapes of {name} are not the declared ones", where=where)


def _check_shapes(sample: Sample, student: Grid, teacher: Grid | None, where: str) -> None:
    for name, x, grid in _on_grids(sample.encoded, sample.rollout, student, teacher):
        if grid and x.numel() and tuple(x.shape[-3:]) != (grid.t, grid.h, grid.w):
            raise DataError(f"{name} is {list(x.shape)}, the grid {[grid.t, grid.h, grid.w]}", where=where)
    if sample.rollout and not (sample.rollout.sigma_K.diff() < 0).all():
        raise DataError("noise levels do not fall", where=where)


def _on_grids(
    encoded: Encoded | None, rollout: Rollout | None, student: Grid, teacher: Grid | None
) -> Iterator[tuple[str, Tensor, Grid | None]]:
    """Every tensor that ends in t, h, w, with the grid it should have."""
    if encoded:
        yield from ((k, getattr(encoded, k), student) for k in ("clip_Cthw", "known_Cthw", "change_thw"))
        yield "teacher_known_Cthw", encoded.teacher_known_Cthw, teacher
    if rollout:
        yield from ((k, getattr(rollout, k), student) for k in ("x_KCthw", "v_KCthw", "end_Cthw"))
        yield "full_KCthw", rollout.full_KCthw, teacher


def _check_pictures(sample: Sample, codec: Codec, least: float, where: str) -> None:
    """First and last decoded frame of the clip's latents are source and edited image."""
    if not (sample.encoded and sample.source and sample.target):
        return
    clip = codec.decode(sample.encoded.clip_Cthw[None].float())[0]
    for name, frame, picture in (("source", 0, sample.source), ("target", -1, sample.target)):
        if (found := psnr(clip.frame(frame), picture)) < least:
            raise DataError(f"the latents decode to the {name} at {found:.1f} dB only, not {least:g}", where=where)


def _spread(n: int, wanted: int) -> frozenset[int]:
    """``wanted`` of n numbers, evenly spread."""
    return frozenset(i * n // wanted for i in range(wanted)) if n > wanted else frozenset(range(n))


def codec_of(folder: str) -> Codec | None:
    """The codec of a model's folder, or None; its libraries are slow to import and seldom needed."""
    if not folder:
        return None
    from v4e.models.codec import WanCodec

    return WanCodec.load(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards verify`."""
    parser.add_argument("folder", help="shard folder")
    parser.add_argument("--codec", default="", help="model folder; some samples are decoded and compared")
    parser.add_argument("--decode", type=int, default=16, help="how many of them")
    parser.add_argument("--least-psnr", type=float, default=20.0, help="in dB, of a decoded frame against its picture")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    report = verify(
        args.folder,
        codec=codec_of(args.codec),
        decode=args.decode,
        least_psnr=args.least_psnr,
        watch=lambda numbers: progress(numbers, "verify"),
    )
    print("\n".join(report.lines()))
    return DataError.exit_code if report.problems else 0
