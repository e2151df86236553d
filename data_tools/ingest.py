"""`v4e-shards ingest`: a jsonl of (instruction, source, edited) to checked, normalised images of one size.

Each line holds ``id``, ``instruction``, ``source``, ``edited`` and, if it likes, ``mask``, ``task``, ``evolution`` and
``extra``; paths are relative to the jsonl. A line that cannot be used goes to ``rejects.jsonl`` with its reason; the
others are listed in ``triplets.jsonl``, whose images are RGB PNGs of the wanted size. Run again, it reads only what is
new or was rejected.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from data_tools.evolve import Evolution
from data_tools.evolve import write as write_evolution
from v4e.data.disk import agree, hash_of, plain_folder, readable, to_json, writable, write_atomically
from v4e.data.members import check_key, to_png
from v4e.errors import ConfigError, DataError
from v4e.journal import progress
from v4e.nouns import Clip, Grid

X = TypeVar("X")
Size = tuple[int, int]  # height, width
Fit = Literal["crop", "exact"]
ASPECT_TOLERANCE = 0.02  # editors round sizes to multiples of 8 or 16; more than this and the pictures do not align
KNOWN = ("id", "instruction", "source", "edited", "mask", "task", "evolution", "extra")
LIST, ACCEPTED, REJECTS = "triplets.jsonl", ".accepted.jsonl", "rejects.jsonl"


@dataclass(frozen=True)
class Triplet:
    """A checked edit.

    Args:
        id: legal as a sample's key.
        source, edited: PNG files of one size.
        task: kind of edit; empty until said by the data or by the evolution writer.
        evolution: what happens between the two images; empty until `v4e-shards evolve` has run.
        writer: who wrote ``evolution``, with its version.
        mask: PNG of where the edit is, if the data said so.
        extra: what else the line held; carried along, never read.
        stamp: changes when the line or one of its files does.
    """

    id: str
    instruction: str
    source: Path
    edited: Path
    task: str = ""
    evolution: str = ""
    writer: str = ""
    mask: Path | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    stamp: str = ""

    def read_source(self, size: Size | None = None) -> Clip:
        """The source as an image, scaled and cropped to ``size`` where it has another; DataError names key and file."""
        return self._read(self.source, size)

    def read_target(self, size: Size | None = None) -> Clip:
        """The edited image, likewise."""
        return self._read(self.edited, size)

    def _read(self, path: Path, size: Size | None) -> Clip:
        with readable(f"{path}, key {self.id}"):
            picture = normalise(path)
            return _to_clip(fit_to(picture, size) if size else picture)


class Rejected(Exception):  # noqa: N818  (not an error: one line's verdict)
    """Why a line is not taken: a short reason to count, the file it is about and a sentence."""

    def __init__(self, reason: str, detail: str, file: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.file = reason, detail, file


@dataclass(frozen=True)
class Line:
    """A line that parsed: its number in the jsonl and the triplet it describes, files as the line names them."""

    number: int
    triplet: Triplet


@dataclass(frozen=True)
class Reject:
    """A line that is not taken, as ``rejects.jsonl`` holds it."""

    line: int
    id: str
    file: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What became of a jsonl: lines taken now, lines taken by an earlier run, lines rejected by reason."""

    accepted: int
    reused: int
    rejected: Mapping[str, int]

    @property
    def fraction(self) -> float:
        """Share of lines that were rejected."""
        bad = sum(self.rejected.values())
        return bad / max(1, bad + self.accepted + self.reused)

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.rejected.items()))
        return f"{self.accepted} taken, {self.reused} taken before, {sum(self.rejected.values())} rejected" + (
            f": {reasons}" if reasons else ""
        )


