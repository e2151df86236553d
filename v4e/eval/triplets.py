"""One's own edits to evaluate on: a shard set, or a list of them as lines of json. Each is read when it is wanted."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from v4e import photos
from v4e.data.disk import hash_of, readable
from v4e.data.members import PICTURES, WORDS, check_key, from_png
from v4e.data.places import Place, exists, is_remote, place, read_bytes, shown
from v4e.data.shards import ShardSet
from v4e.errors import DataError
from v4e.eval.metrics import edit_mask
from v4e.eval.run import Case
from v4e.jobs import require_instruction
from v4e.nouns import Clip, Grid
from v4e.pipelines import as_clip

LIST = "triplets.jsonl"  # of a folder that `v4e-shards ingest` wrote
CROPPED = 1.02  # shapes further apart would be cropped to different views: the edit would be a zoom

SizeFor = Callable[[int, int], tuple[int, int]]
FamilyOf = Callable[[str], str]


class Edits(Protocol):
    """A numbered list of cases.

    Attributes:
        identity: changes when the list does.
    """

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a message calls edit ``i``, though it be damaged."""
        ...

    def case(self, i: int) -> Case:
        """Read it; a V4EError says why it cannot be used."""
        ...


def open_edits(where: str, size_for: SizeFor, family_of: FamilyOf = lambda task: "") -> Edits:
    """A shard set, an ingested folder, or a jsonl file.

    Args:
        size_for: height and width of a picture -> those at which it is evaluated, where the data does not say.
        family_of: family of a task, "" for none, where the data does not say.

    Raises:
        DataError: nothing is there, or it is neither.
    """
    at = place(where)
    if at.name.endswith(".jsonl"):
        return ListedEdits.read(at, size_for, family_of)
    if exists(at / LIST):
        return ListedEdits.read(at / LIST, size_for, family_of)
    return ShardEdits(ShardSet.open(at, verify="none"), family_of)


@dataclass(frozen=True)
class ShardEdits:
    """The pictures and words of a shard set; its tensors are not read."""

    shards: ShardSet
    family_of: FamilyOf

    @property
    def identity(self) -> str:
        return self.shards.identity

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, i: int) -> str:
        return self.shards.name(i)

    def case(self, i: int) -> Case:
        members, where = self.shards.members(i, (WORDS, *PICTURES)), self.shards.place(i)
        with readable(where):
            words = json.loads(bytes(members[WORDS]))
            source, target = (from_png(members[kind]) for kind in PICTURES)
            task = _optional(words, "task")
            return _case(self.shards.keys[i], _text(words, "instruction"), source, target, task, self.family_of(task))


@dataclass(frozen=True)
class ListedEdits:
    """Lines of json: id, instruction, source, edited; perhaps task, family, mask, size and the pictures' captions."""

    home: Place
    lines: tuple[bytes, ...]
    size_for: SizeFor
    family_of: FamilyOf

    @staticmethod
    def read(path: Place, size_for: SizeFor, family_of: FamilyOf) -> "ListedEdits":
        """A jsonl file, whose pictures are named relative to it."""
        lines = photos.fetch(str(path), "list of edits").split(b"\n")
        return ListedEdits(path.parent, tuple(line for line in lines if line.strip()), size_for, family_of)

    @property
    def identity(self) -> str:
        return hash_of(b"\n".join(self.lines))[:16]

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, i: int) -> str:
        return f"edit {i + 1} of the list"

    def case(self, i: int) -> Case:
        row = _object(self.lines[i])
        key = check_key(_text(row, "id"), self.name(i))
        with readable(f"key {key}"):
            source, target = self._picture(row, "source"), self._picture(row, "edited")
            mask = self._picture(row, "mask") if row.get("mask") else None
            _require_one_shape(source, target, *([mask] if mask else []))
            height, width = map(int, row.get("size") or self.size_for(source.height, source.width))
            size = _possible(height, width)
            task = _optional(row, "task")
            return _case(
                key,
                _text(row, "instruction"),
                as_clip(_fit(source, size)),
                as_clip(_fit(target, size)),
                task,
                _optional(row, "family") or self.family_of(task),
                None if mask is None else _mask(_fit(mask, size)),
                _captions(row),
            )

    def _picture(self, row: Mapping, name: str) -> Image.Image:
        """Upright RGB; what changed since it was ingested is refused."""
        said = _text(row, name)
        at = place(said)
        at = at if is_remote(at) else self.home / said
        content = read_bytes(at) if is_remote(at) else photos.fetch(str(at), "picture")
        if (known := (row.get("hashes") or {}).get(name)) and xxh3_128_hexdigest(content) != known:
            raise DataError("changed since it was ingested", where=shown(at), fix="run v4e-shards ingest again")
        return photos.decode(content, shown(at)).rgb


# --------------------------------------------------------------------------------------------------- inside


def _case(
    key: str,
    instruction: str,
    source: Clip,
    target: Clip,
    task: str,
    family: str,
    mask_HW: Tensor | None = None,
    captions: tuple[str, str] | None = None,
) -> Case:
    """A case; where nobody says where its edit is, the two pictures do.

    Raises:
        DataError: there is nothing to do, or nothing to compare.
        ShapeError: the size does not divide into latents.
    """
    require_instruction(instruction)
    Grid(1, *source.size)  # which no model could edit otherwise
    if source.size != target.size:
        raise DataError(f"source and edited image have unequal sizes, {source.size} and {target.size}")
    if torch.equal(source.frames_T3HW, target.frames_T3HW):
        raise DataError("source and edited image are the same")
    if mask_HW is None:
        mask_HW = edit_mask(source.frames_T3HW[0], target.frames_T3HW[0])
    if not mask_HW.any():
        raise DataError("its mask is empty", fix="leave the mask out, and it is computed")
    groups = (family,) if family else ()
    return Case(key, task, instruction, source, target, mask_HW, groups, captions=captions)


def _object(line: bytes) -> Mapping:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError("no JSON object", fix='write {"id": "a", "instruction": ..., "source": ..., "edited": ...}')
    return row


def _possible(height: int, width: int) -> tuple[int, int]:
    if not 0 < height * width <= photos.MAX_PIXELS or height < 0:
        raise DataError(f"{height} x {width} is no size of a picture")
    return height, width


def _require_one_shape(source: Image.Image, *others: Image.Image) -> None:
    for other in others:
        ratio = source.width * other.height / (source.height * other.width)
        if max(ratio, 1 / ratio) > CROPPED:
            raise DataError(f"pictures have unequal shapes, {source.size} and {other.size}", fix="crop them alike")


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to cover height and width, and cropped in the middle, as `v4e-shards ingest` does."""
    wanted = size[1], size[0]
    return picture if picture.size == wanted else ImageOps.fit(picture, wanted, Image.Resampling.LANCZOS)


def _mask(picture: Image.Image) -> Tensor:
    """Bright is edited."""
    return as_clip(picture).frames_T3HW[0].amax(0) > 127


def _captions(row: Mapping) -> tuple[str, str] | None:
    source, edited = _optional(row, "source_caption"), _optional(row, "edited_caption")
    return (source, edited) if source and edited else None


def _text(row: Mapping, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{name} is {'missing' if value in (None, '') else f'{value!r} and no text'}")
    return value


def _optional(row: Mapping, name: str) -> str:
    return _text(row, name) if row.get(name) else ""
