"""One picture that shows a run: a row per task, drawn large enough to see single pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from v4e.nouns import Clip

INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
MARGIN, GAP, FONT, TITLE = 12, 8, 15, 22


@dataclass(frozen=True)
class Column:
    """A column of the sheet.

    Args:
        title: stands above it.
        scale: pixels on the sheet for each pixel of a picture; below 1 it is reduced.
        text_width: width in sheet pixels of a column that holds text; 0 for pictures.
    """

    title: str
    scale: float = 3
    text_width: int = 0


@dataclass(frozen=True)
class SheetRow:
    """One row: a text for every text column, frames for every other one (several stand side by side), in order."""

    cells: tuple[Clip | str, ...]


def draw(title: str, columns: Sequence[Column], rows: Sequence[SheetRow]) -> Image.Image:
    """The sheet. Pictures are enlarged bicubically, as a viewer would; all rows hold pictures of like size."""
    widths = [max(_width(column, row.cells[i]) for row in rows) for i, column in enumerate(columns)]
    heights = [max(_height(c, cell) for c, cell in zip(columns, row.cells, strict=True)) for row in rows]
    lefts = [MARGIN + sum(widths[:i]) + GAP * i for i in range(len(columns))]
    top = MARGIN + TITLE + FONT + 3 * GAP
    size = (lefts[-1] + widths[-1] + MARGIN, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, font(TITLE))
    for left, column in zip(lefts, columns, strict=True):
        pen.text((left, MARGIN + TITLE + GAP), column.title, FAINT, font(FONT))
    for row, height in zip(rows, heights, strict=True):
        for left, width, column, cell in zip(lefts, widths, columns, row.cells, strict=True):
            _fill(sheet, pen, (left, top), (width, height), column, cell)
        top += height + GAP
    return sheet


def save(path: Path, title: str, columns: Sequence[Column], rows: Sequence[SheetRow]) -> None:
    """Draw and write a PNG."""
    draw(title, columns, rows).save(path, optimize=True)


def _fill(sheet: Image.Image, pen: ImageDraw.ImageDraw, corner, size, column: Column, cell: Clip | str) -> None:
    """Put one cell, centred in height."""
    (left, top), (width, height) = corner, size
    if isinstance(cell, str):
        words = _wrap(cell, width)
        pen.multiline_text((left, top + height // 2), words, INK, font(FONT), anchor="lm", spacing=5)
        return
    top += (height - _height(column, cell)) // 2
    for i, frame in enumerate(_frames(cell)):
        scaled = frame.resize((_pixels(frame.width, column), _pixels(frame.height, column)), Image.Resampling.BICUBIC)
        sheet.paste(scaled, (left + i * (scaled.width + 2), top))


def _frames(clip: Clip) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(f.permute(1, 2, 0).numpy())) for f in clip.frames_T3HW]


def _width(column: Column, cell: Clip | str) -> int:
    title = int(font(FONT).getlength(column.title))
    if isinstance(cell, str):
        return max(title, column.text_width)
    return max(title, len(cell) * (_pixels(cell.size[1], column) + 2) - 2)


def _height(column: Column, cell: Clip | str) -> int:
    if isinstance(cell, str):
        return (FONT + 7) * (_wrap(cell, column.text_width).count("\n") + 1)
    return _pixels(cell.size[0], column)


def _pixels(length: int, column: Column) -> int:
    return max(1, round(length * column.scale))


def _wrap(text: str, width: int) -> str:
    """Break a text between words so that every line fits; lines already broken stay so."""
    lines: list[str] = []
    for part in text.splitlines():
        line = ""
        for word in part.split():
            longer = f"{line} {word}".strip()
            if line and font(FONT).getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that a sheet looks the same everywhere."""
    return ImageFont.load_default(size)
