"""Low-rank adapters by PEFT: a player with frozen weights and small trained ones beside them, and back to one network.

PEFT initialises adapters in place, which under ZeRO-3 meets tensors that are already cut: their first values come as
named weights instead, the same at every stage and on every number of ranks.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from v4e.config import Lora
from v4e.errors import ConfigError
from v4e.nouns import Player, seed_of

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names


def with_adapters(player: Player, lora: Lora) -> Player:
    """The player with ``scale * up @ down`` added to each of the named linear layers."""
    adapters = _Adapters(player, lora)
    return replace(player, build=adapters.build, weights=adapters.weights)


def merge(weights: Iterable[tuple[str, Tensor]], lora: Lora) -> Iterator[tuple[str, Tensor]]:
    """The network's own names and weights, with the adapters' part added; nothing is changed where there are none."""
    held: dict[str, Tensor] = {}
    for name, tensor in weights:
        if name.endswith(UP):
            layer = name.removesuffix(UP)
            whole = held.pop(f"{layer}{BASE}weight")
            yield f"{layer}.weight", whole + lora.scale * tensor @ held.pop(f"{layer}{DOWN}")
        elif name.endswith((DOWN, f"{BASE}weight")):
            held[name] = tensor
        else:
            yield name.replace(BASE, "."), tensor


class _Adapters:
    """A player's ``build`` and, after it, ``weights``."""

    def __init__(self, player: Player, lora: Lora) -> None:
        self._player, self._lora = player, lora
        self._layers: set[str] = set()

    def build(self) -> nn.Module:
        """The module with adapters, whose values are yet to come.

        Raises:
            ConfigError: no layer has such a name, or PEFT is missing.
        """
        module, globs = self._player.build(), self._lora.layers
        linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        self._layers = {name for name in linear if any(fnmatchcase(name, glob) for glob in globs)}
        if not self._layers:
            raise ConfigError(f"no linear layer is called {' or '.join(globs)}", where="loop.lora.layers")
        return _inject(module, sorted(self._layers), self._lora)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._player.weights():
            layer, _, leaf = name.rpartition(".")
            yield f"{layer}{BASE}{leaf}" if layer in self._layers else name, tensor
            if layer in self._layers and leaf == "weight":
                yield from _first_values(layer, tensor, self._lora)


def _inject(module: nn.Module, layers: list[str], lora: Lora) -> nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("adapters need PEFT", where="loop.lora", fix="pip install 'v4e[lora]'") from error
    target, alpha = "|".join(map(re.escape, layers)), lora.scale * lora.rank
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=target, init_lora_weights=False)  # type: ignore
    return inject_adapter_in_model(config, module)


def _first_values(layer: str, weight: Tensor, lora: Lora) -> Iterator[tuple[str, Tensor]]:
    """Down is what a linear layer of its size begins with, up is zero: at first the network is unchanged."""
    outwards, inwards = weight.shape
    generator = torch.Generator().manual_seed(seed_of("lora", layer))
    down = torch.rand(lora.rank, inwards, generator=generator)
    yield f"{layer}{DOWN}", (2 * down - 1) / inwards**0.5
    yield f"{layer}{UP}", torch.zeros(outwards, lora.rank)
