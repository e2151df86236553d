"""Ranks: the only file that knows rank, world size, environment variables and barriers.

A job is started by the ``deepspeed`` launcher, which tells each rank its place through environment variables, or
by hand, which makes it a job of one rank. Either way there is a process group, so no caller asks whether there is one.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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


@dataclass(frozen=True)
class Team:
    """Ranks that work on one thing in step. Without a mesh it is a team of one.

    Args:
        leads: whether this rank decides, reads and writes for all.
        leader: its rank in the job.
        mesh: dimensions ``ring`` (1) and ``ulysses`` (the team), as diffusers' context parallelism wants them.
    """

    leads: bool = True
    leader: int = 0
    mesh: DeviceMesh | None = None

    def follow(self, value: Small) -> Small:
        """The leader's value on every rank of the team."""
        box = [value]
        if self.mesh is not None:
            torch_dist.broadcast_object_list(box, src=self.leader, group=self.mesh["ulysses"].get_group())
        return box[0]

    def in_step(self, turns: Callable[[], Iterator[int]]) -> Iterator[int]:
        """The leader's turns, numbers from 0, on every rank of the team."""
        own = turns() if self.leads else iter(())
        while (turn := self.follow(next(own, -1))) >= 0:
            yield turn


ALONE = Team()


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


def place() -> Ranks:
    """Where this process stands among those that share independent work, without joining them.

    Ranks are the launcher's, or Slurm's tasks. The jobs of a Slurm array count as one: each adds its ranks.

    Raises:
        ConfigError: the variables contradict each other.
    """
    ranks = _from_environment() if "RANK" in os.environ else _slurm_tasks()
    number, jobs = _slurm_array()
    return Ranks(number * ranks.world + ranks.rank, jobs * ranks.world, ranks.local_rank)


def team(size: int) -> Team:
    """The team of this rank, of ``size`` consecutive ranks; joins the launcher's job.

    Raises:
        ConfigError: the job's ranks do not divide into such teams.
    """
    ranks = start()
    if ranks.world % size:
        raise ConfigError(f"{ranks.world} ranks are no teams of {size}", fix=f"start a multiple of {size} ranks")
    shape, names = (ranks.world // size, 1, size), ("team", "ring", "ulysses")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)["ring", "ulysses"]
    leader = ranks.rank - ranks.rank % size
    return Team(ranks.rank == leader, leader, mesh)


def secret(variable: str) -> str:
    """What an environment variable holds; secrets come that way alone, and are shown nowhere.

    Raises:
        ConfigError: it is not set.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(f"the environment variable {variable} is not set", fix=f"export {variable}=...")
    return value


def malloc_is_told() -> bool:
    """Whether the environment sets glibc's malloc up."""
    return "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)


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


def side_store(ranks: Ranks) -> torch_dist.TCPStore:
    """A store beside the process group's own, kept by rank 0, for what is said while collectives wait."""
    host = os.environ["MASTER_ADDR"]
    own = torch_dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if ranks.is_main else None
    port = share(own.port if own else 0)
    return own or torch_dist.TCPStore(host, port, is_master=False)


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


def _slurm_tasks() -> Ranks:
    """What `srun` said; one rank where nobody launched anything."""
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return Ranks(*(int(os.environ[n]) for n in names)) if all(n in os.environ for n in names) else Ranks()


def _slurm_array() -> tuple[int, int]:
    """This job's number in its Slurm array, from 0, and how many jobs that has; a job by itself is the only one."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    task, first, step, jobs = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
    )
    number = (task - first) // step
    if not 0 <= number < jobs:
        fix = "number it without gaps, as in --array=0-7"
        raise ConfigError(f"task {task} is not one of a regular array of {jobs} jobs", where="Slurm", fix=fix)
    return number, jobs


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
