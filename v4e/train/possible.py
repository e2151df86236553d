"""What DeepSpeed cannot do, or would do wrongly without a word: named before anything is built."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from v4e.config import Loop
from v4e.dist import Ranks
from v4e.errors import ConfigError
from v4e.nouns import Player
from v4e.train.operators import fault
from v4e.train.optimisers import eight_bit


def refuse(player: Player, stage: int, loop: Loop, ranks: Ranks) -> None:
    """Complain of the first setting that this player cannot have.

    Raises:
        ConfigError: naming it and what could be set instead.
    """
    where = f"player {player.name}"
    for what, key, fix in _complaints(player, stage, loop, ranks):
        raise ConfigError(what, where=f"{where}, {key}", fix=fix)


Complaint = tuple[str, str, str]  # what is wrong, the key, what to do


def _complaints(player: Player, stage: int, loop: Loop, ranks: Ranks) -> Iterator[Complaint]:
    yield from _of_optimiser(player, stage, loop)
    yield from _of_offload(player, stage, loop)
    yield from _of_disk(loop)
    yield from _of_compiling(stage, loop, ranks)


def _of_optimiser(player: Player, stage: int, loop: Loop) -> Iterator[Complaint]:
    name = player.optim.name
    if player.trains and name == "muon" and stage and loop.clip:
        what = f"ZeRO stage {stage} clips Muon's orthogonalised update: clip {loop.clip} would shrink it to nothing"
        yield what, "optim", "set loop.clip=0, or zero_stage=0"
    if player.trains and name == "adamw8bit":
        eight_bit()


def _of_offload(player: Player, stage: int, loop: Loop) -> Iterator[Complaint]:
    away = loop.offload
    if away.parameters != "none" and stage != 3:
        yield f"ZeRO stage {stage} keeps whole weights on every rank", "loop.offload.parameters", "set zero_stage=3"
    if not player.trains or away.optimizer == "none":
        return
    key = "loop.offload.optimizer"
    if stage == 0:
        yield "without ZeRO the optimiser stays where the weights are", key, "set zero_stage=1, 2 or 3"
    if away.optimizer == "nvme" and stage != 3:
        yield f"ZeRO stage {stage} offloads to main memory alone", key, f"set {key}=cpu, or zero_stage=3"
    if player.optim.name != "adamw":
        yield f"off the accelerator DeepSpeed steps AdamW alone, not {player.optim.name}", key, "set optim.name=adamw"
    if lacking := fault("cpu_adam"):
        yield f"DeepSpeed's AdamW for CPUs cannot be compiled: {lacking}", key, "apt install g++; pip install ninja"


def _of_disk(loop: Loop) -> Iterator[Complaint]:
    away = loop.offload
    if "nvme" not in (away.optimizer, away.parameters):
        return
    if not away.folder:
        yield "no folder to offload to", "loop.offload.folder", "name one on a local NVMe disk"
    elif not Path(away.folder).is_dir():
        yield f"{away.folder} is no folder", "loop.offload.folder", f"mkdir -p {away.folder}"
    if lacking := fault("async_io"):
        fix = "apt install libaio-dev g++; pip install ninja"
        yield f"DeepSpeed's asynchronous input and output cannot be compiled: {lacking}", "loop.offload", fix


def _of_compiling(stage: int, loop: Loop, ranks: Ranks) -> Iterator[Complaint]:
    key = "loop.compile"
    if loop.compile and stage:
        what = f"ZeRO stage {stage} hangs hooks on the blocks where torch.compile would have to break them"
        yield what, key, "set zero_stage=0, or loop.compile=false"
    if loop.compile and ranks.device.type == "cpu" and shutil.which("g++") is None:
        yield "torch.compile needs a C++ compiler on a CPU", key, "apt install g++, or set loop.compile=false"