def ingest(
    jsonl: str | Path,
    out: str | Path,
    size: Size,
    *,
    fit: Fit = "crop",
    max_reject_fraction: float = 0.0,
    workers: int = 2,
    watch: Callable[[Iterable[Line]], Iterable[Line]] = iter,
) -> Report:
    """Check and normalise every line; see the file's head.

    Args:
        jsonl: the list.
        out: folder to fill.
        size: height and width of every image, multiples of 16.
        fit: ``crop`` scales to cover and crops the centre; ``exact`` takes only images that have the size already.
        max_reject_fraction: more rejected lines than this share are an error (after everything is written).
        workers: threads that decode.
        watch: wraps the lines, for a progress bar.

    Raises:
        DataError: no such jsonl, other settings than before, a full disk, too many rejects.
        ShapeError: a size that no latent grid has.
    """
    jsonl, out = Path(jsonl), plain_folder(out)
    _check_arguments(jsonl, out, size, fit)
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        agree(out / "ingest.json", {"height": size[0], "width": size[1], "fit": fit})
        taken, rejects, reused = _take(jsonl, out, size, fit, workers, watch)
        os.sync()  # the images before the list that names them
        _write_rejects(out / REJECTS, rejects)
        write_triplets(out, taken)
        (out / ACCEPTED).unlink(missing_ok=True)
    report = Report(len(taken) - reused, reused, Counter(r.reason for r in rejects))
    if report.fraction > max_reject_fraction:
        raise DataError(
            str(report),
            where=str(out / REJECTS),
            fix="mend those lines and run again, or allow them with --max-reject-fraction",
        )
    return report


def read_triplets(folder: str | Path) -> list[Triplet]:
    """The triplets of an ingested folder, in the order of its jsonl.

    Raises:
        DataError: nothing was ingested there, or a line is damaged; it names the line.
    """
    folder = plain_folder(folder)
    if not (folder / LIST).is_file():
        raise DataError(f"no {LIST}", where=str(folder), fix="make it with v4e-shards ingest")
    return _read_rows(folder / LIST)


def write_triplets(folder: str | Path, triplets: Iterable[Triplet]) -> None:
    """Replace the list of an ingested folder at once."""
    path = Path(folder) / LIST
    write_atomically(path, b"".join(_to_row(t, path.parent) for t in triplets))


def add_evolutions(
    folder: str | Path,
    write: Callable[[str], Evolution] = write_evolution,
    *,
    again: bool = False,
    watch: Callable[[Sequence[Triplet]], Iterable[Triplet]] = iter,
) -> Counter[str]:
    """Give every triplet its evolution prompt, and its task where the data said none.

    Args:
        write: makes a prompt of an instruction.
        again: also rewrite prompts that are there already, unless the data brought them.

    Returns:
        how many prompts were written, by task.
    """
    triplets, counts, out = read_triplets(folder), Counter[str](), []
    for triplet in watch(triplets):
        if not triplet.evolution or (again and triplet.writer):
            made = write(triplet.instruction)
            task, writer = triplet.task or made.task, f"{made.writer} {made.version}"
            triplet = replace(triplet, evolution=made.prompt, task=task, writer=writer)
            counts[triplet.task] += 1
        out.append(triplet)
    with writable(Path(folder)):
        write_triplets(folder, out)
    return counts


# --------------------------------------------------------------------------------------------------- lines


def _check_arguments(jsonl: Path, out: Path, size: Size, fit: str) -> None:
    Grid(1, *size)
    if fit not in ("crop", "exact"):
        raise ConfigError(f"fit = {fit!r} is neither crop nor exact")
    if not jsonl.is_file():
        raise DataError("no such file", where=str(jsonl), fix="give a jsonl with id, instruction, source and edited")
    if jsonl.resolve() == (out / LIST).resolve():
        raise ConfigError("the list to read is the one to write", where=str(jsonl), fix="write to another folder")


def _take(jsonl: Path, out: Path, size: Size, fit: Fit, workers: int, watch) -> tuple[list[Triplet], list[Reject], int]:
    """Triplets and rejects in the jsonl's order, and how many triplets an earlier run had taken."""
    before = {t.id: t for name in (LIST, ACCEPTED) if (out / name).is_file() for t in _read_rows(out / name)}
    # Without the half line with which a killed run may have ended, so that new lines can follow.
    write_atomically(out / ACCEPTED, b"".join(_to_row(t, out) for t in before.values()))
    taken: list[Triplet] = []
    rejects: list[Reject] = []
    reused = 0
    with open(out / ACCEPTED, "ab") as log, ThreadPoolExecutor(workers) as pool:
        lines = watch(_parsed(jsonl, rejects))
        for window in _windows(lines, 4 * workers):
            for line, done in zip(window, pool.map(lambda n: _check(n, before, out, size, fit), window), strict=True):
                if isinstance(done, Rejected):
                    rejects.append(_reject(line.number, line.triplet.id, done))
                    continue
                taken.append(done)
                if done is before.get(done.id):
                    reused += 1
                else:
                    log.write(_to_row(done, out))
            log.flush()
    return taken, sorted(rejects, key=lambda r: r.line), reused


