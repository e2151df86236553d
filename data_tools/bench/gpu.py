"""What a GPU makes of Wan2.1-14B: attention backends, training steps, roll-outs and edits, with random weights.

    python -m data_tools.bench.gpu

Every case runs in a process of its own, so that one that runs out of memory, or dies of it, costs the others nothing;
what a case found is written at once. Utilisation is the share of what large bf16 matrix products reach on the same
card, not of what its vendor says. Models are DiTs alone: an encoder's time, or a VAE's, is not in these numbers.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple, get_args

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from data_tools.bench import random_wan
from data_tools.bench.clock import wall
from data_tools.bench.random_wan import Sizes
from v4e import dist
from v4e.config import Loop, Lora
from v4e.data.disk import write_atomically
from v4e.data.stream import Stream
from v4e.errors import ConfigError, TrainingError, V4EError
from v4e.models.attention import Attention, matmul_attention, resolve
from v4e.models.wan import WanBackbone
from v4e.nouns import Conditions, Grid
from v4e.pipelines import Guidance, denoise, few_step_scheduler
from v4e.plan import census, forward_flops, passes, shape
from v4e.recipes.flow_matching import FlowMatching
from v4e.train import meter
from v4e.train.engines import cast
from v4e.train.loop import Progress, train

Result = dict[str, Any]
Times = list[float]
GB = 1e9

NAMES = [name for name in get_args(Attention) if name != "auto"]
KERNELS = ["_native_flash", "_native_cudnn", "_native_efficient"]  # SDPA's, each by itself, in diffusers' words
ROWS = 128  # queries whose attention is also computed in fp32
MOST = 3.0  # times the error of rounding the exact result to bf16; kernels also round the probabilities


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        fewer: layers with which a full training step fits on one card; from them goes a line to all layers.
        pictures: (height, width) by name.
        frames: of a roll-out: the first number that fits.
        timed: repetitions that count, of steps and all else.
        threads: of the CPU; 0 for all.
    """

    sizes: Sizes = field(default_factory=Sizes)
    fewer: tuple[int, ...] = (4, 8, 16)
    pictures: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"480p": (480, 832), "720p": (720, 1280)})
    frames: tuple[int, ...] = (81, 49, 25, 9)
    edit_frames: int = 5
    edit_steps: int = 4
    rollout_steps: int = 50
    guidance: float = 5.0
    matmul: int = 8192
    rank: int = 32
    timed: int = 5
    threads: int = 0

    def grid(self, picture: str, frames: int) -> Grid:
        return Grid(frames, *self.pictures[picture])


REAL = Scale()
QUICK = Scale(
    Sizes(heads=2, width=24, ffn=48, layers=3, text=16, vision=16),
    fewer=(1, 2), pictures={"480p": (32, 48), "720p": (48, 64)}, frames=(9, 5), rollout_steps=6, matmul=64, rank=2,
    timed=2, threads=1,
)  # fmt: skip


def cases(scale: Scale) -> dict[str, Callable[[], Result]]:
    """Everything that can be measured, as ``PART`` or ``PART.CASE``."""
    found: dict[str, Callable[[], Result]] = {"matmul_peak": partial(matmul_peak, scale)}
    found |= {f"attention.{name}": partial(attention, scale, name) for name in scale.pictures}
    found |= {f"zero3_step.{layers}": partial(zero3_step, scale, layers) for layers in scale.fewer}
    found |= {"lora_step": partial(lora_step, scale)}
    found |= {f"rollout.{name}": partial(rollout, scale, name) for name in scale.pictures}
    return found | {f"edit.{name}": partial(edit, scale, name) for name in scale.pictures}


def part_of(case: str) -> str:
    """The first half of a case's name."""
    return case.split(".")[0]


# --------------------------------------------------------------------------------------------------- the parts


