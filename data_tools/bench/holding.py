"""The most memory that each verb of `v4e-shards` takes, and opening a set, of 1,000, 10,000 and 100,000 edits.

Each runs by its command in a process of its own, over what the one before it made. Pictures are of 16 x 16 pixels, and
the roll-out's models are stood in for by samples of words alone: what a verb holds for each edit or sample is looked
for, not what it holds at once of a picture. Peaks count from when the verb's libraries are there, by ``VmHWM``:
``ru_maxrss`` would be that of the process which started this one, where it was larger.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools import cli
from data_tools.ingest import Triplet
from v4e.data.members import pack
from v4e.data.stream import Stream
from v4e.nouns import Sample

FORMS = (1000, 10_000, 100_000)  # numbers of edits
CODEC = Path(__file__).parents[2] / "v4e" / "assets" / "wan-nano" / "teacher"
UNIT, SHARD, LOOKED_UP = 100, 1000, 1000
COMMANDS: Mapping[str, Sequence[str]] = {
    "ingest": ("ingest", "raw/edits.jsonl", "edits", "--height", "16", "--width", "16"),
    "evolve": ("evolve", "edits"),
    "verify_edits": ("verify", "edits"),
    "rollout": ("rollout", "edits", "set", f"batch={UNIT}", f"samples_per_shard={SHARD}", "wandb.mode=disabled"),
    "verify": ("verify", "set"),
    "stats": ("stats", "set"),
    "filter": ("filter", "set", "tasks=[add]", "--out", "good"),
    "merge": ("merge", "set", "--out", "all"),
    "reshard": ("reshard", "set", "cut", "--samples-per-shard", "700"),
}


def measure(largest: int = FORMS[-1]) -> dict[str, float]:
    """``VERB_peak_mb_N``, and ``VERB_peak_growth``: the peak of the largest list over that of the smallest."""
    forms = [form for form in FORMS if form <= largest]
    found: dict[str, float] = {}
    for form in forms:
        with tempfile.TemporaryDirectory() as folder:
            write_edits(Path(folder) / "raw", form)
            for name in (*COMMANDS, "read"):
                found[f"{name}_peak_mb_{form}"] = _peak(name, Path(folder))
    growth = {n: found[f"{n}_peak_mb_{forms[-1]}"] / found[f"{n}_peak_mb_{forms[0]}"] for n in (*COMMANDS, "read")}
    return {**{f"{name}_peak_growth": round(ratio, 3) for name, ratio in growth.items()}, **found}


def write_edits(folder: Path, edits: int) -> None:
    """A jsonl whose rows share two pictures and have words of their own."""
    folder.mkdir()
    for n, name in enumerate(("before.png", "after.png")):
        draw = np.random.default_rng(n)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
    pair = {"source": "before.png", "edited": "after.png"}
    with open(folder / "edits.jsonl", "w") as file:
        file.writelines(
            json.dumps({"id": f"e{n}", "instruction": f"add boat {n}", **pair}) + "\n" for n in range(edits)
        )


def read(folder: str) -> None:
    """What training does first: open a set, put an epoch in order, look its first samples up."""
    stream = Stream(folder, seed=0, batch=1, micro_batch=1)
    for n in range(LOOKED_UP):
        stream.mixture.name(stream.order[n])


def without_models() -> None:
    """Let roll-outs make samples of words alone."""
    from data_tools.rollout import Worker
    from data_tools.rollout.spool import Made, Unit

    def work(self: Worker, triplets: Sequence[Triplet]) -> Unit:
        samples = [Sample(t.id, t.instruction, t.evolution, None, None, task=t.task) for t in triplets]
        return Unit([Made(sample.key, sample.task, pack(sample)) for sample in samples])

    Worker.work = work


def _peak(name: str, folder: Path) -> float:
    """In MB, of one command in a process of its own."""
    command = [sys.executable, "-m", "data_tools.bench.holding", name]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def _work_of(name: str) -> Callable[[], object]:
    """What is to be measured, its libraries imported."""
    if name == "read":
        return lambda: read("set")
    words = [*COMMANDS[name], *(["--teacher", "none", f"codec={CODEC}"] if name == "rollout" else [])]
    args = cli.parse(words)
    if name == "rollout":
        without_models()
    return lambda: _refuse_failed(args.run(args))


def _refuse_failed(code: int) -> None:
    if code:
        raise SystemExit(code)


def peak_of(work: Callable[[], object]) -> float:
    """MB that this process holds at most while it works."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024, 1)


if __name__ == "__main__":
    print(peak_of(_work_of(sys.argv[1])) if sys.argv[1:] else measure())
