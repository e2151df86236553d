"""`v4e-shards look`: one page that shows a set: how good its roll-outs are, its worst samples, and some of the others.

The page holds its pictures and needs neither network nor script; samples are chosen by task with the style sheet alone.
"""

import argparse
import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data_tools import figures
from data_tools.stats import MEASURES, UNITS, Row, Stats, evolving, spread, stats, values_of
from data_tools.verify import codec_of
from v4e import flow
from v4e.data.disk import writable, write_atomically
from v4e.data.members import to_png
from v4e.data.places import Place, make_folder, place
from v4e.data.shards import ShardSet
from v4e.errors import DataError
from v4e.journal import progress
from v4e.nouns import Clip, Rollout, Sample
from v4e.verbs import Codec

THUMBNAIL = 192  # pixels of the longer side
FRAMES, LEVELS = 5, 5  # shown of a roll-out, over the clip's time and over noise
SAID = {
    "fidelity": "Tail-frame fidelity: the roll-out's last frame against the edited image. Higher is better.",
    "drift": "Drift outside the edit, relative to what lies there. Lower is better.",
    "curvature": "Curvature of the clip, frame to frame. Lower is straighter.",
}
STYLE = (Path(__file__).parent / "look.css").read_text()


def look(
    folder: str | Place,
    page: str | Place,
    *,
    codec: Codec | None = None,
    rows: int = 24,
    most: int = 2000,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Place:
    """Write the page.

    Args:
        codec: decodes the teacher's clip, and what it had come to at each noise level; without one only pictures are
            shown.
        rows: samples shown; the worst half first, then others evenly spread.
        most: samples measured, evenly spread.
        watch: wraps their numbers, for a progress bar.

    Raises:
        DataError: the set is not whole, or the page cannot be written.
    """
    whole, page = ShardSet.open(folder), place(page)
    found, measured = stats(folder, most=most, watch=watch)
    rated = sorted((r for r in measured if r.measures.fidelity is not None), key=lambda r: r.measures.fidelity or 0.0)
    worst = rated[: rows // 2]
    others = spread([r for r in measured if r not in worst], max(1, rows - len(worst)))
    body = [
        *_head(whole, found),
        *_figures(found, measured, worst),
        *_chooser([*worst, *others]),
        *_samples("Furthest from the edited image", whole, worst, codec),
        *_samples("Others, evenly spread", whole, others, codec),
        *_foot(whole, found),
    ]
    with writable(page.parent):
        make_folder(page.parent)
        write_atomically(page, _page(whole.folder.name, body).encode())
    return page


# ----------------------------------------------------------------------------------------------------- overview


def _head(whole: ShardSet, found: Stats) -> Iterator[str]:
    clip, teacher = whole.meta.student, whole.meta.teacher
    tiles = [
        (f"{found.samples:,}", "samples"),
        (f"{found.shards:,}", "shards"),
        (f"{found.bytes / 1e6:,.0f} MB", f"{found.bytes / max(1, found.samples) / 1e6:.2f} MB a sample"),
        (f"{clip.W} × {clip.H}", f"{clip.T} frames, teacher {teacher.T if teacher else 0}"),
        (f"{found.counted:,}", "measured"),
    ]
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in tiles)
    yield f"<header><p class=path>{_text(whole.folder)}</p><h1>{_text(whole.folder.name)}</h1>"
    yield f"<div class=tiles>{cells}</div></header>"
    if found.damaged:
        lines = "".join(f"<li>{_text(line)}" for line in found.damaged[:20])
        yield f"<div class=damaged><b>{len(found.damaged)} could not be read</b><ul>{lines}</ul></div>"


def _figures(found: Stats, measured: Sequence[Row], worst: Sequence[Row]) -> Iterator[str]:
    families = {row.task: row.family for row in measured}
    counted = sorted(found.counts["task"].items(), key=lambda item: (families.get(item[0], ""), -item[1]))
    bars = figures.counts([(task or "(none)", n, families.get(task, "")) for task, n in counted])
    named = [(family, n) for family, n in found.counts["family"].items() if family]
    legend = " &ensp; ".join(f"<i class={_text(family)}></i>{_text(family)} {n:,}" for family, n in named)
    yield f"<div class=figures><figure><h3>Tasks</h3><p>{legend or 'Samples of each task.'}</p>{bars}</figure>"
    for name, spreads in found.spreads.items():
        title = f"{name.capitalize()}{f', {UNITS[name]}' if UNITS[name] else ''}"
        worst_first = 1 if name == "fidelity" else -1
        tasks = sorted(spreads.keys() - {"all"}, key=lambda t: worst_first * spreads[t].quantiles["median"])
        by_task = {task: (spreads[task], families.get(task, "")) for task in tasks}
        drawn = figures.distribution(values_of(measured, name), by_task, values_of(worst, name))
        yield f"<figure><h3>{title}</h3><p>{SAID[name]}</p>{drawn}</figure>"
    yield "</div>"


def _foot(whole: ShardSet, found: Stats) -> Iterator[str]:
    counts = [(kind, name, n) for kind in ("dataset", "writer") for name, n in found.counts[kind].items()]
    origin = {f"{kind}: {name or '(none)'}": f"{n:,} of {found.counted:,} measured" for kind, name, n in counts}
    rows = {**whole.meta.settings, **origin, "identity": whole.identity}
    cells = "".join(f"<tr><td>{_text(k)}<td>{_text(v)}" for k, v in rows.items())
    yield f"<details><summary>Settings</summary><table>{cells}</table></details>"


# ------------------------------------------------------------------------------------------------------ choosing


def _chooser(shown: Sequence[Row]) -> Iterator[str]:
    """A row of radio buttons, one a task and a family, and the rules by which each hides the other samples."""
    tasks, families = Counter(r.task for r in shown), Counter(r.family for r in shown if r.family)
    groups = [("all", "", len(shown)), *((f, _family(f), n) for f, n in sorted(families.items()))]
    groups += [(t or "(none)", _task(t), n) for t, n in sorted(tasks.items())]
    hidden = "section:not(:has(>.{0})),body:has(#{0}:checked) .group:not(:has(.{0})){{display:none}}"
    rules = (f"body:has(#{c}:checked) {hidden.format(c)}" for _, c, _ in groups if c)
    yield f"<style>{''.join(rules)}</style><nav aria-label='Choose a task'>"
    for name, code, n in groups:
        checked = "" if code else " checked"
        yield f"<input type=radio name=task id={code or 'every'}{checked}><label for={code or 'every'}>"
        yield f"{_text(name)} <small>{n}</small></label>"
    yield "<span>arrow keys step through</span></nav>"


def _task(name: str) -> str:
    return "t-" + name.encode().hex()


def _family(name: str) -> str:
    return "f-" + name.encode().hex()


# ------------------------------------------------------------------------------------------------------- samples


def _samples(title: str, whole: ShardSet, rows: Sequence[Row], codec: Codec | None) -> Iterator[str]:
    if rows:
        yield f"<div class=group><h2>{title}</h2>"
        yield from (_sample(whole, row, codec) for row in rows)
        yield "</div>"


def _sample(whole: ShardSet, row: Row, codec: Codec | None) -> str:
    try:
        sample = whole.sample(row.number, pictures=True)
    except DataError as error:
        return f"<section><div class=damaged>{_text(error)}</div></section>"
    strips = "".join(_strip(name, pictures) for name, pictures in _strips(sample, codec) if pictures)
    tags = f"<em class={_text(row.family)}>{_text(row.task or 'no task')}</em>{_measures(row)}"
    words = f"<h3>{_text(sample.instruction)}</h3><p>{_text(sample.evolution)}</p>"
    quiet = f"<div class=tags>{tags}<code>{_text(row.key)}</code></div>"
    classes = f"{_task(row.task)} {_family(row.family)}" if row.family else _task(row.task)
    return f"<section><i class='{classes}' hidden></i><div class=words>{words}{quiet}</div>{strips}</section>"


def _measures(row: Row) -> str:
    found = ((name, getattr(row.measures, name)) for name in MEASURES)
    return "".join(f"<span>{name} <b>{v:.3g} {UNITS[name]}</b></span>" for name, v in found if v is not None)


def _strips(sample: Sample, codec: Codec | None) -> Iterator[tuple[str, list[tuple[str, Clip]]]]:
    """Rows of pictures: from source to target over the clip's time, and the edit as it came out of the noise."""
    ends = [[("source", sample.source)] if sample.source else [], [("target", sample.target)] if sample.target else []]
    with torch.no_grad():
        yield "clip", [*ends[0], *(_over_time(sample, codec) if codec else []), *ends[1]]
        if codec and sample.rollout:
            yield "noise", list(_over_noise(sample.rollout, codec))


def _over_time(sample: Sample, codec: Codec) -> Iterator[tuple[str, Clip]]:
    """Frames of the clip that the teacher imagined; of the student's own where there is no teacher."""
    if sample.rollout:
        clip = _decode(codec, evolving(sample.rollout))
    elif sample.encoded:
        clip = _decode(codec, sample.encoded.clip_Cthw.float())
    else:
        return
    for k in range(FRAMES):
        at = round(k * (len(clip) - 1) / (FRAMES - 1))
        yield f"frame {at}", clip.frame(at)


def _over_noise(rollout: Rollout, codec: Codec) -> Iterator[tuple[str, Clip]]:
    """Last frames of the clean clips the velocity pointed at, at some noise levels, and of the path's end."""
    kept = spread(range(len(rollout.sigma_K)), LEVELS)
    sigma_K = rollout.sigma_K[kept]
    x0_KCthw = flow.to_x0(rollout.x_KCthw[kept].float(), rollout.v_KCthw[kept].float(), sigma_K)
    clips = codec.decode(torch.cat([x0_KCthw, rollout.end_Cthw.float()[None]]))
    names = [*(f"at noise {s:.2f}" for s in sigma_K.tolist()), "roll-out's end"]
    yield from ((name, clip.frame(-1)) for name, clip in zip(names, clips, strict=True))


def _decode(codec: Codec, z_Cthw: Tensor) -> Clip:
    return codec.decode(z_Cthw[None])[0]


# ------------------------------------------------------------------------------------------------------- pieces


def _strip(name: str, pictures: Iterable[tuple[str, Clip]]) -> str:
    return f"<div class='strip {name}'>{''.join(_figure(clip, caption) for caption, clip in pictures)}</div>"


def _figure(clip: Clip, name: str) -> str:
    kind, content = _thumbnail(to_png(clip))
    data = base64.b64encode(content).decode()
    tiny = " class=tiny" if max(clip.size) < THUMBNAIL // 2 else ""
    caption = f"<figcaption>{_text(name)}</figcaption>"
    return f'<figure><img{tiny} alt="{_text(name)}" src="data:image/{kind};base64,{data}">{caption}</figure>'


def _thumbnail(png: bytes) -> tuple[str, bytes]:
    """A picture of the page: small ones to the pixel, large ones reduced."""
    with Image.open(io.BytesIO(png)) as picture:
        if max(picture.size) <= THUMBNAIL:
            return "png", png
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
    return "jpeg", buffer.getvalue()


def _page(title: str, body: Iterable[str]) -> str:
    view = '<meta name=viewport content="width=device-width">'
    head = f"<meta charset=utf-8>{view}<title>{_text(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>"


def _text(value: object) -> str:
    return html.escape(str(value))


# --------------------------------------------------------------------------------------------------------- verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards look`."""
    parser.add_argument("folder", help="shard folder or URL")
    parser.add_argument("--page", default="", help="HTML file or URL to write; look.html in the folder by default")
    parser.add_argument("--codec", default="", help="model folder; decodes what the roll-outs came to")
    parser.add_argument("--rows", type=int, default=24, help="samples to show")
    parser.add_argument("--most", type=int, default=2000, help="samples to measure, evenly spread; 0 for all")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    page, codec = args.page or place(args.folder) / "look.html", codec_of(args.codec)
    options = {"rows": args.rows, "most": args.most}
    print(look(args.folder, page, codec=codec, watch=lambda numbers: progress(numbers, "measure"), **options))
    return 0
