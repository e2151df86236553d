"""The evaluator: run methods over held-out cases, keep every picture, and average.

Every source, target, mask and output is a PNG in the edits folder, and ``edits.jsonl`` says which is which, so that
anyone can compute every number again: :func:`recompute` does, from the files alone.
"""

import json
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from v4e.data.disk import hash_of, read_bytes, to_json, write_lines
from v4e.data.members import from_png, to_png
from v4e.errors import DataError
from v4e.eval.metrics import Scores, psnr, score
from v4e.journal import progress
from v4e.nouns import Clip, seed_of

LINES = "edits.jsonl"
UNITS = ".units"  # results of finished batches, while an evaluation is at work
OVERALL = "overall"


@dataclass(frozen=True)
class Case:
    """A held-out triplet.

    Args:
        id: unique, fit for a file name.
        task: one name; ``groups``: further names it is averaged under, such as "style".
        source, target: images of one size.
        mask_HW: bool, where the edit may change something.
        middle: the true frames between source and target, for methods that make a clip; None where unknown.
        captions: what source and target show, in words; None where unknown.
    """

    id: str
    task: str
    instruction: str
    source: Clip
    target: Clip
    mask_HW: Tensor
    groups: tuple[str, ...] = ()
    middle: Clip | None = None
    captions: tuple[str, str] | None = None


Make = Callable[[Sequence[Case], Sequence[int], int], list[Clip]]
Edit = Callable[[Sequence[Clip], Sequence[str], Sequence[int], int], list[Clip]]
Judge = Callable[[Case, Clip], bool]


@dataclass(frozen=True)
class Method:
    """A way of making edits.

    Args:
        name: row name; at most one method of a name in an evaluation.
        make: (cases, one seed per case, steps) -> one clip per case, whose last frame is the edit; frames before it
            but the first are compared with ``Case.middle`` when there are as many.
        steps: step counts to try; 0 where steps mean nothing.
        seeds: sampling seeds to try.
        identity: all that its edits depend on besides, such as a hash of weights and settings. A batch that was
            finished before a kill is taken as it is if this is the same; without one, everything is made again.
    """

    name: str
    make: Make
    steps: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    identity: str = ""


@dataclass(frozen=True)
class Files:
    """Paths relative to the edits folder; ``middle`` files hold the middle frames side by side."""

    source: str
    target: str
    mask: str
    output: str
    middle: str | None = None
    middle_target: str | None = None


@dataclass(frozen=True)
class Result:
    """One evaluated edit: a line of ``edits.jsonl``."""

    id: str
    instruction: str
    task: str
    groups: tuple[str, ...]
    method: str
    steps: int
    seed: int
    files: Files
    metrics: Scores


@dataclass(frozen=True)
class Metrics:
    """Means over images of :class:`~v4e.eval.metrics.Scores`: the mean of per-image dB values, not the dB of a mean.

    Args:
        n: edited images; ``n_keep``: those of them with something to keep, over which keep_psnr is averaged.
    """

    psnr: float
    edit_psnr: float
    keep_psnr: float | None
    ssim: float
    sharpness: float
    success: float | None
    middle_psnr: float | None
    n: int
    n_keep: int


@dataclass(frozen=True)
class Row:
    """A method's means over one group of cases.

    Args:
        group: a task, a group of tasks, or "overall".
        seed: a sampling seed, or None for all of them together.
        spread: standard deviation (n - 1) of the seeds' means; None for a single seed.
    """

    method: str
    steps: int
    group: str
    seed: int | None
    mean: Metrics
    spread: Metrics | None = None


@dataclass(frozen=True)
class Unit:
    """A batch of one method at one step count and seed."""

    method: Method
    steps: int
    seed: int
    cases: tuple[Case, ...]

    @property
    def kept(self) -> str:
        """The file of its results, named by all that they depend on; for methods with an identity."""
        asked = [self.method.name, self.method.identity, str(self.steps), str(self.seed)]
        return f"{hash_of(to_json([asked, [_content(case) for case in self.cases]]))}.jsonl"


