"""Roll-outs of the whole machine by the clock, both sides as a user runs them and without their start.

Stock diffusers is one process, in which torch takes as many threads as it likes; `v4e-shards rollout` is a rank of one
thread on every core.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.bench import plain
from data_tools.ingest import read_triplets
from data_tools.rollout import RolloutConfig
from v4e import config as settings_of
from v4e.data.shards import ShardSet

SAMPLES = 2  # that stock makes at a time
SETTINGS, LATENTS = "rollout.yaml", "stock.safetensors"


class Loop(NamedTuple):
    """A loop over the stock pipeline: seconds of each roll-out, and final latents [N, C, t, h, w]."""

    laps: list[float]
    ends: Tensor


def speedups(config: RolloutConfig, units: int) -> list[float]:
    """How many roll-outs the machine makes while stock makes one, by each of stock's, before and after ours."""
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), cores()
        plain.triplets(folder, plain.SIZE, units * count * config.batch)
        before = stock(folder, config)
        rate, ends = ours(folder, config, count)
        after = stock(folder, config)
    for each in (before, after):
        plain.check(each.ends, ends[: len(each.ends)])
    return [lap * rate for lap in (*before.laps, *after.laps)]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def stock(folder: Path, config: RolloutConfig) -> Loop:
    """The folder's first triplets by stock, in a process of its own."""
    (folder / SETTINGS).write_text(settings_of.to_yaml(config))
    command = ["env", "-u", "OMP_NUM_THREADS", sys.executable, "-m", "data_tools.bench.ranks", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Loop(json.loads(done.stdout.splitlines()[-1]), load_file(folder / LATENTS)["ends"])


def _loop(folder: Path) -> list[float]:
    config = settings_of.load(folder / SETTINGS, [], lambda _: RolloutConfig, recipe="rollout")
    pipeline, rows, laps, ends = plain.load(), read_triplets(folder)[: SAMPLES + 1], [], []
    for row in [rows[-1], *rows[:-1]]:  # the first one warms up
        began = time.perf_counter()
        ends.append(plain.roll(pipeline, row, plain.SIZE, config))
        laps.append(time.perf_counter() - began)
    save_file({"ends": torch.stack(ends[1:])}, folder / LATENTS)
    return laps[1:]


def ours(folder: Path, config: RolloutConfig, ranks: int) -> tuple[float, Tensor]:
    """Roll-outs a second of so many ranks, and the final latents of all triplets in their order."""
    command = [sys.executable, "-m", "data_tools.cli", "rollout", str(folder), str(folder / "set")]
    command += ["--config", str(folder / SETTINGS), "--part"]
    running = [subprocess.Popen([*command, f"{i}/{ranks}"], stdout=subprocess.DEVNULL) for i in range(ranks)]
    codes = [process.wait() for process in running]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes), command)
    made = ShardSet.open(folder / "set")
    stamps = [(folder / "set" / shard.name).stat().st_mtime for shard in made.shards]
    ends = (made.sample(i).rollout for i in range(len(made)))
    return rate(stamps, ranks, config.batch), torch.stack([end.end_Cthw for end in ends if end])


def rate(stamps: Sequence[float], ranks: int, batch: int) -> float:
    """Roll-outs a second, from when units of ``batch`` were finished.

    The first unit of each rank holds its start; from their mean on the machine counts as at work until all is done,
    so that a rank which waits for another in the end counts too.
    """
    stamps = sorted(stamps)
    return (len(stamps) - ranks) * batch / (stamps[-1] - fmean(stamps[:ranks]))


if __name__ == "__main__":
    print(json.dumps(_loop(Path(sys.argv[1]))))
