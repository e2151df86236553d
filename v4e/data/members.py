"""One sample as the files of a tar group: KEY.json, two PNGs and up to two safetensors; never a pickle."""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import TensorSpec, serialize
from torch import Tensor

from v4e.data.disk import readable, to_json
from v4e.errors import DataError
from v4e.nouns import Clip, Encoded, Origin, Rollout, Sample

WORDS = "json"
PICTURES = ("source.png", "target.png")
TENSORS = ("encoded.safetensors", "rollout.safetensors")
MEMBERS = (WORDS, *PICTURES, *TENSORS)
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,75}")  # with its longest ending a name fits tar's 100 bytes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INFINITY = {  # as integers with and without a sign: least ones that stand for no finite number
    "F64": (("i8", 0x7FF0 << 48), ("u8", 0xFFF0 << 48)),
    "F32": (("i4", 0x7F80 << 16), ("u4", 0xFF80 << 16)),
    "F16": (("i2", 0x7C00), ("u2", 0xFC00)),
    "BF16": (("i2", 0x7F80), ("u2", 0xFF80)),
}
HEADERS = 4096  # kept parsed: samples of a set mostly differ in the lengths of their texts alone
PRECISE = ("sigma_K",)  # stored as fp32 whatever the set's dtype: solver levels differ in their last digits


def check_key(key: str, where: str) -> str:
    """The key itself; DataError when it could not be a file's name in a tar, or webdataset would split it."""
    if not KEY.fullmatch(key):
        raise DataError(
            f"key {key!r} is no legal name",
            where=where,
            fix="use at most 76 ASCII letters, digits, _ and -, the first a letter or digit",
        )
    return key


def pack(sample: Sample, dtype: torch.dtype = torch.bfloat16) -> dict[str, bytes]:
    """A sample's members, in the order they are written; floating-point tensors are stored as ``dtype``.

    Raises:
        DataError: a tensor is not finite, or its picture is a clip of several frames.
    """
    parts = {name: _stored(part, dtype) for name, part in _parts(sample).items()}
    for name, tensors in parts.items():
        refuse_nonfinite(tensors, f"key {sample.key}.{name}")
    members = {WORDS: to_json(_describe(sample, parts))}
    for kind, clip in zip(PICTURES, (sample.source, sample.target), strict=True):
        if clip is not None:
            members[kind] = to_png(clip)
    return members | {name: save_tensors(tensors) for name, tensors in parts.items()}


def unpack(key: str, members: Mapping[str, bytes | memoryview], where: str, finite: bool = False) -> Sample:
    """The sample that :func:`pack` took apart; what is not among ``members`` is None.

    Args:
        finite: refuse numbers that are not.

    Raises:
        DataError: a member cannot be read, or a field is missing.
    """
    with readable(where):
        words = json.loads(bytes(members[WORDS]))
        source, target = (members.get(kind) for kind in PICTURES)
        encoded, rollout = (members.get(kind) for kind in TENSORS)
        if gone := [name for name in words["tensors"] if f"{name}.safetensors" not in members]:
            raise DataError(f"lacks the tensors {' and '.join(gone)} that {WORDS} declares", where=where)
        return Sample(
            key=key,
            instruction=words["instruction"],
            evolution=words["evolution"],
            source=from_png(source) if source is not None else None,
            target=from_png(target) if target is not None else None,
            encoded=Encoded(**_loaded(encoded, finite, where)) if encoded is not None else None,
            rollout=Rollout(**_loaded(rollout, finite, where)) if rollout is not None else None,
            task=words["task"],
            origin=Origin(**words["origin"]),
        )


def save_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Contiguous CPU tensors as safetensors: ``safetensors.torch.save`` without its checks, ten times as fast."""
    specs = {name: _spec(x) for name, x in tensors.items()}
    return bytes(serialize(specs, metadata=None))


def load_tensors(content: bytes | memoryview) -> dict[str, Tensor]:
    """Inverse of :func:`save_tensors`: ``safetensors.torch.load`` without its copies, where ``content`` is writable.

    Raises:
        ValueError, TypeError, KeyError: it is no whole safetensors file.
    """
    view = memoryview(content)
    view = memoryview(bytearray(view)) if view.readonly else view
    return {name: x for run in _runs(_header(view), len(view)) for name, x in _tensors(view, run)}


def all_finite(content: bytes | memoryview) -> bool:
    """Whether every number of a safetensors file is, found at memory's speed: what is not has the largest exponent.

    As integers of its width it is then at least infinity, or, without a sign, minus infinity.
    """
    view = memoryview(content)
    for run in _runs(_header(view), len(view)):
        for kind, least in INFINITY.get(run.dtype, ()):
            if run.size and np.frombuffer(view, kind, run.size, run.first).max() >= least:
                return False
    return True


class _Row(NamedTuple):
    """A tensor in a safetensors file: what it is, and its first byte and the one after its last, behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    def check(self, size: int) -> None:
        """ValueError where it does not lie in so many bytes."""
        fits = 0 <= self.first <= self.last <= size
        if not fits or math.prod(self.shape) * DTYPES[self.dtype].itemsize != self.last - self.first:
            what = (
                f"a tensor {self.dtype} {list(self.shape)} does not lie in bytes {self.first} to {self.last} of {size}"
            )
            raise ValueError(what)


