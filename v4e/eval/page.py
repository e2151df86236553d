"""An evaluation as one HTML page: the tables, and the edits side by side, the worst of every task first.

The page holds its pictures and needs neither network nor script; edits are chosen by task with the style sheet alone.
"""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from v4e.data.disk import write_atomically
from v4e.data.members import to_png
from v4e.eval.measures import measure_of
from v4e.eval.own import COPY, Known, Scored, output_of
from v4e.eval.run import OVERALL, Case, grouped, mean
from v4e.eval.summary import LISTED, REGION_TITLES, Row, Summary, explain, figure, sentences
from v4e.eval.triplets import Edits
from v4e.nouns import Clip
from v4e.pipelines import as_image

PAGE = "index.html"
THUMBNAIL = 256  # pixels of the longer side
DIMMED = 4  # the target's pixels outside the edit are shown with a quarter of their contrast
STYLE = (Path(__file__).parent / "page.css").read_text()

Cells = Mapping[str, Scored]  # of one case: method -> its edit at the headline's steps, first seed


def write_page(summary: Summary, edits: Edits, folder: Path, student: str, shown: int = 48) -> None:
    """Write the page.

    Args:
        student: the method by which edits are ranked.
        shown: edits with pictures; the worst of every task in turn.
    """
    ranked = worst_first(summary, student)[:shown]
    order = {known.id: rank for rank, known in enumerate(worst_first(summary, student, in_turn=False))}
    ranked.sort(key=lambda known: order[known.id])
    body = [*_head(summary, student), *_tables(summary), *_chooser(ranked)]
    body += [_edit(known, summary, edits, folder) for known in ranked]
    write_atomically(folder / PAGE, _page(str(summary.about["model"]), [*body, *_foot(summary)]).encode())


def worst_first(summary: Summary, student: str, in_turn: bool = True) -> list[Known]:
    """Cases by the student's PSNR in the edited region.

    Args:
        in_turn: every task's worst, then every task's second worst, and so on.
    """
    mine = [s for s in summary.evaluation.scored if s.method == student and s.steps == summary.headline]
    quality = {
        key: mean([s.scores["edit_psnr"] for s in some]) for key, some in grouped(mine, lambda s: [s.id]).items()
    }
    ranked = sorted(summary.evaluation.cases, key=lambda known: quality[known.id] or 0.0)
    if not in_turn:
        return ranked
    seen = Counter[str]()
    turns = []
    for known in ranked:
        turns.append(seen[known.task])
        seen[known.task] += 1
    return [known for _, known in sorted(zip(turns, ranked, strict=True), key=lambda pair: pair[0])]


# ------------------------------------------------------------------------------------------------------- tables


def _head(summary: Summary, student: str) -> Iterator[str]:
    made, row, copy = summary.evaluation, summary.row(student), summary.row(COPY)
    assert row and copy
    lead = (row.means["edit_psnr"] or 0.0) - (copy.means["edit_psnr"] or 0.0)
    tiles = [
        (f"{len(made.cases):,}", "edits"),
        (f"{len(made.refused):,}", "could not be used"),
        (f"{figure(row, 'edit_psnr')} dB", f"PSNR where the edit is, {_steps(summary.headline)}"),
        (f"{lead:+.1f} dB", "over a copy of the input"),
        (f"{figure(row, 'keep_psnr') or '–'} dB", "PSNR everywhere else"),
    ]
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in tiles)
    yield f"<header><p class=path>{_text(summary.about['model'])} on {_text(summary.about['data'])}</p>"
    yield f"<h1>Evaluation</h1><div class=tiles>{cells}</div></header>"
    if made.refused:
        lines = "".join(f"<li>{_text(r.name)}: {_text(r.error)}" for r in made.refused[:LISTED])
        yield f"<div class=damaged><b>{len(made.refused)} could not be used</b><ul>{lines}</ul></div>"


