"""What the journal of a short run says: ``python -m data_tools.curves RUN``; code 7 where one of its curves means stop.

A run is compared with its own beginning, for there is nothing else to compare a first one with: the last third of what
it logged against the first. The limits are v4e's own choice.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Literal

from v4e import journal
from v4e.errors import DataError, TrainingError, V4EError

State = Literal["ok", "look", "STOP"]
Lines = Sequence[Mapping[str, float]]

TERMS: dict[str, State] = {"velocity": "STOP", "trajectory": "STOP", "tail": "look", "flow": "look"}  # unless they fall
COUNTS: dict[str, tuple[State, str]] = {
    "skipped_steps": ("STOP", "losses or gradients that were not finite"),
    "quarantined": ("STOP", "damaged samples: v4e-shards verify"),
    "loss_spikes": ("look", "losses out of the ordinary; the log names the steps"),
}
LEAST = 6  # lines without which there is no beginning and no end
RISE, WAIT, SLOWEST = 3.0, 0.02, 0.7  # of the gradient's norm; share of a step spent on data; of the median speed


@dataclass(frozen=True)
class Verdict:
    """One curve: ``look`` asks for a person's eye, ``STOP`` says that more steps would be wasted."""

    curve: str
    state: State
    told: str

    def __str__(self) -> str:
        return f"{self.state:<6}{self.curve}: {self.told}"


def verdicts(lines: Lines) -> list[Verdict]:
    """All that can be said of a run's numbers.

    Raises:
        DataError: it has logged too little.
    """
    if len(lines) < LEAST:
        fix = "let it run on, or lower loop.log_every"
        raise DataError(f"{len(lines)} lines of numbers, of which {LEAST} are the least", fix=fix)
    return [verdict for look in LOOKS for verdict in look(lines)]


def _terms(lines: Lines) -> Iterator[Verdict]:
    """Those that fall in a hundred steps; `block` moves slowly, and `own` is asked rarely."""
    for term, state in TERMS.items():
        for name in _named(lines, f"/term/{term}"):
            first, last = _ends(_values(lines, name))
            told = f"from {first:.4g} to {last:.4g}" + ("" if last < first else ", and should fall")
            yield Verdict(name, "ok" if last < first else state, told)


def _norms(lines: Lines) -> Iterator[Verdict]:
    for name in _named(lines, "/grad_norm"):
        first, last = _ends(_values(lines, name), median)
        calm = last <= RISE * first
        told = f"from {first:.4g} to {last:.4g}" + ("" if calm else ", which is too much: lower optim.lr")
        yield Verdict(name, "ok" if calm else "STOP", told)


def _counts(lines: Lines) -> Iterator[Verdict]:
    for name, (state, why) in COUNTS.items():
        n = lines[-1].get(name, 0)
        yield Verdict(name, "ok" if not n else state, f"{n:.0f} {why}" if n else "none")


def _speed(lines: Lines) -> Iterator[Verdict]:
    speeds = [line["samples_per_s"] for line in lines[1:]]  # the first has the warm-up in it
    slow = min(speeds) < SLOWEST * median(speeds)
    told = f"{median(speeds):.4g}, at the slowest {min(speeds):.4g}; compare with v4e plan"
    yield Verdict("samples_per_s", "look" if slow else "ok", told)
    seconds = median((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(lines))
    share = median(line["data_wait_s"] for line in lines) / seconds
    yield Verdict("data_wait_s", "ok" if share < WAIT else "look", f"{share:.2%} of a step of {seconds:.4g} s")


LOOKS: tuple[Callable[[Lines], Iterator[Verdict]], ...] = (_terms, _norms, _counts, _speed)


def _named(lines: Lines, ending: str) -> list[str]:
    return sorted({name for line in lines for name in line if name.endswith(ending)})


def _values(lines: Lines, name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def _ends(values: Sequence[float], middle: Callable[[Sequence[float]], float] = fmean) -> tuple[float, float]:
    """Of the first and of the last third."""
    third = max(1, len(values) // 3)
    return middle(values[:third]), middle(values[-third:])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.curves", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, with its journal.jsonl")
    try:
        found = verdicts(journal.read(parser.parse_args().run))
    except V4EError as error:
        print(f"curves: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(map(str, found)))
    return TrainingError.exit_code if any(v.state == "STOP" for v in found) else 0


if __name__ == "__main__":
    sys.exit(main())
