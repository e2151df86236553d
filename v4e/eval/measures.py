"""All that is measured of an edit on one's own data: pixels always, and what networks see where their weights are.

Most measures come three times: of the whole picture, of the edited region (``edit_``) and of the rest (``keep_``). A
network has no region, so for its similarities the output's pixels outside the region are replaced by the target's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from v4e.errors import CheckpointError
from v4e.eval.metrics import masked_ssim, psnr, sharpness, ssim
from v4e.eval.run import Case, mean
from v4e.models.features import Clipper, Dino, Eye, Layers, cosine
from v4e.nouns import Clip

REGIONS = ("", "edit_", "keep_")
NO_CAPTION = "a photo"  # what the direction of an instruction starts from where the data has no captions
AnEye = TypeVar("AnEye", bound=Eye)
Scores = dict[str, float | None]


@dataclass(frozen=True)
class Measure:
    """A column.

    Args:
        digits: behind the point.
        better: which way.
        regions: whether it is measured of the regions too.
    """

    title: str
    digits: int
    about: str
    better: str = "higher"
    regions: bool = True


MEASURES = {
    "psnr": Measure("PSNR", 1, "dB, at most 100; a mean over edits is one of their own dB values"),
    "ssim": Measure("SSIM", 3, "structural similarity, Gaussian window of 11 pixels, sigma 1.5, middles in the region"),
    "sharpness": Measure(
        "sharpness",
        2,
        "mean squared Laplacian of luma, output over target, each plus 20/12 for rounding; geometric mean",
        "near 1",
        regions=False,
    ),
    "perceptual": Measure(
        "LPIPS-style",
        3,
        "squared distance of unit features, mean over places and layers, unweighted: not the trained LPIPS",
        "lower",
    ),
    "clip": Measure("CLIP", 3, "cosine of the CLIP embeddings of output and target"),
    "clip_direction": Measure(
        "CLIP direction",
        3,
        f"cosine of the way from source to output and the way between the captions, or from {NO_CAPTION!r} to the "
        f"instruction where the data has none; 0 for a copy",
        regions=False,
    ),
    "dino": Measure("DINO", 3, "cosine of the DINO embeddings of output and target"),
}


@dataclass(frozen=True)
class Eyes:
    """The networks at hand; None where one is not.

    Args:
        absent: why, a sentence for each.
    """

    clip: Clipper | None = None
    dino: Dino | None = None
    perceptual: Layers | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def open(clip: str = "", dino: str = "", perceptual: str = "", device: str = "cpu") -> "Eyes":
        """Load those that are named: folders in transformers layout, or Hub ids that are in the cache."""
        absent: dict[str, str] = {}

        def opened(kind: type[AnEye], name: str, source: str) -> AnEye | None:
            if not source:
                absent[name] = f"{name} is not measured: name a folder with --{name}"
                return None
            try:
                return kind(source, device)
            except CheckpointError as error:
                absent[name] = f"{name} is not measured: {error}"
                return None

        network = opened(Layers, "perceptual", perceptual)
        return Eyes(opened(Clipper, "clip", clip), opened(Dino, "dino", dino), network, absent)

    @property
    def columns(self) -> list[str]:
        """Names of all that is measured, in the table's order."""
        eyes = {"clip": self.clip, "clip_direction": self.clip, "dino": self.dino, "perceptual": self.perceptual}
        there = {name: m for name, m in MEASURES.items() if eyes.get(name, self) is not None}
        return [f"{region}{n}" for n, m in there.items() for region in (REGIONS if m.regions else ("",))]


def measure_of(column: str) -> Measure:
    """The measure of ``edit_psnr`` is that of ``psnr``."""
    return MEASURES[column.removeprefix("edit_").removeprefix("keep_")]


@torch.no_grad()
def score(case: Case, outputs: Sequence[Clip], eyes: Eyes) -> list[Scores]:
    """Scores of several outputs of one case.

    Raises:
        ShapeError: sizes differ, or are too small for SSIM.
    """
    target_3HW, mask_HW = case.target.frames_T3HW[0], case.mask_HW
    seen = [_pixels(output.frames_T3HW[-1], target_3HW, mask_HW) for output in outputs]
    outputs_N3HW = torch.stack([output.frames_T3HW[-1] for output in outputs])
    for part in _networks(case, outputs_N3HW, eyes):
        for scores, more in zip(seen, part, strict=True):
            scores |= more
    return [{name: scores[name] for name in eyes.columns} for scores in seen]


