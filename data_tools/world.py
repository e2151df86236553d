"""Procedural edit clips over random crops of real photographs: wan-nano's world.

An `Edit` is a photograph's crop, one or two objects on it, and one change, parameterised by s in [0, 1]: frame(0) is
the source, frame(1) the target. Its instruction determines the result: shape, colour, size and place fix every pixel
that an edit makes. The evolution caption also names the pace, so it determines the frames between.

Held out are photographs and combinations: the (colour, shape, task) triples of `is_held_out` never occur in training.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.restoration import inpaint_biharmonic

from data_tools.evolve import FAMILY as TASK_FAMILY
from data_tools.evolve import caption
from v4e.errors import DataError
from v4e.nouns import Verdict

Split = Literal["train", "heldout"]
Picture = NDArray[np.uint8]  # [3, H, W]
Floats = NDArray[np.floating[Any]]

TRAIN_PHOTOS = (
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "china.jpg",
)
HELDOUT_PHOTOS = ("chelsea.png", "coffee.png", "flower.jpg")
PHOTOS: dict[str, tuple[str, ...]] = {"train": TRAIN_PHOTOS, "heldout": HELDOUT_PHOTOS}

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (35, 160, 55),
    "blue": (40, 70, 220),
    "purple": (140, 40, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SIZES = {"small": 18 / 64, "medium": 24 / 64, "large": 31 / 64}
SIZE_ODDS = (0.2, 0.4, 0.4)
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("a blue sky", "a green meadow", "a sandy desert", "a sunset", "a brick wall", "the deep sea")
STYLES = ("grayscale", "sepia", "sketch", "night", "snow")
TASKS = ("add", "remove", "replace", "recolour", "move", "background", *STYLES)
GROUPS = {task: "style" if task in STYLES else task for task in TASKS}
FAMILY = {task: TASK_FAMILY[GROUPS[task]] for task in TASKS}
# Local edits are learnt last, so they come three times as often as a style.
SCHEDULE = (
    *("add", "recolour", "remove", "grayscale", "move", "replace", "background", "sepia", "add", "recolour", "remove"),
    *("sketch", "move", "replace", "background", "night", "add", "recolour", "remove", "snow", "move", "replace"),
)
PACES = {
    "steadily": lambda s: s,
    "slowly at first": lambda s: s * s,
    "quickly at first": lambda s: 1 - (1 - s) ** 2,
    "smoothly": lambda s: s * s * (3 - 2 * s),
}


@dataclass(frozen=True)
class Thing:
    """An object: its centre (x, y) and width in pixels of a ``size`` x ``size`` picture."""

    shape: str
    colour: str
    scale: str
    x: float
    y: float
    size: int = 64

    @property
    def width(self) -> float:
        return SIZES[self.scale] * self.size

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def overlaps(self, other: "Thing") -> bool:
        reach = (self.width + other.width) / 2 + 1
        return abs(self.x - other.x) < reach and abs(self.y - other.y) < reach

    def at(self, place: str) -> "Thing":
        """The same object exactly at a named place."""
        x, y = position(place, self.width, self.size)
        return replace(self, x=x, y=y)

    @cached_property
    def alpha(self) -> Floats:
        """Coverage [H, W] in [0, 1], soft over about a pixel."""
        return np.clip(0.5 - _distance(self.shape, *self._local, self.width / 2), 0, 1)

    @cached_property
    def paint(self) -> Floats:
        """Colour [3, H, W] in [0, 1]: lit from the top left, with a faint texture that depends on the shape."""
        dx, dy = self._local
        light = 1 - 0.25 * np.clip((dx + dy) / self.width, -1, 1)
        wave = 0.035 * np.sin(_texture_phase(self.shape, dx, dy) * 2 * math.pi / (self.size / 10))
        base = np.array(COLOURS[self.colour], np.float32)[:, None, None] / 255
        return np.clip((base + 0.08) * light + wave - 0.08, 0, 1)

    def over(self, picture: Floats) -> Floats:
        """Composite onto a picture [3, H, W]."""
        return picture + self.alpha * (self.paint - picture)

    @property
    def _local(self) -> tuple[Floats, Floats]:
        axis = np.arange(self.size, dtype=np.float32) + 0.5
        return np.broadcast_arrays(axis[None, :] - self.x, axis[:, None] - self.y)  # type: ignore[return-value]


def position(place: str, width: float, size: int) -> tuple[float, float]:
    """Centre (x, y) of an object of this width at a named place, three pixels clear of the border."""
    near = 3 * size / 64 + width / 2
    stops = (near, size / 2, size - near)
    row, column = divmod(PLACES.index(place), 3)
    return stops[column], stops[row]


def place_of(thing: Thing) -> str:
    """The named place nearest to an object."""
    return min(PLACES, key=lambda p: math.dist(position(p, thing.width, thing.size), (thing.x, thing.y)))


def _distance(shape: str, dx: Floats, dy: Floats, r: float) -> Floats:
    """Signed distance in pixels to the outline of a shape that fits a square of half-width r; negative inside."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(ax, ay) - 0.88 * r
    if shape == "triangle":
        return np.maximum(dy - 0.8 * r, (2 * ax - dy - 1.0 * r) / math.sqrt(5))
    if shape == "cross":
        arm = 0.36 * r
        return np.minimum(np.maximum(ax - arm, ay - r), np.maximum(ay - arm, ax - r))
    angle = np.mod(np.arctan2(dx, -dy) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5  # star: fold to one point
    radius = np.hypot(dx, dy)
    px, py = radius * np.cos(angle), np.abs(radius * np.sin(angle))
    inner = (0.45 * r * math.cos(math.pi / 5), 0.45 * r * math.sin(math.pi / 5))
    nx, ny = inner[1], r - inner[0]
    return ((px - r) * nx + py * ny) / math.hypot(nx, ny)


def _texture_phase(shape: str, dx: Floats, dy: Floats) -> Floats:
    if shape == "cross":
        return np.maximum(np.abs(dx), np.abs(dy))
    return {"circle": dx + dy, "square": dx, "triangle": dy, "star": dx - dy}[shape]


# ------------------------------------------------------------------------------------------- photographs, scenes


@lru_cache(maxsize=16)
def _photograph(name: str) -> tuple[Image.Image, ...]:
    """A bundled photograph at full, half and quarter size."""
    package = "sklearn.datasets.images" if name in ("china.jpg", "flower.jpg") else "skimage.data"
    with (files(package) / name).open("rb") as file:
        full = Image.open(file).convert("RGB")
    return full, full.reduce(2), full.reduce(4)


@dataclass(frozen=True)
class Crop:
    """A square window of a photograph: left, top and side in its pixels."""

    photo: str
    left: float
    top: float
    side: float
    flip: bool

    def render(self, size: int) -> Floats:
        """[3, size, size] in [0, 1]."""
        levels = _photograph(self.photo)
        level = min(2, max(0, int(math.log2(self.side / size))))
        box = tuple(v / 2**level for v in (self.left, self.top, self.left + self.side, self.top + self.side))
        image = levels[level].resize((size, size), Image.Resampling.BILINEAR, box=box)
        array = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
        return np.ascontiguousarray(array[:, :, ::-1] if self.flip else array)


def _draw_crop(rng: np.random.Generator, split: Split, size: int) -> Crop:
    """A window with something in it; flat ones are drawn again."""
    for _ in range(20):
        photo = str(rng.choice(PHOTOS[split]))
        width, height = _photograph(photo)[0].size
        side = min(float(rng.uniform(100, 240)), width, height)
        crop = Crop(photo, rng.uniform(0, width - side), rng.uniform(0, height - side), side, bool(rng.random() < 0.5))
        if crop.render(16).std() > 0.07:
            return crop
    return crop


@lru_cache(maxsize=32)
def background(name: str, size: int) -> Floats:
    """A named procedural scene [3, size, size] in [0, 1]: the same for every edit that asks for it."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    ripple = lambda fx, fy, p=0.0: np.sin(2 * math.pi * (fx * x + fy * y) + p)  # noqa: E731

    def blend(top, bottom, t):
        return np.stack([a + (b - a) * t for a, b in zip(top, bottom, strict=True)])

    if name == "a blue sky":
        clouds = np.clip(ripple(1.3, 3, 0.5) * ripple(2.1, 1.2, 2) - 0.25, 0, 1)
        return _unit(blend((0.25, 0.5, 0.9), (0.7, 0.85, 1), y) + 0.5 * clouds)
    if name == "a green meadow":
        return _unit(blend((0.45, 0.7, 0.3), (0.15, 0.45, 0.1), y) + 0.05 * ripple(9, 3))
    if name == "a sandy desert":
        return _unit(blend((0.95, 0.85, 0.6), (0.8, 0.6, 0.35), y) + 0.05 * ripple(1.5, 6))
    if name == "a sunset":
        return _unit(blend((0.35, 0.15, 0.45), (1.0, 0.55, 0.2), y))
    if name == "a brick wall":
        row = np.floor(y * 8)
        mortar = (np.mod(y * 8, 1) < 0.14) | (np.mod(x * 4 + 0.5 * np.mod(row, 2), 1) < 0.07)
        return _unit(np.where(mortar, 0.75, np.array([0.62, 0.27, 0.2])[:, None, None]))
    return _unit(blend((0.1, 0.45, 0.6), (0.02, 0.1, 0.3), y) + 0.04 * ripple(3, 2))


def _unit(picture: NDArray[Any]) -> Floats:
    return np.asarray(np.clip(picture, 0, 1), np.float32)


def stylise(picture: Floats, style: str) -> Floats:
    """A style is a deterministic function of the picture [3, H, W]."""
    luma = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), picture, 1)
    if style == "grayscale":
        return np.repeat(luma[None], 3, 0)
    if style == "sepia":
        return np.clip(luma * np.array([1.1, 0.9, 0.65], np.float32)[:, None, None], 0, 1)
    if style == "night":
        return picture * np.array([0.25, 0.3, 0.5], np.float32)[:, None, None]
    if style == "sketch":
        edges = np.abs(luma - _blur(luma)) + 0.5 * np.abs(_blur(luma) - _blur(_blur(_blur(luma))))
        return np.repeat(np.clip(1 - 5 * edges, 0, 1)[None], 3, 0)
    flakes = _flakes(picture.shape[-1])
    pale = 0.45 * luma[None] + 0.2 * picture + 0.35
    return np.clip(pale + flakes * (1 - pale), 0, 1)


def _blur(x: Floats) -> Floats:
    """3x3 box blur of [..., H, W], edges repeated."""
    p = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    rows = p[..., :-2, :] + p[..., 1:-1, :] + p[..., 2:, :]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


@lru_cache(maxsize=4)
def _flakes(size: int) -> Floats:
    """A fixed pattern of snow flakes [H, W] in [0, 1]."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:size, 0:size] + 0.5
    flakes = np.zeros((size, size))
    for cx, cy, r in zip(rng.uniform(0, size, 28), rng.uniform(0, size, 28), rng.uniform(1.0, 2.2, 28), strict=True):
        flakes = np.maximum(flakes, np.clip(r * size / 64 + 0.5 - np.hypot(x - cx, y - cy), 0, 1))
    return np.asarray(0.95 * flakes, np.float32)


# -------------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True)
class Edit:
    """One edit, drawn but not rendered.

    Args:
        rest: objects that the edit leaves alone.
        subject: the object that is removed, replaced, recoloured or moved; None for add, background and styles.
        result: the object there afterwards; None for remove, background and styles.
        scene: the named background, or "".
    """

    key: str
    split: Split
    index: int
    task: str
    crop: Crop
    rest: tuple[Thing, ...]
    subject: Thing | None
    result: Thing | None
    scene: str
    pace: str
    size: int
    wording: int
    placed: bool

    @property
    def photo(self) -> str:
        return self.crop.photo

    @cached_property
    def instruction(self) -> str:
        return instructions(self)[self.wording % len(instructions(self))]

    @cached_property
    def evolution(self) -> str:
        """The evolution caption, with the pace, and with the subject's place for half of the edits."""
        return self.caption(self.pace, self.placed)

    @property
    def old(self) -> Thing:
        """The subject, of a task that has one."""
        assert self.subject
        return self.subject

    @property
    def new(self) -> Thing:
        """The result, of a task that has one."""
        assert self.result
        return self.result

    def caption(self, pace: str, placed: bool) -> str:
        """The evolution prompt at a pace; ``placed`` also says where the subject is."""
        where = f" at the {place_of(self.old)}" if placed and self.subject else ""
        if self.task == "add":
            return caption("add", subject=_article(self.new), place=place_of(self.new), pace=pace)
        subject = f"the {self.old.name}{where}" if self.subject else ""
        if self.task == "replace":
            return caption("replace", subject=subject, result=f"a {self.new.name}", pace=pace)
        if self.task == "recolour":
            return caption("recolour", subject=subject, result=self.new.colour, pace=pace)
        if self.task == "move":
            return caption("move", subject=subject, place=place_of(self.new), pace=pace)
        return caption(self.task, subject=subject, result=self.scene, pace=pace)

    def frame(self, s: float) -> Picture:
        """uint8 [3, H, W] at time s: 0 is the source, 1 the target."""
        return self._at(np.array([PACES[self.pace](s)]))[0]

    def clip(self, frames: int) -> NDArray[np.uint8]:
        """uint8 [T, 3, H, W] at equal times from source to target."""
        return self._at(PACES[self.pace](np.linspace(0, 1, frames)))

    @property
    def source(self) -> Picture:
        return self._at(np.zeros(1))[0]

    @property
    def target(self) -> Picture:
        return self._at(np.ones(1))[0]

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Where source and target may differ [H, W]."""
        if self.task in STYLES:
            return np.ones((self.size, self.size), bool)
        if self.task == "background":
            return np.max([t.alpha for t in self.rest], axis=0) < 1
        return np.max([t.alpha for t in (self.subject, self.result) if t], axis=0) > 0

    def outcome(self, *things: Thing, scene: str = "", style: str = "", guessed: bool = False) -> Picture:
        """The picture with these objects beside the untouched ones, on a named background or in a style.

        Args:
            guessed: behind the subject is what goes on smoothly from around it, and not what the photograph has there.
        """
        picture = background(scene, self.size) if scene else self._guess if guessed else self._crop
        for thing in (*self.rest, *things):
            picture = thing.over(picture)
        return _to_bytes(stylise(picture, style) if style else picture)

    @cached_property
    def _crop(self) -> Floats:
        return self.crop.render(self.size)

    @cached_property
    def _guess(self) -> Floats:
        """The crop, with the biharmonic continuation of what surrounds the subject in its place."""
        surrounded = self._crop
        for thing in self.rest:
            surrounded = thing.over(surrounded)
        hidden = self.old.alpha > 0
        smooth = inpaint_biharmonic(surrounded, hidden, channel_axis=0)
        return np.where(hidden, _unit(smooth), self._crop)

    @cached_property
    def _ends(self) -> tuple[Floats, Floats]:
        before = self._crop
        for thing in self.rest:
            before = thing.over(before)
        if self.task in STYLES:
            return before, stylise(before, self.task)
        if self.task == "background":
            after = background(self.scene, self.size)
            for thing in self.rest:
                after = thing.over(after)
            return before, after
        return (
            self.subject.over(before) if self.subject else before,
            self.result.over(before) if self.result else before,
        )

    def _at(self, progress: NDArray[np.float64]) -> NDArray[np.uint8]:
        source, target = self._ends
        if self.task != "move":
            return _to_bytes(source + np.asarray(progress, np.float32)[:, None, None, None] * (target - source))
        return np.stack([self._moved(float(w)) for w in progress])

    def _moved(self, w: float) -> Picture:
        assert self.subject and self.result
        a, b = self.subject, self.result
        return self.outcome(replace(a, x=a.x + w * (b.x - a.x), y=a.y + w * (b.y - a.y)))


def _to_bytes(picture: Floats) -> NDArray[np.uint8]:
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def _article(thing: Thing) -> str:
    size = "" if thing.scale == "medium" else f"{thing.scale} "
    return f"{'an' if not size and thing.colour[0] == 'o' else 'a'} {size}{thing.name}"


def instructions(edit: Edit) -> tuple[str, ...]:
    """All wordings of an edit; each determines the result."""
    if edit.task in STYLES:
        return STYLE_WORDINGS[edit.task]
    if edit.task == "background":
        ways = ("change the background to", "replace the background with", "set the background to")
        return tuple(f"{way} {edit.scene}" for way in ways)
    the = f"the {edit.old.name}" if edit.subject else ""
    if edit.task == "add":
        thing, place = _article(edit.new), place_of(edit.new)
        return (f"add {thing} at the {place}", f"put {thing} at the {place}", f"place {thing} in the {place}")
    if edit.task == "remove":
        return (f"remove {the}", f"erase {the}", f"delete {the}", f"take away {the}")
    if edit.task == "replace":
        other = f"a {edit.new.name}"
        return (f"replace {the} with {other}", f"swap {the} for {other}", f"turn {the} into {other}")
    if edit.task == "recolour":
        colour = edit.new.colour
        return (f"turn {the} {colour}", f"recolour {the} to {colour}", f"make {the} {colour}", f"paint {the} {colour}")
    place = place_of(edit.new)
    return (f"move {the} to the {place}", f"shift {the} to the {place}", f"slide {the} to the {place}")


STYLE_WORDINGS = {
    "grayscale": ("make it grayscale", "turn it black and white", "remove all colour"),
    "sepia": ("make it sepia", "give it a sepia tone", "turn it into a sepia photo"),
    "sketch": ("turn it into a pencil sketch", "make it a sketch", "draw it in pencil"),
    "night": ("make it night", "turn day into night", "show it at night"),
    "snow": ("make it snow", "turn it into winter", "let it snow"),
}


# ----------------------------------------------------------------------------------------------------- drawing


def is_held_out(thing: Thing, task: str) -> bool:
    """Whether (colour, shape, task) is kept from training: about one in six, every colour and shape still seen."""
    colour, shape = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
    return (colour + 2 * shape + TASKS.index(task)) % 6 == 0


def draw(seed: int, index: int, split: Split, *, size: int = 64, tasks: Sequence[str] = SCHEDULE) -> Edit:
    """The edit with this index, its task taken from ``tasks`` in turn: a pure function of its arguments."""
    rng = np.random.default_rng([seed, index, split == "heldout"])
    task = tasks[index % len(tasks)]
    crop = _draw_crop(rng, split, size)
    rest, subject, result, scene = _draw_change(rng, split, task, size)
    key = f"{split}-{seed}-{index:06d}"
    pace = str(rng.choice(list(PACES)))
    wording, placed = int(rng.integers(12)), bool(rng.random() < 0.5)
    return Edit(key, split, index, task, crop, rest, subject, result, scene, pace, size, wording, placed)


def _draw_change(rng: np.random.Generator, split: Split, task: str, size: int):
    """Objects left alone, subject, result and scene; drawn again until they fit the picture and the split."""
    while True:
        others = int(rng.integers(0, 2)) + (1 if GROUPS[task] in ("background", "style") else 0)
        things = _draw_things(rng, others + (GROUPS[task] not in ("background", "style")), size)
        if GROUPS[task] == "style":
            return things, None, None, ""
        if task == "background":
            return things, None, None, str(rng.choice(BACKGROUNDS))
        subject, rest = things[0], things[1:]
        result = _draw_result(rng, task, subject)
        if task == "add":
            subject = None
        named = [t for t in (subject, result) if t]
        if any(t.overlaps(o) for t in named for o in rest) or any(t.name == o.name for t in named for o in rest):
            continue
        if split == "heldout" and not is_held_out(result or things[0], task):
            continue
        if split == "train" and any(is_held_out(t, task) for t in named):
            continue
        return rest, subject, result, ""


def _draw_things(rng: np.random.Generator, count: int, size: int) -> tuple[Thing, ...]:
    """Objects that neither touch nor share colour or shape, each within two pixels of a named place."""
    things: list[Thing] = []
    while len(things) < count:
        scale = str(rng.choice(list(SIZES), p=SIZE_ODDS))
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), scale, 0, 0, size)
        thing = thing.at(str(rng.choice(PLACES)))
        jitter = rng.uniform(-2, 2, 2) * size / 64
        thing = replace(thing, x=thing.x + float(jitter[0]), y=thing.y + float(jitter[1]))
        if not any(thing.overlaps(o) or thing.shape == o.shape or thing.colour == o.colour for o in things):
            things.append(thing)
        elif rng.random() < 0.05:
            things.clear()  # two large objects in the middle leave no room: start again
    return tuple(things)


def _draw_result(rng: np.random.Generator, task: str, subject: Thing) -> Thing | None:
    if task == "remove":
        return None
    if task == "add":
        return subject.at(place_of(subject))
    if task == "move":
        far = [p for p in PLACES if math.dist(position(p, subject.width, subject.size), (subject.x, subject.y)) > 14]
        return subject.at(str(rng.choice(far)))
    colour = str(rng.choice([c for c in COLOURS if c != subject.colour]))
    if task == "recolour":
        return replace(subject, colour=colour)
    return replace(subject, colour=colour, shape=str(rng.choice([s for s in SHAPES if s != subject.shape])))


# ------------------------------------------------------------------------------------------------------ oracle


def judge(edit: Edit, output: Picture) -> Verdict:
    """Nearest candidate wins: of all outcomes that the language could have asked for, is it the one asked for?

    Distances are squared differences of lightly blurred colours over the places where any candidate differs from
    the source. "unchanged" is always a candidate, so an edit that goes less than half-way fails. Objects are seen
    against what is around them: with their surroundings in view, distances are less the mean difference, a tint. And
    what lies behind an object no source shows, so with a subject every candidate is drawn over the photograph and
    over a smooth guess of it.
    """
    behind = (False, True) if edit.subject else (False,)
    candidates = [(name, _blurred(picture)) for guessed in behind for name, picture in _candidates(edit, guessed)]
    wanted = candidates[0][0]
    source, out = _blurred(edit.source), _blurred(output)
    view = np.max([np.abs(p - source).max(0) for _, p in candidates], axis=0) > 4
    if of_objects := bool(edit.subject or edit.result):
        view = np.asarray(binary_dilation(view, iterations=edit.size // 16), bool)

    def distance(picture: Floats) -> float:
        apart = (picture - out)[:, view]
        return float(apart.var(1).sum() if of_objects else (apart**2).sum())

    seen, _ = min(candidates, key=lambda candidate: distance(candidate[1]))
    return Verdict(seen == wanted, wanted, seen)


def _blurred(picture: Picture) -> Floats:
    return _blur(np.asarray(picture, np.float32))


def _candidates(edit: Edit, guessed: bool) -> Iterator[tuple[str, Picture]]:
    """(name, picture) of every outcome; the one asked for comes first."""
    outcome = partial(edit.outcome, guessed=guessed)
    if edit.task in STYLES:
        yield "as asked", edit.target
        yield from ((s, outcome(style=s)) for s in STYLES if s != edit.task)
    elif edit.task == "background":
        yield "as asked", edit.target
        yield from ((b, outcome(scene=b)) for b in BACKGROUNDS if b != edit.scene)
    else:
        yield "as asked", outcome(edit.result) if edit.result else outcome()
        yield from _moves(edit, outcome) if edit.task == "move" else _objects(edit, outcome)
    yield "unchanged", edit.source


def _moves(edit: Edit, outcome: Callable[..., Picture]) -> Iterator[tuple[str, Picture]]:
    """The object at other places, at both, or nowhere."""
    yield "vanished", outcome()
    yield "copied", outcome(edit.old, edit.new)
    others = [p for p in PLACES if p not in (place_of(edit.new), place_of(edit.old))]
    yield from ((p, outcome(edit.old.at(p))) for p in others)


def _objects(edit: Edit, outcome: Callable[..., Picture]) -> Iterator[tuple[str, Picture]]:
    """Any colour and shape where the object is or should be, no object, and for `add` other places."""
    thing = edit.result or edit.old
    if edit.task in ("replace", "recolour"):
        yield "vanished", outcome()
    for colour in COLOURS:
        for shape in SHAPES:
            other = replace(thing, colour=colour, shape=shape)
            same_as_source = edit.subject is not None and other == edit.subject
            if (edit.task == "remove" or other != thing) and not same_as_source:
                yield other.name, outcome(other)
    if edit.task == "add":
        yield from ((p, outcome(thing.at(p))) for p in PLACES if p != place_of(thing))


# ------------------------------------------------------------------------------------------------------- files


def write_triplets(
    folder: str | Path,
    count: int,
    split: Split,
    seed: int,
    *,
    size: int = 64,
    start: int = 0,
    tasks: Sequence[str] = SCHEDULE,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Edit]:
    """Write source/, edited/ and mask/ PNGs and, last and atomically, triplets.jsonl; return the edits.

    Args:
        start: index of the first edit.
        tasks: taken in turn, as in :func:`draw`.
        watch: wraps their numbers, for a progress bar.
    """
    root = Path(folder)
    for name in ("source", "edited", "mask"):
        (root / name).mkdir(parents=True, exist_ok=True)
    edits, lines = [], []
    for index in watch(range(start, start + count)):
        edits.append(draw(seed, index, split, size=size, tasks=tasks))
        lines.append(json.dumps(_write_one(root, edits[-1], seed)))
    temporary = root / "triplets.jsonl.tmp"
    try:
        temporary.write_text("\n".join(lines) + "\n")
        os.replace(temporary, root / "triplets.jsonl")
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror}", where=str(temporary), fix="free some space") from error
    return edits


def _write_one(root: Path, edit: Edit, seed: int) -> dict[str, str | int]:
    pictures = {"source": edit.source, "edited": edit.target, "mask": np.repeat(edit.mask[None], 3, 0) * np.uint8(255)}
    for name, picture in pictures.items():
        Image.fromarray(picture.transpose(1, 2, 0)).save(root / name / f"{edit.key}.png")
    paths = {name: f"{name}/{edit.key}.png" for name in pictures}
    return {
        "id": edit.key,
        "instruction": edit.instruction,
        **paths,
        "task": edit.task,
        "seed": seed,
        "index": edit.index,
        "split": edit.split,
    }
