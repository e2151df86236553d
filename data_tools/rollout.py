"""`v4e-shards rollout`: triplets and a teacher in, shards out; also shards without a teacher, and of evolving clips.

Work comes in units of a fixed number of samples, the last one padded by repeating, because matrix products are not
batch-invariant: a restart makes the same bytes only if every sample meets the same neighbours again.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

import v4e
from data_tools.ingest import Triplet, read_triplets
from v4e import config as settings_of
from v4e import flow
from v4e.data.collate import teacher_conditions
from v4e.data.disk import hash_of, to_json
from v4e.data.shards import Index, SetMeta, Setting, ShardWriter, finish, finished, index_path
from v4e.errors import ConfigError, DataError
from v4e.journal import progress
from v4e.losses import change_map
from v4e.models.attention import Attention
from v4e.models.codec import WanCodec
from v4e.models.folder import locate
from v4e.nouns import Clip, Encoded, Grid, Origin, Rollout, Sample, seed_of
from v4e.pipelines import CODEC_PARTS, BatchCodec, Guidance, Solver, TeacherPipeline, Trajectory, noise_of

X = TypeVar("X")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_TEACHER = "none"
TOOL = f"v4e {v4e.__version__}"
# Where things lie and who does which share change no sample; the teacher counts by its content.
NOT_IN_A_SAMPLE = ("teacher", "codec", "device", "part", "parts", "samples_per_shard", "stored", "dataset", "licence")


@dataclass(frozen=True)
class RolloutConfig:
    """Everything that decides what is in the shards.

    Args:
        teacher: FLF2V folder or Hub id; ``none`` encodes the triplets without roll-outs, for plain flow matching.
        codec: folder or Hub id whose VAE and encoders are used; empty for the teacher's.
        height, width: pixels; triplets of another size are scaled and cropped to it.
        teacher_frames: clip length of the teacher; Wan2.1's FLF2V knows 81.
        student_frames: clip length of the student.
        student_shift, step_counts: the roll-out stops at all levels of the student's few-step grids.
        solver: ``unipc`` as the teacher's folder sets it, or ``euler``.
        guidance, guidance_low, guidance_high: scale, and the noise levels between which it acts.
        keep_full: also keep the teacher's whole clip at each stop; the `block` term needs it.
        batch: triplets a pass of teacher and VAE; also the unit of work.
        dtype: the teacher's. ``stored``: of tensors in shards.
        fold_text_padding: faster text attention in a small model; see v4e/models/attention.py.
        threads: CPU threads, part of what makes restarts exact; 0 leaves torch's choice.
        part, parts: this process does units part, part + parts, ...; the last to end writes the manifest.
    """

    teacher: str = ""
    codec: str = ""
    height: int = 720
    width: int = 1280
    teacher_frames: int = 81
    student_frames: int = 5
    student_shift: float = 3.0
    step_counts: tuple[int, ...] = (1, 2, 4, 8)
    solver: Solver = "unipc"
    guidance: float = 5.5
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    keep_full: bool = True
    seed: int = 0
    batch: int = 1
    samples_per_shard: int = 64
    dtype: Literal["fp32", "bf16"] = "bf16"
    stored: Literal["fp32", "bf16"] = "bf16"
    attention: Attention = "auto"
    fold_text_padding: bool = False
    threads: int = 0
    device: str = ""
    part: int = 0
    parts: int = 1
    dataset: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ConfigError("no teacher is named", where="key teacher", fix="give a folder, a Hub id, or none")
        if not self.codec and self.teacher == NO_TEACHER:
            raise ConfigError("without a teacher, name a folder with a VAE and encoders", where="key codec")
        if not 0 <= self.part < self.parts:
            raise ConfigError(f"part {self.part} is not one of {self.parts}", where="keys part and parts")

    @property
    def levels(self) -> Tensor:
        """Noise levels [K + 1] at which the roll-out stops, fp64, falling to 0."""
        return flow.union_grid(self.step_counts, self.student_shift)

    @property
    def guide(self) -> Guidance:
        return Guidance(self.guidance, self.guidance_low, self.guidance_high)

    @property
    def place(self) -> str:
        """torch device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


