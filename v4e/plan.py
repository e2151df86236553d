"""What a training will need, before it is begun: memory per rank, time, storage. Arithmetic alone; see docs/plan.md.

Legend: S tokens of a clip, D width, F feed-forward width, L tokens that cross-attention sees; N ranks. Bytes are bytes
and a GB is 10^9 of them.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch

from v4e import flow
from v4e.config import Checkpointing, Loop, Share, to_dict
from v4e.data.mixture import Mixture, named, shares_of
from v4e.data.places import exists, place
from v4e.data.shards import ShardSet
from v4e.models.lora import with_adapters
from v4e.models.original import SIZES, diffusers_config
from v4e.models.wan import WanBackbone
from v4e.nouns import TEXT_TOKENS, Grid, Player
from v4e.train.checkpoint import FILE_BYTES
from v4e.train.engines import BUCKET, GROUP, PERSISTENT, accumulation, choose, piece_of
from v4e.train.meter import Work
from v4e.train.optimisers import is_hidden_matrix
from v4e.train.run import SHARD_BYTES
from v4e.verbs import Recipe

R = TypeVar("R", bound=Recipe)

GB = 1e9
LIVE = 1_050_000_000  # DeepSpeed's stage3_max_live_parameters and a prefetch bucket: elements ZeRO-3 keeps gathered
VISION_TOKENS = 257  # of an image, as CLIP ViT-H/14 makes them
RESERVE = 2.0 * GB  # CUDA's context, NCCL's buffers and kernels' workspaces; assumed
WASTE = 0.06  # of a card lost to fragmentation; assumed
WORDS = 64  # tokens of a prompt; assumed
PNG = 1.5  # bytes a pixel of a photograph; assumed
HUB = {  # released models that can be planned without their folders
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ("i2v", 5120),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": ("i2v", 5120),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": ("flf2v", 5120),
    "Wan-AI/Wan2.1-I2V-14B-480P": ("i2v", 5120),
    "Wan-AI/Wan2.1-I2V-14B-720P": ("i2v", 5120),
    "Wan-AI/Wan2.1-FLF2V-14B-720P": ("flf2v", 5120),
    "alibaba-pai/Wan2.1-Fun-14B-InP": ("i2v", 5120),
    "alibaba-pai/Wan2.1-Fun-1.3B-InP": ("i2v", 1536),
}


@dataclass(frozen=True)
class Shape:
    """A Wan's sizes."""

    width: int
    ffn: int
    layers: int
    images: int

    @property
    def context(self) -> int:
        """Tokens that cross-attention sees, L."""
        return TEXT_TOKENS + VISION_TOKENS * self.images


