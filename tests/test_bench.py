"""The front of the benchmarks: a figure below its bar is said, other words stay; and how figures come about."""

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from data_tools.bench import __main__ as bench
from data_tools.bench import clock, editing, holding, lasting, plain, ranks, training


def test_a_bar_is_held_at_its_edge_and_not_below():
    figure = bench.Figure("", low=0.8)
    assert figure.holds(0.8) and not figure.holds(0.799)
    assert bench.Figure("", high=1.05).holds(1.05) and not bench.Figure("", high=1.05).holds(1.051)
    assert bench.Figure("").holds(-1e9)


def test_the_table_says_which_bar_does_not_hold_and_only_what_has_a_meaning():
    lines = bench.table({"aside": 3.0, "rollout_speedup": [3.9, 3.5, 4.5], "read_ratio": 0.93}).splitlines()
    assert lines[2].startswith("| `rollout_speedup` | 3.9 **not held** | 3.5 .. 4.5 | at least 4 |")
    assert lines[3].startswith("| `read_ratio` | 0.93 |  | at least 0.8 |")
    assert len(lines) == 4
    assert bench._failed({"read_ratio": 0.93, "aside": 3.0}) == 0
    assert bench._failed({"read_ratio": [0.9, 0.79, 0.7]}) == 1


def test_the_page_keeps_everything_but_its_table():
    page = f"# Title\n\nwords\n{bench.BEGIN}\nold\n{bench.END}\nlast words\n"
    once = bench.with_table(page, "new")
    assert once == f"# Title\n\nwords\n{bench.BEGIN}\nnew\n{bench.END}\nlast words\n"
    assert bench.with_table(once, "new") == once


def test_every_bench_is_a_function_that_exists():
    for name, each in bench.BENCHES.items():
        inspect.signature(bench._function(name)).bind(**each.quick)
    assert bench.BEGIN in bench.PAGE.read_text()


def test_a_report_keeps_other_figures_and_fails_below_a_bar(tmp_path, monkeypatch):
    made = {"rolling": {"rollout_speedup": [3.0, 5.0, 4.5]}, "feeding": {"data_wait": 0.5}}
    monkeypatch.setattr(bench, "_alone", lambda name: made[name])
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(bench, "FIGURES", {name: bench.FIGURES[name] for name in ("rollout_speedup", "data_wait")})
    (tmp_path / "page.md").write_text(f"{bench.BEGIN}other rows{bench.END}")
    assert bench.report(["rolling"], tmp_path) == 0
    assert "other rows" in (tmp_path / "page.md").read_text()  # a few alone do not take them away
    assert bench.report(["feeding"], tmp_path) == 1
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["figures"] == {"rollout_speedup": 4.5, "data_wait": 0.5}
    assert told["laps"]["rollout_speedup"] == [3.0, 5.0, 4.5]
    assert "| `data_wait` | 0.5 **not held** |" in (tmp_path / "page.md").read_text()


def test_a_peak_is_that_of_the_work_and_not_of_the_process_before_or_above(tmp_path):
    """This process has held more, and a child that it starts would tell so by its ru_maxrss."""
    big = bytearray(b"x") * (400 << 20)
    held = holding.peak_of(lambda: None)
    del big
    assert holding.peak_of(lambda: None) < held - 300
    assert holding.peak_of(lambda: bytes(bytearray(b"x") * (200 << 20))) > holding.peak_of(lambda: None) + 300
    code = "from data_tools.bench import holding; print(holding.peak_of(lambda: None))"
    big = bytearray(b"x") * (1 << 30)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(child.stdout) < len(big) >> 20


@pytest.mark.slow
def test_no_verb_holds_its_edits_in_memory():
    """Ten times the edits; the whole measurement is `make bench ARGS=holding`."""
    found = holding.measure(largest=10_000)
    growth = {name: value for name, value in found.items() if name.endswith("_peak_growth")}
    assert growth.keys() == {f"{name}_peak_growth" for name in (*holding.COMMANDS, "read")}
    assert max(growth.values()) < 1.05, found


