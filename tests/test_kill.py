"""Ranks killed at random moments: nothing lost, nothing doubled, the same bytes. The full trial is a command."""

import tempfile

import pytest

from tests.kill_rollout import s3, trial


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    verdict = trial(tmp_path, triplets=40, rounds=4, seed=1)
    assert verdict.holds, verdict
    assert verdict.samples == 40
    assert verdict.killed >= 4


@pytest.mark.slow
def test_kills_change_nothing_on_a_store(tmp_path, monkeypatch):
    pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "put back afterwards")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with s3() as url:
        verdict = trial(tmp_path, triplets=24, rounds=3, seed=1, url=url)
    assert verdict.holds, verdict
    assert verdict.samples == 24
    assert verdict.killed >= 4
