"""Time told as work where a machine is shared: seconds of processor time, which other processes disturb less."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Seconds spent in something."""

    spent: float = 0.0
    laps: list[float] = field(default_factory=list)

    def around(self, work: Callable) -> Callable:
        """The same function, timed."""

        def timed(*args, **named):
            began = now()
            done = work(*args, **named)
            self.laps.append(now() - began)
            self.spent += self.laps[-1]
            return done

        return timed


@dataclass(frozen=True)
class Lap:
    """What something took: seconds by the clock, and of this process on a CPU."""

    wall: float
    cpu: float

    @staticmethod
    def of(work: Callable[[], object]) -> "Lap":
        wall_clock, cpu = time.perf_counter(), time.process_time()
        work()
        return Lap(time.perf_counter() - wall_clock, time.process_time() - cpu)


def now() -> float:
    """A clock that counts work: this process's own time on a CPU, the wall's with a GPU, whose work is awaited."""
    return wall() if torch.cuda.is_available() else time.process_time()


def own() -> float:
    """The same of this thread alone."""
    return wall() if torch.cuda.is_available() else time.thread_time()


def wall() -> float:
    """The clock on the wall, when the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
