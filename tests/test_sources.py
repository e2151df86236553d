"""Edits of every layout come in as the same triplets, and whatever is wrong with one is named by file and key."""

import http.server
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data_tools import cli, evolve, ingest
from data_tools.ingest import layouts, ledger, pictures, sources
from data_tools.ingest.ledger import NEAR, Ledger
from data_tools.ingest.sources import Part
from v4e.data.places import PassingError, patiently, place, put
from v4e.errors import ConfigError, DataError

SIZE = (32, 48)


def pixels(seed: int, size=SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def png(seed: int, size=SIZE, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, size)).save(buffer, kind, **options)
    return buffer.getvalue()


def take(source, out: Path, layout: str = "v4e", **options) -> ingest.Report:
    options = {"max_reject_fraction": 1.0, "layout": layouts.layout_of(layout), **options}
    return ingest.ingest(str(source), out, options.pop("size", SIZE), **options)


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_bytes().splitlines()]


def shown(clip) -> np.ndarray:
    return clip.frames_T3HW[0].permute(1, 2, 0).numpy()


def check_two(out: Path) -> list[ingest.Triplet]:
    """The two edits that every layout below holds."""
    one, two = ingest.read_triplets(out)
    assert [one.instruction, two.instruction] == ["make it red", "把它变蓝"]
    for seed, clip in ((1, one.read_source()), (2, one.read_target()), (3, two.read_source()), (4, two.read_target())):
        assert np.array_equal(shown(clip), pixels(seed))
    return [one, two]


# -------------------------------------------------------------------------------------------------- csv, folders


def test_csv(tmp_path):
    for n in range(1, 5):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    text = 'id,instruction,source,edited,note\na,make it red,1.png,2.png,"x, y"\nb,把它变蓝,3.png,4.png,\n'
    (tmp_path / "edits.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"c,\xff,1.png,2.png,\nd,too few\n")
    report = take(tmp_path / "edits.csv", tmp_path / "out")
    assert report.rejected == {"not UTF-8": 1, "not csv": 1}
    one, two = check_two(tmp_path / "out")
    assert (one.id, one.extra, two.extra) == ("a", {"note": "x, y"}, {})
    assert [r["line"] for r in rejects(tmp_path / "out")] == [3, 4]


def test_csv_as_pandas_writes_it_with_its_index(tmp_path):
    for n in range(1, 5):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    text = ",id,instruction,source,edited\n0,a,make it red,1.png,2.png\n1,b,把它变蓝,3.png,4.png\n2,c,x,1.png,2.png,y\n"
    (tmp_path / "edits.csv").write_text(text)
    assert take(tmp_path / "edits.csv", tmp_path / "out").rejected == {"not csv": 1}
    assert [(t.id, t.extra) for t in check_two(tmp_path / "out")] == [("a", {}), ("b", {})]


def unlistable(monkeypatch, name: str, error: OSError) -> None:
    """A folder of this name cannot be listed; root would not be stopped by its mode."""
    scan = os.scandir

    def failing(path):
        if str(path).endswith(name):
            raise error
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)


