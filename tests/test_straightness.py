"""Straightness is an angle: known ones come out, and nothing but the shape of the path counts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from v4e.errors import ShapeError
from v4e.straightness import curvature, mean_curvature


def path(*points: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([points])


@pytest.mark.parametrize(
    ("points", "angles"),
    [
        (((0, 0), (1, 0), (3, 0)), [0]),  # straight, at another pace
        (((0, 0), (1, 0), (1, 5)), [90]),
        (((0, 0), (1, 0), (0.5, 0)), [180]),
        (((0, 0), (1, 0), (2, 1)), [45]),
        (((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, -2)), [90, 90]),
        (((0, 0), (1, 0), (1.5, math.sqrt(3) / 2)), [60]),
        (((1, 1), (1, 1), (2, 1), (3, 1)), [0, 0]),  # it stands still, then walks straight
    ],
)
def test_hand_computed_angles(points, angles):
    assert curvature(path(*points)).tolist()[0] == pytest.approx(angles, abs=1e-4)


def test_mean_is_over_the_path_and_not_over_the_batch():
    paths = torch.tensor([[[0, 0], [1, 0], [1, 1], [1, 2]], [[0, 0], [1, 0], [2, 0], [3, 0]]])
    assert mean_curvature(paths).tolist() == pytest.approx([45, 0])


def test_a_circle_turns_by_the_same_angle_everywhere():
    around = torch.linspace(0, 2 * math.pi, 13)[:-1]
    circle = torch.stack([around.cos(), around.sin()], dim=-1)[None]
    assert curvature(circle).tolist()[0] == pytest.approx([30] * 10, abs=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.1, 100), st.floats(-50, 50))
def test_place_and_scale_do_not_count_and_backwards_is_as_straight(seed, scale, shift):
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(curvature(x * scale + shift), curvature(x), atol=0.05, rtol=0)
    torch.testing.assert_close(curvature(x.flip(1)), curvature(x).flip(1), atol=1e-3, rtol=0)


def test_as_a_loss_it_straightens():
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = mean_curvature(x).sum()
    (slope,) = torch.autograd.grad(before, x)
    assert mean_curvature(x - 1e-3 * slope / slope.norm()).item() < before.item()
    straight = torch.arange(5.0).repeat(3, 1).T[None].requires_grad_()
    assert torch.autograd.grad(mean_curvature(straight).sum(), straight)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2, 4), (3, 4)])
def test_two_points_have_no_curvature(shape):
    with pytest.raises(ShapeError, match="at least three points"):
        curvature(torch.zeros(shape))
