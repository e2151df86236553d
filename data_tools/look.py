"""`v4e-shards look`: one page that shows a set: its worst samples, some of the others, and how many there are of what.

The page holds its pictures and needs neither network nor script.
"""

import argparse
import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data_tools.verify import codec_of
from v4e import flow
from v4e.data.disk import writable, write_atomically
from v4e.data.members import to_png
from v4e.data.shards import ShardSet
from v4e.errors import DataError
from v4e.journal import progress
from v4e.nouns import Clip, Grid, Rollout, Sample
from v4e.verbs import Codec

THUMBNAIL = 192  # pixels of the longer side
STYLE = """
:root { color-scheme: light dark; } body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; }
table { border-collapse: collapse; } td, th { padding: .3em .8em .3em 0; text-align: left; vertical-align: top; }
section { border-top: 1px solid #8884; padding: 1em 0; } figure { display: inline-block; margin: 0 .5em .5em 0; }
img { display: block; image-rendering: pixelated; min-height: 96px; }
figcaption, .quiet { color: #888; font-size: 12px; }
"""


@dataclass(frozen=True)
class Measured:
    """A sample's number, key, task and how far its roll-out ends from its target; None without a roll-out."""

    number: int
    key: str
    task: str
    distance: float | None


def tail_distance(sample: Sample) -> float | None:
    """|end - target| / |target| over the last latent frame: how far the teacher's clip stops from the edited image."""
    if not (sample.encoded and sample.rollout):
        return None
    target = sample.encoded.clip_Cthw[:, -1].float()
    return float((sample.rollout.end_Cthw[:, -1].float() - target).norm() / target.norm().clamp_min(1e-9))


