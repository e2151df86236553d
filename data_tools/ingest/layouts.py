"""Which column of a data set means what: named layouts, or a small YAML; and rows read through one."""

import difflib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_tools.ingest.pictures import Rejected
from data_tools.ingest.sources import LONGEST, Blob, Inside, Row, stem_of
from v4e import config
from v4e.data.disk import hash_of, to_json
from v4e.data.members import check_key
from v4e.errors import ConfigError, DataError


@dataclass(frozen=True)
class Layout:
    """The column of each part of a triplet; an empty name is a part that the data do not have.

    Args:
        id: columns that make the id, joined by ``-``; none makes it of the file's name and the row's number.
        which: of an instruction that is a list of wordings, the one to take; -1 is the last.
        images: a list of pictures that are edited one into the next, in place of ``source`` and ``edited``; the
            instructions are then a list too, one a turn, and each turn is a triplet.
        extra: a mapping whose keys are carried along beside the columns that nothing else names.
    """

    id: tuple[str, ...] = ("id",)
    instruction: str = "instruction"
    source: str = "source"
    edited: str = "edited"
    mask: str = "mask"
    task: str = "task"
    evolution: str = "evolution"
    images: str = ""
    which: int = 0
    extra: str = "extra"

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it names."""
        one = (self.instruction, self.source, self.edited, self.mask, self.task, self.evolution, self.images)
        return frozenset({*self.id, *one, self.extra} - {""})


OF_ROWS = Layout(id=())
NAMED = {
    "v4e": Layout(),
    "instructpix2pix": replace(OF_ROWS, instruction="edit_prompt", source="original_image", edited="edited_image"),
    "instructpix2pix-samples": replace(OF_ROWS, instruction="edit_prompt", source="input_image", edited="edited_image"),
    "magicbrush": Layout(id=("img_id", "turn_index"), source="source_img", edited="target_img", mask="mask_img"),
    "ultraedit": replace(
        OF_ROWS, instruction="edit_prompt", source="source_image", edited="edited_image", mask="mask_image"
    ),
    "omniedit": Layout(
        id=("omni_edit_id",), instruction="edited_prompt_list", source="src_img", edited="edited_img", which=-1
    ),
    "gpt-image-edit": replace(OF_ROWS, source="input", edited="output"),
}


def layout_of(name: str) -> Layout:
    """A named layout, or one of a YAML file.

    Raises:
        ConfigError: no such name or file, an unknown key (its nearest neighbour is named), a wrong type.
    """
    if name in NAMED:
        return NAMED[name]
    if Path(name).suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.0)[0]
        raise ConfigError(f"no layout {name!r}", fix=f"did you mean {near}? Known are {', '.join(NAMED)}, or a .yaml")
    made = config.load(name, [], lambda _: Layout, recipe="layout")
    return replace(made, id=tuple(made.id))


@dataclass(frozen=True)
class Draft:
    """A row that could be understood; its pictures are not yet looked at."""

    row: Row
    id: str
    instruction: str
    pictures: Mapping[str, Blob]
    task: str = ""
    evolution: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)

    def stamp(self) -> str:
        """Changes when the row or one of its files does."""
        words = [self.id, self.instruction, self.task, self.evolution, self.extra]
        return hash_of(to_json([words, {name: blob.state() for name, blob in self.pictures.items()}]))[:16]


def drafts(row: Row, layout: Layout) -> Iterator[Draft | Rejected]:
    """The triplets of a row: one, or as many as it has turns."""
    try:
        turns = [*_turns(row, layout)]
    except Rejected as why:
        yield why
        return
    for number, values in turns:
        try:
            yield _draft(row, values, layout, number)
        except Rejected as why:
            yield why


def id_of(values: Mapping[str, object], layout: Layout) -> str:
    """The id of a row that may be anything."""
    return "-".join(str(values.get(c, "")) for c in layout.id)[:200]


def _turns(row: Row, layout: Layout) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(turn, values): one turn with the number 0 unless pictures come as a list."""
    if not layout.images:
        yield 0, row.values
        return
    images, words = row.values.get(layout.images), row.values.get(layout.instruction)
    if not isinstance(images, list) or not isinstance(words, list) or len(images) != len(words) + 1 or not words:
        raise Rejected("missing field", f"{layout.images} and {layout.instruction} are not n + 1 pictures and n texts")
    for turn, (before, after, text) in enumerate(zip(images[:-1], images[1:], words, strict=True), start=1):
        yield turn, {**row.values, layout.source: before, layout.edited: after, layout.instruction: text}