def _tables(summary: Summary) -> Iterator[str]:
    said = _text(sentences(summary)[-1].replace("`", ""))
    yield f"<div class=card><h3>Methods</h3><p>{said}</p>{_method_table(summary)}</div>"
    yield "<div class=pair>"
    for kind, title in (("tasks", "Tasks"), ("families", "Families")):
        if summary.groups(kind):
            said = f"PSNR where the edit is, in dB, at {_steps(summary.headline)}. The best is marked."
            yield f"<div class=card><h3>{title}</h3><p>{said}</p>{_group_table(summary, kind)}</div>"
    yield "</div>"


def _method_table(summary: Summary) -> str:
    """Columns under the three regions."""
    by_region = {r: [c for c in summary.columns if _region(c) == r] for r in REGION_TITLES}
    spans = "".join(
        f"<th colspan={len(cs)} class=first>{t}" for (r, t) in REGION_TITLES.items() if (cs := by_region[r])
    )
    columns = [(c, c == cs[0]) for cs in by_region.values() for c in cs]
    heads = "".join(f"<th title='{_text(explain(c))}'{_first(f)}>{_text(measure_of(c).title)}" for c, f in columns)
    lines = ""
    for row in summary.rows:
        if row.kind == OVERALL and row.seed is None:
            cells = "".join(f"<td{_first(f)}>{_text(figure(row, c))}" for c, f in columns)
            lines += f"<tr><td>{_text(_called(row.method, row.steps))}{cells}<td>{row.n:,}"
    return f"<div class=wide><table><tr><th>{spans}<th><tr><th>method{heads}<th>n{lines}</table></div>"


def _group_table(summary: Summary, kind: str) -> str:
    heads = "".join(f"<th>{_text(m)}" for m in summary.methods)
    lines = ""
    for group in summary.groups(kind):
        rows = [summary.row(method, group, kind) for method in summary.methods]
        best = max((r.means["edit_psnr"] or 0.0) for r in rows if r)
        cells = "".join(_bar(row, best) for row in rows)
        lines += f"<tr><td>{_text(group)}{cells}<td>{max(r.n for r in rows if r):,}"
    return f"<div class=wide><table class=bars><tr><th>{kind}{heads}<th>n{lines}</table></div>"


def _bar(row: Row | None, best: float) -> str:
    if row is None or row.means["edit_psnr"] is None:
        return "<td>"
    share = max(0.0, row.means["edit_psnr"]) / best * 100 if best > 0 else 0.0
    strong = " class=best" if row.means["edit_psnr"] == best else ""
    return f"<td{strong}>{_text(figure(row, 'edit_psnr'))}<i style='width:{share:.0f}%'></i>"


def _foot(summary: Summary) -> Iterator[str]:
    told = "".join(f"<tr><td>{_text(c)}<td>{_text(explain(c))}" for c in summary.columns)
    told += "".join(f"<tr><td>{_text(name)}<td>{_text(sentence)}" for name, sentence in summary.absent.items())
    rows = "".join(f"<tr><td>{_text(k)}<td>{_text(v)}" for k, v in summary.about.items())
    yield f"<details><summary>What is measured</summary><table>{told}</table></details>"
    yield f"<details><summary>Settings</summary><table>{rows}</table></details>"


# ------------------------------------------------------------------------------------------------------- choosing


def _chooser(shown: Sequence[Known]) -> Iterator[str]:
    """A row of radio buttons, one a task and a family, and the rules by which each hides the other edits."""
    groups = Counter(code for known in shown for code in _codes(known))
    names = {_code("family", f): f for known in shown for f in known.families}
    names |= {_code("task", known.task): known.task or "(none)" for known in sorted(shown, key=lambda k: k.task)}
    rules = (f"body:has(#{code}:checked) section:not(.{code}){{display:none}}" for code in names)
    yield "<h2>Edits, the worst first</h2>"
    yield f"<style>{''.join(rules)}</style><nav aria-label='Choose a task'>"
    for code, name, count in [("every", "all", len(shown)), *((c, n, groups[c]) for c, n in names.items())]:
        checked = " checked" if code == "every" else ""
        yield f"<input type=radio name=task id={code}{checked}>"
        yield f"<label for={code}>{_text(name)} <small>{count}</small></label>"
    yield "</nav>"


