"""A run: everything in training that has state. Engines, averages, journal, step."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from v4e import __version__, dist
from v4e.config import Loop, flat, to_dict
from v4e.data.disk import share, writable
from v4e.dist import Ranks
from v4e.errors import CheckpointError, ConfigError, PreemptedError
from v4e.journal import Bar, Journal, revision
from v4e.nouns import seed_of
from v4e.train import checkpoint
from v4e.train.engines import Cast, Role, accumulation, cast, export_adapters, export_weights, worn
from v4e.train.guards import Notice
from v4e.train.loop import After, Progress, due, quarantined, train
from v4e.train.meter import Work
from v4e.train.watch import Watch
from v4e.verbs import Backbone, Recipe, Stream

MakeStream = Callable[[int, int], Stream]  # (rank, world)
SHARD_BYTES = 5 * 1024**3  # of one weights file


class Sheet(Protocol):
    """Fixed validation edits, made and shown during training."""

    def prepare(self) -> None:
        """Read what every sheet needs, so that what is missing is said before the first step and not at the last."""
        ...

    def edit(self, players: Mapping[str, Backbone]) -> Tensor:
        """The edits by the players as they are; every rank calls it, for ZeRO-3 gathers from all."""
        ...

    def show(self, step: int, edits: Mapping[str, Tensor]) -> tuple[Image.Image, dict[str, float]]:
        """A picture of the edits by who made them, and their metrics; rank 0 alone is asked."""
        ...


@dataclass
class Run:
    """What a training process holds.

    Args:
        averages: player -> exponential averages of this rank's share of its fp32 weights.
        data: identity of the shards.
        saved: step of the last whole checkpoint.
    """

    recipe: Recipe
    cast: Cast
    averages: Mapping[str, list[Tensor]]
    stream: Stream
    journal: Journal
    progress: Progress
    ranks: Ranks
    sheet: Sheet | None = None
    data: str = ""
    saved: int = -1
    work: Work = Work()

    @property
    def loop(self) -> Loop:
        return self.recipe.loop

    @property
    def folder(self) -> Path:
        return Path(self.loop.output)

    def go(self, notice: Notice) -> None:
        """Train to the end, then write the weights; or save and stop where a signal asks for it.

        Raises:
            PreemptedError: it did.
            TrainingError: see :func:`v4e.train.loop.train`.
        """
        if self.progress.step < self.loop.steps:
            _set_aside(self.folder / "weights", self.ranks)  # of an earlier end: no export may take them for this one's
        with self.journal.bar("train", self.loop.steps, self.progress.step) as bar:
            if not self._train(partial(self._after, bar), notice):
                self._give_way(notice)
        self.write_weights()

    def _train(self, after: After, notice: Notice) -> bool:
        parts = self.recipe, self.stream, self.cast, self.progress, self.ranks
        return train(*parts, after=after, asked=notice, work=self.work)

    def write_weights(self) -> None:
        """``weights/<player>/weights.safetensors``, and ``average.safetensors`` where averages are kept.

        Of adapters, which these contain, the same two once more alone, in ``adapters/``.
        """
        for name, role in self.cast.trained.items():
            folder, averages = self.folder / "weights" / name, self.averages[name]
            for stem, instead in ({"weights": None} | ({"average": averages} if averages else {})).items():
                self._write(folder, stem, export_weights(role, instead))
                if role.lora.rank:
                    self._write(folder / "adapters", stem, export_adapters(role, instead))
        dist.barrier()

    def save(self) -> Path:
        """A checkpoint of this step."""
        state = replace(
            _fresh(self.recipe, self.ranks, self.data),
            step=self.progress.step,
            skipped=self.progress.skipped,
            skipped_in_a_row=self.progress.in_a_row,
            quarantined=quarantined(self.stream, self.progress),
            spikes=self.progress.spikes,
            recent=dict(self.progress.recent),
        )
        folder = self.folder / "checkpoints"
        self.saved = state.step
        return checkpoint.save(folder, state, self.cast, self.averages, self.ranks, self.loop)

    def _give_way(self, notice: Notice) -> None:
        if self.saved != self.progress.step:
            self.save()
        raise PreemptedError(
            f"stopped by {notice.heard or 'the signal of another rank'}, saved",
            where=f"step {self.progress.step}",
            fix="the same command goes on from there, unless its --resume says otherwise",
        )

    def _after(self, bar: Bar, numbers: dict[str, float] | None) -> None:
        step, last = self.progress.step, self.progress.step == self.loop.steps
        self._average()
        for sentence in self.progress.news:
            self.journal.say(sentence)
        self.progress.news.clear()
        shown = self._validate(step) if last or due(step, self.loop.sheet_every) else {}
        if numbers or shown:
            self.journal.log(step, {**(numbers or {}), **shown})
        bar.advance(1, **_brief(numbers or {}))
        if last or due(step, self.loop.save_every):
            self.save()  # last, so that what is gone on from has been told

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averages towards the weights; quicker at first, when they still hold the initial ones."""
        n = self.progress.step
        decay = min(self.loop.ema, (1 + n) / (10 + n))
        for name, averages in self.averages.items():
            if averages:
                _move(self.cast.roles[name], averages, 1 - decay)

    @torch.no_grad()
    def _validate(self, step: int) -> dict[str, float]:
        """Edit the validation samples with the weights and with their averages; metrics, on rank 0."""
        if self.sheet is None:
            return {}
        edits = {"student": self.sheet.edit(self.cast)}
        if self.loop.ema:
            with self._averaged():
                edits["average"] = self.sheet.edit(self.cast)
        if not self.ranks.is_main:
            return {}
        image, metrics = self.sheet.show(step, edits)
        self.journal.picture(step, "sheet", image)
        return {f"validation/{name}": value for name, value in metrics.items()}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the players are their averages."""
        with ExitStack() as stack:
            for name, role in self.cast.trained.items():
                stack.enter_context(worn(role, self.averages[name]))
            yield

    def _write(self, folder: Path, stem: str, weights: Iterator[tuple[str, Tensor]]) -> None:
        """One file, or numbered ones of at most SHARD_BYTES; every rank draws the weights, rank 0 writes."""
        writer = _Writer(folder, stem) if self.ranks.is_main else None
        for name, tensor in weights:
            if writer:
                writer.add(name, tensor)
        if writer:
            writer.close()


def _move(role: Role, averages: list[Tensor], share: float) -> None:
    if role.on_disk:
        for part, average in enumerate(averages):
            with role.at_hand(part) as master:
                average.lerp_(master, share)
    else:
        torch._foreach_lerp_(averages, role.masters(), share)


def _averages(role: Role) -> list[Tensor]:
    """Averages that have yet to leave the first weights."""
    found = []
    for part in range(len(role.masters())):
        with role.at_hand(part) as master:
            found.append(master.detach().clone())
    return found


class _Writer:
    """Safetensors files that appear whole."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._held: dict[str, Tensor] = {}
        self._files: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{stem}*.safetensors"):
            old.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and sum(t.nbytes for t in self._held.values()) + tensor.nbytes > SHARD_BYTES:
            self._spill()
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def close(self) -> None:
        self._spill()
        count = len(self._files)
        for i, file in enumerate(self._files):
            part = "" if count == 1 else f"-{i + 1:05d}-of-{count:05d}"
            os.replace(file, self._folder / f"{self._stem}{part}.safetensors")

    def _spill(self) -> None:
        file = self._folder / f".{self._stem}.{len(self._files)}.partial"
        with writable(file):
            save_file(self._held, file)
            share(file)
        self._files.append(file)
        self._held = {}


