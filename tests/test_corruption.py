"""Broken input is told by file and key at every stage; the full trial is `python -m tests.corruption --faults 500`."""

import pytest

from tests.corruption import STAGES, Table, trials


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Waiting for the whole machine's disk is not what is tried here."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_every_fault_is_told(stage, tmp_path):
    """Each kind of fault once or twice, at places that the seed decides."""
    table = trials([stage], len(stage.faults) + 5, seed=1, folder=tmp_path)
    assert table.bad == []
    assert {fault for fault, _ in table.counts} == set(stage.faults)


@pytest.mark.slow
def test_five_hundred_faults(tmp_path):
    table = trials(STAGES, 500, seed=0, folder=tmp_path)
    assert table.bad == [] and sum(c["injected"] for c in table.counts.values()) == 500


def test_the_table_tells_silence_from_harm():
    table = Table()
    for outcome in ("named", "unnamed", "harmless", "silent", "crash"):
        table.add("flip", "verify", outcome, "why")
    assert "| flip | 5 / 2 / 1 + 1 harmless |" in str(table)
    assert [line.partition(":")[0] for line in table.bad] == ["unnamed", "silent", "crash"]
