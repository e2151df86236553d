"""Learning rate as a pure function of the step."""

import math

from v4e.config import Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the optimiser's lr is multiplied by at ``step`` (counted from 0) of ``steps``.

    The warm-up rises to one at step ``warmup - 1``; a decay reaches ``floor`` at the last step.
    """
    rise = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    return rise * _shape(schedule, step, steps)


def _shape(schedule: Schedule, step: int, steps: int) -> float:
    if schedule.kind == "constant":
        return 1.0
    first = schedule.warmup if schedule.kind == "cosine" else steps - max(1, round(schedule.decay * steps))
    done = min(1.0, max(0.0, (step - first + 1) / max(1, steps - first)))
    if schedule.kind == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - schedule.floor) * done
