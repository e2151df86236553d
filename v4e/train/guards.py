"""What keeps a long run honest: the wish to stop that comes as a signal, and losses out of the ordinary."""

import signal
import threading
from collections.abc import Sequence
from statistics import median
from types import FrameType

WINDOW, ENOUGH = 100, 20  # losses that say what is ordinary; fewer than ENOUGH say nothing
NORMAL = 1.4826  # median absolute deviation -> standard deviation, of a normal distribution
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's on preemption: its own, and what --signal asks it for


class Notice:
    """Inside, SIGTERM and SIGUSR1 end nothing: they are remembered, and calling this says whether one came.

    Only the main thread may set handlers; elsewhere nothing is ever heard.
    """

    def __init__(self) -> None:
        self.heard = ""

    def __call__(self) -> bool:
        return bool(self.heard)

    def __enter__(self) -> "Notice":
        here = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._hear) for s in SIGNALS} if here else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = signal.Signals(number).name


def surprise(recent: Sequence[float], value: float) -> float:
    """How many robust standard deviations a value lies above the median of the recent ones; 0 while there are few."""
    if len(recent) < ENOUGH:
        return 0.0
    middle = median(recent)
    spread = NORMAL * median(abs(x - middle) for x in recent)
    return (value - middle) / max(spread, 1e-6 * abs(middle), 1e-12)