class Evolving(NamedTuple):
    """A clip from a first to a last image. ``caption`` tells what happens, ``instruction`` what was asked."""

    key: str
    clip: Clip
    caption: str
    instruction: str
    task: str = ""


class Grids(NamedTuple):
    """The student's clip and the teacher's, of one picture size."""

    student: Grid
    teacher: Grid


# ------------------------------------------------------------------------------------------------ encoding


Ends = Literal["first", "first_and_last", "both"]


class Encoder:
    """Makes samples as the DiTs see them; texts met before are remembered, for captions repeat.

    Args:
        grids: of the student's and the teacher's clip.
        ends: which model's conditions to make; a pre-training set for one model need not pay for the other's, whose
            tensors are then empty.
    """

    def __init__(self, codec: WanCodec, grids: Grids, ends: Ends = "both") -> None:
        self.codec, self.grids, self.ends = codec, grids, ends
        self._read = lru_cache(maxsize=8192)(lambda text: codec.read([text])[0])

    @torch.no_grad()
    def __call__(self, items: Sequence[Evolving]) -> list[Encoded]:
        """Encode clips of the student's grid."""
        first, last = [i.clip.frame(0) for i in items], [i.clip.frame(-1) for i in items]
        columns = {
            "clip_Cthw": self.codec.encode([i.clip for i in items]),
            "known_Cthw": self._unless("first_and_last", self.codec.known, first, self.grids.student),
            "text_LE": [self._read(i.instruction) for i in items],
            "null_LE": [self._read("")] * len(items),
            "vision_NV": self.codec.look(first),
            "evolution_LE": [self._read(i.caption) for i in items],
            "teacher_known_Cthw": self._unless("first", self.codec.known, first, self.grids.teacher, last),
            "vision_last_NV": self._unless("first", self.codec.look, last),
            "change_thw": [change_map(i.clip.frames_T3HW, self.grids.student) for i in items],
        }
        rows = zip(*columns.values(), strict=True)
        return [Encoded(**dict(zip(columns, row, strict=True))) for row in rows]

    def _unless(self, ends: Ends, make: Callable[..., Tensor], images: Sequence[Clip], *more) -> Tensor:
        return torch.zeros(len(images), 0) if self.ends == ends else make(images, *more)


