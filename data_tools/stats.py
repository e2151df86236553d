"""`v4e-shards stats`: how much of what a set holds, and how good its roll-outs are.

Samples, bytes and tasks come from the ``_stats.json`` beside the shards; what those do not say is read from samples.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data_tools.evolve import family_of
from v4e.data.disk import readable, to_json
from v4e.data.places import Place, read_many
from v4e.data.shards import ShardSet
from v4e.errors import DataError
from v4e.journal import progress
from v4e.nouns import Encoded, Rollout, Sample
from v4e.straightness import mean_curvature

X = TypeVar("X")
CEILING = 100.0  # dB; equality would be infinite
UNCHANGED = 0.02  # a place counts as not edited when its colours change by at most 2 %, which is noise of an encoder
QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Measures:
    """How good a roll-out is, by its latents alone; None where the sample does not carry what it takes.

    Args:
        fidelity: in dB, energy of the edited image's latents over that of the roll-out's error in its last frame.
        drift: error at places that the edit leaves alone, relative to what lies there; 0 is perfect.
        curvature: mean angle between successive displacements of the clip, in degrees; 0 is straight.
    """

    fidelity: float | None = None
    drift: float | None = None
    curvature: float | None = None


MEASURES = tuple(f.name for f in fields(Measures))
UNITS = {"fidelity": "dB", "drift": "", "curvature": "°"}


@dataclass(frozen=True)
class Spread:
    """A measure's distribution over ``n`` samples."""

    n: int
    mean: float
    quantiles: Mapping[str, float]

    @staticmethod
    def of(values: Iterable[float]) -> "Spread | None":
        found = np.fromiter(values, float)
        if not len(found):
            return None
        levels = np.quantile(found, list(QUANTILES.values()))
        return Spread(len(found), float(found.mean()), dict(zip(QUANTILES, levels.tolist(), strict=True)))


@dataclass(frozen=True)
class Row:
    """What is known of one sample without its pictures."""

    number: int
    key: str
    task: str
    family: str
    dataset: str
    writer: str
    measures: Measures


@dataclass
class Stats:
    """A set in numbers.

    Args:
        samples, shards, bytes, seconds: of the whole set; ``seconds`` were spent making it.
        resolution: of the student's clip and the teacher's.
        counts: by kind (``task``, ``family``, ``dataset``, ``writer``): how many samples have which value.
        counted: samples that the kinds other than task and family are counted over.
        spreads: of each measure, over all samples that were read, over those of each family and of each task.
        damaged: what could not be read, and why.
    """

    samples: int
    shards: int
    bytes: int
    seconds: float
    resolution: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    counted: int = 0
    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield f"{self.samples} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB, {self.resolution}"
        yield f"made in {self.seconds:.0f} s of all writers together"
        for kind, counter in self.counts.items():
            over = f" (of {self.counted} read)" if kind in ("dataset", "writer") and self.counted < self.samples else ""
            yield f"{kind}{over}: " + ", ".join(f"{n} {name or '(none)'}" for name, n in counter.items())
        for measure, by_group in self.spreads.items():
            yield f"{measure} {UNITS[measure]}".rstrip()
            yield from (f"  {group:<12} {_numbers(spread)}" for group, spread in by_group.items())
        yield from (f"damaged: {line}" for line in self.damaged[:20])


def stats(
    folder: str | Place, *, most: int = 2000, watch: Callable[[Sequence[int]], Iterable[int]] = iter
) -> tuple[Stats, list[Row]]:
    """Numbers of a whole set, and the rows they were made of.

    Args:
        most: samples read for what ``_stats.json`` does not say, evenly spread; 0 for all.
        watch: wraps their numbers, for a progress bar.

    Raises:
        DataError: the set is not whole.
    """
    whole, damaged = ShardSet.open(folder), list[str]()
    meta, sheets = whole.meta, _sheets(whole, damaged)
    sizes = f"{meta.student.T}x{meta.student.H}x{meta.student.W}"
    sizes += f", teacher {meta.teacher.T}x{meta.teacher.H}x{meta.teacher.W}" if meta.teacher else ""
    rows = list(_rows(whole, watch(spread(range(len(whole)), most)), damaged))
    seconds, tasks = sum(sheet["seconds"] for sheet in sheets), _tasks(sheets, rows)
    size = sum(s.bytes for s in whole.shards)
    made = Stats(len(whole), len(whole.shards), size, seconds, sizes, counted=len(rows), damaged=damaged)
    counters = {
        "task": tasks,
        "family": _families(tasks),
        "dataset": Counter(r.dataset for r in rows),
        "writer": Counter(r.writer for r in rows),
    }
    made.counts = {kind: dict(counter.most_common()) for kind, counter in counters.items()}
    made.spreads = {m: found for m in MEASURES if (found := _by_group(rows, m))}
    return made, rows


def measure(sample: Sample) -> Measures:
    """Measure one roll-out, against the student's clip: the source, then the edit held still."""
    if not (sample.encoded and sample.rollout):
        return Measures()
    return Measures(
        _fidelity(sample.encoded, sample.rollout),
        _drift(sample.encoded, sample.rollout),
        _curvature(sample.rollout),
    )


