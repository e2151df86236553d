"""One rank's end is everyone's: it is told to the others at once, and one that is silent is missed.

A collective would let the others wait for its own time-out, half an hour or more, and then name itself as the cause.
"""

import os
import sys
import threading
import time
from itertools import count
from types import TracebackType

from torch.distributed import TCPStore

from v4e import dist
from v4e.dist import Ranks
from v4e.errors import PreemptedError, TrainingError, V4EError

BEAT_S = 2.0  # between two signs of life
SILENCE_S = 35.0  # without one, after which a rank is given up; a node that pages or writes may well lose twenty
GRACE_S = 5.0  # for the main thread to find out itself, and say more
FAILED = "failed"  # the first failure; the first to say so wins


class Watch:
    """Inside, this rank lives and dies with the others; alone it watches nobody.

    Raises:
        TrainingError: on leaving by an error that another rank's end has caused, with that rank's own words.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._over = ranks, threading.Event()
        self._store = dist.side_store(ranks) if ranks.world > 1 else None

    def __enter__(self) -> "Watch":
        if self._store:
            self._store.set(_beat(self._ranks.rank), "0")
            dist.barrier()
            self._thread = threading.Thread(target=self._run, args=(self._store,), name="v4e-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        if self._store is None:
            return
        if error is None or isinstance(error, PreemptedError):  # all ranks alike
            dist.barrier()  # rank 0's farewell may take its time, and the others must be heard until it is here
            self._over.set()
            self._thread.join()
            dist.barrier()  # rank 0 may leave, and its store with it
            return
        self._over.set()
        self.tell(error)
        if cause := _caused(error, self._failure(self._store), self._ranks):
            raise cause from error
        if self._ranks.is_main:
            time.sleep(2 * BEAT_S)  # or the store would go before it was read

    def tell(self, error: BaseException) -> None:
        """Let the others know, unless it was one of them that began."""
        if self._store is None or isinstance(error, PreemptedError) or _lost_contact(error):
            return
        try:
            self._store.compare_set(FAILED, "", f"{self._ranks.rank} {type(error).__name__}: {error}")
        except RuntimeError as lost:
            print(f"v4e: rank {self._ranks.rank} could not tell rank 0 of its failure: {lost}", file=sys.stderr)

    def _run(self, store: TCPStore) -> None:
        heard: dict[int, tuple[bytes, float]] = dict.fromkeys(range(self._ranks.world), (b"", time.monotonic()))
        last = time.monotonic()
        for beat in count(1):
            if self._over.wait(BEAT_S):
                return
            asleep, last = time.monotonic() - last - BEAT_S, time.monotonic()
            try:
                store.set(_beat(self._ranks.rank), str(beat))
                told = self._failure(store) or _silent(store, heard, asleep)
            except RuntimeError:
                told = "rank 0 is gone, and the job's store with it"
            if told and not self._over.wait(GRACE_S):
                print(f"v4e: rank {self._ranks.rank} stops: {told}", file=sys.stderr, flush=True)
                os._exit(TrainingError.exit_code)

    def _failure(self, store: TCPStore) -> str:
        """The first failure in a sentence; empty while there is none."""
        try:
            rank, _, words = store.get(FAILED).decode().partition(" ") if store.check([FAILED]) else ("", "", "")
        except RuntimeError:
            return "rank 0 is gone, and the job's store with it"
        return f"rank {rank} failed first: {words}" if rank else ""


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _silent(store: TCPStore, heard: dict[int, tuple[bytes, float]], asleep: float) -> str:
    """Note who beats; a sentence on those who have not for too long.

    Args:
        asleep: seconds in which this rank itself was stopped, as a scheduler or a closed lid stops a whole job. They
            do not count: nobody could be heard in them.
    """
    now = time.monotonic()
    for rank, beat in enumerate(store.multi_get([_beat(r) for r in heard])):
        was, when = heard[rank]
        heard[rank] = (was, when + max(0.0, asleep)) if beat == was else (beat, now)
    lost = [rank for rank, (_, when) in heard.items() if now - when > SILENCE_S]
    return f"no sign of life for {SILENCE_S:.0f} s from rank {', '.join(map(str, lost))}" if lost else ""


def _lost_contact(error: BaseException) -> bool:
    """Whether it says no more than that another rank no longer answers."""
    words = ("gloo", "NCCL", "Connection", "Broken pipe", "recvValue")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _caused(error: BaseException, told: str, ranks: Ranks) -> V4EError | None:
    """What to say instead of an error that another rank's end has caused."""
    if isinstance(error, V4EError) or told.startswith(f"rank {ranks.rank} "):
        return None
    if told or _lost_contact(error):
        what = told or "another rank no longer answers: it was killed, or its node is gone"
        return TrainingError(what, where=f"rank {ranks.rank}", fix="the same command goes on from the last checkpoint")
    return None
