"""Roll-outs against a plain loop over the stock pipeline: same teacher, images, prompts, noise, steps and guidance.

The stock loop makes final latents alone; ours also makes what a student is told, and writes it to the disk. They meet
twice: on the whole machine (:mod:`data_tools.bench.ranks`), and here side by side on one thread, by processor time.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from data_tools.bench import plain, ranks
from data_tools.bench.clock import Clock
from data_tools.rollout import RolloutConfig, Worker
from data_tools.rollout.plan import Plan
from data_tools.rollout.spool import Spool, Unit
from v4e.data.members import unpack
from v4e.journal import progress


def measure(
    steps: int = 50, guidance: float = 5.0, batch: int = 16, rounds: int = 2, units: int = 3
) -> dict[str, float | list[float]]:
    """``rollout_speedup`` of the machine, and of one thread with ``rollout_dit_share``; the latter two also at 32 x 32.

    Args:
        steps, guidance: by default those of the stock pipeline.
        rounds: a unit of ours and two samples of stock's alternate so many times; each gives a ratio.
        units: of each rank of the machine, the first one to warm up.

    Raises:
        AssertionError: the final latents differ.
    """
    torch.set_num_threads(1)
    config = plain.settings(steps, guidance, batch)
    found: dict[str, float | list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("", plain.SIZE), ("_32", plain.SMALL)):
            ours = _Ours(Path(folder) / f"{size}", size, rounds + 1, config)
            ratios, share = _alternate(ours, rounds)
            found |= {f"rollout_speedup_one_thread{name}": ratios, f"rollout_dit_share{name}": share}
    return {"rollout_speedup": ranks.speedups(config, units)} | found


def _alternate(ours: "_Ours", rounds: int) -> tuple[list[float], float]:
    """How many of ours are made while stock makes one, by round; and the share of our time in the DiT's forward."""
    stock = plain.load()
    batch, once, unit, dit = ours.config.batch, Clock(), Clock(), Clock()
    ours.unit(rounds)  # a rehearsal, so that nothing is measured twice
    backbone = ours.worker.models.teacher.backbone
    backbone.forward = dit.around(backbone.forward)
    for number in progress(range(rounds), f"rolling, {ours.size} x {ours.size}"):
        ends = unit.around(ours.unit)(number)
        for i in (0, batch - 1):
            plain.check(once.around(plain.roll)(stock, ours.plan.unit(number)[i], ours.size, ours.config), ends[i])
    pairs = zip(once.laps[::2], once.laps[1::2], unit.laps, strict=True)
    return [(first + last) / 2 / (lap / batch) for first, last, lap in pairs], dit.spent / unit.spent


class _Ours:
    """The road of `v4e-shards rollout`, a unit at a time."""

    def __init__(self, folder: Path, size: int, units: int, config: RolloutConfig) -> None:
        folder.mkdir()
        self.size, self.config = size, config
        self.worker = Worker.load(config, (size, size))
        self.plan = Plan(plain.triplets(folder, size, units * config.batch), config.batch, 1)
        self.spool = Spool(folder / "set", self.plan, self.worker.meta, torch.float32)

    def unit(self, number: int) -> list[Tensor]:
        """The final latents of a unit that is written."""
        done = self.worker.work(self.plan.unit(number))
        self.spool.save(number, done)
        return _ends(done)


def _ends(unit: Unit) -> list[Tensor]:
    samples = [unpack(made.key, made.members, made.key) for made in unit.made]
    return [sample.rollout.end_Cthw for sample in samples if sample.rollout]


if __name__ == "__main__":
    print(measure())
