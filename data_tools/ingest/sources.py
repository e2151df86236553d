"""Where triplets come from: jsonl, csv, parquet, webdataset tars and folders, here or behind a URL, as rows of columns.

Rows are streamed, so that memory does not grow with their number, and nothing in them is trusted: no name leads out
of the root, no pickle is opened, and a file that tears in the middle is one fault with its name.
"""

import csv
import io
import json
import posixpath
import re
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_tools.ingest.pictures import Rejected
from data_tools.ingest.triplets import STATE
from v4e.data.disk import hash_of
from v4e.data.places import NotFoundError, PassingError, is_remote, patiently, place, reaching, shown, system
from v4e.errors import DataError

T = TypeVar("T")

MAX_BYTES = 256 << 20  # of one picture's file or one line
PICTURE = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "gif", "avif", "jp2", "ppm")
PICKLES = ("pkl", "pickle", "pyd", "pt", "pth", "npy", "npz", "joblib")
PARTS = ("source", "edited", "mask")
UNNAMED = {"txt": "instruction"}  # the column of a file whose name says none
RAGGED = re.compile(rf"(?P<key>.+)_(?P<part>{'|'.join(PARTS)})")
LINE = 1 << 24
LONGEST = 60  # letters that a made id has of a file's name


class Blob(ABC):
    """The bytes of a picture, here or still to be fetched."""

    name: str

    @abstractmethod
    def read(self) -> bytes:
        """All of it; Rejected when it is missing, too large or cannot be read."""

    @abstractmethod
    def state(self) -> str:
        """Changes when the bytes do; cheap."""


@dataclass(frozen=True)
class Inside(Blob):
    """Bytes that came inside a row."""

    name: str
    content: bytes

    def read(self) -> bytes:
        return self.content

    def state(self) -> str:
        return hash_of(self.content)


@dataclass(frozen=True)
class File(Blob):
    """A file of its own."""

    name: str
    fs: fsspec.AbstractFileSystem
    path: str

    def read(self) -> bytes:
        if (self.info["size"] or 0) > MAX_BYTES:
            raise Rejected("too many bytes", f"{self.info['size']}, of at most {MAX_BYTES}")
        return _asked(self.fs, self.path, partial(_content, self.fs, self.path))

    def state(self) -> str:
        try:
            return repr([self.info.get(key) for key in STATE])
        except Rejected:  # reading it will say why
            return ""

    @cached_property
    def info(self) -> dict:
        """What its file system knows of it."""
        return _asked(self.fs, self.path, partial(self.fs.info, self.path))


def _asked(fs: fsspec.AbstractFileSystem, path: str, work: Callable[[], T]) -> T:
    """What a file system says of a path; one behind a network is asked again and again while that may help.

    Raises:
        Rejected: there is no such file, or it cannot be read.
        PassingError: the network still fails, which says nothing of the file.
    """
    try:
        return work() if isinstance(fs, LocalFileSystem) else patiently(partial(_reached, fs, path, work))
    except PassingError as error:
        fix = "run the same command again, which goes on from here"
        raise PassingError(error.what, where=error.where, fix=fix) from error.__cause__
    except (FileNotFoundError, NotFoundError) as error:
        raise Rejected("missing file", "no such file") from error
    except Exception as error:  # each file system has errors of its own
        told = error.what if isinstance(error, DataError) else shown(f"{type(error).__name__}: {error}")
        raise Rejected("unreadable file", told) from error


def _reached(fs: fsspec.AbstractFileSystem, path: str, work: Callable[[], T]) -> T:
    """What a network says, in v4e's errors; what it says of a name that cannot be one does not pass."""
    try:
        with reaching(url := fs.unstrip_protocol(path)):
            try:
                return work()
            except FileNotFoundError as error:
                raise _failure(url, error) from error
    except PassingError as error:
        if isinstance(error.__cause__, ValueError):
            raise DataError(error.what, where=error.where) from error.__cause__
        raise


def _failure(url: str, error: FileNotFoundError) -> BaseException:
    """fsspec's http calls whatever fails when it looks for a file a missing file, raised from what failed."""
    why = error.__cause__
    return why if why and url.startswith("http") and getattr(why, "status", None) != 404 else error


