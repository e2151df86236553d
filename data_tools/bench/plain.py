"""A loop over the stock pipeline as a user of diffusers would write it, and what it and ours are both given."""

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
from data_tools.ingest import Triplet, write_triplets
from data_tools.rollout import RolloutConfig
from v4e.config import Wandb
from v4e.data.disk import read_bytes
from v4e.nouns import seed_of

TEACHER = Path(v4e.__file__).parent / "assets/wan-nano/teacher"
FRAMES = 9
SIZE, SMALL = 64, 32  # pixels: the nano teacher's own, 192 tokens; and 48 tokens, where one picture leaves a core idle
TOLERANCE = 1e-4  # of the final latents, whose standard deviation is 1.3: other sums in fp32, over all steps


def settings(steps: int, guidance: float, batch: int) -> RolloutConfig:
    return RolloutConfig(
        teacher=str(TEACHER), teacher_frames=FRAMES, step_counts=(steps,), student_shift=3.0, guidance=guidance,
        batch=batch, samples_per_shard=batch, dtype="fp32", stored="fp32", attention="native", fold_text_padding=True,
        onednn=True, threads=1, wandb=Wandb(mode="disabled"),
    )  # fmt: skip


def load() -> WanImageToVideoPipeline:
    stock = WanImageToVideoPipeline.from_pretrained(str(TEACHER))
    stock.set_progress_bar_config(disable=True)
    return stock


def roll(stock: WanImageToVideoPipeline, triplet: Triplet, size: int, config: RolloutConfig) -> Tensor:
    """What a user of diffusers would write; final latents [C, t, h, w] of the first and last frame, the student's."""
    first, last = (Image.open(BytesIO(read_bytes(path))).convert("RGB") for path in (triplet.source, triplet.edited))
    generator = torch.Generator().manual_seed(seed_of(0, triplet.id, "noise"))
    named = {"height": size, "width": size, "num_frames": FRAMES, "num_inference_steps": config.step_counts[0]}
    pipeline: Any = stock  # its annotations know no images and no outputs
    out = pipeline(
        first, triplet.evolution, "", last_image=last, guidance_scale=config.guidance, generator=generator,
        output_type="latent", **named,
    )  # fmt: skip
    return out.frames[0][:, [0, -1]].float().cpu()


def check(stock: Tensor, ours: Tensor) -> None:
    """Final latents are the same, as far as fp32 tells."""
    worst = float((stock - ours).abs().max())
    assert worst <= TOLERANCE, f"final latents differ by {worst:.2g}, more than {TOLERANCE}"


def triplets(folder: Path, size: int, count: int) -> Sequence[Triplet]:
    """Edits of smooth random pictures, each with a prompt of its own, listed in their folder."""
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        files = folder / f"{i}-source.png", folder / f"{i}-edited.png"
        for path in files:
            coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(path)
        words = f"The sky slowly turns red, while the {i} trees below it stay as they are. The camera is static."
        rows.append(Triplet(f"t{i}", "make the sky red", *files, evolution=words))
    write_triplets(folder, rows)
    return rows
