"""Triplets come in checked: every bad line has its reason, every good one its normalised pictures."""

import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import cli, evolve, ingest
from data_tools.evolve import writers
from data_tools.ingest import ledger, sources, work
from v4e import journal
from v4e.config import Wandb
from v4e.errors import ConfigError, DataError, ShapeError
from v4e.nouns import Clip

SIZE = (32, 48)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


class Raw:
    """A folder of pictures and the lines that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.out = folder / "raw", [], folder / "out"
        self.folder.mkdir()
        for name in "abcdefgh":
            picture(ord(name)).save(self.folder / f"{name}.png")

    def add(self, key: object, instruction: object = "make it red", source="a.png", edited="b.png", **more) -> None:
        row = {"id": key, "instruction": instruction, "source": source, "edited": edited, **more}
        self.lines.append(json.dumps({k: v for k, v in row.items() if v is not None}).encode())

    @property
    def jsonl(self) -> Path:
        path = self.folder / "edits.jsonl"
        path.write_bytes(b"\n".join(self.lines) + b"\n")
        return path

    def take(self, **options) -> ingest.Report:
        return ingest.ingest(self.jsonl, self.out, SIZE, **{"max_reject_fraction": 1.0, **options})

    def rejects(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "rejects.jsonl").read_bytes().splitlines()]


@pytest.fixture
def raw(tmp_path) -> Raw:
    return Raw(tmp_path)


def pixels(clip: Clip) -> np.ndarray:
    return clip.frames_T3HW[0].permute(1, 2, 0).numpy()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, which tells the time."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("journal/")}


def test_good_lines(raw):
    raw.add("one", " paint it größer ", task="style", mask="h.png", extra={"a": 1}, seed=7)
    raw.add(2, edited="c.png", evolution="it reddens")
    assert str(raw.take()) == "2 taken, 0 taken before, 0 rejected"
    one, two = ingest.read_triplets(raw.out)
    assert (one.id, one.instruction, one.task, one.extra) == ("one", "paint it größer", "style", {"seed": 7, "a": 1})
    assert (two.id, two.evolution, two.mask) == ("2", "it reddens", None)
    assert one.source.read_bytes() == (raw.folder / "a.png").read_bytes()
    assert one.mask.read_bytes() == (raw.folder / "h.png").read_bytes()
    assert np.array_equal(pixels(one.read_source()), picture(ord("a")))
    assert one.read_source().size == SIZE and two.read_target((16, 16)).size == (16, 16)


REASONS = {
    "missing file": {"source": "nowhere.png"},
    "undecodable": {"edited": "torn.png"},
    "empty instruction": {"instruction": "  \n"},
    "unequal sizes": {"edited": "square.png"},
    "source == edited": {"edited": "a.png"},
    "illegal id": {"key": "a.b"},
    "duplicate id": {"key": "good"},
    "missing field": {"edited": None},
    "wrong type": {"task": 3},
}


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason(raw, reason):
    torn = (raw.folder / "b.png").read_bytes()
    (raw.folder / "torn.png").write_bytes(torn[: len(torn) // 2])
    picture(1, (32, 32)).save(raw.folder / "square.png")
    raw.add("good")
    raw.add(**{"key": "bad", **REASONS[reason]})
    report = raw.take()
    assert report.rejected == {reason: 1} and report.accepted == 1
    (row,) = raw.rejects()
    assert (row["line"], row["id"], row["reason"]) == (2, REASONS[reason].get("key", "bad"), reason) and row["detail"]
    named = {"missing file": "nowhere.png", "undecodable": "torn.png", "unequal sizes": "square.png"}
    assert reason not in named or row["file"].endswith(named[reason])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "x", "instruction": "\xff\xfe", "source": "a.png", "edited": "b.png"}', "not UTF-8"),
        (rb'{"id": "x", "instruction": "\ud800", "source": "a.png", "edited": "b.png"}', "not UTF-8"),
        (b"{", "not json"),
        (b'["x"]', "not json"),
        (b"\x89PNG\r\x1a", "not UTF-8"),
        (b'{"id": "x", "extra": ' + b"[" * 100_000, "not json"),
    ],
)
def test_lines_that_cannot_be_read(raw, line, reason):
    raw.lines += [line, b"", b"  "]
    raw.add("good")
    assert raw.take().rejected == {reason: 1} and [t.id for t in ingest.read_triplets(raw.out)] == ["good"]


def exif_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    picture(0, SIZE).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, lossless=True)


def transparent(path: Path) -> None:
    layer = picture(0)
    layer.putalpha(Image.fromarray(np.repeat([[0] * 24 + [255] * 24], 32, 0).astype(np.uint8)))
    layer.save(path)


MODES = {
    "L": lambda p: picture(0).convert("L").save(p),
    "P": lambda p: picture(0).quantize(16).save(p),
    "1": lambda p: picture(0).convert("1").save(p),
    "CMYK": lambda p: picture(0).convert("CMYK").save(p.with_suffix(".jpg")),
    "I;16": lambda p: Image.fromarray(np.full(SIZE, 0x8000, np.uint16)).save(p),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_rgb(raw, mode):
    path = raw.folder / "odd.png"
    MODES[mode](path)
    name = "odd.jpg" if mode == "CMYK" else "odd.png"
    raw.add("odd", source=name)
    assert raw.take().accepted == 1
    found = pixels(ingest.read_triplets(raw.out)[0].read_source())
    assert found.shape == (*SIZE, 3) and found.dtype == np.uint8
    assert mode != "I;16" or (found == 0x80).all()


def test_orientation_and_transparency(raw):
    exif_turned(raw.folder / "turned.webp")
    transparent(raw.folder / "clear.png")
    raw.add("x", source="turned.webp", edited="clear.png")
    raw.take()
    (x,) = ingest.read_triplets(raw.out)
    assert np.array_equal(pixels(x.read_source()), np.asarray(picture(0)))
    edited = pixels(x.read_target())
    assert (edited[:, :24] == 255).all() and np.array_equal(edited[:, 24:], np.asarray(picture(0))[:, 24:])


def test_sizes_are_scaled_to_cover_and_cropped(raw):
    picture(1, (64, 128)).save(raw.folder / "wide.png")
    picture(2, (128, 256)).save(raw.folder / "wider.png")  # of the same shape: it aligns
    raw.add("x", source="wide.png", edited="wider.png")
    assert raw.take().accepted == 1
    (x,) = ingest.read_triplets(raw.out)
    assert x.read_source().size == x.read_target().size == x.size == SIZE


def test_exact_fit_takes_no_other_size(raw):
    picture(1, (64, 96)).save(raw.folder / "double.png")
    raw.add("x", source="double.png", edited="double.png")
    raw.add("y")
    assert raw.take(fit="exact").rejected == {"wrong size": 1}


def test_the_journal_and_the_curves_tell_speed_and_rejects(raw):
    for key, edited in (("x", "b"), ("x", "c"), ("y", "torn"), ("z", "d")):
        raw.add(key, edited=f"{edited}.png")
    raw.take(wandb=Wandb("offline"))
    *_, last = journal.read(raw.out / "journal")
    wanted = {"step": 4, "taken": 2, "taken_before": 0, "rejects": 2}
    assert {k: last[k] for k in wanted} == wanted and last["rows_per_second"] > 0
    assert (last["rejects/duplicate id"], last["rejects/missing file"]) == (1, 1)
    assert list((raw.out / "journal/wandb").glob("offline-run-*/*.wandb"))


def test_too_many_rejects_are_an_error_after_everything_is_written(raw):
    for key, edited in (("x", "b"), ("x", "b"), ("y", "c")):
        raw.add(key, edited=f"{edited}.png")
    with pytest.raises(DataError, match=r"rejects.jsonl: 2 taken, 0 taken before, 1 rejected: 1 duplicate id.*mend"):
        raw.take(max_reject_fraction=0.3)
    assert len(ingest.read_triplets(raw.out)) == 2
    assert raw.take(max_reject_fraction=0.34).reused == 2


def test_again_reads_only_what_is_new_or_mended(raw, monkeypatch):
    raw.add("x")
    raw.add("y", edited="later.png")
    raw.add("z", edited="c.png")
    assert (raw.take().accepted, raw.take().reused) == (2, 2)
    ingest.write_triplets(raw.out, (replace(t, evolution="it reddens") for t in ingest.iterate(raw.out)))
    before = {t.id: t for t in ingest.read_triplets(raw.out)}
    picture(5).save(raw.folder / "later.png")
    picture(6).save(raw.folder / "c.png")
    os.utime(raw.folder / "c.png", ns=(1, 1))
    opened: list[str] = []
    read = sources.File.read
    monkeypatch.setattr(sources.File, "read", lambda file: opened.append(Path(file.path).name) or read(file))
    report = raw.take()
    assert (report.accepted, report.reused, report.rejected) == (2, 1, {})
    assert sorted(opened) == ["a.png", "a.png", "c.png", "later.png"]
    x, y, z = ingest.read_triplets(raw.out)
    assert x == before["x"] and x.evolution and not y.evolution and not z.evolution


def test_an_interrupted_run_is_gone_on_with(raw):
    for n, edited in enumerate("bcdefgh"):
        raw.add(f"k{n}", edited=f"{edited}.png")

    def stopped(rows) -> Iterator:
        for n, row in enumerate(rows):
            if n == 6:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        raw.take(watch=stopped, workers=1)
    assert not (raw.out / "triplets.jsonl").exists()
    report = raw.take()
    assert report.reused == 2 and report.accepted == 5  # the other four had not been decided on
    assert [t.id for t in ingest.read_triplets(raw.out)] == [f"k{n}" for n in range(7)]
    assert not (raw.out / ".ingest.sqlite").exists()


def test_a_run_killed_anywhere_ends_with_the_same_bytes(raw, monkeypatch):
    many(raw)
    raw.take()
    whole = tree(raw.out)
    for moment in (1, 7, 12, 19, "lists"):
        raw.out = raw.folder.parent / f"killed-{moment}"
        killed(raw, moment)
        assert not (raw.out / "triplets.jsonl").exists()
        (raw.out / "images" / "28").mkdir(parents=True, exist_ok=True)
        (raw.out / "images" / "28" / ".tmp-k18.edited.png-1").touch()  # a worker's, caught in its write
        report = raw.take()
        assert moment in (1,) or report.reused > 0
        assert tree(raw.out) == whole


def many(raw: Raw) -> None:
    """Twenty lines with a reject of each kind of decision among them."""
    for n in range(20):
        picture(100 + n).save(raw.folder / f"{n}.png")
        raw.add(f"k{n}", edited=f"{n}.png")
    raw.lines[5] = b"{"
    raw.lines[8] = raw.lines[2]
    raw.lines[11] = raw.lines[2].replace(b"k2", b"again")
    (raw.folder / "14.png").write_bytes(b"")


def killed(raw: Raw, moment: int | str) -> None:
    """A run in a process of its own that dies by SIGKILL at a row, or when the lists are to be written."""

    def watch(rows) -> Iterator:
        for n, row in enumerate(rows):
            if n == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    child = os.fork()
    if not child:
        work.SAVE_EVERY = -1.0
        if moment == "lists":
            work.replacing = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        raw.take(watch=watch, workers=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_ingest_and_evolve_do_not_undo_each_others_work(raw):
    raw.add("x")
    raw.take()
    raw.add("y", edited="c.png")

    def evolving(rows) -> Iterator:
        with pytest.raises(DataError, match="another writer is at work"):
            evolve.add_evolutions(raw.out)
        yield from rows

    class Ingesting:
        signature = "test 1"

        def drafts(self, triplets) -> Iterator:
            with pytest.raises(DataError, match="another writer is at work"):
                raw.take()
            yield [writers.Draft(t, "it reddens") for t in triplets]

    assert raw.take(watch=evolving).reused == 1
    evolve.add_evolutions(raw.out, Ingesting())
    assert [(t.id, t.evolution) for t in ingest.read_triplets(raw.out)] == [("x", "it reddens"), ("y", "it reddens")]


def test_what_the_source_holds_no_more_goes_only_when_told(raw, capsys):
    for key, edited in (("x", "b"), ("y", "c"), ("z", "d")):
        raw.add(key, edited=f"{edited}.png")
    raw.take()
    evolve.add_evolutions(raw.out)
    before, lines = (raw.out / "triplets.jsonl").read_bytes(), raw.lines
    raw.lines = [lines[0], lines[1][:9]]
    told = (
        r"triplets\.jsonl: 2 triplets taken before are not in the source now, such as y; the first reject: .*not json"
    )
    with pytest.raises(DataError, match=told):
        raw.take()
    assert (raw.out / "triplets.jsonl").read_bytes() == before
    raw.lines = [lines[0], lines[1].replace(b"c.png", b"none.png"), lines[2]]
    assert raw.take().rejected == {"missing file": 1}  # a row that is there, and says why it goes
    raw.lines = lines[:1]
    words = ["ingest", str(raw.jsonl), str(raw.out), "--height", "32", "--width", "48"]
    assert cli.main(words) == DataError.exit_code
    assert cli.main([*words, "--forget"]) == 0
    assert "0 taken, 1 taken before, 0 rejected, 1 forgotten" in capsys.readouterr().out
    assert [(t.id, bool(t.evolution)) for t in ingest.read_triplets(raw.out)] == [("x", True)]


def test_a_list_that_was_taken_for_another_leaves_the_folder_as_it_was(raw):
    """What it replaced among the pictures is copied again."""
    raw.add("x")
    raw.add("y", edited="c.png")
    raw.take()
    right, raw.lines = raw.lines, []
    raw.add("x", edited="d.png")
    with pytest.raises(DataError, match="1 triplets taken before are not in the source now, such as y"):
        raw.take()
    raw.lines = right
    assert raw.take().reused == 1
    assert [*ingest.verify_triplets(raw.out)] == []
    x, _ = ingest.read_triplets(raw.out)
    assert np.array_equal(pixels(x.read_target()), picture(ord("b")))


def test_a_killed_run_has_promised_nothing(raw):
    """Of another list, begun by mistake: its triplets were in no list yet."""
    many(raw)
    killed(raw, 19)
    raw.lines = []
    raw.add("x")
    report = raw.take()
    assert (report.accepted, report.forgotten) == (1, 0) and [t.id for t in ingest.read_triplets(raw.out)] == ["x"]


def test_a_full_disk_is_told_as_one_by_the_ledger_too(raw, monkeypatch):
    for n, edited in enumerate("bcdefgh"):
        raw.add(f"k{n}", "paint it " + "very " * 1000 + "red", edited=f"{edited}.png")
    monkeypatch.setattr(ledger, "SCHEMA", f"{ledger.SCHEMA}PRAGMA max_page_count = 16;")
    with pytest.raises(DataError, match="out: the disk is full.*make room and run the same command again"):
        raw.take()
    monkeypatch.undo()
    report = raw.take()
    assert report.accepted + report.reused == 7


def test_signatures_of_urls_are_written_nowhere(raw):
    signed = "https://127.0.0.1:1/a.png?X-Amz-Signature=hush"
    raw.lines.append(
        json.dumps({"id": "x", "instruction": signed, "source": signed, "edited": ["no picture"]}).encode()
    )
    raw.add("y", source="::" + signed)
    raw.take()
    with pytest.raises(DataError) as why:
        ingest.ingest(signed, raw.out, SIZE, wandb=Wandb("offline"))
    assert "hush" not in str(why.value)
    assert [r["reason"] for r in raw.rejects()] == ["wrong type", "refused URL"]
    assert not [p for p in raw.out.rglob("*") if p.is_file() and b"hush" in p.read_bytes()]


def test_workers_change_nothing(raw):
    many(raw)
    trees = []
    for workers in (1, 2, 5):
        raw.out = raw.folder.parent / f"out-{workers}"
        raw.take(workers=workers)
        trees.append(tree(raw.out))
    assert trees[0] == trees[1] == trees[2]
    assert [r["reason"] for r in raw.rejects()] == ["not json", "duplicate id", "duplicate", "undecodable"]


def test_arguments_are_checked(raw):
    raw.add("x")
    raw.take()
    with pytest.raises(DataError, match=r"sizes was \[\[32, 48\]\] and is now \[\[64, 48\]\]"):
        ingest.ingest(raw.jsonl, raw.out, (64, 48))
    with pytest.raises(ShapeError, match="H = 33"):
        ingest.ingest(raw.jsonl, raw.out, (33, 48))
    with pytest.raises(DataError, match="no such file"):
        ingest.ingest(raw.folder / "none.jsonl", raw.out, SIZE)
    with pytest.raises(ConfigError, match="neither crop nor exact"):
        ingest.ingest(raw.jsonl, raw.out, SIZE, fit="stretch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="write to another folder"):
        ingest.ingest(raw.out / "triplets.jsonl", raw.out, SIZE)
    with pytest.raises(DataError, match="no triplets.jsonl.*ingest"):
        ingest.read_triplets(raw.folder)


def test_a_damaged_list_names_its_line(raw):
    raw.add("x")
    raw.take()
    path = raw.out / "triplets.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "y"}\n')
    with pytest.raises(DataError, match="triplets.jsonl, line 2"):
        ingest.read_triplets(raw.out)


def test_a_picture_lost_after_ingesting_names_file_and_key(raw):
    raw.add("x")
    raw.take()
    (x,) = ingest.read_triplets(raw.out)
    x.edited.unlink()
    with pytest.raises(DataError, match=r"x.edited.png, key x"):
        x.read_target()
    assert [*ingest.verify_triplets(raw.out)] == [f"{x.edited}, key x: cannot be read: No such file or directory"]


@pytest.mark.parametrize("at", [0, 30, -20, -1])
def test_a_picture_changed_after_ingesting_is_refused(raw, at):
    raw.add("x")
    raw.take()
    (x,) = ingest.read_triplets(raw.out)
    assert [*ingest.verify_triplets(raw.out)] == []
    content = bytearray(x.source.read_bytes())
    content[at] ^= 1
    x.source.write_bytes(content)
    with pytest.raises(DataError, match=r"x.source.png, key x: .*changed since"):
        x.read_source()
    assert [*ingest.verify_triplets(raw.out)] == [f"{x.source}, key x: changed since it was taken"]


def test_the_verb_names_every_fault_of_an_ingested_folder(raw, capsys):
    for key in "xyz":
        raw.add(key, f"edit {key}")
    raw.take()
    x, y, _ = ingest.read_triplets(raw.out)
    path = raw.out / "triplets.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second.replace(b"edit y", b"edit Y") + third + first)
    x.source.write_bytes(b"another")
    y.source.unlink()  # of a line that cannot be read itself
    assert cli.main(["verify", str(raw.out)]) == DataError.exit_code
    changed = f"{x.source}, key x: changed since it was taken"
    assert capsys.readouterr().out.splitlines() == [
        changed,
        f"{path}, line 2: key y: not the line that was written (take the line out and run ingest again, or take the "
        "check out to keep what was changed)",
        f"{path}, key x: an earlier line has this id",
        changed,
        f"4 faults in {path} and its pictures",
    ]
    x.source.unlink()  # what the page says mends them
    path.write_bytes(first + third)
    raw.take()
    assert cli.main(["verify", str(raw.out)]) == 0
    with pytest.raises(SystemExit):
        cli.main(["verify"])
    assert cli.main(["verify", str(raw.out), "--repair"]) == ConfigError.exit_code


def test_commands_of_the_docs_parse():
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "shards.md").read_text() + (docs / "ingest.md").read_text()
    found = [shlex.split(line)[1:] for line in re.findall(r"^v4e-shards .*", text, re.MULTILINE)]
    assert [words[0] for words in found][:5] == ["ingest", "evolve", "rollout", "verify", "look"]
    for words in found:
        assert callable(cli.parse(words).run)


def test_the_door(raw, capsys):
    raw.add("x")
    raw.add("y", edited="torn.png")
    words = [str(raw.jsonl), str(raw.out), "--height", "32", "--width", "48"]
    assert cli.main(["ingest", *words]) == DataError.exit_code
    told = capsys.readouterr().err.splitlines()[-1]
    assert "1 rejected: 1 missing file; the first: " in told
    assert f"{raw.jsonl}, line 2, id y, file {raw.jsonl.parent / 'torn.png'}: missing file: " in told
    assert cli.main(["ingest", *words, "--max-reject-fraction", "0.5"]) == 0
    assert cli.main(["evolve", str(raw.out)]) == 0
    assert cli.main(["verify", str(raw.out)]) == 0
    assert "0 faults" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0 and "rollout" in capsys.readouterr().out