def _codes(known: Known) -> list[str]:
    return [_code("task", known.task), *(_code("family", f) for f in known.families)]


def _code(kind: str, name: str) -> str:
    """A legal class name, whatever the data calls it."""
    return f"{kind[0]}-{name.encode().hex()}"


# ------------------------------------------------------------------------------------------------------- edits


def _edit(known: Known, summary: Summary, edits: Edits, folder: Path) -> str:
    """One case: source, target, where the edit is, and what every method made of it."""
    case = edits.case(known.number)
    cells = _cells(known, summary)
    family = known.families[0] if known.families else ""
    tags = f"<em class='{_text(family)}'>{_text(known.task or 'no task')}</em><span>{known.edited:.0%} edited</span>"
    words = f"<h3>{_text(known.instruction)}</h3><div class=tags>{tags}<code>{_text(known.id)}</code></div>"
    pictures = [
        _figure(case.source, "source", _scores(cells.get(COPY))),
        _figure(case.target, "target", ""),
        _figure(_dimmed(case), "where it counts as edited", ""),
        *_outputs(known, case, summary, cells, folder),
    ]
    return f"<section class='{' '.join(_codes(known))}'>{words}<div class=strip>{''.join(pictures)}</div></section>"


def _outputs(known: Known, case: Case, summary: Summary, cells: Cells, folder: Path) -> Iterator[str]:
    for subject in summary.evaluation.subjects:
        if subject.open is not None:
            made = output_of(subject, summary.headline, subject.seeds[0], known, case.source, folder)
            yield _figure(made, _called(subject.name, summary.headline), _scores(cells.get(subject.name)))


def _cells(known: Known, summary: Summary) -> Cells:
    first = {subject.name: subject.seeds[0] for subject in summary.evaluation.subjects}
    mine = (s for s in summary.evaluation.scored if s.id == known.id and s.steps in (0, summary.headline))
    return {s.method: s for s in mine if s.seed == first[s.method]}


def _scores(scored: Scored | None) -> str:
    if scored is None:
        return ""
    edit, keep = scored.scores["edit_psnr"], scored.scores["keep_psnr"]
    return f"<b>{edit:.1f}</b> dB" + ("" if keep is None else f", elsewhere {keep:.1f}")


def _dimmed(case: Case) -> Clip:
    """The target, faint outside the mask."""
    x = case.target.frames_T3HW
    faint = (255 - (255 - x.int()) // DIMMED).to(torch.uint8)
    return Clip(torch.where(case.mask_HW, x, faint))


# ------------------------------------------------------------------------------------------------------- pieces


def _figure(clip: Clip, name: str, said: str) -> str:
    kind, content = _thumbnail(clip)
    data = base64.b64encode(content).decode()
    tiny = " class=tiny" if max(clip.size) < THUMBNAIL // 2 else ""
    caption = f"<figcaption>{_text(name)}<span>{said}</span></figcaption>"
    return f'<figure><img{tiny} alt="{_text(name)}" src="data:image/{kind};base64,{data}">{caption}</figure>'


def _thumbnail(clip: Clip) -> tuple[str, bytes]:
    """A picture of the page: small ones to the pixel, large ones reduced."""
    if max(clip.size) <= THUMBNAIL:
        return "png", to_png(clip.frame(-1))
    picture, buffer = as_image(clip), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(buffer, "JPEG", quality=88)
    return "jpeg", buffer.getvalue()


def _called(method: str, steps: int) -> str:
    return f"{method}, {_steps(steps)}" if steps else method


def _steps(count: int) -> str:
    return f"{count} {'step' if count == 1 else 'steps'}"


def _region(column: str) -> str:
    return next((region for region in REGION_TITLES if region and column.startswith(region)), "")


def _first(yes: bool) -> str:
    return " class=first" if yes else ""


def _page(title: str, body: Iterable[str]) -> str:
    view = '<meta name=viewport content="width=device-width">'
    head = f"<meta charset=utf-8>{view}<title>{_text(title)}: evaluation</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>"


def _text(value: object) -> str:
    return html.escape(str(value))