def test_folders_that_cannot_be_looked_into_are_named(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    for folder in ("bad", "good", "elsewhere"):
        (raw / folder).mkdir(parents=True)
        for column, seed in (("source", 1), ("edited", 2)):
            (raw / folder / f"{folder}.{column}.png").write_bytes(png(seed))
        (raw / folder / f"{folder}.txt").write_text("make it red")
    (raw / "elsewhere").rename(tmp_path / "elsewhere")
    (raw / "link").symlink_to(tmp_path / "elsewhere")
    unlistable(monkeypatch, "bad", OSError(5, "Input/output error"))
    assert take(raw, tmp_path / "out").rejected == {"unreadable folder": 1, "linked folder": 1}
    assert [t.id for t in ingest.read_triplets(tmp_path / "out")] == ["good"]
    told = {r["file"]: r["detail"] for r in rejects(tmp_path / "out")}
    assert told == {
        str(raw / "link"): "a link to a folder is not followed",
        str(raw / "bad"): "OSError: [Errno 5] Input/output error",
    }


def test_sets_in_folders_that_cannot_be_looked_into_are_named(tmp_path, monkeypatch):
    rows = [{"instruction": "make it red", "input": embedded(1), "output": embedded(2)}]
    for folder in ("train", "validation"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        parquet(tmp_path / "in" / folder / "0000.parquet", rows)
    unlistable(monkeypatch, "validation", PermissionError(13, "Permission denied"))
    assert take(tmp_path / "in", tmp_path / "out", "gpt-image-edit").accepted == 1
    (row,) = rejects(tmp_path / "out")
    assert (row["reason"], row["file"]) == ("unreadable folder", str(tmp_path / "in/validation"))


def test_a_folder_of_pictures(tmp_path):
    raw = tmp_path / "raw"
    (raw / "more").mkdir(parents=True)
    for name, seed in (("a_source.png", 1), ("a_edited.png", 2), ("more/b.source.png", 3), ("more/b.edited.png", 4)):
        (raw / name).write_bytes(png(seed))
    (raw / "a.txt").write_text(" make it red\n")
    (raw / "more/b.json").write_text(json.dumps({"instruction": "把它变蓝", "task": "colour"}))
    (raw / "lonely_source.jpg").write_bytes(png(5))
    (raw / "a.cls").write_text("7")
    assert take(raw, tmp_path / "out").rejected == {"missing field": 1}
    one, two = check_two(tmp_path / "out")
    assert (one.id, two.id, two.task) == ("a", "b", "colour")
    assert rejects(tmp_path / "out")[0]["id"] == "lonely"


@pytest.mark.parametrize(
    ("name", "key", "column"),
    [
        ("d/x_source.PNG", "d/x", "source"),
        ("x.edited.jpg", "x", "edited"),
        ("my_edited_cat_mask.png", "my_edited_cat", "mask"),
        ("x.txt", "x", "instruction"),
        ("x.prompt.txt", "x", "prompt"),
        ("x.jpg", "x", "jpg"),
        ("x.json", "x", "json"),
        ("x_source.json", "x_source", "json"),
    ],
)
def test_what_a_name_says(name, key, column):
    assert (Part.of(name).key, Part.of(name).column) == (key, column)


# ------------------------------------------------------------------------------------------------------ parquet


def parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True, compression="none")
    return path


def embedded(seed: int) -> dict:
    """An image as the `datasets` library stores it."""
    return {"bytes": png(seed), "path": f"{seed}.png"}


LAYOUTS = {
    "instructpix2pix": ("original_image", "edited_image", "edit_prompt", {"original_prompt": "a car"}),
    "instructpix2pix-samples": ("input_image", "edited_image", "edit_prompt", {}),
    "magicbrush": ("source_img", "target_img", "instruction", {}),
    "ultraedit": ("source_image", "edited_image", "edit_prompt", {"ssim": float("nan"), "clip_sim_dir": 0.5}),
    "omniedit": ("src_img", "edited_img", "edited_prompt_list", {"o_score": 8.5, "task": "removal"}),
    "gpt-image-edit": ("input", "output", "instruction", {"task": "add", "instruction_type": "rewrite"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_known_sets(tmp_path, name):
    source, edited, words, more = LAYOUTS[name]
    rows = [{source: embedded(2 * n + 1), edited: embedded(2 * n + 2), **more} for n in range(2)]
    for n, (row, text) in enumerate(zip(rows, ("make it red", "把它变蓝"), strict=True)):
        row[words] = ["a short one", text] if name == "omniedit" else text
        row |= {"img_id": "27", "turn_index": n + 1} if name == "magicbrush" else {}
        row |= {"omni_edit_id": f"task_{n}"} if name == "omniedit" else {}
    path = parquet(tmp_path / "data" / "train-00000-of-00262.parquet", rows)
    assert take(path.parent, tmp_path / "out", name).accepted == 2
    one, _ = check_two(tmp_path / "out")
    ids = {"magicbrush": "27-1", "omniedit": "task_0"}
    assert one.id == ids.get(name, "train-00000-of-00262-000001")
    told = {k: v for k, v in more.items() if k != "task" and v == v}
    assert one.task == more.get("task", "") and {k: v for k, v in one.extra.items() if v is not None} == told


def test_made_ids_of_files_with_one_name_differ(tmp_path):
    long = "a-name-with-more-than-sixty-letters-before-its-number-comes-to-an-end"
    names = ["train/0000", "validation/0000", f"train/{long}-0", f"train/{long}-1", "train/short"]
    for n, name in enumerate(names):
        row = {"instruction": f"edit {n}", "input": embedded(2 * n), "output": embedded(2 * n + 1)}
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        parquet(tmp_path / "in" / f"{name}.parquet", [row])
    assert str(take(tmp_path / "in", tmp_path / "out", "gpt-image-edit")) == "5 taken, 0 taken before, 0 rejected"
    ids = {t.instruction: t.id for t in ingest.read_triplets(tmp_path / "out")}
    assert ids["edit 4"] == "short-000001" and len(set(ids.values())) == 5
    assert all(ids[f"edit {n}"].startswith("0000-") and len(ids[f"edit {n}"]) == 20 for n in (0, 1))
    take(tmp_path / "in" / "train", tmp_path / "one", "gpt-image-edit")
    assert {t.id for t in ingest.read_triplets(tmp_path / "one")} >= {"0000-000001", "short-000001"}


def test_turns_become_pairs(tmp_path):
    rows = [
        {"key": "s", "frames": [embedded(1), embedded(2), embedded(4)], "asks": ["make it red", "turn it"]},
        {"key": "t", "frames": [embedded(3), embedded(4)], "asks": ["把它变蓝"]},
        {"key": "u", "frames": [embedded(3)], "asks": ["nothing"]},
    ]
    (tmp_path / "turns.yaml").write_text("id: [key]\nimages: frames\ninstruction: asks\n")
    report = take(parquet(tmp_path / "in" / "x.parquet", rows), tmp_path / "out", str(tmp_path / "turns.yaml"))
    assert report.rejected == {"missing field": 1} and report.accepted == 3
    first, second, third = ingest.read_triplets(tmp_path / "out")
    assert [first.id, second.id, third.id] == ["s-1", "s-2", "t-1"]
    assert np.array_equal(shown(first.read_target()), shown(second.read_source()))
    assert second.instruction == "turn it"


def test_a_torn_parquet_is_one_fault_and_the_next_file_is_read(tmp_path):
    rows = [{"instruction": "make it red", "input": embedded(1), "output": embedded(2)}]
    torn = parquet(tmp_path / "in" / "a.parquet", rows)
    parquet(tmp_path / "in" / "b.parquet", [{**rows[0], "input": embedded(3)}])
    content = torn.read_bytes()
    for n, damaged in enumerate((content[:-9], content[:200] + b"\0" * 64 + content[264:], b"", b"PAR1")):
        torn.write_bytes(damaged)
        assert take(tmp_path / "in", tmp_path / f"{n}", "gpt-image-edit").accepted == 1
        (row,) = rejects(tmp_path / f"{n}")
        assert row["reason"] in ("torn file", "undecodable") and row["list"].endswith("a.parquet")


def test_text_that_is_not_utf8_inside_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = pa.array([b"\xff", b"make it red"]).view(pa.string())
    images = pa.array([embedded(1), embedded(1)]), pa.array([embedded(2), embedded(2)])
    pq.write_table(pa.table({"instruction": words, "input": images[0], "output": images[1]}), tmp_path / "x.parquet")
    report = take(tmp_path / "x.parquet", tmp_path / "out", "gpt-image-edit")
    assert report.rejected == {"not UTF-8": 1} and report.accepted == 1


# --------------------------------------------------------------------------------------------------------- tars


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


GOOD = [
    *(("a.source.png", png(1)), ("a.edited.png", png(2)), ("a.txt", b"make it red")),
    *(("b.source.png", png(3)), ("b.edited.png", png(4)), ("b.json", '{"instruction": "把它变蓝"}'.encode())),
]


def test_webdataset_tars(tmp_path):
    tar(tmp_path / "x-000.tar", GOOD[:3])
    tar(tmp_path / "x-001.tar", GOOD[3:])
    assert take(f"{tmp_path}/x-*.tar", tmp_path / "out").accepted == 2
    assert [t.id for t in check_two(tmp_path / "out")] == ["a", "b"]


TWO = [("a", "make it red", 1), ("b", "把它变蓝", 3)]
FAULTS = {
    "outside the root": [("../c.source.png", png(5)), ("../c.edited.png", png(6)), ("../c.txt", b"x")],
    "pickle": [("c.source.png", png(5)), ("c.edited.png", png(6)), ("c.txt", b"x"), ("c.pkl", b"cos\nsystem\n")],
    "doubled member": [("c.source.png", png(5)), ("c.source.png", png(7)), ("c.edited.png", png(6)), ("c.txt", b"x")],
    "missing field": [("c.source.png", png(5)), ("c.txt", b"x")],
    "not UTF-8": [("c.source.png", png(5)), ("c.edited.png", png(6)), ("c.txt", b"\xff")],
    "not json": [("c.source.png", png(5)), ("c.edited.png", png(6)), ("c.json", b"[" * 100_000)],
    "duplicate id": [("d/a.source.png", png(5)), ("d/a.edited.png", png(6)), ("d/a.txt", b"x")],
    "undecodable": [("c.source.png", b""), ("c.edited.png", png(6)), ("c.txt", b"x")],
}


@pytest.mark.parametrize("reason", FAULTS)
def test_faulty_groups(tmp_path, reason):
    path = tar(tmp_path / "x.tar", [*GOOD[:3], *FAULTS[reason], *GOOD[3:]])
    assert take(path, tmp_path / "out").rejected == {reason: 1}
    check_two(tmp_path / "out")
    (row,) = rejects(tmp_path / "out")
    assert row["line"] == 2 and row["id"] in ("c", "a") and row["list"] == str(path)


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name in ("c.source.png", "c.edited.png"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
    assert take(tmp_path / "x.tar", tmp_path / "out").rejected == {"not a file": 1}


def read(path: Path) -> tuple[dict, int]:
    """What a tar's rows hold, by id, and how many of them are faults."""
    found = [*sources.rows(str(path), layouts.Layout().columns)]
    plain = [{k: v.content if isinstance(v, sources.Inside) else v for k, v in r.values.items()} for r in found]
    return {p["id"]: p for p, row in zip(plain, found, strict=True) if not row.fault}, sum(bool(r.fault) for r in found)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_a_damaged_tar_never_passes_in_silence(tmp_path_factory, data):
    """A header's byte flipped, or the end cut off: fewer rows always come with a fault, and no row loses a part.

    A byte flipped inside a picture is the picture's own to tell.
    """
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    whole = tar(path, GOOD).read_bytes()
    good, _ = read(path)
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole.rstrip(b"\0"))))]
    else:
        headers = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
        at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path.write_bytes(damaged)
    found, faults = read(path)
    assert faults or found == good


# ------------------------------------------------------------------------------------------- what may be opened


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "outside the root"),
        ("a/../../secret.png", "outside the root"),
        ("/etc/hostname", "outside the root"),
        ("pipe:cat 1.png", "refused URL"),
        ("file:///etc/hostname", "refused URL"),
        ("simplecache::http://x/1.png", "refused URL"),
        ("ftp://x/1.png", "refused URL"),
        ("1\0.png", "unreadable file"),
        ("a", "unreadable file"),
    ],
)
def test_names_that_lead_elsewhere(tmp_path, name, reason):
    raw = tmp_path / "raw"
    (raw / "a").mkdir(parents=True)
    for path, seed in ((raw / "1.png", 1), (raw / "2.png", 2), (tmp_path / "secret.png", 3)):
        path.write_bytes(png(seed))
    row = {"id": "x", "instruction": "make it red", "source": name, "edited": "2.png"}
    (raw / "x.jsonl").write_text(json.dumps(row))
    assert take(raw / "x.jsonl", tmp_path / "out").rejected == {reason: 1}