def train_recipe(
    recipe: Recipe,
    make_stream: MakeStream,
    sheet: Sheet | None = None,
    resume: str = "auto",
    data: str = "",
    work: Callable[[], Work] = Work,
) -> Path:
    """Train a recipe from the first step or from where it stopped; the folder of the weights.

    Args:
        make_stream: (rank, world) -> this rank's stream.
        sheet: makes and shows validation edits.
        resume: ``auto`` goes on from the last whole checkpoint, ``never`` starts anew, else a checkpoint's folder.
        data: what changes when the stream's samples or their order do; a run goes on with the same alone.
        work: says what a step does, for the journal's rates.

    Raises:
        ConfigError, CheckpointError, TrainingError, PreemptedError: see their classes.
    """
    ranks = dist.start(recipe.loop.threads)
    with Notice() as notice, Watch(ranks) as watch:
        run = open_run(recipe, make_stream, sheet, resume, ranks, data, work)
        try:
            run.go(notice)
        except BaseException as error:
            watch.tell(error)  # before the journal's farewell, which may take its time
            if run.progress.bad:
                run.journal.note("bad_steps.json", json.dumps(run.progress.bad, indent=1))
            run.journal.close(exit_code=1)
            raise
    run.journal.close()
    return run.folder / "weights"


def open_run(
    recipe: Recipe,
    make_stream: MakeStream,
    sheet: Sheet | None,
    resume: str,
    ranks: Ranks,
    data: str = "",
    work: Callable[[], Work] = Work,
) -> Run:
    """Set the stage: find the checkpoint, cast the players, restore them."""
    loop = recipe.loop
    if not loop.output:
        raise ConfigError("no run directory", where="loop.output", fix="add loop.output=runs/<name>")
    accumulation(loop, ranks.world)
    start, complaints = _start(Path(loop.output), resume, ranks)
    fresh = _fresh(recipe, ranks, data)
    state = checkpoint.read_state(start) if start else fresh
    if start:
        checkpoint.agree(state, fresh, recipe, start)
    stream = make_stream(ranks.rank, ranks.world)  # before the networks: it fails sooner
    if sheet:
        sheet.prepare()
    players = cast(recipe.players(), loop, ranks)
    torch.manual_seed(seed_of(loop.seed, "rank", ranks.rank))  # of dropout and the like; building has drawn from it
    averages = {name: _averages(role) if loop.ema else [] for name, role in players.trained.items()}
    if start:
        checkpoint.load(start, players, averages, ranks)
    sentences = [*complaints, *_greeting(Path(loop.output), start, state, ranks)]
    if start and resume != "auto":
        sentences += _abandon(Path(loop.output) / "checkpoints", start, state.step, ranks)
    journal = _journal(recipe, state.step if start else None, ranks, players, data, sentences)
    saved = state.step if start else -1
    run = Run(recipe, players, averages, stream, journal, _progress(state), ranks, sheet, data, saved, work())
    if start and not _is_in(start, run.folder / "checkpoints"):
        run.save()  # or a later `auto` would not find what this run began with
    return run


