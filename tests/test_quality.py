"""Measures mean what they say, counts add up, and a filter takes away exactly what it names."""

import json
import math
from dataclasses import replace

import pytest
import torch
from test_shards import META, K, contents, flip, make_sample

from data_tools import filter as sieve
from data_tools.stats import Spread, evolving, measure, spread, stats
from data_tools.verify import verify
from v4e import config as settings_of
from v4e.data.places import PassingError
from v4e.data.shards import Index, ShardSet, ShardWriter, index_path
from v4e.errors import ConfigError, DataError
from v4e.nouns import Sample


def rolled(n: int, error: float, drift: float = 0.0, turn: float = 90.0, task: str = "add") -> Sample:
    """A roll-out with known measures: the left column of the picture is edited, the right one is not.

    Args:
        error: relative, of the last frame, all of it where the edit is unless ``drift`` says otherwise.
        turn: angle of the clip's three frames.
    """
    sample = make_sample(n)
    assert sample.encoded and sample.rollout
    clip, change = torch.ones(2, 2, 2, 2), torch.zeros(2, 2, 2)
    change[1, :, 0] = 1.0
    end = clip.clone()
    end[:, 1, :, 0] += error * math.sqrt(2)  # half of the places carry it all
    end[:, 1, :, 1] += drift
    angle = math.radians(turn)
    frames = torch.zeros(2, 3, 2, 2)
    frames[0, 1:] = 1.0
    frames[0, 2] += math.cos(angle)
    frames[1, 2] = math.sin(angle)
    noise = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(n))
    levels = torch.linspace(1, 0.25, K)
    full = torch.stack([(1 - s) * frames + s * noise for s in levels])
    encoded = replace(sample.encoded, clip_Cthw=clip, change_thw=change)
    rollout = replace(sample.rollout, sigma_K=levels, end_Cthw=end, full_KCthw=full)
    return replace(sample, encoded=encoded, rollout=rollout, task=task)


def test_measures_of_a_known_rollout():
    found = measure(rolled(0, error=0.1, drift=0.0, turn=30))
    assert found.fidelity == pytest.approx(20.0, abs=1e-3)
    assert found.drift == pytest.approx(0, abs=1e-6) and found.curvature == pytest.approx(30, abs=0.01)
    assert measure(rolled(0, error=0.0, drift=0.2)).drift == pytest.approx(0.2, abs=1e-6)
    assert measure(rolled(0, error=0.0)).fidelity == 100.0


def test_what_cannot_be_measured_is_none():
    sample = rolled(0, 0.1)
    assert measure(make_sample(0, rolled=False)).fidelity is None
    everywhere = replace(sample, encoded=replace(sample.encoded, change_thw=torch.ones(2, 2, 2)))
    assert measure(everywhere).drift is None and measure(everywhere).fidelity is not None
    without = replace(sample, rollout=replace(sample.rollout, full_KCthw=torch.zeros(0, 2, 3, 2, 2)))
    assert measure(without).curvature is None


