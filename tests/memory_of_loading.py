"""What loading a checkpoint into ZeRO-3 ranks costs each of them in host memory.

``PYTHONPATH=. python tests/memory_of_loading.py FOLDER`` writes a synthetic checkpoint of 1.5 GB under its authors'
names, loads it into 4 ranks, and does the same with a model of next to nothing. The bar is model / ranks + 300 MB +
what the empty run takes; the exit code is 1 where a rank is above it.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from v4e import dist
from v4e.config import Loop
from v4e.models.original import save_original
from v4e.models.wan import declare
from v4e.nouns import Player
from v4e.train.engines import cast

RANKS, ALLOWANCE_MB = 4, 300.0
MB = 1e6
EMPTY = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "ffn_dim": 128,
    "num_layers": 1,
    "image_dim": 1280,
    "added_kv_proj_dim": 128,
}
WHOLE = EMPTY | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 7, "added_kv_proj_dim": 1536}


def synthetic(folder: Path, config: Mapping[str, object]) -> Path:
    """Write a checkpoint whose tensor number i is full of i."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = declare(folder).build()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    save_original(folder, config, {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())})
    return folder


def load(folder: Path) -> None:
    """One rank: load, check that every part arrived, and write down what it took."""
    ranks = dist.start(1)
    player = Player("teacher", *declare(folder, attention="native"), zero_stage=3)
    module = cast([player], Loop(precision="fp32", batch=RANKS, micro_batch=1), ranks).roles["teacher"].module
    for i, (name, p) in enumerate(module.named_parameters()):
        part = p.ds_tensor.narrow(0, 0, min(p.ds_tensor.numel(), max(0, p.ds_numel - ranks.rank * p.ds_tensor.numel())))
        assert (part == i).all(), name
    (folder / f"rank_{ranks.rank}.json").write_text(json.dumps(memory()))


def memory() -> dict[str, float]:
    """MB of this process: at most (VmHWM), and now: all, its own, and of files."""
    words = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    asked = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:")
    return {w[0][:-1]: int(w[1]) * 1024 / MB for w in words if w and w[0] in asked}


def measured(folder: Path) -> list[dict[str, float]]:
    """Load in ranks of their own processes."""
    port = str(random.SystemRandom().randrange(20000, 40000))
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--rank", str(folder)]
    environments = [os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(RANKS)]
    running = [subprocess.Popen(command, env=environment) for environment in environments]
    if [process for process in running if process.wait()]:
        raise SystemExit("a rank failed")
    return [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(RANKS)]


def main(folder: Path) -> int:
    empty = measured(synthetic(folder / "empty", EMPTY))
    source = synthetic(folder / "whole", WHOLE)
    model = sum(file.stat().st_size for file in source.glob("*.safetensors")) / MB
    bar = model / RANKS + ALLOWANCE_MB
    print(f"model {model:.0f} MB; a rank may take {model / RANKS:.0f} + {ALLOWANCE_MB:.0f} MB more than when empty")
    above = [r["VmHWM"] - e["VmHWM"] for r, e in zip(measured(source), empty, strict=True)]
    for rank, (more, e) in enumerate(zip(above, empty, strict=True)):
        now = json.loads((source / f"rank_{rank}.json").read_text())
        rest = ", ".join(f"{word} {value:.0f}" for word, value in now.items())
        print(f"rank {rank}: empty {e['VmHWM']:.0f} MB, {more:.0f} MB more ({rest})")
    return int(max(above) > bar)


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        load(Path(sys.argv[2]))
    else:
        sys.exit(main(Path(sys.argv[1])))
