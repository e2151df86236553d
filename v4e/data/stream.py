"""The order in which a run meets its samples: a pure function of (seed, step), the same on any number of ranks.

What stands at a position of a run, counted over all epochs, :mod:`v4e.data.mixture` says. The stream has no state but
the step, so there is nothing to save and nothing to get wrong on resuming.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from v4e.data.cache import Ahead, Remote
from v4e.data.mixture import Mixture, Order, Spot
from v4e.data.places import is_remote
from v4e.data.shards import ShardSet
from v4e.data.soundness import check_shapes
from v4e.errors import ConfigError, DataError
from v4e.nouns import Sample


@dataclass(frozen=True)
class Slice:
    """One micro-batch of one rank.

    Args:
        samples: micro_batch of them.
        weights: 1, or 0 where the sample is damaged and another's tensors only keep its place.
        positions: of each in the run's global order.
    """

    samples: tuple[Sample, ...]
    weights: tuple[float, ...]
    positions: tuple[int, ...]


class Stream:
    """Slices of a shard set or of several, one rank's share of each step.

    Attributes:
        quarantined: name -> why, of the damaged samples in the steps this rank has taken.

    Args:
        data: sets, a set or its folder.
        seed: of the order.
        batch: samples a step, over all ranks and accumulated micro-batches.
        micro_batch: samples a slice.
        rank, world: which share is this one's.
        pictures: also read source and target.
        workers: threads that read; 0 for as many as there are cores, as they wait for each other more than for a
            disk that is told ahead, and for eight where a set is read from a store.
        cache: bytes of tensors to keep in memory; samples met first stay.

    Raises:
        ConfigError: batch is no multiple of world * micro_batch, or of units of whole micro-batches; rank is not one
            of world; a cache cannot hold what is shuffled together.
        DataError: a set is empty or damaged where it opens.
    """

    def __init__(
        self,
        data: Mixture | ShardSet | str | Path,
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        pictures: bool = False,
        workers: int = 0,
        cache: int = 0,
    ) -> None:
        _check_sizes(batch, micro_batch, rank, world)
        self.mixture = data if isinstance(data, Mixture) else Mixture((_opened(data),))
        _check_units(self.mixture, batch, micro_batch)
        self.mixture.check_room()
        self.seed, self.batch, self.micro_batch, self.rank, self.world = seed, batch, micro_batch, rank, world
        self.order = Order(self.mixture, seed, batch)
        self.quarantined: dict[str, str] = {}
        self._damaged: dict[Spot, str] = {}  # as found by the reader, which is a step ahead
        self._pictures, self._cache = pictures, _Cache(cache)
        self._workers = workers or readers_of(self.mixture)
        self._readers = ThreadPoolExecutor(self._workers, thread_name_prefix="v4e-stream")
        self._ahead: tuple[int, list[Future[_Read]]] | None = None
        self._announced = -1
        self._downloads = self._look_ahead()

    def step(self, step: int) -> list[Slice]:
        """This rank's slices of a step, in the order they are accumulated; the next step is read meanwhile.

        Raises:
            DataError: not one sample of the set can be read.
        """
        read = {p: found for part in self._take(step) for p, found in part.result().items()}
        self._note_damage(read)
        self._ahead = step + 1, self._begin(step + 1)
        return [_slice(positions, [read[p] for p in positions]) for positions in self._positions(step)]

    def keys_of(self, step: int) -> list[str]:
        """Names of a whole step over all ranks, in global order; reads no sample."""
        return [self.mixture.name(self.order[p]) for p in range(step * self.batch, (step + 1) * self.batch)]

    def close(self) -> None:
        """Stop reading ahead."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _take(self, step: int) -> "list[Future[_Read]]":
        return self._ahead[1] if self._ahead and self._ahead[0] == step else self._begin(step)

    def _begin(self, step: int) -> "list[Future[_Read]]":
        """Ask for this rank's samples of a step, a share of them from each reader, and for shards of those after it."""
        if self._downloads:
            self._downloads.move(step)
        shares, later = self._shares(step), self._shares(step + 1)
        if self._announced != step:
            self._announce(p for share in shares for p in share)
        self._announced = step + 1
        return [self._readers.submit(self._read_all, *both) for both in zip(shares, later, strict=True)]

    def _shares(self, step: int) -> list[Sequence[int]]:
        """This rank's positions of a step, dealt out to the readers."""
        every = [p for positions in self._positions(step) for p in positions]
        return [every[n :: self._workers] for n in range(min(self._workers, len(every)))]

    def _read_all(self, positions: Sequence[int], later: Sequence[int]) -> "_Read":
        """One reader's share of a step; a disk fetches that of the next one meanwhile."""
        self._announce(later)
        return {p: self._at(p) for p in positions}

    def _announce(self, positions: Iterable[int]) -> None:
        """Let a disk fetch samples that are read soon."""
        spots = map(self.order.__getitem__, positions)
        for spot in (s for s in spots if not self._cache.get(s)):
            with suppress(DataError):  # the reading says it
                self.mixture.sets[spot.set].announce(spot.index, self._pictures)

    def _positions(self, step: int) -> list[range]:
        return slice_positions(step, self.batch, self.micro_batch, self.rank, self.world)

    def _look_ahead(self) -> Ahead | None:
        """What asks for the shards of sets that are downloaded."""
        every = sum(len(s.shards) for s in self.mixture.sets if s.cache)
        return Ahead(self.mixture.cache, self._needed, every) if self.mixture.cache else None

    def _needed(self, step: int) -> Iterator[Remote]:
        """The shards to download for this rank's samples of a step."""
        spots = (self.order[p] for positions in self._positions(step) for p in positions)
        for shards, index in ((self.mixture.sets[spot.set], spot.index) for spot in spots):
            if shards.cache:
                yield shards.remote(shards.locate(index)[0])

    def _note_damage(self, read: "_Read") -> None:
        bad = [self.order[p] for p, (_, weight) in read.items() if not weight]
        self.quarantined |= {self.mixture.name(spot): self._damaged[spot] for spot in sorted(bad)}

    def _at(self, position: int) -> tuple[Sample, float]:
        """The sample and weight 1; or, under a damaged one's key, its next healthy neighbour and weight 0."""
        spot = self.order[position]
        if sample := self._healthy(spot):
            return sample, 1.0
        shards = self.mixture.sets[spot.set]
        others = (Spot(spot.set, (spot.index + k) % len(shards)) for k in range(1, len(shards)))
        stand_in = next((s for other in others if (s := self._healthy(other))), None)
        if stand_in is None:
            raise DataError("not one sample can be read", where=str(shards.folder), fix="run v4e-shards verify")
        return replace(stand_in, key=shards.name(spot.index)), 0.0

    def _healthy(self, spot: Spot) -> Sample | None:
        if spot in self._damaged:
            return None
        try:
            return self._cache.get(spot) or self._cache.put(spot, self._read(spot))
        except DataError as error:
            self._damaged[spot] = str(error)
            return None

    def _read(self, spot: Spot) -> Sample:
        """A sample, checked for what hashes cannot tell: a faulty writer hashes its faults too."""
        shards = self.mixture.sets[spot.set]
        sample = shards.sample(spot.index, self._pictures, finite=True)
        check_shapes(sample, shards.meta.student, shards.meta.teacher, shards.place(spot.index))
        return sample


