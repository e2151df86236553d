"""The training loop: for each step, every turn's losses over this rank's slices, then that player's optimiser.

It has never heard of a model. It meets recipes through ``verbs.Recipe`` and data through ``verbs.Stream``.
"""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from v4e import dist
from v4e.config import Loop
from v4e.dist import Ranks
from v4e.errors import TrainingError
from v4e.journal import scrub
from v4e.nouns import Draw, EditBatch, Losses
from v4e.train.engines import Cast, Role
from v4e.train.guards import WINDOW, surprise
from v4e.train.meter import Work, memory, rates
from v4e.train.norms import group_norms
from v4e.train.schedule import factor
from v4e.verbs import Recipe, Slice, Stream

After = Callable[[dict[str, float] | None], None]


@dataclass
class Tally:
    """Sums since the journal was last told; each term's sum comes with its count.

    Args:
        ends: whether the journal is told after this step, and so what takes time to find out is found out.
    """

    ends: bool = False
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    began: float = field(default_factory=time.perf_counter)

    def add(self, name: str, value: float) -> None:
        self.sums[name] += value
        self.counts[name] += 1

    def means(self, device: torch.device) -> dict[str, float]:
        """Means over everything added on any rank. The ranks may have met different names: all are asked for all."""
        names = sorted({n for part in dist.gather(sorted(self.sums)) for n in part})
        sums = dist.total([self.sums[n] for n in names], device)
        counts = dist.total([self.counts[n] for n in names], device)
        return {n: s / c for n, s, c in zip(names, sums, counts, strict=True)}


@dataclass
class Progress:
    """What the loop counts.

    Args:
        step: optimiser steps done.
        skipped, in_a_row: steps left out because something was not finite, in all and the latest without a good one.
        bad: of those in a row, step -> keys under suspicion.
        spikes: losses out of the ordinary so far.
        quarantined: key -> why, of the damaged samples that earlier processes of the run met.
        recent: turn -> its latest losses over all ranks.
        news: sentences for the journal.
    """

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    bad: dict[int, list[str]] = field(default_factory=dict)
    spikes: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    news: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """One turn of one step.

    Args:
        norm: gradient norm before clipping; not finite where the step was skipped.
        moved: whether the weights did.
        loss: mean over this rank's slices.
        suspects: keys of this rank whose losses were not finite.
        norms: of groups of blocks, where the journal is told.
    """

    norm: float
    moved: bool
    loss: float
    suspects: tuple[str, ...]
    norms: Mapping[str, float] = field(default_factory=dict)


def train(
    recipe: Recipe,
    stream: Stream,
    cast: Cast,
    progress: Progress,
    ranks: Ranks,
    *,
    after: After,
    asked: Callable[[], bool] = bool,
    work: Work = Work(),  # noqa: B008  frozen
) -> bool:
    """Improve the players until ``recipe.loop.steps``; False where it was asked to stop before.

    Args:
        progress: where to go on from; counted up in place.
        after: called after each step on every rank, with numbers when it is time to log.
        asked: whether this rank is to stop; between two steps all ranks stop together.
        work: of a step, for rates.

    Raises:
        TrainingError: too many steps in a row were not finite, or too many samples are damaged.
    """
    loop, tally = recipe.loop, Tally()
    while progress.step < loop.steps:
        tally.ends = due(progress.step + 1, loop.log_every) or progress.step + 1 == loop.steps
        began = time.perf_counter()
        slices = stream.step(progress.step)
        tally.add("data_wait_s", time.perf_counter() - began)
        if _consult(stream, progress, loop.max_bad_samples, asked, ranks):
            return False
        outcomes = _step(recipe, slices, cast, progress.step, tally, ranks)
        _count(progress, outcomes, slices, loop.max_bad_steps)
        _look_for_spikes(progress, outcomes, loop.spike, ranks)
        for turn, outcome in outcomes.items():
            if outcome.moved:
                tally.add(f"{turn}/grad_norm", outcome.norm)
                for group, norm in outcome.norms.items():
                    tally.add(f"{turn}/grad_norm/{group}", norm)
        progress.step += 1
        after(_numbers(tally, progress, cast, stream, loop, work, ranks) if tally.ends else None)
        tally = Tally() if tally.ends else tally
    return True


def due(step: int, every: int) -> bool:
    """Whether it is the turn of what happens every so many steps; 0 is never."""
    return bool(every) and step % every == 0


def _step(
    recipe: Recipe, slices: Sequence[Slice], cast: Cast, step: int, tally: Tally, ranks: Ranks
) -> dict[str, Outcome]:
    """Every turn over all slices, so that a turn's own accumulation never changes what a later one sees."""
    batches = [to_device(recipe.batch(s.samples, s.weights), ranks.device) for s in slices]
    draws = [Draw(recipe.loop.seed, tuple(s.positions), ranks.device) for s in slices]
    outcomes = {}
    for turn in recipe.turns(step):
        with cast.only(turn) as role:
            role.set_lr(factor(recipe.loop.schedule, step, recipe.loop.steps))
            outcomes[turn] = _turn(recipe, cast, role, batches, draws, step, tally, ranks)
    return outcomes


