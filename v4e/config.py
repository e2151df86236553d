"""One typed tree: defaults <- YAML <- dotlist, strict, frozen, printed. No flags beside it."""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from v4e.errors import ConfigError

R = TypeVar("R")


@dataclass(frozen=True)
class Schedule:
    """Learning rate over steps, as a factor of the optimiser's lr.

    ``warmup`` steps of linear rise, then ``constant``; ``cosine`` falls to ``floor`` at the last step; ``wsd``
    stays at one and falls linearly over the last ``decay`` fraction of the steps.
    """

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup: int = 0
    decay: float = 0.2
    floor: float = 0.0


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases; the key comes from its own login, never from a config."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "v4e"
    name: str = ""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers, trained in place of all else; rank 0 for none.

    Args:
        rank: of each adapter.
        scale: what its product is multiplied by; others write alpha / rank.
        layers: globs over names of linear layers.
    """

    rank: int = 0
    scale: float = 1.0
    layers: tuple[str, ...] = ("*blocks.*",)


Place = Literal["none", "cpu", "nvme"]
Checkpointing = Literal[False, True, "selective"]


@dataclass(frozen=True)
class Offload:
    """What a training keeps outside the accelerator's memory: in main memory, or (ZeRO-3) on a disk.

    Args:
        optimizer: fp32 weights, gradients and AdamW's state; DeepSpeed's AdamW for CPUs then steps them.
        parameters: weights of the forward pass while no layer needs them; ZeRO-3.
        folder: on the disk, for ``nvme``; what is in there lives no longer than the process.
    """

    optimizer: Place = "none"
    parameters: Place = "none"
    folder: str = ""


@dataclass(frozen=True)
class Share:
    """One of several shard sets that train together.

    Args:
        path: its folder, here or behind a URL.
        weight: how often its samples are met, in proportion to the others'.
    """

    path: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Loop:
    """What the training loop needs to know; nothing of it is about a model.

    Args:
        output: run directory: checkpoints, journal, contact sheets.
        data: shard folder to train on.
        mixture: several of them, each with its weight, in place of ``data``.
        unit: samples in a row that are of one size, where sets of several train together; 0 for a whole step.
        window: shards of a set whose samples are shuffled together; 0 for all.
        validation: shard folder for contact sheets and validation losses; empty for none.
        steps: optimiser steps.
        batch: samples per step over all ranks and accumulated micro-batches.
        micro_batch: samples per rank and forward pass.
        precision: fp32, or bf16 weights with fp32 master weights.
        clip: largest gradient norm; 0 for none.
        ema: decay of the averaged weights; 0 for none.
        train: globs over names of parameters, such as ``blocks.3.*``: those that train; empty for all.
        offload: what leaves the accelerator's memory.
        checkpointing: recompute activations block by block; ``selective`` keeps those of matrix products and attention.
        compile: ``torch.compile`` each repeated block; without ZeRO.
        save_every, sheet_every, log_every: in steps; 0 for only at the end.
        keep_last: checkpoints kept.
        keep_every: those of every so many steps are kept for good; 0 for none.
        max_bad_samples: quarantined samples that are put up with; one more stops the run.
        max_bad_steps: steps with non-finite gradients in a row at which the run stops.
        spike: a loss this many robust standard deviations above the recent median is flagged; 0 for none.
        allow_change: settings, ``data`` or ``format``, that may differ from those the run was begun with.
        threads: CPU threads per rank; 0 shares the cores among the ranks.
        peak_tflops: of one accelerator in the training's precision, for its utilisation; 0 looks its name up.
        cache_bytes: of samples kept in each rank's memory.
        disk_cache: folder that shards behind a URL are downloaded to; empty to ask the store for each sample.
        disk_cache_bytes: that the folder may hold; ranks and jobs of a machine may share it.
    """

    output: str = ""
    data: str = ""
    mixture: list[Share] = field(default_factory=list)
    unit: int = 0
    window: int = 0
    validation: str = ""
    steps: int = 1000
    batch: int = 16
    micro_batch: int = 16
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    clip: float = 1.0
    ema: float = 0.0
    train: tuple[str, ...] = ()
    lora: Lora = field(default_factory=Lora)
    offload: Offload = field(default_factory=Offload)
    checkpointing: Checkpointing = False
    compile: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    save_every: int = 0
    sheet_every: int = 0
    log_every: int = 10
    keep_last: int = 2
    keep_every: int = 0
    max_bad_samples: int = 0
    max_bad_steps: int = 10
    spike: float = 10.0
    allow_change: tuple[str, ...] = ()
    threads: int = 0
    peak_tflops: float = 0.0
    cache_bytes: int = 0
    disk_cache: str = ""
    disk_cache_bytes: int = 0
    wandb: Wandb = field(default_factory=Wandb)


def load(
    path: str | Path | None, overrides: Sequence[str], pick: Callable[[str], type[R]], *, recipe: str | None = None
) -> R:
    """Read ``recipe:``, pick its class, merge defaults <- YAML <- dotlist, and freeze.

    Args:
        path: YAML file, or None for defaults alone.
        overrides: ``key.sub=value`` words.
        pick: maps the recipe's name to its dataclass.
        recipe: the name, where there is no file to say it.

    Raises:
        ConfigError: missing file, unreadable YAML, unknown key (its nearest neighbour is named), wrong type.
    """
    where = str(path or "defaults")
    tree = _read(Path(path)) if path else OmegaConf.create({})
    name = recipe or tree.pop("recipe", None)
    if not name:
        raise ConfigError(
            "the config does not say which recipe it is for", where=where, fix="add a line `recipe: video4edit`"
        )
    return build(pick(str(name)), tree, overrides, where)


def build(cls: type[R], tree: DictConfig, overrides: Sequence[str], where: str) -> R:
    """Merge a tree and dotlist words into the dataclass ``cls``; see :func:`load`."""
    words = _tree_of(overrides, where)
    for part, origin in ((tree, where), (words, "command line")):
        _refuse_unknown(cls, OmegaConf.to_container(part), origin)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), tree, words)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        place, key = _culprit(cls, ((tree, where), (words, "command line")))
        raise ConfigError(str(error).splitlines()[0], where=f"{place}, key {key}") from error


def _tree_of(overrides: Sequence[str], where: str) -> DictConfig:
    tree = OmegaConf.create({})
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"override {word!r} is not of the form key=value", where=where)
        try:
            tree.merge_with_dotlist([word])
        except (OmegaConfBaseException, YAMLError) as error:
            fix = "a shell takes quotes away: quote the word as a whole, and inside it what holds a * or a colon"
            raise ConfigError(f"override {word!r} is not YAML after its =", where="command line", fix=fix) from error
    return tree


def to_dict(config: object) -> dict[str, Any]:
    """A frozen config as plain nested values, for printing, hashing and saving."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[arg-type]