def of_editor(edit: Edit) -> Make:
    """An editor, which sees source and instruction alone, as a method's ``make``."""
    return lambda cases, seeds, steps: edit([c.source for c in cases], [c.instruction for c in cases], seeds, steps)


def copy_source(cases: Sequence[Case], seeds: Sequence[int], steps: int) -> list[Clip]:
    """The ``copy`` row: the input returned unchanged."""
    return [case.source for case in cases]


def evaluate(
    cases: Sequence[Case],
    methods: Sequence[Method],
    judge: Judge,
    folder: Path,
    batch: int = 16,
    processes: int = 1,
) -> list[Result]:
    """Run every method over every case, write the pictures, score what was written.

    Killed, it goes on after the last finished batches of methods with an ``identity``.

    Args:
        batch: cases given to a method at once.
        processes: that share the work, forked; each should compute on one thread.

    Returns:
        one result per (method, steps, seed, case); also the lines of ``folder/edits.jsonl``.

    Raises:
        DataError: two cases share an id, or a method did not make one clip of the target's size per case.
    """
    _refuse_twins([case.id for case in cases])
    _write_inputs(cases, folder)
    units = [*_units(cases, methods, batch)]
    made = _run_all(units, judge, folder, processes)
    results = [r for part in progress(made, "evaluate", total=len(units)) for r in part]
    write_results(results, folder)
    shutil.rmtree(folder / UNITS, ignore_errors=True)
    return results


def recompute(folder: Path, judge: Judge | None = None) -> list[Result]:
    """All metrics again, from the files alone; without a judge, its recorded word is kept."""
    return [_rescored(result, folder, judge) for result in read_results(folder)]


def aggregate(results: Iterable[Result]) -> list[Row]:
    """Rows overall, per task and per group, for every seed and for all seeds together, in order of first appearance."""
    results = [*results]
    rows: list[Row] = []
    for (method, steps), mine in grouped(results, lambda r: [(r.method, r.steps)]).items():
        for group, theirs in grouped(mine, lambda r: [OVERALL, *r.groups, r.task]).items():
            seeds = {s: mean_of([r.metrics for r in part]) for s, part in grouped(theirs, lambda r: [r.seed]).items()}
            rows += [Row(method, steps, group, seed, mean) for seed, mean in seeds.items()]
            together = mean_of([r.metrics for r in theirs])
            rows.append(Row(method, steps, group, None, together, _spread([*seeds.values()])))
    return rows


def mean_of(scores: Sequence[Scores]) -> Metrics:
    """Plain means, but geometric of ratios; values that are None are left out, and None is the mean of nothing.

    Sharpness is a ratio: one output ten times as sharp as a flat target must not hide nine that are blurred.
    """
    means = {f.name: mean([getattr(s, f.name) for s in scores]) for f in fields(Scores)}
    means["sharpness"] = math.exp(mean([math.log(s.sharpness) for s in scores]) or 0.0)
    return Metrics(**means, n=len(scores), n_keep=sum(s.keep_psnr is not None for s in scores))  # type: ignore[arg-type]


def write_results(results: Iterable[Result], folder: Path) -> None:
    """Write ``edits.jsonl``, whole or not at all."""
    write_lines(folder / LINES, (asdict(r) for r in results))


def read_results(folder: Path) -> list[Result]:
    """The lines of ``edits.jsonl``.

    Raises:
        DataError: it is missing or a line is damaged.
    """
    return _read_lines(folder / LINES)


def case_of(result: Result, folder: Path) -> Case:
    """A case as its files tell it."""
    files = result.files
    source, target, mask = (_read(folder / name) for name in (files.source, files.target, files.mask))
    middle = files.middle_target
    return Case(
        id=result.id,
        task=result.task,
        instruction=result.instruction,
        source=source,
        target=target,
        mask_HW=mask.frames_T3HW[0, 0] > 127,
        groups=result.groups,
        middle=_cut(_read(folder / middle), target.size[1]) if middle else None,
    )


