"""A training run to what others load without v4e, each proved by loading it.

Three forms, each a folder that can be uploaded as it is: a whole pipeline for diffusers; the adapters alone (LoRA),
under the names of diffusers and of ComfyUI; the whole transformer under its authors' names. Each holds a README
(``provenance.py``) and a card (``v4e.json``: how to ask it), and appears under its name only when stock diffusers has
loaded it and made the frames that the weights in memory make.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ChronoEditPipeline, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from v4e.data.disk import flush, share, writable
from v4e.errors import CheckpointError, ConfigError
from v4e.models.folder import check, locate
from v4e.models.lora import adapted, added, in_authors_words, in_diffusers_words
from v4e.models.original import NOT_IN_DIFFUSERS, POSITIONS, save_original
from v4e.models.wan import SKIP, Kind, WanBackbone, declare
from v4e.nouns import Clip
from v4e.pipelines import (
    CARD,
    MODEL_INDEX,
    Card,
    EditPipeline,
    TeacherPipeline,
    as_clip,
    few_step_scheduler,
    name_stock_classes,
    stock_pipeline,
)
from v4e.provenance import COMFYUI, README, Form, Provenance, shard_sets

Weights = Literal["average", "last", "both"]
OWN = ("transformer", "scheduler")  # written here; every other part is the base's
AVERAGES = "ema"  # diffusers' variant, where both are written
TOLERANCE = 1  # of 255: a frame's rounding may fall the other way on another device
PROBE_PX, PROBE_FRAMES, PROBE_STEPS = 64, 5, 2
WHOLE = {"diffusers": "10GB", "original": "1TB"}  # ComfyUI and diffusers' from_single_file take one file


@dataclass(frozen=True)
class Trained:
    """What a run leaves.

    Args:
        folder: the run.
        player: whose weights.
        base: folder or Hub id that training began with.
        average: the exponential averages instead of the last weights.
        settings: the recipe's, flat: "loop.batch" -> "16".
        steps: optimiser steps done.
        data: identity of the shards.
    """

    folder: Path
    player: str
    base: str
    average: bool
    settings: Mapping[str, str]
    steps: int = 0
    data: str = ""

    @staticmethod
    def of(run: Path, player: str = "student", base: str | None = None, weights: Weights | None = None) -> "Trained":
        """Find a finished run.

        Args:
            base: None for the setting named like the player, or ``init``.
            weights: None for the averages where they were kept; of both, this is the last ones.

        Raises:
            CheckpointError: there is no finished run, or it kept no averages.
            ConfigError: the settings do not say what it began with.
        """
        state = _state(run)
        settings = state["config"]
        base = base or settings.get(player) or settings.get("init")
        if not base:
            raise ConfigError("the run does not say what it began with", where=str(run), fix="name it with --base")
        kept = any((run / "weights" / player).glob("average*.safetensors"))
        if weights in ("average", "both") and not kept:
            raise CheckpointError(
                "the run kept no averages", where=str(run), fix="train with loop.ema=0.99, or export the last weights"
            )
        average = kept if weights is None else weights == "average"
        return Trained(run, player, base, average, settings, state["step"], state.get("data", ""))

    @property
    def temporal_skip(self) -> int:
        """See :meth:`WanBackbone.stand_apart`; 0 where the base's positions were kept."""
        return int(self.settings.get("temporal_skip", 0))

    @property
    def scale(self) -> float:
        """What the adapters' products were multiplied by."""
        return float(self.settings.get("loop.lora.scale", 1.0))

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the network by name, fp32, adapters added.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        return self._tensors(self.folder / "weights" / self.player)

    def adapters(self) -> dict[str, Tensor]:
        """The adapters alone, fp32.

        Raises:
            ConfigError: none were trained.
            CheckpointError: files are missing or damaged.
        """
        home = self.folder / "weights" / self.player / "adapters"
        if not home.is_dir():
            raise ConfigError(
                "the run trained no adapters",
                where=str(self.folder),
                fix="export another form, or train with loop.lora.rank=16",
            )
        return self._tensors(home)

    def card(self, base: Card) -> Card:
        """How the model wants to be asked: the base's card, with the clips it was trained on and its shift."""
        card = replace(base, shift=float(self.settings.get("shift", base.shift)))
        grids = [shards.meta.student for _, shards in shard_sets(self.settings) if shards]
        if not grids:
            return card
        return replace(card, frames=grids[0].T, sizes=tuple(dict.fromkeys((grid.H, grid.W) for grid in grids)))

    def _tensors(self, home: Path) -> dict[str, Tensor]:
        stem = "average" if self.average else "weights"
        return {name: t for file in _files(home, stem) for name, t in _read(file)}