def look(
    folder: str | Path,
    page: str | Path,
    *,
    codec: Codec | None = None,
    rows: int = 24,
    most: int = 2000,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Path:
    """Write the page.

    Args:
        codec: decodes what the roll-out had come to at each noise level; without one only pictures are shown.
        rows: samples shown; the worst half first, then others evenly spread.
        most: samples measured, evenly spread; counts by task are over these.
        watch: wraps their numbers, for a progress bar.

    Raises:
        DataError: the set is not whole, or the page cannot be written.
    """
    whole, page = ShardSet.open(folder), Path(page)
    measured, damaged = _measure(whole, watch(_spread(range(len(whole)), most)))
    worst = sorted((m for m in measured if m.distance is not None), key=lambda m: -(m.distance or 0))[: rows // 2]
    others = _spread([m for m in measured if m not in worst], rows - len(worst))
    body = [
        *_summary(whole, measured, damaged),
        *([f"<h2>Furthest from their target</h2>{_rows(whole, worst, codec)}"] if worst else []),
        f"<h2>Others, evenly spread</h2>{_rows(whole, others, codec)}",
    ]
    with writable(page.parent):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, _page(str(whole.folder), body).encode())
    return page


def _measure(whole: ShardSet, numbers: Iterable[int]) -> tuple[list[Measured], list[str]]:
    """Measures of the samples that can be read, and what is wrong with the others."""
    measured, damaged = [], []
    for i in numbers:
        try:
            sample = whole.sample(i)
            measured.append(Measured(i, sample.key, sample.task, tail_distance(sample)))
        except DataError as error:
            damaged.append(str(error))
    return measured, damaged


def _summary(whole: ShardSet, measured: Sequence[Measured], damaged: Sequence[str]) -> Iterator[str]:
    meta = whole.meta
    yield f"<h1>{_text(whole.folder)}</h1>"
    grids = f"student {_grid(meta.student)}" + (f", teacher {_grid(meta.teacher)}" if meta.teacher else "")
    yield f"<p>{len(whole)} samples in {len(whole.shards)} shards, kind {_text(meta.kind)}, {grids}.</p>"
    yield from (f"<p><b>damaged:</b> {_text(line)}</p>" for line in damaged[:20])
    yield _table(("task", "samples measured", "mean distance"), _by_task(measured))
    yield f"<details><summary>settings</summary>{_table(('key', 'value'), meta.settings.items())}</details>"


def _by_task(measured: Sequence[Measured]) -> Iterator[tuple[str, int, str]]:
    for task, n in Counter(m.task for m in measured).most_common():
        found = [m.distance for m in measured if m.task == task and m.distance is not None]
        yield task or "(none)", n, f"{sum(found) / len(found):.3f}" if found else ""


def _rows(whole: ShardSet, chosen: Iterable[Measured], codec: Codec | None) -> str:
    return "\n".join(_row(whole, m, codec) for m in chosen)


def _row(whole: ShardSet, m: Measured, codec: Codec | None) -> str:
    try:
        sample = whole.sample(m.number, pictures=True)
    except DataError as error:
        return f"<section>{_text(error)}</section>"
    distance = "" if m.distance is None else f", distance {m.distance:.3f}"
    pictures = "".join(_figure(clip, name) for name, clip in _pictures(sample, codec))
    words = f"<div><b>{_text(sample.instruction)}</b></div><div>{_text(sample.evolution)}</div>"
    quiet = f"<div class=quiet>{_text(m.key)}, {_text(sample.task or 'no task')}{distance}</div>"
    return f"<section>{pictures}{words}{quiet}</section>"


def _pictures(sample: Sample, codec: Codec | None) -> Iterator[tuple[str, Clip]]:
    """Source; with a codec what the roll-out had come to; target."""
    if sample.source:
        yield "source", sample.source
    if codec and sample.rollout:
        yield from _decoded(sample.rollout, codec)
    elif codec and sample.encoded and not sample.source:
        clip = codec.decode(sample.encoded.clip_Cthw[None].float())[0]
        yield from ((f"frame {i}", clip.frame(i)) for i in _spread(range(len(clip)), 5))
    if sample.target:
        yield "target", sample.target


def _decoded(rollout: Rollout, codec: Codec, most: int = 5) -> Iterator[tuple[str, Clip]]:
    """Last frames of the clean clips the velocity pointed at, at some noise levels, and of the path's end."""
    sigma_K = rollout.sigma_K
    for k in _spread(range(len(sigma_K)), most):
        x0_Cthw = flow.to_x0(rollout.x_KCthw[k].float(), rollout.v_KCthw[k].float(), sigma_K[k])
        yield f"at noise {float(sigma_K[k]):.2f}", _last(codec, x0_Cthw)
    yield "roll-out's end", _last(codec, rollout.end_Cthw.float())


def _last(codec: Codec, z_Cthw: Tensor) -> Clip:
    with torch.no_grad():
        return codec.decode(z_Cthw[None])[0].frame(-1)


def _figure(clip: Clip, name: str) -> str:
    content = base64.b64encode(_thumbnail(to_png(clip))).decode()
    return f'<figure><img alt="{_text(name)}" src="data:image/png;base64,{content}"><figcaption>{_text(name)}</figure>'


def _thumbnail(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as picture:
        if max(picture.size) <= THUMBNAIL:
            return png
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{_text(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_text(h)}</th>' for h in head)}</tr>{cells}</table>"


def _page(title: str, body: Iterable[str]) -> str:
    head = f"<meta charset=utf-8><title>{_text(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>"


def _grid(grid: Grid) -> str:
    return f"{grid.T} x {grid.H} x {grid.W}"


def _text(value: object) -> str:
    return html.escape(str(value))


def _spread(items: Sequence, wanted: int) -> list:
    """``wanted`` of the items, evenly spread, or all of them."""
    return [items[i * len(items) // wanted] for i in range(wanted)] if len(items) > wanted else list(items)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards look`."""
    parser.add_argument("folder", help="shard folder")
    parser.add_argument("--page", default="", help="HTML file to write; look.html in the folder by default")
    parser.add_argument("--codec", default="", help="model folder; decodes what the roll-outs came to")
    parser.add_argument("--rows", type=int, default=24, help="samples to show")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    page = args.page or Path(args.folder) / "look.html"
    codec = codec_of(args.codec)
    print(look(args.folder, page, codec=codec, rows=args.rows, watch=lambda numbers: progress(numbers, "measure")))
    return 0