def pack_clips(
    items: Iterable[Evolving],
    out: str | Path,
    codec: WanCodec,
    grid: Grid,
    *,
    ends: Ends = "both",
    batch: int = 32,
    samples_per_shard: int = 512,
    settings: Mapping[str, Setting] | None = None,
    origin: Origin | None = None,
    total: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> Path:
    """Shards of evolving clips, to pre-train I2V (first frame known) and FLF2V (both ends known).

    Args:
        items: drawn lazily; a restart needs the same ones in the same order.
        grid: of the clips; here it is both models' grid.
        ends: see :class:`Encoder`; each of the three VAE passes a clip costs about the same.
        batch: clips that are encoded together (BatchCodec), always the same ones.
        settings: what the clips depend on, such as a world's seed.
        total: number of items, for the progress bar.
        part, parts: this process packs units part, part + parts, ...; the last to end writes the manifest.

    Raises:
        DataError: the folder was begun with other settings, or the disk is full.
    """
    encode, origin = Encoder(BatchCodec.over(codec), Grids(grid, grid), ends), origin or Origin(tool=TOOL)
    said = {"ends": ends, "batch": batch, "codec": content_hash(str(codec.source), CODEC_PARTS)}
    meta, seen = SetMeta("pretrain", grid, grid, {**said, **(settings or {})}), 0
    with ShardWriter(out, meta, samples_per_shard=samples_per_shard, part=part, manifest=False) as writer:
        ticks = progress(units(items, batch), "pack clips", total=total and -(-total // batch))
        for number, unit in enumerate(ticks):
            seen += len(unit)
            if number % parts == part and any(item.key not in writer.done for item in unit):
                encoded = encode(padded(unit, batch))
                _add_new(writer, [_sample(i, e, None, origin) for i, e in zip(unit, encoded, strict=False)])
    return _finish_when_last(Path(out), seen)


# ------------------------------------------------------------------------------------------------- rolling


@dataclass(frozen=True)
class Worker:
    """What turns a unit of triplets into samples; ``teacher`` is None to encode only."""

    config: RolloutConfig
    encode: Encoder
    teacher: TeacherPipeline | None
    origin: Origin

    @staticmethod
    def load(config: RolloutConfig) -> "Worker":
        """Load the models.

        Raises:
            CheckpointError: a folder or a component is missing or damaged.
            ShapeError: sizes or frames that the models cannot make.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        teacher = None if config.teacher == NO_TEACHER else _teacher(config)
        codec = WanCodec.load(config.codec, config.place) if config.codec or not teacher else teacher.codec
        student = codec.grid(config.student_frames, config.height, config.width)
        grids = Grids(student, student.with_frames(config.teacher_frames if teacher else config.student_frames))
        name = f"{config.teacher} {content_hash(config.teacher)}" if teacher else ""
        origin = Origin(config.dataset, config.licence, name, config.seed, TOOL)
        return Worker(config, Encoder(BatchCodec.over(codec) if config.batch > 1 else codec, grids), teacher, origin)

    @property
    def grids(self) -> Grids:
        return self.encode.grids

    def meta(self, triplets: Sequence[Triplet]) -> SetMeta:
        """What the set is; all that changes a sample's bytes is in it, weights and triplets by their content."""
        values = {k: v for k, v in asdict(self.config).items() if k not in NOT_IN_A_SAMPLE}
        values["step_counts"] = " ".join(map(str, self.config.step_counts))
        values["codec"] = content_hash(str(self.encode.codec.source), CODEC_PARTS)
        values["teacher"] = content_hash(self.config.teacher) if self.teacher else ""
        values["triplets"] = hash_of(to_json([[t.id, t.instruction, t.evolution, t.stamp] for t in triplets]))[:16]
        return SetMeta("rollout" if self.teacher else "encoded", self.grids.student, self.grids.teacher, values)

    def samples(self, unit: Sequence[Triplet]) -> list[Sample]:
        """One unit of work: the same triplets make the same bytes.

        Raises:
            DataError: an image cannot be read; it names file and key.
        """
        pairs = [self._pair(triplet) for triplet in unit]
        items = [self._item(t, *pair) for t, pair in zip(unit, pairs, strict=True)]
        full = padded(items, self.config.batch)
        encoded = self.encode(full)
        rolled = self._roll(full, encoded) if self.teacher else [None] * len(full)
        made = zip(items, pairs, encoded, rolled, strict=False)  # the padding is dropped
        return [
            replace(_sample(item, e, r, self.origin), source=source, target=target)
            for item, (source, target), e, r in made
        ]

    def _pair(self, triplet: Triplet) -> tuple[Clip, Clip]:
        size = (self.config.height, self.config.width)
        return triplet.read_source(size), triplet.read_target(size)

    def _item(self, triplet: Triplet, source: Clip, target: Clip) -> Evolving:
        """The student's clip: the source, then the edit held still."""
        clip = Clip.join([source, *[target] * (self.grids.student.T - 1)])
        return Evolving(triplet.id, clip, triplet.evolution, triplet.instruction, triplet.task)

    def _roll(self, items: Sequence[Evolving], encoded: Sequence[Encoded]) -> list[Rollout]:
        assert self.teacher is not None
        seeds = [seed_of(self.config.seed, item.key, "noise") for item in items]
        trajectory = self.teacher.rollout(
            noise_of(seeds, *encoded[0].teacher_known_Cthw.shape),
            teacher_conditions(encoded),
            self.config.levels,
            solver=self.config.solver,
            guidance=self.config.guide,
            fold=self.config.fold_text_padding,
        )
        return [self._kept(trajectory, b) for b in range(len(items))]

    def _kept(self, path: Trajectory, b: int) -> Rollout:
        """One sample's path, restricted to the latent frames the student makes."""
        frames = list(self.grids.teacher.shared_frames(self.grids.student))
        x, v, end = path.x_BKCthw[b], path.v_BKCthw[b], path.end_BCthw[b]
        full = x if self.config.keep_full else x[:0]
        return Rollout(path.sigma_K, x[:, :, frames], v[:, :, frames], full, end[:, frames])


def rollout(triplets: Sequence[Triplet], out: str | Path, config: RolloutConfig) -> Path:
    """Write one process's share of the shards; going on after a kill repeats no finished shard and changes no byte.

    Raises:
        DataError: a triplet cannot be used, the folder was begun with other settings, or the disk is full.
        CheckpointError: the teacher is missing or damaged.
    """
    if config.teacher != NO_TEACHER and (bare := [t.id for t in triplets if not t.evolution]):
        raise DataError(f"{len(bare)} triplets have no evolution prompt, {bare[0]} first", fix="run v4e-shards evolve")
    worker = Worker.load(config)
    mine = list(units(triplets, config.batch))[config.part :: config.parts]
    writer = ShardWriter(
        out,
        worker.meta(triplets),
        samples_per_shard=config.samples_per_shard,
        dtype=TYPES[config.stored],
        part=config.part,
        manifest=False,
    )
    with writer:
        for unit in progress(mine, "roll out" if worker.teacher else "encode"):
            if any(t.id not in writer.done for t in unit):
                _add_new(writer, worker.samples(unit))
    return _finish_when_last(Path(out), len(triplets))


def _add_new(writer: ShardWriter, samples: Iterable[Sample]) -> None:
    for sample in samples:
        if sample.key not in writer.done:
            writer.add(sample)


def _finish_when_last(out: Path, samples: int) -> Path:
    """Write the manifest once every part has ended, which is when as many samples are safe."""
    if sum(len(Index(index_path(out / shard))) for shard in finished(out)) == samples:
        finish(out)
    return out


def _teacher(config: RolloutConfig) -> TeacherPipeline:
    teacher = TeacherPipeline.from_pretrained(config.teacher, dtype=TYPES[config.dtype], attention=config.attention)
    teacher.set_progress_bar_config(disable=True)
    return teacher.to(config.place)


@cache
def content_hash(source: str, parts: tuple[str, ...] = (*CODEC_PARTS, "transformer", "scheduler")) -> str:
    """Sixteen hex digits over the weights and configs of a pipeline's parts, so that moving it changes nothing."""
    folder, digest = locate(source, ["*"]), hashlib.blake2b(digest_size=8)
    files = (path for part in parts for path in (folder / part).glob("*"))
    for path in sorted(p for p in files if p.suffix in (".json", ".safetensors")):
        digest.update(f"{path.relative_to(folder)} ".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _sample(item: Evolving, encoded: Encoded, rolled: Rollout | None, origin: Origin) -> Sample:
    return Sample(item.key, item.instruction, item.caption, None, None, encoded, rolled, item.task, origin)


# ------------------------------------------------------------------------------------------------- units


def units(items: Iterable[X], size: int) -> Iterator[list[X]]:
    """Consecutive groups of ``size``; the last may be shorter."""
    stream = iter(items)
    while unit := list(islice(stream, size)):
        yield unit


def padded(unit: Sequence[X], size: int) -> list[X]:
    """The unit, filled up by repeating its last item."""
    return [*unit, *[unit[-1]] * (size - len(unit))]


# --------------------------------------------------------------------------------------------------- verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards rollout`."""
    parser.add_argument("triplets", help="folder written by `v4e-shards ingest` and `evolve`")
    parser.add_argument("out", help="shard folder; an unfinished one is gone on with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of the file")
    parser.add_argument("--teacher", help="FLF2V folder or Hub id, or none; short for teacher=...")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="WORD", help="a YAML file with the settings, key=value, or both"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    words = [*args.overrides, *(word for word in args.config if "=" in word)]
    files = [word for word in args.config if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one settings file is enough, not {len(files)}", where=f"--config {' '.join(files)}")
    words = [*([f"teacher={args.teacher}"] if args.teacher else []), *words]
    config = settings_of.load(files[0] if files else None, words, lambda _: RolloutConfig, recipe="rollout")
    print(settings_of.to_yaml(config))
    rollout(read_triplets(args.triplets), args.out, config)
    return 0