def _pixels(output_3HW: Tensor, target_3HW: Tensor, mask_HW: Tensor) -> Scores:
    masks = {"edit_": mask_HW, "keep_": ~mask_HW}
    scores: Scores = {"psnr": psnr(output_3HW, target_3HW), "ssim": ssim(output_3HW, target_3HW)}
    scores |= {f"{region}psnr": psnr(output_3HW, target_3HW, mask) for region, mask in masks.items()}
    scores |= {f"{region}ssim": masked_ssim(output_3HW, target_3HW, mask) for region, mask in masks.items()}
    return scores | {"sharpness": sharpness(output_3HW, target_3HW)}


def _networks(case: Case, outputs_N3HW: Tensor, eyes: Eyes) -> Iterator[list[Scores]]:
    if eyes.perceptual:
        yield _distances(case, outputs_N3HW, eyes.perceptual)
    for name, eye in (("clip", eyes.clip), ("dino", eyes.dino)):
        if eye:
            yield _similarities(name, case, outputs_N3HW, eye.images)
    if eyes.clip:
        yield _directions(case, outputs_N3HW, eyes.clip)


def _similarities(name: str, case: Case, outputs_N3HW: Tensor, embed: Callable[[Tensor], Tensor]) -> list[Scores]:
    """Cosines with the target, whole and with each region alone changed."""
    target_13HW, mask_HW = case.target.frames_T3HW, case.mask_HW
    edited = torch.where(mask_HW, outputs_N3HW, target_13HW)
    kept = torch.where(mask_HW, target_13HW, outputs_N3HW)
    seen = embed(torch.cat([target_13HW, outputs_N3HW, edited, kept]))
    whole, edit, keep = (cosine(part, seen[:1]) for part in seen[1:].chunk(3))
    has_rest = not case.mask_HW.all()
    rows = zip(whole, edit, keep, strict=True)
    return [{name: w, f"edit_{name}": e, f"keep_{name}": k if has_rest else None} for w, e, k in rows]


def _directions(case: Case, outputs_N3HW: Tensor, clip: Clipper) -> list[Scores]:
    """Directional similarity (Gal et al. 2021, eq. 2), which InstructPix2Pix reports too."""
    before, after = clip.texts(case.captions or (NO_CAPTION, case.instruction))
    seen = clip.images(torch.cat([case.source.frames_T3HW, outputs_N3HW]))
    return [{"clip_direction": c} for c in cosine(seen[1:] - seen[:1], (after - before)[None].expand_as(seen[1:]))]


def _distances(case: Case, outputs_N3HW: Tensor, layers: Layers) -> list[Scores]:
    """LPIPS (Zhang et al. 2018, eq. 1) with all channels' weights 1, and the mean of the layers for their sum."""
    maps = layers.maps(torch.cat([case.target.frames_T3HW, outputs_N3HW]))
    apart = [(x[1:].double() - x[:1].double()).square().sum(1) for x in maps]  # of each layer [N, h, w]
    mask_HW = case.mask_HW.double()
    shares = {"": torch.ones_like(mask_HW), "edit_": mask_HW, "keep_": 1 - mask_HW}
    columns = {region: _over(apart, share) for region, share in shares.items()}
    return [{f"{r}perceptual": values[n] for r, values in columns.items()} for n in range(len(outputs_N3HW))]


def _over(apart: Sequence[Tensor], share_HW: Tensor) -> list[float | None]:
    """Mean over the layers of the mean over places, each counted by how much of it lies in a region."""
    by_layer = []
    for apart_Nhw in apart:
        h, w = apart_Nhw.shape[1:]
        share_hw = F.adaptive_avg_pool2d(share_HW[None], (h, w))[0]
        total = share_hw.sum().item()
        by_layer.append([(d * share_hw).sum().item() / total if total else None for d in apart_Nhw])
    return [mean(values) for values in zip(*by_layer, strict=True)]
