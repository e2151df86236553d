"""An edit by stock diffusers alone: this script never imports v4e.

    python tests/stock_edit.py MODEL PHOTO INSTRUCTION OUT [--lora FOLDER] [--lora-file NAME] [--solver FOLDER]
                                [--seed N] [--steps N]

MODEL is a folder in diffusers layout, such as ``v4e export`` writes, and with ``--lora`` the base of the adapters. OUT
is the edit, or with ``.npy`` all frames as floats in [0, 1], [T, H, W, 3]. Sizes come from the export's ``v4e.json``.
``--solver`` takes size and solver of an export, and no adapters.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image


def open_pipeline(model: str, lora: str | None = None, lora_file: str | None = None, solver: str | None = None):
    """A stock pipeline; with adapters, their base, loaded with them and their solver."""
    pipe = WanImageToVideoPipeline.from_pretrained(model, dtype=torch.float32)
    if lora:
        pipe.load_lora_weights(lora, weight_name=lora_file)
    if lora or solver:
        pipe.scheduler = UniPCMultistepScheduler.from_pretrained(lora or solver, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, card: dict, photo: Image.Image, instruction: str, steps: int | None, seed: int) -> np.ndarray:
    """All frames [T, H, W, 3] in [0, 1]; the edit is the last one. The photograph must have the model's size."""
    height, width = photo.height, photo.width
    if [height, width] not in card["sizes"]:
        raise SystemExit(
            f"{width} x {height} is no size of this model; resize the photograph to one of {card['sizes']}"
        )
    return pipe(
        photo,
        instruction,
        height=height,
        width=width,
        num_frames=card["frames"],
        num_inference_steps=steps or card["steps"],
        guidance_scale=card["guidance"],
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="An edit by stock diffusers.")
    for name in ("model", "photo", "instruction", "out"):
        parser.add_argument(name)
    for name in ("--lora", "--lora-file", "--solver"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    card = json.loads((Path(args.lora or args.solver or args.model) / "v4e.json").read_text())
    pipe = open_pipeline(args.model, args.lora, args.lora_file, args.solver)
    frames = edit(pipe, card, Image.open(args.photo).convert("RGB"), args.instruction, args.steps, args.seed)
    if args.out.endswith(".npy"):
        np.save(args.out, frames)
    else:
        Image.fromarray((frames[-1] * 255).round().astype(np.uint8)).save(args.out)


if __name__ == "__main__":
    main()
