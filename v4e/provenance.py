"""Where an exported model comes from: a README for people, with the front matter that the Hub reads.

A training meets transformers and shards. The README names each together with what tells whether another has the same:
a hash of its bytes, or the commit of its repository.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from v4e import __version__
from v4e.config import Share
from v4e.data.shards import ShardSet
from v4e.errors import DataError
from v4e.journal import scrub
from v4e.models.folder import HUB_ID
from v4e.pipelines import Card

Form = Literal["diffusers", "lora", "original"]
README, REPORT, COMFYUI = "README.md", "report.json", "lora_comfyui.safetensors"
SEEN = ("transformer/config.json", "config.json")  # what a training reads of a Hub repository, by layout
PLAYERS = ("init", "student", "teacher")  # settings that name a model
LICENCE = "apache-2.0"  # Wan2.1's, where the base does not say another
BESIDES = ("n", "n_keep")  # numbers of a report's row that measure nothing
ROUNDED = "{:.4g}"


@dataclass(frozen=True)
class Provenance:
    """What the README of an export says.

    Args:
        name: of the export.
        run: the training's folder.
        base: folder or Hub id that training began with.
        base_model: its id on the Hub; empty for what ``base`` or its own README say.
        weights: which of the run's, such as "averaged".
        steps: optimiser steps done.
        data: identity of the shards, as the run remembers it.
        settings: the recipe's, flat: "loop.batch" -> "16".
        report: of an evaluation; None for one beside the run, where there is one.
    """

    name: str
    run: Path
    base: str
    base_model: str
    weights: str
    steps: int
    data: str
    settings: Mapping[str, str]
    report: Path | None = None

    def readme(
        self, form: Form, card: Card, sees_both_ends: bool, sharded: bool, pipeline: str = "WanImageToVideoPipeline"
    ) -> str:
        """The whole text.

        Args:
            sees_both_ends: FLF2V rather than I2V.
            sharded: the weights lie in several files.
            pipeline: diffusers' class of it.

        Raises:
            DataError: the report named is none.
        """
        what = "imagines how a first image becomes a last one" if sees_both_ends else "edits images by an instruction"
        parts = [
            f"---\n{self._front_matter(form, sees_both_ends)}\n---",
            f"# {self.name}",
            f"{_HOLDS[form]} that {what}, trained with v4e {__version__} from `{self.base}` ({self.weights} weights).",
            *([] if sees_both_ends or (sharded and form == "original") else _usage(form, card, self.base, pipeline)),
            "## Trained from",
            _table(("what", "name", "identity"), self._sources()),
            f"{self.steps} steps of {self.settings.get('loop.batch', '?')} samples.",
            *self._measured(),
            "## Settings",
            _table(("setting", "value"), [(f"`{k}`", f"`{v}`") for k, v in self._shown_settings() if v]),
        ]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self, form: Form, sees_both_ends: bool) -> str:
        own = _front_matter_of(self.base)
        named = self.base_model or (self.base if _is_on_the_hub(self.base) else own.base_model)
        return ModelCardData(
            license=own.license or LICENCE,
            base_model=named,
            base_model_relation=None if not named else "adapter" if form == "lora" else "finetune",
            library_name="diffusers",
            pipeline_tag="image-to-video" if sees_both_ends else "image-to-image",
            tags=["v4e", "lora"] if form == "lora" else ["v4e"],
        ).to_yaml()

    def _shown_settings(self) -> Iterator[tuple[str, object]]:
        yield from ((key, scrub(value, key.rpartition(".")[2])) for key, value in sorted(self.settings.items()))

    def _sources(self) -> Iterator[Sequence[str]]:
        models = {part: self.settings[part] for part in PLAYERS if self.settings.get(part)}
        if self.base not in models.values():
            models = {"base": self.base, **models}
        for part, name in models.items():
            yield part, f"`{name}`", identity(name) or "not at hand"
        for share, shards in shard_sets(self.settings):
            weight = f", weight {share.weight:g}" if self.settings.get("loop.data", "") != share.path else ""
            yield f"shards{weight}", f"`{share.path}`", self._shards(shards)

    def _shards(self, found: ShardSet | None) -> str:
        """The manifest's hash, and the number of samples where the run remembers the same hash."""
        if found is None or found.identity not in (self.data or found.identity):
            why = "no longer at hand" if found is None else f"since changed to {found.identity}"
            return f"manifest {self.data or 'not remembered'}, {why}"
        made = found.meta.settings.get("teacher")
        return f"manifest {found.identity}, {len(found)} samples" + (f", rolled out by teacher {made}" if made else "")

    def _measured(self) -> list[str]:
        file = self.report or next((f for f in _beside(self.run) if f.is_file()), None)
        if file is None:
            return []
        rows = [*_rows(file)]
        if not rows:  # another program's
            return []
        metrics = dict.fromkeys(name for *_, values in rows for name, value in values.items() if value is not None)
        cells = [(method, steps, *(_number(values.get(m)) for m in metrics)) for method, steps, values in rows]
        return ["## Measured", _table(("method", "solver steps", *metrics), cells)]