def _parsed(jsonl: Path, rejects: list[Reject]) -> Iterator[Line]:
    """Lines that can be understood; the others go to ``rejects``."""
    seen: set[str] = set()
    with open(jsonl, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                try:
                    triplet = _parse(raw, jsonl.parent)
                    if triplet.id in seen:
                        raise Rejected("duplicate id", f"{triplet.id!r} was used by an earlier line")
                except Rejected as why:
                    rejects.append(_reject(number, _id_of(raw), why))
                    continue
                seen.add(triplet.id)
                yield Line(number, triplet)


def _parse(raw: bytes, base: Path) -> Triplet:
    """One line's triplet, files as named and not yet looked at."""
    row = _decode(raw)
    kinds = {"id": str | int, "instruction": str, "source": str, "edited": str}
    if missing := [k for k, kind in kinds.items() if not isinstance(row.get(k), kind)]:
        raise Rejected("missing field", f"no text under {', '.join(missing)}")
    task, extra, mask = row.get("task", ""), row.get("extra", {}), row.get("mask")
    if not isinstance(task, str) or not isinstance(extra, dict) or not isinstance(mask, str | None):
        raise Rejected("wrong type", "task and mask are text, extra is a mapping")
    if not row["instruction"].strip():
        raise Rejected("empty instruction", "the instruction holds no words")
    files = [base / row["source"], base / row["edited"], *([base / mask] if mask else [])]
    return Triplet(
        id=_legal_id(str(row["id"])),
        instruction=row["instruction"].strip(),
        source=files[0],
        edited=files[1],
        task=task,
        evolution=str(row.get("evolution", "")),
        mask=files[2] if mask else None,
        extra={k: v for k, v in row.items() if k not in KNOWN} | extra,
        stamp=hash_of(raw + _state(files))[:16],
    )


def _decode(raw: bytes) -> dict:
    """A line's json object; what is not UTF-8 and what is not json are different mistakes."""
    try:
        row = json.loads(raw.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate, \\ud800, passes the first line
    except UnicodeError as error:
        raise Rejected("not UTF-8", str(error)) from error
    except ValueError as error:
        raise Rejected("not json", str(error)) from error
    if not isinstance(row, dict):
        raise Rejected("not json", "a line is an object with id, instruction, source and edited")
    return row


def _legal_id(key: str) -> str:
    try:
        return check_key(key, "id")
    except DataError as error:
        raise Rejected("illegal id", f"{error.what}: {error.fix}") from error


def _id_of(raw: bytes) -> str:
    """The id of a line that may be anything."""
    try:
        return str(json.loads(raw.decode("utf-8", "replace"))["id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _state(files: Sequence[Path]) -> bytes:
    """Changes when a file does."""
    stats = [os.stat(f) for f in files if f.is_file()]
    return to_json([[s.st_size, s.st_mtime_ns] for s in stats])


def _reject(number: int, key: str, why: Rejected) -> Reject:
    return Reject(number, key, why.file, why.reason, why.detail)


def _windows(items: Iterable[X], size: int) -> Iterator[list[X]]:
    stream = iter(items)
    while window := list(islice(stream, size)):
        yield window


# -------------------------------------------------------------------------------------------------- images


def _check(line: Line, before: Mapping[str, Triplet], out: Path, size: Size, fit: Fit) -> Triplet | Rejected:
    """Normalise one line's images; an unchanged line that was taken before is taken again as it was."""
    old = before.get(line.triplet.id)
    if old and old.stamp == line.triplet.stamp and old.source.is_file() and old.edited.is_file():
        return old
    try:
        return _normalised(line.triplet, out, size, fit)
    except Rejected as why:
        return why


def _normalised(triplet: Triplet, out: Path, size: Size, fit: Fit) -> Triplet:
    source, edited = _open(triplet.source), _open(triplet.edited)
    mask = triplet.mask and _open(triplet.mask)
    _refuse_misaligned(triplet, source, edited)
    pictures = {"source": source, "edited": edited, **({"mask": mask} if mask else {})}
    if fit == "exact" and (wrong := [k for k, p in pictures.items() if (p.height, p.width) != size]):
        raise Rejected("wrong size", f"{wrong[0]} is {_size_of(pictures[wrong[0]])}, not {size[0]}x{size[1]}")
    fitted = {name: fit_to(picture, size) for name, picture in pictures.items()}
    if fitted["source"].tobytes() == fitted["edited"].tobytes():
        raise Rejected("source == edited", "the two images are the same, pixel by pixel", str(triplet.edited))
    folder = out / "images" / hash_of(triplet.id.encode())[:2]  # one folder of a million files is slow everywhere
    folder.mkdir(parents=True, exist_ok=True)
    return replace(triplet, **{k: _save(p, folder / f"{triplet.id}.{k}.png") for k, p in fitted.items()})


def normalise(path: Path) -> Image.Image:
    """An image as upright RGB: EXIF orientation applied, transparency on white, 16 bits to 8.

    Raises:
        OSError, SyntaxError, ValueError: as pillow says that a file cannot be decoded.
    """
    with Image.open(path) as file:
        file.load()
        picture = ImageOps.exif_transpose(file)
    if picture.mode.startswith("I"):  # pillow's own conversion clips at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return picture.convert("RGB")


def fit_to(picture: Image.Image, size: Size) -> Image.Image:
    """Scale to cover ``size`` (height, width) and crop the centre."""
    wanted = size[1], size[0]
    return picture if picture.size == wanted else ImageOps.fit(picture, wanted, Image.Resampling.LANCZOS)


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise Rejected("missing file", "no such file", str(path))
    try:
        return normalise(path)
    except Exception as error:  # decoders of broken files raise whatever they meet
        raise Rejected("undecodable", f"{type(error).__name__}: {error}", str(path)) from error


def _refuse_misaligned(triplet: Triplet, source: Image.Image, edited: Image.Image) -> None:
    """Pictures of two shapes would be cropped differently, and the edit would look like a zoom."""
    ratio = (source.width * edited.height) / (source.height * edited.width)
    if abs(ratio - 1) > ASPECT_TOLERANCE:
        detail = f"source is {_size_of(source)} (height x width), edited is {_size_of(edited)}"
        raise Rejected("unequal sizes", detail, str(triplet.edited))


def _size_of(picture: Image.Image) -> str:
    return f"{picture.height}x{picture.width}"


def _save(picture: Image.Image, path: Path) -> Path:
    write_atomically(path, to_png(_to_clip(picture)), durable=False)
    return path


def _to_clip(picture: Image.Image) -> Clip:
    return Clip(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous())


# ---------------------------------------------------------------------------------------------------- rows


def _read_rows(path: Path) -> list[Triplet]:
    """Triplets of a list; a last line without its end, from a killed run, is left out of the running log only."""
    content = path.read_bytes().split(b"\n")
    lines = content[:-1] if path.name == ACCEPTED else [c for c in content if c]
    return [_from_row(line, path, n) for n, line in enumerate(lines, start=1)]


def _from_row(line: bytes, path: Path, number: int) -> Triplet:
    with readable(f"{path}, line {number}"):
        row, base = json.loads(line), path.parent
        files = {k: base / row[k] if row[k] else None for k in ("source", "edited", "mask")}
        return Triplet(**{**row, **files})


def _to_row(triplet: Triplet, base: Path) -> bytes:
    files = {k: str(p.relative_to(base)) if (p := getattr(triplet, k)) else None for k in ("source", "edited", "mask")}
    return to_json({**vars(triplet), **files}) + b"\n"


def _write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    write_atomically(path, b"".join(to_json(vars(r)) + b"\n" for r in rejects))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards ingest`."""
    parser.add_argument("jsonl", help="one triplet a line; its paths are relative to the file")
    parser.add_argument("out", help="folder to fill; an unfinished one is gone on with")
    parser.add_argument("--height", type=int, required=True, help="of every image, in pixels")
    parser.add_argument("--width", type=int, required=True, help="of every image, in pixels")
    parser.add_argument(
        "--fit", choices=("crop", "exact"), default="crop", help="scale and crop, or refuse other sizes"
    )
    parser.add_argument("--max-reject-fraction", type=float, default=0.0, help="more rejects than this are an error")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    report = ingest(
        args.jsonl,
        args.out,
        (args.height, args.width),
        fit=args.fit,
        max_reject_fraction=args.max_reject_fraction,
        workers=args.workers,
        watch=lambda lines: progress(lines, "ingest", total=_lines_in(args.jsonl)),
    )
    print(report)
    return 0


def _lines_in(jsonl: str) -> int | None:
    try:
        with open(jsonl, "rb") as file:
            return sum(bool(line.strip()) for line in file)
    except OSError:
        return None  # ingest says what is wrong with it