def output_of(result: Result, folder: Path) -> Clip:
    """The edited image."""
    return _read(folder / result.files.output)


def clip_of(result: Result, folder: Path) -> Clip:
    """Source, the middle frames that were kept, and the edited image."""
    source, output = _read(folder / result.files.source), output_of(result, folder)
    if not result.files.middle:
        return Clip.join([source, output])
    return Clip.join([source, _cut(_read(folder / result.files.middle), source.size[1]), output])


# --------------------------------------------------------------------------------------------------- inside


def _units(cases: Sequence[Case], methods: Sequence[Method], batch: int) -> Iterable[Unit]:
    """Step counts vary fastest, so that progress mixes cheap and dear units and its ETA holds."""
    chunks = [tuple(cases[i : i + batch]) for i in range(0, len(cases), batch)]
    for method in methods:
        for chunk in chunks:
            for seed in method.seeds:
                yield from (Unit(method, steps, seed, chunk) for steps in method.steps)


def _run_all(units: Sequence[Unit], judge: Judge, folder: Path, processes: int) -> Iterator[list[Result]]:
    """Results unit by unit, in order."""
    if processes == 1:
        yield from (_run(unit, judge, folder) for unit in units)
        return
    # Methods hold closures over loaded models, which no queue carries: forked children inherit them.
    global _inherited
    _inherited = (units, judge, folder)
    # A child makes torch's thread pool anew when first asked; a model's loader asks with many threads at once, some of
    # which then find none ("Invalid thread pool!"). So it is made before them.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_run_inherited, range(len(units)))


_inherited: tuple[Sequence[Unit], Judge, Path] | None = None


def _run_inherited(number: int) -> list[Result]:
    assert _inherited is not None
    units, judge, folder = _inherited
    return _run(units[number], judge, folder)


def _run(unit: Unit, judge: Judge, folder: Path) -> list[Result]:
    if not unit.method.identity:
        return _made(unit, judge, folder)
    kept = folder / UNITS / unit.kept
    if kept.is_file():
        return _read_lines(kept)
    results = _made(unit, judge, folder)
    kept.parent.mkdir(exist_ok=True)
    write_lines(kept, (asdict(r) for r in results))
    return results


def _made(unit: Unit, judge: Judge, folder: Path) -> list[Result]:
    seeds = [seed_of("eval", unit.seed, case.id) for case in unit.cases]
    clips = unit.method.make(unit.cases, seeds, unit.steps)
    _check(unit, clips)
    return [_finish(unit, case, clip, judge, folder) for case, clip in zip(unit.cases, clips, strict=True)]


def _content(case: Case) -> list[str]:
    clips = [clip.frames_T3HW for clip in (case.source, case.target, case.middle) if clip]
    return [case.id, case.instruction, *(hash_of(x.numpy().tobytes()) for x in (*clips, case.mask_HW))]


def _finish(unit: Unit, case: Case, clip: Clip, judge: Judge, folder: Path) -> Result:
    """Write one output and score it."""
    place = f"{unit.method.name}/{unit.steps}-steps/seed-{unit.seed}/{case.id}"
    output, middle = clip.frame(-1), _middle_frames(case, clip)
    _write(folder / f"{place}.png", output)
    if middle:
        _write(folder / f"{place}.middle.png", _strip(middle))
    files = replace(
        _input_files(case, bool(middle)), output=f"{place}.png", middle=f"{place}.middle.png" if middle else None
    )
    scores = _scores(case, output, middle, judge)
    return Result(
        case.id, case.instruction, case.task, case.groups, unit.method.name, unit.steps, unit.seed, files, scores
    )


def _scores(case: Case, output: Clip, middle: Clip | None, judge: Judge | None) -> Scores:
    scores = score(output.frames_T3HW[0], case.target.frames_T3HW[0], case.mask_HW)
    success = float(judge(case, output)) if judge else None
    middle_psnr = _middle_psnr(middle, case.middle) if middle and case.middle else None
    return replace(scores, success=success, middle_psnr=middle_psnr)