@dataclass(frozen=True)
class _Making:
    """An export on its way.

    Args:
        source: the base's folder.
        folder: where to write.
        state: the network's tensors as they are stored; of adapters, as they were trained.
        shard_size: most bytes of a file of weights, as diffusers writes it: "10GB".
        model: the architecture without memory.
    """

    trained: Trained
    source: Path
    folder: Path
    kind: Kind
    card: Card
    dtype: torch.dtype
    state: Mapping[str, Tensor]
    shard_size: str
    model: WanBackbone


def export_run(
    run: Path,
    out: Path,
    *,
    form: Form = "diffusers",
    player: str = "student",
    base: str | None = None,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str | None = None,
    base_model: str = "",
    report: Path | None = None,
) -> Path:
    """Write a finished run for others and prove it; an earlier export at ``out`` is replaced.

    Args:
        run: its ``loop.output``.
        form: a whole pipeline, the adapters alone, or the transformer under its authors' names.
        player, base, weights: see :meth:`Trained.of`; the encoders, the VAE and the architecture are the base's.
            ``both`` writes the averages beside the last weights, as diffusers' variant ``ema``.
        dtype: to store in; None for bfloat16, and for float32 of adapters.
        shard_size: most bytes of a file of weights; None for 10GB in diffusers' form, one file in the authors'.
        base_model, report: see :class:`v4e.provenance.Provenance`.

    Raises:
        CheckpointError: the run is unfinished, its weights are damaged or of another model, or stock diffusers makes
            other frames than the weights do.
        ConfigError: the form is not to be had of this run.
        DataError: the disk is full.
    """
    trained = Trained.of(Path(run), player, base, weights)
    _refuse_positions(trained, form)
    if weights == "both" and form != "diffusers":
        raise ConfigError(f"variants are diffusers', and {form} has none", fix="export twice: average, then last")
    source, write = locate(trained.base, ["*"]), _WRITERS[form]
    with _appearing(Path(out)) as folder:
        making = _begin(trained, source, folder, form, dtype, shard_size)
        write(making)
        if weights == "both":
            _add_averages(making)
        with writable(folder):
            making.card.write(folder)
            (folder / README).write_text(
                _readme(making, Path(out).name, form, _told(trained, weights), base_model, report)
            )
    return Path(out)


def _begin(
    trained: Trained, source: Path, folder: Path, form: Form, dtype: torch.dtype | None, shard_size: str | None
) -> _Making:
    dtype = dtype or (torch.float32 if form == "lora" else torch.bfloat16)
    state = _stored(trained.weights(), torch.float32 if form == "lora" else dtype, trained.folder)
    kind: Kind = "flf2v" if POSITIONS in state else "i2v"
    size, model = shard_size or WHOLE.get(form, ""), _declared(trained, source, kind, state)
    return _Making(trained, source, folder, kind, trained.card(Card.read(source)), dtype, state, size, model)


def _refuse_positions(trained: Trained, form: Form) -> None:
    """ConfigError where a form would leave behind that the two latent frames stand apart."""
    if form == "diffusers":
        return
    with torch.device("meta"):
        base = declare(trained.base).build()
    if trained.temporal_skip or base.config.get(SKIP):
        raise ConfigError(
            f"the model's frames stand apart (temporal_skip), which {form} cannot say", fix="export --form diffusers"
        )


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype, where: Path) -> dict[str, Tensor]:
    """Tensors as they are to be stored.

    Raises:
        CheckpointError: not all are finite; frames of such weights would agree in being no frames.
    """
    state = {name: t.to(dtype) for name, t in tensors.items()}
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        raise CheckpointError(
            f"{len(bad)} tensors are not finite as {str(dtype).removeprefix('torch.')}: {', '.join(bad[:3])}",
            where=str(where),
            fix="export the other --weights, or as float32",
        )
    return state


