"""Checkpoints that are whole or are not there.

``checkpoints/step_0000120/`` is written under a temporary name, sealed with the hash of every file and renamed. It
holds DeepSpeed's state of each trained player, each rank's averages and generator, and what the run must agree on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from v4e import dist
from v4e.dist import Ranks
from v4e.errors import CheckpointError
from v4e.train.engines import Cast

SEAL, STATE = "COMPLETE.json", "state.json"
HARMLESS = (  # settings that may change from one process to the next without changing what is computed
    "loop.output", "loop.data", "loop.validation", "loop.steps", "loop.save_every", "loop.sheet_every",
    "loop.log_every", "loop.keep_last", "loop.max_bad_samples", "loop.max_bad_steps", "loop.threads",
    "loop.cache_bytes", "loop.wandb",
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """What a checkpoint says about itself.

    Args:
        step: optimiser steps done.
        world: ranks that wrote it; DeepSpeed's shards fit no other number.
        config: the recipe's settings, flat: "loop.batch" -> "16".
        skipped: steps left out so far because something was not finite.
        skipped_in_a_row: of these, the latest without a good one since.
        quarantined: key -> why, of the damaged samples this far.
    """

    step: int
    world: int
    config: Mapping[str, str]
    skipped: int = 0
    skipped_in_a_row: int = 0
    quarantined: Mapping[str, str] = field(default_factory=dict)


def save(
    folder: Path, state: State, cast: Cast, averages: Mapping[str, Sequence[Tensor]], ranks: Ranks, keep: int
) -> Path:
    """Write, seal, rename, and drop all but the last ``keep``. Every rank takes part."""
    final = folder / f"step_{state.step:07d}"
    partial = folder / f".{final.name}.partial"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / STATE).write_text(json.dumps(asdict(state), indent=1))
    dist.barrier()
    for name, role in cast.trained.items():
        role.engine.save_checkpoint(str(partial), tag=name, save_latest=False)
    save_file(_private(averages), partial / _own(ranks))
    dist.barrier()
    hashes = _hash_together(partial, ranks)
    if ranks.is_main:
        _seal(partial, final, hashes)
        _prune(folder, keep)
    dist.barrier()
    return final


def load(path: Path, cast: Cast, averages: Mapping[str, Sequence[Tensor]], ranks: Ranks) -> None:
    """Put a checkpoint's numbers back where they were; call :func:`read_state` and :func:`agree` first."""
    for name, role in cast.trained.items():
        # DeepSpeed unpickles here. The files are our own, and their hashes have just been checked.
        loaded, _ = role.engine.load_checkpoint(str(path), tag=name, load_lr_scheduler_states=False)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed finds no state of player {name}", where=str(path))
        role.refresh()
    stored = load_file(path / _own(ranks))
    for key, target in _named(averages).items():
        target.copy_(stored[key])
    torch.set_rng_state(stored["generator.cpu"])
    if "generator.cuda" in stored:
        torch.cuda.set_rng_state(stored["generator.cuda"])


def read_state(path: Path) -> State:
    """What a sealed checkpoint says about itself.

    Raises:
        CheckpointError: it is not readable.
    """
    try:
        return State(**json.loads((path / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"not a readable checkpoint: {error}", where=str(path)) from error


def agree(state: State, config: Mapping[str, str], ranks: Ranks, where: Path) -> None:
    """Refuse to go on under settings that would make it another run.

    Raises:
        CheckpointError: naming every setting with both its values.
    """
    keys = sorted(k for k in {*state.config, *config} if not k.startswith(HARMLESS))
    changed = [(k, state.config.get(k, "absent"), config.get(k, "absent")) for k in keys]
    changed = [(k, was, now) for k, was, now in changed if was != now]
    if state.world != ranks.world:
        changed.insert(0, ("number of ranks", str(state.world), str(ranks.world)))
    if changed:
        told = "; ".join(f"{k} was {was} and is now {now}" for k, was, now in changed)
        what = f"the settings differ from the run's: {told}"
        raise CheckpointError(what, where=str(where), fix="use another loop.output")


def find(folder: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, and a sentence for each damaged one that was passed over. All ranks answer alike."""
    complaints = []
    for path in sorted(dist.share(_listed(folder)), reverse=True):
        damage = check(path, ranks)
        if not damage:
            return path, complaints
        complaints.append(f"checkpoint {path} is damaged ({damage}); trying the one before")
    return None, complaints


def check(path: Path, ranks: Ranks) -> str:
    """What is wrong with a checkpoint; empty when nothing is. Every rank hashes its share of the files."""
    try:
        expected = json.loads((path / SEAL).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {SEAL}"
    found = _hash_together(path, ranks)
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    return f"{', '.join(wrong[:3])} differs" if wrong else ""


def _listed(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step_*") if p.is_dir()]


def _own(ranks: Ranks) -> str:
    return f"rank_{ranks.rank}.safetensors"


def _named(averages: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {f"average.{name}.{i}": t for name, tensors in averages.items() for i, t in enumerate(tensors)}


def _private(averages: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """What one rank alone holds. Recipes draw from nouns.Draw; the generators are here for dropout and the like."""
    generators = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["generator.cuda"] = torch.cuda.get_rng_state()
    return {**{k: t.contiguous() for k, t in _named(averages).items()}, **generators}


def _hash_together(path: Path, ranks: Ranks) -> dict[str, str]:
    """Hashes of all files but the seal, the work shared among the ranks."""
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != SEAL)
    files = dist.share(files)
    parts = dist.gather({name: _hash(path / name) for name in files[ranks.rank :: ranks.world]})
    return {name: digest for part in parts for name, digest in part.items()}


def _hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _seal(partial: Path, final: Path, hashes: Mapping[str, str]) -> None:
    """Flush everything, then let the name appear."""
    for name in hashes:
        _flush(partial / name)
    (partial / SEAL).write_text(json.dumps({"files": hashes}, indent=1))
    _flush(partial / SEAL)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    for torn in folder.glob(".*.partial"):  # of a process that was killed while writing
        shutil.rmtree(torn, ignore_errors=True)
    for old in sorted(_listed(folder))[: -max(1, keep)]:
        shutil.rmtree(old, ignore_errors=True)
