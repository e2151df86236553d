"""Checkpoints that are whole or are not there.

``checkpoints/step_0000120/`` is written under a temporary name, sealed with the hash of every file and renamed. It
holds each rank's runs of weights, averages and optimiser state by parameter name (``fragments.py``), so that any
number of ranks can go on from it, each rank's generators, and what the run must agree on. Nothing in it is pickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from v4e import dist
from v4e.config import Loop, flat
from v4e.data.disk import flush, share
from v4e.dist import Ranks
from v4e.errors import CheckpointError, TrainingError
from v4e.train.engines import Cast
from v4e.train.fragments import Archive, collect, restore
from v4e.train.schedule import factor
from v4e.verbs import Recipe

SEAL, STATE = "COMPLETE.json", "state.json"
FORMAT = 2  # of the files; 1 was DeepSpeed's own
FILE_BYTES = 1024**3  # about what one file holds, and what a rank copies at a time
HARMLESS = (  # settings that may change from one process to the next without changing what is computed
    "loop.output", "loop.validation", "loop.steps", "loop.save_every", "loop.sheet_every",
    "loop.data", "loop.mixture", "loop.unit", "loop.window",  # the identity of the data tells these
    "loop.disk_cache", "loop.disk_cache_bytes",
    "loop.log_every", "loop.keep_last", "loop.keep_every", "loop.max_bad_samples", "loop.max_bad_steps",
    "loop.spike", "loop.threads", "loop.peak_tflops", "loop.offload.folder", "loop.offload.parameters",
    "loop.cache_bytes", "loop.wandb", "loop.allow_change",
)  # fmt: skip
GENERATOR = "generator"


@dataclass(frozen=True)
class State:
    """What a checkpoint says about itself.

    Args:
        step: optimiser steps done.
        world: ranks that wrote it.
        config: the recipe's settings, flat: "loop.batch" -> "16".
        data: identity of the shards, empty where none was given.
        format: of the files; what says nothing is of the first.
        skipped: steps left out so far because something was not finite.
        skipped_in_a_row: of these, the latest without a good one since.
        quarantined: key -> why, of the damaged samples this far.
        spikes: losses out of the ordinary so far.
        recent: player -> its latest losses, which say what is ordinary.
    """

    step: int
    world: int
    config: Mapping[str, str]
    data: str = ""
    format: int = 1
    skipped: int = 0
    skipped_in_a_row: int = 0
    quarantined: Mapping[str, str] = field(default_factory=dict)
    spikes: int = 0
    recent: Mapping[str, Sequence[float]] = field(default_factory=dict)


def save(
    folder: Path, state: State, cast: Cast, averages: Mapping[str, Sequence[Tensor]], ranks: Ranks, loop: Loop
) -> Path:
    """Write, seal, rename, and drop those that need not be kept. Every rank takes part."""
    final = folder / f"step_{state.step:07d}"
    partial = folder / f".{final.name}.partial"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _room(partial / STATE):
            (partial / STATE).write_text(json.dumps(asdict(state), indent=1))
    dist.barrier()
    kept = (collect(role, averages[name], ranks) for name, role in cast.trained.items())
    _write(partial / f"rank_{ranks.rank:05d}", chain(_generators(ranks), *kept))
    dist.barrier()
    hashes = _hash_together(partial, ranks)
    if ranks.is_main:
        _seal(partial, final, hashes)
        _prune(folder, state.step, loop)
    dist.barrier()
    return final


def load(path: Path, cast: Cast, averages: Mapping[str, Sequence[Tensor]], ranks: Ranks) -> None:
    """Put a checkpoint's numbers back where they were; call :func:`read_state` and :func:`agree` first."""
    archive = Archive(path.glob("rank_*.safetensors"))
    for name, role in cast.trained.items():
        restore(role, averages[name], archive, ranks)
    for name, state, put in _devices():
        if archive.kinds("", f"{name}.{ranks.rank}"):  # none where fewer ranks wrote
            put(archive.read("", GENERATOR, f"{name}.{ranks.rank}", 0, state.numel()))