def _told(trained: Trained, weights: Weights | None) -> str:
    return "last, and as variant ema averaged" if weights == "both" else "averaged" if trained.average else "last"


def _readme(making: _Making, name: str, form: Form, weights: str, base_model: str, report: Path | None) -> str:
    run, sharded = making.trained, any(making.folder.glob("*.index.json"))
    about = Provenance(name, run.folder, run.base, base_model, weights, run.steps, run.data, run.settings, report)
    pipeline = stock_pipeline(making.model.config).__name__
    return about.readme(form, making.card, making.kind == "flf2v", sharded, pipeline)


# --------------------------------------------------------------------------------------------------- folder


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its name at the end, or leaves nothing."""
    if out.exists() and not (out / CARD).is_file():
        raise CheckpointError("is there already and is no export", where=str(out), fix="name another folder")
    partial, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writable(out.parent):
            partial.mkdir(parents=True)
        yield partial
        with writable(out.parent):
            _settle(partial)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)  # of an export that was killed just here
                os.replace(out, old)
            os.replace(partial, out)
            flush(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Return when all of it is on the disk, for everybody who may read the folder."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            share(path)
        flush(path)


def _copy_parts(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """The base's encoders and VAE, as they are, and its index with the stock names of a transformer's config."""
    with writable(folder):
        shutil.copy(_index_of(source), folder)
        for part in json.loads((folder / MODEL_INDEX).read_text()):
            if (source / part).is_dir() and part not in OWN:
                shutil.copytree(source / part, folder / part)
    name_stock_classes(folder, config)


def _index_of(source: Path) -> Path:
    """The base's index; its encoders and VAE make the probes' frames in every form."""
    if not (index := source / MODEL_INDEX).is_file():
        fix = "name a base in diffusers layout with --base; docs/loading.md says how a transformer alone becomes one"
        raise CheckpointError(f"no {MODEL_INDEX}", where=str(source), fix=fix)
    return index


def _backbone(trained: Trained, source: Path, kind: Kind) -> WanBackbone:
    return declare(source, kind=kind, attention="native", temporal_skip=trained.temporal_skip).build()


def _declared(trained: Trained, source: Path, kind: Kind, state: Mapping[str, Tensor]) -> WanBackbone:
    """The architecture without memory.

    Raises:
        CheckpointError: the weights are not of the base's architecture.
    """
    with torch.device("meta"):
        model = _backbone(trained, source, kind)
    wanted, found = dict(model.named_parameters()), {name: t.shape for name, t in state.items()}
    check({name: p.shape for name, p in wanted.items()}, found, "the run's weights")
    return model


def _write_scheduler(making: _Making) -> None:
    """The few-step solver of an editor; a teacher keeps its own."""
    place = making.folder / "scheduler"
    with writable(making.folder):
        if making.kind == "i2v":
            few_step_scheduler(making.card.shift).save_pretrained(place)
        else:
            shutil.copytree(making.source / "scheduler", place)


# ---------------------------------------------------------------------------------------------------- forms


def _write_diffusers(making: _Making) -> None:
    """A whole pipeline."""
    folder, model = making.folder, making.model
    _copy_parts(making.source, folder, model.config)
    _write_scheduler(making)
    with writable(folder):
        model.save_stock(folder / "transformer", state=making.state, max_shard_size=making.shard_size)
        if making.kind == "i2v":
            path = folder / MODEL_INDEX
            index = json.loads(path.read_text()) | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}
            path.write_text(json.dumps(index, indent=2) + "\n")
    compare(folder, our_frames(making, making.state, folder), _stock_frames(_stock(making, folder), making.kind))


def _add_averages(making: _Making) -> None:
    """The averages beside the last weights, which ``from_pretrained(..., variant="ema")`` loads."""
    state = _stored(replace(making.trained, average=True).weights(), making.dtype, making.trained.folder)
    with writable(making.folder):
        making.model.save_stock(
            making.folder / "transformer", state=state, max_shard_size=making.shard_size, variant=AVERAGES
        )
    stock = _stock(making, making.folder, variant=AVERAGES)
    compare(making.folder, our_frames(making, state, making.folder), _stock_frames(stock, making.kind))


def _write_lora(making: _Making) -> None:
    """The adapters under diffusers' names and under ComfyUI's, each held against the base with them added."""
    adapters, scale = making.trained.adapters(), making.trained.scale
    stored = _stored(adapters, making.dtype, making.trained.folder)
    base = _base_of(making, adapters)
    _write_scheduler(making)
    forms = {LORA_WEIGHT_NAME_SAFE: in_diffusers_words, COMFYUI: in_authors_words}
    with writable(making.folder):
        for name, words in forms.items():
            tensors = {key: t.to(t.dtype if t.ndim == 0 else making.dtype) for key, t in words(adapters, scale).items()}
            save_file({key: t.contiguous() for key, t in tensors.items()}, making.folder / name, {"format": "pt"})
    ours = our_frames(making, added(base, stored, scale), making.source)
    for name in forms:
        with _loading(making.folder / name):
            stock = _stock(making, making.source)
            stock.load_lora_weights(making.folder, weight_name=name)
        compare(making.folder / name, ours, _stock_frames(stock, making.kind))


def _base_of(making: _Making, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the adapters belong to, fp32.

    Raises:
        CheckpointError: what was frozen in training is not in the base, so that adapters on it are another model.
    """
    _index_of(making.source)
    base = {name: t.float() for name, t in declare(making.source).weights() if not name.startswith("rope.")}
    trained = {f"{layer}.weight" for layer in adapted(adapters)}
    check({n: t.shape for n, t in making.state.items()}, {n: t.shape for n, t in base.items()}, making.trained.base)
    # In bf16, which is all that the forward pass may have known of what was frozen.
    moved = [
        n for n, t in making.state.items() if n not in trained and not torch.equal(t.bfloat16(), base[n].bfloat16())
    ]
    if moved:
        raise CheckpointError(
            f"{len(moved)} frozen tensors are not the base's: {', '.join(moved[:3])}",
            where=making.trained.base,
            fix="name the base that training began with, or export the whole weights",
        )
    return base


