"""Optimisers: which steps what, and the versions that clip and skip where DeepSpeed does not."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn

from v4e.dist import Ranks
from v4e.errors import ConfigError
from v4e.nouns import Optim

MOMENTUM = 0.95  # Muon's
ALIGNED, SMALL = (
    256,
    1024**2 // 4,
)  # elements in fp32: what DeepSpeed reads from a disk in units of, and leaves in memory
Make = Callable[[list], torch.optim.Optimizer]


def groups(module: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Parameter groups: Muon for the hidden matrices; weight decay for matrices alone."""
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    p: Any  # ZeRO hangs its attributes on parameters
    for name, p in module.named_parameters():
        if p.requires_grad:
            matrix = _dimensions(p) >= 2
            p.use_muon = optim.name == "muon" and is_hidden_matrix(name, _dimensions(p))  # ZeRO reads it there
            found.setdefault((p.use_muon, matrix or not optim.weight_decay), []).append(p)
    if not found:
        raise ConfigError("a player that trains has no parameter with gradients", where="recipe")
    return [_group(found[kind], kind[0], optim, kind[1]) for kind in sorted(found)]


def _group(params: list[nn.Parameter], muon: bool, optim: Optim, decays: bool) -> dict[str, Any]:
    shared = {"params": params, "weight_decay": optim.weight_decay if decays else 0.0}
    if muon:
        return {**shared, "use_muon": True, "lr": optim.muon_lr, "momentum": MOMENTUM}
    return {**shared, "use_muon": False, "lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}


def align_for_disk(found: list[dict[str, Any]]) -> None:
    """Sort groups so that DeepSpeed brings gradients back from a disk to where they came from.

    It mixes up those that do not begin at a multiple of ALIGNED elements; small ones never leave memory.

    Raises:
        ConfigError: the share of a parameter that is not small ends in between.
    """
    for group in found:
        group["params"].sort(key=lambda p: p.partition_numel() % ALIGNED != 0)
        if odd := [n for p in group["params"] if (n := p.partition_numel()) % ALIGNED and n >= SMALL]:
            what = f"a rank's share of a parameter is {odd[0]} elements, no multiple of {ALIGNED}"
            raise ConfigError(what, where="loop.offload.optimizer", fix="use cpu, or another number of ranks")


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Muon's domain: 2-D weights inside repeated blocks, not embeddings, tables or the head."""
    return dimensions == 2 and any(part.isdigit() for part in name.split("."))


def _dimensions(p: Any) -> int:
    """ZeRO-3 flattens what it partitions."""
    return len(p.ds_shape) if "ds_shape" in vars(p) else p.ndim


def maker(optim: Optim, ranks: Ranks, clip: float | None, offloaded: bool) -> Make:
    """What DeepSpeed calls with the groups.

    Args:
        clip: None where DeepSpeed clips and skips itself.
        offloaded: whether masters and states are in main memory, whatever the accelerator.
    """
    if offloaded:
        return _cpu_adamw
    make = {"adamw": _adamw, "adamw8bit": _adamw8bit, "muon": _muon}[optim.name]
    return lambda found: _with_clip(make(found, ranks, clip is not None), clip)


def _adamw(found: list, ranks: Ranks, guarded: bool) -> torch.optim.Optimizer:
    return _kind(torch.optim.AdamW, guarded)(_plain(found), **_fused(ranks))


def _cpu_adamw(found: list) -> torch.optim.Optimizer:
    return DeepSpeedCPUAdam(_plain(found))


def recount(optimizer: torch.optim.Optimizer) -> None:
    """Bring what DeepSpeed's AdamW for CPUs keeps outside its state to where the state is.

    It multiplies its powers of the betas up from step to step; computed at once they differ in the last bits.
    """
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    p, g, m, v = torch.zeros(4, 1)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    for step in range(1, 1 + max((state.get("step", 0) for state in optimizer.state.values()), default=0)):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, p, g, m, v)


def _adamw8bit(found: list, ranks: Ranks, guarded: bool) -> torch.optim.Optimizer:
    return _kind(eight_bit(), guarded)(_plain(found))


def _muon(found: list, ranks: Ranks, guarded: bool) -> torch.optim.Optimizer:
    method = "standard" if ranks.device.type == "cpu" else "gram"  # "gram" runs in fp16, ten times slower on a CPU
    found = [{**g, "ns_method": method} if g["use_muon"] else g for g in found]
    return _kind(MuonWithAuxAdam, guarded)(found, torch.optim.AdamW, _fused(ranks))


def eight_bit() -> type[torch.optim.Optimizer]:
    """AdamW whose moments are kept in 8 bits, in blocks of 256 with a scale each.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        fix = "pip install 'v4e[8bit]', or use adamw"
        raise ConfigError("AdamW in 8 bits needs bitsandbytes", where="optim.name", fix=fix) from error
    return AdamW8bit


def _plain(found: list) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "use_muon"} for group in found]


def _fused(ranks: Ranks) -> dict[str, Any]:
    return {"fused": True} if ranks.device.type == "cuda" else {"foreach": True}


def is_fused(param_groups: list[Mapping[str, Any]]) -> bool:
    """Whether counts of steps lie on the accelerator, as fused kernels want them."""
    return any(group.get("fused") for group in param_groups)


def _with_clip(optimizer: torch.optim.Optimizer, clip: float | None) -> torch.optim.Optimizer:
    if isinstance(optimizer, _Guarded):
        optimizer.clip = clip or math.inf
    return optimizer


class _Guarded:
    """Clips, and skips a step whose gradients are not finite, as DeepSpeed's own optimisers do.

    The engine reads ``overflow`` and ``_global_grad_norm``. Gradients are already averaged over the ranks, so each
    rank decides alike.
    """

    clip = math.inf
    overflow = False
    _global_grad_norm = 0.0

    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]  # type: ignore[attr-defined]
        self._global_grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.clip))
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step()  # type: ignore[misc]


@cache
def _kind(base: Any, guarded: bool) -> Any:
    """The optimiser's class, guarded for fp32 without ZeRO."""
    return type(f"Guarded{base.__name__}", (_Guarded, base), {}) if guarded else base
