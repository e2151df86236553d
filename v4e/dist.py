"""Ranks: the only file that knows rank, world size, environment variables and barriers.

A job is started by the ``deepspeed`` launcher, which tells each rank its place through environment variables, or
by hand, which makes it a job of one rank. Either way there is a process group, so no caller asks whether there is one.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist

from v4e.errors import ConfigError

Small = TypeVar("Small")
PATIENCE = timedelta(hours=2)  # a rank may wait while another draws a sheet or writes 100 GB


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Args:
        rank, world: place among all processes and their number.
        local_rank: place among those of this machine; names its accelerator.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and talks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def start(threads: int = 0) -> Ranks:
    """Join the job until the process ends; a second call only says where this process stands.

    Args:
        threads: CPU threads of this rank; 0 shares the machine's cores among its ranks.

    Raises:
        ConfigError: the launcher's variables contradict each other.
    """
    ranks = _from_environment()
    torch.set_num_threads(threads or max(1, _cores() // _local_world(ranks)))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if not torch_dist.is_initialized():
        _join(ranks)
        atexit.register(_leave)
    return ranks


def barrier() -> None:
    """Wait for every rank."""
    torch_dist.barrier()


def share(value: Small) -> Small:
    """Rank 0's small value on every rank."""
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Small) -> list[Small]:
    """Every rank's small value on every rank, in rank order."""
    box: list[Small] = [value] * torch_dist.get_world_size()
    torch_dist.all_gather_object(box, value)
    return box


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over the ranks, in fp64."""
    if torch_dist.get_world_size() == 1:
        return [float(v) for v in values]
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch_dist.all_reduce(sums)
    return sums.tolist()


def _from_environment() -> Ranks:
    """What the launcher said; one rank where nobody launched anything."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if missing := [n for n in names if n not in os.environ]:
        if "RANK" in os.environ:
            raise ConfigError(f"RANK is set but not {', '.join(missing)}", fix="start with launch/one_node.sh")
        return Ranks()
    rank, world, local = (int(os.environ[n]) for n in names)
    return Ranks(rank, world, local)


def _join(ranks: Ranks) -> None:
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        torch_dist.init_process_group(backend, timeout=PATIENCE)
        return
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's engine insists on it
    torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)


def _leave() -> None:
    """Threads of a process group that is still open may abort the interpreter's exit.

    Not earlier than that: DeepSpeed keeps the groups it made and hands them to the next engine of this process.
    """
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_world(ranks: Ranks) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ranks.world)))
