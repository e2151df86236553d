"""An evaluation as report.json for programs, report.md for people and a table for the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from v4e.data.disk import to_json, write_atomically
from v4e.eval.run import OVERALL, Metrics, Row

Metric = Literal["psnr", "edit_psnr", "keep_psnr", "ssim", "sharpness", "success", "middle_psnr"]
DIGITS = {"psnr": 1, "edit_psnr": 1, "keep_psnr": 1, "ssim": 3, "sharpness": 2, "success": 2, "middle_psnr": 1}
TITLES = {
    "psnr": "PSNR",
    "edit_psnr": "edit PSNR",
    "keep_psnr": "keep PSNR",
    "ssim": "SSIM",
    "sharpness": "sharpness",
    "success": "success",
    "middle_psnr": "middle PSNR",
}
ABOUT = {
    "edit_psnr": "dB inside the edited region; the mean of the images' own dB values, at most 100 each",
    "keep_psnr": "dB outside it, over the n_keep images where the edit does not cover everything",
    "psnr": "dB over the whole image",
    "middle_psnr": "dB of a clip's frames between first and last, where the true ones are known",
    "ssim": "structural similarity over the whole image, Gaussian window of 11 pixels, sigma 1.5",
    "sharpness": "mean squared Laplacian of luma, output over target, each plus 20/12 for rounding; geometric mean",
    "success": "share of outputs that the world's oracle accepts",
    "spread": "standard deviation (n - 1) of the sampling seeds' means",
    "n": "edited images, over all cases and seeds of the row",
}


@dataclass(frozen=True)
class Key:
    """Names the row of a method over all seeds."""

    method: str
    steps: int
    group: str = OVERALL

    def __str__(self) -> str:
        steps = f"@{self.steps}" if self.steps else ""
        return f"{self.method}{steps} {self.group}"


@dataclass(frozen=True)
class Bar:
    """A quality asked for: a row's metric, or its lead over another row's, lies in [low, high].

    Args:
        over: the row it is compared with; the value is then the difference.
        beyond_spread: the lead must also exceed the sum of both rows' spreads over the seeds.
    """

    metric: Metric
    row: Key
    low: float = -math.inf
    high: float = math.inf
    over: Key | None = None
    beyond_spread: bool = False


@dataclass(frozen=True)
class Outcome:
    """A bar and what was measured; ``value`` is None where a row is missing, which fails."""

    bar: Bar
    value: float | None
    low: float
    passed: bool

    @property
    def wanted(self) -> str:
        """The interval asked for, as text."""
        digits = DIGITS[self.bar.metric]
        floor = f"≥ {self.low:.{digits}f}" if self.low > -math.inf else ""
        roof = f"≤ {self.bar.high:.{digits}f}" if self.bar.high < math.inf else ""
        return " and ".join(filter(None, (floor, roof)))


@dataclass(frozen=True)
class Report:
    """All that is reported.

    Args:
        rows: of :func:`v4e.eval.run.aggregate`.
        tasks: the task names among the rows' groups, in order.
        headline: the step count at which tasks are compared.
        seconds: wall seconds per stage.
        notes: sentences for the reader.
        pictures: files to show, relative to the report.
    """

    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    outcomes: tuple[Outcome, ...] = ()
    headline: int = 4
    seconds: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


def hold(bars: Iterable[Bar], rows: Iterable[Row]) -> tuple[Outcome, ...]:
    """Hold bars against the rows over all seeds."""
    table = {Key(row.method, row.steps, row.group): row for row in rows if row.seed is None}
    return tuple(_hold(bar, table) for bar in bars)


def write(report: Report, folder: Path) -> None:
    """Write report.json and report.md."""
    write_atomically(folder / "report.json", to_json(to_dict(report), indent=1) + b"\n")
    write_atomically(folder / "report.md", to_markdown(report).encode())


def to_dict(report: Report) -> dict[str, object]:
    """``methods`` -> name -> steps -> {overall, tasks, groups, seeds -> {overall, tasks, groups}}, bars, seconds."""
    methods: dict[str, dict[str, dict]] = {}
    for row in report.rows:
        entry = methods.setdefault(row.method, {}).setdefault(str(row.steps), {"seeds": {}})
        place = entry if row.seed is None else entry["seeds"].setdefault(str(row.seed), {})
        kind = "tasks" if row.group in report.tasks else "groups"
        named = place if row.group == OVERALL else place.setdefault(kind, {})
        named[row.group] = asdict(row.mean) | ({"spread": _spread(row.spread)} if row.spread else {})
    return {
        "about": ABOUT,
        "methods": methods,
        "bars": [_bar_dict(outcome) for outcome in report.outcomes],
        "seconds": dict(report.seconds or {}),
        "notes": [*report.notes],
    }


def to_markdown(report: Report) -> str:
    """The report for people."""
    outcomes = report.outcomes
    bars = f"## Bars: {sum(o.passed for o in outcomes)} of {len(outcomes)} pass\n\n{bar_table(outcomes)}"
    about = "\n".join(f"- {name}: {text}" for name, text in ABOUT.items())
    parts = [
        "# Report",
        *report.notes,
        *(f"![{name}]({name})" for name in report.pictures),
        f"## All methods\n\nMeans over all cases and seeds, ± the spread of the seeds.\n\n{overview(report)}",
        f"## Tasks at {report.headline} steps\n\nEdit-region PSNR in dB.\n\n{task_table(report)}",
        *([bars] if outcomes else []),
        *([f"## Seconds\n\n{seconds_table(report.seconds)}"] if report.seconds else []),
        f"## How it is measured\n\n{about}",
    ]
    return "\n\n".join(parts) + "\n"


def overview(report: Report) -> str:
    """One line per method and step count."""
    names = [n for n in TITLES if n != "psnr"]
    lines = [
        [row.method, str(row.steps or "")] + [with_spread(row, n) for n in names] + [str(row.mean.n)]
        for row in report.rows
        if row.group == OVERALL and row.seed is None
    ]
    return text_table(["method", "steps", *(TITLES[n] for n in names), "n"], lines)


def task_table(report: Report) -> str:
    """One line per task and group: each method's edit PSNR, then other figures of the student, or of the last."""
    table = {(r.method, r.group): r for r in report.rows if r.seed is None and r.steps in (0, report.headline)}
    methods = list(dict.fromkeys(method for method, _ in table))
    groups = list(dict.fromkeys(group for _, group in table))
    groups = [*report.tasks, *(g for g in groups if g not in report.tasks)]
    whose, last = "student" if "student" in methods else methods[-1], ["keep_psnr", "sharpness", "success"]
    lines = [
        [group]
        + [figure(table.get((m, group)), "edit_psnr") for m in methods]
        + [figure(table.get((whose, group)), n) for n in last]
        for group in groups
    ]
    return text_table(["task", *methods, *(f"{whose} {TITLES[n]}" for n in last)], lines)


