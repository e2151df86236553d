"""The flow algebra is right: round trips in fp64, diffusers' own levels, samplers exact where paths are straight."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from v4e import flow

SHIFTS = (1.0, 2.0, 3.0, 5.0, 7.3, 16.0)
SHAPE = (3, 2, 1, 2, 2)

seeds = st.integers(0, 2**31)
inner = st.floats(0.01, 0.99)
many = settings(max_examples=60, deadline=None)


def drawn(seed, count=2):
    """Tensors of SHAPE in fp64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(count)]


def levels(*sigmas):
    return torch.tensor(sigmas, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def unipc(shift, **more):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **more)


# ------------------------------------------------------------------------------------------------ conversions


@many
@given(seeds, inner, inner, inner)
def test_a_state_and_its_velocity_know_both_ends(seed, a, b, c):
    (x0, noise), sigma_B = drawn(seed), levels(a, b, c)
    x, v = flow.mix(x0, noise, sigma_B), flow.velocity(x0, noise)
    assert close(flow.to_x0(x, v, sigma_B), x0)
    assert close(flow.to_noise(x, v, sigma_B), noise)
    assert close(flow.from_x0(x, x0, sigma_B), v)


@many
@given(seeds, inner, inner, inner)
def test_any_velocity_splits_a_state_into_ends_that_mix_back(seed, a, b, c):
    (x, v), sigma_B = drawn(seed), levels(a, b, c)
    x0, noise = flow.to_x0(x, v, sigma_B), flow.to_noise(x, v, sigma_B)
    assert close(flow.mix(x0, noise, sigma_B), x)
    assert close(flow.velocity(x0, noise), v)
    assert close(flow.from_x0(x, x0, sigma_B), v)


def test_the_ends_of_a_path_are_data_and_noise():
    x0, noise = drawn(0)
    assert torch.equal(flow.mix(x0, noise, torch.tensor(0.0)), x0)
    assert torch.equal(flow.mix(x0, noise, torch.tensor(1.0)), noise)


def test_a_level_for_each_sample_or_one_for_all():
    x0, noise = drawn(1)
    together = flow.mix(x0, noise, levels(0.2, 0.2, 0.2))
    assert torch.equal(together, flow.mix(x0, noise, torch.tensor(0.2, dtype=torch.float64)))
    each = flow.mix(x0, noise, levels(0.2, 0.5, 0.9))
    assert torch.equal(each[1], flow.mix(x0, noise, torch.tensor(0.5, dtype=torch.float64))[1])
    assert flow.like(levels(0.1, 0.2, 0.3), x0).shape == (3, 1, 1, 1, 1)


def test_guidance_by_hand():
    cond, null = torch.tensor([3.0]), torch.tensor([1.0])
    assert [flow.guide(cond, null, s).item() for s in (0.0, 1.0, 2.0)] == [1.0, 3.0, 5.0]


# ----------------------------------------------------------------------------------------------------- levels


@many
@given(inner, st.floats(1.0, 20.0), st.floats(1.0, 20.0))
def test_shifts_compose_and_can_be_undone(sigma, a, b):
    s = torch.tensor(sigma, dtype=torch.float64)
    assert close(flow.shift(flow.shift(s, a), b), flow.shift(s, a * b))
    assert close(flow.shift(flow.shift(s, a), 1 / a), s)
    assert flow.shift(s, a) >= s - 1e-12  # towards noise
    assert torch.equal(flow.shift(levels(0.0, 1.0), a), levels(0.0, 1.0))


@pytest.mark.parametrize("shift", SHIFTS)
def test_levels_are_those_of_unipc(shift):
    for steps in (1, 2, 3, 4, 5, 8, 10, 20, 50):
        scheduler = unipc(shift)
        scheduler.set_timesteps(steps)
        grid = flow.time_grid(steps, shift)
        assert torch.equal(grid.float(), scheduler.sigmas), steps
        assert (grid.diff() < 0).all() and grid[-1] == 0


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_timesteps_are_those_of_unipc(shift, steps):
    scheduler = unipc(shift)
    scheduler.set_timesteps(steps)
    grid = flow.time_grid(steps, shift)[:-1]
    assert torch.equal(flow.timestep(grid), scheduler.timesteps)
    assert torch.equal(flow.timestep(grid.float()), scheduler.timesteps)


@pytest.mark.parametrize("shift", SHIFTS)
def test_other_timesteps_differ_only_where_unipc_truncates_a_whole_number(shift):
    """1000 * sigma may come out as 333.99999999 in fp64; pipelines.fed_level then feeds what stock feeds."""
    for steps in range(1, 51):
        scheduler = unipc(shift)
        scheduler.set_timesteps(steps)
        scaled = flow.time_grid(steps, shift)[:-1] * flow.TRAIN_STEPS
        ahead = flow.timestep(scaled / flow.TRAIN_STEPS) - scheduler.timesteps
        assert set(ahead.tolist()) <= {0, 1}
        assert ((scaled.round() - scaled).abs()[ahead == 1] < 1e-3).all()


