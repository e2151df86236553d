"""Whether a sample can be what its names say: axes, grids, and a path that goes from noise to data."""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, pairwise

from v4e.errors import DataError
from v4e.nouns import Encoded, Grid, Rollout, Sample

ON_THE_TEACHERS_GRID = ("teacher_known_Cthw", "full_KCthw")
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of tensors, with their names


def check_shapes(sample: Sample, student: Grid, teacher: Grid | None, where: str) -> None:
    """DataError naming the first tensor or picture whose shape is not that of its name and grid; costs microseconds.

    Empty tensors stand for what a set does without, and pass.
    """
    for name, picture in (("source", sample.source), ("target", sample.target)):
        if picture and picture.size != (student.H, student.W):
            raise DataError(f"the {name} is {picture.size}, the grid {(student.H, student.W)}", where=where)
    if fault := _fault(_shapes(sample.encoded), _shapes(sample.rollout), student, teacher):
        raise DataError(fault, where=where)
    if sample.rollout and not all(a > b for a, b in pairwise(sample.rollout.sigma_K.tolist())):
        raise DataError("noise levels do not fall", where=where)


def _shapes(part: Encoded | Rollout | None) -> Shapes:
    return tuple((name, x.shape) for name, x in vars(part).items()) if part else ()


@lru_cache(maxsize=4096)  # samples of a set mostly differ in the lengths of their texts alone
def _fault(encoded: Shapes, rollout: Shapes, student: Grid, teacher: Grid | None) -> str:
    """What is wrong first, or nothing."""
    every = tuple((name, shape) for name, shape in (*encoded, *rollout) if math.prod(shape))
    wrong = (_misfits(every, student, teacher), _channels(every, encoded), _levels(every, rollout))
    return next(chain.from_iterable(wrong), "")


def _misfits(every: Shapes, student: Grid, teacher: Grid | None) -> Iterator[str]:
    """Not on the axes of their names, or not on their grids."""
    for name, shape in every:
        axes, grid = name.rpartition("_")[2], teacher if name in ON_THE_TEACHERS_GRID else student
        if len(shape) != len(axes):
            yield f"{name} is {list(shape)}, not {' '.join(axes)}"
        if grid and axes.endswith("thw") and shape[-3:] != (grid.t, grid.h, grid.w):
            yield f"{name} is {list(shape)}, the grid {[grid.t, grid.h, grid.w]}"


def _channels(every: Shapes, encoded: Shapes) -> Iterator[str]:
    """All latents have as many channels as the clip, all texts are as wide as each other."""
    clip = dict(encoded).get("clip_Cthw", ())
    for name, shape in every:
        if clip and name.endswith("Cthw") and shape[-4] != clip[0]:
            yield f"{name} has {shape[-4]} channels, the clip {clip[0]}"
    widths = {shape[-1] for name, shape in every if name.endswith("_LE")}
    if len(widths) > 1:
        yield f"texts are of different widths, {sorted(widths)}"


def _levels(every: Shapes, rollout: Shapes) -> Iterator[str]:
    """One state and one velocity at each noise level."""
    levels = dict(rollout).get("sigma_K", (0,))[0]
    for name, shape in every:
        if name.endswith("_KCthw") and shape[0] != levels:
            yield f"{name} has {shape[0]} states, but {levels} noise levels"
