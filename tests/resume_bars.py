"""The trainer's bars for resuming, measured: ``python -m tests.resume_bars`` (tiny model, CPU, gloo; no launcher).

Straight against broken runs on 2 ranks to the bit, 2 -> 1 -> 4 ranks within a tolerance, and kills at random instants.
"""

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import ended, fork

from v4e import journal

COMMON = ("loop.batch=8", "loop.micro_batch=2", "loop.ema=0.9", "loop.steps=40", "loop.keep_last=2")
MUON = ("optim.name=muon", "loop.clip=0.0")
TOLERANCE = {
    "adamw": 1e-5,
    "muon": 2e-3,
}  # of fp32 losses, relative; Muon orthogonalises in bf16, a flipped bit is seen
PREEMPTED = 75


def run(folder: Path, ranks: int, *words: str, fate: str = "") -> list[int | None]:
    """One start of a run; exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    return ended(fork(ranks, folder / "stderr", str(folder), *COMMON, *words, *(("--fate", fate) if fate else ())))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint and the exported weights hold."""
    last = max((folder / "checkpoints").glob("step_*"))
    files = [*last.glob("*.safetensors"), *folder.glob("weights/*/*.safetensors")]
    return {f"{f.parent.name}/{f.name}|{k}": t for f in files for k, t in load_file(f).items()}


def losses(folder: Path) -> list[float]:
    lines = journal.read(folder)
    assert [line["step"] for line in lines] == list(range(1, 1 + len(lines))), "a step is missing or told twice"
    return [line["student/loss"] for line in lines]


def order(folder: Path, ranks: Callable[[int], int], micro: int = 2) -> list[list[str]]:
    """Keys of each step in global order, as the last process to take the step met them."""
    taken: dict[tuple[int, int], list[str]] = {}
    for file in folder.glob("keys_*.txt"):
        for step, rank, keys in re.findall(r"^(\d+) (\d+) (.*)$", file.read_text(), re.M):
            taken[int(step), int(rank)] = json.loads(keys.replace("'", '"'))
    return [_joined([taken[s, r] for r in range(ranks(s))], micro) for s in sorted({s for s, _ in taken})]


def _joined(shares: Sequence[list[str]], micro: int) -> list[str]:
    slices = [[keys[i : i + micro] for i in range(0, len(keys), micro)] for keys in shares]
    return [key for turn in zip(*slices, strict=True) for piece in turn for key in piece]


def exact(folder: Path, *words: str) -> str:
    """40 steps straight against 10, SIGKILL, 10, SIGTERM, 20 on two ranks."""
    whole, parts = folder / "whole", folder / "parts"
    words = ("loop.save_every=4", "loop.precision=bf16", *words)
    codes = [run(whole, 2, *words)]
    codes += [run(parts, 2, *words, fate=fate) for fate in ("10:1:SIGKILL", "20:0:SIGTERM", "")]
    assert codes[0] == codes[3] == [0, 0] and codes[1][1] == -9 and codes[2] == [PREEMPTED] * 2, codes
    one, other = tensors(whole), tensors(parts)
    assert one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items()), "tensors differ"
    assert losses(whole) == losses(parts), "losses differ"
    assert order(whole, lambda _: 2) == order(parts, lambda _: 2), "keys differ"
    return f"{len(one)} tensors, 40 losses and 320 keys the same to the bit"


def elastic(folder: Path, tolerance: float, *words: str) -> str:
    """2 -> 1 -> 4 ranks against 2 all along, in fp32."""
    whole, parts = folder / "whole", folder / "parts"
    words = ("loop.precision=fp32", *words)
    codes = [run(whole, 2, *words)]
    codes += [run(parts, n, *words, fate=f) for n, f in ((2, "13:1:SIGTERM"), (1, "26:0:SIGUSR1"), (4, ""))]
    assert codes == [[0] * 2, [PREEMPTED] * 2, [PREEMPTED], [0] * 4], codes
    assert order(whole, lambda _: 2) == order(parts, lambda s: 2 if s < 13 else 1 if s < 26 else 4), "keys differ"
    worst = max(abs(a - b) / abs(a) for a, b in zip(losses(whole), losses(parts), strict=True))
    assert worst <= tolerance, f"losses differ by {worst:.1e}"
    return f"320 keys in the same order, losses within {worst:.1e}"


def kills(folder: Path, count: int, seed: int) -> str:
    """SIGKILL to one rank or both at random instants, a save at every step; then the bits of a straight run."""
    words, chance = ("loop.save_every=1", "loop.precision=bf16", "zero_stage=1"), random.Random(seed)
    whole = folder / "whole"
    assert run(whole, 2, *words) == [0, 0]
    wanted, told, torn, slowest, done, runs = tensors(whole), losses(whole), 0, 0.0, 0, 0
    while done < count:
        broken, runs = folder / f"broken_{runs}", runs + 1
        for seconds, partial in _killed_until_done(broken, words, chance, count - done):
            done, torn, slowest = done + 1, torn + partial, max(slowest, seconds)
        found = tensors(broken)
        assert all(torch.equal(t, found[k]) for k, t in wanted.items()), "tensors differ"
        assert losses(broken) == told and order(broken, lambda _: 2) == order(whole, lambda _: 2)
    told_s = f"{torn} during a save; the other ranks ended within {slowest:.0f} s"
    return f"{count} in {runs} runs, {told_s}; 0 unrecoverable, 0 steps lost or doubled"


def _killed_until_done(
    folder: Path, words: Sequence[str], chance: random.Random, left: int
) -> Iterator[tuple[float, bool]]:
    """Start a run again and again until it ends; (how long ranks outlived the kill, whether a save was torn)."""
    folder.mkdir(parents=True)
    while True:
        made = fork(2, folder / "stderr", str(folder), *COMMON, *words)
        if left:
            _wait_for_a_step(folder, [p.is_alive for p in made])
            time.sleep(chance.uniform(0, 2.0))
            for process in chance.choice((made, made[:1], made[1:])):
                process.kill()
        began = time.monotonic()
        codes = ended(made)
        if codes == [0, 0]:
            return
        assert -9 in codes, codes
        left -= 1
        yield time.monotonic() - began, any((folder / "checkpoints").glob(".*.partial"))


def _wait_for_a_step(folder: Path, alive: Sequence[Callable[[], bool]]) -> None:
    """Until this process has begun a step."""
    keys = folder / "keys_0.txt"
    before = keys.stat().st_size if keys.exists() else 0
    while all(a() for a in alive) and not (keys.exists() and keys.stat().st_size > before):
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/resume_bars"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("exact", "elastic", "kills"), help="one of the three")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    for stage, words in ((3, ()), (1, MUON)):
        name, words = ("muon" if words else "adamw"), (f"zero_stage={stage}", *words)
        if args.only in (None, "exact"):
            print(f"exact, ZeRO-{stage}, {name}: {exact(args.folder / f'exact_{stage}', *words)}", flush=True)
        if args.only in (None, "elastic"):
            told = elastic(args.folder / f"elastic_{stage}", TOLERANCE[name], *words)
            print(f"elastic, ZeRO-{stage}, {name}: {told}", flush=True)
    if args.only in (None, "kills"):
        print(f"kills: {kills(args.folder / 'kills', args.kills, args.seed)}", flush=True)


if __name__ == "__main__":
    main()
