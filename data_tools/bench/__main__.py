"""`make bench`: every benchmark in its own process, ``runs/bench/report.json``, and the table of docs/benchmarks.md.

The page is written once the report has every figure.

A figure has one name that stays. Where it is a ratio, both sides ran in turns, in one process, on this machine; of
repetitions the median counts, and the table tells the lowest and the highest.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median

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


@dataclass(frozen=True)
class Bench:
    """A module beside this one, whose ``measure()`` gives figures by name: numbers, or one of each repetition.

    Args:
        seconds: it takes about so long on two quiet cores; what the time to go is told from.
        quick: arguments for a look whether it works, whose figures are not kept.
    """

    seconds: int
    quick: Mapping[str, int]


BENCHES = {
    "rolling": Bench(240, {"steps": 8, "rounds": 1, "batch": 4, "units": 2}),
    "editing": Bench(420, {"turns": 1, "edits": 1, "video_steps": 4}),
    "training": Bench(330, {"blocks": 4}),
    "feeding": Bench(60, {"steps": 30}),
    "lasting": Bench(200, {"steps": 100}),
    "ingesting": Bench(150, {"edits": 12, "turns": 1}),
    "holding": Bench(400, {"largest": 1000}),
    "reading": Bench(150, {"samples": 200, "rounds": 1, "largest": 10_000, "steps": 100}),
}
FIGURES = {
    "rollout_speedup": Figure("roll-outs a second of all cores, against a loop over the stock pipeline", low=4),
    "rollout_dit_share": Figure("share of a roll-out's time inside the DiT's forward", low=0.85),
    "rollout_speedup_one_thread": Figure("both on one thread, processor time"),
    "rollout_speedup_one_thread_32": Figure("the same at 32 x 32 pixels, 48 tokens"),
    "rollout_dit_share_32": Figure("the share there"),
    "edit_speedup_same_grid": Figure("denoising of a 4-step edit against 50 guided steps, both of 5 frames", low=24),
    "edit_speedup_81_frames": Figure("the same against 50 guided steps of 81 frames", low=255),
    "edit_end_to_end_same_grid": Figure("the same as `edit_speedup_same_grid`, from file to file"),
    "edit_end_to_end_81_frames": Figure("the same as `edit_speedup_81_frames`, from file to file"),
    "edit_ms_total": Figure("milliseconds of that edit from file to file, of which"),
    "edit_ms_files": Figure("... reading the photograph, scaling the result up, writing it"),
    "edit_ms_text": Figure("... the text encoder"),
    "edit_ms_look": Figure("... the image encoder"),
    "edit_ms_encode": Figure("... the VAE's encoder"),
    "edit_ms_denoise": Figure("... the DiT and the solver"),
    "edit_ms_decode": Figure("... the VAE's decoder"),
    "edit_ms_model": Figure("... all else of the pipeline"),
    "loop_overhead": Figure("a training step without ZeRO against a bare PyTorch loop's, processor time", high=1.05),
    "loop_overhead_wall": Figure("the same by the clock"),
    "zero3_overhead": Figure("the same under ZeRO-3, of a Wan of 112M parameters, processor time", high=1.15),
    "zero3_overhead_wall": Figure("the same by the clock"),
    "data_wait": Figure("share of a training step that waits for data, cold cache", high=0.02),
    "memory_slope": Figure("MB a training process grows by in 1,000 steps", high=1),
    "ingest_ratio": Figure("ingest and verify against decoding the same pictures, processor time", low=0.8),
    "ingest_ratio_wall": Figure("the same by the clock"),
    "read_ratio": Figure("shards to batches against a raw read and parsing, cold cache, by the clock", low=0.8),
    "read_ratio_cpu": Figure("the same, processor time"),
    "read_ratio_threads": Figure("the same by the clock, where the raw read has as many threads"),
    "read_ratio_warm": Figure("the same from a warm cache, by the clock"),
    "read_ratio_warm_cpu": Figure("... processor time"),
    "read_ratio_warm_threads": Figure("... by the clock, where the raw read has as many threads"),
    "open_s": Figure("processor seconds to open a set of 1,000,000 samples in 10,000 shards", high=2),
    "permute_s": Figure("... to put an epoch of it in order"),
    "seek_us": Figure("... and microseconds to find any sample of that order"),
    **{
        f"{name}_peak_growth": Figure(f"peak memory of {what}, for 100,000 edits over 1,000", high=1.25)
        for name, what in {
            "ingest": "ingest",
            "evolve": "evolve",
            "verify_edits": "verify of edits",
            "rollout": "a rank of a roll-out, its models stood in for",
            "verify": "verify of shards",
            "stats": "stats",
            "filter": "filter",
            "merge": "merge",
            "reshard": "reshard",
            "read": "opening shards and an epoch's order",
        }.items()
    },
    "loader_memory_slope": Figure("MB that reading and batching grow by in 1,000 steps, over 2,000", high=1),
}
Found = Mapping[str, float | list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(BENCHES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--quick", action="store_true", help="see that all of them work, and keep nothing")
    parser.add_argument("--one", choices=BENCHES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_function(args.one)(**(BENCHES[args.one].quick if args.quick else {}))))
        return 0
    if unknown := [name for name in args.names if name not in BENCHES]:
        raise ConfigError(f"no benchmark is called {unknown[0]!r}", fix=f"choose among {', '.join(BENCHES)}")
    names = args.names or list(BENCHES)
    return look(names) if args.quick else report(names, args.out)


def look(names: Sequence[str]) -> int:
    """Whether the benchmarks work; their figures say little."""
    for name in names:
        print(table(_alone(name, quick=True)))
    return 0


def report(names: Sequence[str], out: Path) -> int:
    """Run, add to report.json, print, and renew the page where all figures are there; 1 where a bar does not hold."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.json"
    found: dict[str, float | list[float]] = json.loads(path.read_text()).get("laps", {}) if path.is_file() else {}
    for place, name in enumerate(names):
        left = sum(BENCHES[other].seconds for other in names[place:])
        print(f"{name} ({place + 1} of {len(names)}), about {left // 60 + 1} minutes to go", flush=True)
        found |= _alone(name)
        write_atomically(path, json.dumps(_told(found), indent=1).encode())
    print(table(found))
    if found.keys() >= FIGURES.keys():  # a few alone would take the other rows off the page
        write_atomically(PAGE, with_table(PAGE.read_text(), f"{machine()}\n\n{table(found)}").encode())
    return _failed(found)