def _turn(
    recipe: Recipe,
    cast: Cast,
    role: Role,
    batches: list[EditBatch],
    draws: list[Draw],
    step: int,
    tally: Tally,
    ranks: Ranks,
) -> Outcome:
    turn, suspects, told = role.player.name, [], []
    players = cast.scene(turn)
    norm, moved, norms = math.nan, False, {}
    for batch, draw in zip(batches, draws, strict=True):
        losses = recipe.losses(players, batch, draw, turn, step)
        total = losses.total
        told.append(float(total.detach()))
        if not _note(losses, total, turn, tally):
            suspects += batch.keys
            total = total * math.nan  # makes the gradients non-finite on every rank, so that all skip alike
        role.engine.backward(total)
        if tally.ends and role.engine.is_gradient_accumulation_boundary():
            norms = group_norms(role, ranks)
        norm, moved = role.step()
    return Outcome(norm, moved, fmean(told), tuple(suspects), norms)


def _note(losses: Losses, total: Tensor, turn: str, tally: Tally) -> bool:
    """Count terms and weights where all is finite; whether it is."""
    values = torch.stack([total.detach().float(), *(v.detach().float() for v in losses.terms.values())]).tolist()
    if not all(map(math.isfinite, values)):
        return False
    for name, value in zip(("loss", *(f"term/{k}" for k in losses.terms)), values, strict=True):
        tally.add(f"{turn}/{name}", value)
    for name in losses.terms:
        tally.add(f"{turn}/weight/{name}", float(losses.weights[name]))
    return True


def _count(progress: Progress, outcomes: Mapping[str, Outcome], slices: Sequence[Slice], limit: int) -> None:
    """Count a step that some player skipped; ``moved`` is the same on every rank, so all stop together."""
    if all(o.moved for o in outcomes.values()):
        progress.in_a_row = 0
        progress.bad.clear()
        return
    progress.skipped += 1
    progress.in_a_row += 1
    progress.bad[progress.step] = _suspects(outcomes, slices)
    if progress.in_a_row >= limit:
        raise TrainingError(
            f"losses or gradients were not finite for {progress.in_a_row} steps in a row; "
            f"last samples: {', '.join(progress.bad[progress.step])}",
            where=f"step {progress.step}",
            fix="look at these samples, all of them in notes/bad_steps.json, or lower the learning rate",
        )


def _suspects(outcomes: Mapping[str, Outcome], slices: Sequence[Slice]) -> list[str]:
    """Keys with bad losses on any rank; all keys of the step where only gradients were bad."""
    own = sorted({key for o in outcomes.values() for key in o.suspects})
    bad = [key for part in dist.gather(own) for key in part]
    everyone = [key for part in dist.gather([s.key for x in slices for s in x.samples]) for key in part]
    return bad or everyone


def _look_for_spikes(progress: Progress, outcomes: Mapping[str, Outcome], limit: float, ranks: Ranks) -> None:
    """Flag losses far above what was usual; nothing is done about them."""
    if not limit or not all(o.moved for o in outcomes.values()):
        return
    sums = dist.total([o.loss for o in outcomes.values()], ranks.device)
    for turn, loss in zip(outcomes, (s / ranks.world for s in sums), strict=True):
        recent = progress.recent[turn]
        if (found := surprise(recent, loss)) > limit:
            progress.spikes += 1
            progress.news.append(f"step {progress.step}: {turn}'s loss {loss:.4g} is {found:.0f} deviations high")
        recent[:] = [*recent, loss][-WINDOW:]


def _consult(stream: Stream, progress: Progress, limit: int, asked: Callable[[], bool], ranks: Ranks) -> bool:
    """Whether any rank was asked to stop.

    Raises:
        TrainingError: on every rank alike once more than ``limit`` samples have been quarantined anywhere.
    """
    damaged, stops = dist.total([len(stream.quarantined), asked()], ranks.device)
    if damaged + len(progress.quarantined) > limit and len(found := quarantined(stream, progress)) > limit:
        told = "; ".join(f"{key}: {why}" for key, why in sorted(found.items()))
        raise TrainingError(
            f"{len(found)} damaged samples, more than loop.max_bad_samples = {limit}: {told}",
            fix="mend the shards, or raise loop.max_bad_samples",
        )
    return stops > 0


def quarantined(stream: Stream, progress: Progress) -> dict[str, str]:
    """Damaged samples that any rank has met in this run, and why; keys and tokens in the reasons are starred out."""
    met = {key: str(scrub(why)) for part in dist.gather(dict(stream.quarantined)) for key, why in part.items()}
    return progress.quarantined | met


def _numbers(
    tally: Tally, progress: Progress, cast: Cast, stream: Stream, loop: Loop, work: Work, ranks: Ranks
) -> dict[str, float]:
    numbers = tally.means(ranks.device)
    seconds = (time.perf_counter() - tally.began) / tally.counts["data_wait_s"]
    for name, role in cast.trained.items():
        numbers |= {f"{name}/lr/{part}": lr for part, lr in role.lr.items()}
    return (
        numbers
        | rates(work, loop, seconds, ranks)
        | memory(ranks)
        | {
            "skipped_steps": progress.skipped,
            "loss_spikes": progress.spikes,
            "quarantined": len(quarantined(stream, progress)),
        }
    )


def to_device(value: Any, device: torch.device) -> Any:
    """A frozen dataclass with every tensor in it, at any depth, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value