def matmul_peak(scale: Scale, products: int = 10) -> Result:
    """Square bf16 matrices, so many products to a lap, since one takes little longer than waiting for it."""
    n = scale.matmul
    a, b = (torch.randn(n, n, device=_device(), dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    laps = [lap / products for lap in _laps(multiply, 4 * scale.timed)]
    return {"laps": laps, "flops": 2.0 * n**3, "remark": f"{n} x {n} bf16"}


def attention(scale: Scale, picture: str) -> Result:
    """Every backend on random queries, keys and values of a whole roll-out; errors on ROWS queries, as shares of the
    exact result's rms."""
    grid, heads = scale.grid(picture, scale.frames[0]), scale.sizes.heads
    S, d, device = grid.tokens, scale.sizes.width // heads, _device()
    q, k, v = (torch.randn(1, S, heads, d, device=device, dtype=torch.bfloat16) for _ in range(3))
    rows = torch.linspace(0, S - 1, min(S, ROWS), device=device).long()
    exact = matmul_attention(q[:, rows].float(), k.float(), v.float())
    made: dict[str, Tensor] = {}
    tried = {name: _tried(name, (q, k, v), rows, exact, made, scale.timed) for name in (*NAMES, *KERNELS)}
    return {
        "tokens": S,
        "flops": 4.0 * S * S * scale.sizes.width,
        "rounding": apart(exact.bfloat16(), exact, exact),
        "backends": tried,
        "pairs": {f"{a}, {b}": apart(made[a], made[b], exact) for a, b in combinations(made, 2)},
    }


def _tried(
    name: str, qkv: tuple[Tensor, Tensor, Tensor], rows: Tensor, exact: Tensor, made: dict[str, Tensor], timed: int
) -> Result:
    """A backend's laps and errors, or why it has none; what it made of the rows is added to ``made``."""
    try:
        work = partial(_attend, name if name in KERNELS else resolve(name), *qkv)  # type: ignore[arg-type]
        laps = _laps(work, timed)
        made[name] = work()[:, rows]
    except (RuntimeError, ValueError, V4EError) as error:  # no such kernel, no package, no memory
        torch.cuda.empty_cache()
        return {"fault": _why(error)}
    return {"laps": laps, **apart(made[name], exact, exact)}


def _attend(backend: str, q_BSHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor) -> Tensor:
    if backend == "matmul":
        return matmul_attention(q_BSHd, k_BSHd, v_BSHd)
    return dispatch_attention_fn(q_BSHd, k_BSHd, v_BSHd, backend=AttentionBackendName(backend))


def zero3_step(scale: Scale, layers: int) -> Result:
    """A full training step at full width, with as many layers as given, under ZeRO-3 on one rank."""
    return _training(scale, layers, stage=3, lora=Lora())


def lora_step(scale: Scale) -> Result:
    """A training step of adapters in every block of the whole model, its weights in bf16, as in
    configs/video4edit_lora_one_gpu.yaml."""
    return _training(scale, scale.sizes.layers, stage=0, lora=Lora(rank=scale.rank))


def _training(scale: Scale, layers: int, stage: int, lora: Lora) -> Result:
    """Steps of flow matching on one clip, through the engines and the loop of `v4e train`; the first is a warm-up."""
    ranks, steps = dist.start(scale.threads), 1 + scale.timed
    grid, config = scale.grid("720p", scale.edit_frames), scale.sizes.config("i2v") | {"num_layers": layers}
    loop = Loop(steps=steps, batch=1, micro_batch=1, lora=lora, checkpointing=True, log_every=steps)
    player = random_wan.player(config, ranks.device, trains=True, stage=stage, checkpointing=True)
    counted = census(player, loop)
    players = cast([player if stage == 3 else random_wan.built_on(player, ranks.device)], loop, ranks)
    marks, progress = [wall()], Progress()
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(random_wan.shards(Path(folder) / "set", grid, scale.sizes), seed=0, batch=1, micro_batch=1)
        recipe = FlowMatching(drop_text=0.0, loop=loop)
        train(recipe, stream, players, progress, ranks, after=lambda numbers: marks.append(wall()))
        stream.close()
    if progress.skipped:
        raise TrainingError(f"{progress.skipped} of {steps} steps were not finite, so that nothing was measured")
    rounds = passes({}, False, counted.trained / counted.elements)
    return {
        "laps": _between(marks)[1:],
        "flops": rounds * forward_flops(counted.shape, grid.tokens),
        "layers": layers,
        "trained": counted.trained,
        "remark": f"{counted.trained / 1e6:,.0f}M of {counted.elements / 1e6:,.0f}M train, {_told(grid)}",
    }


def rollout(scale: Scale, picture: str) -> Result:
    """Guided steps of the teacher, the first of all a warm-up, on the longest clip that fits."""
    device = _device(scale.threads)
    model = random_wan.whole(scale.sizes.config("flf2v"), device)
    return first_that_fits(scale.frames, lambda T: _rolled(scale, model, scale.grid(picture, T), device))


def _rolled(scale: Scale, model: WanBackbone, grid: Grid, device: torch.device) -> Result:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(scale.rollout_steps)
    told, null = (random_wan.conditions(grid, scale.sizes, 2, device, words) for words in (random_wan.WORDS, 1))
    marks: Times = []
    some = slice(1 + scale.timed)  # a mark follows each forward, so the first one lies before all laps
    guide = Guidance(scale.guidance)
    _denoised(model, scheduler, grid, told, null, guide, lambda *_: marks.append(wall()), some)
    flops = 2 * forward_flops(shape(model.config), grid.tokens)
    return {"laps": _between(marks), "flops": flops, "steps": scale.rollout_steps, "remark": f"guided, {_told(grid)}"}


def edit(scale: Scale, picture: str) -> Result:
    """Whole edits in a few steps, unguided; the first is a warm-up."""
    device = _device(scale.threads)
    model, grid = random_wan.whole(scale.sizes.config("i2v"), device), scale.grid(picture, scale.edit_frames)
    told, scheduler = random_wan.conditions(grid, scale.sizes, 1, device), few_step_scheduler(5.0)

    def once() -> None:
        scheduler.set_timesteps(scale.edit_steps)
        _denoised(model, scheduler, grid, told, None, Guidance())

    laps = [lap / scale.edit_steps for lap in _laps(once, scale.timed, warm=1)]
    flops = forward_flops(shape(model.config), grid.tokens)
    return {"laps": laps, "flops": flops, "steps": scale.edit_steps, "remark": _told(grid)}


def _denoised(
    model: WanBackbone,
    scheduler: UniPCMultistepScheduler,
    grid: Grid,
    told: Conditions,
    null: Conditions | None,
    guidance: Guidance,
    watch: Callable[[float, Tensor, Tensor], None] = lambda sigma, x_BCthw, v_BCthw: None,
    steps: slice = slice(None),  # noqa: B008  immutable
) -> None:
    noise = torch.randn_like(told.known_BCthw)
    with model.remembering():
        end = denoise(model, scheduler, noise, told, null, guidance, watch, steps)
    if not end.isfinite().all():
        raise TrainingError("the latents are not finite, so that nothing was measured", where=_told(grid))


def first_that_fits(sizes: Sequence[int], work: Callable[[int], Result]) -> Result:
    """The result at the first size for which there is memory.

    Raises:
        torch.OutOfMemoryError: of the last one, where there is none for any.
    """
    for size in sizes[:-1]:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            print(f"{size}: out of memory", file=sys.stderr)
        torch.cuda.empty_cache()
    return work(sizes[-1])


def _device(threads: int = 0) -> torch.device:
    if threads:
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _laps(work: Callable[[], object], rounds: int, warm: int = 2) -> Times:
    """Seconds of each repetition by the clock, after some that do not count."""
    for _ in range(warm):
        work()
    marks = [wall()]
    for _ in range(rounds):
        work()
        marks.append(wall())
    return _between(marks)


def _between(marks: Sequence[float]) -> Times:
    return [after - before for before, after in pairwise(marks)]


def _told(grid: Grid) -> str:
    return f"{grid.T} frames of {grid.W} x {grid.H}, {grid.tokens:,} tokens"


# ---------------------------------------------------------------------------------------------------- the sums


def apart(a: Tensor, b: Tensor, exact: Tensor) -> dict[str, float]:
    """Root mean square and largest difference of two results, as shares of the exact result's rms."""
    difference, whole = a.double() - b.double(), exact.double().square().mean().sqrt()
    return {"rms": float(difference.square().mean().sqrt() / whole), "max": float(difference.abs().max() / whole)}


class Line(NamedTuple):
    """y = base + slope * n; ``off`` is the largest distance of a point from it, as a share of the point."""

    base: float
    slope: float
    off: float

    def at(self, n: float) -> float:
        return self.base + self.slope * n


def line(points: Mapping[int, float]) -> Line:
    """Through two points or more, by least squares."""
    slope, base = linear_regression([*points], [*points.values()])
    return Line(base, slope, max(abs(base + slope * n - y) / y for n, y in points.items()))


def rate(result: Result) -> float:
    """FLOP/s of the median lap."""
    return result["flops"] / median(result["laps"])


# -------------------------------------------------------------------------------------------------- the report


def report(found: Mapping[str, Result], layers: int) -> str:
    """The tables, as Markdown.

    Args:
        layers: of the whole model, to which training steps are extrapolated.
    """
    peak = rate(found["matmul_peak"]) if _worked(found.get("matmul_peak", {})) else None
    machines = sorted({result["machine"] for result in found.values() if "machine" in result})
    plain = {name: result for name, result in found.items() if part_of(name) != "attention"}
    rows = [_row(name, result, peak) for name, result in plain.items()]
    tables = [_attention(name, result, peak) for name, result in found.items() if part_of(name) == "attention"]
    head = (
        "| case | a step, s | from .. to | all steps, s | TFLOP/s | of the matmul peak | memory, GB | |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return "\n\n".join(["; ".join(machines), "\n".join([head, *rows, *_extrapolated(found, layers)]), *tables])


def _worked(result: Result) -> bool:
    return bool(result) and "fault" not in result


def _row(name: str, result: Result, peak: float | None) -> str:
    if "fault" in result:
        return f"| `{name}` | | | | | | | {result['fault']} |"
    step, told = median(result["laps"]), result["remark"]
    spread = f"{min(result['laps']):.4g} .. {max(result['laps']):.4g}"
    whole = f"{result['steps']} take {result['steps'] * step:.4g}" if "steps" in result else ""
    memory = f"{result['memory_gb']:.1f}"
    return f"| `{name}` | {step:.4g} | {spread} | {whole} | {_speed(result, peak)} | {memory} | {told} |"


def _speed(result: Result, peak: float | None) -> str:
    share = f"{rate(result) / peak:.1%}" if peak else ""
    return f"{rate(result) / 1e12:.4g} | {share}"


def _extrapolated(found: Mapping[str, Result], layers: int) -> list[str]:
    """A row for the whole model, where there are two points for a line."""
    steps = {r["layers"]: r for name, r in found.items() if part_of(name) == "zero3_step" and _worked(r)}
    if len(steps) < 2:
        return []
    seconds, memory = (
        line({n: of(r) for n, r in steps.items()}) for of in (lambda r: median(r["laps"]), lambda r: r["memory_gb"])
    )
    told = (
        f"not measured: a line through {', '.join(map(str, steps))} layers, {seconds.base:.3g} + {seconds.slope:.3g} "
        f"a layer, off by at most {seconds.off:.1%}, of memory {memory.off:.1%}"
    )
    return [f"| `zero3_step.{layers}` | {seconds.at(layers):.4g} | | | | | {memory.at(layers):.1f} | {told} |"]


def _attention(name: str, result: Result, peak: float | None) -> str:
    if "fault" in result:
        return f"`{name}`: {result['fault']}"
    rounding = result["rounding"]
    lines = [
        f"`{name}`, {result['tokens']:,} tokens. Differences are shares of the exact result's rms; rounding it to "
        f"bf16 costs {rounding['rms']:.2g} (largest {rounding['max']:.2g}).",
        "",
        "| backend, or two | ms | TFLOP/s | of the matmul peak | rms | largest | |",
        "|---|---|---|---|---|---|---|",
    ]
    for backend, tried in result["backends"].items():
        lines.append(_backend(backend, tried | {"flops": result["flops"]}, rounding["rms"], peak))
    pairs = [f"| {pair} | | | | {d['rms']:.2g} | {d['max']:.2g} | |" for pair, d in result["pairs"].items()]
    return "\n".join([*lines, *pairs])


def _backend(name: str, tried: Result, rounding: float, peak: float | None) -> str:
    if "fault" in tried:
        return f"| `{name}` | | | | | | {tried['fault']} |"
    verdict = "" if tried["rms"] <= MOST * rounding else f"**more than {MOST:g} times the rounding**"
    errors = f"{tried['rms']:.2g} | {tried['max']:.2g}"
    return f"| `{name}` | {1000 * median(tried['laps']):.4g} | {_speed(tried, peak)} | {errors} | {verdict} |"


# ------------------------------------------------------------------------------------------------ the processes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*dict.fromkeys(map(part_of, cases(REAL)))]
    parser.add_argument("--parts", default=",".join(known), help="some of %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.json"), help="what is there is added to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any machine: see that all of it works")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scale = QUICK if args.quick else REAL
    if args.one:
        print(json.dumps(attempt(cases(scale)[args.one])))
        return 0
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in known]:
        raise ConfigError(f"no part is called {unknown[0]!r}", where="--parts", fix=f"choose among {', '.join(known)}")
    if not (args.quick or torch.cuda.is_available()):
        raise ConfigError("there is no GPU", fix="add --quick to see whether everything works")
    return measure([name for name in cases(scale) if part_of(name) in parts], scale, args.out, args.quick)


def measure(names: Sequence[str], scale: Scale, out: Path, quick: bool) -> int:
    """Each case in a process of its own; 1 where one failed. ``quick`` keeps nothing."""
    found: dict[str, Result] = json.loads(out.read_text()) if out.is_file() and not quick else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        print(f"{name} ({place + 1} of {len(names)})", file=sys.stderr, flush=True)
        found[name] = _alone(name, quick)
        if not quick:
            write_atomically(out, json.dumps(found, indent=1).encode())
    ordered = {name: found[name] for name in cases(scale) if name in found}
    print(report(ordered, scale.sizes.layers))
    return int(any("fault" in found[name] for name in names))


def attempt(work: Callable[[], Result]) -> Result:
    """A case's result with the machine and the most memory it took; where that was too little, that it was."""
    try:
        result = work()
    except torch.OutOfMemoryError as error:
        result = {"fault": _why(error)}
    return result | {"memory_gb": memory(), "machine": machine()}


def _alone(name: str, quick: bool) -> Result:
    command = [sys.executable, "-m", "data_tools.bench.gpu", "--one", name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"fault": f"ended with exit code {done.returncode}"}
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def _why(error: Exception) -> str:
    """One line for a table."""
    first = str(error).strip().split("\n")[0].split(". ")[0].replace("|", "/")
    return f"out of memory: {first}" if isinstance(error, torch.OutOfMemoryError) else first


def memory() -> float:
    """GB at this process's peak: of the GPU, or of main memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    return meter.resident("VmHWM") / GB


def machine() -> str:
    """What it was measured on, and with."""
    cuda = torch.cuda.is_available()
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if cuda else platform.machine()
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
