"""What an evaluation on one's own data came to: means over edits, as report.json and, for people, report.md."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from v4e.data.disk import to_json, write_atomically
from v4e.eval.measures import MEASURES, Measure, Scores, measure_of
from v4e.eval.own import COPY, Evaluation, Scored
from v4e.eval.report import text_table
from v4e.eval.run import OVERALL, deviation, grouped, mean

FORMAT = 1
LISTED = 20  # quarantined edits that the Markdown names; quarantine.jsonl has them all
REGION_TITLES = {"edit_": "Where the edit is", "keep_": "Everywhere else", "": "The whole picture"}
REGION_ABOUT = {"edit_": "of the edited region", "keep_": "of the rest, over the n_keep edits that have one"}


@dataclass(frozen=True)
class Row:
    """A method's means over one group of cases.

    Args:
        kind: "overall", "tasks" or "families"; ``group`` is a name among them.
        seed: a sampling seed, or None for all of them together.
        spread: standard deviation (n - 1) of the seeds' means; empty for a single seed.
        n: edits; ``n_keep``: those with something to keep.
    """

    method: str
    steps: int
    kind: str
    group: str
    seed: int | None
    means: Scores
    spread: Scores
    n: int
    n_keep: int


@dataclass(frozen=True)
class Summary:
    """All that is reported.

    Args:
        about: what was evaluated: run, data, settings.
        absent: sentences about what was not measured.
        headline: steps at which methods are shown side by side.
    """

    evaluation: Evaluation
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    headline: int
    about: Mapping[str, object] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return [subject.name for subject in self.evaluation.subjects]

    def row(self, method: str, group: str = OVERALL, kind: str = OVERALL) -> Row | None:
        """A method's row at the headline's steps, over all seeds."""
        keys = (method, kind, group, None)
        found = (r for r in self.rows if (r.method, r.kind, r.group, r.seed) == keys and r.steps in (0, self.headline))
        return next(found, None)

    def groups(self, kind: str) -> list[str]:
        """Names of the tasks or of the families, in order."""
        return sorted({row.group for row in self.rows if row.kind == kind})


def summarise(scored: Sequence[Scored]) -> Iterator[Row]:
    """Rows overall, per task and per family, for every seed and for all seeds together."""
    for (method, steps), mine in grouped(scored, lambda s: [(s.method, s.steps)]).items():
        for (kind, group), theirs in grouped(mine, _groups_of).items():
            seeds = {seed: means_of(part) for seed, part in grouped(theirs, lambda s: [s.seed]).items()}
            for seed, means in seeds.items():
                yield Row(method, steps, kind, group, seed, means, {}, *_counts([s for s in theirs if s.seed == seed]))
            yield Row(method, steps, kind, group, None, means_of(theirs), _spread([*seeds.values()]), *_counts(theirs))


def means_of(scored: Sequence[Scored]) -> Scores:
    """Plain means of what is known, but geometric of ratios, lest one flat target hide nine blurred outputs."""
    means = {name: mean([s.scores[name] for s in scored]) for name in scored[0].scores}
    return means | {"sharpness": math.exp(mean([math.log(s.scores["sharpness"] or 1.0) for s in scored]) or 0.0)}


def write(summary: Summary, folder: Path) -> None:
    """Write report.json and report.md."""
    write_atomically(folder / "report.json", to_json(to_dict(summary), indent=1) + b"\n")
    write_atomically(folder / "report.md", to_markdown(summary).encode())


def to_dict(summary: Summary) -> dict[str, object]:
    """``methods`` -> name -> steps -> {overall, tasks, families, seeds -> {overall, tasks, families}}."""
    methods: dict[str, dict[str, dict]] = {}
    for row in summary.rows:
        entry = methods.setdefault(row.method, {}).setdefault(str(row.steps), {})
        place = entry if row.seed is None else entry.setdefault("seeds", {}).setdefault(str(row.seed), {})
        named = place if row.kind == OVERALL else place.setdefault(row.kind, {})
        named[row.group] = {**row.means, "n": row.n, "n_keep": row.n_keep} | (
            {"spread": row.spread} if row.spread else {}
        )
    made = summary.evaluation
    return {
        "format": FORMAT,
        "about": dict(summary.about),
        "measures": {name: explain(name) for name in summary.columns},
        "absent": dict(summary.absent),
        "cases": len(made.cases),
        "quarantined": len(made.refused),
        "methods": methods,
    }


def explain(column: str) -> str:
    """A column in words."""
    region, measure = column.partition("_")[0] + "_", measure_of(column)
    return f"{measure.about}{' ' + REGION_ABOUT[region] if region in REGION_ABOUT else ''}; {measure.better} is better"


def to_markdown(summary: Summary) -> str:
    """The report for people."""
    tables = [f"## {title}\n\n{region_table(summary, region)}" for region, title in REGION_TITLES.items()]
    kinds = {"tasks": "Tasks", "families": "Families"}
    tables += [
        f"## {title} at {summary.headline} steps\n\nPSNR of the edited region, in dB.\n\n{group_table(summary, kind)}"
        for kind, title in kinds.items()
        if summary.groups(kind)
    ]
    meant = [f"- {measure.title}: {measure.about}; {measure.better} is better" for measure in _shown(summary).values()]
    meant += [f"- {sentence}" for sentence in summary.absent.values()]
    parts = ["# Evaluation", *sentences(summary), *tables, "## What is measured\n\n" + "\n".join(meant)]
    return "\n\n".join([*parts, *_quarantine(summary), *_settings(summary)]) + "\n"


def sentences(summary: Summary) -> list[str]:
    """What was evaluated, in words."""
    made = summary.evaluation
    seeds = max(len(subject.seeds) for subject in made.subjects)
    lost = f"; {len(made.refused)} could not be used and are in quarantine.jsonl" if made.refused else ""
    spread = f", ± the spread of the {seeds} seeds" if seeds > 1 else ""
    return [
        f"{len(made.cases)} edits{lost}.",
        f"Means over all edits and seeds{spread}. `{COPY}` returns the input: what doing nothing scores.",
    ]


def overview(summary: Summary) -> str:
    """The edited region and the rest, for the terminal."""
    return "\n\n".join(f"{REGION_TITLES[region]}\n{region_table(summary, region)}" for region in ("edit_", "keep_"))


def region_table(summary: Summary, region: str) -> str:
    """One line per method and step count."""
    names = [name for name in summary.columns if _region_of(name) == region]
    rows = [row for row in summary.rows if row.kind == OVERALL and row.seed is None]
    lines = [[r.method, str(r.steps or ""), *(figure(r, n) for n in names), str(_count(r, region))] for r in rows]
    return text_table(["method", "steps", *(measure_of(n).title for n in names), "n"], lines)


def group_table(summary: Summary, kind: str, column: str = "edit_psnr") -> str:
    """One line per task or family, one column per method."""
    head, lines = [kind, *summary.methods, "n"], []
    for group in summary.groups(kind):
        rows = [summary.row(method, group, kind) for method in summary.methods]
        lines.append([group, *(figure(r, column) for r in rows), str(max(r.n for r in rows if r))])
    return text_table(head, lines)


def figure(row: Row | None, column: str) -> str:
    """A mean, and its spread where it is known, as text; empty where there is none."""
    value, digits = row.means.get(column) if row else None, measure_of(column).digits
    if row is None or value is None:
        return ""
    spread = row.spread.get(column)
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


# --------------------------------------------------------------------------------------------------- inside


def _groups_of(scored: Scored) -> list[tuple[str, str]]:
    tasks = [("tasks", scored.task)] if scored.task else []
    return [(OVERALL, OVERALL), *tasks, *(("families", family) for family in scored.families)]


def _counts(scored: Sequence[Scored]) -> tuple[int, int]:
    return len(scored), sum(s.scores["keep_psnr"] is not None for s in scored)


def _count(row: Row, region: str) -> int:
    return row.n_keep if region == "keep_" else row.n


def _spread(seeds: Sequence[Scores]) -> Scores:
    if len(seeds) < 2:
        return {}
    return {name: deviation([means[name] for means in seeds]) for name in seeds[0]}


def _region_of(column: str) -> str:
    return next((region for region in ("edit_", "keep_") if column.startswith(region)), "")


def _shown(summary: Summary) -> dict[str, Measure]:
    return {name: measure for name, measure in MEASURES.items() if name in summary.columns}


def _quarantine(summary: Summary) -> Iterator[str]:
    if refused := summary.evaluation.refused:
        lines = [f"- {r.name}: {r.error}" for r in refused[:LISTED]]
        more = [f"- and {len(refused) - LISTED} more"] if len(refused) > LISTED else []
        yield "## Could not be used\n\n" + "\n".join([*lines, *more])


def _settings(summary: Summary) -> Iterator[str]:
    yield "## Settings\n\n" + text_table(["setting", "value"], [[k, str(v)] for k, v in summary.about.items()])