def bar_table(outcomes: Sequence[Outcome]) -> str:
    """One line per bar."""
    return text_table(["bar", "wanted", "seen", ""], [_bar_line(outcome) for outcome in outcomes])


def seconds_table(seconds: Mapping[str, float]) -> str:
    """One line per stage, and the sum."""
    lines = [[name, f"{value:.0f}"] for name, value in seconds.items()]
    return text_table(["stage", "seconds"], [*lines, ["total", f"{sum(seconds.values()):.0f}"]])


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned on a terminal; the first column is flush left."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = ["-" * w if i == 0 else "-" * max(1, w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(_table_line(cells, widths) for cells in (head, rule, *lines))


# --------------------------------------------------------------------------------------------------- inside


def _hold(bar: Bar, table: Mapping[Key, Row]) -> Outcome:
    row, other = table.get(bar.row), table.get(bar.over) if bar.over else None
    value = getattr(row.mean, bar.metric) if row else None
    if value is None or row is None or (bar.over and (other is None or getattr(other.mean, bar.metric) is None)):
        return Outcome(bar, None, bar.low, False)
    low = bar.low
    if other:
        value -= getattr(other.mean, bar.metric)
        low = max(low, _margin(row, other, bar.metric)) if bar.beyond_spread else low
    passed = low <= value <= bar.high and not (bar.beyond_spread and value <= 0)
    return Outcome(bar, value, low, passed)


def _margin(row: Row, other: Row, metric: Metric) -> float:
    return sum(getattr(r.spread, metric) or 0.0 for r in (row, other) if r.spread)


def _bar_line(outcome: Outcome) -> list[str]:
    seen = "not measured" if outcome.value is None else f"{outcome.value:.{DIGITS[outcome.bar.metric]}f}"
    return [_bar_name(outcome.bar), outcome.wanted, seen, "pass" if outcome.passed else "FAIL"]


def _bar_name(bar: Bar) -> str:
    over = f" over {bar.over}" if bar.over else ""
    return f"{bar.row}: {TITLES[bar.metric]}{over}{', beyond the spread' if bar.beyond_spread else ''}"


def _bar_dict(outcome: Outcome) -> dict[str, object]:
    bounds = {"low": outcome.low, "high": outcome.bar.high}
    finite = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    return {"bar": _bar_name(outcome.bar), **finite, "value": outcome.value, "passed": outcome.passed}


def _spread(spread: Metrics) -> dict[str, float]:
    values = {f.name: getattr(spread, f.name) for f in fields(spread) if f.name in TITLES}
    return {name: value for name, value in values.items() if value is not None}


def figure(row: Row | None, metric: str) -> str:
    """A row's mean as text; empty where there is none."""
    value = getattr(row.mean, metric) if row else None
    return "" if value is None else f"{value:.{DIGITS[metric]}f}"


def with_spread(row: Row | None, metric: str) -> str:
    """The mean and, where it is known, the spread."""
    spread = getattr(row.spread, metric) if row and row.spread else None
    return figure(row, metric) + (f" ± {spread:.{DIGITS[metric]}f}" if spread is not None else "")


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return f"| {' | '.join(padded)} |"
