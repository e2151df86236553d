"""A recipe of toys for the training tests: a small net with RoPE-like buffers, taps, checkpointing, and a teacher.

Run as a script, it trains under the deepspeed launcher: ``toy_training.py OUTPUT key=value ... [--fate FATE]``, with
a fate STEP:RANK:WHAT such as ``3:1:SIGKILL`` or ``3:1:raise``. ``fork`` starts ranks without launcher and imports.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor, nn

from v4e import config
from v4e.config import Checkpointing, Loop
from v4e.errors import V4EError
from v4e.models.recompute import recomputed
from v4e.nouns import Draw, Losses, Optim, Player, Sample
from v4e.train.checkpoint import _save_file as fragments_file
from v4e.train.run import train_recipe
from v4e.verbs import Backbone

C, D, S = 4, 32, 6  # channels, width, tokens


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.scale = nn.Parameter(torch.ones(1, 2, D))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.scale[:, :1] * self.down(nn.functional.gelu(self.up(self.norm(h)))) * self.scale[:, 1:]


class Net(nn.Module):
    """Tokens in, velocity and taps out, as a plain tuple."""

    def __init__(self, checkpointing: Checkpointing = False, hidden: int = 2 * D) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed, self.head = nn.Linear(C, D), nn.Linear(D, C)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        angles = torch.outer(torch.arange(S), 1 / 10000 ** (torch.arange(0, D, dtype=torch.float64) / D))
        self.register_buffer("table", angles.cos().float(), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, conditions: None = None, taps: tuple[int, ...] = ()) -> tuple:
        x = x.to(self.embed.weight.dtype)
        h, tapped = self.embed(x) + self.table.to(x.dtype) + sigma.to(x.dtype)[:, None, None], []
        for i, block in enumerate(self.blocks):
            h = recomputed(block, h, selective=self.checkpointing == "selective") if self.checkpointing else block(h)
            tapped += [h] if i in taps else []
        return (self.head(h), *tapped)


def made(seed: int, checkpointing: Checkpointing = False, hidden: int = 2 * D) -> Net:
    """A net whose weights are a function of the seed."""
    torch.manual_seed(seed)
    return Net(checkpointing, hidden)


def tensors(net: Net) -> list[tuple[str, Tensor]]:
    return [(n, t.detach()) for n, t in (*net.named_parameters(), *net.named_buffers())]


@dataclass(frozen=True)
class ToyBatch:
    keys: tuple[str, ...]
    weight_B: Tensor
    x_BSC: Tensor


@dataclass(frozen=True)
class Toy:
    """Match a frozen teacher's output and hidden states on made-up tokens. ``poison`` makes a key's loss NaN."""

    teacher: bool = True
    poison: str = ""
    poison_from: int = 0
    poison_to: int = 10**9
    hidden: int = 2 * D
    zero_stage: int = 3
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-2))
    loop: Loop = field(default_factory=Loop)

    def players(self) -> Sequence[Player]:
        student = self._player("student", 1, True)
        return [student, self._player("teacher", 2, False)] if self.teacher else [student]

    def batch(self, samples: Sequence[Sample], weights: Sequence[float]) -> ToyBatch:
        x = torch.stack([torch.randn(S, C, generator=torch.Generator().manual_seed(int(s.key))) for s in samples])
        return ToyBatch(tuple(s.key for s in samples), torch.tensor(weights), x)

    def turns(self, step: int) -> Sequence[str]:
        return ("student",)

    def weights_at(self, step: int) -> Mapping[str, float]:
        return {"velocity": 1.0, "block": 0.5}

    def losses(self, players: Mapping[str, Backbone], batch: ToyBatch, draw: Draw, turn: str, step: int) -> Losses:
        x, sigma = batch.x_BSC + draw.normal("noise", S, C).to(batch.x_BSC), draw.uniform("sigma").to(batch.x_BSC)
        taps = (0, 1)
        wanted = tuple(torch.zeros(1) for _ in range(3))
        if self.teacher:
            with torch.no_grad():
                wanted = players["teacher"](x, sigma, None, taps)
        found = players[turn](x, sigma, None, taps)
        v, *hidden = [((f.float() - w.float()) ** 2).mean() for f, w in zip(found, wanted, strict=True)]
        if self.poison in batch.keys and self.poison_from <= step < self.poison_to:
            v = v * float("nan")
        return Losses({"velocity": v, "block": torch.stack(hidden).mean()}, self.weights_at(step))

    def _player(self, name: str, seed: int, trains: bool) -> Player:
        build = lambda: Net(self.loop.checkpointing, self.hidden)  # noqa: E731
        return Player(name, build, lambda: tensors(made(seed, hidden=self.hidden)), trains, self.optim, self.zero_stage)  # type: ignore


@dataclass(frozen=True)
class Duo(Toy):
    """Two players in turn: the student pleases the critic, the critic shrinks what it says of the student."""

    def players(self) -> Sequence[Player]:
        return [self._player("student", 1, True), self._player("critic", 3, True)]

    def turns(self, step: int) -> Sequence[str]:
        return ("student", "critic")

    def weights_at(self, step: int) -> Mapping[str, float]:
        return {"said": 1.0}

    def losses(self, players: Mapping[str, Backbone], batch: ToyBatch, draw: Draw, turn: str, step: int) -> Losses:
        sigma = draw.uniform("sigma")
        made = players["student"](batch.x_BSC, sigma, None)[0]
        said = players["critic"](made if turn == "student" else made.detach(), sigma, None)[0]
        return Losses({"said": said.mean() if turn == "student" else (said**2).mean()}, self.weights_at(step))


@dataclass(frozen=True)
class ToySlice:
    samples: tuple[Sample, ...]
    weights: tuple[float, ...]
    positions: tuple[int, ...]


class ToyStream:
    """Sample number p is called p. ``log`` gets a line of keys for each step."""

    def __init__(self, loop: Loop, rank: int, world: int, log: Path | None = None, fate: str = "-1:0:") -> None:
        self.loop, self.rank, self.world, self.log = loop, rank, world, log
        step, whose, self.what = fate.split(":")
        self.end = int(step) if int(whose) == rank else -1
        self.quarantined: dict[str, str] = {}

    def step(self, step: int) -> list[ToySlice]:
        if step == self.end:
            meet(self.what)
        micro, unit = self.loop.micro_batch, self.loop.micro_batch * self.world
        firsts = range(step * self.loop.batch + self.rank * micro, (step + 1) * self.loop.batch, unit)
        slices = [self._slice(range(f, f + micro)) for f in firsts]
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{step} {self.rank} {[s.key for x in slices for s in x.samples]}\n")
        return slices

    def _slice(self, positions: range) -> ToySlice:
        samples = tuple(Sample(str(p), "", "", None, None) for p in positions)
        return ToySlice(samples, (1.0,) * len(positions), tuple(positions))


def meet(fate: str) -> None:
    if fate == "raise":
        raise ValueError("a rank of its own mind")
    if fate == "SIGKILL-in-save":  # the next one, when this rank's file is written
        fragments_file.__globals__["flush"] = lambda _: meet("SIGKILL")
        return
    os.kill(os.getpid(), signal.Signals[fate])


def toy(output: Path, *words: str) -> Toy:
    """A toy recipe from dotlist words."""
    plain = [f"loop.output={output}", "loop.wandb.mode=disabled", "loop.log_every=1", "loop.threads=1"]
    return config.build(Toy, config.OmegaConf.create({}), [*plain, *words], "toy")


def plain(recipe: Toy, steps: int) -> tuple[list[float], list[float], Net]:
    """What PyTorch alone makes of it, all ranks' samples in one batch: losses, gradient norms and the net."""
    net, teacher, batch = made(1), made(2), recipe.loop.batch
    adam = torch.optim.AdamW(net.parameters(), recipe.optim.lr, recipe.optim.betas, recipe.optim.eps, weight_decay=0)
    told, norms = [], []
    for step in range(steps):
        positions = tuple(range(step * batch, (step + 1) * batch))
        samples = [Sample(str(p), "", "", None, None) for p in positions]
        draw = Draw(recipe.loop.seed, positions)
        nets = {"student": net, "teacher": teacher}
        total = recipe.losses(nets, recipe.batch(samples, [1.0] * batch), draw, "student", step).total
        adam.zero_grad()
        total.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), recipe.loop.clip or 1e9)))
        told.append(total.item())
        adam.step()
    return told, norms, net


