"""Measured curves as one picture: panels side by side, a logarithmic axis of counts, spreads as bars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from v4e.eval.sheet import FAINT, FONT, GAP, INK, PAPER, TITLE, font

COLOURS = ((31, 98, 178), (210, 95, 20), (90, 140, 60), (140, 75, 165), (90, 90, 90))
GRID = (228, 228, 228)
WIDTH, HEIGHT = 460, 300  # of a panel's plot
LEFT, TOP, BOTTOM, RIGHT = 62, 64, 46, 16  # margins of a panel
FINE = 2  # drawn this much larger, then reduced, for smooth lines


@dataclass(frozen=True)
class Point:
    """A measured value; ``spread`` is drawn up and down from it."""

    x: float
    y: float
    spread: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Points joined by a line, in the order of x; ``colour`` is a number, ``hollow`` marks and dashes a counterpart."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """One quantity; with ``level``, a value that every curve is to be compared with, and its name."""

    title: str
    curves: tuple[Curve, ...]
    level: tuple[str, float] | None = None


@dataclass(frozen=True)
class Axes:
    """Where values lie in a panel's plot, in fine pixels from its corner."""

    xs: tuple[float, ...]
    ticks: tuple[float, ...]

    def x(self, value: float) -> float:
        """Counts double at equal distances, with half a step of air on both sides."""
        low, high = math.log2(self.xs[0]) - 0.5, math.log2(self.xs[-1]) + 0.5
        return FINE * WIDTH * (math.log2(value) - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return FINE * HEIGHT * (high - value) / (high - low)


def draw(title: str, x_title: str, xs: Sequence[float], panels: Sequence[Panel]) -> Image.Image:
    """The picture; a panel without a single point keeps its axes.

    Args:
        xs: the counts that are marked on the axis, rising.
    """
    legend = [*dict.fromkeys((c.name, c.colour, c.hollow) for panel in panels for c in panel.curves)]
    wide, high = LEFT + WIDTH + RIGHT, TITLE + TOP + HEIGHT + BOTTOM + len(legend) * (FONT + GAP) + GAP
    sheet = Image.new("RGB", (FINE * wide * len(panels), FINE * high), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((FINE * GAP, FINE * GAP), title, INK, font(FINE * TITLE))
    for i, panel in enumerate(panels):
        corner = (FINE * (wide * i + LEFT), FINE * (TITLE + TOP))
        _panel(pen, corner, panel, x_title, tuple(xs))
    _legend(pen, (FINE * LEFT, FINE * (TITLE + TOP + HEIGHT + BOTTOM)), legend)
    return sheet.resize((sheet.width // FINE, sheet.height // FINE), Image.Resampling.LANCZOS)


def save(path: Path, title: str, x_title: str, xs: Sequence[float], panels: Sequence[Panel]) -> None:
    """Draw and write a PNG."""
    draw(title, x_title, xs, panels).save(path, optimize=True)


def ticks(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Round values, equally far from each other, that enclose [low, high]."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(i * step, 10) for i in range(first, last + 1))


def _panel(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], panel: Panel, x_title: str, xs: tuple[float, ...]
) -> None:
    points = [p for curve in panel.curves for p in curve.points]
    ends = [p.y + s * p.spread for p in points for s in (-1, 1)] + ([panel.level[1]] if panel.level else [])
    axes = Axes(xs, ticks(min(ends, default=0.0), max(ends, default=1.0)))
    _grid(pen, corner, axes)
    left, top = corner
    middle = left + FINE * WIDTH / 2
    pen.text((middle, top - FINE * GAP), panel.title, INK, font(FINE * FONT), anchor="ms")
    pen.text((middle, top + FINE * (HEIGHT + 24)), x_title, FAINT, font(FINE * FONT), anchor="mt")
    if panel.level:
        y = top + axes.y(panel.level[1])
        _dashes(pen, (left, y), (left + FINE * WIDTH, y), FAINT, FINE)
        # On the left, for curves of rising counts draw near each other on the right.
        pen.text((left + FINE * 4, y - FINE), panel.level[0], FAINT, font(FINE * 13), anchor="lb")
    for curve in panel.curves:
        _curve(pen, corner, axes, curve)


def _grid(pen: ImageDraw.ImageDraw, corner: tuple[int, int], axes: Axes) -> None:
    left, top = corner
    for value in axes.ticks:
        y = top + axes.y(value)
        pen.line((left, y, left + FINE * WIDTH, y), GRID, FINE)
        pen.text((left - FINE * 6, y), f"{value:g}", FAINT, font(FINE * 13), anchor="rm")
    for value in axes.xs:
        x = left + axes.x(value)
        pen.line((x, top + FINE * HEIGHT, x, top + FINE * (HEIGHT + 4)), FAINT, FINE)
        pen.text((x, top + FINE * (HEIGHT + 7)), f"{value:g}", FAINT, font(FINE * 13), anchor="mt")


def _curve(pen: ImageDraw.ImageDraw, corner: tuple[int, int], axes: Axes, curve: Curve) -> None:
    left, top = corner
    colour = COLOURS[curve.colour % len(COLOURS)]
    places = [(left + axes.x(p.x), top + axes.y(p.y)) for p in curve.points]
    for a, b in zip(places, places[1:], strict=False):
        (_dashes if curve.hollow else _line)(pen, a, b, colour, 2 * FINE)
    for (x, y), point in zip(places, curve.points, strict=True):
        reach = axes.y(point.y) - axes.y(point.y + point.spread)
        pen.line((x, y - reach, x, y + reach), colour, FINE)
        _mark(pen, (x, y), colour, curve.hollow)


def _legend(pen: ImageDraw.ImageDraw, corner: tuple[int, int], rows: Sequence[tuple[str, int, bool]]) -> None:
    left, top = corner
    for i, (name, number, hollow) in enumerate(rows):
        y, colour = top + FINE * (i * (FONT + GAP) + FONT), COLOURS[number % len(COLOURS)]
        (_dashes if hollow else _line)(pen, (left, y), (left + FINE * 34, y), colour, 2 * FINE)
        _mark(pen, (left + FINE * 17, y), colour, hollow)
        pen.text((left + FINE * 44, y), name, INK, font(FINE * FONT), anchor="lm")


def _mark(pen: ImageDraw.ImageDraw, place: tuple[float, float], colour: tuple[int, int, int], hollow: bool) -> None:
    (x, y), r = place, FINE * 4
    pen.ellipse((x - r, y - r, x + r, y + r), PAPER if hollow else colour, colour, 2 * FINE)


def _line(pen: ImageDraw.ImageDraw, a: tuple[float, float], b: tuple[float, float], colour, width: int) -> None:
    pen.line((*a, *b), colour, width)


def _dashes(pen: ImageDraw.ImageDraw, a: tuple[float, float], b: tuple[float, float], colour, width: int) -> None:
    """A line of dashes and gaps of equal length."""
    count = max(1, round(math.dist(a, b) / (FINE * 10)))
    at = [tuple(p + (q - p) * i / (2 * count) for p, q in zip(a, b, strict=True)) for i in range(2 * count)]
    for start, end in zip(at[::2], at[1::2], strict=True):
        pen.line((*start, *end), colour, width)
