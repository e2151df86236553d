"""Whether a sample can be what its names say: axes, grids, and a path that goes from noise to data."""

from collections.abc import Iterator

from torch import Tensor

from v4e.errors import DataError
from v4e.nouns import Encoded, Grid, Rollout, Sample

ON_THE_TEACHERS_GRID = ("teacher_known_Cthw", "full_KCthw")


def check_shapes(sample: Sample, student: Grid, teacher: Grid | None, where: str) -> None:
    """DataError naming the first tensor or picture whose shape is not that of its name and grid; costs microseconds.

    Empty tensors stand for what a set does without, and pass.
    """
    for name, picture in (("source", sample.source), ("target", sample.target)):
        if picture and picture.size != (student.H, student.W):
            raise DataError(f"the {name} is {picture.size}, the grid {(student.H, student.W)}", where=where)
    for name, x in _tensors(sample):
        axes, grid = name.rpartition("_")[2], teacher if name in ON_THE_TEACHERS_GRID else student
        if x.numel() and x.ndim != len(axes):
            raise DataError(f"{name} is {list(x.shape)}, not {' '.join(axes)}", where=where)
        if x.numel() and grid and axes.endswith("thw") and tuple(x.shape[-3:]) != (grid.t, grid.h, grid.w):
            raise DataError(f"{name} is {list(x.shape)}, the grid {[grid.t, grid.h, grid.w]}", where=where)
    if sample.encoded:
        _check_channels(sample.encoded, sample.rollout, where)
    if sample.rollout:
        _check_path(sample.rollout, where)


def _tensors(sample: Sample) -> Iterator[tuple[str, Tensor]]:
    parts = (part for part in (sample.encoded, sample.rollout) if part is not None)
    return ((name, x) for part in parts for name, x in vars(part).items())


def _check_channels(encoded: Encoded, rollout: Rollout | None, where: str) -> None:
    """All latents have as many channels as the clip, all texts are as wide as each other."""
    latents = {name: getattr(encoded, name) for name in ("known_Cthw", "teacher_known_Cthw")}
    paths = {name: x[0] for name, x in vars(rollout).items() if "Cthw" in name and len(x)} if rollout else {}
    paths |= {"end_Cthw": rollout.end_Cthw} if rollout else {}
    for name, x in (latents | paths).items():
        if x.numel() and len(x) != len(encoded.clip_Cthw):
            raise DataError(f"{name} has {len(x)} channels, the clip {len(encoded.clip_Cthw)}", where=where)
    widths = {x.shape[-1] for x in (encoded.text_LE, encoded.null_LE, encoded.evolution_LE) if x.numel()}
    if len(widths) > 1:
        raise DataError(f"texts are of different widths, {sorted(widths)}", where=where)


def _check_path(rollout: Rollout, where: str) -> None:
    """One state and one velocity at each noise level; the levels fall."""
    for name in ("x_KCthw", "v_KCthw", "full_KCthw"):
        if (x := getattr(rollout, name)).numel() and len(x) != len(rollout.sigma_K):
            raise DataError(f"{name} has {len(x)} states, but {len(rollout.sigma_K)} noise levels", where=where)
    if not (rollout.sigma_K.diff() < 0).all():
        raise DataError("noise levels do not fall", where=where)
