"""Evaluation on one's own data: edits made, kept, and measured.

Each edit is a PNG that says itself what made it, so a killed evaluation goes on by the same command, and one with
another model, seed or picture makes it anew. Edits of a batch may depend on each other in their last bits, so a batch
is what is kept or made again: the result does not depend on how often it was interrupted. What cannot be used goes to
``quarantine.jsonl``.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from v4e import __version__, photos
from v4e.data.disk import hash_of, lock, to_json, writable, write_atomically, write_lines
from v4e.data.members import as_image
from v4e.errors import ConfigError, DataError, V4EError
from v4e.eval.measures import Eyes, Scores, score
from v4e.eval.run import Case, Edit
from v4e.eval.triplets import Edits
from v4e.journal import open_bar, progress
from v4e.nouns import Clip, seed_of
from v4e.pipelines import as_clip

QUARANTINE, SCORES, LOCK = "quarantine.jsonl", "scores.jsonl", ".lock"
COPY = "copy"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
SAMPLED = 1 << 20  # bytes at both ends of a file that its fingerprint is made of


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Args:
        name: of its row.
        open: loads it; None for the copy of the input, which needs no model.
        made_by: all of it that determines an edit, besides picture, words, seed and steps.
        steps, seeds: to try.
    """

    name: str
    open: Callable[[], Edit] | None = None
    made_by: Mapping[str, object] = field(default_factory=dict)
    steps: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True)
class Known:
    """What is remembered of a case whose pictures are not in memory.

    Args:
        number: in the data; ``unit``: of those that are edited together if their sizes agree.
        photo: hash of the source's pixels.
        edited: share of the picture that the mask covers.
    """

    number: int
    unit: int
    id: str
    instruction: str
    task: str
    families: tuple[str, ...]
    size: tuple[int, int]
    photo: str
    edited: float


@dataclass(frozen=True)
class Refused:
    """What could not be used, and why."""

    name: str
    error: str


@dataclass(frozen=True)
class Unit:
    """Cases of one size that one subject edits together."""

    subject: Subject
    steps: int
    seed: int
    cases: tuple[Known, ...]

    def recipe(self, case: Known) -> dict[str, object]:
        """All that determines an edit, ``beside`` being the others of its batch."""
        beside = [(c.photo, c.instruction, _seed(self.seed, c)) for c in self.cases]
        return {
            "instruction": case.instruction,
            "seed": _seed(self.seed, case),
            "steps": self.steps,
            **self.subject.made_by,
            "photo": case.photo,
            "beside": hash_of(to_json(beside))[:16],
            "v4e": __version__,
        }


@dataclass(frozen=True)
class Scored:
    """A measured edit: a line of ``scores.jsonl``."""

    id: str
    task: str
    families: tuple[str, ...]
    method: str
    steps: int
    seed: int
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """What came out of it."""

    cases: tuple[Known, ...]
    refused: tuple[Refused, ...]
    subjects: tuple[Subject, ...]
    scored: tuple[Scored, ...]


def evaluate(
    edits: Edits, subjects: Sequence[Subject], eyes: Eyes, folder: Path, batch: int = 4, most: int = 0
) -> Evaluation:
    """Make what is not made yet, measure everything, and write edits, scores and quarantine.

    Args:
        batch: edits made together.
        most: cases that are taken, evenly spread; 0 for all.

    Raises:
        DataError: no case can be used, another evaluation is at work in the folder, or the disk is full.
        ConfigError: two subjects share a name, or the device's memory is full.
    """
    _refuse_twins([subject.name for subject in subjects])
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / LOCK):
            cases, refused = survey(edits, batch, most)
            write_lines(folder / QUARANTINE, (asdict(r) for r in refused))
            if not cases:
                raise DataError("holds no edit that can be used", where=str(folder / QUARANTINE), fix="it says why")
            for subject in subjects:
                _make(subject, cases, edits, folder)
            scored = [s for case in progress(cases, "measure") for s in _measure(case, subjects, edits, eyes, folder)]
            write_lines(folder / SCORES, (asdict(s) for s in scored))
    return Evaluation(tuple(cases), tuple(refused), tuple(subjects), tuple(scored))


