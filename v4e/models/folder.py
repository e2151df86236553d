"""Model folders: found here or on the Hub, checked, and read one tensor at a time."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4e.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
STEM = "diffusion_pytorch_model"  # of a transformer's and a VAE's files, diffusers' and Wan's alike
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


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
    """The named tensors of a component: a safetensors file, or a folder of one or of shards with an index.

    Raises:
        CheckpointError: no weights, a pickle, an index that names a missing shard, or a damaged file.
    """

    def __init__(
        self,
        place: Path,
        ignore: Iterable[str] = (),
        rename: Callable[[Collection[str]], Mapping[str, str]] | None = None,
    ) -> None:
        """Read the names alone.

        Args:
            ignore: parts of names that older exports carry and no model uses.
            rename: name in the files -> the name to be known by.
        """
        parts, file_of = tuple(ignore), _index(place)
        known_by = rename(file_of) if rename else {name: name for name in file_of}
        kept = {name: known_by[name] for name in file_of if not any(part in known_by[name] for part in parts)}
        self._places = {known: (file_of[name], name) for name, known in kept.items()}

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor that is there, read from the headers alone."""
        shapes = {}
        for file, names in self._by_file().items():
            with _open(file) as shard:
                there = set(shard.keys())  # an index may promise more
                shapes |= {
                    known: torch.Size(shard.get_slice(name).get_shape())
                    for known, name in names.items()
                    if name in there
                }
        return shapes

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor), one in memory at a time."""
        for file, names in self._by_file().items():
            for known, name in names.items():
                with _open(file) as shard:  # anew for each: pages of a mapped file that were read count as memory
                    yield known, shard.get_tensor(name)

    def _by_file(self) -> dict[Path, dict[str, str]]:
        """File -> name to be known by -> name in the file."""
        grouped: dict[Path, dict[str, str]] = {}
        for known, (file, name) in self._places.items():
            grouped.setdefault(file, {})[known] = name
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


def is_file_of_weights(source: str | Path) -> bool:
    """Whether a source is one file rather than a folder or a Hub id."""
    return Path(source).expanduser().is_file()


def _index(place: Path) -> dict[str, Path]:
    """Name -> file."""
    single, index = place / f"{STEM}.safetensors", place / f"{STEM}.safetensors.index.json"
    if place.is_file() or single.is_file():
        file = _no_pickle(place) if place.is_file() else single
        with _open(file) as opened:
            return dict.fromkeys(opened.keys(), file)
    if not index.is_file():
        for file in sorted(place.glob("*")):
            _no_pickle(file)
        raise CheckpointError("no safetensors weights", where=str(place), fix=f"expected {single.name}")
    try:
        files = {name: place / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"unreadable index: {error!r}", where=str(index), fix="download it again") from error
    if lost := sorted({file.name for file in files.values() if not file.is_file()}):
        raise CheckpointError(
            f"the index names missing shards: {_some(lost)}", where=str(index), fix="download them again"
        )
    return files


def _no_pickle(file: Path) -> Path:
    """The file, unless reading it could run what is inside."""
    if file.suffix in PICKLES:
        raise CheckpointError(
            "the weights are a pickle, which may run code when it is read, so v4e does not read it",
            where=str(file),
            fix="take the release in safetensors, or convert a file that you trust: docs/loading.md says how",
        )
    return file


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"unreadable weights: {error}", where=str(path), fix="download or export them again"
        ) from error