def test_a_root_may_be_said(tmp_path):
    for name, seed in (("1.png", 1), ("2.png", 2)):
        (tmp_path / name).write_bytes(png(seed))
    (tmp_path / "lists").mkdir()
    row = {"id": "x", "instruction": "make it red", "source": str(tmp_path / "1.png"), "edited": "2.png"}
    (tmp_path / "lists/x.jsonl").write_text(json.dumps(row))
    assert take(tmp_path / "lists/x.jsonl", tmp_path / "a").accepted == 0
    assert take(tmp_path / "lists/x.jsonl", tmp_path / "b", root=str(tmp_path)).accepted == 1


def test_a_root_may_lie_elsewhere_than_the_list(web, tmp_path):
    folder, url = web
    row = {"id": "x", "instruction": "make it red", "source": "1.png", "edited": "2.png"}
    for there, listed_at, root in ((folder, tmp_path, url), (tmp_path, folder, str(tmp_path))):
        for name, seed in (("1.png", 1), ("2.png", 2)):
            (there / name).write_bytes(png(seed))
        (listed_at / "x.jsonl").write_text(json.dumps(row))
        source = f"{url}/x.jsonl" if listed_at == folder else tmp_path / "x.jsonl"
        out = tmp_path / f"out-{listed_at.name}"
        assert str(take(source, out, root=root)) == "1 taken, 0 taken before, 0 rejected"
        (x,) = ingest.read_triplets(out)
        assert np.array_equal(shown(x.read_target()), pixels(2))
        for name in ("1.png", "2.png"):
            (there / name).unlink()


