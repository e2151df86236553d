"""The list of an ingested folder as a sequence that holds where its lines begin, and not what they say."""

import os
import shutil
from array import array
from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import IO, overload

import numpy as np
from xxhash import xxh3_64_intdigest

from data_tools.ingest.triplets import LIST, Triplet, from_row, iterate
from v4e.data.places import Place, is_remote, opened, place, shown
from v4e.errors import DataError


class Listed(Sequence[Triplet]):
    """The triplets of an ingested folder, each read from its line when it is asked for: eight bytes of memory each.

    The list is held open, and that of a URL in a file without a name, so one that replaces it changes nothing here.

    Raises:
        DataError: nothing was ingested there, a line is damaged, or two lines have one id.
    """

    def __init__(self, folder: str | Place) -> None:
        next(iterate(folder), None)  # says what is missing
        self._path = place(folder) / LIST
        self._file = _held(self._path)
        self._starts, ids = array("Q", [0]), array("Q")
        for number, line in enumerate(self._file):
            ids.append(xxh3_64_intdigest(self._triplet(line, number).id.encode()))
            self._starts.append(self._starts[-1] + len(line))
        self._refuse_doubles(np.asarray(ids, np.uint64))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, at: int) -> Triplet: ...
    @overload
    def __getitem__(self, at: slice) -> list[Triplet]: ...
    def __getitem__(self, at: int | slice) -> Triplet | list[Triplet]:
        if isinstance(at, slice):
            return [self[number] for number in range(len(self))[at]]
        number = range(len(self))[at]
        start, end = self._starts[number : number + 2]
        return self._triplet(os.pread(self._file.fileno(), end - start, start), number)  # threads share the file

    def _triplet(self, line: bytes, number: int) -> Triplet:
        return from_row(line, self._path.parent, self._where(number))

    def _where(self, number: int) -> str:
        return f"{shown(self._path)}, line {number + 1}"

    def _refuse_doubles(self, ids: np.ndarray) -> None:
        order = np.argsort(ids, kind="stable")
        alike = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
        for again, first in sorted(zip(order[alike + 1].tolist(), order[alike].tolist(), strict=True)):
            if self[first].id == (name := self[again].id):
                what = f"an earlier line has the id {name!r} too"
                raise DataError(what, where=self._where(again), fix="run ingest again")


def read_triplets(folder: str | Place) -> list[Triplet]:
    """All of them, in memory; DataError as :class:`Listed` has it."""
    return list(Listed(folder))


def _held(path: Place) -> IO[bytes]:
    if not is_remote(path):
        return opened(path)
    file = TemporaryFile()  # noqa: SIM115  (held by the caller)
    with opened(path) as there:
        shutil.copyfileobj(there, file)
    file.seek(0)
    return file