def _write_original(making: _Making) -> None:
    """The transformer under its authors' names, in one file or in shards."""
    model, folder = making.model, making.folder
    _index_of(making.source)
    _write_scheduler(making)
    with writable(folder):
        save_original(folder, model.config, making.state, making.shard_size)
    with _loading(folder):
        transformer = _stock_of_original(folder, model.config)
    stock = _stock(making, making.source, transformer=transformer)
    compare(folder, our_frames(making, making.state, making.source), _stock_frames(stock, making.kind))


def _stock_of_original(folder: Path, config: Mapping[str, Any]) -> WanTransformer3DModel:
    """Stock diffusers' model of it by diffusers' own mapping, which passes FLF2V's positions over."""
    tensors = {n: t.float() for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    model: Any = WanTransformer3DModel.from_config(dict(config))
    known = {NOT_IN_DIFFUSERS.get(name, name): t for name, t in tensors.items()}
    model.load_state_dict(convert_wan_transformer_to_diffusers(known))
    return model.eval()


_WRITERS = {"diffusers": _write_diffusers, "lora": _write_lora, "original": _write_original}


# ------------------------------------------------------------------------------------------------ comparison


def compare(where: Path, ours: Clip, stocks: Clip) -> None:
    """Hold the frames of the weights in memory against those that stock diffusers made.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    worst = int((ours.frames_T3HW.int() - stocks.frames_T3HW.int()).abs().max())
    if worst > TOLERANCE:
        raise CheckpointError(
            f"stock diffusers makes other frames of the export, by up to {worst} of 255; {TOLERANCE} is rounding",
            where=str(where),
            fix="check that diffusers and peft have the pinned versions",
        )


@contextmanager
def _loading(where: Path) -> Iterator[None]:
    """What stock diffusers cannot load, as a sentence."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"stock diffusers does not load it: {str(error).splitlines()[0]}",
            where=str(where),
            fix="check that diffusers and peft have the pinned versions, and what docs/export.md says of layers",
        ) from error


