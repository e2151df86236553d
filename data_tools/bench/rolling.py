"""Roll-outs against a plain loop over the stock pipeline: same teacher, images, prompts, noise, steps and guidance.

The stock loop makes final latents alone; ours also makes what a student is told, and writes it to the disk.
"""

import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

import v4e
from data_tools.bench.clock import Clock
from data_tools.ingest import Triplet
from data_tools.rollout import RolloutConfig, Worker
from data_tools.rollout.plan import Plan
from data_tools.rollout.spool import Spool, Unit
from v4e.config import Wandb
from v4e.data.disk import read_bytes
from v4e.data.members import unpack
from v4e.journal import progress
from v4e.nouns import seed_of

TEACHER = Path(v4e.__file__).parent / "assets/wan-nano/teacher"
FRAMES = 9
SIZES = {"": 64, "_32": 32}  # the nano teacher's own, 192 tokens; and one of 48, where one picture leaves a core idle
TOLERANCE = 1e-4  # of the final latents, whose standard deviation is 1.3: other sums in fp32, over all steps


def measure(steps: int = 50, guidance: float = 5.0, batch: int = 16, rounds: int = 2) -> dict[str, float | list[float]]:
    """``rollout_speedup`` and ``rollout_dit_share`` at the nano teacher's size, and the speed-up at a smaller one.

    Args:
        steps, guidance: by default those of the stock pipeline.
        rounds: a unit of ours and two samples of stock's alternate so many times; each gives a ratio.

    Raises:
        AssertionError: the final latents differ.
    """
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            ours = _Ours(Path(folder) / f"{size}", size, rounds + 1, steps, guidance, batch)
            ratios, share = _alternate(ours, rounds)
            found |= {f"rollout_speedup{name}": ratios, f"rollout_dit_share{name}": share}
    return found


def _alternate(ours: "_Ours", rounds: int) -> tuple[list[float], float]:
    """How many of ours are made while stock makes one, by round; and the share of our time in the DiT's forward."""
    stock = WanImageToVideoPipeline.from_pretrained(str(TEACHER)).to(ours.worker.models.device)
    stock.set_progress_bar_config(disable=True)
    batch, once, unit, dit = ours.config.batch, Clock(), Clock(), Clock()
    ours.unit(rounds)  # a rehearsal, so that nothing is measured twice
    backbone = ours.worker.models.teacher.backbone
    backbone.forward = dit.around(backbone.forward)
    for number in progress(range(rounds), f"rolling, {ours.size} x {ours.size}"):
        ends = unit.around(ours.unit)(number)
        for i in (0, batch - 1):
            plain = once.around(_plain)(stock, ours.plan.unit(number)[i], ours.size, ours.config)
            worst = float((plain[:, ours.frames] - ends[i]).abs().max())
            assert worst <= TOLERANCE, f"final latents differ by {worst:.2g}, more than {TOLERANCE}"
    pairs = zip(once.laps[::2], once.laps[1::2], unit.laps, strict=True)
    return [(first + last) / 2 / (lap / batch) for first, last, lap in pairs], dit.spent / unit.spent


class _Ours:
    """The road of `v4e-shards rollout`, a unit at a time."""

    def __init__(self, folder: Path, size: int, units: int, steps: int, guidance: float, batch: int) -> None:
        folder.mkdir()
        self.size = size
        self.config = RolloutConfig(
            teacher=str(TEACHER), teacher_frames=FRAMES, step_counts=(steps,), student_shift=3.0, guidance=guidance,
            batch=batch, dtype="fp32", stored="fp32", attention="native", fold_text_padding=True, threads=1,
            wandb=Wandb(mode="disabled"),
        )  # fmt: skip
        self.worker = Worker.load(self.config, (size, size))
        self.plan = Plan(_triplets(folder, size, units * batch), batch, 1)
        self.spool = Spool(folder / "set", self.plan, self.worker.meta, torch.float32)
        self.frames = list(self.worker.grids.teacher.shared_frames(self.worker.grids.student))

    def unit(self, number: int) -> list[Tensor]:
        """The final latents of a unit that is written."""
        done = self.worker.work(self.plan.unit(number))
        self.spool.save(number, done)
        return _ends(done)


def _ends(unit: Unit) -> list[Tensor]:
    samples = [unpack(made.key, made.members, made.key) for made in unit.made]
    return [sample.rollout.end_Cthw for sample in samples if sample.rollout]


def _plain(stock: WanImageToVideoPipeline, triplet: Triplet, size: int, config: RolloutConfig) -> Tensor:
    """What a user of diffusers would write; final latents [C, t, h, w]."""
    first, last = (Image.open(BytesIO(read_bytes(path))).convert("RGB") for path in (triplet.source, triplet.edited))
    generator = torch.Generator().manual_seed(seed_of(0, triplet.id, "noise"))
    named = {"height": size, "width": size, "num_frames": FRAMES, "num_inference_steps": config.step_counts[0]}
    pipeline: Any = stock  # its annotations know no images and no outputs
    out = pipeline(
        first, triplet.evolution, "", last_image=last, guidance_scale=config.guidance, generator=generator,
        output_type="latent", **named,
    )  # fmt: skip
    return out.frames[0].float().cpu()


def _triplets(folder: Path, size: int, count: int) -> Sequence[Triplet]:
    """Edits of smooth random pictures, each with a prompt of its own."""
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        files = folder / f"{i}-source.png", folder / f"{i}-edited.png"
        for path in files:
            coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(path)
        words = f"The sky slowly turns red, while the {i} trees below it stay as they are. The camera is static."
        rows.append(Triplet(f"t{i}", "make the sky red", *files, evolution=words))
    return rows


if __name__ == "__main__":
    print(measure())