_Read = dict[int, tuple[Sample, float]]  # position -> sample and weight


def _slice(positions: Sequence[int], pairs: Sequence[tuple[Sample, float]]) -> Slice:
    return Slice(tuple(s for s, _ in pairs), tuple(w for _, w in pairs), tuple(positions))


class _Cache:
    """Samples by place, until the room is taken; an epoch meets each sample once, so evicting would gain nothing."""

    def __init__(self, room: int) -> None:
        self._room, self._samples, self._lock = room, {}, Lock()

    def get(self, spot: Spot) -> Sample | None:
        return self._samples.get(spot)

    def put(self, spot: Spot, sample: Sample) -> Sample:
        with self._lock:
            if self._room and spot not in self._samples and (size := _size(sample)) <= self._room:
                self._room -= size
                self._samples[spot] = sample
        return sample


def readers_of(mixture: Mixture) -> int:
    """How many threads read a mixture best: more than cores contend for Python's lock."""
    cores = len(os.sched_getaffinity(0))
    return 8 if any(is_remote(s.folder) for s in mixture.sets) else max(2, min(8, cores))


def slice_positions(step: int, batch: int, micro_batch: int, rank: int, world: int) -> list[range]:
    """A rank's positions in a step, one range per accumulated micro-batch."""
    firsts = range(step * batch + rank * micro_batch, (step + 1) * batch, world * micro_batch)
    return [range(first, first + micro_batch) for first in firsts]


def _opened(data: ShardSet | str | Path) -> ShardSet:
    return data if isinstance(data, ShardSet) else ShardSet.open(data)


def _check_units(mixture: Mixture, batch: int, micro_batch: int) -> None:
    """Whether micro-batches are of one bucket each, and steps whole units."""
    unit = mixture.unit or batch
    if len(mixture.buckets) > 1 and (batch % unit or unit % micro_batch):
        what = f"units of {unit} samples do not divide batches of {batch} and into micro-batches of {micro_batch}"
        raise ConfigError(what, where="loop.unit", fix="use a divisor of loop.batch, a multiple of loop.micro_batch")


def _check_sizes(batch: int, micro_batch: int, rank: int, world: int) -> None:
    if min(batch, micro_batch, world) < 1 or batch % (world * micro_batch):
        raise ConfigError(
            f"batch = {batch} is no multiple of {world} ranks * micro_batch = {micro_batch}",
            where="loop.batch",
            fix=f"use a multiple of {max(1, world * micro_batch)}",
        )
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is not one of {world}", where="stream")


def _size(sample: Sample) -> int:
    parts = [p for p in (sample.encoded, sample.rollout) if p is not None]
    return sum(x.nbytes for part in parts for x in vars(part).values())
