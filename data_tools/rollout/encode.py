"""Triplets and clips as the DiTs see them; and shards of evolving clips, which need no more than that."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

import v4e
from v4e.data.disk import digest_of
from v4e.data.shards import Index, SetMeta, Setting, ShardWriter, finish, finished, index_path
from v4e.journal import progress
from v4e.losses import change_map
from v4e.models.codec import WanCodec
from v4e.models.folder import locate
from v4e.nouns import TEXT_TOKENS, Clip, Encoded, Grid, Origin, Rollout, Sample
from v4e.pipelines import CODEC_PARTS, BatchCodec

X = TypeVar("X")
TOOL = f"v4e {v4e.__version__}"
TEXTS, LOOKS = 1024, 64  # embeddings remembered on the device; at 14B of texts half a MB, of images 1.3 MB
Ends = Literal["first", "first_and_last", "both"]


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


class RolloutCodec(BatchCodec):
    """The batch codec, reading texts without the padding, which umT5 masks: the same but for rounding."""

    def _read_one(self, text: str) -> Tensor:
        tokens = self.tokenizer([text], max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").to(self.device)
        return self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]


class Encoder:
    """Makes samples as the DiTs see them; texts and images met before are remembered, for both repeat.

    Args:
        grids: of the student's and the teacher's clip.
        ends: which model's conditions to make; a pre-training set for one model need not pay for the other's, whose
            tensors are then empty.
    """

    def __init__(self, codec: WanCodec, grids: Grids, ends: Ends = "both") -> None:
        self.codec, self.grids, self.ends = codec, grids, ends
        self.read = lru_cache(maxsize=TEXTS)(lambda text: codec.read([text])[0])
        self._seen: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def __call__(self, items: Sequence[Evolving]) -> list[Encoded]:
        """Encode clips of the student's grid."""
        first, last = [i.clip.frame(0) for i in items], [i.clip.frame(-1) for i in items]
        both_known = self._unless("first", self.codec.known, first, self.grids.teacher, last)
        columns = {
            "clip_Cthw": self.codec.encode([i.clip for i in items]),
            "known_Cthw": self._unless("first_and_last", self._first_known, first, both_known),
            "text_LE": [self.read(i.instruction) for i in items],
            "null_LE": [self.read("")] * len(items),
            "vision_NV": self._look(first),
            "evolution_LE": [self.read(i.caption) for i in items],
            "teacher_known_Cthw": both_known,
            "vision_last_NV": self._unless("first", self._look, last),
            "change_thw": [change_map(i.clip.frames_T3HW, self.grids.student) for i in items],
        }
        rows = zip(*columns.values(), strict=True)
        return [Encoded(**dict(zip(columns, row, strict=True))) for row in rows]

    def _unless(self, ends: Ends, make: Callable[..., Tensor], images: Sequence[Clip], *more) -> Tensor:
        return torch.zeros(len(images), 0) if self.ends == ends else make(images, *more)

    def _first_known(self, first: Sequence[Clip], both_known_BCthw: Tensor) -> Tensor:
        """The VAE is causal: a longer clip with the same first frame and grey after it begins with the same latents."""
        t = self.grids.student.t
        if t < self.grids.teacher.t and self.ends == "both":
            return both_known_BCthw[:, :, :t]
        return self.codec.known(first, self.grids.student)

    def _look(self, images: Sequence[Clip]) -> Tensor:
        """Vision tokens [B, N, V]; one photograph often has several edits."""
        names = [digest_of(image.frames_T3HW.numpy().tobytes()) for image in images]
        known = {name: self._seen[name] for name in names if name in self._seen}
        for name, image in zip(names, images, strict=True):
            if name not in known:
                known[name] = self.codec.look([image])[0]
        self._seen = dict([*self._seen.items(), *known.items()][-LOOKS:])
        return torch.stack([known[name] for name in names])


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
        batch: clips that are encoded together (RolloutCodec), always the same ones.
        settings: what the clips depend on, such as a world's seed.
        total: number of items, for the progress bar.
        part, parts: this process packs units part, part + parts, ...; the last to end writes the manifest.

    Raises:
        DataError: the folder was begun with other settings, or the disk is full.
    """
    encode, origin = Encoder(RolloutCodec.over(codec), Grids(grid, grid), ends), origin or Origin(tool=TOOL)
    said = {"ends": ends, "batch": batch, "codec": content_hash(str(codec.source), CODEC_PARTS)}
    meta, seen = SetMeta("pretrain", grid, grid, {**said, **(settings or {})}), 0
    with ShardWriter(out, meta, samples_per_shard=samples_per_shard, part=part, manifest=False) as writer:
        ticks = progress(units(items, batch), "pack clips", total=total and -(-total // batch))
        for number, unit in enumerate(ticks):
            seen += len(unit)
            if number % parts == part and any(item.key not in writer.done for item in unit):
                encoded = encode(padded(unit, batch))
                _add_new(writer, [sample_of(i, e, None, origin) for i, e in zip(unit, encoded, strict=False)])
    return _finish_when_last(Path(out), seen)


def _add_new(writer: ShardWriter, samples: Iterable[Sample]) -> None:
    for sample in samples:
        if sample.key not in writer.done:
            writer.add(sample)


def _finish_when_last(out: Path, samples: int) -> Path:
    """Write the manifest once every part has ended, which is when as many samples are safe."""
    if sum(len(Index(index_path(out / shard))) for shard in finished(out)) == samples:
        finish(out)
    return out


def sample_of(item: Evolving, encoded: Encoded, rolled: Rollout | None, origin: Origin) -> Sample:
    """A sample without pictures."""
    return Sample(item.key, item.instruction, item.caption, None, None, encoded, rolled, item.task, origin)


def units(items: Iterable[X], size: int) -> Iterator[list[X]]:
    """Consecutive groups of ``size``; the last may be shorter."""
    stream = iter(items)
    while unit := list(islice(stream, size)):
        yield unit


def padded(unit: Sequence[X], size: int) -> list[X]:
    """The unit, filled up by repeating its last item."""
    return [*unit, *[unit[-1]] * (size - len(unit))]


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
