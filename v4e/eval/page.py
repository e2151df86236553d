"""An evaluation as one HTML page: the tables, and the edits side by side, the worst of every task first.

The page holds its pictures and needs neither network nor script; edits are chosen by task with the style sheet alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from v4e.data.disk import write_atomically
from v4e.eval import markup
from v4e.eval.markup import Group, text
from v4e.eval.measures import measure_of
from v4e.eval.own import COPY, Known, Scored, output_of
from v4e.eval.run import OVERALL, Case, grouped, mean
from v4e.eval.summary import LISTED, REGION_TITLES, Row, Summary, explain, figure, sentences
from v4e.eval.triplets import Edits
from v4e.nouns import Clip

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
    body = [*_head(summary, student), *_tables(summary), "<h2>Edits, the worst first</h2>"]
    body += markup.chooser([_groups(known) for known in ranked])
    body += [_edit(known, summary, edits, folder) for known in ranked]
    body += _foot(summary)
    write_atomically(folder / PAGE, markup.page(f"{summary.about['model']}: evaluation", body, STYLE))


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
    yield markup.header(f"{summary.about['model']} on {summary.about['data']}", "Evaluation", tiles)
    if made.refused:
        yield markup.damaged(
            f"{len(made.refused)} could not be used", (f"{r.name}: {r.error}" for r in made.refused[:LISTED])
        )


def _tables(summary: Summary) -> Iterator[str]:
    said = text(sentences(summary)[-1].replace("`", ""))
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
    heads = "".join(f"<th title='{text(explain(c))}'{_first(f)}>{text(measure_of(c).title)}" for c, f in columns)
    lines = ""
    for row in summary.rows:
        if row.kind == OVERALL and row.seed is None:
            cells = "".join(f"<td{_first(f)}>{text(figure(row, c))}" for c, f in columns)
            lines += f"<tr><td>{text(_called(row.method, row.steps))}{cells}<td>{row.n:,}"
    return f"<div class=wide><table><tr><th>{spans}<th><tr><th>method{heads}<th>n{lines}</table></div>"


def _group_table(summary: Summary, kind: str) -> str:
    heads = "".join(f"<th>{text(m)}" for m in summary.methods)
    lines = ""
    for group in summary.groups(kind):
        rows = [summary.row(method, group, kind) for method in summary.methods]
        best = max((r.means["edit_psnr"] or 0.0) for r in rows if r)
        cells = "".join(_bar(row, best) for row in rows)
        lines += f"<tr><td>{text(group)}{cells}<td>{max(r.n for r in rows if r):,}"
    return f"<div class=wide><table class=bars><tr><th>{kind}{heads}<th>n{lines}</table></div>"


def _bar(row: Row | None, best: float) -> str:
    if row is None or row.means["edit_psnr"] is None:
        return "<td>"
    share = max(0.0, row.means["edit_psnr"]) / best * 100 if best > 0 else 0.0
    strong = " class=best" if row.means["edit_psnr"] == best else ""
    return f"<td{strong}>{text(figure(row, 'edit_psnr'))}<i style='width:{share:.0f}%'></i>"


def _foot(summary: Summary) -> Iterator[str]:
    told = [*((c, explain(c)) for c in summary.columns), *summary.absent.items()]
    yield markup.settings(told, "What is measured")
    yield markup.settings(summary.about.items())


# ------------------------------------------------------------------------------------------------------- edits


def _groups(known: Known) -> list[Group]:
    return [Group("task", known.task), *(Group("family", f) for f in known.families)]


def _edit(known: Known, summary: Summary, edits: Edits, folder: Path) -> str:
    """One case: source, target, where the edit is, and what every method made of it."""
    case = edits.case(known.number)
    cells = _cells(known, summary)
    family = known.families[0] if known.families else ""
    tags = f"<em class='{text(family)}'>{text(known.task or 'no task')}</em><span>{known.edited:.0%} edited</span>"
    words = f"<h3>{text(known.instruction)}</h3><div class=tags>{tags}<code>{text(known.id)}</code></div>"
    pictures = [
        markup.figure(case.source, "source", THUMBNAIL, _scores(cells.get(COPY))),
        markup.figure(case.target, "target", THUMBNAIL),
        markup.figure(_dimmed(case), "where it counts as edited", THUMBNAIL),
        *_outputs(known, case, summary, cells, folder),
    ]
    return markup.section(_groups(known), f"{words}<div class=strip>{''.join(pictures)}</div>")


def _outputs(known: Known, case: Case, summary: Summary, cells: Cells, folder: Path) -> Iterator[str]:
    for subject in summary.evaluation.subjects:
        if subject.open is not None:
            made = output_of(subject, summary.headline, subject.seeds[0], known, case.source, folder)
            name, said = _called(subject.name, summary.headline), _scores(cells.get(subject.name))
            yield markup.figure(made, name, THUMBNAIL, said)


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


def _called(method: str, steps: int) -> str:
    return f"{method}, {_steps(steps)}" if steps else method


def _steps(count: int) -> str:
    return f"{count} {'step' if count == 1 else 'steps'}"


def _region(column: str) -> str:
    return next((region for region in REGION_TITLES if region and column.startswith(region)), "")


def _first(yes: bool) -> str:
    return " class=first" if yes else ""
