"""What pages of pictures are made of: they hold their pictures and their style, and need neither network nor script."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from v4e.data.members import as_image, to_png
from v4e.nouns import Clip

STYLE = (Path(__file__).parent / "markup.css").read_text()


class Group(NamedTuple):
    """Sections that can be chosen together."""

    kind: Literal["family", "task"]
    name: str

    @property
    def code(self) -> str:
        """A legal class name, whatever the data calls it."""
        return f"{self.kind[0]}-{self.name.encode().hex()}"


def page(title: str, body: Iterable[str], style: str) -> bytes:
    """The whole page; ``style`` is its own, beside what is common."""
    view = '<meta name=viewport content="width=device-width">'
    head = f"<meta charset=utf-8>{view}<title>{text(title)}</title><style>{STYLE}{style}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>".encode()


def header(path: str, title: str, tiles: Iterable[tuple[str, str]]) -> str:
    """The title, where it lies, and a row of figures, each a value and what it is."""
    cells = "".join(f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for value, name in tiles)
    return f"<header><p class=path>{text(path)}</p><h1>{text(title)}</h1><div class=tiles>{cells}</div></header>"


def damaged(what: str, lines: Iterable[str]) -> str:
    """What is missing from the page, and why."""
    listed = "".join(f"<li>{text(line)}" for line in lines)
    return f"<div class=damaged><b>{text(what)}</b><ul>{listed}</ul></div>"


def settings(values: Iterable[tuple[str, object]], title: str = "Settings") -> str:
    """A table that is folded away."""
    rows = "".join(f"<tr><td>{text(k)}<td>{text(v)}" for k, v in values)
    return f"<details><summary>{title}</summary><table>{rows}</table></details>"


def chooser(shown: Sequence[Sequence[Group]], hint: str = "") -> Iterator[str]:
    """A row of radio buttons, one a family and a task, and the rules by which each hides the other sections.

    Args:
        shown: the groups of each section.
    """
    counts = Counter(group for groups in shown for group in groups)
    yield f"<style>{''.join(_rule(group.code) for group in counts)}</style><nav aria-label='Choose a task'>"
    yield _button("every", "all", len(shown), " checked")
    for group in sorted(counts):
        yield _button(group.code, group.name or "(none)", counts[group])
    yield f"{hint and f'<span>{hint}</span>'}</nav>"


def _rule(code: str) -> str:
    chosen = f"body:has(#{code}:checked)"
    return f"{chosen} section:not(.{code}),{chosen} .group:not(:has(.{code})){{display:none}}"


def _button(code: str, name: str, count: int, checked: str = "") -> str:
    label = f"<label for={code}>{text(name)} <small>{count}</small></label>"
    return f"<input type=radio name=task id={code}{checked}>{label}"


def section(groups: Sequence[Group], body: str) -> str:
    """A part of the page that :func:`chooser` shows or hides."""
    return f"<section class='{' '.join(group.code for group in groups)}'>{body}</section>"


def figure(clip: Clip, name: str, most: int, said: str = "") -> str:
    """A clip's last frame with a caption.

    Args:
        most: pixels of the longer side.
        said: markup under the name.
    """
    kind, content = _thumbnail(clip, most)
    data = base64.b64encode(content).decode()
    tiny = " class=tiny" if max(clip.size) < most // 2 else ""
    caption = f"<figcaption>{text(name)}{said and f'<span>{said}</span>'}</figcaption>"
    return f'<figure><img{tiny} alt="{text(name)}" src="data:image/{kind};base64,{data}">{caption}</figure>'


def _thumbnail(clip: Clip, most: int) -> tuple[str, bytes]:
    """Small ones to the pixel, large ones reduced."""
    if max(clip.size) <= most:
        return "png", to_png(clip.frame(-1))
    picture, buffer = as_image(clip), io.BytesIO()
    picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    picture.save(buffer, "JPEG", quality=88)
    return "jpeg", buffer.getvalue()


def text(value: object) -> str:
    """As it is to be read, not as markup."""
    return html.escape(str(value))