def _told(found: Found) -> dict[str, object]:
    """The report: figures by their stable names, and what each repetition gave."""
    figures = {name: value_of(laps) for name, laps in found.items()}
    return {"machine": machine(), "figures": figures, "laps": found}


def value_of(laps: float | list[float]) -> float:
    """A figure: the number, or the median of its repetitions."""
    return median(laps) if isinstance(laps, list) else laps


def _failed(found: Found) -> int:
    return int(any(name in FIGURES and not FIGURES[name].holds(value_of(laps)) for name, laps in found.items()))


def table(found: Found) -> str:
    """The figures that have a meaning, as Markdown; what they are made of is in the report alone."""
    lines = ["| figure | value | from .. to | bar | what it is |", "|---|---|---|---|---|"]
    for name, figure in ((n, f) for n, f in FIGURES.items() if n in found):
        laps = found[name]
        mark = "" if figure.holds(value_of(laps)) else " **not held**"
        spread = f"{min(laps):.4g} .. {max(laps):.4g}" if isinstance(laps, list) else ""
        lines.append(f"| `{name}` | {value_of(laps):.4g}{mark} | {spread} | {figure.bar} | {figure.about} |")
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


def _alone(name: str, quick: bool = False) -> Found:
    """A benchmark in a fresh process of one thread."""
    command = [sys.executable, "-m", "data_tools.bench", "--one", name, *(["--quick"] if quick else [])]
    done = subprocess.run(["env", "OMP_NUM_THREADS=1", *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"the benchmark ended with exit code {done.returncode}", where=name, fix="see above")
    return json.loads(done.stdout.splitlines()[-1])


def _function(name: str) -> Callable[..., Found]:
    return import_module(f"data_tools.bench.{name}").measure


if __name__ == "__main__":
    sys.exit(main())
