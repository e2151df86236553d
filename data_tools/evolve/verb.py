"""The verb: who needs a prompt, who has one, and nothing finished is lost."""

import argparse
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from data_tools.evolve import template
from data_tools.evolve.writers import (
    Draft,
    LocalSettings,
    LocalWriter,
    ServerSettings,
    ServerWriter,
    TemplateWriter,
    Writer,
)
from data_tools.ingest import Listed, Triplet, iterate, sole_writer, write_triplets
from v4e import config as settings_of
from v4e.data.disk import readable, scratch, to_json, writable, write_atomically
from v4e.data.places import Place, make_folder, place, shown
from v4e.errors import ConfigError, DataError
from v4e.journal import open_bar

LOG, REPORT, UNFIT = ".evolved.jsonl", "evolve.json", "evolve_fallbacks.jsonl"
SETTINGS = {"local": LocalSettings, "server": ServerSettings}
FALLBACK = re.compile(r"template \d+ for (?P<asked>.+) \((?P<why>[^()]+)\)")
PASSING = "another try may help"
SPENT = ("read", "wrote", "cached")
Row = dict[str, Any]  # a line of the log: a triplet's id and stamp, what was written, and what that cost


@dataclass
class Report:
    """What became of a folder's triplets.

    Args:
        writer: its signature.
        written: prompts by task, fallbacks included; ``families`` likewise.
        kept: prompts that were there already, by who wrote them ("data" for those that came with it).
        fallbacks: prompts that the template wrote because the writer could not, by reason.
        unwritten: ids of triplets whose instruction says nothing.
        read, wrote: tokens paid for, by a killed run before this one too; ``cached`` answers cost none.
        cost: of those tokens, in the prices' currency.
    """

    writer: str
    written: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    unwritten: list[str] = field(default_factory=list)
    read: int = 0
    wrote: int = 0
    cached: int = 0
    cost: float = 0.0

    def spend(self, row: Row) -> None:
        """Count what a row of the log cost."""
        for name in SPENT:
            setattr(self, name, getattr(self, name) + row[name])

    def count(self, row: Row) -> None:
        """Count what came of a row of the log."""
        if not row["evolution"]:
            self.unwritten.append(row["id"])
            return
        self.written[row["task"]] += 1
        self.families[template.family_of(row["task"])] += 1
        if row["failure"]:
            self.fallbacks[row["failure"]] += 1

    def __str__(self) -> str:
        lines = [f"{self.written.total()} written by {self.writer}{_counts(self.written)}"]
        lines += [f"{self.kept.total()} kept{_counts(self.kept)}"] if self.kept else []
        lines += [f"{self.fallbacks.total()} fell back to the template{_counts(self.fallbacks)}"] * bool(self.fallbacks)
        spent = f"{self.read} tokens read, {self.wrote} written, {self.cached} answers from the cache"
        return "\n".join(lines + [f"{spent}, cost {self.cost:.4f}"] * bool(self.read or self.cached))


def _counts(counts: Counter[str]) -> str:
    return ": " + ", ".join(f"{n} {what}" for what, n in counts.most_common()) if counts else ""


