"""What a training makes of its machine: speed, utilisation, memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from v4e import dist
from v4e.config import Loop
from v4e.dist import Ranks

PEAKS = (  # dense bf16 FLOP/s of one card, by what its name holds; the first that fits
    ("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12),
    ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12),
)  # fmt: skip
GB = 1e9


@dataclass(frozen=True)
class Work:
    """What a step does, for rates; nothing is told of what is 0.

    Args:
        tokens: of one sample, as the student meets them; their mean where sizes are several.
        flops: of the models' own arithmetic in a step, over all ranks; what is computed again is left out.
    """

    tokens: float = 0.0
    flops: float = 0.0


def rates(work: Work, loop: Loop, seconds: float, ranks: Ranks) -> dict[str, float]:
    """Of a step that took so many seconds. ``mfu`` is 1 where every accelerator does its peak's arithmetic."""
    told = {"step_s": seconds, "samples_per_s": loop.batch / seconds}
    if work.tokens:
        told["tokens_per_s"] = loop.batch * work.tokens / seconds
    if work.flops and (most := peak(loop, ranks.device)):
        told["mfu"] = work.flops / seconds / (most * ranks.world)
    return told


def peak(loop: Loop, device: torch.device) -> float:
    """FLOP/s of one accelerator at its best; 0 where nothing is known, as of every CPU."""
    if loop.peak_tflops or device.type != "cuda" or loop.precision != "bf16":
        return loop.peak_tflops * 1e12
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float:
    """Of a card that calls itself so; 0 if it is not known."""
    return next((flops for part, flops in PEAKS if part in name), 0.0)


def memory(ranks: Ranks) -> dict[str, float]:
    """Of the rank that has most, in GB: the accelerator's peak so far, main memory now and at its peak."""
    own = {"host_memory_gb": resident("VmRSS") / GB, "host_memory_peak_gb": resident("VmHWM") / GB}
    if ranks.device.type == "cuda":
        own["memory_gb"] = torch.cuda.max_memory_allocated(ranks.device) / GB
    everyone = dist.gather(own)
    return {name: max(each[name] for each in everyone) for name in own}


def resident(what: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in main memory: now, or at its peak.

    ``getrusage`` would tell the peak of the process that started this one where it was larger: exec keeps it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])