class Time:
    """Seconds that pass when told to; ``elsewhere`` are those of other threads."""

    def __init__(self, monkeypatch) -> None:
        self.here, self.elsewhere = 0.0, 0.0
        for module in (clock, editing):
            monkeypatch.setattr(module, "now", lambda: self.here + self.elsewhere)
        monkeypatch.setattr(clock, "own", lambda: self.here)
        monkeypatch.setattr(clock, "wall", lambda: self.here)

    def takes(self, seconds: float, result=None):
        def work(*_, **__):
            self.here += seconds
            return result

        return work


@pytest.fixture
def time(monkeypatch) -> Time:
    return Time(monkeypatch)


def test_a_turn_counts_for_ours_all_but_what_is_set_aside_for_the_bare_loop(time):
    piece = SimpleNamespace(samples=(), weights=(), positions=(0,))
    batch = SimpleNamespace(clip_BCthw=torch.zeros(1, 2))
    task = SimpleNamespace(loop=SimpleNamespace(seed=0, log_every=2), shift=3.0, batch=time.takes(16, batch))
    stream = SimpleNamespace(step=time.takes(1, [piece]))
    turns = training.Turns(stream, task, SimpleNamespace(step=time.takes(2)))
    for step in range(7):
        turns.step(step)
        time.here += 4  # the loop's own work
        time.elsewhere += 0.5  # of a reader
    assert turns.ratios(training.WORK) == [5.5 / 2] * 2  # six steps, the first two to warm up
    assert turns.ratios(training.WALL) == [5 / 2] * 2


def test_denoising_lasts_from_the_first_forward_to_the_solvers_last_step(time):
    encoder = SimpleNamespace(forward=time.takes(0.25))
    pipeline = SimpleNamespace(
        text_encoder=encoder,
        image_encoder=SimpleNamespace(forward=time.takes(0.5)),
        vae=SimpleNamespace(encode=time.takes(1), decode=time.takes(2)),
        transformer=SimpleNamespace(forward=time.takes(4)),
        scheduler=SimpleNamespace(step=time.takes(8)),
    )
    parts = editing.Parts(pipeline)

    def edit():
        encoder.forward()
        pipeline.vae.encode()
        for _ in range(2):
            pipeline.transformer.forward()
            time.here += 16
            pipeline.scheduler.step()
        pipeline.vae.decode()

    expected = {"text": 0.25, "look": 0, "encode": 1, "decode": 2, "denoise": 2 * (4 + 16 + 8), "total": 59.25}
    assert parts.timed(edit) == expected
    assert parts.timed(edit) == expected


def test_the_slope_of_memory_is_that_of_a_line_after_the_warm_up(monkeypatch):
    sizes = iter(100 + 0.02 * n for n in range(10**6))
    monkeypatch.setattr(lasting, "resident", lambda what: 1e6 * next(sizes))
    watched = lasting.Watched(SimpleNamespace(step=lambda step: [step]))
    assert [watched.step(step) for step in range(700)] == [[step] for step in range(700)]
    assert [step for step, _ in watched.sizes] == list(range(lasting.WARM_UP, 700, lasting.EVERY))
    assert watched.slope() == pytest.approx(0.02 / lasting.EVERY * 1000)


def test_a_machines_rate_counts_all_units_but_each_ranks_first_and_a_rank_that_waits():
    """Two ranks begin at 10 and 12; three more units of 8, the last of which one rank makes alone."""
    assert ranks.rate([20, 12, 10, 31, 22], 2, 8) == pytest.approx(3 * 8 / (31 - 11))


def test_final_latents_that_differ_are_an_error():
    ends = torch.zeros(2, 4)
    plain.check(ends, ends + 0.9 * plain.TOLERANCE)
    with pytest.raises(AssertionError, match="final latents differ by 0.0002"):
        plain.check(ends, ends - 2 * plain.TOLERANCE)
