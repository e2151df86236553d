"""Players as DeepSpeed engines: built inside ZeRO's context, weights streamed in, one optimiser each.

Frozen players get an engine without optimiser. Everything enters a network through its engine, so that ZeRO-3 can
gather what it needs.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from v4e.config import Loop, Lora, Offload
from v4e.dist import Ranks
from v4e.errors import CheckpointError, ConfigError
from v4e.models.lora import alone, merge, with_adapters
from v4e.nouns import Player
from v4e.train.heap import given_back
from v4e.train.optimisers import align_for_disk, groups, maker
from v4e.train.possible import refuse
from v4e.verbs import Backbone

BUCKET = 50_000_000  # elements reduced or gathered at once; a 4M model fits into one
GROUP = 1_000_000_000  # elements ZeRO-3 steps at once
PIECE = 8_000_000  # both on a CPU: what is larger than 32 MB, malloc takes anew from the system, page by page
PERSISTENT = 100_000  # ZeRO-3 leaves parameters below this many elements whole: norms, biases, tables


@dataclass(frozen=True)
class Role:
    """A player on stage.

    Args:
        player: its declaration.
        engine: DeepSpeed's, to be called as a :class:`v4e.verbs.Backbone`.
        stage: ZeRO stage it runs at.
        settings: DeepSpeed's configuration as JSON, for the journal.
        lora: what its adapters are like.
    """

    player: Player
    engine: DeepSpeedEngine
    stage: int
    settings: str
    lora: Lora

    @property
    def module(self) -> Any:
        """The network inside, with ZeRO-3's hooks."""
        return self.engine.module

    @property
    def lr(self) -> dict[str, float]:
        """Current learning rates by optimiser part."""
        return {("muon" if g.get("use_muon") else "adamw"): g["lr"] for g in optimizer_of(self.engine).param_groups}

    def set_lr(self, factor: float) -> None:
        """Multiply the declared learning rates."""
        for group in optimizer_of(self.engine).param_groups:
            group["lr"] = factor * (self.player.optim.muon_lr if group.get("use_muon") else self.player.optim.lr)

    def step(self) -> tuple[float, bool]:
        """Step the optimiser if this is an accumulation boundary; (gradient norm, whether weights moved)."""
        boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if boundary else None
        return float("nan") if norm is None else float(norm), self.engine.was_step_applied()

    def masters(self) -> list[Tensor]:
        """This rank's share of the fp32 weights, flat or whole, in a fixed order; written in place by the optimiser.

        One that lies on a disk is empty unless it is :meth:`at_hand`.
        """
        optimizer = optimizer_of(self.engine)
        if self.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self.stage:
            return list(optimizer.single_partition_of_fp32_groups)
        groups = optimizer.fp32_groups if self._has_copies else [g["params"] for g in optimizer.param_groups]
        return [p for group in groups for p in group]

    @contextmanager
    def at_hand(self, part: int) -> Iterator[Tensor]:
        """Inside, one of the masters and its optimiser state are in memory, and may be changed."""
        optimizer = optimizer_of(self.engine)
        swapped = self.on_disk and optimizer._swappable_optimizer_subgroup(part)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(part)
        try:
            yield self.masters()[part]
        finally:
            if swapped:
                optimizer._optimizer_states_and_gradient_swap_out(part)

    @property
    def on_disk(self) -> bool:
        """Whether masters and optimiser state may lie on a disk."""
        return self.stage == 3 and optimizer_of(self.engine).swap_optimizer

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 tensor) of each parameter, adapters merged; every rank must draw all of them.

        What does not train is only known as rounded for the forward pass.
        """
        yield from merge(self._parts(), self.lora)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a file, whole fp32 tensor) of the adapters alone; every rank must draw all of them."""
        yield from alone(self._parts(".lora_"))

    def _parts(self, among: str = "") -> Iterator[tuple[str, Tensor]]:
        self._let_go()
        copies = self.copies() if self.stage == 0 else {}
        for name, parameter in self.module.named_parameters():
            if among not in name:
                continue
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    yield name, parameter.detach().float().clone()
            else:
                whole: Any = copies[parameter] if self.stage == 0 else safe_get_full_fp32_param(parameter)
                yield name, whole.detach().float()

    def refresh(self) -> None:
        """Round the fp32 weights into those the forward pass uses; for what wrote the masters from outside."""
        optimizer = optimizer_of(self.engine)
        if self.stage == 3:
            self._refresh_cut()
        elif self.stage:
            optimizer.update_lp_params()
        else:
            for parameter, master in self.copies().items():
                parameter.data.copy_(master)

    def _refresh_cut(self) -> None:
        """The partitions, then the small parameters that stay whole."""
        self._let_go()
        optimizer = optimizer_of(self.engine)
        for part in range(len(self.masters())):
            with self.at_hand(part):
                optimizer._reassign_or_swap_out_partitioned_parameters(part)
        if whole := optimizer.persistent_parameters:
            whole[0].all_gather(whole)

    def _let_go(self) -> None:
        """Weights that a forward without gradients has left whole, or on their way, are cut again (ZeRO-3).

        Those left whole would be used as they are, whatever is written to the partitions; those on their way cannot
        be gathered.
        """
        if self.stage == 3:
            optimizer_of(self.engine).parameter_offload.partition_all_parameters()

    def inner(self) -> Any:
        """PyTorch's optimiser, whose state is keyed by the masters."""
        optimizer = optimizer_of(self.engine)
        return optimizer.optimizer if self.stage or self._has_copies else optimizer

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """Master of each trained parameter in the order of :meth:`masters`, where ZeRO does not partition them."""
        optimizer = optimizer_of(self.engine)
        if not self._has_copies:
            return {p: p for group in optimizer.param_groups for p in group["params"]}
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {p: master for low, high in pairs for p, master in zip(low, high, strict=True)}

    @property
    def _has_copies(self) -> bool:
        return self.engine.bfloat16_enabled()