def add_evolutions(
    folder: str | Place,
    writer: Writer | None = None,
    *,
    again: bool = False,
    max_fallback_fraction: float = 1.0,
    prices: tuple[float, float] = (0.0, 0.0),
) -> Report:
    """Give every triplet its evolution prompt, and its task where the data said none.

    Prompts that came with the data stay. What this writer wrote before is not asked for again; what passing trouble
    kept it from is. A killed run goes on where it stopped.

    Args:
        folder: written by ingest, here or behind a URL; of a URL the log of what is finished is in a local folder.
        writer: the template by default.
        again: also rewrite what other writers, versions or settings wrote.
        max_fallback_fraction: a larger share of fallbacks is an error, after everything is written.
        prices: of a million tokens read and written.

    Raises:
        DataError: nothing was ingested there, its list is damaged, another evolve or an ingest is at work,
            instructions say nothing, too many fallbacks.
        V4EError: as the writer says.
    """
    folder, writer = place(folder), writer or TemplateWriter()
    Listed(folder)  # says what is missing or wrong before anything is asked, and paid for
    make_folder(folder)  # or says that it cannot be written
    with writable(folder), sole_writer(folder):
        killed, report = Report(writer.signature), Report(writer.signature)
        unfit: list[bytes] = []  # of what a killed run finished, then of what this one did
        _fold(folder, report, lambda row, t: settled(t, report.writer, again) and _tell(row, killed, unfit))
        _write_missing(folder, writer, again, report)
        _fold(folder, report, lambda row, _: _tell(row, report, unfit))
        report.cost = (report.read * prices[0] + report.wrote * prices[1]) / 1e6
        write_atomically(folder / UNFIT, b"".join(unfit))
        write_atomically(folder / REPORT, to_json(vars(report), indent=1))
    _refuse(report, killed, folder, max_fallback_fraction)
    return report


def settled(triplet: Triplet, signature: str, again: bool) -> bool:
    """Whether a triplet has a prompt that is to be kept."""
    if not triplet.evolution or not triplet.writer:
        return bool(triplet.evolution)
    if triplet.writer == signature:
        return True
    fallback = FALLBACK.fullmatch(triplet.writer)
    if fallback and fallback["asked"] == signature:
        return PASSING not in fallback["why"]
    return not again


def _write_missing(folder: Place, writer: Writer, again: bool, report: Report) -> None:
    """Ask for every prompt that is missing; each answer is in the log before the next is waited for."""
    keeps, total, fallen = Counter[str](), 0, 0
    for triplet in iterate(folder):
        total += 1
        if settled(triplet, report.writer, again):
            keeps[triplet.writer or "data"] += 1
    report.kept = keeps
    missing = (t for t in iterate(folder) if not settled(t, report.writer, again))
    with open(scratch(folder) / LOG, "ab") as log, open_bar("evolve", total, keeps.total()) as bar:
        for drafts in writer.drafts(missing):
            log.write(b"".join(to_json(_row(draft, report.writer)) + b"\n" for draft in drafts))
            log.flush()
            fallen += sum(bool(draft.failure) for draft in drafts)
            bar.advance(len(drafts), fallbacks=fallen)


def _row(draft: Draft, signature: str) -> Row:
    """What a draft comes to, as a line of the log."""
    triplet = draft.triplet
    prompt, task, writer = _told(draft, signature)
    new = {"evolution": prompt, "task": triplet.task or task, "writer": writer}
    failed = {"failure": draft.failure, "detail": draft.detail}
    return {"id": triplet.id, "stamp": triplet.stamp, **new, **failed, **{k: getattr(draft, k) for k in SPENT}}


def _told(draft: Draft, signature: str) -> tuple[str, str, str]:
    """Prompt, task and who wrote it: the writer; where it failed, a model before it, or else the template."""
    old = draft.triplet
    try:
        made = template.write(old.instruction)
    except DataError:
        return draft.prompt, "other", signature * bool(draft.prompt)
    if draft.prompt:
        return draft.prompt, made.task, signature
    if old.evolution and not old.writer.startswith(template.NAME):
        return old.evolution, made.task, old.writer
    why = f"{draft.failure}, {PASSING}" if draft.passing else draft.failure
    return made.prompt, made.task, f"{TemplateWriter().signature} for {signature} ({why})"


def _fold(folder: Place, report: Report, met: Callable[[Row, Triplet], object]) -> None:
    """Bring the log into the list, and end it."""
    path = scratch(folder) / LOG
    if not path.is_file():
        return
    places = _Places(path)

    def merged() -> Iterator[Triplet]:
        with open(path, "rb") as log:
            for triplet in iterate(folder):
                if (at := places.of(triplet.id)) >= 0:
                    log.seek(at)
                    row = json.loads(log.readline())
                    report.spend(row)
                    if row["stamp"] == triplet.stamp:  # else it was ingested anew since
                        triplet = replace(triplet, **{k: row[k] for k in ("evolution", "task", "writer")})
                        met(row, triplet)
                yield triplet

    write_triplets(folder, merged())
    path.unlink()