@pytest.mark.parametrize("source", ["pipe:cat x.tar", "zip://a::http://b/c.tar", "file:///x.jsonl", "nowhere.jsonl"])
def test_sources_that_are_not_opened(tmp_path, source):
    with pytest.raises(DataError):
        take(source, tmp_path / "out")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match="no known kind.*jq"):
        take(tmp_path / "x.json", tmp_path / "out")


BROKEN, HUNG_UP, FOREVER = 0, 1, 1000


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Answers with a file's faults while there are any: a status, BROKEN for a body that ends early, or HUNG_UP."""

    faults: ClassVar[dict[str, list[int]]] = {}

    def send_head(self):
        coming = self.faults.get(self.path.lstrip("/"))
        if not coming or (coming[0] == BROKEN and self.command == "HEAD"):
            return super().send_head()
        if (fault := coming.pop(0)) == 200:
            return super().send_head()
        if fault >= 400:
            return self.send_error(fault)
        if fault == HUNG_UP:
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        return io.BytesIO(b"half")

    def log_message(self, *words) -> None:
        """Nothing."""


@pytest.fixture
def web(tmp_path):
    """A real web server over a folder."""
    (tmp_path / "web").mkdir()
    handler = partial(Faulty, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_list_and_its_pictures_behind_http(web, tmp_path):
    folder, url = web
    for n in range(1, 5):
        (folder / f"{n}.png").write_bytes(png(n))
    rows = [
        {"id": "a", "instruction": "make it red", "source": f"{url}/1.png", "edited": f"{url}/2.png"},
        {"id": "b", "instruction": "把它变蓝", "source": "3.png", "edited": "4.png"},
        {"id": "c", "instruction": "lost", "source": "3.png", "edited": "5.png"},
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert take(f"{url}/x.jsonl", tmp_path / "out").rejected == {"missing file": 1}
    check_two(tmp_path / "out")


def test_a_tar_behind_http(web, tmp_path):
    folder, url = web
    tar(folder / "x.tar", GOOD)
    assert take(f"{url}/x.tar", tmp_path / "out").accepted == 2
    check_two(tmp_path / "out")


QUICKLY = partial(patiently, pauses=(0.01, 0.01, 0.01))


@pytest.fixture
def faults(monkeypatch):
    """Faults of the web server to come, by file; nobody waits long for them to pass."""
    monkeypatch.setattr(Faulty, "faults", {})
    monkeypatch.setattr(sources, "patiently", QUICKLY)
    return Faulty.faults


def two_edits(folder: Path) -> None:
    for n in range(1, 5):
        (folder / f"{n}.png").write_bytes(png(n))
    listed(folder, [("a", "make it red", "1.png", "2.png"), ("b", "把它变蓝", "3.png", "4.png")])


@pytest.mark.parametrize("name", ["x.jsonl", "3.png"])
@pytest.mark.parametrize("fault", [500, 503, 429, BROKEN, HUNG_UP])
def test_a_network_that_fails_for_a_moment_costs_nothing(web, faults, tmp_path, name, fault):
    folder, url = web
    two_edits(folder)
    faults[name] = [fault] * (6 if name == "3.png" and fault != BROKEN else 3)  # a look is a HEAD and then a GET
    assert take(f"{url}/x.jsonl", tmp_path / "out").rejected == {}
    check_two(tmp_path / "out")
    assert faults[name] == []


@pytest.mark.parametrize(("name", "fault"), [("x.jsonl", 500), ("x.jsonl", BROKEN), ("3.png", 500), ("3.png", HUNG_UP)])
def test_a_network_that_stays_away_stops_the_run_and_nothing_is_forgotten(web, faults, tmp_path, name, fault):
    folder, url = web
    two_edits(folder)
    take(f"{url}/x.jsonl", tmp_path / "out")
    evolve.add_evolutions(tmp_path / "out")
    before = (tmp_path / "out/triplets.jsonl").read_bytes()
    faults[name] = [fault] * FOREVER
    with pytest.raises(PassingError, match=rf"{url}/{name}: cannot be .*run the same command again"):
        take(f"{url}/x.jsonl", tmp_path / "out")
    assert (tmp_path / "out/triplets.jsonl").read_bytes() == before
    faults.clear()
    assert take(f"{url}/x.jsonl", tmp_path / "out").rejected == {}
    assert all(t.evolution for t in check_two(tmp_path / "out"))


@pytest.mark.parametrize(
    ("fault", "reason"), [(403, "unreadable file"), (404, "missing file"), (410, "unreadable file")]
)
def test_what_a_server_refuses_is_a_reject_at_once(web, faults, tmp_path, fault, reason):
    folder, url = web
    two_edits(folder)
    faults["4.png"] = [fault] * FOREVER
    assert take(f"{url}/x.jsonl", tmp_path / "out").rejected == {reason: 1}
    assert len(faults["4.png"]) >= FOREVER - 8  # HEAD and GET, for its state and for its bytes
    assert rejects(tmp_path / "out")[0]["file"] == f"{url}/4.png"
    faults["x.jsonl"] = [fault] * FOREVER
    with pytest.raises(DataError, match=f"{url}/x.jsonl: no such file"):
        take(f"{url}/x.jsonl", tmp_path / "list")


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tar", "x.parquet"])
def test_a_server_that_is_not_there_is_no_missing_file(faults, tmp_path, name):
    with pytest.raises(PassingError, match=rf"http://127.0.0.1:1/{name}: cannot be read.*run the same command again"):
        take(f"http://127.0.0.1:1/{name}", tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_line_that_breaks_inside_a_set_is_no_torn_file(web, faults, tmp_path, kind):
    folder, url = web
    rows = [{"id": k, "instruction": w, "source": embedded(s), "edited": embedded(s + 1)} for k, w, s in TWO]
    tar(folder / "x.tar", GOOD) if kind == "tar" else parquet(folder / "x.parquet", rows)
    faults[f"x.{kind}"] = [200] * 4 + [BROKEN] * 3
    assert take(f"{url}/x.{kind}", tmp_path / "out").rejected == {}
    check_two(tmp_path / "out")
    assert faults[f"x.{kind}"] == []
    faults[f"x.{kind}"] = [200] * 4 + [BROKEN] * FOREVER
    with pytest.raises(PassingError, match=rf"x\.{kind}: cannot be reached: ClientPayloadError"):
        take(f"{url}/x.{kind}", tmp_path / "out")


@pytest.fixture
def store(monkeypatch):
    """An S3 of this process, and who makes it fail at objects of a name, or at listings, which are the bucket's."""
    monkeypatch.setattr(sources, "patiently", QUICKLY)
    serving, cache = pytest.importorskip("werkzeug.serving"), pytest.importorskip("test_cache")
    app = cache.Faulty()
    server = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=cache.moto.MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with cache.bucket(server.server_port, AWS_MAX_ATTEMPTS="1") as url:
        yield url, lambda name, times: app.faults.update({name: [cache.broken] * times})
    server.shutdown()


def test_a_folder_on_a_store_that_fails_is_not_an_empty_one(store, tmp_path):
    url, fail = store
    for folder, seed in (("a", 1), ("b", 3)):
        for column, n in (("source", seed), ("edited", seed + 1)):
            put(place(url) / "raw" / folder / f"{folder}.{column}.png", png(n))
        put(place(url) / "raw" / folder / f"{folder}.txt", ["make it red", "把它变蓝"][seed // 2].encode())
    for part in ("bucket", "b.txt", "b.edited.png"):
        fail(part, 3)
        assert take(f"{url}/raw", tmp_path / part).rejected == {}
        check_two(tmp_path / part)
        before = (tmp_path / part / "triplets.jsonl").read_bytes()
        fail(part, FOREVER)
        with pytest.raises(PassingError, match="run the same command again"):
            take(f"{url}/raw", tmp_path / part if part != "b.edited.png" else tmp_path / "anew")
        fail(part, 0)
        assert take(f"{url}/raw", tmp_path / part).rejected == {}
        assert (tmp_path / part / "triplets.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------------------------- layouts


def test_a_layout_of_ones_own_is_strict(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("id: []\nsource: before\nedited: after\ninstruction: prompt\n")
    found = layouts.layout_of(str(path))
    assert found == layouts.Layout(id=(), source="before", edited="after", instruction="prompt")
    path.write_text("sourse: before\n")
    with pytest.raises(ConfigError, match="unknown key sourse.*did you mean source"):
        layouts.layout_of(str(path))
    with pytest.raises(ConfigError, match="no layout 'magicbrash'.*did you mean magicbrush"):
        layouts.layout_of("magicbrash")
    with pytest.raises(ConfigError, match="no such config file"):
        layouts.layout_of(str(tmp_path / "none.yaml"))


# ------------------------------------------------------------------------------------------------------ pictures


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_every_flipped_byte_and_every_cut_of_a_png_is_seen(data):
    whole = png(1, (16, 16))
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    for damaged in (flipped, whole[:at]):
        with pytest.raises(pictures.Rejected) as why:
            pictures.decode(damaged)
        assert why.value.reason in ("undecodable", "too many pixels")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_cut_pictures_of_other_kinds(kind):
    whole = png(1, (64, 64), kind)
    assert pictures.decode(whole)[0].size == (64, 64)
    for part in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(pictures.Rejected):
            pictures.decode(whole[: int(len(whole) * part)])


def test_bombs_are_refused_by_their_header():
    bomb = bytearray(png(1, (16, 16)))
    with pytest.raises(pictures.Rejected, match="256 pixels by its header, of at most 255"):
        pictures.decode(bytes(bomb), max_pixels=255)
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(pictures.Rejected) as why:
        pictures.decode(bytes(bomb))
    assert why.value.reason == "too many pixels"


def test_what_would_start_a_program_is_not_opened():
    with pytest.raises(pictures.Rejected, match="cannot identify"):
        pictures.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("deep", "shallow"), [(0, 0), (0x00FF, 0), (0x8000, 0x80), (0xFFFF, 0xFF)])
def test_sixteen_bits_are_scaled_and_not_clipped(deep, shallow):
    picture = Image.fromarray(np.full((16, 16), deep, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert (np.asarray(pictures.decode(saved(picture, kind))[0]) == shallow).all()


def test_cmyk_by_pillows_formula_and_by_its_own_profile():
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    plain = np.asarray(pictures.decode(saved(inks, "TIFF"))[0])
    assert (plain == (0, 255, 255)).all()
    broken = np.asarray(pictures.decode(saved(inks, "TIFF", icc_profile=b"no profile"))[0])
    assert (broken == plain).all()
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # a profile of another kind of ink
    assert (np.asarray(pictures.decode(saved(inks, "TIFF", icc_profile=grey))[0]) == plain).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("torn", [b"Exif\0\0II*\0\xff\xff\xff\xff garbage", b"Exif\0\0neither order of bytes"])
def test_a_torn_exif_block_costs_the_turn_alone(kind, torn):
    """As for a photograph to be edited."""
    plain, odd = (pictures.decode(saved(Image.fromarray(pixels(1)), kind, **more)) for more in ({}, {"exif": torn}))
    assert np.array_equal(np.asarray(odd[0]), np.asarray(plain[0])) and odd[0].size == SIZE[::-1]


def test_pixels_without_a_range_are_refused():
    with pytest.raises(pictures.Rejected, match="no agreed range"):
        pictures.decode(saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))


# ------------------------------------------------------------------------------------------------- sizes, buckets


@given(st.integers(64, 1280).map(lambda n: n * n), st.floats(1.0, 4.0))
@settings(max_examples=50, deadline=None)
def test_buckets(area, longest):
    found = pictures.buckets(area, longest)
    assert found
    for height, width in found:
        assert height % 16 == width % 16 == 0 and height * width <= area
        assert max(height, width) <= longest * min(height, width)
        assert (width, height) in found
        wider = max(height, width) + 16
        assert height == width or wider * min(height, width) > area


def test_the_nearest_bucket():
    sizes = pictures.buckets(480 * 832)
    assert (480, 832) in sizes and (832, 480) in sizes and (624, 624) in sizes
    ratios = {s: abs(np.log(s[1] / s[0]) - np.log(1920 / 1080)) for s in sizes}
    assert pictures.nearest((1080, 1920), sizes) == min(ratios, key=lambda s: ratios[s])
    assert pictures.nearest((500, 500), sizes) == (624, 624)
    assert pictures.nearest((9000, 100), sizes) == max(sizes, key=lambda s: s[0] / s[1])


def test_each_triplet_has_its_bucket(tmp_path):
    shapes = {"wide": (64, 128), "tall": (128, 64), "square": (90, 90)}
    lines = []
    for n, (name, size) in enumerate(shapes.items()):
        (tmp_path / f"{name}.png").write_bytes(png(n, size))
        (tmp_path / f"{name}-e.png").write_bytes(png(10 + n, size))
        lines.append({"id": name, "instruction": name, "source": f"{name}.png", "edited": f"{name}-e.png"})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["ingest", f"{tmp_path}/x.jsonl", f"{tmp_path}/out", "--area", "64x64"]
    assert cli.main(words) == 0
    triplets = ingest.read_triplets(tmp_path / "out")
    assert {t.id: t.size for t in triplets} == {"wide": (48, 80), "tall": (80, 48), "square": (64, 64)}
    assert all(t.read_source().size == t.read_target().size == t.size for t in triplets)
    assert cli.main([*words[:3], "--height", "64"]) == ConfigError.exit_code
    assert cli.main([*words, "--buckets", "32x32"]) == ConfigError.exit_code
    assert cli.main([*words[:3], "--buckets", "32*32"]) == ConfigError.exit_code


# ---------------------------------------------------------------------------------------------------- duplicates


def smooth(seed: int, size=(64, 96)) -> Image.Image:
    return Image.fromarray(pixels(seed, (6, 9))).resize(size[::-1], Image.Resampling.BICUBIC)


def listed(folder: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    keys = ("id", "instruction", "source", "edited")
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


def test_exact_and_near_duplicates(tmp_path):
    smooth(1).save(tmp_path / "a.png")
    smooth(2).save(tmp_path / "b.png")
    smooth(1, (128, 192)).save(tmp_path / "a2.jpg", quality=85)
    smooth(2, (128, 192)).save(tmp_path / "b2.jpg", quality=85)
    smooth(3).save(tmp_path / "c.png")
    path = listed(
        tmp_path,
        [
            ("first", "make it red", "a.png", "b.png"),
            ("copy", "make it red", "a.png", "b.png"),
            ("scaled", "Make it red!", "a2.jpg", "b2.jpg"),
            ("worded", "turn it blue", "a.png", "b.png"),
            ("other", "make it red", "a.png", "c.png"),
        ],
    )
    report = take(path, tmp_path / "out")
    assert report.rejected == {"duplicate": 1} and report.repeats == 1
    found = {t.id: t.repeats for t in ingest.read_triplets(tmp_path / "out")}
    assert found == {"first": "", "scaled": "first", "worded": "", "other": ""}
    assert not [*(tmp_path / "out").rglob("copy.*")]
    strict = take(path, tmp_path / "strict", near_duplicates="reject")
    assert strict.rejected == {"duplicate": 1, "near duplicate": 1}
    loose = take(path, tmp_path / "loose", duplicates="flag", near_duplicates="keep")
    assert loose.rejected == {} and loose.repeats == 1
    assert {t.id: t.repeats for t in ingest.read_triplets(tmp_path / "loose")}["copy"] == "first"


@given(st.integers(0, 2**128 - 1), st.sets(st.integers(0, 127), max_size=5))
@settings(max_examples=60, deadline=None)
def test_every_look_within_three_bits_is_found(look, bits):
    ledger = Ledger(Path(":memory:"), Path("/nowhere"))
    one = ingest.Triplet("a", "x", Path("/nowhere/s"), Path("/nowhere/e"), hashes={"source": "1", "edited": "2"})
    ledger.take(1, replace(one, look=f"{look:032x}"))
    other = look
    for bit in bits:
        other ^= 1 << bit
    assert ledger.similar(replace(one, look=f"{other:032x}")) == ("a" if len(bits) <= NEAR else "")
    ledger.close()


def test_what_repeats_another_is_not_compared_with_later(tmp_path):
    """Rows of one instruction with pictures as flat as a wall: each meets the first one and nobody else."""
    found = Ledger(tmp_path / "ledger", tmp_path)
    one = ingest.Triplet("k0", "make it red", tmp_path / "s", tmp_path / "e", hashes={"source": "1", "edited": "2"})
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    found._db.set_progress_handler(step, 100)
    for n in range(1500):
        triplet = replace(one, id=f"k{n}", look=f"{0:032x}")
        found.take(n, replace(triplet, repeats=found.similar(triplet)))
        assert found.similar(triplet) == "k0"
    found.close()
    assert steps < 1500 * 20


def test_of_bands_that_thousands_share_the_first_ones_are_looked_at(tmp_path, monkeypatch):
    """Half of every look is the same; the other halves differ in more than NEAR bits."""
    monkeypatch.setattr(ledger, "ALIKE", ledger.ALIKE.replace(str(ledger.MOST), "10"))
    found = Ledger(tmp_path / "ledger", tmp_path)
    one = ingest.Triplet("k0", "make it red", tmp_path / "s", tmp_path / "e", hashes={"source": "1", "edited": "2"})
    looks = [(n * 0x9E3779B97F4A7C15 % 2**64) << 64 for n in range(1, 41)]
    for n, look in enumerate(looks):
        assert found.similar(near := replace(one, id=f"k{n}", look=f"{look:032x}")) == ""
        found.take(n, near)
    assert [found.similar(replace(one, look=f"{look:032x}")) for look in looks] == [f"k{n}" for n in range(40)]
    far = looks[30] ^ (1 << 64) ^ (1 << 100)  # its own halves differ, and of the common ones it is not among the first
    assert found.similar(replace(one, look=f"{looks[3] ^ (1 << 64) ^ (1 << 100):032x}")) == "k3"
    assert found.similar(replace(one, look=f"{far:032x}")) == ""
    found.close()


# -------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from data_tools import ingest
from data_tools.bench.holding import peak_of
source, out = sys.argv[1:]
words = {"duplicates": "keep", "near_duplicates": "keep", "workers": 1}
print(peak_of(lambda: ingest.ingest(source, out, (16, 16), **words)))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """Resident peaks of a run over 1,000 and over 20,000 rows, each in a process of its own."""
    for n in (1, 2):
        (tmp_path / f"{n}.png").write_bytes(png(n, (16, 16)))
    peaks = {}
    for rows in (1_000, 20_000):
        listed(tmp_path, [(f"k{n}", f"make it {n}", "1.png", "2.png") for n in range(rows)])
        words = [sys.executable, "-c", MEASURE, str(tmp_path / "x.jsonl"), str(tmp_path / f"out-{rows}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        peaks[rows] = float(done.stdout)
    print(peaks)
    assert peaks[20_000] - peaks[1_000] < 16
