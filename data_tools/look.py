"""`v4e-shards look`: one page that shows a set: how good its roll-outs are, its worst samples, and some of the others.

The page holds its pictures and needs neither network nor script; samples are chosen by task with the style sheet alone.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_tools import figures
from data_tools.stats import MEASURES, UNITS, Row, Spread, Stats, evolving, spread, stats, values_of
from data_tools.verify import codec_of
from v4e import flow
from v4e.data.disk import writable, write_atomically
from v4e.data.places import Place, make_folder, place
from v4e.data.shards import ShardSet
from v4e.errors import DataError
from v4e.eval import markup
from v4e.eval.markup import Group, text
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
        *markup.chooser([_groups(row) for row in (*worst, *others)], "arrow keys step through"),
        *_samples("Furthest from the edited image", whole, worst, codec),
        *_samples("Others, evenly spread", whole, others, codec),
        *_foot(whole, found),
    ]
    with writable(page.parent):
        make_folder(page.parent)
        write_atomically(page, markup.page(whole.folder.name, body, STYLE))
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
    yield markup.header(str(whole.folder), whole.folder.name, tiles)
    if found.damaged:
        yield markup.damaged(f"{len(found.damaged)} could not be read", found.damaged[:20])


def _figures(found: Stats, measured: Sequence[Row], worst: Sequence[Row]) -> Iterator[str]:
    families = {row.task: row.family for row in measured}
    counted = sorted(found.counts["task"].items(), key=lambda item: (families.get(item[0], ""), -item[1]))
    bars = figures.counts([(task or "(none)", n, families.get(task, "")) for task, n in counted])
    named = [(family, n) for family, n in found.counts["family"].items() if family]
    legend = " &ensp; ".join(f"<i class={text(family)}></i>{text(family)} {n:,}" for family, n in named)
    said = legend or "Samples of each task."
    yield f"<div class=figures><figure class=card><h3>Tasks</h3><p>{said}</p>{bars}</figure>"
    for name, spreads in found.spreads.items():
        title = f"{name.capitalize()}{f', {UNITS[name]}' if UNITS[name] else ''}"
        drawn = figures.distribution(
            values_of(measured, name), _blocks(name, spreads, families), values_of(worst, name)
        )
        yield f"<figure class=card><h3>{title}</h3><p>{SAID[name]}</p>{drawn}</figure>"
    yield "</div>"


def _blocks(name: str, spreads: Mapping[str, Spread], families: Mapping[str, str]) -> list[list[figures.Group]]:
    """The groups of a measure: families, then tasks, of each the worst first."""
    worst_first = 1 if name == "fidelity" else -1
    order = sorted(spreads.keys() - {"all"}, key=lambda g: worst_first * spreads[g].quantiles["median"])
    blocks = [
        [(g, spreads[g], families.get(g, g)) for g in order if (g in families) == tasks] for tasks in (False, True)
    ]
    return [block for block in blocks if block]


def _foot(whole: ShardSet, found: Stats) -> Iterator[str]:
    counts = [(kind, name, n) for kind in ("dataset", "writer") for name, n in found.counts[kind].items()]
    origin = {f"{kind}: {name or '(none)'}": f"{n:,} of {found.counted:,} measured" for kind, name, n in counts}
    yield markup.settings({**whole.meta.settings, **origin, "identity": whole.identity}.items())


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
        return markup.section((), f"<div class=damaged>{text(error)}</div>")
    strips = "".join(_strip(name, pictures) for name, pictures in _strips(sample, codec) if pictures)
    tags = f"<em class={text(row.family)}>{text(row.task or 'no task')}</em>{_measures(row)}"
    words = f"<h3>{text(sample.instruction)}</h3><p>{text(sample.evolution)}</p>"
    quiet = f"<div class=tags>{tags}<code>{text(row.key)}</code></div>"
    return markup.section(_groups(row), f"<div class=words>{words}{quiet}</div>{strips}")


def _groups(row: Row) -> list[Group]:
    return [Group("task", row.task), *([Group("family", row.family)] if row.family else [])]


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
    shown = (markup.figure(clip, caption, THUMBNAIL) for caption, clip in pictures)
    return f"<div class='strip {name}'>{''.join(shown)}</div>"


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
