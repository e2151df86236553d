"""A loss means what it says: zero at perfection, hand-computed values, gradients that point home, masks respected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from v4e import losses
from v4e.errors import ConfigError
from v4e.nouns import Grid, Losses

seeds = st.integers(0, 2**31)
many = settings(max_examples=40, deadline=None)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- squared


def test_squared_by_hand():
    prediction, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    assert losses.squared(prediction[:1], target[:1], torch.ones(1)).item() == 2.5  # (1 + 4) / 2
    assert losses.squared(prediction, target, torch.ones(2)).item() == 3.25  # (2.5 + 4) / 2
    region = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert losses.squared(prediction, target, torch.ones(2), region).item() == 2.5  # ((2 * 1 + 0) / 2 + 4) / 2


def test_squared_is_zero_at_perfection_alone():
    x = randn(2, 4, 2, 4, 4)
    assert losses.squared(x, x, torch.ones(2)) == 0
    assert losses.squared(x, x + 1e-3, torch.ones(2)) > 0


def test_squared_is_computed_in_fp32():
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert losses.squared(x, x + 2**-7, torch.ones(1)).item() == pytest.approx(2**-14)


def test_quarantined_samples_add_nothing_and_take_nothing():
    """Weight 0: neither value nor gradient, and the others count as if it were not there."""
    prediction, target = randn(3, 5, seed=1).requires_grad_(), randn(3, 5, seed=2)
    weight_B = torch.tensor([1.0, 0.0, 1.0])
    value = losses.squared(prediction, target, weight_B)
    assert value.item() == pytest.approx(losses.squared(prediction[::2], target[::2], torch.ones(2)).item())
    value.backward()
    assert prediction.grad[1].abs().max() == 0 and prediction.grad[0].abs().min() > 0


def test_a_batch_of_nothing_but_quarantined_samples_is_zero():
    assert losses.squared(randn(2, 3), randn(2, 3, seed=1), torch.zeros(2)) == 0
    assert losses.average(torch.tensor([5.0, 7.0]), torch.zeros(2)) == 0


@many
@given(seeds)
def test_the_gradient_points_from_prediction_to_target(seed):
    """d/dp of mean (p - t)^2 r = 2 (p - t) r / n: a step against it comes nearer, most where the region is."""
    prediction, target = randn(2, 6, seed=seed).requires_grad_(), randn(2, 6, seed=seed + 1)
    region = torch.tensor([[4.0, 1.0, 1.0, 1.0, 1.0, 0.0]]).expand(2, -1)
    value = losses.squared(prediction, target, torch.ones(2), region)
    value.backward()
    expected = 2 * (prediction - target) * region / 12
    assert torch.allclose(prediction.grad, expected, atol=1e-6)
    assert losses.squared(prediction - 0.1 * prediction.grad, target, torch.ones(2), region) < value


# ----------------------------------------------------------------------------------------------------- region


def test_region_weight_by_hand():
    change_Bthw = torch.tensor([0.0, 0.025, 0.05, 1.0]).view(1, 1, 2, 2)
    weights = losses.region_weight(change_Bthw, boost=4.0)
    assert weights.shape == (1, 1, 1, 2, 2)
    assert torch.allclose(weights.flatten(), torch.tensor([1.0, 3.0, 5.0, 5.0]) / 3.5)  # a ramp up to the threshold


def test_coverage_by_hand():
    """Of the last latent frame alone: two cells edited, one half-way, one not."""
    change_Bthw = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.0, 0.025, 0.05, 1.0]).view(1, 2, 2, 2)
    assert losses.coverage(change_Bthw).tolist() == pytest.approx([2.5 / 4])


def test_region_weight_without_boost_is_plain():
    assert torch.equal(losses.region_weight(torch.rand(2, 2, 3, 3), 0.0), torch.ones(2, 1, 2, 3, 3))


@many
@given(seeds, st.floats(0.0, 20.0))
def test_region_weight_has_mean_one_and_never_forgets_a_place(seed, boost):
    change_Bthw = 0.1 * torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    weights = losses.region_weight(change_Bthw, boost)
    assert torch.allclose(weights.mean((1, 2, 3, 4)), torch.ones(3), atol=1e-5)
    assert (weights > 0).all()
    order = change_Bthw[0].flatten().argsort()
    assert (weights[0].flatten()[order].diff() >= -1e-6).all()  # more change never weighs less


# ----------------------------------------------------------------------------------------------------- blocks


def test_block_match_by_hand():
    """(1, 0) and (0, 1) have root mean square 1/sqrt 2: normalised they are (sqrt 2, 0) and (0, sqrt 2)."""
    student, teacher = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert losses.block_match(student, teacher, torch.ones(1)).item() == pytest.approx(2.0, rel=1e-4)


def test_block_match_does_not_see_scale():
    h = randn(2, 3, 8)
    scale = torch.tensor([0.5, 3.0, 20.0])[:, None]
    assert losses.block_match(h * scale, h, torch.ones(2)).item() < 1e-8
    assert losses.block_match(-h, h, torch.ones(2)).item() == pytest.approx(4.0, rel=1e-4)  # as far as can be


def test_the_gradient_of_block_match_turns_tokens_towards_the_teachers():
    student, teacher = randn(2, 3, 8, seed=3).requires_grad_(), randn(2, 3, 8, seed=4)
    value = losses.block_match(student, teacher, torch.tensor([1.0, 0.0]))
    value.backward()
    along = (student.grad * student).sum(-1)
    assert along.abs().max() < 1e-4  # turned, not stretched (but for the epsilon)
    assert student.grad[1].abs().max() == 0  # quarantined
    assert losses.block_match(student - 0.1 * student.grad, teacher, torch.tensor([1.0, 0.0])) < value


# ------------------------------------------------------------------------------------------------- change map


def test_change_map_by_hand():
    """Cells of 8 pixels and 4 frames; colour is averaged, space is averaged, of a latent frame's frames the largest."""
    grid = Grid(5, 16, 16)
    frames = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    frames[3, :, :8, :8] = 255  # one frame of four: wholly changed
    frames[1:, 0, :8, 8:] = 255  # red alone: a third
    frames[2, :, 8:12, 8:] = 255  # half of a cell
    expected = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1 / 3], [0.0, 0.5]]])
    assert torch.allclose(losses.change_map(frames, grid), expected, atol=1e-6)


def test_change_is_measured_against_the_first_frame_and_has_no_sign():
    grid = Grid(5, 16, 16)
    dark, light = (torch.full((5, 3, 16, 16), v, dtype=torch.uint8) for v in (0, 255))
    for first, later in ((dark, light), (light, dark)):
        frames = torch.cat([first[:1], later[1:]])
        assert losses.change_map(frames, grid).tolist() == [[[0.0] * 2] * 2, [[1.0] * 2] * 2]
    assert losses.change_map(light, grid).max() == 0


def test_change_map_of_an_image():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert losses.change_map(image, Grid(1, 16, 16)).tolist() == [[[0.0] * 2] * 2]


# ------------------------------------------------------------------------------------------------------ total


def test_the_total_is_the_weighted_sum():
    made = Losses({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, {"a": 1.0, "b": 0.5, "unused": 9.0})
    assert made.total.item() == 3.5


def test_a_term_without_a_weight_is_an_error():
    with pytest.raises(ConfigError, match="without a weight: tail"):
        Losses({"tail": torch.tensor(1.0)}, {"velocity": 1.0})