class _Run(NamedTuple):
    """Tensors of one type that lie one after the other, the first at byte ``first`` of their file."""

    dtype: str
    first: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    size: int

    @staticmethod
    def of(rows: Sequence[_Row], start: int) -> "_Run":
        sizes = tuple(math.prod(row.shape) for row in rows)
        names, shapes = tuple(row.name for row in rows), tuple(row.shape for row in rows)
        return _Run(rows[0].dtype, start + rows[0].first, names, shapes, sizes, sum(sizes))


def _header(view: memoryview) -> bytes:
    """A safetensors file up to where its tensors begin."""
    return bytes(view[: 8 + int.from_bytes(view[:8], "little")])


@lru_cache(maxsize=HEADERS)
def _runs(header: bytes, size: int) -> tuple[_Run, ...]:
    """What lies where in a file of ``size`` bytes; ValueError where it cannot."""
    words = json.loads(header[8:])
    words.pop("__metadata__", None)
    rows = [_Row(n, row["dtype"], tuple(row["shape"]), *row["data_offsets"]) for n, row in words.items()]
    runs: list[list[_Row]] = []
    for row in sorted(rows, key=attrgetter("first", "last")):
        row.check(size - len(header))
        if runs and (row.dtype, row.first) == (runs[-1][-1].dtype, runs[-1][-1].last):
            runs[-1].append(row)
        else:
            runs.append([row])
    return tuple(_Run.of(run, len(header)) for run in runs)


def _tensors(view: memoryview, run: _Run) -> Iterator[tuple[str, Tensor]]:
    """Views of one tensor: making each of bytes of its own takes three times as long."""
    dtype = DTYPES[run.dtype]
    empty = torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(view, dtype=dtype, count=run.size, offset=run.first) if run.size else empty
    parts = zip(run.names, flat.split_with_sizes(run.sizes), run.shapes, strict=True)
    return ((name, part.view(shape)) for name, part, shape in parts)


def _loaded(content: bytes | memoryview, finite: bool, where: str) -> dict[str, Tensor]:
    tensors = load_tensors(content)
    if finite and not all_finite(content):
        refuse_nonfinite(tensors, where)
    return tensors


def refuse_nonfinite(tensors: Mapping[str, Tensor], where: str) -> None:
    """DataError naming the first tensor that holds an inf or a nan."""
    for name, x in tensors.items():
        if not x.sum().isfinite() and not x.isfinite().all():  # the sum is three times faster and rarely overflows
            raise DataError(f"tensor {name} is not finite in the stored type {x.dtype}", where=where)


def declared(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """Types and shapes, as KEY.json declares them."""
    return {k: {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)} for k, x in tensors.items()}


def to_png(clip: Clip) -> bytes:
    """An image (T = 1) as PNG, lightly compressed: photographs gain little from more."""
    if len(clip) != 1:
        raise DataError(f"a picture is one frame, not {len(clip)}")
    buffer = io.BytesIO()
    as_image(clip).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def as_image(clip: Clip) -> Image.Image:
    """A clip's last frame as a picture."""
    return Image.fromarray(clip.frames_T3HW[-1].movedim(0, -1).contiguous().cpu().numpy())


def from_png(content: bytes | memoryview) -> Clip:
    """An image (T = 1) from PNG bytes.

    Raises:
        ValueError, OSError, SyntaxError: it is none, or one that would take up the memory.
    """
    try:
        picture = np.array(Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(error) from error
    return Clip(torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous())


def _parts(sample: Sample) -> dict[str, Encoded | Rollout]:
    both = zip(TENSORS, (sample.encoded, sample.rollout), strict=True)
    return {name: part for name, part in both if part is not None}


def _stored(part: Encoded | Rollout, dtype: torch.dtype) -> dict[str, Tensor]:
    return {f.name: _cast(f.name, getattr(part, f.name), dtype) for f in fields(part)}


def _cast(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    kind = x.dtype if not x.is_floating_point() else torch.float32 if name in PRECISE else dtype
    return x.detach().to("cpu", kind).contiguous()


def _spec(x: Tensor) -> TensorSpec:
    return TensorSpec(
        dtype=str(x.dtype).removeprefix("torch."), shape=x.shape, data_ptr=x.data_ptr(), data_len=x.nbytes
    )


def _describe(sample: Sample, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, object]:
    return {
        "instruction": sample.instruction,
        "evolution": sample.evolution,
        "task": sample.task,
        "origin": asdict(sample.origin),
        "tensors": {name.removesuffix(".safetensors"): declared(tensors) for name, tensors in parts.items()},
    }
