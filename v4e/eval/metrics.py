"""What is measured of one edited image, as pure functions of uint8 pixels.

Images are uint8 [3, H, W]; masks are bool [H, W], true where the edit may change something.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from v4e.errors import ShapeError

PSNR_CEILING = 100.0  # identical pixels would be infinite, which neither a mean nor JSON can hold
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # an 11-pixel window (Wang et al. 2004, section III-B)
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
CHANGED = 25  # grey levels of 255, a tenth of full scale: more is an edit, less the noise of codecs
REACH = 128  # a computed mask is widened by this fraction of the shorter side, and by a pixel at least
LEAST_KEPT = 1 / 20  # what a computed mask must leave; less is the seams of an edit of everything
ROUNDING_ENERGY = 20 / 12  # what rounding to uint8 (variance 1/12) leaves of the Laplacian 4, -1, -1, -1, -1


@dataclass(frozen=True)
class Scores:
    """One output against its target.

    Args:
        psnr: over the whole image, in dB.
        edit_psnr: over the edited region, in dB.
        keep_psnr: outside it, in dB; None where the edit covers everything, as a style does.
        ssim: structural similarity of the whole image, 1 at identity.
        sharpness: detail energy relative to the target's; 1 is as sharp, below is blurred.
        success: the judge's word, 1.0 or 0.0; None without a judge.
        middle_psnr: mean over the middle frames, in dB, for methods that make a clip whose truth is known.
    """

    psnr: float
    edit_psnr: float
    keep_psnr: float | None
    ssim: float
    sharpness: float
    success: float | None = None
    middle_psnr: float | None = None


def score(output_3HW: Tensor, target_3HW: Tensor, mask_HW: Tensor) -> Scores:
    """All scores that need no judge.

    Raises:
        ShapeError: sizes or types differ, or the mask is empty.
    """
    _check(output_3HW, target_3HW, mask_HW)
    edited = psnr(output_3HW, target_3HW, mask_HW)
    if edited is None:
        raise ShapeError("the mask of an edit must cover at least one pixel")
    return Scores(
        psnr=psnr(output_3HW, target_3HW) or 0.0,
        edit_psnr=edited,
        keep_psnr=psnr(output_3HW, target_3HW, ~mask_HW),
        ssim=ssim(output_3HW, target_3HW),
        sharpness=sharpness(output_3HW, target_3HW),
    )


def psnr(output: Tensor, target: Tensor, mask_HW: Tensor | None = None) -> float | None:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE), at most 100; None where the mask is empty.

    Args:
        output, target: uint8 [..., 3, H, W].
        mask_HW: pixels that count; all of them without it.
    """
    squared = (output.double() - target.double()) ** 2
    if mask_HW is not None:
        squared = squared[..., mask_HW]
    if not squared.numel():
        return None
    mse = squared.mean().item()
    return PSNR_CEILING if mse == 0 else min(PSNR_CEILING, 10 * math.log10(255**2 / mse))


def edit_mask(source_3HW: Tensor, target_3HW: Tensor) -> Tensor:
    """Where an edit changed something, bool [H, W], from its pictures: dilate_r(box_3(max_c |source - target|) > 25).

    box_3 is the mean over 3 x 3 pixels, fewer at the border, and dilate_r reaches r = max(1, min(H, W) / 128) pixels in
    rows and columns. A change too slight to have a place, and one that leaves less than a twentieth, is of everything.
    """
    change_1HW = (source_3HW.double() - target_3HW.double()).abs().amax(0, keepdim=True)
    smooth_1HW = F.avg_pool2d(change_1HW, 3, stride=1, padding=1, count_include_pad=False)
    r = max(1, round(min(source_3HW.shape[1:]) / REACH))
    changed_1HW = (smooth_1HW > CHANGED).double()
    mask_HW = F.max_pool2d(changed_1HW, 2 * r + 1, stride=1, padding=r)[0] > 0
    has_place = mask_HW.any() and (~mask_HW).double().mean() >= LEAST_KEPT
    return mask_HW if has_place else torch.ones_like(mask_HW)


def ssim(output_3HW: Tensor, target_3HW: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), per channel, over all whole windows, then averaged.

    Raises:
        ShapeError: the image is smaller than the window of 11 pixels.
    """
    return ssim_map(output_3HW, target_3HW).mean().item()


def masked_ssim(output_3HW: Tensor, target_3HW: Tensor, mask_HW: Tensor) -> float | None:
    """Structural similarity over the windows whose middle the mask holds; None where it holds none."""
    inner = slice(SSIM_RADIUS, -SSIM_RADIUS)
    chosen = ssim_map(output_3HW, target_3HW)[:, mask_HW[inner, inner]]
    return chosen.mean().item() if chosen.numel() else None


def ssim_map(output_3HW: Tensor, target_3HW: Tensor) -> Tensor:
    """Structural similarity of every whole window [3, H - 10, W - 10]; ShapeError where there is none."""
    side = 2 * SSIM_RADIUS + 1
    if min(output_3HW.shape[1:]) < side:
        raise ShapeError(f"SSIM needs images of at least {side} pixels, not {list(output_3HW.shape[1:])}")
    x, y = output_3HW.double(), target_3HW.double()
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * cov + SSIM_C2) / (var_x + var_y + SSIM_C2)
    return luminance * structure


def sharpness(output_3HW: Tensor, target_3HW: Tensor) -> float:
    """(E(output) + r) / (E(target) + r), E the mean squared Laplacian of luma, r the energy of rounding to uint8.

    One is as sharp as the target. With r, two flat images are equally sharp instead of undefined.
    """
    return (detail_energy(output_3HW) + ROUNDING_ENERGY) / (detail_energy(target_3HW) + ROUNDING_ENERGY)


def detail_energy(image_3HW: Tensor) -> float:
    """Mean squared 5-point Laplacian of luma over the inner pixels, in squared grey levels."""
    x = torch.einsum("c,chw->hw", torch.tensor(LUMA, dtype=torch.float64), image_3HW.double())
    laplacian = 4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]
    return (laplacian**2).mean().item()


def _blur(x_NCHW: Tensor) -> Tensor:
    """Separable Gaussian window over whole neighbourhoods only [N, C, H - 10, W - 10]."""
    at = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64)
    window = torch.exp(-(at**2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    flat = x_NCHW.flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return blurred.view(*x_NCHW.shape[:2], *blurred.shape[2:])


def _check(output_3HW: Tensor, target_3HW: Tensor, mask_HW: Tensor) -> None:
    if output_3HW.shape != target_3HW.shape or output_3HW.shape[1:] != mask_HW.shape:
        shapes = [list(x.shape) for x in (output_3HW, target_3HW, mask_HW)]
        raise ShapeError(f"output, target and mask differ in size: {shapes}")
    if {output_3HW.dtype, target_3HW.dtype} != {torch.uint8} or mask_HW.dtype != torch.bool:
        raise ShapeError(f"metrics take uint8 images and a bool mask, not {output_3HW.dtype} and {mask_HW.dtype}")
