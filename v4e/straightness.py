"""Perceptual straightness: how much a clip bends on its way (Henaff, Goris and Simoncelli 2019, "Perceptual
straightening of natural videos", Nature Neuroscience 22, 984-991).

A clip is a path with one point a frame: its pixels, its latents, or any features of it. The metric and the loss are one
function; a clip of fewer than three frames has no curvature.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from v4e.errors import ShapeError


def curvature(points_BTD: Tensor) -> Tensor:
    """Angles [B, T - 2] between successive displacements, in degrees: 0 on a straight line, 180 where it turns back.

    theta_t = arccos(<v_t, v_t+1> / (|v_t| |v_t+1|)) with v_t = x_t+1 - x_t (Henaff et al. 2019, Methods). A path that
    stands still has no direction and counts as straight there.

    Raises:
        ShapeError: fewer than three points.
    """
    if points_BTD.ndim != 3 or points_BTD.shape[1] < 3:
        raise ShapeError(f"curvature needs [B, T, D] with at least three points, not {list(points_BTD.shape)}")
    steps_BTD = points_BTD.float().diff(dim=1)
    ahead_BTD = F.normalize(steps_BTD, dim=-1)
    a, b = ahead_BTD[:, :-1], ahead_BTD[:, 1:]
    # Kahan's form: arccos loses half of its digits, and its gradient is infinite, where the path is straight.
    angles = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    moves = steps_BTD.norm(dim=-1) > 0
    return torch.rad2deg(angles) * (moves[:, :-1] & moves[:, 1:])


def mean_curvature(points_BTD: Tensor) -> Tensor:
    """The mean angle of each path [B], in degrees."""
    return curvature(points_BTD).mean(-1)