def _fresh(recipe: Recipe, ranks: Ranks, data: str) -> checkpoint.State:
    """What a checkpoint at the first step would say."""
    return checkpoint.State(0, ranks.world, flat(recipe), data, checkpoint.FORMAT)


def _progress(state: checkpoint.State) -> Progress:
    progress = Progress(state.step, state.skipped, state.skipped_in_a_row, spikes=state.spikes)
    progress.quarantined |= state.quarantined
    progress.recent |= {turn: list(losses) for turn, losses in state.recent.items()}
    return progress


def _start(folder: Path, resume: str, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what to say about those passed over."""
    if resume == "never":
        _set_aside(folder / "checkpoints", ranks)  # a later `auto` must not find them
        return None, []
    if resume != "auto":
        return _named_checkpoint(Path(resume), ranks), []
    found, complaints = checkpoint.find(folder / "checkpoints", ranks)
    if complaints and not found:
        raise CheckpointError("; ".join(complaints), fix="no whole one is left: start anew with --resume never")
    return found, complaints


def _set_aside(folder: Path, ranks: Ranks) -> None:
    """Give it the ending ``.old``, in the place of what has it."""
    old = folder.with_name(f"{folder.name}.old")
    if ranks.is_main and folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    dist.barrier()


def _abandon(folder: Path, start: Path, step: int, ranks: Ranks) -> list[str]:
    """Set aside what a later `auto` would prefer to the checkpoint that was named, and say so."""
    others = [p for p in checkpoint.listed(folder) if not _is_in(start, folder) or checkpoint.step_of(p) > step]
    dist.barrier()  # all have looked
    old = folder.with_name(f"{folder.name}.old")
    if ranks.is_main and others:
        old.mkdir(exist_ok=True)
        for path in others:
            names = (f"{path.name}.{n}" if n else path.name for n in itertools.count())  # of an earlier branch, too
            os.replace(path, next(old / name for name in names if not (old / name).exists()))
    dist.barrier()
    return [f"set aside in {old}: {', '.join(sorted(path.name for path in others))}"] if others else []


def _is_in(path: Path, folder: Path) -> bool:
    return path.parent.resolve() == folder.resolve()


def _named_checkpoint(path: Path, ranks: Ranks) -> Path:
    if not path.is_dir():
        fix = "name a folder checkpoints/step_*, or use auto"
        raise CheckpointError("no such checkpoint", where=str(path), fix=fix)
    if damage := checkpoint.check(path, ranks):
        raise CheckpointError(f"the checkpoint is damaged: {damage}", where=str(path))
    return path


def _greeting(folder: Path, start: Path | None, state: checkpoint.State, ranks: Ranks) -> list[str]:
    if not start:
        return [f"no checkpoint in {folder}: beginning at step 0"]
    others = (
        f", written by {state.world} ranks and shared out among {ranks.world}" if state.world != ranks.world else ""
    )
    return [f"resuming from {start}, step {state.step}{others}"]


def _journal(recipe: Recipe, step: int | None, ranks: Ranks, players: Cast, data: str, sentences: list[str]) -> Journal:
    loop = recipe.loop
    facts = {"v4e": __version__, "revision": revision(), "data": data, "ranks": ranks.world}
    journal = Journal(Path(loop.output), loop.wandb, to_dict(recipe), facts, resume_step=step, writes=ranks.is_main)
    for sentence in sentences:
        journal.say(sentence)
    for name, role in players.roles.items():
        journal.note(f"deepspeed_{name}.json", role.settings)
    return journal


def _brief(numbers: Mapping[str, float]) -> dict[str, float]:
    """What a progress bar has room for."""
    return {k.replace("/", " "): v for k, v in numbers.items() if k.endswith("/loss")}
