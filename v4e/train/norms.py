"""Gradient norms of groups of blocks, from what each rank holds of the gradients between backward pass and step."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from v4e import dist
from v4e.dist import Ranks
from v4e.train.engines import Role, optimizer_of

GROUPS = 8  # of blocks, at most
REST = "rest"  # of the network: embeddings, head


def group_norms(role: Role, ranks: Ranks) -> dict[str, float]:
    """``blocks.0-4`` and so on -> norm of their averaged, unclipped gradients; all ranks call it and get the same.

    Of gradients that lie on a disk nothing is told.
    """
    if role.on_disk:
        return {}
    trained = {name: p for name, p in role.module.named_parameters() if p.requires_grad}
    labels = block_groups(list(trained))
    squares = dict.fromkeys(sorted(set(labels.values())), 0.0)
    for name, parameter in trained.items():
        for gradient in _held(role, parameter):
            squares[labels[name]] += float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) ** 2
    sums = dist.total([*squares.values()], ranks.device) if role.stage else [*squares.values()]
    return {label: total**0.5 for label, total in zip(squares, sums, strict=True)}


def block_groups(names: Sequence[str]) -> dict[str, str]:
    """Parameter -> its group: numbered blocks in at most eight runs of about equal length, and the rest."""
    places = {name: place for name in names if (place := _place(name))}
    counts: dict[str, int] = {}
    for stem, number in places.values():
        counts[stem] = max(counts.get(stem, 0), number + 1)
    return {name: _label(*places[name], counts[places[name][0]]) if name in places else REST for name in names}


def _place(name: str) -> tuple[str, int] | None:
    """``blocks.3.up.weight`` -> blocks, 3; None where no part is a number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return (".".join(parts[:at]), int(parts[at])) if at else None


def _label(stem: str, number: int, count: int) -> str:
    groups = min(GROUPS, count)
    group = number * groups // count
    first, last = -(-group * count // groups), -(-(group + 1) * count // groups) - 1
    return f"{stem}.{first}-{last}" if last > first else f"{stem}.{first}"


def _held(role: Role, parameter: Any) -> Iterator[Tensor]:
    """This rank's elements of a parameter's gradient; without ZeRO all of them."""
    if role.stage == 3:
        yield optimizer_of(role.engine).get_local_fp32_grad_for_param(parameter)
    elif role.stage:
        if parameter._hp_mapping is not None:
            yield parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    elif parameter.grad is not None:
        yield parameter.grad