def shard_sets(settings: Mapping[str, str]) -> list[tuple[Share, ShardSet | None]]:
    """What a training's settings name, in their order; None for a set that is no longer at hand."""
    mixed = [Share(**share) for share in ast.literal_eval(settings.get("loop.mixture") or "[]")]
    named = mixed or [Share(settings.get("loop.data", ""))]
    return [(share, _opened(share.path)) for share in named if share.path]


def _opened(folder: str) -> ShardSet | None:
    try:
        return ShardSet.open(folder, verify="none")
    except DataError:
        return None


def identity(name: str) -> str:
    """Which weights a name stands for: a hash of a local transformer's files, or the commit of a Hub repository that
    is here; empty where neither is."""
    if (place := Path(name).expanduser()).exists():
        return f"blake2b {_hash(place)}"
    cached = [try_to_load_from_cache(name, file) for file in SEEN] if HUB_ID.fullmatch(name) else []
    commits = [re.search(r"/snapshots/([^/]+)/", path) for path in cached if isinstance(path, str)]
    return f"commit {commits[0][1]}" if commits and commits[0] else ""


def _hash(place: Path) -> str:
    """Sixteen hex digits over a transformer's safetensors, in the order of their names."""
    folder = place / "transformer" if (place / "transformer").is_dir() else place
    files, digest = [place] if place.is_file() else sorted(folder.glob("*.safetensors")), hashlib.blake2b(digest_size=8)
    for file in files:
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def _is_on_the_hub(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _front_matter_of(base: str) -> ModelCardData:
    """What a local base's README says in front; nothing where there is none."""
    file = Path(base).expanduser() / README
    try:
        said = ModelCard.load(file).data if file.is_file() else ModelCardData()
    except (OSError, ValueError) as error:
        raise DataError(f"unreadable front matter: {error}", where=str(file), fix="mend or remove the file") from error
    return ModelCardData(**said.to_dict(), ignore_metadata_errors=True)


def _beside(run: Path) -> Iterator[Path]:
    yield from (run / REPORT, run.resolve().parent / REPORT)


def _rows(file: Path) -> Iterator[tuple[str, str, Mapping[str, float | None]]]:
    """(method, solver steps, metric -> value) of a report of v4e's."""
    try:
        methods = json.loads(file.read_text()).get("methods", {})
        for method, by_steps in methods.items():
            for steps, entry in by_steps.items():
                numbers = {k: v for k, v in entry["overall"].items() if not isinstance(v, dict) and k not in BESIDES}
                yield method, "" if steps == "0" else steps, numbers
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"no report of v4e's: {error!r}", where=str(file), fix="name another with --report") from error


def _number(value: float | None) -> str:
    return "" if value is None else ROUNDED.format(value)


def _table(titles: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ----------------------------------------------------------------------------------------------------- usage

_HOLDS = {
    "diffusers": "A Wan model",
    "lora": "Low-rank adapters for a Wan model",
    "original": "A Wan model, under its authors' names,",
}
_LOADING = {
    "diffusers": [
        "from diffusers import {pipeline}",
        'pipe = {pipeline}.from_pretrained("THIS_FOLDER")',
    ],
    "lora": [
        "from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline",
        'pipe = WanImageToVideoPipeline.from_pretrained("{base}")',
        'pipe.load_lora_weights("THIS_FOLDER")',
        'pipe.scheduler = UniPCMultistepScheduler.from_pretrained("THIS_FOLDER", subfolder="scheduler")',
    ],
    "original": [
        "from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel",
        'file = "THIS_FOLDER/diffusion_pytorch_model.safetensors"',
        'transformer = WanTransformer3DModel.from_single_file(file, config="{base}", subfolder="transformer")',
        'pipe = WanImageToVideoPipeline.from_pretrained("{base}", transformer=transformer)',
        'pipe.scheduler = UniPCMultistepScheduler.from_pretrained("THIS_FOLDER", subfolder="scheduler")',
    ],
}
_COMFYUI = {
    "lora": f"ComfyUI takes `{COMFYUI}`",
    "original": "ComfyUI takes `diffusion_pytorch_model.safetensors`",
}


def _usage(form: Form, card: Card, base: str, pipeline: str) -> list[str]:
    height, width = card.sizes[0]
    asking = [
        f'frames = pipe(image, "make it snow", height={height}, width={width}, num_frames={card.frames},',
        f"              num_inference_steps={card.steps}, guidance_scale={card.guidance}).frames[0]",
    ]
    loading = [line.format(base=base, pipeline=pipeline) for line in _LOADING[form]]
    code = "\n".join(["```python", *loading, *asking, "```"])
    ours = f'```\nv4e edit PHOTO "make it snow" --model THIS_FOLDER -o out.png --steps {card.steps}\n```'
    solver = f"sampler `euler`, {card.steps} steps, cfg {card.guidance:g}, shift {card.shift:g} (`ModelSamplingSD3`)"
    return [
        *([ours] if form == "diffusers" else []),
        "In stock diffusers; the edit is the last frame:",
        code,
        *([f"{_COMFYUI[form]}: {solver}."] if form in _COMFYUI else []),
    ]
