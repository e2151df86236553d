"""Seconds of a stage, over attempts that failed and attempts that were killed."""

import subprocess
import sys
import time

import pytest

from data_tools import stopwatch
from data_tools.stopwatch import Stopwatch

ATTEMPT = """
import sys, time
from pathlib import Path
from data_tools import stopwatch
stopwatch.BEAT = 0.05
with stopwatch.Stopwatch(Path(sys.argv[1])):
    time.sleep(0.5)
    print("worked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_attempts_are_added_and_the_last_one_leaves_nothing(tmp_path, clock):
    spent = tmp_path / ".stage.spent"
    with pytest.raises(OSError, match="full"), Stopwatch(spent):
        clock[0] += 7
        raise OSError("full")
    assert float(spent.read_text()) == 7
    clock[0] += 1000  # between attempts
    with Stopwatch(spent) as watch:
        assert watch.seconds() == 7
        clock[0] += 5
        assert watch.seconds() == 12
    assert not spent.exists()


def test_seconds_that_cannot_be_kept_stop_nothing(tmp_path, clock):
    spent = tmp_path / "gone" / ".stage.spent"
    with pytest.raises(KeyError), Stopwatch(spent) as watch:
        clock[0] += 7
        raise KeyError("the stage's own error")
    assert watch.seconds() == 7
    torn = tmp_path / ".stage.spent"
    torn.write_text("")
    with Stopwatch(torn) as watch:
        clock[0] += 5
        assert watch.seconds() == 5


def test_an_attempt_that_was_killed_counts(tmp_path):
    spent = tmp_path / ".stage.spent"
    with subprocess.Popen([sys.executable, "-c", ATTEMPT, str(spent)], stdout=subprocess.PIPE, text=True) as attempt:
        assert attempt.stdout and attempt.stdout.readline() == "worked\n"
        attempt.kill()
    started = time.perf_counter()
    with Stopwatch(spent) as watch:
        assert watch.seconds() > 0.3
        assert watch.seconds() < 60 + time.perf_counter() - started