class _Places:
    """Where each id's last row begins in a log, sixteen bytes a row; a kill may have left half a row at its end."""

    def __init__(self, log: Path) -> None:
        ids, starts, at = array("Q"), array("Q"), 0
        with open(log, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    with readable(f"{log}, byte {at}"):
                        ids.append(xxh3_64_intdigest(json.loads(line)["id"].encode()))
                    starts.append(at)
                at += len(line)
        self._ids, self._starts = np.asarray(ids, np.uint64), np.asarray(starts, np.int64)
        order = np.argsort(self._ids, kind="stable")  # the rows of one id keep their order
        self._ids, self._starts = self._ids[order], self._starts[order]

    def of(self, key: str) -> int:
        """The byte, or -1 where there is no such row."""
        digest = np.uint64(xxh3_64_intdigest(key.encode()))
        behind = int(np.searchsorted(self._ids, digest, side="right"))
        return int(self._starts[behind - 1]) if behind and self._ids[behind - 1] == digest else -1


def _tell(row: Row, report: Report, unfit: list[bytes]) -> None:
    """Count a row, and give a line to one whose writer failed."""
    report.count(row)
    if row["failure"]:
        unfit.append(to_json({k: row[k] for k in ("id", "failure", "detail", "writer")}) + b"\n")


def _refuse(report: Report, killed: Report, folder: Place, max_fallback_fraction: float) -> None:
    """DataError about what was written, by a killed run before this one too."""
    if report.unwritten:
        some = ", ".join(report.unwritten[:5])
        raise DataError(
            f"{len(report.unwritten)} instructions say nothing: {some}",
            where=shown(folder),
            fix="give them words in the source, and ingest again",
        )
    fallbacks, written = report.fallbacks + killed.fallbacks, report.written + killed.written
    share = fallbacks.total() / max(1, written.total())
    if share > max_fallback_fraction:
        fix = f"see {UNFIT}; run again, or allow them with --max-fallback-fraction"
        which = "the prompts, a killed run's among them," if killed.written else "the prompts"
        raise DataError(f"{share:.1%} of {which} fell back to the template\n{report}", where=shown(folder), fix=fix)


# ------------------------------------------------------------------------------------------------- arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards evolve`."""
    add = parser.add_argument
    add("folder", help="folder or URL written by ingest")
    add("overrides", nargs="*", metavar="key=value", help="settings of the writer, over those of the file")
    add("--writer", choices=("template", *SETTINGS), default="template", help="rules, a model here, or a server")
    add("--config", metavar="YAML", help="file with the writer's settings")
    add("--again", action="store_true", help="also rewrite what other writers, versions or settings wrote")
    add("--max-fallback-fraction", type=float, default=1.0, help="more fallbacks to the template are an error")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    writer, prices = _writer(args), (0.0, 0.0)
    if isinstance(writer, ServerWriter):
        prices = (writer.settings.price_read, writer.settings.price_wrote)
    report = add_evolutions(
        args.folder, writer, again=args.again, max_fallback_fraction=args.max_fallback_fraction, prices=prices
    )
    print(report)
    return 0


def _writer(args: argparse.Namespace) -> Writer:
    if args.writer not in SETTINGS:
        if args.overrides or args.config:
            raise ConfigError("the template writer has no settings", fix="say which writer: --writer local or server")
        return TemplateWriter()
    words, kind = args.overrides, SETTINGS[args.writer]
    settings = settings_of.load(args.config, words, lambda _: kind, recipe=args.writer)
    print(settings_of.to_yaml(settings))
    if isinstance(settings, LocalSettings):
        return LocalWriter.load(settings)
    return ServerWriter.load(settings, place(args.folder))