def _probes() -> tuple[Image.Image, Image.Image]:
    """Two pictures that are the same everywhere: a ramp, and the ramp turned."""
    ramp = torch.arange(PROBE_PX) * 255 // (PROBE_PX - 1)
    across, down = ramp.expand(PROBE_PX, -1), ramp[:, None].expand(-1, PROBE_PX)
    picture = Image.fromarray(torch.stack([across, down, 255 - across], -1).to(torch.uint8).numpy())
    return picture, picture.transpose(Image.Transpose.ROTATE_90)


def _in_memory(making: _Making, state: Mapping[str, Tensor]) -> WanBackbone:
    """The weights as they are here, in fp32, never read back from a folder."""
    model = _backbone(making.trained, making.source, making.kind)
    model.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)  # tables are computed
    return model.requires_grad_(False).eval()


def our_frames(making: _Making, state: Mapping[str, Tensor], parts: Path) -> Clip:
    """A few frames of a fixed picture, prompt and seed, from weights in memory and the other parts of a folder."""
    (first, last), backbone = _probes(), _in_memory(making, state)
    if making.kind == "i2v":
        pipeline = EditPipeline.from_pretrained(parts, attention="native", transformer=backbone)
        pipeline.scheduler = few_step_scheduler(making.card.shift)
        return pipeline(first, "make it snow", steps=PROBE_STEPS, guidance=1.0, frames=PROBE_FRAMES, return_frames=True)
    teacher = TeacherPipeline.from_pretrained(parts, attention="native", transformer=backbone)
    return teacher(
        [as_clip(first)], [as_clip(last)], ["make it snow"], seeds=[0], frames=PROBE_FRAMES, steps=PROBE_STEPS
    )[0]


def _stock(making: _Making, parts: Path, **options: Any) -> Any:
    """Stock diffusers' pipeline of a folder, with the export's solver."""
    with _loading(parts):
        pipeline: Any = stock_pipeline(making.model.config).from_pretrained(parts, dtype=torch.float32, **options)
        if making.kind == "i2v" and parts != making.folder:  # whose own is to be loaded as it is
            pipeline.scheduler = UniPCMultistepScheduler.from_pretrained(making.folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _stock_frames(pipeline: Any, kind: Kind) -> Clip:
    first, last = _probes()
    clip: dict[str, Any] = {"num_frames": PROBE_FRAMES, "last_image": last if kind == "flf2v" else None}
    made = pipeline(
        image=first,
        **({} if isinstance(pipeline, ChronoEditPipeline) else clip),  # which makes clips of five frames alone
        prompt="make it snow",
        height=PROBE_PX,
        width=PROBE_PX,
        num_inference_steps=PROBE_STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
    return Clip((made * 255).round().to(torch.uint8))


# ------------------------------------------------------------------------------------------------------ run


def _state(run: Path) -> dict[str, Any]:
    """What the run's last whole checkpoint says: the recipe's settings, steps and data."""
    whole = sorted(path.parent for path in (run / "checkpoints").glob("step_*/COMPLETE.json"))
    try:
        state = json.loads((whole[-1] / "state.json").read_text())
        return {"config": dict(state["config"]), "step": int(state["step"]), "data": str(state.get("data", ""))}
    except (IndexError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "no whole checkpoint of a run", where=str(run), fix="name the loop.output of a finished training"
        ) from error


def _files(home: Path, stem: str) -> list[Path]:
    """The weights' file, or all of its numbered parts."""
    files = sorted(home.glob(f"{stem}*.safetensors"))
    parts = 1 if files and files[0].stem == stem else int(files[0].stem.rpartition("-of-")[2]) if files else 0
    if not files or len(files) != parts:
        raise CheckpointError(
            f"{len(files)} of {parts or 1} files of {stem}", where=str(home), fix="let the training finish"
        )
    return files


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from load_file(file).items()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"unreadable weights: {error}", where=str(file), fix="train again") from error
