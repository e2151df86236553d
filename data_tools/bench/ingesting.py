"""Ingesting and verifying edits against merely decoding the same pictures, with as many workers.

Both begin at the same files and decode every picture wholly; ingest also checks, compares, hashes and keeps them, and
verify reads all it kept once more. They take turns, and each ratio is that of the medians: of the processor's time,
which other work on the machine disturbs less, and beside it, as ``_wall``, of the clock's, with the disk in it.
"""

import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageFilter

from data_tools.ingest import ingest, verify_triplets
from v4e.journal import progress

SIZES = ((512, 512), (768, 1024), (1024, 1024))  # of the public sets of edits
BUCKET = (480, 832)
SUFFIXES = ("jpg", "png")


@dataclass(frozen=True)
class Lap:
    """What one pass took, in seconds."""

    wall: float
    cpu: float


def measure(edits: int = 144, turns: int = 5, workers: int = 2) -> dict[str, float]:
    """Ratios of the speeds, by name; ``ingest_ratio`` over JPEG and PNG together."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for suffixes in (SUFFIXES, ("jpg",), ("png",)):
            jsonl = write_edits(Path(folder) / "-".join(suffixes), edits, suffixes)
            name = "ingest_ratio" if suffixes == SUFFIXES else f"ingest_ratio_{suffixes[0]}"
            for clock, ratio in _ratios(jsonl, turns, workers).items():
                found[name + clock] = ratio
        return found


def write_edits(folder: Path, edits: int, suffixes: tuple[str, ...]) -> Path:
    """A jsonl of synthetic photographs, each with a local edit."""
    folder.mkdir(parents=True)
    rows = []
    for n in range(edits):
        suffix, size = suffixes[n % len(suffixes)], SIZES[n // len(suffixes) % len(SIZES)]
        picture = photograph(n, size)
        names = [f"{n}-{kind}.{suffix}" for kind in ("source", "edited")]
        for name, image in zip(names, (picture, edited(picture)), strict=True):
            image.save(folder / name, quality=92)
        rows.append({"id": f"{n}", "instruction": "blur it", "source": names[0], "edited": names[1]})
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "edits.jsonl"


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colours with the grain of a camera, so that it compresses as a photograph does."""
    draw = np.random.default_rng(seed)
    colours = Image.fromarray(draw.integers(0, 255, (size[0] // 32, size[1] // 32, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + draw.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def edited(picture: Image.Image) -> Image.Image:
    """The same with its middle blurred."""
    width, height = picture.size
    box = (width * 3 // 8, height * 3 // 8, width * 5 // 8, height * 5 // 8)
    changed = picture.copy()
    changed.paste(picture.crop(box).filter(ImageFilter.GaussianBlur(4)), box)
    return changed


def _ratios(jsonl: Path, turns: int, workers: int) -> dict[str, float]:
    pictures = sorted(path for path in jsonl.parent.iterdir() if path.suffix != ".jsonl")
    plain, ours = [], []
    for _ in progress(range(turns + 1), "ingesting"):
        plain.append(_timed(lambda: _decode_all(pictures, workers)))
        ours.append(_timed(lambda: _take(jsonl, workers)))
        shutil.rmtree(jsonl.parent / "out")
    plain, ours = plain[1:], ours[1:]  # the first turn warms caches
    return {
        "": median(lap.cpu for lap in plain) / median(lap.cpu for lap in ours),
        "_wall": median(lap.wall for lap in plain) / median(lap.wall for lap in ours),
    }


def _timed(work) -> Lap:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Lap(time.perf_counter() - wall, time.process_time() - cpu)


def _decode_all(pictures: list[Path], workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        assert len([*pool.map(_decoded, pictures)]) == len(pictures)


def _decoded(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def _take(jsonl: Path, workers: int) -> None:
    out = jsonl.parent / "out"
    report = ingest(jsonl, out, BUCKET, workers=workers)
    assert not report.rejected and not [*verify_triplets(out, workers=workers)]
