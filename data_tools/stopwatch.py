"""How long a stage took, over every attempt at it, those that were killed among them.

Seconds are told to people. Where they cannot be kept, as on a full disk, the stage goes on and they are lost.
"""

import threading
import time
from contextlib import suppress
from pathlib import Path

from v4e.data.disk import write_atomically

BEAT = 5.0  # seconds; the most of an attempt that SIGKILL hides


class Stopwatch:
    """``with Stopwatch(path) as watch: work(); watch.seconds()``.

    While the work is on, ``path`` is written again and again, and the next attempt begins with what it says. It is
    removed at the end, unless the work failed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stopped = path, threading.Event()
        self._earlier = _read(path)

    def seconds(self) -> float:
        """Of this attempt and those before it."""
        return self._earlier + time.perf_counter() - self._start

    def __enter__(self) -> "Stopwatch":
        self._start = time.perf_counter()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._stopped.set()
        self._beats.join()
        if failure:
            self._note()
        else:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            self._note()

    def _note(self) -> None:
        with suppress(OSError):
            write_atomically(self.path, f"{self.seconds():.3f}\n".encode(), durable=False)


def _read(path: Path) -> float:
    """0 where nothing is kept, or a power cut has left half of it."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return 0.0