@dataclass(frozen=True)
class Census:
    """A player's parameters, counted.

    Args:
        trained, frozen: elements that get gradients, and those that do not.
        whole: of all these, elements in parameters so small that ZeRO-3 leaves them on every rank.
        hidden: of the trained ones, those that Muon steps where it is the optimiser.
    """

    name: str
    stage: int
    trained: int
    frozen: int
    whole: int
    hidden: int
    shape: Shape

    @property
    def elements(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Machine:
    """What the job runs on, and what is assumed of it.

    Args:
        memory: bytes of one accelerator.
        flops: dense bf16 peak of one, per second.
        utilisation: share of the peak that the model's own arithmetic gets.
        bandwidth: bytes per second that a rank can receive from the others.
        fused: whether the optimiser's kernels are, as on CUDA; on a CPU a step makes temporaries.
    """

    ranks: int = 8
    memory: float = 80 * GB
    flops: float = 989e12
    utilisation: float = 0.25
    bandwidth: float = 50 * GB
    fused: bool = True


@dataclass(frozen=True)
class Data:
    """The clips of one shard set: the student's grid, the teacher's, and how many samples there are.

    Args:
        share: of a step's samples, where several sets train together.
        size: bytes of all samples; 0 where they are still to be made.
        name: where the set is.
    """

    student: Grid
    teacher: Grid
    samples: int
    share: float = 1.0
    size: int = 0
    name: str = ""

    @staticmethod
    def of(shards: ShardSet, share: float = 1.0) -> "Data":
        """What a set says of itself."""
        meta, size = shards.meta, sum(s.bytes for s in shards.shards)
        return Data(meta.student, meta.teacher or meta.student, len(shards), share, size, str(shards.folder))


@dataclass(frozen=True)
class Plan:
    """The answer.

    Args:
        parts: bytes per rank, by what they hold throughout a step.
        main: bytes of main memory per rank, likewise, of what is offloaded.
        compute, update: bytes per rank on top while losses are computed, and while the optimiser steps; never both.
        host: bytes of a rank's main memory while a checkpoint and the weights are written.
        flops: of a step, over all ranks.
        arithmetic, traffic: seconds of a step, were it that alone.
        storage: bytes on disk by what they are.
    """

    parts: Mapping[str, float]
    main: Mapping[str, float]
    compute: Mapping[str, float]
    update: Mapping[str, float]
    host: float
    flops: float
    arithmetic: float
    traffic: float
    storage: Mapping[str, float]
    machine: Machine

    @property
    def peak(self) -> float:
        """Most bytes a rank holds at once, above what an empty run holds."""
        return sum(self.parts.values()) + max(sum(self.compute.values()), sum(self.update.values()))

    @property
    def room(self) -> float:
        """Bytes of an accelerator that a plan may fill."""
        return self.machine.memory * (1 - WASTE) - RESERVE

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def seconds(self) -> float:
        """Of a step, where gathering hides behind arithmetic or the other way round."""
        return max(self.arithmetic, self.traffic)


# ------------------------------------------------------------------------------------------------- memory


def state(census: Census, low: int, ranks: int, optimizer: str, ema: bool) -> dict[str, float]:
    """Bytes per rank that a trained player holds throughout: docs/plan.md, section 1.

    Args:
        low: bytes of a weight in the forward pass: 2 for bf16, 4 for fp32.
    """
    part = {k: (1 / ranks if census.stage >= k else 1.0) for k in (1, 2, 3)}
    masters = 0 if low == 4 and census.stage in (0, 3) else 4  # there the weights are the masters
    moments = {
        "adamw": 8.0 * census.trained,
        "adamw8bit": (2 + 8 / 256) * census.trained,  # and two fp32 scales for each block of 256
        "muon": 8.0 * census.trained - 4 * census.hidden,
    }
    return {
        "weights": held(census, low, ranks),
        "gradients": low * census.trained * part[2],
        "masters": masters * census.trained * part[1],
        "optimiser": moments[optimizer] * part[1],
        "EMA": 4.0 * census.trained * part[1] * ema,
    }


def placed(
    census: Census, low: int, ranks: int, optimizer: str, loop: Loop
) -> tuple[dict[str, float], dict[str, float]]:
    """:func:`state` on the accelerator, and what is offloaded, in main memory; what is on a disk has buffers there."""
    here, away = state(census, low, ranks, optimizer, loop.ema > 0), {}
    if loop.offload.optimizer != "none":
        away = offloaded(census, low, ranks, loop)
        here |= {"gradients": here["gradients"] * (census.stage == 1), "masters": 0.0, "optimiser": 0.0, "EMA": 0.0}
    if loop.offload.parameters != "none":
        away["weights"] = here["weights"] - low * census.whole
        here["weights"] = float(low * census.whole)
    return here, away


def offloaded(census: Census, low: int, ranks: int, loop: Loop) -> dict[str, float]:
    """Bytes of main memory per rank for an optimiser that is not on the accelerator.

    Its gradients are kept in fp32, beside a copy of them (ZeRO-3) or of the weights (below) as the forward pass has
    them. A disk takes all but four buffers of the largest group stepped at once, and the averages.
    """
    share = census.trained / ranks
    averages = {"EMA": 4.0 * share * (loop.ema > 0)}
    if loop.offload.optimizer == "nvme":
        return {"swap buffers": 16.0 * min(share, GROUP), "gradients": low * share} | averages
    return {"masters": 4 * share, "gradients": (4 + low) * share, "optimiser": 8 * share} | averages


def held(census: Census, low: int, ranks: int) -> float:
    """Bytes per rank of a player's weights between steps."""
    if census.stage < 3:
        return float(low * census.elements)
    return low * ((census.elements - census.whole) / ranks + 2 * census.whole)  # small ones: their part, and whole


def gathered(census: Census, low: int, ranks: int) -> float:
    """Bytes per rank of what ZeRO-3 has gathered of a player at the same time; a rank alone has it all already."""
    return float(low * min(census.elements - census.whole, LIVE)) if census.stage == 3 and ranks > 1 else 0.0


def update(census: Census, low: int, ranks: int, fused: bool) -> float:
    """Bytes per rank that an optimiser's step needs for a moment: gradients in fp32, and unfused Adam's root."""
    group = census.trained / (ranks if census.stage else 1)
    group = min(group, piece_of(3, not fused)) if census.stage == 3 else group
    return group * (4 + (low if fused else 4))


def buckets(census: Census, low: int, size: int, overlap: bool) -> float:
    """Bytes per rank of the buffers gradients are reduced in, and the copy that is sent."""
    return float(min(size, census.trained) * low * (2 if overlap else 1)) if census.stage else 0.0


def block_saved(shape: Shape, tokens: int, low: int) -> float:
    """Bytes that one block keeps for its backward pass, for one clip.

    In bf16, of a token: 54 widths (norms and gates are computed in fp32: 4 bytes) and twice the feed-forward's width;
    of a token of the context 6. In fp32 nothing is kept twice.
    """
    own, context = (54, 6) if low == 2 else (84, 12)
    return tokens * (own * shape.width + 2 * low * shape.ffn) + shape.context * context * shape.width


def products_saved(shape: Shape, tokens: int, low: int) -> float:
    """Bytes that selective checkpointing keeps of one block: what products with weights and attention gave.

    Of a token: q, k, v, attention and output, then q, two attentions and output, the feed-forward's width and its
    output; of a token of the context k and v.
    """
    return low * (tokens * (10 * shape.width + shape.ffn) + 2 * shape.context * shape.width)


def activations(shape: Shape, tokens: int, low: int, batch: int, checkpointing: Checkpointing) -> float:
    """Bytes that a forward pass keeps for the backward one, and the gradients of the widest place in it."""
    block = block_saved(shape, tokens, low)
    kept = shape.layers * block
    if checkpointing:
        dear = products_saved(shape, tokens, low) if checkpointing == "selective" else 0.0
        kept = shape.layers * (low * tokens * shape.width + dear) + block
    passing = tokens * (low * shape.ffn + 10 * shape.width)
    return batch * (kept + passing)


def working(shape: Shape, tokens: int, low: int, batch: int, taps: int) -> float:
    """Bytes of a forward pass without gradients: one block's, and the hidden states that leave."""
    return batch * tokens * shape.width * (8.0 * low + low * taps)


# ---------------------------------------------------------------------------------------------------- time


def forward_flops(shape: Shape, tokens: int) -> float:
    """Of one clip: 2 for each weight a token meets, 4 D for each pair of tokens attention looks at."""
    D, F, L = shape.width, shape.ffn, shape.context
    linear = tokens * (6 * D * D + 2 * D * F) + L * 2 * D * D  # q k v o, q o, up and down; the context's k and v
    attention = tokens * tokens + tokens * L
    return shape.layers * (2.0 * linear + 4.0 * D * attention)


def passes(settings: Mapping[str, Any], checkpointing: Checkpointing, trained: float = 1.0) -> float:
    """What a step costs in forward passes of a player that trains.

    A backward pass is one for the gradients that pass through and one for those of the weights, if all are trained.
    Whole blocks are one more; what selective checkpointing computes again is next to nothing. The student is met once
    more every ``own_every`` steps.
    """
    own = 1 / settings["own_every"] if settings.get("own_every") else 0.0
    return 2.0 + trained + (checkpointing is True) + own


def frozen_passes(name: str, settings: Mapping[str, Any]) -> float:
    """Forward passes of a frozen player in a step: the prior answers two prompts, the teacher every ``block_every``."""
    return 2.0 if name == "prior" else 1 / max(1, settings.get("block_every", 1))


def met(name: str, data: Data) -> Grid:
    """The clips that a frozen player sees: the teacher its own, the prior the student's."""
    return data.student if name == "prior" else data.teacher


def traffic(census: Census, low: int, ranks: int, micro_batches: int, rounds: float) -> float:
    """Bytes that a rank receives in a step.

    Args:
        rounds: times the weights are gathered for a micro-batch, at ZeRO-3.
    """
    others = (ranks - 1) / ranks
    weights = rounds * micro_batches if census.stage == 3 else float(census.stage > 0)
    gradients = micro_batches if census.stage >= 2 else 2 - (census.stage > 0)
    return others * low * (census.elements * weights + census.trained * gradients)


# ------------------------------------------------------------------------------------------------- storage


def sample_bytes(data: Data, levels: int, text_width: int = 4096, vision_width: int = 1280) -> float:
    """Of a sample with its roll-out: bf16 latents and embeddings, and two PNGs."""
    student, teacher = (16 * g.t * g.h * g.w for g in (data.student, data.teacher))
    rollout = levels * (2 * student + teacher) + student
    encoded = 2 * student + teacher + data.student.t * data.student.h * data.student.w
    words = 2 * VISION_TOKENS * vision_width + (2 * WORDS + 1) * text_width
    return 2.0 * (rollout + encoded + words) + 2 * PNG * data.student.H * data.student.W


class RolloutCost(NamedTuple):
    """What the roll-outs of a set cost: FLOPs of one, GPU-hours of all, and bytes of all."""

    flops: float
    gpu_hours: float
    bytes: float


def rollout_cost(
    shape: Shape, data: Data, machine: Machine, *, steps: int, guided: int, levels: int, full: bool = True
) -> RolloutCost:
    """A step is one forward pass of the teacher, a guided one two; encoders are left out, they take a few seconds.

    Args:
        steps, guided: of the solver, and how many of them are guided.
        levels: at which states are kept; ``full`` also those of the teacher's whole clip.
    """
    flops = (steps + guided) * forward_flops(shape, data.teacher.tokens)
    seconds = data.samples * flops / (machine.flops * machine.utilisation)
    whole = 0 if full else 2.0 * levels * 16 * data.teacher.t * data.teacher.h * data.teacher.w
    return RolloutCost(flops, seconds / 3600, data.samples * (sample_bytes(data, levels) - whole))


def checkpoint_bytes(census: Census, optimizer: str, ema: bool) -> float:
    """Of one checkpoint, whatever the ranks: masters, moments and averages in fp32."""
    alone = dataclasses.replace(census, stage=1)
    parts = state(alone, 2, 1, optimizer, ema)
    return parts["masters"] + parts["optimiser"] + parts["EMA"]


def checkpoints_kept(loop: Loop) -> int:
    """At the fullest moment: those kept, one being written, and those kept for good."""
    saves = loop.steps // loop.save_every if loop.save_every else 0
    for_good = loop.steps // loop.keep_every if loop.keep_every else 0
    return min(saves + 1, max(1, loop.keep_last) + 1) + for_good


# ------------------------------------------------------------------------------------------------ assembly


def plan(recipe: Recipe, machine: Machine, data: Sequence[Data]) -> Plan:
    """What a recipe needs on a machine; a step's time is the mean over the sets, its memory that of the largest clip.

    Raises:
        ConfigError: the batch does not divide among the ranks.
    """
    loop, settings = recipe.loop, to_dict(recipe)
    low = 2 if loop.precision == "bf16" else 4
    players = [(player, census(player, loop)) for player in recipe.players()]
    trained = [(p, c) for p, c in players if p.trains]
    frozen = [(p, c) for p, c in players if not p.trains]
    states = [placed(c, low, machine.ranks, p.optim.name, loop) for p, c in trained]
    others = [placed(c, low, machine.ranks, p.optim.name, loop) for p, c in frozen]
    parts, main = (_sum(each[i] for each in states) for i in range(2))
    parts["frozen players"] = sum(here["weights"] for here, _ in others)
    main["frozen players"] = sum(away.get("weights", 0.0) for _, away in others)
    parts["buckets"] = sum(_buckets(c, low, machine) for _, c in trained)
    flops, received = _work(recipe, trained, frozen, low, data, machine.ranks)
    arithmetic = flops / machine.ranks / (machine.flops * machine.utilisation)
    return Plan(
        parts,
        main,
        _compute(trained, frozen, low, recipe, data, machine.ranks),
        {"step": max(_stepping(c, low, loop, machine) for _, c in trained)},
        _host(trained, machine.ranks, loop),
        flops,
        arithmetic,
        received / machine.bandwidth,
        _storage(trained, loop, settings, data),
        machine,
    )


def census(player: Player, loop: Loop) -> Census:
    """Count a player's parameters as :func:`v4e.train.engines.cast` would train them; it is built without memory."""
    with torch.device("meta"):
        module = (with_adapters(player, loop.lora) if player.trains and loop.lora.rank else player).build()
    assert isinstance(module, WanBackbone)
    choose(module, loop.train) if player.trains else module.requires_grad_(False)
    named = [
        (name, p.numel(), p.requires_grad, is_hidden_matrix(name, p.ndim)) for name, p in module.named_parameters()
    ]
    trained = sum(n for _, n, trains, _ in named if trains)
    return Census(
        player.name,
        player.zero_stage if player.trains or player.zero_stage == 3 else 0,
        trained,
        sum(n for _, n, _, _ in named) - trained,
        sum(n for _, n, _, _ in named if n <= PERSISTENT),
        sum(n for _, n, trains, hidden in named if trains and hidden),
        shape(module.config),
    )


def shape(config: Mapping[str, Any]) -> Shape:
    """The sizes in a transformer's config."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    images = 0 if config["image_dim"] is None else 1 + (config["pos_embed_seq_len"] is not None)
    return Shape(width, config["ffn_dim"], config["num_layers"], images)


def stand_in(recipe: R, folder: Path) -> R:
    """The recipe with configs in ``folder`` in the place of released models, and attention that every machine has."""
    settings = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}  # type: ignore[arg-type]
    known = {key: value for key, value in settings.items() if isinstance(value, str) and value in HUB}
    changes: dict[str, object] = {"attention": "native"} if "attention" in settings else {}
    for key, name in known.items():
        changes[key] = str(_write_config(folder / key, *HUB[name]))
    return dataclasses.replace(recipe, **changes)  # type: ignore[type-var]


def _write_config(home: Path, kind: str, width: int) -> Path:
    heads, layers, ffn = SIZES[width]
    sizes = {"dim": width, "num_heads": heads, "num_layers": layers, "ffn_dim": ffn, "in_dim": 36, "out_dim": 16}
    (home / "transformer").mkdir(parents=True)
    text = json.dumps(diffusers_config({"model_type": kind, **sizes}))
    (home / "transformer/config.json").write_text(text)
    return home


def clips(loop: Loop, height: int, width: int, frames: int, teacher_frames: int, samples: int) -> list[Data]:
    """What the sets of ``loop.data`` or ``loop.mixture`` say; the sizes given for each that is not there.

    Raises:
        ConfigError: both are named, or a weight is not positive.
        ShapeError: the sizes are no clips.
    """
    given = Data(Grid(frames, height, width), Grid(teacher_frames, height, width), samples)
    sets = named(loop) if loop.data or loop.mixture else [Share()]
    found = [_found(each.path) or dataclasses.replace(given, name=each.path) for each in sets]
    shares = shares_of([each.weight for each in sets])
    return [dataclasses.replace(data, share=float(share)) for data, share in zip(found, shares, strict=True)]


def clips_of(mixture: Mixture) -> list[Data]:
    """What is trained on together, set by set."""
    return [Data.of(shards, float(share)) for shards, share in zip(mixture.sets, mixture.shares, strict=True)]


def _found(folder: str) -> Data | None:
    there = folder and exists(place(folder) / "manifest.json")
    return Data.of(ShardSet.open(folder, verify="none")) if there else None


def work(recipe: Recipe, ranks: int, data: Sequence[Data]) -> Work:
    """What a step does, for the journal's rates: model FLOPs, so nothing that checkpointing computes again.

    Raises:
        ConfigError: the batch does not divide among the ranks.
    """
    once: Any = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, checkpointing=False))  # type: ignore
    with TemporaryDirectory() as folder:
        flops = plan(stand_in(once, Path(folder)), Machine(ranks=ranks), data).flops
    return Work(_mean(data, lambda d: d.student.tokens), flops)


def planned(recipe: Recipe, machine: Machine, data: Sequence[Data]) -> tuple[Plan, str]:
    """The plan, and where it does not fit what to change, or that nothing known does."""
    with TemporaryDirectory() as folder:
        local = stand_in(recipe, Path(folder))
        first = plan(local, machine, data)
        return first, "" if first.fits else _remedy(local, machine, data)


def _remedy(recipe: Recipe, machine: Machine, data: Sequence[Data]) -> str:
    """The first of a few changes, each on top of those before, with which it fits."""
    words: list[str] = []
    for word, change in _changes(recipe):
        recipe = change
        words.append(word)
        if plan(recipe, machine, data).fits:
            return " ".join(words)
    for ranks in (machine.ranks * 2**i for i in range(1, 9)):
        divides = recipe.loop.batch % (ranks * recipe.loop.micro_batch) == 0
        if divides and plan(recipe, dataclasses.replace(machine, ranks=ranks), data).fits:
            return " ".join([*words, f"--gpus {ranks}"])
    return ""


def _changes(recipe: Any) -> Iterator[tuple[str, Any]]:
    """Settings that save memory and that are not yet so, cheapest first."""
    settings = to_dict(recipe)
    if settings.get("zero_stage", 3) != 3:
        recipe = dataclasses.replace(recipe, zero_stage=3)
        yield "zero_stage=3", recipe
    for key, value in (("checkpointing", True), ("micro_batch", 1)):
        if getattr(recipe.loop, key) != value:
            recipe = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, **{key: value}))
            yield f"loop.{key}={json.dumps(value)}", recipe


def _buckets(c: Census, low: int, machine: Machine) -> float:
    size = min(BUCKET, piece_of(c.stage, not machine.fused))
    return buckets(c, low, size, machine.fused and c.stage > 1)


def _stepping(c: Census, low: int, loop: Loop, machine: Machine) -> float:
    """DeepSpeed's AdamW for CPUs needs nothing beside what it steps."""
    return 0.0 if loop.offload.optimizer != "none" else update(c, low, machine.ranks, machine.fused)


Counted = Sequence[tuple[Player, Census]]


def _compute(
    trained: Counted, frozen: Counted, low: int, recipe: Recipe, data: Sequence[Data], ranks: int
) -> dict[str, float]:
    whole = sum(gathered(c, low, ranks) for _, c in (*trained, *frozen))
    return {"gathered weights": whole, "activations": max(_kept(trained, frozen, low, recipe, d) for d in data)}


def _kept(trained: Counted, frozen: Counted, low: int, recipe: Recipe, data: Data) -> float:
    """Bytes of a forward pass over clips of one set, players together."""
    S, loop = data.student.tokens, recipe.loop
    taps = len(to_dict(recipe).get("student_blocks", ()))
    kept = max(activations(c.shape, S, low, loop.micro_batch, loop.checkpointing) for _, c in trained)
    return kept + max(
        (working(c.shape, met(c.name, data).tokens, low, loop.micro_batch, taps) for _, c in frozen), default=0.0
    )


def _work(
    recipe: Recipe, trained: Counted, frozen: Counted, low: int, data: Sequence[Data], ranks: int
) -> tuple[float, float]:
    """Floating-point operations of a step over all ranks, and bytes that each receives."""
    loop = recipe.loop
    settings, micro = to_dict(recipe), accumulation(loop, ranks)
    flops = 0.0
    for _, c in trained:
        each = passes(settings, loop.checkpointing, c.trained / c.elements)
        flops += each * _mean(data, lambda d, shape=c.shape: forward_flops(shape, d.student.tokens))
    rounds = {c.name: frozen_passes(c.name, settings) for _, c in frozen}
    for _, c in frozen:
        flops += rounds[c.name] * _mean(data, lambda d, c=c: forward_flops(c.shape, met(c.name, d).tokens))
    received = sum(traffic(c, low, ranks, micro, passes(settings, False, 0.0)) for _, c in trained)
    received += sum(traffic(c, low, ranks, micro, rounds[c.name]) for _, c in frozen if c.stage == 3)
    return loop.batch * flops, received


def _host(trained: Counted, ranks: int, loop: Loop) -> float:
    """A file of the checkpoint, or of the whole weights on rank 0."""
    largest = max(checkpoint_bytes(c, p.optim.name, loop.ema > 0) / ranks for p, c in trained)
    whole = max(4.0 * c.elements for _, c in trained)
    return max(min(largest, FILE_BYTES), min(whole, SHARD_BYTES))


def _mean(data: Sequence[Data], of: Callable[[Data], float]) -> float:
    """Of a step's samples."""
    return sum(d.share * of(d) for d in data)


def _storage(trained: Counted, loop: Loop, settings: Mapping[str, Any], data: Sequence[Data]) -> dict[str, float]:
    levels = len(flow.union_grid(settings["few_steps"], settings["shift"])) - 1 if "few_steps" in settings else 0
    one = sum(checkpoint_bytes(c, p.optim.name, loop.ema > 0) for p, c in trained)
    files = 1 + (loop.ema > 0)
    shards = sum(d.size or d.samples * sample_bytes(d, levels) for d in data)
    return {
        "a sample": shards / max(1, sum(d.samples for d in data)),
        "shards": shards,
        "a checkpoint": one,
        "checkpoints": one * checkpoints_kept(loop),
        "weights": sum(4.0 * files * c.elements for _, c in trained),
    }


def _sum(parts: Iterator[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0.0) + size
    return total


# ------------------------------------------------------------------------------------------------ the page


def page(plan: Plan, remedy: str, data: Sequence[Data], loop: Loop) -> str:
    """What a person reads."""
    m, hours = plan.machine, loop.steps * plan.seconds / 3600
    tokens, teacher = (_mean(data, of) for of in (lambda d: d.student.tokens, lambda d: d.teacher.tokens))
    rows = [*_rows(plan.parts), *_rows(plan.compute, "while computing: "), *_rows(plan.update, "while updating: ")]
    verdict = "fits" if plan.fits else "does not fit"
    advice = "" if plan.fits else f"\nwhat would: {remedy or 'no known setting; a smaller model or clip'}"
    return "\n".join(
        [
            f"memory per rank, GB, on {m.ranks} ranks",
            *rows,
            f"  {'peak':<34}{plan.peak / GB:10.2f}",
            f"  {'room on the card':<34}{plan.room / GB:10.2f}",
            f"{verdict} in {m.memory / GB:.0f} GB{advice}",
            *_rows(plan.main, "main memory: "),
            f"main memory of a rank while it saves: {plan.host / GB:.2f} GB",
            "",
            "samples",
            *(_met(d, loop) for d in data),
            "",
            f"time: {tokens:.0f} tokens (teacher {teacher:.0f}), {plan.flops / 1e15:.1f} PFLOP a step",
            f"  arithmetic {plan.arithmetic:.2f} s at an assumed {m.utilisation:.0%} of {m.flops / 1e12:.0f} TFLOP/s",
            f"  gathering  {plan.traffic:.2f} s at an assumed {m.bandwidth / GB:.0f} GB/s a rank",
            f"  {loop.steps} steps of {plan.seconds:.2f} s: {hours:.1f} h, {hours * m.ranks:.0f} GPU-hours",
            "",
            "storage, GB",
            *_rows(plan.storage),
        ]
    )


def _met(data: Data, loop: Loop) -> str:
    """A set, and how often a training goes through it."""
    met, grid = loop.steps * loop.batch * data.share, data.student
    rounds = f", each met {met / data.samples:.1f} times" if data.samples else ""
    about = f"{data.samples:,} of {grid.T} x {grid.H} x {grid.W}, {data.share:.0%} of each step{rounds}"
    return f"  {about}{f': {data.name}' if data.name else ''}"


def _rows(parts: Mapping[str, float], before: str = "") -> list[str]:
    return [f"  {before + name:<34}{size / GB:10.2f}" for name, size in parts.items() if size]
