"""The first day with real weights: its stages, what it compares, when its curves say stop; all on wan-nano today."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import shared_wan_folder
from safetensors.torch import load_file, save_file

from data_tools import curves, fidelity
from data_tools.world import write_triplets
from v4e.errors import DataError
from v4e.models.codec import WanCodec
from v4e.models.wan import WanBackbone

ROOT = Path(__file__).parents[1]
NANO = ROOT / "v4e/assets/wan-nano"
NEEDED = {"--teacher": "T", "--student": "S", "--config": "C.yaml", "--edits": "E.jsonl", "--out": "runs/first"}


def first_day(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["launch/first_day.sh", *words]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)


def said(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


# ------------------------------------------------------------------------------------------------------ stages


def test_a_dry_run_prints_every_command_in_order():
    done = first_day(*said(NEEDED), "-n", "8", "--fewer", "49", "--rolling", "steps=50 seed=1", "--dry-run", "a.b=1")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("==")]
    fidelity_words = ["--original", "", "--height", "480", "--width", "832", "--dtype", "fp32", "--tolerance", "0"]
    places = ["teacher=T", "student=S", "loop.data=runs/first/shards-81", "loop.output=runs/first/train"]
    places += ["loop.steps=100", "loop.log_every=5", "loop.schedule.warmup=10", "a.b=1"]

    def rolled(frames: int) -> list[list[str]]:
        folder = f"runs/first/shards-{frames}"
        words = ["--teacher", "T", f"teacher_frames={frames}", "steps=50", "seed=1"]
        looks = [["v4e-shards", verb, folder] for verb in ("verify", "stats")]
        rolling = ["launch/rollout.sh", "-n", "8", "runs/first/edits", folder, *words]
        return [rolling, *looks, ["v4e-shards", "look", folder, "--codec", "T"]]

    assert lines == [
        ["v4e", "doctor", "--output", "runs/first"],
        ["python", "-m", "data_tools.fidelity", "S", *fidelity_words],
        ["python", "-m", "data_tools.fidelity", "T", *fidelity_words],
        ["v4e-shards", "ingest", "E.jsonl", "runs/first/edits", "--height", "480", "--width", "832"],
        ["v4e-shards", "evolve", "runs/first/edits"],
        *rolled(81),
        *rolled(49),
        ["v4e", "plan", "C.yaml", "--gpus", "8", *places],
        ["launch/one_node.sh", "-n", "8", "C.yaml", *places],
        ["python", "-m", "data_tools.curves", "runs/first/train"],
        ["v4e", "export", "runs/first/train", "runs/first/student"],
    ]


def test_some_stages_alone():
    done = first_day(*said(NEEDED), "--stages", "9-10", "--dry-run")
    assert [line.split(".")[0] for line in done.stdout.splitlines() if line.startswith("==")] == ["== 9", "== 10"]


@pytest.mark.parametrize("left_out", NEEDED)
def test_nothing_is_assumed(left_out):
    done = first_day(*said({k: v for k, v in NEEDED.items() if k != left_out}), "--dry-run")
    assert done.returncode == 2 and f"{left_out} is not said" in done.stderr


def test_a_stage_that_fails_ends_the_day(tmp_path):
    done = first_day(*said(NEEDED | {"--out": str(tmp_path)}), "--stages", "9-10")
    assert done.returncode == 4 and "0 lines of numbers" in done.stderr and "== 10" not in done.stdout


# -------------------------------------------------------------------------------------------------- comparisons


@pytest.fixture
def trial():
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def made(kind: str, original: str = "", **changes: object) -> fidelity.Trial:
        folder = str(shared_wan_folder(kind))
        options = {"steps": 2, "dtype": torch.float32, "device": torch.device("cpu")} | changes
        return fidelity.Trial(folder, original, WanCodec(folder).grid(5, 32, 32), **options)

    yield made
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [pytest.param("i2v", marks=pytest.mark.slow), "flf2v"])
def test_all_looks_find_the_same(trial, kind):
    found = [look(trial(kind)) for look in fidelity.LOOKS]
    assert [f.fits for f in found] == [True, True, True], found
    assert found[1].told == found[2].told == "equal to the bit"
    low = trial(kind, dtype=torch.bfloat16)  # what an 80 GB card runs
    assert fidelity.block_loop(low).fits and fidelity.pipeline(low).fits


def test_a_tensor_that_differs_is_named(trial, tmp_path):
    of = trial("i2v", str(fidelity._as_original(str(shared_wan_folder("i2v")), tmp_path)))
    assert fidelity.original_keys(of).fits
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.ffn.0.bias"] = tensors["blocks.1.ffn.0.bias"].nextafter(torch.tensor(9.0))
    save_file(tensors, file)
    found = fidelity.original_keys(of)
    assert not found.fits and found.told.startswith("1 of ") and found.told.endswith("blocks.1.ffn.net.0.proj.bias")


def test_another_forward_is_told_with_its_difference(trial, monkeypatch):
    head = WanBackbone._head
    monkeypatch.setattr(WanBackbone, "_head", lambda *words: head(*words) + 0.25)
    found = fidelity.block_loop(trial("i2v"))
    assert not found.fits and found.told.startswith("off by up to 0.25, of values up to ")
    assert str(found).startswith("DIFFERS block loop")
    largest = float(found.told.split()[-1])
    assert fidelity.block_loop(trial("i2v", tolerance=0.26 / largest)).fits
    assert not fidelity.block_loop(trial("i2v", tolerance=0.24 / largest)).fits


# ------------------------------------------------------------------------------------------------------ curves


def lines(**changes: object) -> list[dict[str, float]]:
    """A healthy run of nine lines; a change is a value for all of them or a function of the line's number."""
    healthy = {
        "step": lambda i: 10 * (i + 1),
        "time": lambda i: 100.0 + 50 * i,
        "student/term/velocity": lambda i: 1 / (1 + i),
        "student/term/tail": lambda i: 2 / (1 + i),
        "student/grad_norm": 2.0,
        "samples_per_s": 4.0,
        "data_wait_s": 0.05,
        "skipped_steps": 0,
        "quarantined": 0,
        "loss_spikes": 0,
    }
    return [{k: float(v(i) if callable(v) else v) for k, v in (healthy | changes).items()} for i in range(9)]


