"""Low-rank adapters by PEFT: a player with frozen weights and small trained ones beside them, and what becomes of them.

PEFT initialises adapters in place, which under ZeRO-3 meets tensors that are already cut: their first values come as
named weights instead, the same at every stage and on every number of ranks. Trained, they are added to one network, or
kept alone and written under the names by which diffusers and ComfyUI know them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from v4e.config import Lora
from v4e.errors import ConfigError
from v4e.models.original import authors_names
from v4e.nouns import Player, seed_of

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # PEFT's names in a network
STORED_DOWN, STORED_UP = ".lora_A.weight", ".lora_B.weight"  # and in a file


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


def alone(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The adapters of a network's weights and nothing else, by the names that they have in a file."""
    for name, tensor in weights:
        if name.endswith((DOWN, UP)):
            yield name.replace(".default.", "."), tensor


def adapted(adapters: Mapping[str, Tensor]) -> list[str]:
    """The layers that have adapters, in their order."""
    return [name.removesuffix(STORED_UP) for name in adapters if name.endswith(STORED_UP)]


def added(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A network with the part of stored adapters added, in fp32."""
    parts = {
        f"{layer}.weight": scale * adapters[f"{layer}{STORED_UP}"].float() @ adapters[f"{layer}{STORED_DOWN}"].float()
        for layer in adapted(adapters)
    }
    return {name: tensor.float() + parts[name] if name in parts else tensor for name, tensor in weights.items()}


def in_diffusers_words(adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What ``load_lora_weights`` of stock diffusers takes; such a file says no scale, so it is in ``up``."""
    return {f"transformer.{name}": scale * t if name.endswith(STORED_UP) else t for name, t in adapters.items()}


def in_authors_words(adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What ComfyUI takes: Wan's own names of layers, ``lora_down``, ``lora_up`` and alpha = scale * rank.

    Diffusers' converter knows alphas in blocks alone, so elsewhere the scale is in ``up`` too.
    """
    layers = adapted(adapters)
    names = authors_names([f"{layer}.weight" for layer in layers])
    written: dict[str, Tensor] = {}
    for layer in layers:
        down, up = adapters[f"{layer}{STORED_DOWN}"], adapters[f"{layer}{STORED_UP}"]
        own = f"diffusion_model.{names[f'{layer}.weight'].removesuffix('.weight')}"
        inside = layer.startswith("blocks.")
        written |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up if inside else scale * up}
        written |= {f"{own}.alpha": torch.tensor(scale * len(down))} if inside else {}
    return written


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
