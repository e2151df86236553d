"""The terms, as pure functions of tensors; one equation each, zero at perfection.

Every term returns a scalar: the mean over the batch of weight_b times the sample's mean error, so that a quarantined
sample (weight 0) adds nothing and the others count the same as without it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from v4e.nouns import Grid


def change_map(frames_T3HW: Tensor, grid: Grid) -> Tensor:
    """Where a clip differs from its first frame [t, h, w], in [0, 1].

    Mean absolute difference over colour, averaged over each latent cell, largest over the frames of a latent frame.
    """
    frames = frames_T3HW.float() / 255
    difference_THW = (frames - frames[:1]).abs().mean(1)
    pooled_Thw = F.adaptive_avg_pool2d(difference_THW, (grid.h, grid.w))
    later = pooled_Thw[1:].unflatten(0, (grid.t - 1, -1)).amax(1) if grid.t > 1 else pooled_Thw[:0]
    return torch.cat([pooled_Thw[:1], later])


CHANGED = 0.05  # of full scale; a latent cell that differs more is edited


def changed(change_Bthw: Tensor) -> Tensor:
    """How edited each latent cell is: its change as a part of ``CHANGED``, at most 1."""
    return (change_Bthw / CHANGED).clamp(max=1)


def coverage(change_Bthw: Tensor) -> Tensor:
    """Share of a clip's last latent frame that is edited [B]: about a tenth for a local edit, one for a style."""
    return changed(change_Bthw)[:, -1].mean((1, 2))


def region_weight(change_Bthw: Tensor, boost: float) -> Tensor:
    """Weights [B, 1, t, h, w] of mean 1 per sample: 1 + boost where the clip changes.

    A local edit covers a tenth of the picture; without this the rest drowns it.
    """
    raw = 1 + boost * changed(change_Bthw)
    return (raw / raw.mean((1, 2, 3), keepdim=True))[:, None]


def squared(prediction: Tensor, target: Tensor, weight_B: Tensor, region: Tensor | None = None) -> Tensor:
    """mean_b weight_b * mean (prediction - target)^2 * region: the error of every term but `block`."""
    error = (prediction.float() - target.float()) ** 2
    if region is not None:
        error = error * region
    return average(error.flatten(1).mean(1), weight_B)


def block_match(student_BSD: Tensor, teacher_BSD: Tensor, weight_B: Tensor) -> Tensor:
    """Squared distance of rms-normalised hidden states at the same tokens (v4e's own choice; see docs/recipes)."""
    return squared(rms_normalise(student_BSD), rms_normalise(teacher_BSD), weight_B)


def rms_normalise(h_BSD: Tensor) -> Tensor:
    """Each token divided by its root mean square: the residual stream's scale grows with depth and must not count."""
    h = h_BSD.float()
    return h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def average(error_B: Tensor, weight_B: Tensor) -> Tensor:
    """Weighted mean over the batch; 0 where every weight is 0."""
    return (error_B * weight_B).sum() / weight_B.sum().clamp(min=1)
