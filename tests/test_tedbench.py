"""Real photographs go down the whole road: ingest, evolve, rollout, verify, train, export, edit, each by its command.

The models are tiny and random, or the embedded ones, which know drawn pictures alone: this is about data that nobody
drew for us, not about quality.
"""

import json
import math
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from builders import shared_wan_folder
from PIL import Image
from safetensors.torch import load_file

from data_tools import cli as yard
from data_tools.demo import launcher
from data_tools.ingest import read_triplets
from data_tools.stats import stats
from v4e import cli as door
from v4e import journal
from v4e.data.shards import ShardSet

ROOT = Path(__file__).parents[1]
TEDBENCH = Path(os.environ.get("V4E_TEDBENCH", ROOT.parent / "shared/data/tedbench"))
SIZE, STEPS, COUNT = 32, 20, 69
ROLLOUT = (f"height={SIZE}", f"width={SIZE}", "teacher_frames=9", "guidance=3.0", "batch=3", "attention=matmul")
LOOP = (f"steps={STEPS}", "batch=2", "micro_batch=2", "log_every=1", "save_every=0", "wandb.mode=disabled", "threads=1")
BLOCKS = ("student_blocks=[0,2]", "teacher_blocks=[0,2]")  # the tiny models have three

pytestmark = pytest.mark.skipif(
    not (TEDBENCH / "triplets.jsonl").is_file(),
    reason=f"TEdBench's 69 triplets are not there: no {TEDBENCH}/triplets.jsonl; name their folder in V4E_TEDBENCH",
)


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in (TEDBENCH / "triplets.jsonl").read_text().splitlines()]


def a_few(folder: Path, every: int = 12) -> Path:
    """A list of six triplets of different photographs; its paths lead to the real files."""
    chosen = [row | {k: str(TEDBENCH / row[k]) for k in ("source", "edited")} for row in rows()[::every]]
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return path


def shards(jsonl: Path, home: Path) -> None:
    """home/triplets and home/shards, by the commands of the yard."""
    triplets, made = str(home / "triplets"), str(home / "shards")
    teacher = str(shared_wan_folder("flf2v"))
    size = ["--height", str(SIZE), "--width", str(SIZE)]
    assert yard.main(["ingest", str(jsonl), triplets, "--root", str(TEDBENCH), *size]) == 0
    assert yard.main(["evolve", triplets]) == 0
    assert yard.main(["rollout", triplets, made, "--teacher", teacher, *ROLLOUT]) == 0
    assert yard.main(["verify", made]) == 0


def student(home: Path) -> Path:
    """The trained and exported editor, by the commands of the house."""
    models = (f"teacher={shared_wan_folder('flf2v')}", f"student={shared_wan_folder('i2v')}", *BLOCKS)
    places = (f"loop.data={home / 'shards'}", f"loop.output={home / 'train'}")
    config = str(ROOT / "configs/nano/video4edit.yaml")
    assert door.main(["train", config, *models, *places, *(f"loop.{word}" for word in LOOP)]) == 0
    assert door.main(["export", str(home / "train"), str(home / "student")]) == 0
    return home / "student"


def check_training(home: Path) -> None:
    """Twenty finite losses with every term in them, and weights that have moved."""
    lines = journal.read(home / "train")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert all(math.isfinite(line["student/loss"]) for line in lines)
    terms = {key.removeprefix("student/term/") for line in lines for key in line}
    assert {"velocity", "trajectory", "tail", "block", "flow"} <= terms
    before = load_file(shared_wan_folder("i2v") / "transformer/diffusion_pytorch_model.safetensors")
    after = load_file(home / "train/weights/student/weights.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(after["proj_out.weight"], before["proj_out.weight"])


def check_edit(model: Path, home: Path) -> None:
    """One of the photographs, edited by the command; the result has its size and is not the photograph."""
    row = rows()[24]
    photo, out = TEDBENCH / row["source"], home / "out.png"
    words = ["edit", str(photo), row["instruction"], "--model", str(model), "-o", str(out), "--steps", "4"]
    assert door.main([*words, "--device", "cpu"]) == 0
    before, after = Image.open(photo).convert("RGB"), Image.open(out)
    assert after.size == before.size
    assert after.tobytes() != before.tobytes()


def test_six_real_triplets_go_down_the_road(tmp_path):
    shards(a_few(tmp_path), tmp_path)
    taken = read_triplets(tmp_path / "triplets")
    assert [t.instruction for t in taken] == [row["instruction"] for row in rows()[::12]]
    assert len({t.evolution for t in taken}) == len(taken)
    model = student(tmp_path)
    check_training(tmp_path)
    check_edit(model, tmp_path)


@pytest.mark.slow
def test_all_real_triplets_go_down_the_road(tmp_path):
    shards(TEDBENCH / "triplets.jsonl", tmp_path)
    assert len(read_triplets(tmp_path / "triplets")) == COUNT == len(rows())
    model = student(tmp_path)
    check_training(tmp_path)
    check_edit(model, tmp_path)


@pytest.mark.slow
def test_all_real_triplets_go_through_wan_nano(tmp_path, capsys):
    """The commands of docs/quality.md with the embedded models at their size, and on to an edit by the student."""
    edits, made = str(tmp_path / "edits"), str(tmp_path / "shards")
    nano = str(ROOT / "v4e/assets/wan-nano/teacher")
    words = ("teacher_frames=9", "guidance=1.0", "batch=8", "dtype=fp32", "attention=native", "threads=1")
    for command in (
        ["ingest", str(TEDBENCH / "triplets.jsonl"), edits, "--height", "64", "--width", "64"],
        ["evolve", edits],
        ["verify", edits],
        ["rollout", edits, made, "--teacher", nano, *words, "wandb.mode=disabled"],
        ["verify", made, "--codec", nano, "--least-psnr", "15"],
        ["look", made, "--codec", nano],
    ):
        assert yard.main(command) == 0, (command, capsys.readouterr())
    taken, found = read_triplets(edits), ShardSet.open(made, verify="index")
    assert list(found.keys) == [t.id for t in taken] == [row["id"] for row in rows()] and len(found) == COUNT
    assert stats(made)[0].counts["task"] == dict(Counter(t.task for t in taken).most_common())
    page = (tmp_path / "shards/look.html").read_text()
    assert page.count("<section class=") == 24 and "could not be read" not in page
    check_edit(distilled(tmp_path), tmp_path)


def distilled(home: Path) -> Path:
    """wan-nano's student after twenty steps under ZeRO-3 on two ranks, exported."""
    places = [f"loop.data={home / 'shards'}", f"loop.output={home / 'train'}"]
    loop = [f"loop.steps={STEPS}", "loop.log_every=1", "loop.sheet_every=0", "loop.wandb.mode=disabled"]
    subprocess.run([*launcher(2), "train", "configs/nano/video4edit.yaml", *places, *loop], cwd=ROOT, check=True)
    lines = journal.read(home / "train")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)] and all(not line["quarantined"] for line in lines)
    losses = [line["student/loss"] for line in lines]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert door.main(["export", str(home / "train"), str(home / "student")]) == 0
    return home / "student"