def states(of: list[dict[str, float]]) -> dict[str, str]:
    return {v.curve: v.state for v in curves.verdicts(of) if v.state != "ok"}


def test_a_healthy_run_is_ok_and_tells_its_numbers():
    assert states(lines()) == {}
    told = {v.curve: v.told for v in curves.verdicts(lines())}
    assert told["student/term/velocity"] == "from 0.6111 to 0.1263"  # (1 + 1/2 + 1/3) / 3 and (1/7 + 1/8 + 1/9) / 3
    assert told["data_wait_s"] == "1.00% of a step of 5 s"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"student/term/velocity": 0.5}, {"student/term/velocity": "STOP"}),
        ({"student/term/tail": lambda i: i}, {"student/term/tail": "look"}),
        ({"student/grad_norm": lambda i: 1.0 if i < 5 else 3.5}, {"student/grad_norm": "STOP"}),
        ({"student/grad_norm": lambda i: 100.0 if i == 8 else 1.0}, {}),
        ({"skipped_steps": lambda i: i // 8}, {"skipped_steps": "STOP"}),
        ({"quarantined": 2}, {"quarantined": "STOP"}),
        ({"loss_spikes": 2}, {"loss_spikes": "look"}),
        ({"samples_per_s": lambda i: 1.0 if i == 4 else 4.0}, {"samples_per_s": "look"}),
        ({"samples_per_s": lambda i: 1.0 if i == 0 else 4.0}, {}),
        ({"data_wait_s": 0.2}, {"data_wait_s": "look"}),
    ],
)
def test_what_means_stop_and_what_wants_a_look(changes, wanted):
    assert states(lines(**changes)) == wanted


def test_too_short_a_run_says_nothing():
    with pytest.raises(DataError, match="5 lines of numbers"):
        curves.verdicts(lines()[:5])


@pytest.mark.parametrize(("velocity", "code"), [(lambda i: 1 / (1 + i), 0), (1.0, 7)])
def test_the_exit_code_says_stop(tmp_path, monkeypatch, capsys, velocity, code):
    rows = lines(**{"student/term/velocity": velocity})
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path)])
    assert curves.main() == code
    assert ("STOP" in capsys.readouterr().out) == bool(code)


# ----------------------------------------------------------------------------------------------------- the day


@pytest.mark.slow
def test_the_whole_day_on_wan_nano(tmp_path):
    write_triplets(tmp_path / "raw", 4, "train", 0)
    models = {"--teacher": str(NANO / "teacher"), "--student": str(NANO / "i2v")}
    files = {"--edits": str(tmp_path / "raw/triplets.jsonl"), "--out": str(tmp_path / "day")}
    sizes = {"--height": "64", "--width": "64", "--frames": "9", "--fewer": "5", "--steps": "12", "-n": "1"}
    rolling = {"--rolling": "guidance=1 attention=matmul fold_text_padding=true threads=1 wandb.mode=disabled"}
    options = models | {"--config": "configs/nano/video4edit.yaml"} | files | sizes | rolling
    loop = ["loop.batch=4", "loop.micro_batch=4", "loop.wandb.mode=disabled", "loop.save_every=6"]
    done = first_day(*said(options), *loop, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("ok      ") == 6 and done.stdout.count("equal to the bit") == 4
    assert [line.split(".")[0] for line in done.stdout.splitlines() if line.startswith("== ")] == [
        f"== {n}" for n in range(1, 11)
    ]
    for name in ("shards-9/look.html", "shards-5/look.html", "train/journal.jsonl", "student/model_index.json"):
        assert (tmp_path / "day" / name).is_file(), name