def _draft(row: Row, values: Mapping[str, object], layout: Layout, turn: int) -> Draft:
    text = values.get(layout.instruction)
    text = _chosen(text, layout.which) if isinstance(text, list) else text
    pictures = {name: values.get(getattr(layout, name)) for name in ("source", "edited", "mask")}
    if not isinstance(text, str) or not (pictures["source"] and pictures["edited"]):
        wanted = f"{layout.instruction}, {layout.source} and {layout.edited}"
        raise Rejected("missing field", f"a row needs {wanted}; it has {', '.join(map(str, values)) or 'nothing'}")
    key = _id(row, values, layout) + (f"-{turn}" if turn else "")
    return Draft(
        row=row,
        id=_legal(key),
        instruction=_worded(text),
        pictures={name: _blob(row, value) for name, value in pictures.items() if value},
        task=_text(values, layout.task),
        evolution=_text(values, layout.evolution),
        extra=_extra(values, layout),
    )


def _chosen(texts: list, which: int) -> object:
    try:
        return texts[which]
    except IndexError:
        return None


def _id(row: Row, values: Mapping[str, object], layout: Layout) -> str:
    """Of its columns, or of its place: train-00003-of-00262-000017; with its file's mark where it has one."""
    if not layout.id:
        stem = stem_of(row.file)
        stem = f"{stem[: LONGEST - 1 - len(row.mark)]}-{row.mark}" if row.mark else stem
        return f"{stem}-{row.line:06d}".lstrip("-")
    parts = [values.get(column) for column in layout.id]
    if bad := [c for c, v in zip(layout.id, parts, strict=True) if not isinstance(v, str | int) or isinstance(v, bool)]:
        raise Rejected("missing field", f"no text or number under {', '.join(bad)}")
    return "-".join(map(str, parts))


def _legal(key: str) -> str:
    try:
        return check_key(key, "id")
    except DataError as error:
        raise Rejected("illegal id", f"{error.what}: {error.fix}") from error


def _worded(text: str) -> str:
    """The instruction without blanks around it; one of blanks and invisible characters alone holds no words."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate
        raise Rejected("not UTF-8", str(error)) from error
    if all(unicodedata.category(letter)[0] in "ZC" for letter in text):
        raise Rejected("empty instruction", "the instruction holds no words")
    return text.strip()


def _text(values: Mapping[str, object], column: str) -> str:
    value = values.get(column)
    if value is not None and not isinstance(value, str):
        raise Rejected("wrong type", f"{column} is not text")
    return value or ""


def _blob(row: Row, value: object) -> Blob:
    """A picture of what a column may hold: bytes, datasets' struct of bytes and path, or a name."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Inside(row.place, value)
    if isinstance(value, Blob):
        return value
    if isinstance(value, str) and value:
        return row.base.file(value)
    raise Rejected("wrong type", "a picture is bytes or a path")


def _extra(values: Mapping[str, object], layout: Layout) -> dict[str, object]:
    more = values.get(layout.extra) or {}
    kept = {k: v for k, v in values.items() if k not in layout.columns and not isinstance(v, bytes | Blob)}
    kept |= more if isinstance(more, dict) else {layout.extra: more}
    try:
        return kept if to_json(kept) else {}
    except UnicodeEncodeError as error:
        raise Rejected("not UTF-8", str(error)) from error
    except (TypeError, ValueError) as error:
        raise Rejected("wrong type", f"what is carried along is no json: {error}") from error
