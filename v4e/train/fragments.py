"""Where this rank keeps the fp32 state of each trained parameter, whatever ZeRO makes of it.

ZeRO joins parameters, pads the join and cuts it among the ranks. A checkpoint does not know: it holds runs of elements
by parameter name, so that any number of ranks can read what any other number wrote.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4e.dist import Ranks
from v4e.errors import CheckpointError
from v4e.train.engines import Role, optimizer_of
from v4e.train.optimisers import is_fused, recount

MASTER, AVERAGE, MOMENTUM = "master", "average", "momentum_buffer"  # kinds of values; the optimiser names its own
NUMBER = "#"  # begins a kind of which a parameter has one, such as Adam's count of steps
WHOLE = "="  # begins a kind that is kept as the optimiser has it
Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements.

    Args:
        name: of the parameter.
        start, size: which elements, counted along the flattened parameter.
        part: which of ``Role.masters()`` holds them on this rank.
        offset: of the first one in there.
    """

    name: str
    start: int
    size: int
    part: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor that is laid out like the master."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


def fragments(role: Role, ranks: Ranks) -> list[Fragment]:
    """This rank's share of the trained parameters, in a fixed order."""
    optimizer = optimizer_of(role.engine)
    trained = [(name, p) for name, p in role.module.named_parameters() if p.requires_grad]
    if role.stage == 3:
        return [f for name, p in trained if (f := _cut(name, p, optimizer, ranks)).size > 0]
    if role.stage:
        return [_mapped(name, p) for name, p in trained if p._hp_mapping is not None]
    part = {p: i for i, p in enumerate(role.copies())}
    return [Fragment(name, 0, p.numel(), part[p], 0) for name, p in trained]