@dataclass(frozen=True)
class Cast(Mapping[str, DeepSpeedEngine]):
    """The players by name; indexing gives the engine, which is what a recipe calls."""

    roles: Mapping[str, Role]

    def __getitem__(self, name: str) -> DeepSpeedEngine:
        return self.roles[name].engine

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def trained(self) -> dict[str, Role]:
        return {name: role for name, role in self.roles.items() if role.player.trains}

    def scene(self, turn: str) -> dict[str, Backbone]:
        """Whom a recipe calls in a turn: the engine of the player that is improved, the bare modules of the others.

        ZeRO-3's gathering hangs on the modules. An engine adds hooks that take any gradient passing through for its
        own backward: an error at stage 0, wrong numbers at stage 3.
        """
        return {name: role.engine if name == turn else role.module for name, role in self.roles.items()}

    @contextmanager
    def only(self, turn: str) -> Iterator[Role]:
        """Let gradients reach one trained player alone."""
        resting = [role.engine for name, role in self.trained.items() if name != turn]
        others = [p for engine in resting for p in engine.parameters() if p.requires_grad]
        for p in others:
            p.requires_grad_(False)
        try:
            yield self.trained[turn]
        finally:
            for p in others:
                p.requires_grad_(True)


def optimizer_of(engine: DeepSpeedEngine) -> Any:
    """DeepSpeed's optimiser, of whichever of its classes."""
    return engine.optimizer


def cast(players: Sequence[Player], loop: Loop, ranks: Ranks) -> Cast:
    """Materialise players as engines.

    Raises:
        ConfigError: sizes do not fit the number of ranks; an optimiser cannot do what is asked.
        CheckpointError: weights are missing, unknown or of another shape.
    """
    if len({p.name for p in players}) != len(players):
        raise ConfigError(f"players share a name: {', '.join(p.name for p in players)}", where="recipe")
    _prepare(ranks, loop)
    with given_back():
        return Cast({p.name: _engage(p, loop, ranks) for p in players})


def accumulation(loop: Loop, world: int) -> int:
    """Micro-batches per rank and step.

    Raises:
        ConfigError: the batch does not divide.
    """
    unit = world * loop.micro_batch
    if min(loop.batch, loop.micro_batch) < 1 or loop.batch % unit:
        what = f"batch {loop.batch} is no multiple of {world} ranks * micro_batch {loop.micro_batch}"
        raise ConfigError(what, where="loop.batch", fix=f"use a multiple of {max(1, unit)}")
    return loop.batch // unit


