"""What roll-outs cost, by hand and as docs/operate.md says."""

import pytest

from v4e.nouns import Grid
from v4e.plan import Data, Machine, Shape, rollout_cost


def test_what_a_roll_out_costs_by_hand():
    """S = 3 * 2 * 2 = 12 tokens, L = 512 + 257; linear 12 * (600 + 600) + 769 * 200, attention 144 + 12 * 769."""
    data = Data(Grid(5, 32, 32), Grid(9, 32, 32), 1000)
    forward = 2 * (2 * (12 * 1200 + 769 * 200) + 4 * 10 * (144 + 12 * 769))
    machine = Machine(flops=1e9, utilisation=0.5)
    cost = rollout_cost(Shape(width=10, ffn=30, layers=2, images=1), data, machine, steps=5, guided=2, levels=4)
    assert cost.flops == 7 * forward
    assert cost.gpu_hours == pytest.approx(1000 * 7 * forward / 0.5e9 / 3600)
    lean = rollout_cost(
        Shape(width=10, ffn=30, layers=2, images=1), data, machine, steps=5, guided=2, levels=4, full=False
    )
    assert cost.bytes - lean.bytes == 1000 * 4 * 2 * (16 * 3 * 4 * 4)


def test_the_costs_in_the_docs_are_the_functions():
    wan, card = Shape(5120, 13824, 40, 2), Machine(utilisation=0.4)
    big, small = (Data(Grid(5, h, w), Grid(81, h, w), 100_000) for h, w in ((720, 1280), (480, 832)))
    costs = [rollout_cost(wan, data, card, steps=50, guided=n, levels=8) for data in (big, small) for n in (50, 20)]
    assert [round(c.gpu_hours, -2) for c in costs] == [46_000, 32_200, 11_900, 8_300]
    assert [round(c.bytes / 1e12, 1) for c in costs[::2]] == [11.0, 4.9]