def read_state(path: Path) -> State:
    """What a sealed checkpoint says about itself.

    Raises:
        CheckpointError: it is not readable.
    """
    try:
        return State(**json.loads((path / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"not a readable checkpoint: {error}", where=str(path)) from error


def agree(state: State, now: State, recipe: Recipe, where: Path) -> None:
    """Refuse to go on where it would be another run, unless ``loop.allow_change`` names the difference.

    Args:
        now: what a checkpoint of this process would say.
        recipe: of this process; a setting that the checkpoint is older than had its default.

    Raises:
        CheckpointError: naming every difference with both its values.
    """
    changed = [c for c in _differences(state, now, recipe) if not _is_among(c[0], recipe.loop.allow_change)]
    if changed:
        told = "; ".join(f"{k} was {was} and is now {new}" for k, was, new in changed)
        fix = f"use another loop.output, or name what may change: loop.allow_change=[{','.join(c[0] for c in changed)}]"
        raise CheckpointError(f"not the run that was begun: {told}", where=str(where), fix=fix)


def _differences(state: State, now: State, recipe: Recipe) -> Iterator[tuple[str, object, object]]:
    """(name, then, now) of all that would change what is computed."""
    loop, unsaid = recipe.loop, flat(type(recipe)())
    if state.format != now.format:
        yield "format", state.format, now.format
    if state.data != now.data:
        yield "data", state.data, now.data
    was = int(state.config["loop.steps"])
    if was != loop.steps and _past(state, recipe, was) != _past(state, recipe, loop.steps):
        yield "loop.steps", was, loop.steps
    # Another number of ranks may want other micro-batches; samples, order and batch stay.
    harmless = HARMLESS if state.world == now.world else (*HARMLESS, "loop.micro_batch")
    for key in sorted({*state.config, *now.config}):
        old, new = state.config.get(key, unsaid.get(key, "absent")), now.config.get(key, "absent")
        if old != new and not _is_among(key, harmless):
            yield key, old, new


def _past(state: State, recipe: Any, steps: int) -> list[tuple[float, Mapping[str, float]]]:
    """Learning rate and weights of the terms at the steps already done, were the run ``steps`` long."""
    so_long: Recipe = replace(recipe, loop=replace(recipe.loop, steps=steps))
    return [(factor(so_long.loop.schedule, step, steps), so_long.weights_at(step)) for step in range(state.step)]


def _is_among(key: str, names: Iterable[str]) -> bool:
    """Whether a setting or the branch it is on is named."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def find(folder: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, and a sentence for each damaged one that was passed over. All ranks answer alike."""
    complaints = []
    for path in sorted(dist.share(listed(folder)), reverse=True):
        damage = check(path, ranks)
        if not damage:
            return path, complaints
        complaints.append(f"checkpoint {path} is damaged ({damage}); trying the one before")
    return None, complaints


def check(path: Path, ranks: Ranks) -> str:
    """What is wrong with a checkpoint; empty when nothing is. Every rank hashes its share of the files."""
    expected = dist.share(_sealed(path))  # as the first rank reads it, or the others would wait for one that cannot
    if expected is None:
        return f"no readable {SEAL}"
    found = _hash_together(path, ranks)
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    return f"{', '.join(wrong[:3])} differs" if wrong else ""


def _sealed(path: Path) -> dict[str, str] | None:
    """Hash of each file by the seal; None where it cannot be read."""
    try:
        return dict(json.loads((path / SEAL).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step_"))


def listed(folder: Path) -> list[Path]:
    """Checkpoints of a run, damaged ones among them, in no order."""
    return [p for p in folder.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit()]


def _write(stem: Path, values: Iterable[tuple[str, Tensor]]) -> None:
    """Safetensors of about FILE_BYTES each, on the disk when this returns."""
    held: dict[str, Tensor] = {}
    number = 0
    for name, tensor in values:
        held[name] = tensor.to("cpu", copy=True).contiguous()
        if sum(t.nbytes for t in held.values()) >= FILE_BYTES:
            _save_file(stem.with_name(f"{stem.name}_{number:03d}.safetensors"), held)
            held, number = {}, number + 1
    _save_file(stem.with_name(f"{stem.name}_{number:03d}.safetensors"), held)


def _save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with _room(path):
        save_file(dict(tensors), path)
        share(path)
        flush(path)


@contextmanager
def _room(path: Path) -> Iterator[None]:
    """TrainingError where the disk does not take it, as is found on one machine and not on the others."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "make room; the same command goes on from the last checkpoint"
        raise TrainingError(f"the checkpoint cannot be written: {error}", where=str(path), fix=fix) from error


def _devices() -> list[tuple[str, Tensor, Callable[[Tensor], None]]]:
    """(name, state, setter) of each generator. Recipes draw from nouns.Draw; these are for dropout and the like."""
    found: list[tuple[str, Tensor, Callable[[Tensor], None]]] = [("cpu", torch.get_rng_state(), torch.set_rng_state)]
    if torch.cuda.is_available():
        found.append(("cuda", torch.cuda.get_rng_state(), torch.cuda.set_rng_state))
    return found


def _generators(ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    for name, state, _ in _devices():
        yield f"|{GENERATOR}|{name}.{ranks.rank}|0", state


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
    """Flush what is not yet on the disk, then let the name appear."""
    with _room(partial / SEAL):
        (partial / SEAL).write_text(json.dumps({"files": hashes}, indent=1))
        for path in (partial / STATE, partial / SEAL, partial):
            flush(path)
    if final.exists():  # damaged, or it would have been gone on from
        os.replace(final, final.with_name(f".{final.name}.damaged.partial"))
    os.replace(partial, final)
    flush(final.parent)


def _prune(folder: Path, step: int, loop: Loop) -> None:
    """Keep the last ones up to the step just saved: what is beyond it was damaged and passed over."""
    for torn in folder.glob(".*.partial"):  # of a process that was killed while writing
        shutil.rmtree(torn, ignore_errors=True)
    for old in sorted(p for p in listed(folder) if step_of(p) <= step)[: -max(1, loop.keep_last)]:
        if not (loop.keep_every and step_of(old) % loop.keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)
