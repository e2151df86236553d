"""What we ship is what we trained: a run's weights, out of stock diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import shared_wan_folder
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from v4e import export
from v4e.errors import CheckpointError, ConfigError
from v4e.export import export_run
from v4e.pipelines import Card, EditPipeline

NAME = "diffusion_pytorch_model.safetensors"


def a_run(path: Path, kind: str = "i2v", *, average: bool = True, **settings: str) -> Path:
    """A finished run: last weights and averages, each the base's weights moved a little."""
    base = shared_wan_folder(kind)
    checkpoint, weights = path / "checkpoints/step_0000002", path / "weights/student"
    checkpoint.mkdir(parents=True)
    weights.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").write_text("{}")
    config = {"student": str(base), "shift": "5.0", "loop.data": "nowhere"} | settings
    (checkpoint / "state.json").write_text(json.dumps({"config": config}))
    state = load_file(base / "transformer" / NAME)
    save_file({k: (v * 1.01).contiguous() for k, v in state.items()}, weights / "weights.safetensors")
    if average:
        save_file({k: (v * 1.02).contiguous() for k, v in state.items()}, weights / "average.safetensors")
    return path


def edit_of_stock(folder: Path, image: Image.Image) -> torch.Tensor:
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        image, "snow", height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(4),
    ).frames[0]  # fmt: skip
    return torch.from_numpy((frames * 255).round().astype(np.uint8)).movedim(-1, 1)


def test_an_export_is_the_averaged_weights_in_stock_diffusers(tmp_path):
    out = export_run(a_run(tmp_path / "run"), tmp_path / "student", dtype=torch.float32, figures={"edit_psnr": 21.5})
    trained = load_file(tmp_path / "run/weights/student/average.safetensors")
    stored = load_file(out / "transformer" / NAME)
    assert trained.keys() == stored.keys()
    assert all(torch.equal(stored[k], trained[k]) for k in trained)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    pipe = EditPipeline.from_pretrained(out, attention="native")
    assert pipe.card == Card(shift=5.0)
    assert pipe.scheduler.config.flow_shift == 5.0
    ours = pipe(image, "snow", seed=4, steps=3, guidance=1.0, frames=5, return_frames=True)
    assert torch.equal(ours.frames_T3HW, edit_of_stock(out, image))
    text = (out / "README.md").read_text()
    assert "| edit_psnr | 21.5 |" in text
    assert "| `shift` | `5.0` |" in text


def test_the_last_weights_are_taken_where_no_averages_were_kept(tmp_path):
    out = export_run(a_run(tmp_path / "run", average=False), tmp_path / "student")
    stored = load_file(out / "transformer" / NAME)
    last = load_file(tmp_path / "run/weights/student/weights.safetensors")
    assert all(torch.equal(stored[k], last[k].bfloat16()) for k in last)


def test_a_teacher_keeps_its_solver(tmp_path):
    run = a_run(tmp_path / "run", "flf2v", init=str(shared_wan_folder("flf2v")), student="")
    out = export_run(run, tmp_path / "teacher")
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["flow_shift"] == 16.0


def test_an_earlier_export_is_replaced_but_nothing_else(tmp_path):
    run = a_run(tmp_path / "run")
    export_run(run, tmp_path / "student", average=False)
    export_run(run, tmp_path / "student", average=True, dtype=torch.float32)
    assert load_file(tmp_path / "student/transformer" / NAME)["proj_out.weight"].dtype == torch.float32
    (tmp_path / "precious").mkdir()
    with pytest.raises(CheckpointError, match="precious"):
        export_run(run, tmp_path / "precious")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "run", "student"]


def test_other_frames_are_an_error_and_leave_nothing(tmp_path, monkeypatch):
    """A stock pipeline that reads other weights than were trained."""
    real = export._in_memory

    def scaled(folder, state):
        return real(folder, {name: t * 1.5 for name, t in state.items()})

    monkeypatch.setattr(export, "_in_memory", scaled)
    with pytest.raises(CheckpointError, match="other frames"):
        export_run(a_run(tmp_path / "run"), tmp_path / "student")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_unfinished_runs_and_other_models_weights_say_so(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    run = a_run(tmp_path / "run")
    file = run / "weights/student/average.safetensors"
    state = load_file(file)
    state.pop("proj_out.bias")
    save_file(state, file)
    with pytest.raises(CheckpointError, match="proj_out.bias"):
        export_run(run, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="average.safetensors"):
        export_run(run, tmp_path / "out")
    file.rename(file.with_name("average-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="1 of 2 files"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_say_its_base_asks_for_one(tmp_path):
    run = a_run(tmp_path / "run", student="")
    with pytest.raises(ConfigError, match="base="):
        export_run(run, tmp_path / "out")
    assert export_run(run, tmp_path / "out", base=str(shared_wan_folder("i2v"))).is_dir()