def evolving(rollout: Rollout) -> Tensor:
    """The clip that the teacher came to, clean latents [C, t, h, w]: all its frames where its states were kept.

    Their last stretch is gone on with to noise level 0, which is exact where the path is straight.
    """
    x, sigma = rollout.full_KCthw.float(), rollout.sigma_K
    if len(x) < 2:
        return rollout.end_Cthw.float()
    return x[-1] - sigma[-1] * (x[-1] - x[-2]) / (sigma[-1] - sigma[-2])


def spread(items: Sequence[X], wanted: int) -> list[X]:
    """``wanted`` of the items, evenly spread; all of them where there are no more, or where 0 are wanted."""
    many = 0 < wanted < len(items)
    return [items[i * len(items) // wanted] for i in range(wanted)] if many else list(items)


# ----------------------------------------------------------------------------------------------------- measures


def _fidelity(encoded: Encoded, rollout: Rollout) -> float:
    wanted = encoded.clip_Cthw[:, -1].float()
    return _decibels(wanted.square().sum(), (rollout.end_Cthw[:, -1].float() - wanted).square().sum())


def _decibels(signal: Tensor, noise: Tensor) -> float:
    return min(CEILING, 10 * math.log10(max(signal.item(), 1e-12) / max(noise.item(), 1e-12)))


def _drift(encoded: Encoded, rollout: Rollout) -> float | None:
    """Frames after the first, where the edit changes nothing; None where it changes everything."""
    still_thw = encoded.change_thw[1:].float() <= UNCHANGED
    if not still_thw.any():
        return None
    wanted, found = (x[:, 1:].float()[:, still_thw] for x in (encoded.clip_Cthw, rollout.end_Cthw))
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-9))


def _curvature(rollout: Rollout) -> float | None:
    clip_Cthw = evolving(rollout)
    if clip_Cthw.shape[1] < 3:
        return None
    return mean_curvature(clip_Cthw.transpose(0, 1).flatten(1)[None]).item()


# ----------------------------------------------------------------------------------------------------- counting


def _sheets(whole: ShardSet, damaged: list[str]) -> list[Mapping]:
    """The shards' ``_stats.json``; none of them where one cannot be read, as half a sum is a wrong one."""
    places = [whole.folder / f"{s.name.removesuffix('.tar')}_stats.json" for s in whole.shards]
    try:
        with readable(f"{whole.folder}/*_stats.json"):
            return [json.loads(content) for content in read_many(places)]
    except DataError as error:
        damaged.append(str(error))
        return []


def _tasks(sheets: Sequence[Mapping], rows: Iterable[Row]) -> Counter[str]:
    if not sheets:
        return Counter(row.task for row in rows)
    tasks = Counter[str]()
    for sheet in sheets:
        tasks.update(sheet["tasks"])
    return tasks


def _families(tasks: Mapping[str, int]) -> Counter[str]:
    families = Counter[str]()
    for task, n in tasks.items():
        families[family_of(task)] += n
    return families


def _rows(whole: ShardSet, numbers: Iterable[int], damaged: list[str]) -> Iterator[Row]:
    """Samples that can be read; what is wrong with the others goes to ``damaged``."""
    for i in numbers:
        try:
            yield row_of(whole, i)
        except DataError as error:
            damaged.append(str(error))


def row_of(whole: ShardSet, i: int) -> Row:
    """Read and measure one sample; DataError when it is damaged."""
    with torch.no_grad():
        sample = whole.sample(i)
        of = sample.origin
        return Row(i, sample.key, sample.task, family_of(sample.task), of.dataset, of.writer, measure(sample))


def _by_group(rows: Sequence[Row], measure: str) -> dict[str, Spread]:
    """The measure's spread over all rows, then by family, then by task; no group stands twice."""
    named = {name: [r for r in rows if r.family == name] for name in sorted({r.family for r in rows} - {""})}
    named |= {name: [r for r in rows if r.task == name] for name in sorted({r.task for r in rows} - {"", *named})}
    spreads = {name: Spread.of(values_of(group, measure)) for name, group in {"all": rows, **named}.items()}
    return {name: found for name, found in spreads.items() if found}


def values_of(rows: Iterable[Row], measure: str) -> list[float]:
    """A measure of all rows that have it."""
    return [value for row in rows if (value := getattr(row.measures, measure)) is not None]


def _numbers(of: Spread) -> str:
    return f"n {of.n:<6} mean {of.mean:8.3f}  " + "  ".join(f"{k} {v:8.3f}" for k, v in of.quantiles.items())


# --------------------------------------------------------------------------------------------------------- verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards stats`."""
    parser.add_argument("folder", help="shard folder or URL")
    parser.add_argument("--most", type=int, default=2000, help="samples to measure, evenly spread; 0 for all")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    found, _ = stats(args.folder, most=args.most, watch=lambda numbers: progress(numbers, "measure"))
    print(to_json(asdict(found), indent=1).decode() if args.json else "\n".join(found.lines()))
    return DataError.exit_code if found.damaged else 0