def flat(config: object) -> dict[str, str]:
    """A config as "loop.batch" -> "16"."""
    return {key: str(value) for key, value in _leaves(to_dict(config))}


def to_yaml(config: object) -> str:
    """The whole tree, defaults included, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def config_hash(config: object) -> str:
    """Sixteen hex digits that change when any setting does."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError("no such config file", where=str(path), fix="see configs/ for those that ship with v4e")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # yaml raises many kinds; each is the user's file being unreadable
        raise ConfigError(f"not readable as YAML: {str(error).splitlines()[0]}", where=str(path)) from error
    if not isinstance(tree, DictConfig):
        raise ConfigError("a config is a mapping of keys to values", where=str(path))
    return tree


def _culprit(cls: type, parts: Sequence[tuple[DictConfig, str]]) -> tuple[str, str]:
    """Where the first setting that fails by itself was said, and its key; omegaconf does not always know."""
    for tree, where in parts:
        for key, value in _leaves(OmegaConf.to_container(tree)):
            try:
                OmegaConf.merge(OmegaConf.structured(cls), _nested(key, value))
            except OmegaConfBaseException:
                return where, key
    return parts[0][1], "?"


def _leaves(values: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("loop.steps", 3) and so on; a list is a leaf."""
    if not isinstance(values, dict):
        yield prefix.removesuffix("."), values
        return
    for key, value in values.items():
        yield from _leaves(value, f"{prefix}{key}.")


def _nested(key: str, value: object) -> object:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _refuse_unknown(cls: type, values: object, where: str, prefix: str = "") -> None:
    """Name the nearest neighbour of an unknown key, which omegaconf does not."""
    if not isinstance(values, dict):
        return
    known = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            hint = f"did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"unknown key {prefix}{key}", where=where, fix=hint)
        kind = known[key]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _refuse_unknown(kind, value, where, f"{prefix}{key}.")
