"""What training waits for its data: `v4e train` on wan-nano over roll-outs that no cache holds, by the clock."""

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from data_tools.bench.reading import _forget, fixture
from data_tools.bench.training import NANO, recipe
from v4e import journal
from v4e.data.stream import Stream
from v4e.train.run import train_recipe

BATCH = 16


def measure(steps: int = 60) -> dict[str, float]:
    """``data_wait``: its share of a step, as the run's own journal tells it, after the first line of ten steps."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = fixture(folder / "data", BATCH * steps)
        for path in (folder / "data").iterdir():
            _forget(path)
        task = replace(recipe(NANO, folder / "run", shards, batch=BATCH, steps=steps, log_every=10), zero_stage=0)
        stream = Stream(shards, seed=0, batch=BATCH, micro_batch=BATCH)
        train_recipe(task, lambda rank, world: stream)
        lines = journal.read(folder / "run")[1:]
    waited, step = fmean(x["data_wait_s"] for x in lines), fmean(BATCH / x["samples_per_s"] for x in lines)
    return {"data_wait": waited / step}


if __name__ == "__main__":
    print(measure())
