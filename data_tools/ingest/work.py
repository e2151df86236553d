"""Taking triplets in: rows are read in order, checked side by side, decided on in order."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Literal

from xxhash import xxh3_128_hexdigest

from data_tools.ingest.layouts import Draft, Layout, drafts, id_of
from data_tools.ingest.ledger import Ledger, failing_disk
from data_tools.ingest.pictures import (
    MAX_PIXELS,
    Glance,
    Rejected,
    Size,
    decode,
    fit_to,
    nearest,
    size_of,
)
from data_tools.ingest.sources import Blob, Row, reach, rows
from data_tools.ingest.triplets import LIST, Triplet, in_order, iterate, replacing, sole_writer
from v4e.config import Wandb
from v4e.data.disk import TEMPORARY, agree, hash_of, scratch, writable, write_atomically
from v4e.data.places import Place, exists, is_remote, make_folder, place, remove, shown
from v4e.errors import ConfigError, DataError
from v4e.journal import Journal
from v4e.nouns import Grid

Fit = Literal["crop", "exact"]
Repeats = Literal["reject", "flag", "keep"]
ASPECT_TOLERANCE = 0.02  # editors round sizes to multiples of 8 or 16; more than this and the pictures do not align
SILENT = Wandb(mode="disabled")
LEDGER, REJECTS = ".ingest.sqlite", "rejects.jsonl"
SAVE_EVERY = 1.0  # seconds of work that a kill may cost
TELL_EVERY = 10.0  # seconds between two lines of the journal


@dataclass(frozen=True)
class Rules:
    """What is asked of a triplet.

    Args:
        sizes: height and width that its pictures may be brought to; the nearest in shape is taken.
        fit: ``crop`` scales to cover and crops the centre; ``exact`` takes only pictures that have the size already.
        duplicates: what becomes of the same files under the same instruction: ``reject``, ``flag`` or ``keep``.
        near_duplicates: and of what only looks the same, under the same words.
        max_pixels: of a picture, by its header; more is taken for a decompression bomb.
    """

    sizes: tuple[Size, ...]
    fit: Fit = "crop"
    duplicates: Repeats = "reject"
    near_duplicates: Repeats = "flag"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for size in self.sizes:
            Grid(1, *size)
        if not self.sizes:
            raise ConfigError("no size is wanted", fix="give --height and --width, --area or --buckets")
        if self.fit not in ("crop", "exact"):
            raise ConfigError(f"fit = {self.fit!r} is neither crop nor exact")
        for name in ("duplicates", "near_duplicates"):
            if getattr(self, name) not in ("reject", "flag", "keep"):
                raise ConfigError(f"{name} = {getattr(self, name)!r} is none of reject, flag and keep")


@dataclass(frozen=True)
class Report:
    """What became of a source: triplets taken now, by an earlier run, flagged as repeats; rejects by reason.

    Args:
        first: the first reject, as a phrase that names list, line, id and file.
        forgotten: triplets that an earlier run took and the source holds no more.
    """

    accepted: int
    reused: int
    rejected: Mapping[str, int]
    repeats: int = 0
    first: str = ""
    forgotten: int = 0

    @property
    def fraction(self) -> float:
        """Share of rows that were rejected."""
        bad = sum(self.rejected.values())
        return bad / max(1, bad + self.accepted + self.reused)

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.rejected.items()))
        flagged = f", {self.repeats} flagged as repeats" if self.repeats else ""
        return (
            f"{self.accepted} taken, {self.reused} taken before, {sum(self.rejected.values())} rejected"
            f"{f': {reasons}' if reasons else ''}{flagged}{f', {self.forgotten} forgotten' * bool(self.forgotten)}"
        )


def ingest(
    source: str | Place,
    out: str | Place,
    size: Size | Sequence[Size],
    *,
    layout: Layout | None = None,
    root: str = "",
    fit: Fit = "crop",
    duplicates: Repeats = "reject",
    near_duplicates: Repeats = "flag",
    max_pixels: int = MAX_PIXELS,
    max_reject_fraction: float = 0.0,
    forget: bool = False,
    workers: int = 2,
    wandb: Wandb = SILENT,
    watch: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Report:
    """Check every triplet of a source and keep the good ones with their pictures; see the package's head.

    Args:
        source: path, glob or URL of jsonl, csv, parquet, tar, or a folder.
        out: folder to fill; one begun before is gone on with.
        size: height and width of every triplet, or several of them (buckets); multiples of 16.
        layout: which column is what.
        root: folder out of which no name in a list may lead; the list's own by default.
        max_reject_fraction: more rejected rows than this share are an error (after everything is written).
        forget: let triplets go that an earlier run took and that the source holds no more.
        workers: threads that read and decode; they change nothing but the time.
        wandb: where rows a second and rejects by reason go, beside ``journal/`` in the folder.
        watch: wraps the rows, for a progress bar.

    Raises:
        DataError: no such source, other settings than before, a full disk, too many rejects, or triplets that the
            source holds no more without ``forget``; then the list stays as it was.
        PassingError: a network failed again and again; the same command goes on.
        ShapeError: a size that no latent grid has.
    """
    sizes = tuple(size) if isinstance(size[0], Sequence) else (size,)
    rules = Rules(sizes, fit, duplicates, near_duplicates, max_pixels)  # type: ignore[arg-type]
    folder, layout = place(out), layout or Layout()
    if reach(str(source))[1] == reach(str(folder / LIST))[1]:
        raise ConfigError("the list to read is the one to write", where=shown(source), fix="write to another folder")
    found = rows(str(source), layout.columns, root)
    with writable(folder), failing_disk():
        make_folder(folder)
        with sole_writer(folder):
            agree(folder / "ingest.json", {"sizes": [list(s) for s in rules.sizes], "fit": fit})
            _sweep(folder)
            journal = Journal(scratch(folder) / "journal", wandb, {"source": shown(source), "rules": asdict(rules)})
            with closing(journal):
                report = _Work(folder, rules, layout, workers, journal).run(watch(found), forget)
    if report.fraction > max_reject_fraction:
        raise DataError(
            f"{report}; the first: {report.first}",
            where=shown(folder / REJECTS),
            fix="mend those rows and run again, or allow them with --max-reject-fraction",
        )
    return report


@dataclass(frozen=True)
class _Job:
    """A row on its way: what it says or why not, and the triplet that an earlier run made of it."""

    number: int
    row: Row
    draft: Draft | Rejected
    old: Triplet | None = None


@dataclass(frozen=True)
class _Picture:
    """What is kept of a picture that was decoded: its file, and not its pixels, of which one at a time is enough.

    Args:
        bucket: the size that it, or the source that it belongs to, is to be brought to.
    """

    file: str
    content: bytes
    suffix: str
    size: Size
    bucket: Size
    glance: Glance

    @staticmethod
    def of(blob: Blob, rules: Rules, bucket: Size | None = None) -> "_Picture":
        try:
            content = blob.read()
            image, suffix = decode(content, rules.max_pixels)
        except Rejected as why:
            raise Rejected(why.reason, why.detail, blob.name) from why
        bucket = bucket or nearest(size_of(image), rules.sizes)
        return _Picture(blob.name, content, suffix, size_of(image), bucket, Glance.at(image, bucket))

    def pixels(self) -> bytes:
        """As they are in its bucket, decoded again."""
        return fit_to(decode(self.content, max_pixels=1 << 62)[0], self.bucket).tobytes()


class _Work:
    """One run over one folder."""

    def __init__(self, out: Place, rules: Rules, layout: Layout, workers: int, journal: Journal) -> None:
        self.out, self.rules, self.layout, self.workers, self.journal = out, rules, layout, workers, journal
        self.ledger = Ledger(scratch(out) / LEDGER, out)
        self.accepted = self.reused = self.repeats = 0
        self._folders: set[Place] = set()

    def run(self, found: Iterable[Row], forget: bool) -> Report:
        with closing(self.ledger):
            self.ledger.begin(iterate(self.out) if exists(self.out / LIST) else ())
            self._decide_all(found)
            report = self._finish(forget)
        (scratch(self.out) / LEDGER).unlink()
        return report

    def _decide_all(self, found: Iterable[Row]) -> None:
        number, began = 0, time.monotonic()
        saved = told = began
        try:
            with ThreadPoolExecutor(self.workers) as pool:
                for job, done in in_order(pool, self._check, self._jobs(found), 4 * self.workers):
                    number = job.number
                    self._decide(job, done)
                    if time.monotonic() - saved > SAVE_EVERY:
                        self.ledger.save()
                        saved = time.monotonic()
                    if time.monotonic() - told > TELL_EVERY:
                        self._tell(number, began)
                        told = time.monotonic()
        finally:
            self.ledger.save()
        self._tell(number, began)

    def _tell(self, rows: int, began: float) -> None:
        """How far, how fast, and what was rejected why."""
        reasons = self.ledger.reasons()
        counts = {"taken": self.accepted, "taken_before": self.reused, "rejects": sum(reasons.values())}
        speed = {"rows_per_second": rows / max(1e-9, time.monotonic() - began)}
        self.journal.log(rows, {**counts, **speed, **{f"rejects/{k}": n for k, n in reasons.items()}})

    def _jobs(self, found: Iterable[Row]) -> Iterator[_Job]:
        """Rows as drafts, numbered, each id once."""
        number = 0
        for row in found:
            for draft in [row.fault] if row.fault else drafts(row, self.layout):
                number += 1
                old = None
                if isinstance(draft, Draft):
                    old = self.ledger.earlier(draft.id)
                    if not self.ledger.claim(draft.id):
                        draft = Rejected("duplicate id", f"{draft.id!r} was used by an earlier row")
                yield _Job(number, row, draft, old)

    def _check(self, job: _Job) -> tuple[_Job, Triplet | Rejected]:
        """A worker's part: all that needs no other row."""
        if isinstance(job.draft, Rejected):
            return job, job.draft
        stamp = job.draft.stamp()
        if job.old and job.old.stamp == stamp and all(map(exists, job.old.files.values())):
            return job, job.old
        try:
            return job, replace(self._taken(job.draft), stamp=stamp)
        except Rejected as why:
            return job, why

    def _taken(self, draft: Draft) -> Triplet:
        """The triplet of a draft, its pictures checked and copied."""
        source = _Picture.of(draft.pictures["source"], self.rules)
        more = {k: _Picture.of(v, self.rules, source.bucket) for k, v in draft.pictures.items() if k != "source"}
        self._refuse_unfit(pictures := {"source": source, **more})
        look = _look(source, pictures["edited"])
        files = {name: self._write(f"{draft.id}.{name}", draft.id, picture) for name, picture in pictures.items()}
        return Triplet(
            id=draft.id,
            instruction=draft.instruction,
            source=files["source"],
            edited=files["edited"],
            mask=files.get("mask"),
            task=draft.task,
            evolution=draft.evolution,
            extra=draft.extra,
            size=source.bucket,
            hashes={name: xxh3_128_hexdigest(picture.content) for name, picture in pictures.items()},
            look=look,
        )

    def _refuse_unfit(self, pictures: Mapping[str, _Picture]) -> None:
        """Rejected if the pictures do not align, or must have their bucket's size and do not."""
        _refuse_misaligned(pictures["source"], pictures["edited"])
        for name, picture in pictures.items():
            if self.rules.fit == "exact" and picture.size != picture.bucket:
                wanted = " or ".join(map(_words, self.rules.sizes))
                raise Rejected("wrong size", f"{name} is {_words(picture.size)}, not {wanted}", picture.file)

    def _write(self, name: str, key: str, picture: "_Picture") -> Place:
        """Keep the file as it came: scaling it here would only cost an encoding and a second decoding."""
        folder = self.out / "images" / hash_of(key.encode())[:2]  # one folder of a million files is slow everywhere
        if folder not in self._folders:
            make_folder(folder)
            self._folders.add(folder)
        path = folder / f"{name}.{picture.suffix}"
        write_atomically(path, picture.content, durable=False)
        return path

    def _decide(self, job: _Job, done: Triplet | Rejected) -> None:
        """The part that depends on the rows before, done in their order."""
        if isinstance(done, Triplet):
            done = self._once(done)
        if isinstance(done, Rejected):
            self.ledger.reject(job.number, done.reason, _reject(job, done, self.layout))
            return
        self.ledger.take(job.number, done)
        self.repeats += bool(done.repeats)
        if job.old and done.stamp == job.old.stamp and done.hashes == job.old.hashes:
            self.reused += 1
        else:
            self.accepted += 1

    def _once(self, triplet: Triplet) -> Triplet | Rejected:
        """The triplet, flagged if it repeats an earlier one, or its rejection."""
        searches = (
            ("duplicate", self.rules.duplicates, self.ledger.same),
            ("near duplicate", self.rules.near_duplicates, self.ledger.similar),
        )
        for reason, what, search in searches:
            if what != "keep" and (first := search(triplet)):
                if what == "flag":
                    return replace(triplet, repeats=first)
                for path in triplet.files.values():
                    remove(path)
                return Rejected(reason, f"the same edit as {first}", str(triplet.edited.name))
        return replace(triplet, repeats="")

    def _finish(self, forget: bool) -> Report:
        """Everything on the disk, the lists last; DataError if triplets would go with their prompts unasked."""
        first = next((_phrase(line) for line in self.ledger.rejects()), "")
        forgotten, such = self.ledger.unmet()
        if forgotten and not forget:
            raise DataError(
                f"{forgotten} triplets taken before are not in the source now, such as {such}"
                f"{f'; the first reject: {first}' * bool(first)}",
                where=shown(self.out / LIST),
                fix="ingest the whole source or write to another folder, or let them go with --forget",
            )
        os.sync()  # the images before the list that names them
        for name, lines in ((REJECTS, self.ledger.rejects()), (LIST, self.ledger.taken())):
            with replacing(self.out / name) as file:
                file.writelines(lines)
        return Report(self.accepted, self.reused, self.ledger.reasons(), self.repeats, first, forgotten)


