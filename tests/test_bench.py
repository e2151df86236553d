"""The benchmarks' front: a figure below its bar is said, and the page's other words stay."""

from data_tools.bench import __main__ as bench


def test_a_bar_is_held_at_its_edge_and_not_below():
    figure = bench.Figure("", low=0.8)
    assert figure.holds(0.8) and not figure.holds(0.799)
    assert bench.Figure("", high=1.05).holds(1.05) and not bench.Figure("", high=1.05).holds(1.051)
    assert bench.Figure("").holds(-1e9)


def test_the_table_says_which_bar_does_not_hold_and_forgets_no_figure():
    lines = bench.table({"aside": 3.0, "rollout_speedup": 3.9, "read_ratio": 0.93}).splitlines()
    assert lines[2].startswith("| `rollout_speedup` | 3.9 **not held** | at least 4 |")
    assert lines[3].startswith("| `read_ratio` | 0.93 | at least 0.8 |")
    assert lines[4] == "| `aside` | 3 |  |  |"
    assert bench._failed({"read_ratio": 0.93, "aside": 3.0}) == 0
    assert bench._failed({"read_ratio": 0.79}) == 1


def test_the_page_keeps_everything_but_its_table():
    page = f"# Title\n\nwords\n{bench.BEGIN}\nold\n{bench.END}\nlast words\n"
    once = bench.with_table(page, "new")
    assert once == f"# Title\n\nwords\n{bench.BEGIN}\nnew\n{bench.END}\nlast words\n"
    assert bench.with_table(once, "new") == once


def test_every_bench_is_a_function_that_exists():
    assert all(callable(bench._function(name)) for name in bench.BENCHES)
    assert bench.BEGIN in bench.PAGE.read_text()
