"""Which sample stands at each position of a run: a pure function of the seed, for one shard set or several.

Positions come in *units*, runs of them whose samples stack: all are of one bucket. Whose turn a unit is, and within a
bucket whose turn a sample is, follows fixed shares; which sample it then is, the set's own permutation of its epoch.
Nothing is left over at the end of an epoch: a set's next one simply goes on, wherever in a unit that happens.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from threading import Lock
from typing import Literal, NamedTuple

import numpy as np

from v4e.config import Loop, Share
from v4e.data.cache import ShardCache
from v4e.data.disk import readable
from v4e.data.members import WORDS
from v4e.data.shards import ShardSet
from v4e.errors import ConfigError, DataError
from v4e.nouns import seed_of

PERIOD = 100_000  # turns after which shares may at the latest have come out even
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Spot(NamedTuple):
    """A sample: number of its set in the mixture, its own number in the set."""

    set: int
    index: int


@dataclass(frozen=True)
class Mixture:
    """Shard sets that train together.

    Args:
        sets: opened; each is gone through again and again, in a new order each time.
        weights: how often samples of each are met, in proportion; empty for equally often.
        unit: positions in a row that are of one bucket; 0 for a whole step. Matters where buckets are several.
        window: shards of a set whose samples are shuffled together, one such group after the other; 0 for all.

    Raises:
        ConfigError: no set, a weight that is not positive, or weights that hardly ever come out even.
        DataError: a set is empty, or none of its samples says its shapes.
    """

    sets: tuple[ShardSet, ...]
    weights: tuple[float, ...] = ()
    unit: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if empty := [s for s in self.sets if not len(s)]:
            raise DataError("the set holds no samples", where=str(empty[0].folder))
        if min(self.unit, self.window) < 0 or len(self.weights) not in (0, len(self.sets)) or not self.sets:
            raise ConfigError("needs a set, a weight for each, and no negative numbers", where="the mixture")
        period_of(self.shares)

    @staticmethod
    def of(loop: Loop, verify: Literal["sizes", "index"] = "sizes") -> "Mixture":
        """What a training's settings name: ``loop.data``, or the sets of ``loop.mixture``.

        Args:
            verify: see :meth:`ShardSet.open`.

        Raises:
            ConfigError: both or neither are named.
            DataError: a set is missing or damaged.
        """
        cache = ShardCache(loop.disk_cache, loop.disk_cache_bytes) if loop.disk_cache else None
        shares = named(loop)
        sets = tuple(ShardSet.open(share.path, verify, cache) for share in shares)
        return Mixture(sets, tuple(share.weight for share in shares), loop.unit, loop.window)

    @cached_property
    def shares(self) -> list[Fraction]:
        """Of each set among all samples."""
        return shares_of(self.weights or [1.0] * len(self.sets))

    @cached_property
    def buckets(self) -> list[list[int]]:
        """Numbers of the sets whose samples stack, in the order in which they are listed."""
        if len(self.sets) == 1:
            return [[0]]
        found: dict[Shapes, list[int]] = {}
        for number, shards in enumerate(self.sets):
            found.setdefault(_shapes(shards), []).append(number)
        return list(found.values())

    @property
    def cache(self) -> ShardCache | None:
        """Where shards are downloaded to."""
        return next((s.cache for s in self.sets if s.cache), None)

    @property
    def identity(self) -> str:
        """What a checkpoint should remember: changes when any byte of a set does, or the order of samples."""
        names = [s.identity for s in self.sets]
        if len(names) > 1:
            names = [f"{share} of {name}" for share, name in zip(self.shares, names, strict=True)]
        window = f" in windows of {self.window} shards" * bool(self.window)
        unit = f" in units of {self.unit or 'a step'}" * (len(self.buckets) > 1)
        return f"{' and '.join(names)}{window}{unit}"

    def check_room(self) -> None:
        """Whether the cache holds the shards shuffled together and the next such group, or else whole sets.

        Raises:
            ConfigError: nearly every sample would cost the download of a shard.
        """
        cached, room = [s for s in self.sets if s.cache], self.cache.room if self.cache else 0
        wanted = sum(_room(s, self.window) for s in cached)
        if wanted > room:
            most = max(len(s.shards) for s in cached)
            fits = next((w for w in range(most, 0, -1) if sum(_room(s, w) for s in cached) <= room), 0)
            fix = f"use loop.window={fits}, or enlarge" if fits else "enlarge"
            what = f"shards shuffled together, and the next ones, take {wanted} bytes, the cache holds {room}"
            raise ConfigError(what, where="loop.window", fix=f"{fix} loop.disk_cache_bytes")

    def name(self, spot: Spot) -> str:
        """A sample's key; among several sets, which may share keys, with its folder."""
        key, folder = self.sets[spot.set].name(spot.index), self.sets[spot.set].folder
        return key if len(self.sets) == 1 else str(folder / key)


class Order:
    """The sample at each position of a run over a mixture.

    Args:
        step: samples a step, the unit where the mixture does not say one.
    """

    def __init__(self, mixture: Mixture, seed: int, step: int) -> None:
        self._unit = mixture.unit or step
        self._numbers = mixture.buckets
        shares = [[mixture.shares[number] for number in bucket] for bucket in self._numbers]
        self._buckets = Turns([sum(bucket, Fraction(0)) for bucket in shares])
        self._members = [Turns([share / sum(bucket) for share in bucket]) for bucket in shares]
        self._epochs = [Epochs(s, seed, mixture.window, number) for number, s in enumerate(mixture.sets)]

    def __getitem__(self, position: int) -> Spot:
        unit, place = divmod(position, self._unit)
        bucket, turn = self._buckets[unit]
        member, turn = self._members[bucket][turn * self._unit + place]
        number = self._numbers[bucket][member]
        return Spot(number, self._epochs[number][turn])