def launch(ranks: int, *words: str) -> subprocess.CompletedProcess:
    """A real launch of this file: ``deepspeed`` on gloo."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = [deepspeed, "--num_gpus", str(ranks), "--master_port", random_port()]
    command += ["--no_local_rank", str(Path(__file__).resolve()), *words]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def random_port() -> str:
    return str(random.SystemRandom().randrange(20000, 40000))


def fork(ranks: int, log: Path, *words: str) -> list[BaseProcess]:
    """Ranks as a launcher starts them, from a process that has imported everything; stderr in ``log.RANK``."""
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = f"{here.parent}{os.pathsep}{here}"  # its server knows no other path
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["toy_training"])
    port = random_port()
    made = [server.Process(target=_rank, args=(r, ranks, port, f"{log}.{r}", words), daemon=True) for r in range(ranks)]
    for process in made:
        process.start()
    return made


def ended(processes: Sequence[BaseProcess], within: float = 300) -> list[int | None]:
    """Exit codes; None of one that is still running, which is then killed."""
    until = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _rank(rank: int, world: int, port: str, log: str, words: Sequence[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.exit(door(*words))


def door(*words: str) -> int:
    """As v4e.cli does: a sentence and an exit code."""
    try:
        main(*words)
    except V4EError as error:
        print(f"v4e: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def main(output: str, *words: str) -> None:
    """One run, or several with ``--then OUTPUT ...`` between their words."""
    rest = list(words)
    following = rest[rest.index("--then") + 1 :] if "--then" in rest else []
    own = rest[: rest.index("--then")] if following else rest
    fate = own[own.index("--fate") + 1] if "--fate" in own else "-1:0:"
    recipe = toy(Path(output), *(w for w in own if "=" in w))
    Path(output).mkdir(parents=True, exist_ok=True)
    train_recipe(recipe, lambda r, w: ToyStream(recipe.loop, r, w, Path(output) / f"keys_{r}.txt", fate))
    if following:
        main(*following)


if __name__ == "__main__":
    sys.exit(door(*sys.argv[1:]))