def _content(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    if isinstance(fs, LocalFileSystem):  # its own way there takes twice as long
        return Path(path).read_bytes()
    return cast(bytes, fs.cat_file(path))


@dataclass(frozen=True)
class Base:
    """The folder to which the names in a list are relative, and out of which none may lead."""

    fs: fsspec.AbstractFileSystem
    root: str

    def file(self, name: str) -> File:
        """The picture of that name; Rejected if it lies outside, or its URL is of an unknown kind."""
        if ":" in name and (elsewhere := self._elsewhere(name)):
            return elsewhere
        root = self.root.rstrip("/")
        inner = posixpath.normpath(name).removeprefix(f"{root}/")
        if inner.startswith(("/", "../")) or inner in (".", ".."):
            raise Rejected("outside the root", f"{name!r} leads out of {shown(self.root)}", name)
        return File(f"{root}/{inner}", self.fs, f"{root}/{inner}")

    def _elsewhere(self, name: str) -> File | None:
        """Behind a URL, if it is one."""
        try:
            fs, path, remote = reach(name)
        except DataError as error:
            raise Rejected("refused URL", error.what, error.where) from error
        return File(shown(name), fs, path) if remote else None


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file: columns, or why there are none.

    Args:
        file, line: where it stands; lines, rows and groups count from 1.
        values: by column.
        base: where its names lead.
        fault: set when the row could not be read.
        mark: tells its file from others of the source with the same name; empty where there are none.
    """

    file: str
    line: int
    values: Mapping[str, object]
    base: Base
    fault: Rejected | None = None
    mark: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.line}"


@dataclass(frozen=True)
class Source:
    """A file of rows, or a folder of pictures.

    Args:
        base: where the names in it lead, which need not be the same file system.
        mark: of each of its rows.
    """

    fs: fsspec.AbstractFileSystem
    path: str
    base: Base
    mark: str = ""

    def row(self, line: int, values: Mapping[str, object], fault: Rejected | None = None) -> Row:
        return Row(self.path, line, values, self.base, fault, self.mark)


def rows(url: str, columns: frozenset[str], root: str = "") -> Iterator[Row]:
    """Every row of a file, a glob or a folder, in a fixed order.

    Args:
        columns: those that a layout names; of the others, only texts and numbers are read.
        root: folder to which names are relative and which they may not leave; by default that of the list.

    Raises:
        DataError: nothing there, of no known kind, or its file system is not installed.
        PassingError: a network failed again and again.
    """
    fs, paths, faults = _expand(url)
    marks = _marks(paths)
    for path in paths:
        folder = _is_folder(fs, path)
        base = Base(fs, path) if folder else _base_of_list(fs, path, root)
        yield from _whole(Source(fs, path, base, marks.get(path, "")), _folder if folder else _reader_of(path), columns)
    for fault in faults:
        yield Source(fs, fault.file, Base(fs, fault.file)).row(1, {}, fault)


def count(url: str) -> int | None:
    """How many rows there will be, where that is cheap to know."""
    try:
        if reach(url)[2]:
            return None
        fs, paths, _ = _expand(url)
        return sum(_lines(fs, p) for p in paths) if all(p.endswith(".jsonl") for p in paths) else None
    except (DataError, OSError):
        return None  # reading says what is wrong


def stem_of(path: str) -> str:
    """What a made id says of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(path).stem).lstrip("_-")[:LONGEST]


def reach(url: str) -> tuple[fsspec.AbstractFileSystem, str, bool]:
    """The file system of a path or URL, its name there, and whether that is a network's.

    Raises:
        DataError: a URL of another kind than :func:`v4e.data.places.place` takes.
    """
    if "::" in url:
        raise DataError("a chain of file systems could hold any of them", where=shown(url), fix="give a plain URL")
    where = place(url)
    if is_remote(where):
        return system(where), where.path, True
    return LocalFileSystem(), str(where.expanduser().absolute()), False


@dataclass(frozen=True)
class Part:
    """What a file's name says: x_source.png and x.source.png are a picture, column source of x; x.txt is its text."""

    key: str
    column: str
    suffix: str

    @staticmethod
    def of(name: str) -> "Part":
        folder, base = posixpath.split(name)
        stem, _, ending = base.partition(".")
        column, _, suffix = ending.lower().rpartition(".")
        if not column and suffix in PICTURE and (ragged := RAGGED.fullmatch(stem)):
            stem, column = ragged["key"], ragged["part"]
        return Part(posixpath.join(folder, stem), column or UNNAMED.get(suffix, suffix), suffix)


