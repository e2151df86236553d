"""Distributions as inline SVG; colours come from the page's style sheet, so that they follow light and dark."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.stats import Spread
from v4e.eval.chart import ticks

WIDTH, LEFT, RIGHT = 520, 84, 10  # of a figure, of the column with names, of the margin, in pixels
HIGH, ROW, GAP, BINS = 60, 16, 10, 48  # of the histogram, of a row, between blocks of them


@dataclass(frozen=True)
class Scale:
    """Where values lie, from left to right."""

    ticks: Sequence[float]

    @staticmethod
    def over(values: Sequence[float]) -> "Scale":
        return Scale(ticks(min(values), max(values), 4))

    def x(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)


Group = tuple[str, Spread, str]  # its name, its spread and the class of its colour


def distribution(values: Sequence[float], blocks: Sequence[Sequence[Group]], marks: Sequence[float]) -> str:
    """A histogram, under it the spread of each group on the same axis.

    Args:
        blocks: groups from top to bottom, those of one block close together.
        marks: values to point at: the samples that the page shows first.
    """
    gaps, rows = max(0, len(blocks) - 1), sum(map(len, blocks))
    scale, high = Scale.over(values), HIGH + 34 + ROW * rows + GAP * gaps
    parts = [*_histogram(values, scale), *_axis(scale, high - 14)]
    parts += [_line(scale.x(v), HIGH + 2, scale.x(v), HIGH + 7, "mark") for v in marks]
    placed = ((group, number) for number, block in enumerate(blocks) for group in block)
    for row, ((name, spread, colour), block) in enumerate(placed):
        parts += _box(name, spread, colour, scale, HIGH + 20 + ROW * row + GAP * block)
    return f'<svg viewBox="0 0 {WIDTH} {high}" role="img">{"".join(parts)}</svg>'


def counts(rows: Sequence[tuple[str, int, str]]) -> str:
    """Bars with a name and a number each; a row is name, number, class of its colour."""
    most, parts = max((n for _, n, _ in rows), default=1), []
    for i, (name, n, colour) in enumerate(rows):
        y, wide = 11 + ROW * i, (WIDTH - LEFT - 44) * n / most
        parts.append(_text(LEFT - 8, y + 4, name, "name"))
        parts.append(f'<rect class="{colour}" x="{LEFT}" y="{y - 5}" width="{wide:.1f}" height="10" rx="2"/>')
        parts.append(_text(LEFT + wide + 6, y + 4, f"{n:,}", "number"))
    return f'<svg viewBox="0 0 {WIDTH} {ROW * len(rows) + 6}" role="img">{"".join(parts)}</svg>'


def _histogram(values: Sequence[float], scale: Scale) -> list[str]:
    heights, edges = np.histogram(values, BINS, (scale.ticks[0], scale.ticks[-1]))
    bars, tallest = [], max(1, heights.max())
    for n, left, right in zip(heights.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if n:
            x, tall = scale.x(left), HIGH * n / tallest
            wide = scale.x(right) - x - 1
            bars.append(f'<rect class="bar" x="{x:.1f}" y="{HIGH - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>')
    return [*bars, _line(LEFT, HIGH, WIDTH - RIGHT, HIGH, "rule")]


def _axis(scale: Scale, y: float) -> list[str]:
    lines = [_line(scale.x(v), HIGH + 10, scale.x(v), y - 8, "grid") for v in scale.ticks]
    return lines + [_text(scale.x(v), y + 6, f"{v:g}", "tick") for v in scale.ticks]


def _box(name: str, spread: Spread, colour: str, scale: Scale, y: float) -> list[str]:
    """From the 5th to the 95th percentile, thick from the 25th to the 75th, a dot at the median."""
    at = {level: scale.x(value) for level, value in spread.quantiles.items()}
    title = f"{name}: median {spread.quantiles['median']:.3g}, mean {spread.mean:.3g}, {spread.n} samples"
    return [
        f"<g><title>{html.escape(title)}</title>",
        _text(LEFT - 8, y + 4, name, "name"),
        _line(at["p05"], y, at["p95"], y, "reach"),
        _line(at["p25"], y, at["p75"], y, "half"),
        f'<circle class="median {colour}" cx="{at["median"]:.1f}" cy="{y}" r="3.2"/></g>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(words)}</text>'