def test_a_straight_path_is_gone_on_with_exactly():
    sample = rolled(3, 0.1, turn=60)
    clean = evolving(sample.rollout)
    torch.testing.assert_close(clean[:, 0], torch.zeros(2, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(clean[1, 2], torch.full((2, 2), math.sin(math.pi / 3)), atol=1e-5, rtol=0)


def test_quantiles():
    found = Spread.of(range(101))
    assert (found.n, found.mean, found.quantiles["p05"], found.quantiles["median"]) == (101, 50, 5, 50)
    assert Spread.of([]) is None


@pytest.mark.parametrize(("n", "wanted", "found"), [(5, 2, [0, 2]), (3, 5, [0, 1, 2]), (4, 0, [0, 1, 2, 3])])
def test_spread(n, wanted, found):
    assert spread(range(n), wanted) == found


@pytest.fixture
def quality(tmp_path) -> ShardSet:
    """Errors 0.1, 0.2, ...: 20 dB, 14 dB, 10.5 dB, 8 dB, 6 dB, 4.4 dB."""
    with ShardWriter(tmp_path / "set", META, samples_per_shard=2, dtype=torch.float32) as writer:
        for n in range(6):
            writer.add(rolled(n, 0.1 * (n + 1), turn=30 * n, task=("add", "remove", "style")[n % 3]))
    return ShardSet.open(tmp_path / "set")


def test_stats_count_and_measure(quality):
    found, rows = stats(quality.folder)
    assert found.counts["task"] == {"add": 2, "remove": 2, "style": 2}
    assert found.counts["family"] == {"spatial": 4, "temporal": 2} and found.counts["dataset"] == {"demo": 6}
    assert found.spreads["fidelity"]["all"].quantiles["max"] == pytest.approx(20, abs=1e-3)
    assert found.spreads["curvature"]["remove"].mean == pytest.approx((30 + 120) / 2, abs=0.01)
    assert [*found.spreads["fidelity"]] == ["all", "spatial", "temporal", "add", "remove", "style"]
    by_hand = [r.measures.fidelity for r in rows if r.task in ("add", "remove")]
    spatial = found.spreads["fidelity"]["spatial"]
    assert spatial.n == 4 and spatial.mean == pytest.approx(sum(by_hand) / 4)
    seconds = [json.loads(p.read_bytes())["seconds"] for p in sorted(quality.folder.glob("*_stats.json"))]
    assert len(seconds) == 3 and found.seconds == sum(seconds)
    assert found.samples == len(rows) == 6 and found.bytes == sum(s.bytes for s in quality.shards)
    text = "\n".join(found.lines())
    assert "6 samples in 3 shards" in text and "family: 4 spatial, 2 temporal" in text


def test_stats_read_few_and_name_what_is_damaged(quality):
    row = Index(index_path(quality.folder / "000-000001.tar")).member(1, "rollout.safetensors")
    flip(quality.folder / "000-000001.tar", row.offset + 50)
    found, rows = stats(quality.folder, most=3)
    assert sum(found.counts["task"].values()) == 6 and found.counted == len(rows) == 3
    assert "s0003" in stats(quality.folder)[0].damaged[0]
    (quality.folder / "000-000000_stats.json").unlink()
    assert sum(stats(quality.folder)[0].counts["task"].values()) == 5


def test_a_filter_says_what_goes_and_why(quality):
    config = sieve.FilterConfig(least_fidelity=9.0, most_curvature=130.0, tasks=("add", "remove"))
    verdict = sieve.judge(quality.folder, config)
    assert {d.key: list(d.reasons) for d in verdict.drops} == {
        "s0002": ["task"],
        "s0003": ["fidelity"],
        "s0004": ["fidelity"],
        "s0005": ["task", "fidelity", "curvature"],
    }
    lines = list(verdict.lines(most=1))
    assert lines[:4] == ["2 of 6 samples stay, 4 go", "1 x curvature", "3 x fidelity", "2 x task"]
    assert lines[-1] == "  ... and 3 more"


def test_a_store_that_does_not_answer_costs_no_sample(quality, monkeypatch):
    def away(whole, i):
        raise PassingError("cannot be reached") if i == 2 else DataError("torn")

    monkeypatch.setattr(sieve, "row_of", away)
    with pytest.raises(PassingError):
        sieve.judge(quality.folder, sieve.FilterConfig(least_fidelity=1.0))


def test_a_filtered_set_holds_the_same_bytes(quality, tmp_path):
    config = sieve.FilterConfig(least_fidelity=9.0)
    verdict = sieve.judge(quality.folder, config)
    made = sieve.copy_kept(quality.folder, tmp_path / "out", config, verdict)
    assert list(made.keys) == ["s0000", "s0001", "s0002"] and [s.samples for s in made.shards] == [2, 1]
    for i in range(3):
        old = {k: bytes(v) for k, v in quality.members(i).items()}
        assert {k: bytes(v) for k, v in made.members(i).items()} == old
    assert not verify(tmp_path / "out").problems
    again = sieve.copy_kept(quality.folder, tmp_path / "again", config, verdict)
    assert contents(again.folder) == contents(made.folder) and again.identity == made.identity
    gone = [json.loads(line)["key"] for line in (tmp_path / "out" / sieve.DROPS).read_text().splitlines()]
    assert gone == ["s0003", "s0004", "s0005"]
    with pytest.raises(DataError, match="other settings"):
        sieve.copy_kept(quality.folder, tmp_path / "out", sieve.FilterConfig(least_fidelity=1.0), verdict)


def test_what_has_no_measure_is_kept_unless_told(tmp_path):
    with ShardWriter(tmp_path, META) as writer:
        writer.add(make_sample(0, rolled=False))
        writer.add(rolled(1, 0.1))
    keep = sieve.judge(tmp_path, sieve.FilterConfig(least_fidelity=1.0))
    drop = sieve.judge(tmp_path, sieve.FilterConfig(least_fidelity=1.0, unmeasured="drop"))
    assert keep.drops == [] and [list(d.reasons) for d in drop.drops] == [["no fidelity"]]
    all_gone = sieve.judge(tmp_path, config := sieve.FilterConfig(least_fidelity=99.0, unmeasured="drop"))
    with pytest.raises(DataError, match="nothing would stay"):
        sieve.copy_kept(tmp_path, tmp_path / "out", config, all_gone)


def test_thresholds_are_strict(tmp_path):
    path = tmp_path / "thresholds.yaml"
    path.write_text("least_fidelity: 6.0\nmost_drift: 0.5\n")
    load = lambda *words: settings_of.load(path, words, lambda _: sieve.FilterConfig, recipe="filter")  # noqa: E731
    assert (load().least_fidelity, load("most_drift=0.4").most_drift, load().most_curvature) == (6.0, 0.4, None)
    with pytest.raises(ConfigError, match="least_fidelity"):
        load("least_fidelty=3")
    with pytest.raises(ConfigError, match="no threshold is set"):
        sieve.FilterConfig()


def test_the_verbs(quality, tmp_path, capsys):
    from data_tools.cli import main

    assert main(["filter", str(quality.folder), "least_fidelity=9", "--dry-run", "--out", str(tmp_path / "o")]) == 0
    assert "3 of 6 samples stay" in capsys.readouterr().out and not (tmp_path / "o").exists()
    assert main(["filter", str(quality.folder), "least_fidelity=9", "--out", str(tmp_path / "o")]) == 0
    assert main(["filter", str(quality.folder), "least_fidelity=9"]) == ConfigError.exit_code
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "o"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["task"] == {"add": 1, "remove": 1, "style": 1}