# ----------------------------------------------------------------------------------------------- where they lie


def _expand(url: str) -> tuple[fsspec.AbstractFileSystem, list[str], list[Rejected]]:
    """The file system and its files (or the one folder) that a URL means, and folders that cannot be looked into."""
    with reaching(url):
        fs, path, _ = reach(url)
    faults: list[Rejected] = []
    paths = _globbed(fs, url, path) if any(c in path for c in "*?[") else [path]
    if len(paths) == 1 and _is_folder(fs, paths[0]):
        sets, faults = _sets_in(fs, paths[0])
        paths = sets or paths
    if not paths or not all(_is_there(fs, p) for p in paths):
        raise DataError("no such file", where=shown(url), fix="give a jsonl, csv, parquet, tar or folder")
    return fs, paths, faults


def _globbed(fs: fsspec.AbstractFileSystem, url: str, pattern: str) -> list[str]:
    def once() -> list[str]:
        with reaching(url):
            return sorted(map(str, fs.glob(pattern)))

    return patiently(once)


def _is_there(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    try:
        return bool(_asked(fs, path, partial(fs.info, path)))
    except Rejected:
        return False


def _is_folder(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    try:
        return _asked(fs, path, partial(fs.isdir, path))
    except Rejected:  # reading it will say why
        return False


def _base_of_list(fs: fsspec.AbstractFileSystem, path: str, root: str) -> Base:
    """The root that was said, wherever it lies, or the list's own folder."""
    if not root:
        return Base(fs, posixpath.dirname(path))
    there, at, _ = reach(root)
    return Base(there, at)


def _marks(paths: list[str]) -> dict[str, str]:
    """Of files whose made ids would be the same: a hash of their paths within the folder that holds all files."""
    alike = Counter(map(stem_of, paths))
    within = posixpath.commonpath(paths) if len(paths) > 1 else ""
    return {p: hash_of(posixpath.relpath(p, within).encode())[:8] for p in paths if alike[stem_of(p)] > 1}


def _sets_in(fs: fsspec.AbstractFileSystem, folder: str) -> tuple[list[str], list[Rejected]]:
    """The parquet files of a folder or of those in it, or else the tars; and which of those cannot be looked into."""
    (_, above, linked), *below = _walk(fs, folder, depth=1)
    inner = sorted(path for _, files, _ in below for path in files)
    missed = linked + [fault for at, _, faults in below for fault in faults if fault.file == at]
    for suffix in (".parquet", ".tar"):
        for files, faults in ((above, []), (inner, missed)):
            if found := [path for path in files if path.endswith(suffix)]:
                return found, faults
    return [], []


def _walk(
    fs: fsspec.AbstractFileSystem, folder: str, depth: int = -1
) -> Iterator[tuple[str, list[str], list[Rejected]]]:
    """Every folder from this one on with its files, in order, and what in it could not be looked into.

    fsspec's own passes over a folder that it cannot list as if it were empty.
    """
    files, folders, faults = _listing(fs, folder)
    yield folder, files, faults
    for inner in folders if depth else ():
        yield from _walk(fs, inner, depth - 1)


def _listing(fs: fsspec.AbstractFileSystem, folder: str) -> tuple[list[str], list[str], list[Rejected]]:
    """Files and folders of a folder, and links to folders, which could lead in circles or anywhere."""
    try:
        entries = _asked(fs, folder, partial(fs.ls, folder, detail=True))
    except Rejected as why:
        return [], [], [Rejected("unreadable folder", why.detail, folder)]
    files, folders, linked = [], [], []
    for entry in sorted(entries, key=lambda e: e["name"]):
        path = entry["name"].rstrip("/")
        if entry["type"] == "directory" and path != folder:
            folders.append(path)
        elif entry.get("islink") and fs.isdir(path):
            linked.append(Rejected("linked folder", "a link to a folder is not followed", path))
        elif path != folder:
            files.append(path)
    return files, folders, linked


def _whole(source: Source, reader: "Reader", columns: frozenset[str]) -> Iterator[Row]:
    """The rows of one file; when it tears, a last row with the fault."""
    line = 0
    try:
        for row in reader(source, columns):
            line = row.line
            yield row
    except DataError:
        raise
    except Rejected as why:
        yield source.row(line + 1, {}, Rejected(why.reason, why.detail, source.path))
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError) as error:
        why = Rejected("torn file", f"after {line} rows: {type(error).__name__}: {error}", source.path)
        yield source.row(line + 1, {}, why)
    else:
        if not line:
            yield source.row(1, {}, Rejected("empty file", "there is nothing in it", source.path))


Reader = Callable[[Source, frozenset[str]], Iterator[Row]]
Named = tuple[Part, Callable[[], Blob]]


def _reader_of(path: str) -> Reader:
    known: dict[str, Reader] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".tar": _tar}
    if reader := known.get(PurePosixPath(path).suffix.lower()):
        return reader
    raise DataError(
        f"a file of no known kind; known are {', '.join(known)} and folders",
        where=shown(path),
        fix="unpack it, or turn a json list into lines with: jq -c '.[]'",
    )


