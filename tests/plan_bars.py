"""The bar of docs/plan.md: predicted against measured peak memory of trainings with over 1 GB of state on this CPU.

    python tests/plan_bars.py [CASE ...]

prints a row for each case and ends with code 1 where a prediction is off by more than 15 %. A case needs up to 4 GB
and, with a core for each rank, about a minute.
"""

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

BAR = 0.15
CASES = {  # name -> ranks, model and settings
    "full, ZeRO-3": (1, "full", ["zero_stage=3"]),
    "full, ZeRO-3, two ranks": (2, "full", ["zero_stage=3"]),
    "full, ZeRO-2, two ranks, no EMA": (2, "full", ["zero_stage=2", "loop.ema=0"]),
    "LoRA on 540M, ZeRO-3": (1, "large", ["zero_stage=3", "fresh=false", "loop.lora.rank=16"]),
    "full, ZeRO-3, optimiser offloaded": (1, "full", ["zero_stage=3", "loop.offload.optimizer=cpu"]),
}
WAN = {
    "num_attention_heads": 12, "attention_head_dim": 64, "in_channels": 36, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 3072, "num_layers": 8, "image_dim": 1280, "added_kv_proj_dim": 768,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}  # fmt: skip
LARGE = WAN | {"num_attention_heads": 24, "added_kv_proj_dim": 1536, "ffn_dim": 6144, "num_layers": 12}
EMPTY = WAN | {"num_attention_heads": 1, "added_kv_proj_dim": 64, "ffn_dim": 64, "num_layers": 1}
MODELS = {"empty": EMPTY, "full": WAN, "large": LARGE}
STEPS = 2  # measured: the second has all states from its beginning; one more is done, which also saves


@dataclass(frozen=True)
class Row:
    """Peaks above an empty run's, in bytes; the measured one is the larger of the ranks'."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        return f"| {self.name} | {self.predicted / 1e9:.2f} | {self.measured / 1e9:.2f} | {self.error:+.1%} |"


def memory(key: str) -> int:
    """``VmRSS`` or its peak ``VmHWM`` of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def store(folder: Path, sizes: dict) -> None:
    """Weights to begin with, for what is not drawn anew."""
    import torch
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in WanTransformer3DModel(**sizes).named_parameters()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "transformer/diffusion_pytorch_model.safetensors")


def settle() -> int:
    """Give back what is free and forget the peak; what is left is what an empty run holds."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def rank(case: str, folder: str) -> None:
    """One rank: an empty run, then the real one; prints what was predicted and measured."""
    import torch

    from v4e import config, plan
    from v4e.data.stream import Slice
    from v4e.nouns import Encoded, Grid, Sample
    from v4e.recipes import pick
    from v4e.train.run import train_recipe

    grid, peaks = Grid(5, 64, 64), []

    def sample(position: int) -> Sample:
        latents, words, vision = torch.randn(16, grid.t, grid.h, grid.w), torch.randn(8, 4096), torch.randn(16, 1280)
        change = torch.ones(grid.t, grid.h, grid.w)
        encoded = Encoded(latents, latents, words, words[:1], vision, words, latents, vision, change)
        return Sample(str(position), "", "", None, None, encoded)

    class Stream:
        quarantined: dict[str, str] = {}

        def __init__(self, rank: int, world: int) -> None:
            self.rank, self.world = rank, world

        def step(self, step: int) -> list[Slice]:
            peaks.append(memory("VmHWM"))
            position = step * self.world + self.rank
            return [Slice((sample(position),), (1.0,), (position,))]

    def recipe(name: str):
        loop = [
            f"loop.steps={STEPS + 1}",
            f"loop.batch={world}",
            "loop.micro_batch=1",
            "loop.threads=1",
            "loop.ema=0.9",
        ]
        place = [f"loop.output={folder}/run_{name}", "loop.wandb.mode=disabled", f"init={folder}/{name}", "fresh=true"]
        settings = [*loop, *place, "fold_text_padding=true", *words]
        last = {word.split("=")[0]: word for word in settings}
        return config.load(None, [*last.values()], pick, recipe="flow_matching")

    world, model, words = CASES[case]
    for name in ("empty", model) if "fresh=false" in words else ():
        store(Path(folder) / name, MODELS[name])
    empty, full = recipe("empty"), recipe(model)
    machine = plan.Machine(ranks=world, fused=False)
    told = plan.planned(full, machine, [plan.Data(grid, grid, 1)])[0]
    predicted = told.peak + sum(told.main.values())  # on this machine both are main memory
    train_recipe(empty, Stream)
    before = settle()
    peaks.clear()
    train_recipe(full, Stream)
    so_far = [peak - before for peak in peaks]  # at the beginning of each step
    print(json.dumps({"predicted": predicted, "measured": so_far[STEPS], "so_far": so_far}))


def measure(case: str) -> Row:
    """All ranks of a case, each a process with one thread."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for name, sizes in MODELS.items():
            (Path(folder) / name / "transformer").mkdir(parents=True)
            (Path(folder) / name / "transformer/config.json").write_text(json.dumps(sizes))
        free.close()
        world = CASES[case][0]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        place |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        place |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed is given back, and does not stay in arenas
        command = [sys.executable, __file__, "--rank-in", folder, case]
        ranks = [
            subprocess.Popen(command, env=os.environ | place | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=-1)
            for i in range(world)
        ]
        told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in ranks]
    print(*told, sep="\n", file=sys.stderr)
    return Row(case, told[0]["predicted"], max(t["measured"] for t in told))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of: {'; '.join(CASES)}")
    parser.add_argument("--rank-in", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_in:
        rank(args.cases[0], args.rank_in)
        return 0
    rows = [measure(case) for case in args.cases or CASES]
    print("| case | predicted, GB | measured, GB | error |\n|---|---|---|---|", *rows, sep="\n")
    return int(any(abs(row.error) > BAR for row in rows))


if __name__ == "__main__":
    sys.exit(main())
