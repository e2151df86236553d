"""What people ask of the editor, in words: one edit, or the lines of a jsonl file. No model is needed to refuse one."""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from v4e import photos
from v4e.data.places import is_remote, place, shown
from v4e.errors import DataError

FrameFormat = Literal["strip", "webp", "gif", "mp4"]
MAX_CHARACTERS, MAX_STEPS, MAX_SEED = 2000, 1000, (1 << 63) - 1
LONGEST_NAME = 200  # bytes; disks take 255, and a temporary name is longer


@dataclass(frozen=True)
class Settings:
    """How an edit is made; the model's card says what None means.

    Args:
        frames: how the evolution is written beside the edit, if at all.
        reasoning_frames, reasoning_steps: see :meth:`v4e.pipelines.EditPipeline.__call__`.

    Raises:
        DataError: a value is out of range.
        ConfigError: what writes ``frames`` is not installed.
    """

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    reasoning_frames: int = 0
    reasoning_steps: int = 0
    frames: FrameFormat | None = None

    def __post_init__(self) -> None:
        self._require_whole("seed", 0, MAX_SEED)
        self._require_whole("reasoning_frames", 0, MAX_STEPS)
        self._require_whole("reasoning_steps", 0, MAX_STEPS)
        if self.steps is not None:
            self._require_whole("steps", 1, MAX_STEPS)
        if self.guidance is not None and not _is_scale(self.guidance):
            raise DataError(f"guidance={self.guidance!r} is no guidance scale", fix="give a number such as 1.0")
        if self.frames is not None and self.frames not in get_args(FrameFormat):
            raise DataError(f"frames={self.frames!r} is no format", fix=f"use {', '.join(get_args(FrameFormat))}")
        if self.frames == "mp4":
            photos.require_mp4()

    def _require_whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            raise DataError(f"{name}={value!r} is no whole number from {low} to {high}")


@dataclass(frozen=True)
class Job:
    """An edit that is asked for.

    Args:
        photo: path or URL.
        output: picture to write.

    Raises:
        DataError: the instruction cannot be used, or edit or evolution would be written over the photograph.
        ConfigError: the output's ending names no format.
    """

    photo: str
    instruction: str
    output: Path
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        require_instruction(self.instruction)
        photos.kind_of(self.output)
        at = place(self.photo)
        if not is_remote(at) and at.resolve() in {output.resolve() for output in self.outputs}:
            raise DataError("would be written over by its own edit", where=self.photo, fix="name another output")

    @property
    def frames_output(self) -> Path:
        """Where the evolution goes."""
        suffix = ".png" if self.settings.frames in (None, "strip") else f".{self.settings.frames}"
        return self.output.with_name(f"{self.output.stem}.frames{suffix}")

    @property
    def outputs(self) -> tuple[Path, ...]:
        """All that is written."""
        return (self.frames_output, self.output) if self.settings.frames else (self.output,)

    @property
    def shown(self) -> str:
        """The photograph as it may be logged."""
        return shown(self.photo)


def require_instruction(text: str) -> None:
    """Raises DataError for one that is empty, too long, or bytes that were no UTF-8."""
    if not any(char.isprintable() and not char.isspace() for char in text):  # zero-width ones are not
        raise DataError("the instruction is empty", fix='say what to change, such as "make it snow"')
    if len(text) > MAX_CHARACTERS:
        what = f"the instruction has {len(text)} characters, and {MAX_CHARACTERS} are read"
        raise DataError(what, fix="say it shorter")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the shell's bytes come as lone surrogates
        raise DataError(f"the instruction is not UTF-8: {text!r}", fix="type it in a UTF-8 terminal") from error


def parse(line: bytes, number: int, home: Path, folder: Path, defaults: Settings) -> Job:
    """A line of a jobs file: photo, instruction, and whichever of output and the settings it brings.

    Args:
        number: of the line; an output without a name gets it.
        home: where relative photographs lie.
        folder: where outputs go.

    Raises:
        DataError, ConfigError: what is wrong with it.
    """
    values = _object(line)
    known = ["photo", "instruction", "output", *(f.name for f in fields(Settings))]
    if unknown := [key for key in values if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise DataError(f"unknown key {unknown[0]!r}", fix=f"did you mean {near}?")
    photo = str(_located(_text(values, "photo"), home))
    output = folder / _inside(_text(values, "output")) if "output" in values else _named(photo, number, folder)
    own = {f.name: values[f.name] for f in fields(Settings) if f.name in values}
    return Job(photo, _text(values, "instruction"), output, replace(defaults, **own))


def _object(line: bytes) -> Mapping[str, object]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError("no JSON object", fix='write {"photo": "a.jpg", "instruction": "make it snow"}')
    return values


def _text(values: Mapping[str, object], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key} is {'missing' if key not in values else f'{value!r} and no text'}")
    return value


def _located(photo: str, home: Path) -> object:
    at = place(photo)
    return photo if is_remote(at) else home / at


def _inside(name: str) -> Path:
    """A relative path that stays within its folder and that a disk can hold."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DataError(f"output {name!r} leads out of the folder", fix="give a name within it")
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in path.parts):
        raise DataError(f"output {name[:40]!r}... is too long a name", fix=f"use at most {LONGEST_NAME} bytes")
    return path


def _named(photo: str, number: int, folder: Path) -> Path:
    """The line's number and the photograph's name, in its own format where that is written."""
    name = Path(photos.tidy_name(photo))
    suffix = photos.written(Path(photo.partition("?")[0]).suffix.lower())
    return folder / f"{number:06d}-{name}{suffix}"


def _is_scale(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
