"""The order in which a run meets its samples: a pure function of (seed, step), the same on any number of ranks.

Position p of a run, counted over all epochs, is sample ``order(p // n)[p % n]``, with one permutation per epoch. The
stream has no state but the step, so there is nothing to save and nothing to get wrong on resuming.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np

from v4e.data.members import refuse_nonfinite
from v4e.data.shards import ShardSet
from v4e.data.soundness import check_shapes
from v4e.errors import ConfigError, DataError
from v4e.nouns import Sample, seed_of


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
    """Slices of a shard set, one rank's share of each step.

    Attributes:
        quarantined: key -> why, of the damaged samples in the steps this rank has taken.

    Args:
        data: a set or its folder.
        seed: of the order.
        batch: samples a step, over all ranks and accumulated micro-batches.
        micro_batch: samples a slice.
        rank, world: which share is this one's.
        pictures: also read source and target.
        workers: threads that read; they wait for disk or network more than they compute.
        cache: bytes of tensors to keep in memory; samples met first stay.

    Raises:
        ConfigError: batch is no multiple of world * micro_batch, or rank is not one of world.
        DataError: the set is empty or damaged where it opens.
    """

    def __init__(
        self,
        data: ShardSet | str | Path,
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        pictures: bool = False,
        workers: int = 8,
        cache: int = 0,
    ) -> None:
        _check_sizes(batch, micro_batch, rank, world)
        self.set = data if isinstance(data, ShardSet) else ShardSet.open(data)
        if not len(self.set):
            raise DataError("the set holds no samples", where=str(self.set.folder))
        self.seed, self.batch, self.micro_batch, self.rank, self.world = seed, batch, micro_batch, rank, world
        self.quarantined: dict[str, str] = {}
        self._damaged: dict[str, str] = {}  # as found by the reader, which is a step ahead
        self._pictures, self._cache = pictures, _Cache(cache)
        self._order, self._ordering = lru_cache(maxsize=2)(self._permutation), Lock()  # a step may straddle two epochs
        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="v4e-stream")
        self._ahead: tuple[int, _Begun] | None = None

    def step(self, step: int) -> list[Slice]:
        """This rank's slices of a step, in the order they are accumulated; the next step is read meanwhile.

        Raises:
            DataError: not one sample of the set can be read.
        """
        slices = [_slice(piece) for piece in self._take(step)]
        bad = {s.key for piece in slices for s, w in zip(piece.samples, piece.weights, strict=True) if not w}
        self.quarantined |= {key: self._damaged[key] for key in sorted(bad)}
        self._ahead = step + 1, self._begin(step + 1)
        return slices

    def index_of(self, position: int) -> int:
        """The sample at a position of the run's global order."""
        epoch, place = divmod(position, len(self.set))
        with self._ordering:  # or every reader would make the same permutation
            return int(self._order(epoch)[place])

    def keys_of(self, step: int) -> list[str]:
        """Keys of a whole step over all ranks, in global order; reads no sample."""
        return [self.set.name(self.index_of(p)) for p in range(step * self.batch, (step + 1) * self.batch)]

    def close(self) -> None:
        """Stop reading ahead."""
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _take(self, step: int) -> "_Begun":
        return self._ahead[1] if self._ahead and self._ahead[0] == step else self._begin(step)

    def _begin(self, step: int) -> "_Begun":
        """Ask for this rank's samples of a step."""
        places = slice_positions(step, self.batch, self.micro_batch, self.rank, self.world)
        return [{p: self._readers.submit(self._at, p) for p in positions} for positions in places]

    def _at(self, position: int) -> tuple[Sample, float]:
        """The sample and weight 1; or, under a damaged one's key, its next healthy neighbour and weight 0."""
        index = self.index_of(position)
        if sample := self._healthy(index):
            return sample, 1.0
        others = ((index + k) % len(self.set) for k in range(1, len(self.set)))
        stand_in = next((s for i in others if (s := self._healthy(i))), None)
        if stand_in is None:
            raise DataError("not one sample can be read", where=str(self.set.folder), fix="run v4e-shards verify")
        return replace(stand_in, key=self.set.name(index)), 0.0

    def _healthy(self, index: int) -> Sample | None:
        key = self.set.name(index)
        if key in self._damaged:
            return None
        try:
            return self._cache.get(index) or self._cache.put(index, self._read(index))
        except DataError as error:
            self._damaged[key] = str(error)
            return None

    def _read(self, index: int) -> Sample:
        """A sample, checked for what hashes cannot tell: a faulty writer hashes its faults too."""
        sample, where = self.set.sample(index, self._pictures), self.set.place(index)
        check_shapes(sample, self.set.meta.student, self.set.meta.teacher, where)
        for part in filter(None, (sample.encoded, sample.rollout)):
            refuse_nonfinite(vars(part), where)
        return sample

    def _permutation(self, epoch: int) -> np.ndarray:
        """Sample numbers in an epoch's order. Sorting raw words, because numpy keeps only those the same for ever.

        A tenth of a second and 4 MB for a million samples, once an epoch; every look-up after it is O(1).
        """
        words = np.random.PCG64(seed_of(self.seed, "order", epoch)).random_raw(len(self.set))
        return np.argsort(words, kind="stable").astype(np.uint32)


_Begun = list[dict[int, "Future[tuple[Sample, float]]"]]  # of each micro-batch: position -> sample and weight


def _slice(begun: Mapping[int, "Future[tuple[Sample, float]]"]) -> Slice:
    pairs = [future.result() for future in begun.values()]
    return Slice(tuple(s for s, _ in pairs), tuple(w for _, w in pairs), tuple(begun))


class _Cache:
    """Samples by number, until the room is taken; an epoch meets each sample once, so evicting would gain nothing."""

    def __init__(self, room: int) -> None:
        self._room, self._samples, self._lock = room, {}, Lock()

    def get(self, index: int) -> Sample | None:
        return self._samples.get(index)

    def put(self, index: int, sample: Sample) -> Sample:
        with self._lock:
            if index not in self._samples and (size := _size(sample)) <= self._room:
                self._room -= size
                self._samples[index] = sample
        return sample


def slice_positions(step: int, batch: int, micro_batch: int, rank: int, world: int) -> list[range]:
    """A rank's positions in a step, one range per accumulated micro-batch."""
    firsts = range(step * batch + rank * micro_batch, (step + 1) * batch, world * micro_batch)
    return [range(first, first + micro_batch) for first in firsts]


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
