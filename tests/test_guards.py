"""What keeps a long run honest: spikes flagged, bad steps named, a rank's end told to all."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from resume_bars import COMMON
from test_train import SMALL, numbers, train
from toy_training import ended, fork, toy

from v4e.dist import Ranks
from v4e.errors import TrainingError
from v4e.train.guards import surprise
from v4e.train.loop import Outcome, Progress, _look_for_spikes
from v4e.train.watch import SILENCE_S, _caused, _silent


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


def test_a_silent_rank_is_missed(monkeypatch):
    now, beats = [100.0], {"beat/0": b"1", "beat/1": b"1"}
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    store = SimpleNamespace(multi_get=lambda keys: [beats[k] for k in keys])
    heard = {0: (b"", 100.0), 1: (b"", 100.0)}
    for second in range(0, 60, 2):
        now[0], beats["beat/0"] = 100.0 + second, str(second).encode()
        told = _silent(store, heard, 0.0)
        assert told == ("no sign of life for 35 s from rank 1" if second > SILENCE_S else "")


def test_a_job_that_was_stopped_as_a_whole_goes_on(monkeypatch):
    """SIGSTOP to all ranks, for an hour: whoever wakes first has heard of nobody, and waits his 35 s from then on."""
    now, beats = [100.0], {"beat/0": b"1", "beat/1": b"1"}
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    store = SimpleNamespace(multi_get=lambda keys: [beats[k] for k in keys])
    heard = {0: (b"1", 100.0), 1: (b"1", 100.0)}
    now[0] = 3700.0
    assert _silent(store, heard, 3598.0) == ""
    now[0] += SILENCE_S - 3
    assert _silent(store, heard, 0.0) == ""
    now[0] += 3
    assert _silent(store, heard, 0.0) == "no sign of life for 35 s from rank 0, 1"


def test_an_error_that_another_rank_caused_is_told_in_its_words():
    lost, own = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), ValueError("mine")
    told, here = "rank 1 failed first: ValueError: x", Ranks(0, 2)
    assert str(_caused(lost, told, here)).startswith("rank 0: rank 1 failed first: ValueError: x")
    assert "no longer answers" in str(_caused(lost, "", here))
    assert _caused(own, "rank 0 failed first: ValueError: mine", here) is None
    assert _caused(own, "", here) is None
    assert _caused(TrainingError("alike on all"), told, here) is None


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
