"""What a run has decided so far, in one SQLite file: memory stays flat, and a killed run is gone on with."""

import errno
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from data_tools.ingest.triplets import Triplet, from_row, to_row
from v4e.data.disk import digest_of, to_json
from v4e.data.places import Place

NEAR = 3  # of the 128 bits of both looks; with four bands, two looks so near have a band in common
MOST = 1000  # earlier triplets of a band that are looked at: what more have in common tells none of them apart
ALIKE = f"SELECT * FROM (SELECT number FROM bands WHERE band = ? ORDER BY number LIMIT {MOST})"
FAILURES = {  # of SQLite's, that are the disk's
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}
# A write-ahead log is safe from a kill without waiting for the disk at each commit; a power cut costs what was not yet
# on it, which is read again. Locked for one process alone it needs no shared memory, which network folders lack.
SCHEMA = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS earlier (id TEXT PRIMARY KEY, row BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unmet (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ids (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken (number INTEGER PRIMARY KEY, id TEXT, look TEXT, content BLOB, row BLOB);
CREATE TABLE IF NOT EXISTS bands (band BLOB, number INTEGER, PRIMARY KEY (band, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rejects (number INTEGER PRIMARY KEY, reason TEXT, row BLOB);
CREATE INDEX IF NOT EXISTS contents ON taken (content);
"""


@contextmanager
def failing_disk() -> Iterator[None]:
    """What SQLite says of a full or failing disk, as the OSError that it is."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if number := FAILURES.get(error.sqlite_errorcode & 0xFF):  # the higher bits are a detail
            raise OSError(number, str(error)) from error
        raise


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
        """Start over, remembering as earlier what was taken ``before`` and what a killed run had taken since.

        The list has the last word, for evolutions may have been written since, but not about a row of which the killed
        run had met another state: that one's pictures are in the folder now.
        """
        with self._db:
            self._db.execute("REPLACE INTO earlier SELECT id, row FROM taken")
            for table in ("unmet", "ids", "taken", "bands", "rejects"):
                self._db.execute(f"DELETE FROM {table}")
            for triplet in before:
                self._db.execute("INSERT OR IGNORE INTO unmet VALUES (?)", (triplet.id,))
                since = self.earlier(triplet.id)
                if not since or since.stamp == triplet.stamp:
                    self._db.execute("REPLACE INTO earlier VALUES (?, ?)", (triplet.id, to_row(triplet, self.base)))

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
        bands = _bands(triplet)
        alike = " UNION ".join([ALIKE] * len(bands))
        query = f"SELECT id, look FROM ({alike}) JOIN taken USING (number) ORDER BY number"
        for key, look in self._db.execute(query, bands):
            if (int(look, 16) ^ int(triplet.look, 16)).bit_count() <= NEAR:
                return key
        return ""

    def take(self, number: int, triplet: Triplet) -> None:
        """Take it; one that repeats another is not looked for later, as one that is rejected for it would not be."""
        self._meet(triplet.id)
        row = (number, triplet.id, triplet.look, _content(triplet), to_row(triplet, self.base))
        self._db.execute("INSERT INTO taken VALUES (?, ?, ?, ?, ?)", row)
        if not triplet.repeats:
            bands = [(band, number) for band in _bands(triplet)]
            self._db.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", bands)

    def reject(self, number: int, reason: str, row: dict[str, object]) -> None:
        self._meet(row["id"])
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

    def unmet(self) -> tuple[int, str]:
        """How many triplets were in the list before and in no row since, and the id of one."""
        number, key = self._db.execute("SELECT COUNT(*), MIN(id) FROM unmet").fetchone()
        return number, key or ""

    def _meet(self, key: object) -> None:
        self._db.execute("DELETE FROM unmet WHERE id = ?", (key,))

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
