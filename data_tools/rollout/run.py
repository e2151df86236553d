"""The roll-out as one rank sees it: claim a unit, do it, make it safe, until nothing is left to claim."""

import json
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from data_tools.ingest import Size, Triplet
from data_tools.ingest.triplets import in_order
from data_tools.rollout.config import NO_TEACHER, TYPES, RolloutConfig
from data_tools.rollout.plan import Chosen, Plan
from data_tools.rollout.spool import Made, Spool
from data_tools.rollout.work import Models, Worker
from v4e import config as settings_of
from v4e import dist
from v4e.data.disk import readable, scratch, writable, write_atomically
from v4e.data.members import WORDS
from v4e.data.places import Place, exists, is_remote, place, read_bytes, shown
from v4e.errors import ConfigError, DataError
from v4e.journal import LINES, RUN, Bar, Journal

LOOK_EVERY_S = 10.0  # how often the set is counted over all ranks, for the progress bar
LOOKING = 0.05  # the most of its time that a rank spends on that
JOURNAL, KEPT = "journal", (LINES, RUN)  # written here; of a URL brought to the store when the rank ends
READERS = 8  # threads that hold finished samples against their triplets


def rollout(triplets: Sequence[Triplet], out: str | Place, config: RolloutConfig) -> Place:
    """Do one rank's share, and what others leave undone; whoever ends last writes the manifest.

    Triplets of several sizes go into one set each, ``OUT/HEIGHTxWIDTH``. ``out`` is a local folder or a URL.

    Raises:
        DataError: no triplets, or some without a prompt, the folder was begun with other settings or triplets, a
            finished triplet has changed, too many cannot be used, or the disk is full.
        CheckpointError: the teacher is missing or damaged.
    """
    out = place(out)
    groups = by_size(triplets, config)
    config, models = _placed(config)
    sets = [_Set(models, group, size, _home(out, size, len(groups)), config) for size, group in groups.items()]
    try:
        _refuse_changed(sets, config)
        with _Watch(out, sets, config, writes=config.part == 0 and models.team.leads) as watch:
            for each in sets:
                for _ in each.roll():
                    watch.look()
        _conclude(sets, config)
    finally:
        for each in sets:
            each.spool.claims.close()
    return out


def by_size(triplets: Sequence[Triplet], config: RolloutConfig) -> dict[Size, Sequence[Triplet]]:
    """Triplets by the size of their clips, each group in the list's order.

    Raises:
        DataError: there are none, or some have no prompt, and a teacher is to follow it.
    """
    groups: dict[Size, array[int]] = {}
    bare, first = 0, ""
    for number, triplet in enumerate(triplets):
        if not triplet.evolution:
            bare, first = bare + 1, first or triplet.id
        size = (config.height, config.width) if config.height else _size_of(triplet)
        groups.setdefault(size, array("Q")).append(number)
    if not groups:
        raise DataError("no triplets to roll out", fix="see rejects.jsonl of the ingest")
    if bare and config.teacher != NO_TEACHER:
        raise DataError(f"{bare} triplets have no evolution prompt, {first} first", fix="run v4e-shards evolve")
    return {size: Chosen(triplets, numbers) for size, numbers in sorted(groups.items())}


def _size_of(triplet: Triplet) -> Size:
    """Of its bucket, or else what the file's head says."""
    if triplet.size:
        return triplet.size
    content = BytesIO(read_bytes(triplet.source))
    with readable(f"{shown(triplet.source)}, key {triplet.id}"), Image.open(content) as picture:
        return picture.height, picture.width


def _home(out: Place, size: Size, sizes: int) -> Place:
    return out if sizes == 1 else out / f"{size[0]}x{size[1]}"