def survey(edits: Edits, batch: int, most: int = 0) -> tuple[list[Known], list[Refused]]:
    """Read every case once, before hours are spent: what can be used, and what not."""
    cases, refused, seen = list[Known](), list[Refused](), set[str]()
    for place, number in enumerate(progress(spread(len(edits), most), "read")):
        try:
            case = edits.case(number)
            if case.id in seen:
                raise DataError(f"an earlier edit has the id {case.id!r} too")
        except V4EError as error:
            refused.append(Refused(edits.name(number), str(error)))
            continue
        seen.add(case.id)
        cases.append(_known(case, number, place // batch))
    return cases, refused


def spread(count: int, most: int) -> list[int]:
    """At most so many of ``count`` numbers, evenly spread; all of them for 0."""
    return [*range(count)] if not 0 < most < count else [i * count // most for i in range(most)]


def path_of(folder: Path, subject: Subject, steps: int, seed: int, case: Known) -> Path:
    """Where an edit is kept."""
    return folder / "edits" / subject.name / f"{steps}-steps" / f"seed-{seed}" / f"{case.id}.png"


def output_of(subject: Subject, steps: int, seed: int, case: Known, source: Clip, folder: Path) -> Clip:
    """A finished edit."""
    if subject.open is None:
        return source
    path = path_of(folder, subject, steps, seed, case)
    return as_clip(photos.decode(photos.fetch(str(path)), str(path)).rgb)


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits of a folder's files: names, sizes, and a megabyte at both ends of each.

    No two trainings agree in it, and 33 GB need not be read for it.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLED))
            file.seek(max(SAMPLED, size - SAMPLED))
            digest.update(file.read())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- making


def _make(subject: Subject, cases: Sequence[Known], edits: Edits, folder: Path) -> None:
    """Every edit of a subject that is not there; its model is loaded only if one is missing, and let go after."""
    if subject.open is None:
        return
    units = [*units_of(subject, cases)]
    missing = [unit for unit in units if not _is_made(unit, folder)]
    count = sum(len(unit.cases) for unit in units)
    left = sum(len(unit.cases) for unit in missing)
    with open_bar(f"edits of {subject.name}", count, count - left) as bar:
        if missing:
            with _enough_memory():
                edit = subject.open()
            for unit in missing:
                with _enough_memory():
                    _make_unit(unit, edit, edits, folder)
                bar.advance(len(unit.cases))


def units_of(subject: Subject, cases: Sequence[Known]) -> Iterator[Unit]:
    """Step counts vary fastest, so that progress mixes cheap and dear units and its ETA holds."""
    batches: dict[tuple, list[Known]] = {}
    for case in cases:
        batches.setdefault((case.unit, case.size), []).append(case)
    for together in batches.values():
        for seed in subject.seeds:
            yield from (Unit(subject, steps, seed, tuple(together)) for steps in subject.steps)


def _make_unit(unit: Unit, edit: Edit, edits: Edits, folder: Path) -> None:
    sources = [_read_again(known, edits).source for known in unit.cases]
    seeds = [_seed(unit.seed, known) for known in unit.cases]
    made = edit(sources, [known.instruction for known in unit.cases], seeds, unit.steps)
    for known, clip in zip(unit.cases, made, strict=True):
        path = path_of(folder, unit.subject, unit.steps, unit.seed, known)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, photos.encode(as_image(clip), path, to_json(unit.recipe(known))))


def _is_made(unit: Unit, folder: Path) -> bool:
    paths = (path_of(folder, unit.subject, unit.steps, unit.seed, case) for case in unit.cases)
    return all(_is_whole(path, unit.recipe(case)) for path, case in zip(paths, unit.cases, strict=True))


def _is_whole(path: Path, recipe: Mapping[str, object]) -> bool:
    """Whether an edit is there, was made so, and can be read to its end."""
    try:
        content = path.read_bytes()
        photos.decode(content, str(path))
        return photos.recipe_in(content) == json.loads(to_json(recipe))
    except (DataError, OSError):
        return False


def _measure(known: Known, subjects: Sequence[Subject], edits: Edits, eyes: Eyes, folder: Path) -> Iterator[Scored]:
    """All outputs of a case at once: its target is looked at once."""
    case = _read_again(known, edits)
    rows = [(subject, steps, seed) for subject in subjects for steps in subject.steps for seed in subject.seeds]
    outputs = [output_of(*row, known, case.source, folder) for row in rows]
    for (subject, steps, seed), scores in zip(rows, score(case, outputs, eyes), strict=True):
        yield Scored(known.id, known.task, known.families, subject.name, steps, seed, scores)


# --------------------------------------------------------------------------------------------------- inside


def _known(case: Case, number: int, unit: int) -> Known:
    edited = case.mask_HW.double().mean().item()
    photo = _hash(case.source)
    return Known(number, unit, case.id, case.instruction, case.task, case.groups, case.source.size, photo, edited)


def _read_again(known: Known, edits: Edits) -> Case:
    """DataError when the data changed while it was evaluated."""
    case = edits.case(known.number)
    if _hash(case.source) != known.photo:
        raise DataError("the data has changed meanwhile", where=f"key {known.id}", fix="run the same command again")
    return case


def _hash(clip: Clip) -> str:
    return hash_of(clip.frames_T3HW.numpy().tobytes())[:16]


def _seed(seed: int, case: Known) -> int:
    return seed_of("eval", seed, case.id)


def named_models(words: Sequence[str], option: str, rows: Sequence[str] = ()) -> dict[str, str]:
    """Models under the names of their rows, from an option's words ``NAME=MODEL``.

    Args:
        option: such as ``--baseline``, for the errors.
        rows: names that are given already.

    Raises:
        ConfigError: a word is of another form, or two rows share a name.
    """
    split = [word.partition("=") for word in words]
    if odd := next((word for word, (name, _, model) in zip(words, split, strict=True) if not (name and model)), None):
        fix = "write NAME=MODEL, such as sft=runs/sft"
        raise ConfigError(f"{odd!r} is no name and model", where=option, fix=fix)
    for name, _, _ in split:
        _check_name(name, option)
    _refuse_twins([*rows, *(name for name, _, _ in split)], option)
    return {name: model for name, _, model in split}


def _check_name(name: str, where: str = "") -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a row", where=where, fix="use ASCII letters, digits, _, . and -")


def _refuse_twins(names: Sequence[str], where: str = "") -> None:
    if twin := next((name for n, name in enumerate(names) if name in names[:n]), None):
        raise ConfigError(f"two rows are called {twin!r}", where=where, fix="name one differently")


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "try --batch 1 and --dtype bfloat16; finished edits are kept"
        raise ConfigError("the device's memory does not hold this model's work", fix=fix) from error
