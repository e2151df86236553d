"""`make bench`: every benchmark in its own process, ``runs/bench/report.json``, and the table of docs/benchmarks.md.

A figure has one name that stays. Where it is a ratio, both sides ran in turns, in one process, on this machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from v4e.data.disk import write_atomically
from v4e.errors import ConfigError, TrainingError

PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- BENCH -->", "<!-- /BENCH -->"


@dataclass(frozen=True)
class Figure:
    """What a number is, and its bar: at least ``low``, at most ``high``."""

    about: str
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def bar(self) -> str:
        if self.low is not None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.high is not None else ""


BENCHES = ("rolling", "ingesting", "reading")  # modules beside this one, whose ``measure()`` gives figures by name
FIGURES = {
    "rollout_speedup": Figure("roll-outs a second, against a loop over the stock pipeline", low=4),
    "rollout_dit_share": Figure("share of a roll-out's time inside the DiT's forward", low=0.85),
    "ingest_ratio": Figure("ingest and verify against decoding the same pictures, processor time", low=0.8),
    "ingest_ratio_wall": Figure("the same by the clock"),
    "read_ratio": Figure("shards to training batches against a raw read and parsing, cold cache", low=0.8),
    "read_ratio_warm": Figure("the same from a warm cache"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(BENCHES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--one", choices=BENCHES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_function(args.one)()))
        return 0
    if unknown := [name for name in args.names if name not in BENCHES]:
        raise ConfigError(f"no benchmark is called {unknown[0]!r}", fix=f"choose among {', '.join(BENCHES)}")
    return report(args.names or BENCHES, args.out)


def report(names: tuple[str, ...], out: Path) -> int:
    """Run, add to report.json, print; 1 where a bar does not hold."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    found: dict[str, float] = json.loads(path.read_text())["figures"] if path.is_file() else {}
    for name in names:
        print(f"{name} ...", flush=True)
        found |= _alone(name)
        write_atomically(path, json.dumps({"machine": machine(), "figures": found}, indent=1).encode())
    print(table(found))
    write_atomically(PAGE, with_table(PAGE.read_text(), f"{machine()}\n\n{table(found)}").encode())
    return _failed(found)


def _failed(found: Mapping[str, float]) -> int:
    return int(any(name in FIGURES and not FIGURES[name].holds(value) for name, value in found.items()))


def table(found: Mapping[str, float]) -> str:
    """The figures as Markdown, those with a bar and a meaning first."""
    known = [name for name in FIGURES if name in found]
    lines = ["| figure | value | bar | what it is |", "|---|---|---|---|"]
    for name in [*known, *(name for name in found if name not in FIGURES)]:
        figure = FIGURES.get(name, Figure(""))
        mark = "" if figure.holds(found[name]) else " **not held**"
        lines.append(f"| `{name}` | {found[name]:g}{mark} | {figure.bar} | {figure.about} |")
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """The page with its part between the two marks replaced."""
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


def machine() -> str:
    """What it was measured on."""
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.split(":", 1)[1].strip() for line in told if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _alone(name: str) -> dict[str, float]:
    """A benchmark in a fresh process of one thread."""
    command = [sys.executable, "-m", "data_tools.bench", "--one", name]
    done = subprocess.run(["env", "OMP_NUM_THREADS=1", *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"the benchmark ended with exit code {done.returncode}", where=name, fix="see above")
    return json.loads(done.stdout.splitlines()[-1])


def _function(name: str) -> Callable[[], dict[str, float]]:
    return import_module(f"data_tools.bench.{name}").measure


if __name__ == "__main__":
    sys.exit(main())
