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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_tools.ingest.pictures import Rejected
from data_tools.ingest.triplets import STATE
from v4e.data.disk import hash_of
from v4e.data.places import is_remote, place, reaching, shown, system
from v4e.errors import DataError

MAX_BYTES = 256 << 20  # of one picture's file or one line
PICTURE = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "gif", "avif", "jp2", "ppm")
PICKLES = ("pkl", "pickle", "pyd", "pt", "pth", "npy", "npz", "joblib")
PARTS = ("source", "edited", "mask")
UNNAMED = {"txt": "instruction"}  # the column of a file whose name says none
RAGGED = re.compile(rf"(?P<key>.+)_(?P<part>{'|'.join(PARTS)})")
LINE = 1 << 24


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
        try:
            if (self.info["size"] or 0) > MAX_BYTES:
                raise Rejected("too many bytes", f"{self.info['size']}, of at most {MAX_BYTES}")
            return _content(self.fs, self.path)
        except FileNotFoundError as error:
            raise Rejected("missing file", "no such file") from error
        except Rejected:
            raise
        except Exception as error:  # each file system has errors of its own
            raise Rejected("unreadable file", shown(f"{type(error).__name__}: {error}")) from error

    def state(self) -> str:
        try:
            return repr([self.info.get(key) for key in STATE])
        except Exception:  # reading it will say why
            return ""

    @cached_property
    def info(self) -> dict:
        """What its file system knows of it."""
        return self.fs.info(self.path)


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
    """

    file: str
    line: int
    values: Mapping[str, object]
    base: Base
    fault: Rejected | None = None

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.line}"


def rows(url: str, columns: frozenset[str], root: str = "") -> Iterator[Row]:
    """Every row of a file, a glob or a folder, in a fixed order.

    Args:
        columns: those that a layout names; of the others, only texts and numbers are read.
        root: folder to which names are relative and which they may not leave; by default that of the list.

    Raises:
        DataError: nothing there, of no known kind, or its file system is not installed.
    """
    fs, paths = _expand(url)
    for path in paths:
        base = Base(fs, reach(root)[1] if root else posixpath.dirname(path)) if not fs.isdir(path) else Base(fs, path)
        yield from _whole(path, base, columns)


def count(url: str) -> int | None:
    """How many rows there will be, where that is cheap to know."""
    try:
        fs, paths = _expand(url)
        local = isinstance(fs, LocalFileSystem) and all(p.endswith(".jsonl") for p in paths)
        return sum(_lines(fs, p) for p in paths) if local else None
    except (DataError, OSError):
        return None  # reading says what is wrong


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


def _expand(url: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The file system and its files (or the one folder) that a URL means."""
    with reaching(url):
        fs, path, _ = reach(url)
        paths = sorted(map(str, fs.glob(path))) if any(c in path for c in "*?[") else [path]
        if len(paths) == 1 and fs.isdir(paths[0]):
            paths = _sets_in(fs, paths[0]) or paths
        if not paths or not all(fs.exists(p) for p in paths):
            raise DataError("no such file", where=shown(url), fix="give a jsonl, csv, parquet, tar or folder")
    return fs, paths


def _sets_in(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    """The parquet files of a folder or of those in it, or else the tars."""
    for pattern in ("*.parquet", "*/*.parquet", "*.tar", "*/*.tar"):
        if files := sorted(map(str, fs.glob(f"{folder}/{pattern}"))):
            return files
    return []


def _whole(path: str, base: Base, columns: frozenset[str]) -> Iterator[Row]:
    """The rows of one file; when it tears, a last row with the fault."""
    reader, line = _reader_of(path, base), 0
    try:
        for row in reader(path, base, columns):
            line = row.line
            yield row
    except DataError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError) as error:
        why = Rejected("torn file", f"after {line} rows: {type(error).__name__}: {error}", path)
        yield Row(path, line + 1, {}, base, why)
    else:
        if not line:
            yield Row(path, 1, {}, base, Rejected("empty file", "there is nothing in it", path))


Reader = Callable[[str, Base, frozenset[str]], Iterator[Row]]
Named = tuple[Part, Callable[[], Blob]]


def _reader_of(path: str, base: Base) -> Reader:
    known: dict[str, Reader] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".tar": _tar}
    if base.fs.isdir(path):
        return _folder
    if reader := known.get(PurePosixPath(path).suffix.lower()):
        return reader
    raise DataError(
        f"a file of no known kind; known are {', '.join(known)} and folders",
        where=path,
        fix="unpack it, or turn a json list into lines with: jq -c '.[]'",
    )


