"""`v4e-shards filter`: leave out the roll-outs that are not good enough, without encoding anything again.

Thresholds are words or a strict YAML, such as::

    least_fidelity: 6.0
    most_drift: 0.5

The same set and thresholds make the same bytes: shard by shard, in the set's order.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from data_tools.stats import Row, row_of
from v4e import config as settings_of
from v4e.data.disk import agree, to_json, writable, write_atomically
from v4e.data.places import PassingError, Place, exists, make_folder, place
from v4e.data.shards import SetMeta, Setting, ShardSet, finish, index_path, write_shard
from v4e.errors import ConfigError, DataError
from v4e.journal import progress

DROPS = "drops.jsonl"


@dataclass(frozen=True)
class FilterConfig:
    """What a roll-out must be; a threshold that is not given drops nothing. See data_tools/stats.py for the measures.

    Args:
        least_fidelity: of the tail frame, in dB.
        most_drift: outside the edit, relative.
        most_curvature: of the clip, in degrees.
        unmeasured: what becomes of a sample that lacks a measure which has a threshold.
        tasks: keep these alone; all of them when empty.
    """

    least_fidelity: float | None = None
    most_drift: float | None = None
    most_curvature: float | None = None
    unmeasured: Literal["keep", "drop"] = "keep"
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tasks and all(bound is None for _, bound, _ in self.bounds):
            fix = "set least_fidelity, most_drift, most_curvature or tasks"
            raise ConfigError("no threshold is set, so nothing would go", where="filter", fix=fix)

    @property
    def bounds(self) -> tuple[tuple[str, float | None, int], ...]:
        """Measure, threshold, and on which side of it a sample goes: -1 below, +1 above."""
        return (
            ("fidelity", self.least_fidelity, -1),
            ("drift", self.most_drift, 1),
            ("curvature", self.most_curvature, 1),
        )

    def reasons(self, row: Row) -> list[str]:
        """Why a sample goes; none when it stays."""
        found = ["task"] * bool(self.tasks and row.task not in self.tasks)
        for name, bound, side in self.bounds:
            value = getattr(row.measures, name)
            if bound is not None and value is None:
                found += [f"no {name}"] * (self.unmeasured == "drop")
            elif bound is not None and (value - bound) * side > 0:
                found.append(name)
        return found


@dataclass(frozen=True)
class Drop:
    """A sample that goes, its measures and every reason."""

    key: str
    shard: str
    reasons: Sequence[str]
    measures: Mapping[str, float | None]


@dataclass
class Verdict:
    """What goes and what stays."""

    samples: int = 0
    drops: list[Drop] = field(default_factory=list)

    def lines(self, most: int = 20) -> Iterator[str]:
        """For a terminal."""
        yield f"{self.samples - len(self.drops)} of {self.samples} samples stay, {len(self.drops)} go"
        counts = Counter(reason for drop in self.drops for reason in drop.reasons)
        yield from (f"{n} x {reason}" for reason, n in sorted(counts.items()))
        yield from (f"  {d.shard}, key {d.key}: {', '.join(map(_said, _whys(d)))}" for d in self.drops[:most])
        if len(self.drops) > most:
            yield f"  ... and {len(self.drops) - most} more"


def judge(
    folder: str | Place, config: FilterConfig, *, watch: Callable[[Sequence[int]], Iterable[int]] = iter
) -> Verdict:
    """Measure every sample of a set, and change nothing; a damaged one goes for that reason.

    Raises:
        DataError: the set is not whole, or its store does not answer.
    """
    whole = ShardSet.open(folder)
    verdict = Verdict(len(whole))
    for i in watch(range(len(whole))):
        shard = whole.shards[whole.locate(i)[0]].name
        try:
            row = row_of(whole, i)
        except PassingError:  # the store's fault and not the sample's
            raise
        except DataError as error:
            verdict.drops.append(Drop(whole.name(i), shard, [f"damaged: {error.what}"], {}))
            continue
        if reasons := config.reasons(row):
            verdict.drops.append(Drop(row.key, shard, reasons, asdict(row.measures)))
    return verdict


def write_drops(path: Place, verdict: Verdict) -> None:
    """The list of what goes, one json object a line, in the set's order."""
    with writable(path.parent):
        make_folder(path.parent)
        write_atomically(path, b"".join(to_json(asdict(drop)) + b"\n" for drop in verdict.drops))


def copy_kept(
    folder: str | Place, out: str | Place, config: FilterConfig, verdict: Verdict, *, watch: Callable = iter
) -> ShardSet:
    """A new set of what stays: the members as they lie in the old one, under the same shard names.

    Killed, it goes on after its last whole shard.

    Raises:
        DataError: ``out`` was begun with another set or other thresholds, nothing stays, or the disk is full.
    """
    whole, out = ShardSet.open(folder), place(out)
    if len(verdict.drops) == verdict.samples:
        raise DataError("nothing would stay", where=str(folder), fix="look at --dry-run and loosen the thresholds")
    gone, first = {(d.shard, d.key) for d in verdict.drops}, 0
    with writable(out):
        make_folder(out)
        meta = _meta(whole, config)
        agree(out / "settings.json", {**meta.to_dict(), "layout": {"shards": "those of the old set"}})
        for shard in watch(whole.shards):
            numbers = range(first, first := first + shard.samples)
            kept = [i for i in numbers if (shard.name, whole.name(i)) not in gone]
            if kept and not exists(index_path(out / shard.name)):
                write_shard(out / shard.name, (_packed(whole, i) for i in kept))
        write_drops(out / DROPS, verdict)
    return finish(out)


def _packed(whole: ShardSet, i: int) -> tuple[str, str, Mapping[str, bytes]]:
    return whole.keys[i], whole.sample(i).task, {kind: bytes(c) for kind, c in whole.members(i).items()}


def _meta(whole: ShardSet, config: FilterConfig) -> SetMeta:
    """The old set's, with where it was filtered from."""
    said: dict[str, Setting] = {f"filter.{k}": str(v) for k, v in asdict(config).items()}
    settings = {**whole.meta.settings, **said, "filter.of": whole.identity}
    return SetMeta(whole.meta.kind, whole.meta.student, whole.meta.teacher, settings)


def _whys(drop: Drop) -> Iterator[tuple[str, float | None]]:
    return ((reason, drop.measures.get(reason)) for reason in drop.reasons)


def _said(why: tuple[str, float | None]) -> str:
    reason, value = why
    return reason if value is None else f"{reason} {value:.3f}"


# --------------------------------------------------------------------------------------------------------- verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards filter`."""
    parser.add_argument("folder", help="shard folder or URL")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="thresholds, over those of the file")
    parser.add_argument("--config", default="", help="a YAML file with thresholds")
    parser.add_argument("--out", default="", help="folder for a new set of what stays")
    parser.add_argument("--drops", default="", help="file for the list of what goes")
    parser.add_argument("--dry-run", action="store_true", help="show what would go, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    if not (args.out or args.drops or args.dry_run):
        raise ConfigError("nowhere to write to", where="filter", fix="give --out, --drops or --dry-run")
    config = settings_of.load(args.config or None, args.overrides, lambda _: FilterConfig, recipe="filter")
    verdict = judge(args.folder, config, watch=lambda numbers: progress(numbers, "measure"))
    print("\n".join(verdict.lines()))
    if args.drops and not args.dry_run:
        write_drops(place(args.drops), verdict)
    if args.out and not args.dry_run:
        made = copy_kept(args.folder, args.out, config, verdict, watch=lambda shards: progress(shards, "copy"))
        print(f"{made.folder}: {len(made)} samples in {len(made.shards)} shards")
    return 0
