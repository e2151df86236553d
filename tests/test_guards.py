"""What keeps a long run honest: spikes flagged, bad steps named, a rank's end told to all."""

import json
import time
from pathlib import Path

import pytest
from resume_bars import COMMON
from test_train import SMALL, numbers, train
from toy_training import ended, fork, toy

from v4e.errors import TrainingError
from v4e.train.guards import surprise
from v4e.train.loop import Outcome, Progress, _look_for_spikes


def test_surprise_counts_robust_deviations():
    recent = [float(x) for x in (*range(10), *range(10))]  # median 4.5, median deviation 2.5
    assert surprise(recent, 4.5) == 0
    assert surprise(recent, 4.5 + 2 * 2.5 * 1.4826) == pytest.approx(2)
    assert surprise([*recent[:-1], 1e9], 12.0) == pytest.approx(
        surprise(recent, 12.0), rel=0.3
    )  # one outlier is nothing
    assert surprise(recent[:19], 1e9) == 0  # too few to say
    assert surprise([1.0] * 20, 1.0) == 0
    assert surprise([1.0] * 20, 1.1) > 1e4


def test_a_spike_is_counted_and_told():
    from v4e import dist

    progress, ranks = Progress(), dist.start(1)
    for step, loss in enumerate([1.0, 1.1, 0.9] * 8 + [5.0, 1.0]):
        progress.step = step
        _look_for_spikes(progress, {"student": Outcome(1.0, True, loss, ())}, 10.0, ranks)
    assert progress.spikes == 1
    assert progress.news == ["step 24: student's loss 5 is 27 deviations high"]


def test_bad_steps_are_saved_with_their_keys(tmp_path):
    recipe = toy(tmp_path, *SMALL, "poison='5'", "poison_from=1", "loop.max_bad_steps=1", "zero_stage=0")
    with pytest.raises(TrainingError, match=r"step 1: .* 1 steps in a row; last samples: 4, 5 .*bad_steps.json"):
        train(recipe)
    assert json.loads((tmp_path / "notes/bad_steps.json").read_text()) == {"1": ["4", "5"]}
    assert numbers(recipe, "loss_spikes") == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fate", "codes", "told"),
    [
        ("2:1:raise", [7, 1], "rank 1 failed first: ValueError: a rank of its own mind"),
        ("2:1:SIGKILL", [7, -9], "another rank no longer answers: it was killed, or its node is gone"),
    ],
)
def test_a_rank_that_ends_brings_the_job_down_within_a_minute(tmp_path, fate, codes, told):
    made = fork(2, tmp_path / "stderr", str(tmp_path / "run"), *COMMON, "zero_stage=3", "--fate", fate)
    made[1].join(300)
    dead = time.monotonic()
    assert ended(made, 60) == codes
    assert time.monotonic() - dead < 60
    assert told in (tmp_path / "stderr.0").read_text()
    if codes[1] == 1:
        assert "ValueError: a rank of its own mind" in (tmp_path / "stderr.1").read_text().splitlines()[-1]
    assert not list(Path(tmp_path / "run").glob("weights/*"))
