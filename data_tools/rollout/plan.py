"""Which triplets are rolled together, and who does which: the first is fixed for good, the second never matters.

Matrix products are not batch-invariant, so a restart makes the same bytes only if every sample meets the same
neighbours again. Hence *units* of a fixed number of triplets, the last one padded, and shards of a fixed number of
units: a set's bytes do not depend on how many ranks made it, nor on how often they were killed.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from data_tools.ingest import Triplet

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
HELD = (errno.EACCES, errno.EAGAIN)
SHARDS_FROM, MANIFEST, PROBE = 1 << 40, 1 << 41, (1 << 41) + 1  # bytes of the claims' file that stand for no unit


class Chosen(Sequence[Triplet]):
    """Some of a sequence's triplets by their numbers; it is asked for each when that is needed."""

    def __init__(self, triplets: Sequence[Triplet], numbers: Sequence[int]) -> None:
        self._triplets, self._numbers = triplets, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Triplet: ...
    @overload
    def __getitem__(self, at: slice) -> list[Triplet]: ...
    def __getitem__(self, at: int | slice) -> Triplet | list[Triplet]:
        if isinstance(at, slice):
            return [self._triplets[number] for number in self._numbers[at]]
        return self._triplets[self._numbers[at]]


@dataclass(frozen=True)
class Plan:
    """Triplets of one size, in units and shards.

    Args:
        batch: triplets a unit.
        per_shard: units a shard.
    """

    triplets: Sequence[Triplet]
    batch: int
    per_shard: int

    @property
    def units(self) -> range:
        return range(-(-len(self.triplets) // self.batch))

    @property
    def shards(self) -> range:
        return range(-(-len(self.units) // self.per_shard))

    def unit(self, number: int) -> Sequence[Triplet]:
        """The triplets of a unit; the last one may have fewer."""
        return self.triplets[number * self.batch : (number + 1) * self.batch]

    def size_of(self, number: int) -> int:
        """How many triplets a unit has."""
        return min(self.batch, len(self.triplets) - number * self.batch)

    def units_of(self, shard: int) -> range:
        return self.units[shard * self.per_shard : (shard + 1) * self.per_shard]

    def shard_of(self, unit: int) -> int:
        return unit // self.per_shard

    def share(self, part: int, parts: int) -> range:
        """Shards that are one rank's own; whole ones, so that ranks write to different files."""
        return self.shards[part::parts]


class Claims:
    """Who is at work on what, told by locks on single bytes of one file, which the kernel takes back from the dead.

    Nothing wrong can come of a lost claim: a unit done twice has the same bytes, under one name. Where a file system
    has no locks, every claim is granted and ``work`` is False.

    Args:
        everywhere: whether every rank of the set sees this file; those of a URL see that of their own machine.
    """

    def __init__(self, path: Path, everywhere: bool = True) -> None:
        self._file = open(path, "ab")  # noqa: SIM115  held open: closing it gives up every claim
        self.work, self._everywhere = True, everywhere
        with self.take(PROBE):
            pass

    @property
    def shared(self) -> bool:
        """Whether a claim that is free here is free, so that a rank may do what others have not begun."""
        return self.work and self._everywhere

    @contextmanager
    def take(self, number: int, wait: bool = False) -> Iterator[bool]:
        """Hold a claim within the block, which is told whether it was free."""
        granted = self._lock(number, wait)
        try:
            yield granted
        finally:
            if granted and self.work:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number, os.SEEK_SET)

    def close(self) -> None:
        self._file.close()

    def _lock(self, number: int, wait: bool) -> bool:
        if not self.work:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number, os.SEEK_SET)
        except OSError as error:
            if error.errno in HELD:
                return False
            if error.errno not in NO_LOCKS:
                raise
            self.work = False
        return True