class Turns:
    """Whose turn it is, by exact shares: among the first n turns each has had n times its share, to within one.

    Args:
        shares: they add up to 1.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        period = period_of(shares)
        self._counts = [int(share * period) for share in shares]
        self._who = np.fromiter(_chairmen(self._counts), np.uint16, period)
        self._before = np.empty(period, np.uint32)
        for number, count in enumerate(self._counts):
            self._before[self._who == number] = np.arange(count)

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """Whose turn it is, and how many turns were theirs before."""
        period, place = divmod(turn, len(self._who))
        who = int(self._who[place])
        return who, period * self._counts[who] + int(self._before[place])


def named(loop: Loop) -> list[Share]:
    """The sets that a training's settings name.

    Raises:
        ConfigError: both or neither of ``loop.data`` and ``loop.mixture`` are given.
    """
    if bool(loop.data) == bool(loop.mixture):
        what = "both loop.data and loop.mixture are given" if loop.data else "no shards to train on"
        raise ConfigError(what, where="loop.data", fix="name one set in loop.data, or several in loop.mixture")
    return loop.mixture or [Share(loop.data)]


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """What each is of their sum; ConfigError where one is not positive."""
    if bad := [w for w in weights if not 0 < w < math.inf]:
        raise ConfigError(f"weight {bad[0]} is not positive", where="loop.mixture", fix="leave that set out")
    exact = [Fraction(str(w)) for w in weights]
    return [w / sum(exact) for w in exact]


def period_of(shares: Sequence[Fraction]) -> int:
    """Turns after which shares come out even; ConfigError where they are more than PERIOD."""
    period = math.lcm(*(share.denominator for share in shares))
    if period > PERIOD:
        near = ", ".join(str(max(1, round(share * PERIOD))) for share in shares)
        where, what = "loop.mixture", f"weights come out even only every {period} samples"
        raise ConfigError(what, where=where, fix=f"round them: {near}")
    return period


def _chairmen(counts: Sequence[int]) -> Iterator[int]:
    """One period of turns; no prefix strays from the shares by more than 1 - 1 / (2 n - 2), for n who take turns.

    R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980), theorem 1 and its proof.
    """
    period, scale = sum(counts), 2 * max(2, len(counts)) - 2
    had = [0] * len(counts)
    for turn in range(1, period + 1):
        due = [scale * (turn * count - period * h) for count, h in zip(counts, had, strict=True)]
        ready = [n for n, d in enumerate(due) if d >= period]
        who = min(ready, key=lambda n: ((scale - 1) * period - due[n]) / counts[n])
        had[who] += 1
        yield who


class Epochs:
    """A set's samples for ever: one permutation after the other, each a pure function of seed, epoch and set.

    Args:
        number: of the set in its mixture; the first is ordered as if it were alone.
    """

    def __init__(self, shards: ShardSet, seed: int, window: int, number: int) -> None:
        self._samples = np.array([s.samples for s in shards.shards])
        self._total, self._window = int(self._samples.sum()), window
        self._seed, self._number = seed, (number,) if number else ()
        self._permutation = lru_cache(maxsize=2)(self._permute)  # a step may straddle two epochs
        self._lock = Lock()  # or every reader would make the same permutation

    def __getitem__(self, turn: int) -> int:
        epoch, place = divmod(turn, self._total)
        with self._lock:
            return int(self._permutation(epoch)[place])

    def _permute(self, epoch: int) -> np.ndarray:
        """Sample numbers in an epoch's order. Sorting raw words, because numpy keeps only those the same for ever.

        A tenth of a second and 4 MB for a million samples, once an epoch; every look-up after it is O(1).
        """
        words = self._words("order", epoch, self._total)
        if not self._window:
            return np.argsort(words, kind="stable").astype(np.uint32)
        places = np.empty(len(self._samples), np.int64)
        places[np.argsort(self._words("shards", epoch, len(places)), kind="stable")] = np.arange(len(places))
        return np.lexsort((words, np.repeat(places // self._window, self._samples))).astype(np.uint32)

    def _words(self, what: str, epoch: int, count: int) -> np.ndarray:
        return np.random.PCG64(seed_of(self._seed, what, epoch, *self._number)).random_raw(count)


def _room(shards: ShardSet, window: int) -> int:
    """Bytes of two windows at their largest; of the set where they are all of it."""
    sizes = sorted((s.bytes for s in shards.shards), reverse=True)
    return sum(sizes) if not window else min(sum(sizes), 2 * sum(sizes[:window]))


def _shapes(shards: ShardSet) -> Shapes:
    """Names and shapes of a set's tensors, without the lengths of texts, as the first sound sample declares them."""
    for i in range(len(shards)):
        try:
            content = shards.members(i, [WORDS])[WORDS]
        except DataError:  # named when training meets it
            continue
        with readable(shards.place(i)):
            parts = json.loads(bytes(content))["tensors"]
            return tuple(sorted((n, _stacked(n, x["shape"])) for part in parts.values() for n, x in part.items()))
    raise DataError("not one sample can be read", where=str(shards.folder), fix="run v4e-shards verify")


def _stacked(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """What must be equal for tensors to stack: words are padded."""
    axes = name.rpartition("_")[2]
    return tuple(size for axis, size in zip(axes, shape, strict=False) if axis != "L")