# -------------------------------------------------------------------------------------------------- what they are


def _jsonl(path: str, base: Base, columns: frozenset[str]) -> Iterator[Row]:
    with _open(base.fs, path) as file:
        number = 0
        while raw := file.readline(LINE):
            number += 1
            if raw.strip():
                yield _row_of_json(raw, path, number, base)


def _row_of_json(raw: bytes, path: str, number: int, base: Base) -> Row:
    try:
        return Row(path, number, _object(raw), base)
    except Rejected as why:
        return Row(path, number, _gist(raw), base, why)


def _gist(raw: bytes) -> dict[str, object]:
    """What a damaged line seems to say, so that it can be named."""
    try:
        row = json.loads(raw.decode("utf-8", "replace"))
    except ValueError:
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


def _csv(path: str, base: Base, columns: frozenset[str]) -> Iterator[Row]:
    with _open(base.fs, path) as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, restkey="", strict=True)
        number = 0
        while True:
            number += 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Row(path, number, {}, base, Rejected("not csv", str(error)))
                continue
            if values is None:
                return
            yield _row_of_csv(values, path, number, base)


def _row_of_csv(values: dict, path: str, number: int, base: Base) -> Row:
    """A row with as many cells as the head, all of them UTF-8."""
    if "" in values or None in values.values():
        return Row(path, number, {}, base, Rejected("not csv", "more or fewer cells than the head"))
    try:
        "".join(values.values()).encode()
    except UnicodeEncodeError as error:
        return Row(path, number, {}, base, Rejected("not UTF-8", str(error)))
    return Row(path, number, {k: v for k, v in values.items() if v}, base)


def _parquet(path: str, base: Base, columns: frozenset[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("parquet needs pyarrow", where=path, fix="pip install 'v4e[parquet]'") from error
    number = 0
    try:
        with _open(base.fs, path) as file:
            table = ParquetFile(file, page_checksum_verification=True)
            wanted = [f.name for f in table.schema_arrow if f.name in columns or _is_plain(f.type)]
            for batch in table.iter_batches(batch_size=16, columns=wanted, use_threads=False):
                for at in range(batch.num_rows):
                    number += 1
                    yield _row_of_batch(batch.slice(at, 1), path, number, base)
    except ArrowException as error:
        raise ValueError(error) from error


def _row_of_batch(batch, path: str, number: int, base: Base) -> Row:
    try:
        (values,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return Row(path, number, {}, base, Rejected("not UTF-8", str(error)))
    return Row(path, number, {k: _finite(v) for k, v in values.items()}, base)


def _is_plain(kind) -> bool:
    """Texts and numbers travel along; pictures that no layout names do not."""
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_floating(kind)


def _finite(value: object) -> object:
    """nan and inf, which json does not have, become nothing."""
    return None if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))) else value


def _tar(path: str, base: Base, columns: frozenset[str]) -> Iterator[Row]:
    """Groups of members with one key, as webdataset has them."""
    with _open(base.fs, path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for number, (_, group) in enumerate(groupby(_members(tar), key=lambda m: m[0].key), start=1):
            yield _row_of_files(list(group), path, number, base, columns)
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


def _folder(path: str, base: Base, columns: frozenset[str]) -> Iterator[Row]:
    """Groups of files with one key, folder by folder."""
    number = 0
    for folder, inner, names in cast("Iterator[tuple[str, list[str], list[str]]]", base.fs.walk(path)):
        inner.sort()
        paths = [posixpath.join(folder, name) for name in sorted(names) if not name.startswith(".")]
        files = sorted(((Part.of(p), partial(File, p, base.fs, p)) for p in paths), key=lambda f: f[0].key)
        for _, group in groupby(files, key=lambda f: f[0].key):
            number += 1
            yield _row_of_files(list(group), folder, number, base, columns)


def _row_of_files(group: list[Named], path: str, number: int, base: Base, columns: frozenset[str]) -> Row:
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
        return Row(path, number, values, base, why)
    return Row(path, number, values, base)


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


def _open(fs: fsspec.AbstractFileSystem, path: str) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, fs.open(path, "rb")))


def _lines(fs: fsspec.AbstractFileSystem, path: str) -> int:
    with _open(fs, path) as file:
        return sum(bool(line.strip()) for line in file)
