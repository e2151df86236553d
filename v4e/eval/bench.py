"""`v4e eval RUN --data DATA`: the models side by side on one's own edits, and the report of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from v4e import __version__
from v4e.data.disk import writable
from v4e.errors import CheckpointError, ConfigError
from v4e.eval.measures import Eyes
from v4e.eval.own import COPY, QUARANTINE, Subject, evaluate, fingerprint, named_models
from v4e.eval.page import PAGE, write_page
from v4e.eval.run import Edit
from v4e.eval.summary import Summary, overview, summarise, write
from v4e.eval.triplets import open_edits
from v4e.models.folder import locate
from v4e.nouns import Clip
from v4e.pipelines import MODEL_INDEX, Card, EditPipeline

STUDENT, INIT = "student", "init"


@dataclass(frozen=True)
class Asked:
    """What is asked for. None leaves it to a model's card, no steps to the student's for all.

    Args:
        model: a training run, an export, any model folder, or a Hub id.
        data: see :func:`v4e.eval.triplets.open_edits`.
        baselines: words NAME=MODEL.
        seeds: how many sampling seeds.
        batch: edits made together.
        most: edits that are taken, evenly spread; 0 for all.
        shown: edits on the page.
        device, dtype: to work on, and of the weights.
    """

    model: str
    data: str
    baselines: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    seeds: int = 1
    guidance: float | None = None
    batch: int = 4
    most: int = 0
    shown: int = 48
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Rooms:
    """What rooms know that this one may not enter.

    Args:
        export: makes a model folder of a training run.
        base_of: names the model that a run began with.
        family_of: the family of a task, "" for none.
    """

    export: Callable[[Path, Path], Path]
    base_of: Callable[[Path], str]
    family_of: Callable[[str], str]


@dataclass(frozen=True)
class Lineup:
    """The models side by side.

    Args:
        card: the student's.
        absent: sentences about rows that are not there.
    """

    subjects: tuple[Subject, ...]
    card: Card
    absent: Mapping[str, str]


def measure(asked: Asked, eyes: Eyes, folder: Path, rooms: Rooms) -> Summary:
    """Evaluate, and write report.json, report.md and index.html beside the edits.

    Raises:
        DataError: there is no such data, or nothing in it can be used.
        CheckpointError: a model is missing or damaged.
    """
    # A mistyped path is told before a model is exported, which then says at which sizes the pictures are wanted.
    edits = open_edits(asked.data, lambda height, width: lineup.card.size_for(height, width), rooms.family_of)
    lineup = line_up(asked, folder / "models", rooms)
    made = evaluate(edits, lineup.subjects, eyes, folder, asked.batch, asked.most)
    headline, absent = made.subjects[-1].steps[0], {**lineup.absent, **eyes.absent}
    about = {**asdict(asked), "identity": edits.identity, "version": __version__}
    models = {subject.name: subject.made_by["model"] for subject in lineup.subjects if subject.open}
    about |= {"steps": [*made.subjects[-1].steps], "baselines": [*asked.baselines], "models": models}
    summary = Summary(made, tuple(summarise(made.scored)), tuple(eyes.columns), headline, about, absent)
    with writable(folder):
        write(summary, folder)
        write_page(summary, edits, folder, STUDENT, asked.shown)
    return summary


def closing(summary: Summary, folder: Path) -> str:
    """The last words: the tables, and where the rest is."""
    made = summary.evaluation
    lost = f", {len(made.refused)} could not be used: {folder / QUARANTINE}" if made.refused else ""
    said = [overview(summary), *summary.absent.values(), f"{len(made.cases)} edits{lost}"]
    return "\n\n".join(["", *said, f"page      {folder / PAGE}\nreport    {folder / 'report.md'}"])


def line_up(asked: Asked, folder: Path, rooms: Rooms) -> Lineup:
    """Copy, the student before training, the baselines, the student.

    Args:
        folder: where training runs are exported to.

    Raises:
        CheckpointError: a model is missing or damaged.
        ConfigError: a baseline has no name, or that of another row.
    """
    rivals, absent = named_models(asked.baselines, "--baseline", rows=[COPY, STUDENT]), dict[str, str]()
    student = folder_of(asked.model, folder, rooms)
    if INIT not in rivals:
        try:
            rivals = {INIT: _base_of(asked.model, rooms), **rivals}
        except (CheckpointError, ConfigError) as error:
            absent[INIT] = f"{INIT}, the student before training, is not shown: {error}"
    folders = [(name, folder_of(place, folder, rooms)) for name, place in rivals.items()]
    card = Card.read(student)
    steps, seeds = tuple(dict.fromkeys(asked.steps)) or (card.steps,), tuple(range(asked.seeds))
    made = [_subject(name, at, asked, steps, seeds) for name, at in [*folders, (STUDENT, student)]]
    return Lineup((Subject(COPY), *made), card, absent)


def folder_of(model: str, folder: Path, rooms: Rooms) -> Path:
    """A model's folder; a training run is exported first, once: what is measured is what would be shipped."""
    at = Path(model)
    if _is_run(at):
        export = folder / f"{at.resolve().name}-{fingerprint(at / 'weights')}"
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return export if export.is_dir() else rooms.export(at, export)
    found = locate(model, ["*"])
    if not (found / MODEL_INDEX).is_file():
        fix = "name the loop.output of a training, a folder that `v4e export` wrote, or one in diffusers layout"
        raise CheckpointError("neither a training run nor a model folder", where=model, fix=fix)
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _base_of(model: str, rooms: Rooms) -> str:
    if not _is_run(Path(model)):
        raise ConfigError("only a training run says what it began with", fix=f"name it with --baseline {INIT}=FOLDER")
    base = rooms.base_of(Path(model))
    locate(base, ["*"])
    return base


def _subject(name: str, folder: Path, asked: Asked, steps: tuple[int, ...], seeds: tuple[int, ...]) -> Subject:
    guidance = Card.read(folder).guidance if asked.guidance is None else asked.guidance
    made_by = {"model": fingerprint(folder), "guidance": float(guidance), "dtype": asked.dtype}
    made_by |= {"device": torch.device(asked.device).type}
    return Subject(name, partial(_open, folder, asked), made_by, steps, seeds)


def _open(folder: Path, asked: Asked) -> Edit:
    """A model that makes the frames `v4e edit` would make."""
    pipeline = EditPipeline.from_pretrained(folder, dtype=getattr(torch, asked.dtype))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(asked.device)

    def edit(images: Sequence[Clip], instructions: Sequence[str], seeds: Sequence[int], steps: int) -> list[Clip]:
        return pipeline.edit_batch(
            images, instructions, seeds, steps=steps, guidance=asked.guidance, batch=len(images), fold=False
        )

    return edit
