"""The training loop against a bare PyTorch loop: same Wan, weights, optimiser, samples and noise, in turns.

The bare loop is handed its batch and its noise. Ours reads shards, collates, draws, guards, clips and keeps its journal
(Weights & Biases off), on one rank of one thread, in fp32; what it does in other threads counts as its own. That both
did the same work is seen from their weights, which must agree at the end.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import v4e
from data_tools.bench import clock
from data_tools.bench.reading import fixture
from v4e import flow
from v4e.config import Loop, Wandb
from v4e.data.shards import ShardSet, ShardWriter
from v4e.data.stream import Slice, Stream
from v4e.nouns import Draw, EditBatch, Optim
from v4e.recipes.flow_matching import FlowMatching
from v4e.train.run import train_recipe

NANO = Path(v4e.__file__).parent / "assets/wan-nano/i2v"
WIDE = {"num_attention_heads": 8, "attention_head_dim": 96, "ffn_dim": 3072, "added_kv_proj_dim": 768, "num_layers": 10}
LEAST = 100_000_000  # parameters of the wide one
WORK, WALL = 0, 1  # columns of a pair of times
LINEAR = nn.functional.linear
TOLERANCE = 0.02  # of how far the weights went: other roundings of the same sums, which AdamW's first steps magnify


def measure(blocks: int = 8) -> dict[str, list[float]]:
    """``loop_overhead`` and ``zero3_overhead`` of processor time, and by the clock (``_wall``).

    Args:
        blocks: ratios of the first, of ten steps each; of the second, whose steps are long, three fewer of one each.

    Raises:
        AssertionError: the two loops end with different weights, or the bare one was not bare.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = encoded(folder, 64)
        nano = recipe(NANO, folder / "nano", data, batch=8, steps=10 * (blocks + 1) + 1, log_every=10)
        wide = recipe(shaped(folder / "wide", WIDE), folder / "zero3", data, batch=16, steps=blocks - 1, log_every=1)
        found = _overhead("loop_overhead", replace(nano, zero_stage=0))
        return found | _overhead("zero3_overhead", replace(wide, zero_stage=3, fresh=True))


def encoded(folder: Path, samples: int) -> ShardSet:
    """A set of latents and embeddings as large as wan-nano's, without roll-outs."""
    whole = fixture(folder / "whole", 16)
    with ShardWriter(folder / "encoded", replace(whole.meta, kind="encoded")) as writer:
        for n in range(samples):
            writer.add(replace(whole.sample(n % len(whole)), key=f"s{n}", rollout=None))
    return ShardSet.open(folder / "encoded")


def recipe(init: Path, output: Path, data: ShardSet, *, batch: int, steps: int, log_every: int) -> FlowMatching:
    """Flow matching with the faster attention of the nano configs, so that the loop's own time shows the more."""
    loop = Loop(
        output=str(output), data=str(data.folder), steps=steps, batch=batch, micro_batch=batch, precision="fp32",
        log_every=log_every, threads=1, wandb=Wandb(mode="disabled"),
    )  # fmt: skip
    optim = Optim(lr=1e-4, weight_decay=0.01)
    return FlowMatching(
        init=str(init), drop_text=0.0, attention="matmul", fold_text_padding=True, optim=optim, loop=loop
    )


def shaped(folder: Path, changes: Mapping[str, int]) -> Path:
    """A folder that says how a wan-nano of another size is built."""
    config = {**json.loads((NANO / "transformer/config.json").read_text()), **changes}
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/config.json").write_text(json.dumps(config))
    return folder


def _overhead(name: str, task: FlowMatching) -> dict[str, list[float]]:
    loop, bare = task.loop, Bare(task)
    assert task.zero_stage < 3 or sum(p.numel() for p in bare.module.parameters()) >= LEAST
    stream = Stream(loop.data, seed=loop.seed, batch=loop.batch, micro_batch=loop.micro_batch)
    turns = Turns(stream, task, bare)
    weights = train_recipe(task, lambda rank, world: turns)
    apart = bare.apart(load_file(weights / "student/weights.safetensors"))
    assert apart <= TOLERANCE, f"{name}: the weights differ by {apart:.2g} of their way, more than {TOLERANCE}"
    return {name: turns.ratios(WORK), f"{name}_wall": turns.ratios(WALL)}


class Bare:
    """What one writes without a framework, on a CPU."""

    def __init__(self, task: FlowMatching) -> None:
        (player,) = task.players()
        self.module, optim = player.build().train(), task.optim
        self.began = {name: tensor.clone() for name, tensor in player.weights()}
        self.module.load_state_dict(self.began, strict=False)  # tables are no part of a state dict
        matrices, others = ([p for p in self.module.parameters() if (p.ndim >= 2) == kind] for kind in (True, False))
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self.clip = task.loop.clip

    def step(self, batch: EditBatch, noise: Tensor, sigma_B: Tensor) -> float:
        clean = batch.clip_BCthw
        v = self.module(flow.mix(clean, noise, sigma_B), sigma_B, batch.conditions)[0]
        loss = nn.functional.mse_loss(v, noise - clean)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def apart(self, weights: Mapping[str, Tensor]) -> float:
        """How far other weights are from these, as a share of the way that these went."""
        return self._distance(weights) / self._distance(self.began)

    def _distance(self, weights: Mapping[str, Tensor]) -> float:
        named = self.module.named_parameters()
        return float(torch.stack([(p.detach() - weights[name]).norm() for name, p in named]).norm())


@dataclass
class Turns:
    """A stream that lets the bare loop do each step before it hands it out.

    Args:
        ours, plain: (work, wall) seconds of each step.
    """

    stream: Stream
    task: FlowMatching
    bare: Bare
    ours: list[np.ndarray] = field(default_factory=list)
    plain: list[np.ndarray] = field(default_factory=list)
    _began: np.ndarray | None = None
    _aside: np.ndarray | None = None

    @property
    def quarantined(self) -> dict[str, str]:
        return self.stream.quarantined

    def step(self, step: int) -> list[Slice]:
        """Our step lasts from here to the next call, less what is set aside for the bare loop."""
        began = _process()
        if self._began is not None:
            self.ours.append(began - self._began - self._aside)
        slices = self.stream.step(step)
        aside = _thread()
        self.plain.append(self._bare_step(slices))
        self._began, self._aside = began, _thread() - aside
        return slices

    def ratios(self, clock: int) -> list[float]:
        """Ours over the bare loop's, of as many steps at a time as the journal sums up; the first time is a warm-up."""
        size, steps = self.task.loop.log_every, len(self.ours)
        pairs = [(self.ours[i : i + size], self.plain[i : i + size]) for i in range(size, steps - size + 1, size)]
        return [float(np.sum(ours, 0)[clock] / np.sum(plain, 0)[clock]) for ours, plain in pairs]

    def _bare_step(self, slices: list[Slice]) -> np.ndarray:
        assert nn.functional.linear is LINEAR, "DeepSpeed has put its own linear layer under the bare loop too"
        (piece,) = slices
        batch = self.task.batch(piece.samples, piece.weights)
        draw = Draw(self.task.loop.seed, piece.positions)
        noise = draw.normal("noise", *batch.clip_BCthw.shape[1:])
        sigma_B = flow.shift(draw.uniform("sigma"), self.task.shift)
        began = _thread()
        self.bare.step(batch, noise, sigma_B)
        return _thread() - began


def _process() -> np.ndarray:
    return np.array([clock.now(), clock.wall()])


def _thread() -> np.ndarray:
    return np.array([clock.own(), clock.wall()])


if __name__ == "__main__":
    print(measure())
