"""A 4-step edit against stock diffusers' 50-step guided video: on the edit's own grid, and on 81 frames.

All begin at the same file, with models loaded, and end when the last frame lies in a file of the same size. Denoising
is what lies between the first forward's begin and the solver's last end. The three take turns; every turn gives its
own ratios, in which an edit, being quick, is the median of several.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

import v4e
from data_tools.bench.clock import Clock, now
from v4e import photos
from v4e.jobs import Job, Settings
from v4e.journal import progress
from v4e.studio import Studio, write

STUDENT = Path(v4e.__file__).parent / "assets/wan-nano/student"
# 288 tokens of 5 frames, 3024 of 81. At its own 64 x 64 the nano DiT would mostly be busy with the 512 tokens to which
# a prompt is padded; of a real edit at 480P they are a seventh of all.
SIDE, EDIT_FRAMES, VIDEO_FRAMES = 96, 5, 81
STEPS, MANY_STEPS, GUIDANCE = 4, 50, 5.0  # the latter two are stock's defaults
PHOTO = 640, 480
WORDS = "make the sky red"
Times = Mapping[str, float]


def measure(turns: int = 3, edits: int = 5, video_steps: int = MANY_STEPS) -> dict[str, float | list[float]]:
    """``edit_speedup_*`` of the denoising, ``edit_end_to_end_*`` of it all, and ``edit_ms_*`` of an edit's stages.

    Args:
        edits: in a turn.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ours, stock = Ours(Path(folder)), Stock(Path(folder))
        ours.edit()  # a rehearsal
        stock.video(EDIT_FRAMES, steps=2)
        kept, ratios = list[Times](), dict[str, list[float]]()
        for _ in progress(range(turns), "editing"):
            quick = [ours.edit() for _ in range(edits)]
            kept += quick
            for name, frames in (("same_grid", EDIT_FRAMES), ("81_frames", VIDEO_FRAMES)):
                slow = stock.video(frames, video_steps)
                for figure, stage in (("edit_speedup", "denoise"), ("edit_end_to_end", "total")):
                    ratio = slow[stage] / median(times[stage] for times in quick)
                    ratios.setdefault(f"{figure}_{name}", []).append(ratio)
    return ratios | {f"edit_ms_{stage}": 1000 * median(times[stage] for times in kept) for stage in kept[0]}


class Ours:
    """`v4e edit`, a model being loaded."""

    def __init__(self, folder: Path) -> None:
        self.studio = Studio.open(str(STUDENT), "cpu")
        self.studio.pipeline.card = replace(self.studio.pipeline.card, sizes=((SIDE, SIDE),))
        self.parts = Parts(self.studio.pipeline)
        self.whole = Clock()
        pipeline: Any = self.studio.pipeline
        pipeline.photo_clip = self.whole.around(pipeline.photo_clip)
        self.job = Job(str(photograph(folder)), WORDS, folder / "edited.png", Settings(steps=STEPS))

    def edit(self) -> Times:
        """Seconds by stage: those of the model's parts, ``model`` around them, ``files``, and in ``total``."""
        before = self.whole.spent
        times = self.parts.timed(self._edit)
        whole = self.whole.spent - before
        parts = sum(spent for part, spent in times.items() if part != "total")
        return {**times, "model": whole - parts, "files": times["total"] - whole}

    def _edit(self) -> None:
        content = photos.fetch(self.job.photo)
        photo = photos.decode(content, self.job.shown)
        write(self.studio.make(self.job, photo, self.studio.recipe(self.job, content)))


class Stock:
    """What a user of diffusers writes: a video, of which the last frame is kept."""

    def __init__(self, folder: Path) -> None:
        self.pipeline: Any = WanImageToVideoPipeline.from_pretrained(str(STUDENT))
        self.pipeline.set_progress_bar_config(disable=True)
        self.parts, self.folder = Parts(self.pipeline), folder

    def video(self, frames: int, steps: int) -> Times:
        return self.parts.timed(lambda: self._video(frames, steps))

    def _video(self, frames: int, steps: int) -> None:
        photo = Image.open(photograph(self.folder)).convert("RGB")
        named = {"height": SIDE, "width": SIDE, "num_frames": frames, "num_inference_steps": steps}
        generator = torch.Generator().manual_seed(0)
        made = self.pipeline(
            photo, WORDS, "", guidance_scale=GUIDANCE, generator=generator, output_type="pil", **named
        ).frames[0]
        made[-1].resize(photo.size, Image.Resampling.LANCZOS).save(self.folder / "stock.png")


class Parts:
    """Clocks around a pipeline's parts."""

    def __init__(self, pipeline: Any) -> None:
        self.clocks = {name: Clock() for name in ("text", "look", "encode", "decode")}
        self._began, self._ended = list[float](), list[float]()
        self._watch(pipeline.text_encoder, "forward", self.clocks["text"].around)
        self._watch(pipeline.image_encoder, "forward", self.clocks["look"].around)
        self._watch(pipeline.vae, "encode", self.clocks["encode"].around)
        self._watch(pipeline.vae, "decode", self.clocks["decode"].around)
        self._watch(pipeline.transformer, "forward", lambda work: before(work, self._began))
        self._watch(pipeline.scheduler, "step", lambda work: after(work, self._ended))

    def timed(self, work: Callable[[], None]) -> Times:
        """Seconds of each part and in total."""
        earlier = {name: clock.spent for name, clock in self.clocks.items()}
        self._began.clear()
        began = now()
        work()
        total = now() - began
        parts = {name: clock.spent - earlier[name] for name, clock in self.clocks.items()}
        return {**parts, "denoise": self._ended[-1] - self._began[0], "total": total}

    @staticmethod
    def _watch(part: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
        setattr(part, name, wrap(getattr(part, name)))


def before(work: Callable, marks: list[float]) -> Callable:
    """The same function, noting when it begins."""

    def noted(*args, **named):
        marks.append(now())
        return work(*args, **named)

    return noted


def after(work: Callable, marks: list[float]) -> Callable:
    """The same function, noting when it ends."""

    def noted(*args, **named):
        done = work(*args, **named)
        marks.append(now())
        return done

    return noted


def photograph(folder: Path) -> Path:
    """A smooth picture in a file."""
    path = folder / "photo.png"
    if not path.is_file():
        coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC).save(path)
    return path


if __name__ == "__main__":
    print(measure())