def test_timesteps_by_hand():
    assert flow.timestep(torch.tensor([0.0, 0.9, 0.9999, 1 - 1e-6])).tolist() == [0, 900, 999, 999]
    assert flow.timestep(torch.tensor(0.25)).dtype == torch.int64


@pytest.mark.parametrize("shift", SHIFTS)
def test_few_step_grids_nest(shift):
    for steps in (1, 2, 4, 25):
        coarse, fine = flow.time_grid(steps, shift), flow.time_grid(2 * steps, shift)
        assert close(coarse, fine[::2], 1e-12)
    assert close(flow.union_grid((1, 2, 4, 8), shift), flow.time_grid(8, shift), 1e-9)


@given(st.sets(st.integers(1, 12), min_size=1, max_size=4), st.floats(1.0, 16.0))
@many
def test_a_union_holds_every_level_once(step_counts, shift):
    union = flow.union_grid(step_counts, shift)
    assert (union.diff() < -1e-10).all()
    assert union[0] == flow.FIRST_SIGMA and union[-1] == 0
    for steps in step_counts:
        nearest = (flow.time_grid(steps, shift)[:, None] - union).abs().amin(1)
        assert nearest.max() < 1e-8


# --------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_exact_on_a_straight_path(steps, shift):
    x0, noise = drawn(2)
    grid = flow.time_grid(steps, shift)
    start = flow.mix(x0, noise, grid[0])
    assert close(flow.euler(lambda x, sigma_B: noise - x0, start, grid), x0, 1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_euler_is_exact_on_the_field_that_is_linear_in_the_state(steps):
    """v(x, sigma) = (x - x0) / sigma is the exact field of a data set of one point. Levels are fed in fp32: 1e-5."""
    x0, noise = drawn(3)
    end = flow.euler(lambda x, sigma_B: flow.from_x0(x, x0, sigma_B), noise, flow.time_grid(steps, 3.0))
    assert close(end, x0, 1e-5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_unipc_is_exact_on_a_linear_field(order, steps):
    x0, noise = drawn(4)
    scheduler = unipc(3.0, solver_order=order)
    scheduler.set_timesteps(steps)
    x = noise
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(flow.from_x0(x, x0, sigma.double()), t, x, return_dict=False)[0]
    assert close(x, x0, 1e-5)


def test_eulers_error_halves_with_the_steps():
    """A field that bends, v = cos(3 sigma) x, with uniform levels: a first-order method."""
    start = drawn(5, 1)[0]
    truth = start * torch.exp(-torch.sin(torch.tensor(3.0, dtype=torch.float64)) / 3)

    def error(steps):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = flow.euler(lambda x, s: torch.cos(3 * flow.like(s, x)) * x, start, grid)
        return (end - truth).abs().max().item()

    assert 1.9 < error(100) / error(200) < 2.1


# --------------------------------------------------------------------------------------------------- anchoring


def bent(x0, noise, bow, sigma):
    """A curved path between data and noise, and its derivative."""
    s = flow.like(sigma, x0)
    return flow.mix(x0, noise, sigma) + s * (1 - s) * bow, flow.velocity(x0, noise) + (1 - 2 * s) * bow


@many
@given(seeds, inner, inner, inner)
def test_an_anchored_path_ends_at_the_target_and_its_velocity_is_its_derivative(seed, a, b, c):
    (x0, noise, bow, offset), sigma_B = drawn(seed, 4), levels(a, b, c)

    def path(sigma):
        return flow.anchor(*bent(x0, noise, bow, sigma), sigma, offset)

    assert close(path(torch.zeros(3))[0], x0 + offset)
    assert close(path(torch.ones(3))[0], noise)
    step = 1e-3  # the path is a parabola, so a central difference is exact
    difference = (path(sigma_B + step)[0] - path(sigma_B - step)[0]) / (2 * step)
    assert close(difference, path(sigma_B)[1], 1e-9)


@many
@given(seeds, inner, inner, inner)
def test_every_point_of_an_anchored_straight_path_points_at_the_target(seed, a, b, c):
    (x0, noise, offset), sigma_B = drawn(seed, 3), levels(a, b, c)
    x, v = flow.anchor(flow.mix(x0, noise, sigma_B), flow.velocity(x0, noise), sigma_B, offset)
    assert close(flow.to_x0(x, v, sigma_B), x0 + offset)
    assert close(flow.to_noise(x, v, sigma_B), noise)
    assert close(flow.from_x0(x, x0 + offset, sigma_B), v)


def test_no_offset_changes_nothing():
    x, v = drawn(6)
    assert all(map(torch.equal, flow.anchor(x, v, levels(0.1, 0.5, 1.0), torch.zeros(SHAPE)), (x, v)))