def deepspeed_config(player: Player, stage: int, loop: Loop, ranks: Ranks) -> dict[str, Any]:
    """All that DeepSpeed is told, in one place."""
    on_cpu, alone = ranks.device.type == "cpu", ranks.world == 1
    piece = piece_of(stage, on_cpu)
    zero = {
        "stage": stage,
        "overlap_comm": not on_cpu and stage > 1,  # gloo has no streams to overlap
        "contiguous_gradients": not on_cpu or stage == 3,
        # Muon needs whole gradients; a rank alone at stage 3 has them, and scattering would copy them twice.
        "reduce_scatter": player.optim.name != "muon" and not (alone and stage == 3),
        "reduce_bucket_size": min(piece, BUCKET),
        "sub_group_size": piece,
        "allgather_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": PERSISTENT,
        "memory_efficient_linear": _forgets_weights(loop, ranks),
        **_offload(player, loop.offload),
    }
    return {
        "train_micro_batch_size_per_gpu": loop.micro_batch,
        "gradient_accumulation_steps": accumulation(loop, ranks.world),
        # In fp32 without ZeRO, DeepSpeed neither reports norms nor skips bad steps: _Guarded clips there.
        "gradient_clipping": 0.0 if stage == 0 and loop.precision == "fp32" else loop.clip,
        "bf16": {"enabled": loop.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _forgets_weights(loop: Loop, ranks: Ranks) -> bool:
    """Whether linear layers are DeepSpeed's own, which let gathered weights go between forward and backward pass.

    They add the bias in a pass of its own, so not where weights are whole and in place anyway; and in place, which
    would spoil a product that selective checkpointing keeps. Its blocks let the weights go by themselves.
    """
    gathers = ranks.world > 1 or loop.offload.parameters != "none"
    return gathers and loop.checkpointing != "selective"


def piece_of(stage: int, on_cpu: bool) -> int:
    """Elements that ZeRO-3 steps at once."""
    return PIECE if on_cpu and stage == 3 else GROUP


def _offload(player: Player, away: Offload) -> dict[str, Any]:
    """Where optimiser and weights lie; :mod:`v4e.train.possible` has refused what would not work."""
    told = {}
    if player.trains and away.optimizer != "none":
        told["offload_optimizer"] = {"device": away.optimizer, "nvme_path": away.folder or None}
    if away.parameters != "none":
        told["offload_param"] = {"device": away.parameters, "nvme_path": away.folder or None}
    return told


@contextmanager
def exchanged(role: Role, average: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the fp32 weights are the averaged ones; the averages hold the weights meanwhile."""
    _swap(role, average)
    try:
        yield
    finally:
        _swap(role, average)


@contextmanager
def worn(role: Role, average: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the forward pass uses the averaged weights too; afterwards all is as before, to the bit."""
    with exchanged(role, average):
        role.refresh()
        yield
    role.refresh()


@torch.no_grad()
def _swap(role: Role, average: Sequence[Tensor]) -> None:
    for part, kept in enumerate(average):
        with role.at_hand(part) as master:
            weights = master.clone()
            master.copy_(kept)
            kept.copy_(weights)


def _prepare(ranks: Ranks, loop: Loop) -> None:
    """Join DeepSpeed to the process group that dist.py made, and keep it quiet."""
    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if ranks.device.type == "cpu":
        # Nothing of DeepSpeed's is to be compiled: gloo does without its shared-memory all-reduce, and even asking
        # what could be compiled starts compilers.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
        # It would look for `numactl` at every bucket of gradients.
        accelerator: Any = get_accelerator()
        count = accelerator.device_count()
        accelerator.device_count = lambda: count
        # Its Muon is torch.compiled, a minute per shape on a CPU.
        torch.compiler.set_stance("default" if loop.compile else "force_eager")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_backend=_backend(ranks))


def _backend(ranks: Ranks) -> str:
    return "gloo" if ranks.device.type == "cpu" else "nccl"


def _engage(player: Player, loop: Loop, ranks: Ranks) -> Role:
    # Stages 1 and 2 shard optimiser states and gradients, of which a frozen player has none.
    stage = player.zero_stage if player.trains or player.zero_stage == 3 else 0
    refuse(player, stage, loop, ranks)
    config = deepspeed_config(player, stage, loop, ranks)
    player = with_adapters(player, loop.lora) if player.trains and loop.lora.rank else player
    module = _build(player, config, stage, ranks)
    if loop.compile:
        _compile_blocks(module)
    engine = _trained(module, player, stage, config, loop, ranks) if player.trains else _frozen(module, config)
    return Role(player, engine, stage, json.dumps(config, indent=1), loop.lora)


def _build(player: Player, config: dict[str, Any], stage: int, ranks: Ranks) -> nn.Module:
    with _construction(config, stage):
        module = player.build()
    _pour(module, player, stage, ranks)
    return module


def _compile_blocks(module: nn.Module) -> None:
    """Each repeated block by itself: they share one compiled code, and names of parameters stay."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                block.compile()
        else:
            _compile_blocks(child)


def _construction(config: dict[str, Any], stage: int) -> AbstractContextManager:
    return deepspeed.zero.Init(config_dict_or_path=config) if stage == 3 else nullcontext()


@torch.no_grad()
def _pour(module: nn.Module, player: Player, stage: int, ranks: Ranks) -> None:
    """Copy every named tensor into the parameters and buffers of a fresh module."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    awaited = {*parameters, *buffers}
    for name, tensor in player.weights():
        if name in parameters:
            _fill(parameters[name], tensor, name, player, stage, ranks)
        elif name in buffers:
            _replace(module, name, tensor.to(ranks.device))
        else:
            raise CheckpointError(f"the weights hold {name}, which the model does not", where=f"player {player.name}")
        awaited.discard(name)
    if awaited:
        named = ", ".join(sorted(awaited)[:5])
        raise CheckpointError(f"no weights for {len(awaited)} tensors: {named}", where=f"player {player.name}")


def _fill(target: Any, tensor: Tensor, name: str, player: Player, stage: int, ranks: Ranks) -> None:
    shape = tuple(target.ds_shape if stage == 3 else target.shape)
    if tuple(tensor.shape) != shape:
        what = f"{name} is {tuple(tensor.shape)} in the weights and {shape} in the model"
        raise CheckpointError(what, where=f"player {player.name}")
    if stage < 3:
        target.copy_(tensor)
        return
    with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
        if ranks.is_main:
            target.copy_(tensor)


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a buffer anew: bf16 zero.Init patches torch.arange, so one computed in construction may be garbage."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._buffers[leaf] = tensor.detach().clone()


def _frozen(module: nn.Module, config: dict[str, Any]) -> DeepSpeedEngine:
    module.eval().requires_grad_(False)
    engine = _initialize(model=module, config=config)
    engine.eval()  # returns nothing, unlike a module's
    return engine


def _trained(
    module: nn.Module, player: Player, stage: int, config: dict[str, Any], loop: Loop, ranks: Ranks
) -> DeepSpeedEngine:
    choose(module, loop.train)
    found = groups(module.train(), player.optim)
    if loop.offload.optimizer == "nvme":
        align_for_disk(found)
    clip = loop.clip if stage == 0 and loop.precision == "fp32" else None
    make = maker(player.optim, ranks, clip, loop.offload.optimizer != "none")
    engine = _initialize(model=module, model_parameters=found, optimizer=make, config=config)
    engine.enable_backward_allreduce = stage > 0 or ranks.world > 1  # alone, it would only copy gradients
    if stage == 0 and loop.precision == "bf16":
        _undo_rehearsal(engine)
    return engine


def choose(module: nn.Module, globs: Sequence[str]) -> None:
    """Freeze the parameters that no glob names."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if idle := [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]:
        raise ConfigError(f"no parameter that could train is called {' or '.join(idle)}", where="loop.train")
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and (not globs or any(fnmatchcase(name, glob) for glob in globs)))


def _initialize(**parts: Any) -> DeepSpeedEngine:
    with redirect_stdout(io.StringIO()):  # it prints the machine's memory
        return deepspeed.initialize(**parts, dist_init_required=False)[0]


def _undo_rehearsal(engine: DeepSpeedEngine) -> None:
    """Forget the step on zero gradients with which DeepSpeed allocates states here: it counts for Adam, and decays."""
    optimizer = optimizer_of(engine)
    optimizer.optimizer.state.clear()
    for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for p, master in zip(low, high, strict=True):
            master.data.copy_(p.data)


def export_weights(role: Role, average: Iterable[Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor) of each parameter, of the averaged weights where given.

    Every rank must draw all of them: ZeRO gathers each from all ranks.
    """
    with exchanged(role, list(average)) if average is not None else nullcontext():
        yield from role.full_weights()


def export_adapters(role: Role, average: Iterable[Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """:func:`export_weights` of the adapters alone."""
    with exchanged(role, list(average)) if average is not None else nullcontext():
        yield from role.adapters()