# -------------------------------------------------------------------------------------------------- what they are


def _jsonl(source: Source, columns: frozenset[str]) -> Iterator[Row]:
    with _open(source.fs, source.path) as file:
        number = 0
        while raw := file.readline(LINE):
            number += 1
            if raw.strip():
                yield _row_of_json(raw, source, number)


def _row_of_json(raw: bytes, source: Source, number: int) -> Row:
    try:
        return source.row(number, _object(raw))
    except Rejected as why:
        return source.row(number, _gist(raw), why)


def _gist(raw: bytes) -> dict[str, object]:
    """What a damaged line seems to say, so that it can be named."""
    try:
        row = json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _object(raw: bytes) -> dict[str, object]:
    """A json object; what is not UTF-8 and what is not json are different mistakes."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_number)
        json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate, \\ud800, passes the first line
    except UnicodeError as error:
        raise Rejected("not UTF-8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise Rejected("not json", str(error)) from error
    if not isinstance(row, dict):
        raise Rejected("not json", "a line is an object with columns and values")
    return row


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no json")


def _csv(source: Source, columns: frozenset[str]) -> Iterator[Row]:
    with _open(source.fs, source.path) as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True)
        number = 0
        while True:
            number += 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield source.row(number, {}, Rejected("not csv", str(error)))
                continue
            if values is None:
                return
            yield _row_of_csv(values, source, number)


def _row_of_csv(values: dict, source: Source, number: int) -> Row:
    """A row with as many cells as the head, all of them UTF-8; a column without a name is pandas' index."""
    if None in values or None in values.values():  # where DictReader puts more cells, and in place of fewer
        return source.row(number, {}, Rejected("not csv", "more or fewer cells than the head"))
    try:
        "".join(values.values()).encode()
    except UnicodeEncodeError as error:
        return source.row(number, {}, Rejected("not UTF-8", str(error)))
    return source.row(number, {k: v for k, v in values.items() if k and v})


