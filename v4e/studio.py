"""A loaded model at work for people: it makes the files of an edit, one by one or for a whole list of jobs.

A batch carries on past what cannot be edited: such a line goes to ``quarantine.jsonl`` with the sentence that says why.
What is in the folder already, made of the same photograph by the same recipe, is not made again; files are seen whole
or not at all, so a batch that was killed is gone on with by the same command.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from v4e import __version__, photos
from v4e.data.disk import NO_ROOM, hash_of, lock, write_atomically
from v4e.data.members import as_image
from v4e.errors import ConfigError, DataError, V4EError
from v4e.jobs import Job, Settings, parse
from v4e.journal import open_bar
from v4e.models.wan import WanBackbone
from v4e.nouns import Clip
from v4e.pipelines import EditPipeline

QUARANTINE, LOCK = "quarantine.jsonl", ".lock"
FRAMES = "frames"  # of a recipe: the format of the evolution that was written with the edit
Offload = Literal["none", "model", "sequential"]


class StopError(ConfigError):
    """Nothing that the next job would be spared: memory or disk is full."""


@dataclass(frozen=True)
class Memory:
    """How a model is fitted into a GPU's memory; diffusers' own means, by its own names.

    Args:
        dtype: of transformer and text encoder.
        offload: ``model`` keeps one part at a time on the GPU, ``sequential`` one layer.
        vae_tiling, vae_slicing: decode in tiles, and one sample at a time.
    """

    dtype: torch.dtype = torch.float32
    offload: Offload = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False


@dataclass(frozen=True)
class Studio:
    """A model that makes edits.

    Args:
        model, weights: what files will say of it.
        memory: how it was fitted; some of it shows in an edit.
    """

    pipeline: EditPipeline
    model: str
    weights: str
    memory: Memory = Memory()

    @staticmethod
    def open(model: str, device: str, memory: Memory = Memory()) -> "Studio":  # noqa: B008  frozen
        """Load a folder in diffusers layout, or a Hub id.

        Raises:
            CheckpointError: missing or damaged.
            ConfigError: there is nothing to offload from.
        """
        pipeline = EditPipeline.from_pretrained(model, dtype=memory.dtype)
        pipeline.set_progress_bar_config(disable=True)
        name = Path(model).resolve().name if Path(model).is_dir() else model
        weights = weights_hash(pipeline.backbone)  # before any of them is sent away
        settle(pipeline, device, memory)
        return Studio(pipeline, name, weights, memory)

    def recipe(self, job: Job, photo: bytes) -> bytes:
        """All that determines an edit, as JSON in ASCII: what its file will say."""
        card, settings = self.pipeline.card, job.settings
        reasoning = {"reasoning_frames": settings.reasoning_frames, "reasoning_steps": settings.reasoning_steps}
        recipe = {
            "instruction": job.instruction,
            "seed": settings.seed,
            "steps": settings.steps or card.steps,
            "guidance": float(card.guidance if settings.guidance is None else settings.guidance),
            **(reasoning if settings.reasoning_frames else {}),
            "model": self.model,
            "weights": self.weights,
            "dtype": str(self.memory.dtype).removeprefix("torch."),
            **({"vae_tiling": True} if self.memory.vae_tiling else {}),
            **({FRAMES: settings.frames} if settings.frames else {}),
            "photo": hash_of(photo),
            "v4e": __version__,
        }
        return json.dumps(recipe).encode()

    def make(
        self,
        job: Job,
        photo: photos.Photo,
        recipe: bytes,
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[Path, bytes]:
        """The files of an edit, the edit itself last.

        Raises:
            DataError: the photograph's shape or the instruction is beyond the model.
            StopError: the device's memory is full.
        """
        return files_of(self.imagine(job, photo, progress), job, photo, recipe)

    def imagine(self, job: Job, photo: photos.Photo, progress: Callable[[int], None] = lambda done: None) -> Clip:
        """An edit at the model's size: all frames where the job asks for them, and otherwise the last alone.

        Raises:
            DataError, StopError: as above.
        """
        ask = job.settings
        with _about(job), _enough_memory():
            return self.pipeline.photo_clip(
                photo.rgb,
                job.instruction,
                seed=ask.seed,
                steps=ask.steps,
                guidance=ask.guidance,
                return_frames=ask.frames is not None,
                reasoning_frames=ask.reasoning_frames,
                reasoning_steps=ask.reasoning_steps,
                progress=progress,
            )


def files_of(clip: Clip, job: Job, photo: photos.Photo, recipe: bytes) -> dict[Path, bytes]:
    """A clip as the files that a job asks for, the edit itself last."""
    full = as_image(clip).resize(photo.rgb.size, Image.Resampling.LANCZOS)
    evolution = {job.frames_output: evolution_of(clip, job, photo.rgb.size, recipe)} if job.settings.frames else {}
    return {**evolution, job.output: photos.encode(full, job.output, recipe, photo)}


def evolution_of(clip: Clip, job: Job, size: tuple[int, int], recipe: bytes) -> bytes:
    """All frames in the photograph's shape, as large as the model made them."""
    height, width = clip.size
    scale = (height * width / (size[0] * size[1])) ** 0.5
    shape = max(2, round(size[0] * scale)), max(2, round(size[1] * scale))
    frames = [as_image(clip.frame(i)).resize(shape, Image.Resampling.LANCZOS) for i in range(len(clip))]
    if job.settings.frames == "strip":
        return photos.encode(photos.strip(frames), job.frames_output, recipe)
    return photos.animate(frames, job.frames_output, recipe)