def _sweep(folder: Place) -> None:
    """Take away what a killed run had half written; one that ended has left no ledger, and nothing else."""
    if (scratch(folder) / LEDGER).exists() and not is_remote(folder):
        for pattern in ("", "images/*/"):
            for path in folder.glob(f"{pattern}{TEMPORARY}*"):
                path.unlink()


def _look(source: _Picture, edited: _Picture) -> str:
    """Both pictures' perceptual hashes; Rejected if there is nothing to see between them."""
    if source.glance.like(edited.glance) and source.pixels() == edited.pixels():
        raise Rejected("source == edited", "the two images are the same, pixel by pixel", edited.file)
    return source.glance.dhash + edited.glance.dhash


def _refuse_misaligned(source: _Picture, edited: _Picture) -> None:
    """Pictures of two shapes would be cropped differently, and the edit would look like a zoom."""
    (h, w), (height, width) = source.size, edited.size
    if abs(w * height / (h * width) - 1) > ASPECT_TOLERANCE:
        detail = f"source is {h}x{w} (height x width), edited is {height}x{width}"
        raise Rejected("unequal sizes", detail, edited.file)


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _reject(job: _Job, why: Rejected, layout: Layout) -> dict[str, object]:
    """A line of rejects.jsonl: where the row stands, its id, the file it is about, reason and detail, no signature."""
    key = job.draft.id if isinstance(job.draft, Draft) else id_of(job.row.values, layout)
    words = {"list": job.row.file, "line": job.row.line, "id": key, "file": why.file or job.row.file}
    words |= {"reason": why.reason, "detail": why.detail}
    return {k: shown(v).encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in words.items()}


def _phrase(line: bytes) -> str:
    """A line of rejects.jsonl for people."""
    told = json.loads(line)
    where = f"{told['list']}, line {told['line']}, id {told['id']}, file {told['file']}"
    return f"{where}: {told['reason']}: {told['detail']}"