def _parquet(source: Source, columns: frozenset[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("parquet needs pyarrow", where=shown(source.path), fix="pip install 'v4e[parquet]'") from error
    number = 0
    try:
        with _open(source.fs, source.path) as file:
            table = ParquetFile(file, page_checksum_verification=True)
            wanted = [f.name for f in table.schema_arrow if f.name in columns or _is_plain(f.type)]
            for batch in table.iter_batches(batch_size=16, columns=wanted, use_threads=False):
                for at in range(batch.num_rows):
                    number += 1
                    yield _row_of_batch(batch.slice(at, 1), source, number)
    except ArrowException as error:
        raise ValueError(error) from error


def _row_of_batch(batch, source: Source, number: int) -> Row:
    try:
        (values,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return source.row(number, {}, Rejected("not UTF-8", str(error)))
    return source.row(number, {k: _finite(v) for k, v in values.items()})


def _is_plain(kind) -> bool:
    """Texts and numbers travel along; pictures that no layout names do not."""
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_floating(kind)


def _finite(value: object) -> object:
    """nan and inf, which json does not have, become nothing."""
    return None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value


def _tar(source: Source, columns: frozenset[str]) -> Iterator[Row]:
    """Groups of members with one key, as webdataset has them."""
    with _open(source.fs, source.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for number, (_, group) in enumerate(groupby(_members(tar), key=lambda m: m[0].key), start=1):
            yield _row_of_files(list(group), source, number, columns)
        _refuse_torn(tar, file)


def _members(tar: tarfile.TarFile) -> Iterator[Named]:
    """What each member's name says, and how to read it."""
    for member in tar:
        vars(tar)["members"] = []  # tarfile remembers every header it has seen
        if not member.isdir():
            yield Part.of(member.name), partial(_member, tar, member)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Inside:
    """A member's bytes; Rejected for all that is no plain file inside its folder."""
    name = member.name
    if name.startswith("/") or ".." in name.split("/"):
        raise Rejected("outside the root", f"member {name!r} leads out of the archive")
    if not member.isreg():
        raise Rejected("not a file", f"member {name!r} is a link or a device")
    if member.size > MAX_BYTES:
        raise Rejected("too many bytes", f"member {name!r} has {member.size} bytes, of at most {MAX_BYTES}")
    file = tar.extractfile(member)
    content = file.read() if file else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{name!r} ends early")
    return Inside(name, content)


def _refuse_torn(tar: tarfile.TarFile, file: IO[bytes]) -> None:
    """tarfile takes a damaged header for the end; a real end is a block of zeros."""
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no member and no end of the archive at byte {tar.offset}")


def _folder(source: Source, columns: frozenset[str]) -> Iterator[Row]:
    """Groups of files with one key, folder by folder; one that cannot be looked into is a row without a number."""
    number = 0
    for folder, paths, faults in _walk(source.fs, source.path):
        here = replace(source, path=folder)
        yield from (here.row(number + 1, {}, fault) for fault in faults)
        seen = [p for p in paths if not posixpath.basename(p).startswith(".")]
        files = sorted(((Part.of(p), partial(File, p, source.fs, p)) for p in seen), key=lambda f: f[0].key)
        for _, group in groupby(files, key=lambda f: f[0].key):
            number += 1
            yield _row_of_files(list(group), here, number, columns)


def _row_of_files(group: list[Named], source: Source, number: int, columns: frozenset[str]) -> Row:
    """A group of files as a row: texts and json become columns, pictures stay bytes, or files to be read later."""
    key = group[0][0].key
    values: dict[str, object] = {"id": posixpath.basename(key)}
    seen: set[str] = set()
    try:
        for part, blob in group:
            if (name := f"{part.column}.{part.suffix}") in seen or (part.suffix in PICTURE and part.column in values):
                raise Rejected("doubled member", f"{key} has two files for {part.column}")
            seen.add(name)
            values |= _columns(part, blob, columns)
    except Rejected as why:
        return source.row(number, values, why)
    return source.row(number, values)


def _columns(part: Part, blob: Callable[[], Blob], columns: frozenset[str]) -> Mapping[str, object]:
    """What a file says; one that is no picture, text or json and that no layout names is not opened."""
    if part.suffix in PICKLES:
        raise Rejected("pickle", f"{part.key}.{part.suffix} could run a program when it is opened")
    if part.suffix in PICTURE:
        return {part.column: blob()}
    if part.suffix == "json":
        return _object(blob().read())
    if part.suffix != "txt" and part.column not in columns:
        return {}
    try:
        return {part.column: blob().read().decode("utf-8")}
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"{part.key}.{part.suffix}: {error}") from error


class _Remote(io.RawIOBase):
    """A file behind a network; a read that failed has moved nothing, so that it can be made again."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self._path = fs, path
        self._file = _asked(fs, path, partial(fs.open, path, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer) -> int:
        content = _asked(self._fs, self._path, partial(self._file.read, len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open(fs: fsspec.AbstractFileSystem, path: str) -> io.BufferedReader:
    local = isinstance(fs, LocalFileSystem)
    return io.BufferedReader(cast(io.RawIOBase, fs.open(path, "rb")) if local else _Remote(fs, path))


def _lines(fs: fsspec.AbstractFileSystem, path: str) -> int:
    with _open(fs, path) as file:
        return sum(bool(line.strip()) for line in file)
