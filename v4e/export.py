"""A training run to a folder that stock diffusers runs, checked by running it.

The folder holds the base model's own encoders and VAE, the trained transformer, the few-step scheduler, a card
(``v4e.json``: how to ask it) and a README. It appears under its name only when stock diffusers has loaded it and made
the frames that the weights in memory make.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from v4e.data.disk import writable
from v4e.data.shards import ShardSet
from v4e.errors import CheckpointError, ConfigError
from v4e.models.folder import check, locate
from v4e.models.wan import Kind, WanBackbone, declare
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
)

OWN = ("transformer", "scheduler")  # written here; every other part is the base's
POSITIONS = "condition_embedder.image_embedder.pos_embed"  # FLF2V has it, I2V has not
TOLERANCE = 1  # of 255: a frame's rounding may fall the other way on another device
PROBE_PX, PROBE_FRAMES, PROBE_STEPS = 64, 5, 2


@dataclass(frozen=True)
class Trained:
    """What a run leaves.

    Args:
        folder: the run.
        player: whose weights.
        base: folder or Hub id that training began with.
        average: the exponential averages instead of the last weights.
        settings: the recipe's, flat: "loop.batch" -> "16".
    """

    folder: Path
    player: str
    base: str
    average: bool
    settings: Mapping[str, str]

    @staticmethod
    def of(run: Path, player: str = "student", base: str | None = None, average: bool | None = None) -> "Trained":
        """Find a finished run.

        Args:
            base: None for the setting named like the player, or ``init``.
            average: None for the averages where they were kept.

        Raises:
            CheckpointError: there is no finished run.
            ConfigError: the settings do not say what it began with.
        """
        settings = _settings(run)
        base = base or settings.get(player) or settings.get("init")
        if not base:
            raise ConfigError("the run does not say what it began with", where=str(run), fix="pass base=")
        home = run / "weights" / player
        kept = any(home.glob("average*.safetensors"))
        return Trained(run, player, base, kept if average is None else average, settings)

    def weights(self) -> dict[str, Tensor]:
        """Every trained tensor by name, fp32.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        stem = "average" if self.average else "weights"
        return {name: t for file in _files(self.folder / "weights" / self.player, stem) for name, t in _read(file)}

    def card(self, base: Card) -> Card:
        """How the model wants to be asked: the base's card, with the clip it was trained on and its shift."""
        data, shift = Path(self.settings.get("loop.data", "")), float(self.settings.get("shift", base.shift))
        if not (data / "manifest.json").is_file():
            return replace(base, shift=shift)
        grid = ShardSet.open(data, verify="none").meta.student
        return replace(base, shift=shift, frames=grid.T, sizes=((grid.H, grid.W),))


def export_run(
    run: Path,
    out: Path,
    *,
    player: str = "student",
    base: str | None = None,
    average: bool | None = None,
    dtype: torch.dtype = torch.bfloat16,
    figures: Mapping[str, float] | None = None,
) -> Path:
    """Turn a finished run into a diffusers folder; an earlier export at ``out`` is replaced.

    Args:
        run: its ``loop.output``.
        player, base, average: see :meth:`Trained.of`; the encoders, the VAE and the architecture are the base's.
        dtype: to store the transformer in.
        figures: measured figures, for the README.

    Raises:
        CheckpointError: the run is unfinished, its weights are damaged or of another model, or stock diffusers makes
            other frames than the weights do.
        DataError: the disk is full.
    """
    trained = Trained.of(Path(run), player, base, average)
    source = locate(trained.base, ["*"])
    state = {name: tensor.to(dtype) for name, tensor in trained.weights().items()}
    kind: Kind = "flf2v" if POSITIONS in state else "i2v"
    with _appearing(Path(out)) as folder:
        _copy_parts(source, folder)
        _write_transformer(source, folder, kind, state)
        card = trained.card(Card.read(source))
        _write_scheduler(source, folder, kind, card)
        card.write(folder)
        (folder / "README.md").write_text(readme(trained, card, kind, figures or {}))
        compare(folder, our_frames(folder, _in_memory(folder, state), kind), kind)
    return Path(out)


def compare(folder: Path, ours: Clip, kind: Kind) -> None:
    """Make the frames that :func:`our_frames` makes with stock diffusers, from the folder alone.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    stocks = _stock_frames(folder, kind)
    worst = int((ours.frames_T3HW.int() - stocks.frames_T3HW.int()).abs().max())
    if worst > TOLERANCE:
        raise CheckpointError(
            f"stock diffusers makes other frames of the export, by up to {worst} of 255",
            where=str(folder),
            fix="check that diffusers has the pinned version",
        )


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
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _copy_parts(source: Path, folder: Path) -> None:
    """The base's encoders and VAE, as they are, and its index with stock names."""
    index = source / MODEL_INDEX
    if not index.is_file():
        raise CheckpointError(f"no {MODEL_INDEX}", where=str(source), fix="name a base folder in diffusers layout")
    with writable(folder):
        shutil.copy(index, folder)
        for part in json.loads(index.read_text()):
            if (source / part).is_dir() and part not in OWN:
                shutil.copytree(source / part, folder / part)
    name_stock_classes(folder)