def _placed(config: RolloutConfig) -> tuple[RolloutConfig, Models]:
    """The share that the launcher or Slurm gave this rank, and the device it works on."""
    ranks = dist.place()
    team = dist.team(config.span) if config.span > 1 else dist.ALONE
    if not config.parts:
        if ranks.world % config.span:
            raise ConfigError(f"{ranks.world} ranks are no teams of {config.span}", where="key span")
        config = replace(config, part=ranks.rank // config.span, parts=ranks.world // config.span)
    return config, Models(config, torch.device(config.device) if config.device else ranks.device, team)


class _Set:
    """The triplets of one size, on their way to a shard folder."""

    def __init__(self, models: Models, triplets: Sequence[Triplet], size: Size, out: Place, config: RolloutConfig):
        self.worker, self.config = Worker(models, models.grids(size)), config
        self.plan = Plan(triplets, config.batch, max(1, config.samples_per_shard // config.batch))
        self.spool = Spool(out, self.plan, self.worker.meta, TYPES[config.stored])

    def roll(self) -> Iterator[int]:
        """Do every unit that can be claimed; each is told when it is safe."""
        leads = self.worker.models.team.leads
        for unit in self.worker.models.team.in_step(self._turns):
            outcome = self.worker.work(self.plan.unit(unit))
            if leads:
                self.spool.save(unit, outcome)
            yield unit
        if leads:
            for shard in self.own():
                if not self.spool.is_packed(shard):
                    self.spool.pack(shard)  # its last unit was saved by a rank that was killed then
            self.spool.finish()

    def own(self) -> range:
        """Shards that are this rank's."""
        return self.plan.share(self.config.part, self.config.parts)

    def _turns(self) -> Iterator[int]:
        """Claimed units: this rank's own first, then, from the back, what others have not begun."""
        while True:
            done = 0
            for unit in self._order():
                with self.spool.claims.take(unit) as free:
                    if free and not self.spool.has(unit):
                        yield unit
                        done += 1
            if not done:
                return

    def _order(self) -> Iterator[int]:
        safe, own = self.spool.safe(), self.own()
        yield from (u for shard in own for u in self.plan.units_of(shard) if not safe(u))
        if self.spool.claims.shared:
            yield from (u for u in reversed(self.plan.units) if self.plan.shard_of(u) not in own and not safe(u))

    # Changed triplets ----------------------------------------------------------------------------------------------

    def changed(self) -> dict[int, list[str]]:
        """Own units that are safe but whose triplets are not what they were, each with what is different."""
        safe = self.spool.safe()
        finished = (unit for shard in self.own() for unit in self.plan.units_of(shard) if safe(unit))
        with ThreadPoolExecutor(READERS) as pool:
            looked_at = in_order(pool, lambda unit: (unit, self._differences(unit)), finished, 2 * READERS)
            return {unit: found for unit, found in looked_at if found}

    def _differences(self, unit: int) -> list[str]:
        try:
            outcome = self.spool.outcome(unit, [WORDS])
        except DataError as error:
            return [f"unit {unit} is damaged: {error}"]
        before = {m.key: m for m in outcome.made}
        tried = {r.key: r.inputs for r in outcome.rejects}
        now = {t.id: t for t in self.plan.unit(unit)}
        made = [_difference(before[key], t, self._inputs(t)) for key, t in now.items() if key in before]
        again = [key for key, old in tried.items() if self._inputs(now[key]) not in ("", old)]
        return [*filter(None, made), *(f"{key}: was of no use, and has changed or can be read now" for key in again)]

    def _inputs(self, triplet: Triplet) -> str:
        """Empty where the pictures cannot be read any more, which is no change."""
        try:
            return self.worker.inputs(triplet)
        except DataError:
            return ""


def _difference(before: Made, now: Triplet, inputs: str) -> str:
    """What is different about a finished triplet, both values side by side; empty when nothing is."""
    words = json.loads(before.members[WORDS])
    old = words["origin"]["inputs"]
    if not inputs or inputs == old:
        return ""
    pairs = [(name, words[name], getattr(now, name)) for name in ("instruction", "evolution", "task")]
    said = [f"{name} was {a!r} and is now {b!r}" for name, a, b in pairs if a != b]
    return f"{now.id}: " + ("; ".join(said) or f"its pictures have changed (inputs were {old} and are now {inputs})")


def _refuse_changed(sets: Sequence[_Set], config: RolloutConfig) -> None:
    """A result whose triplet has changed is never reused: refuse to go on, or forget it."""
    for each in sets:
        changed = each.changed()
        faults = [fault for unit in changed.values() for fault in unit]
        if faults and config.changed == "refuse":
            raise DataError(
                f"{len(faults)} finished triplets are not what they were: {'; '.join(faults[:3])}",
                where=shown(each.spool.folder),
                fix="put the old ones back, or do these again with changed=reroll",
            )
        for unit in changed:
            each.spool.drop(unit)


def _conclude(sets: Sequence[_Set], config: RolloutConfig) -> None:
    """Say what was of no use, once everything else is safe."""
    rejects = [r for each in sets for r in each.spool.rejects()]
    total = sum(len(each.plan.triplets) for each in sets)
    whole = not any(True for each in sets for _ in each.spool.missing())
    if whole and len(rejects) > config.max_reject_fraction * total:
        raise DataError(
            f"{len(rejects)} of {total} triplets could not be used, all others are written: {rejects[0].key}: "
            f"{rejects[0].reason}",
            where=f"{shown(sets[0].spool.folder)}/*_rejects.jsonl",
            fix="mend them and run again with changed=reroll, or allow them with max_reject_fraction",
        )


class _Watch:
    """Progress over all ranks, counted in the folder, since ranks may die and be added."""

    def __init__(self, out: Place, sets: Sequence[_Set], config: RolloutConfig, writes: bool) -> None:
        self._sets, self._again, self._out = sets, time.monotonic() + LOOK_EVERY_S, out
        self._total = sum(len(s.plan.triplets) for s in sets)
        done = self._done()
        with writable(out):
            home = scratch(out) / JOURNAL
            if writes and is_remote(out):
                _bring_journal(out / JOURNAL, home)
            old = (home / LINES).exists()
            said = settings_of.to_dict(config)
            self._journal = Journal(home, config.wandb, said, resume_step=done if old else None, writes=writes)
        title = "roll out" if sets[0].worker.models.rolls else "encode"
        self._open = self._journal.bar(title, self._total, self._done())  # again: Weights & Biases takes its time

    def __enter__(self) -> "_Watch":
        self._bar: Bar = self._open.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if not any(error):
            self.look(always=True)
        self._open.__exit__(None, None, None)
        self._journal.close(int(any(error)))
        if self._journal.writes and is_remote(self._out):
            for path in (self._journal.folder / name for name in KEPT):
                if path.exists():
                    write_atomically(self._out / JOURNAL / path.name, path.read_bytes())

    def look(self, always: bool = False) -> None:
        """Count now and then; counting a big set at each unit would cost more than it tells."""
        began = time.monotonic()
        if not self._journal.writes or (began < self._again and not always):
            return
        done, counts = self._done(), sum((s.spool.tally() for s in self._sets), Counter[str]())
        numbers = {"rejects": counts["rejects"]}
        self._bar.advance(done - self._bar.done, **numbers)
        numbers |= {"samples": done, "samples_per_second": self._bar.rate, "seconds_left": self._bar.left_s}
        self._journal.log(done, numbers | {f"packed_{k}": counts[k] for k in ("bytes", "seconds")})
        now = time.monotonic()
        self._again = now + max(LOOK_EVERY_S, (now - began) / LOOKING)

    def _done(self) -> int:
        return self._total - sum(s.plan.size_of(unit) for s in self._sets for unit in s.spool.missing())


def _bring_journal(stored: Place, home: Path) -> None:
    """The journal that another machine began; one that is here already was killed, and holds more."""
    home.mkdir(exist_ok=True)
    for name in KEPT:
        if not (home / name).exists() and exists(stored / name):
            write_atomically(home / name, read_bytes(stored / name))
