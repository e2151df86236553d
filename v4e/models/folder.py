"""Model folders in diffusers layout: found here or on the Hub, checked, and read one tensor at a time."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4e.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(source: str | Path, patterns: Iterable[str]) -> Path:
    """The folder of a model: a local one, or the files of a Hub repository that match ``patterns``.

    Raises:
        CheckpointError: no such folder, and the Hub does not have it or cannot be reached.
    """
    text = str(source)
    if not text:
        raise CheckpointError("no model was named", fix="give a folder in diffusers layout, or a Hub id owner/name")
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(text) or Path(text.split("/")[0]).exists():
        raise CheckpointError(
            f"no model folder at {text}", fix="give a folder in diffusers layout, or a Hub id owner/name"
        )
    try:
        return Path(snapshot_download(text, allow_patterns=list(patterns)))
    except Exception as error:  # offline, unknown or gated repository: all mean that there are no weights
        raise CheckpointError(
            f"{text} is no folder here, and the Hub does not give it: {str(error).splitlines()[0].split('. ')[0]}",
            fix="download it with `hf download`, or give a local folder",
        ) from error


def read_config(folder: Path) -> dict[str, object]:
    """A component's config.json, without the private keys that diffusers adds.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no readable model config: {error}", where=str(path), fix="give a folder in diffusers layout"
        ) from error
    return {key: value for key, value in values.items() if not key.startswith("_")}


class Tensors:
    """The named tensors of a component's folder: one safetensors file, or shards with an index.

    Raises:
        CheckpointError: no weights, an index that names a missing shard, or a damaged file.
    """

    def __init__(self, folder: Path, ignore: Iterable[str] = ()) -> None:
        """``ignore``: parts of names that older exports carry and no model uses."""
        parts = tuple(ignore)
        self._file_of = {name: file for name, file in _index(folder).items() if not any(p in name for p in parts)}

    def shapes(self) -> dict[str, torch.Size]:
        """Every tensor's shape, read from the headers alone."""
        shapes = {}
        for file, names in self._by_file().items():
            with _open(file) as shard:
                shapes |= {name: torch.Size(shard.get_slice(name).get_shape()) for name in names}
        return shapes

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor), one in memory at a time."""
        for file, names in self._by_file().items():
            with _open(file) as shard:
                for name in names:
                    yield name, shard.get_tensor(name)

    def _by_file(self) -> dict[Path, list[str]]:
        grouped: dict[Path, list[str]] = {}
        for name, file in self._file_of.items():
            grouped.setdefault(file, []).append(name)
        return grouped


def check(wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size], where: str) -> None:
    """Compare a model's parameters with a checkpoint's.

    Raises:
        CheckpointError: names are missing, unexpected or of another shape; a few of each are listed.
    """
    shared = set(wanted) & set(found)
    shaped = [
        f"{name} {list(found[name])} for {list(wanted[name])}" for name in sorted(shared) if found[name] != wanted[name]
    ]
    faults = {
        "missing": sorted(set(wanted) - set(found)),
        "unexpected": sorted(set(found) - set(wanted)),
        "of another shape": shaped,
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in faults.items() if names)
        raise CheckpointError(f"the weights are not of the model in config.json: {told}", where=where)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _index(folder: Path) -> dict[str, Path]:
    single = folder / "diffusion_pytorch_model.safetensors"
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)  # noqa: SIM118 (safe_open is no mapping)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if not index.is_file():
        raise CheckpointError(
            "no safetensors weights", where=str(folder), fix="expected diffusion_pytorch_model.safetensors"
        )
    files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if lost := sorted({file.name for file in files.values() if not file.is_file()}):
        raise CheckpointError(
            f"the index names missing shards: {_some(lost)}", where=str(index), fix="download them again"
        )
    return files


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"unreadable weights: {error}", where=str(path), fix="download or export them again"
        ) from error
