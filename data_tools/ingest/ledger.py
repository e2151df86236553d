"""What a run has decided so far, in one SQLite file: memory stays flat, and a killed run is gone on with."""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from data_tools.ingest.triplets import Triplet, from_row, to_row
from v4e.data.disk import digest_of, to_json
from v4e.data.places import Place

NEAR = 3  # of the 128 bits of both looks; with four bands, two looks so near have a band in common
# A write-ahead log is safe from a kill without waiting for the disk at each commit; a power cut costs what was not yet
# on it, which is read again. Locked for one process alone it needs no shared memory, which network folders lack.
SCHEMA = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS earlier (id TEXT PRIMARY KEY, row BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ids (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken (number INTEGER PRIMARY KEY, id TEXT, look TEXT, content BLOB, row BLOB);
CREATE TABLE IF NOT EXISTS bands (band BLOB, number INTEGER, PRIMARY KEY (band, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rejects (number INTEGER PRIMARY KEY, reason TEXT, row BLOB);
CREATE INDEX IF NOT EXISTS contents ON taken (content);
"""


class Ledger:
    """The decisions of one run, in the order of its rows; numbers are given by the caller and rise.

    A decision is safe from a kill once :meth:`save` has returned.
    """

    def __init__(self, path: Path, base: Place) -> None:
        """The ledger of the folder ``base`` in the local file ``path``."""
        self.base = base
        self._db = sqlite3.connect(path, isolation_level="DEFERRED", check_same_thread=False)
        self._db.executescript(SCHEMA)

    def begin(self, before: Iterable[Triplet]) -> None:
        """Start over, remembering as earlier what was taken ``before`` and what a killed run had taken since."""
        with self._db:
            self._db.execute("REPLACE INTO earlier SELECT id, row FROM taken")
            for triplet in before:  # the list has the last word: evolutions may have been written since
                self._db.execute("REPLACE INTO earlier VALUES (?, ?)", (triplet.id, to_row(triplet, self.base)))
            for table in ("ids", "taken", "bands", "rejects"):
                self._db.execute(f"DELETE FROM {table}")

    def earlier(self, key: str) -> Triplet | None:
        """The triplet that an earlier run made under this id."""
        found = self._db.execute("SELECT row FROM earlier WHERE id = ?", (key,)).fetchone()
        return from_row(found[0], self.base, f"what was taken before, key {key}") if found else None

    def claim(self, key: str) -> bool:
        """Whether no row had this id yet; it is taken now."""
        return self._db.execute("INSERT OR IGNORE INTO ids VALUES (?)", (key,)).rowcount == 1

    def same(self, triplet: Triplet) -> str:
        """Id of the first triplet taken with the same files and instruction, or nothing."""
        query = "SELECT id FROM taken WHERE content = ? ORDER BY number LIMIT 1"
        found = self._db.execute(query, (_content(triplet),)).fetchone()
        return found[0] if found else ""

    def similar(self, triplet: Triplet) -> str:
        """Id of the first triplet taken with the same words whose pictures look the same, or nothing."""
        query = (
            "SELECT DISTINCT taken.number, id, look FROM bands JOIN taken USING (number) "
            "WHERE band IN (?, ?, ?, ?) ORDER BY taken.number"
        )
        for _, key, look in self._db.execute(query, _bands(triplet)):
            if (int(look, 16) ^ int(triplet.look, 16)).bit_count() <= NEAR:
                return key
        return ""

    def take(self, number: int, triplet: Triplet) -> None:
        row = (number, triplet.id, triplet.look, _content(triplet), to_row(triplet, self.base))
        self._db.execute("INSERT INTO taken VALUES (?, ?, ?, ?, ?)", row)
        self._db.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(band, number) for band in _bands(triplet)])

    def reject(self, number: int, reason: str, row: dict[str, object]) -> None:
        self._db.execute("INSERT INTO rejects VALUES (?, ?, ?)", (number, reason, to_json(row) + b"\n"))

    def save(self) -> None:
        self._db.commit()

    def taken(self) -> Iterator[bytes]:
        """The lines of what was taken, in order."""
        with closing(self._db.execute("SELECT row FROM taken ORDER BY number")) as found:
            yield from (row for (row,) in found)

    def rejects(self) -> Iterator[bytes]:
        """The lines of what was rejected, in order."""
        with closing(self._db.execute("SELECT row FROM rejects ORDER BY number")) as found:
            yield from (row for (row,) in found)

    def reasons(self) -> Counter[str]:
        return Counter(dict(self._db.execute("SELECT reason, COUNT(*) FROM rejects GROUP BY reason")))

    def close(self) -> None:
        self._db.close()


def _content(triplet: Triplet) -> bytes:
    """Equal for two triplets with the same bytes and words."""
    pictures = [triplet.hashes["source"], triplet.hashes["edited"]]
    return digest_of(to_json([*pictures, triplet.instruction]))


def _bands(triplet: Triplet) -> list[bytes]:
    """A quarter of both looks each, with the words: the same edit is looked for, not the same photograph."""
    words = re.sub(r"\W+", " ", triplet.instruction.casefold()).strip()
    said, look = digest_of(words.encode())[:8], bytes.fromhex(triplet.look)
    return [said + bytes([at]) + look[at : at + 4] for at in range(0, 16, 4)]