def _middle_psnr(middle: Clip, truth: Clip) -> float | None:
    frames = zip(middle.frames_T3HW, truth.frames_T3HW, strict=True)
    return mean([psnr(a, b) for a, b in frames])


def _middle_frames(case: Case, clip: Clip) -> Clip | None:
    """The frames between first and last, if the truth has as many."""
    if case.middle is None or len(clip) != len(case.middle) + 2:
        return None
    return Clip(clip.frames_T3HW[1:-1])


def _rescored(result: Result, folder: Path, judge: Judge | None) -> Result:
    case = case_of(result, folder)
    output, middle = output_of(result, folder), None
    if result.files.middle:
        middle = _cut(_read(folder / result.files.middle), case.target.size[1])
    scores = _scores(case, output, middle, judge)
    return replace(result, metrics=scores if judge else replace(scores, success=result.metrics.success))


def _input_files(case: Case, middle: bool) -> Files:
    place = f"inputs/{case.id}"
    target = f"{place}.middle.png" if middle else None
    return Files(f"{place}.source.png", f"{place}.target.png", f"{place}.mask.png", output="", middle_target=target)


def _write_inputs(cases: Sequence[Case], folder: Path) -> None:
    for case in cases:
        files = _input_files(case, middle=True)
        mask = Clip(case.mask_HW.to(torch.uint8).mul(255).expand(1, 3, -1, -1))
        for name, picture in ((files.source, case.source), (files.target, case.target), (files.mask, mask)):
            _write(folder / name, picture)
        if case.middle:
            _write(folder / str(files.middle_target), _strip(case.middle))


def _strip(clip: Clip) -> Clip:
    """Frames side by side, as one image."""
    return Clip(torch.cat([*clip.frames_T3HW], dim=-1)[None])


def _cut(strip: Clip, width: int) -> Clip:
    """The frames of such an image."""
    return Clip(torch.cat(strip.frames_T3HW.split(width, dim=-1)))


def _write(path: Path, image: Clip) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(image))


def _read(path: Path) -> Clip:
    try:
        return from_png(read_bytes(path))
    except OSError as error:  # PIL: not an image, or cut short
        raise DataError("not a readable picture", where=str(path), fix="evaluate again") from error


def _read_lines(path: Path) -> list[Result]:
    lines = read_bytes(path).decode().splitlines()
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse(line: str, where: str) -> Result:
    try:
        v = json.loads(line)
        return Result(
            **v | {"groups": tuple(v["groups"]), "files": Files(**v["files"]), "metrics": Scores(**v["metrics"])}
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"not a line of an evaluation: {error}", where=where, fix="evaluate again") from error


def _check(unit: Unit, clips: Sequence[Clip]) -> None:
    sizes = [clip.size for clip in clips]
    wanted = [case.target.size for case in unit.cases]
    if sizes != wanted:
        raise DataError(f"{unit.method.name} made clips of {sizes} for targets of {wanted}", where="evaluation")


def _refuse_twins(ids: Sequence[str]) -> None:
    if twin := next((i for n, i in enumerate(ids) if i in ids[:n]), None):
        raise DataError(f"two cases are called {twin!r}", where="evaluation")


def grouped(results: Sequence, keys_of: Callable) -> dict:
    """Results under each of their keys, which appear in order of first use."""
    groups: dict = {}
    for result in results:
        for key in dict.fromkeys(keys_of(result)):
            groups.setdefault(key, []).append(result)
    return groups


def _spread(seeds: Sequence[Metrics]) -> Metrics | None:
    if len(seeds) < 2:
        return None
    names = [f.name for f in fields(Scores)]
    spreads = {name: deviation([getattr(m, name) for m in seeds]) for name in names}
    return Metrics(**spreads, n=len(seeds), n_keep=len(seeds))  # type: ignore[arg-type]


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are known; None where none is."""
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def deviation(values: Sequence[float | None]) -> float | None:
    """Standard deviation (n - 1) of the values that are known; None of fewer than two."""
    known = [v for v in values if v is not None]
    return stdev(known) if len(known) > 1 else None
