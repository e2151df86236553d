"""Whether a training's memory stays flat: a tiny Wan under ZeRO-3, its averages, journal, checkpoints and shards."""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from data_tools.bench.training import encoded, recipe, shaped
from v4e.data.stream import Slice, Stream
from v4e.train.meter import resident
from v4e.train.run import train_recipe

TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "added_kv_proj_dim": 24, "num_layers": 1}
WARM_UP, EVERY = 500, 10  # steps until caches are full, and between two looks


def measure(steps: int = 2000) -> dict[str, float]:
    """``memory_slope``: by how many MB the process grows in 1,000 steps after the warm-up, a line through its sizes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        init = shaped(folder / "tiny", TINY)
        data = encoded(folder, 256)
        task = recipe(init, folder / "run", data, batch=2, steps=WARM_UP + steps, log_every=10)
        loop = replace(task.loop, ema=0.99, save_every=250)
        watched = Watched(Stream(data, seed=0, batch=loop.batch, micro_batch=loop.micro_batch))
        train_recipe(replace(task, zero_stage=3, fresh=True, loop=loop), lambda rank, world: watched)
    return {"memory_slope": watched.slope()}


@dataclass
class Watched:
    """A stream that looks now and then how large the process is.

    Args:
        sizes: (step, resident MB).
    """

    stream: Stream
    sizes: list[tuple[int, float]] = field(default_factory=list)

    @property
    def quarantined(self) -> dict[str, str]:
        return self.stream.quarantined

    def step(self, step: int) -> list[Slice]:
        if step >= WARM_UP and step % EVERY == 0:
            self.sizes.append((step, resident("VmRSS") / 1e6))
        return self.stream.step(step)

    def slope(self) -> float:
        """MB in 1,000 steps, by least squares."""
        steps, sizes = np.array(self.sizes).T
        return 1000 * float(np.polyfit(steps, sizes, 1)[0])


if __name__ == "__main__":
    print(measure())
