"""Ranks killed at random moments: nothing lost, nothing doubled, the same bytes. The full trial is a command."""

import pytest

from tests.kill_rollout import trial


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    verdict = trial(tmp_path, triplets=40, rounds=4, seed=1)
    assert verdict.holds, verdict
    assert verdict.samples == 40
    assert verdict.killed >= 4