def collect(role: Role, average: Sequence[Tensor], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """(``player|kind|parameter|start``, values) of all that this rank writes of a player."""
    for part, pieces in _by_part(_shared(fragments(role, ranks), role, ranks)).items():
        with role.at_hand(part) as master:
            state = role.inner().state[master]
            for f in pieces:
                yield _key(role, MASTER, f), f.of(master)
                if average:
                    yield _key(role, AVERAGE, f), f.of(average[f.part])
            if _in_blocks(role):
                yield from _whole_state(role, pieces[0], state, ranks)
            else:
                yield from _state(role, pieces, state, master)


@torch.no_grad()
def restore(role: Role, average: Sequence[Tensor], archive: "Archive", ranks: Ranks) -> None:
    """Fill masters, averages and optimiser states from what any number of ranks wrote.

    Raises:
        CheckpointError: the states fit the number of ranks that wrote them alone.
    """
    for part, pieces in _by_part(fragments(role, ranks)).items():
        with role.at_hand(part) as master:
            archive.fill(role.player.name, MASTER, pieces, master)
            kinds = archive.kinds(role.player.name, pieces[0].name)
            if average:  # begun in this run where the checkpoint has none
                archive.fill(role.player.name, AVERAGE if AVERAGE in kinds else MASTER, pieces, average[part])
            kept = sorted(kinds - {MASTER, AVERAGE})
            if _in_blocks(role):
                found = _restored_whole(role, pieces[0], archive, ranks)
            else:
                found = {k.removeprefix(NUMBER): _restored(role, k, master, pieces, archive) for k in kept}
            role.inner().state[master].update(found)
    recount(role.inner())
    role.refresh()


def _by_part(pieces: Iterable[Fragment]) -> dict[int, list[Fragment]]:
    found: dict[int, list[Fragment]] = defaultdict(list)
    for f in pieces:
        found[f.part].append(f)
    return found


class Archive:
    """The runs in a checkpoint's files, whoever wrote them.

    Args:
        files: safetensors with keys ``player|kind|parameter|start``.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._runs: dict[tuple[str, str, str], list[_Run]] = defaultdict(list)
        self._kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._where = ""
        for path in sorted(files):
            self._where = str(path.parent)
            try:
                self._index(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"not readable: {error}", where=str(path)) from error
        for runs in self._runs.values():
            runs.sort(key=lambda run: run.start)

    def kinds(self, player: str, name: str) -> set[str]:
        """What is kept of a parameter."""
        return self._kinds.get((player, name), set())

    def holds(self, player: str, prefix: str) -> bool:
        """Whether there is any kind of a player's that begins so."""
        return any(who == player and kind.startswith(prefix) for who, kind, _ in self._runs)

    def whole(self, player: str, kind: str, name: str) -> Tensor:
        """All elements of what one rank wrote."""
        return self.read(player, kind, name, 0, self._runs[player, kind, name][-1].end)

    def fill(self, player: str, kind: str, pieces: Iterable[Fragment], target: Tensor) -> None:
        """Copy the pieces' values to their places in a tensor."""
        for f in pieces:
            f.of(target).copy_(self.read(player, kind, f.name, f.start, f.size))

    def read(self, player: str, kind: str, name: str, start: int, size: int) -> Tensor:
        """Elements of a parameter, put together from the runs that hold them.

        Raises:
            CheckpointError: some are in no file.
        """
        found, at, end = [], start, start + size
        for run in self._runs.get((player, kind, name), ()):
            if run.start <= at < min(run.end, end):
                found.append(run.values[at - run.start : min(run.end, end) - run.start])
                at = min(run.end, end)
        if at < end:
            raise CheckpointError(f"no {kind} of {name} from element {at} on", where=f"{self._where}, player {player}")
        return torch.cat(found)

    def _index(self, file: Any) -> None:
        for key in file.keys():  # noqa: SIM118  no mapping
            player, kind, name, start = key.split("|")
            values = file.get_slice(key)
            self._kinds[player, name].add(kind)
            self._runs[player, kind, name].append(_Run(int(start), int(start) + values.get_shape()[0], values))


@dataclass(frozen=True)
class _Run:
    """Elements start to end of a parameter; ``values`` reads from the file what is sliced of it."""

    start: int
    end: int
    values: Any


def _cut(name: str, p: Any, optimizer: Any, ranks: Ranks) -> Fragment:
    """ZeRO-3 gives every rank an equal piece of each parameter, the last ones padded."""
    part, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
    start = ranks.rank * size
    return Fragment(name, start, min(size, p.ds_numel - start), part, offset)


def _mapped(name: str, p: Any) -> Fragment:
    """Stages 1 and 2 give every rank an equal piece of each group's join."""
    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    return Fragment(name, here.start, here.numel, p._hp_mapping.param_group_index, there.start)


def _shared(pieces: Sequence[Fragment], role: Role, ranks: Ranks) -> Sequence[Fragment]:
    """Without ZeRO all ranks hold the same; each writes its share."""
    return pieces if role.stage else pieces[ranks.rank :: ranks.world]


def _key(role: Role, kind: str, f: Fragment) -> str:
    return f"{role.player.name}|{kind}|{f.name}|{f.start}"


def _state(role: Role, pieces: Sequence[Fragment], state: Mapping[str, Any], master: Tensor) -> Iterator[Named]:
    """What the optimiser keeps beside a master, for the parameters that have pieces of it."""
    for kind, value in state.items():
        if _own_layout(role, kind):
            yield from ((_key(role, kind, f), f.of(value)) for f in _whole_matrices(role, pieces[0].part))
        else:
            yield from (_piece(role, kind, value, master, f) for f in pieces)


def _piece(role: Role, kind: str, value: Any, master: Tensor, f: Fragment) -> Named:
    if isinstance(value, Tensor) and value.shape == master.shape:
        return _key(role, kind, f), f.of(value)
    if isinstance(value, int):  # DeepSpeed's AdamW for CPUs counts without a tensor
        value = torch.tensor(float(value))
    if isinstance(value, Tensor) and value.numel() == 1:
        return f"{role.player.name}|{NUMBER}{kind}|{f.name}|0", value.detach().view(1)
    raise CheckpointError(
        f"the optimiser's {kind} is no tensor like the weights and cannot be shared out among ranks",
        where=f"parameter {f.name}",
        fix="use adamw or muon",
    )


def _own_layout(role: Role, kind: str) -> bool:
    """At stages 1 and 2 Muon keeps whole matrices' momentum on every rank that holds a piece of one."""
    return kind == MOMENTUM and role.stage in (1, 2)


def _whole_matrices(role: Role, part: int) -> list[Fragment]:
    held = optimizer_of(role.engine).params_in_partition[part]
    names = {p: name for name, p in role.module.named_parameters()}
    offsets = accumulate((p.numel() for p in held), initial=0)
    return [Fragment(names[p], 0, p.numel(), part, offset) for p, offset in zip(held, offsets, strict=False)]


def _restored(role: Role, kind: str, master: Tensor, pieces: Sequence[Fragment], archive: Archive) -> Tensor | int:
    """One state of one master, as the optimiser would have made it."""
    player = role.player.name
    if kind.startswith(NUMBER):
        number = archive.read(player, kind, pieces[0].name, 0, 1)
        if isinstance(role.inner(), DeepSpeedCPUAdam):
            return int(number)
        return number.view(()).to(master.device if is_fused(role.inner().param_groups) else "cpu")
    pieces = _whole_matrices(role, pieces[0].part) if _own_layout(role, kind) else pieces
    dtype = archive.read(player, kind, pieces[0].name, 0, 1).dtype
    shape = (sum(f.size for f in pieces),) if _own_layout(role, kind) else master.shape
    values = torch.zeros(shape, dtype=dtype, device=master.device)
    archive.fill(player, kind, pieces, values)
    return values


# ------------------------------------------------------------------------------------------- states in blocks


def _in_blocks(role: Role) -> bool:
    """8-bit states: blocks of 256 elements, with a scale each, that heed no parameter's end."""
    return role.player.optim.name == "adamw8bit"


def _whole_state(role: Role, first: Fragment, state: Mapping[str, Any], ranks: Ranks) -> Iterator[Named]:
    for kind, value in state.items():
        tensor = value.detach().view(-1) if isinstance(value, Tensor) else torch.tensor([value])
        yield f"{role.player.name}|{WHOLE}{kind}|{_holder(role, first, ranks)}|0", tensor


def _restored_whole(role: Role, first: Fragment, archive: Archive, ranks: Ranks) -> dict[str, Any]:
    player, holder = role.player.name, _holder(role, first, ranks)
    kinds = [kind for kind in archive.kinds(player, holder) if kind.startswith(WHOLE)]
    if not kinds and archive.holds(player, WHOLE):
        raise CheckpointError(
            "8-bit states are cut into blocks that fit the number of ranks that wrote them, and their ZeRO stage",
            where=f"player {player}",
            fix="go on with as many ranks as before; only without ZeRO may their number change",
        )
    master = role.masters()[first.part]
    return {kind.removeprefix(WHOLE): _like(archive.whole(player, kind, holder), master) for kind in kinds}


def _like(values: Tensor, master: Tensor) -> Tensor | int:
    if values.dtype == torch.int64:
        return int(values)
    return values.to(master.device).view(master.shape if values.numel() == master.numel() else -1)


def _holder(role: Role, first: Fragment, ranks: Ranks) -> str:
    """Whose a whole state is: without ZeRO a parameter's; else that of a rank's part among so many ranks."""
    return f"{first.part}.{ranks.rank}.{ranks.world}.{role.stage}" if role.stage else first.name