def _write_transformer(source: Path, folder: Path, kind: Kind, state: Mapping[str, Tensor]) -> None:
    """Write it for stock diffusers.

    Raises:
        CheckpointError: the weights are not of the base's architecture.
    """
    with torch.device("meta"):
        model = declare(source, kind=kind, attention="native").build()
    wanted, found = dict(model.named_parameters()), {name: t.shape for name, t in state.items()}
    check({name: p.shape for name, p in wanted.items()}, found, "the run's weights")
    with writable(folder):
        model.save_stock(folder / "transformer", state=state)


def _write_scheduler(source: Path, folder: Path, kind: Kind, card: Card) -> None:
    """The few-step solver of an editor; a teacher keeps its own."""
    with writable(folder):
        if kind == "flf2v":
            shutil.copytree(source / "scheduler", folder / "scheduler")
            return
        few_step_scheduler(card.shift).save_pretrained(folder / "scheduler")
        path = folder / MODEL_INDEX
        index = json.loads(path.read_text()) | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}
        path.write_text(json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ comparison


def _probes() -> tuple[Image.Image, Image.Image]:
    """Two pictures that are the same everywhere: a ramp, and the ramp turned."""
    ramp = torch.arange(PROBE_PX) * 255 // (PROBE_PX - 1)
    across, down = ramp.expand(PROBE_PX, -1), ramp[:, None].expand(-1, PROBE_PX)
    picture = Image.fromarray(torch.stack([across, down, 255 - across], -1).to(torch.uint8).numpy())
    return picture, picture.transpose(Image.Transpose.ROTATE_90)


def _in_memory(folder: Path, state: Mapping[str, Tensor]) -> WanBackbone:
    """The weights as they are here, in fp32, never read back from the folder."""
    model = declare(folder, attention="native").build()
    model.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)  # tables are computed
    return model.requires_grad_(False).eval()


def our_frames(folder: Path, backbone: WanBackbone, kind: Kind) -> Clip:
    """A few frames of a fixed picture, prompt and seed, from ``backbone`` and the folder's other parts."""
    first, last = _probes()
    if kind == "i2v":
        pipeline = EditPipeline.from_pretrained(folder, attention="native", transformer=backbone)
        return pipeline(first, "make it snow", steps=PROBE_STEPS, guidance=1.0, frames=PROBE_FRAMES, return_frames=True)
    teacher = TeacherPipeline.from_pretrained(folder, attention="native", transformer=backbone)
    return teacher(
        [as_clip(first)], [as_clip(last)], ["make it snow"], seeds=[0], frames=PROBE_FRAMES, steps=PROBE_STEPS
    )[0]


def _stock_frames(folder: Path, kind: Kind) -> Clip:
    pipeline: Any = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    first, last = _probes()
    made = pipeline(
        image=first,
        last_image=last if kind == "flf2v" else None,
        prompt="make it snow",
        height=PROBE_PX,
        width=PROBE_PX,
        num_frames=PROBE_FRAMES,
        num_inference_steps=PROBE_STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
    return Clip((made * 255).round().to(torch.uint8))


# ------------------------------------------------------------------------------------------------------ run


def _settings(run: Path) -> dict[str, str]:
    """The recipe's settings, as the run's last whole checkpoint says them."""
    whole = sorted(path.parent for path in (run / "checkpoints").glob("step_*/COMPLETE.json"))
    try:
        return json.loads((whole[-1] / "state.json").read_text())["config"]
    except (IndexError, OSError, ValueError, KeyError) as error:
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


# --------------------------------------------------------------------------------------------------- README


def readme(trained: Trained, card: Card, kind: Kind, figures: Mapping[str, float]) -> str:
    """A model card: what it is, how to use it, what it was trained with, what it measures."""
    height, width = card.sizes[0]
    what = "edits images by an instruction" if kind == "i2v" else "imagines how a first image becomes a last one"
    rows = [f"| `{key}` | `{value}` |" for key, value in sorted(trained.settings.items()) if value]
    measured = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            f"pipeline_tag: {'image-to-image' if kind == 'i2v' else 'image-to-video'}",
            "---",
            "",
            f"# {trained.folder.name}",
            "",
            f"A Wan model that {what}, trained with v4e from `{trained.base}`"
            f" ({'averaged' if trained.average else 'last'} weights).",
            "",
            *(_usage(card, height, width) if kind == "i2v" else []),
            *(["## Measured", "", "| figure | value |", "|---|---|", *measured, ""] if measured else []),
            "## Training",
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _usage(card: Card, height: int, width: int) -> list[str]:
    return [
        "```",
        f'v4e edit PHOTO "make it snow" --model THIS_FOLDER -o out.png --steps {card.steps}',
        "```",
        "",
        "Stock diffusers makes the same frames; the edit is the last one:",
        "",
        "```python",
        'pipe = WanImageToVideoPipeline.from_pretrained("THIS_FOLDER")',
        f'frames = pipe(image, "make it snow", height={height}, width={width}, num_frames={card.frames},',
        f"              num_inference_steps={card.steps}, guidance_scale={card.guidance}).frames[0]",
        "```",
        "",
    ]