def settle(pipeline: EditPipeline, device: str, memory: Memory) -> None:
    """Put a pipeline where it is to work.

    Raises:
        ConfigError: asked to offload where there is no GPU.
    """
    if memory.vae_tiling:
        pipeline.vae.enable_tiling()
    if memory.vae_slicing:
        pipeline.vae.enable_slicing()
    if memory.offload == "none":
        pipeline.to(device)
        return
    if torch.device(device).type == "cpu":
        raise ConfigError(
            f"--offload {memory.offload} moves weights between a GPU and this computer, and no GPU is used"
        )
    offload = {"model": pipeline.enable_model_cpu_offload, "sequential": pipeline.enable_sequential_cpu_offload}
    offload[memory.offload](device=device)


def weights_hash(backbone: WanBackbone) -> str:
    """A few numbers of every weight, hashed: no two trainings agree in it, and 33 GB need not be read for it."""
    some = [f"{name} {weight.flatten()[:4].tolist()}" for name, weight in backbone.named_parameters()]
    return hash_of("\n".join(some).encode())[:12]


# ------------------------------------------------------------------------------------------------- batches


@dataclass
class Tally:
    """What became of a batch's lines."""

    made: int = 0
    kept: int = 0
    refused: int = 0

    def count(self, made: bool) -> None:
        """One more line that is edited, now or before."""
        self.made, self.kept = self.made + made, self.kept + (not made)

    def __str__(self) -> str:
        before = f" ({self.kept} of them before)" if self.kept else ""
        return f"{self.made + self.kept} edited{before}, {self.refused} refused"


def run_batch(studio: Studio, jobs: Path, folder: Path, defaults: Settings) -> Tally:
    """Edit what the lines of a jsonl file ask for, into a folder.

    Args:
        defaults: what a line does not say itself.

    Raises:
        DataError: the file cannot be read, or another process is at work in the folder.
        StopError: memory or disk is full.
    """
    lines = [*read_lines(jobs)]
    folder.mkdir(parents=True, exist_ok=True)
    tally, owners = Tally(), dict[Path, int]()
    with (
        lock(folder / LOCK),
        open(folder / QUARANTINE, "wb", buffering=0) as quarantine,
        open_bar("edits", len(lines)) as bar,
    ):
        for number, line in lines:
            try:
                job = parse(line, number, jobs.parent, folder, defaults)
                _claim(job.outputs, number, owners)
                tally.count(_serve(studio, job))
            except StopError:
                raise
            except V4EError as error:
                tally.refused += 1
                quarantine.write(_refusal(number, error))
            bar.advance()
    return tally


def read_lines(jobs: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not empty."""
    lines = photos.fetch(str(jobs), "jobs file").split(b"\n")
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def write(files: dict[Path, bytes]) -> None:
    """Write files, each seen whole or not at all, in their order.

    Raises:
        StopError: the disk is full.
        DataError: this file cannot be written.
    """
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                fix = "make room and run the same command again"
                raise StopError("the disk is full; what was finished is safe", where=str(path), fix=fix) from error
            raise DataError(f"cannot be written: {error}", where=str(path)) from error


def _serve(studio: Studio, job: Job) -> bool:
    """Make a job's files, unless they are there; whether it had to."""
    content = photos.fetch(job.photo)
    recipe = studio.recipe(job, content)
    if _is_made(job, recipe):
        return False
    write(studio.make(job, photos.decode(content, job.shown), recipe))
    return True


def _is_made(job: Job, recipe: bytes) -> bool:
    if not all(output.is_file() for output in job.outputs):
        return False
    try:
        said, wanted = photos.recipe_in(job.output.read_bytes()), json.loads(recipe)
    except (DataError, OSError):
        return False
    if FRAMES not in wanted:
        said.pop(FRAMES, None)
    return said == wanted


def _claim(outputs: Sequence[Path], number: int, owners: dict[Path, int]) -> None:
    if taken := next((output for output in outputs if output in owners), None):
        raise DataError(f"line {owners[taken]} writes the same output", where=str(taken), fix="name another")
    owners |= dict.fromkeys(outputs, number)


def _refusal(number: int, error: V4EError) -> bytes:
    return json.dumps({"line": number, "exit_code": error.exit_code, "error": str(error)}).encode() + b"\n"


# --------------------------------------------------------------------------------------------------- inside


@contextmanager
def _about(job: Job) -> Iterator[None]:
    """Errors that do not know which photograph they speak of are told."""
    try:
        yield
    except DataError as error:
        raise DataError(error.what, where=error.where or job.shown, fix=error.fix) from error


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "try --dtype bfloat16, --offload model and --vae-tiling"
        raise StopError("the GPU's memory does not hold this model's work", fix=fix) from error
