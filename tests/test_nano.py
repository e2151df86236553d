"""`make nano`: stages are done once, by one process at a time, some beside others; and what it ships."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file

from data_tools import nano, world
from v4e.data.disk import lock
from v4e.errors import DataError
from v4e.eval.metrics import psnr
from v4e.nouns import Clip
from v4e.pipelines import EditPipeline


@pytest.fixture
def worked(monkeypatch):
    """Stages that leave their names in a list."""
    done = []
    monkeypatch.setattr(nano, "train_vae", lambda work, seed: done.append("vae"))
    monkeypatch.setattr(nano, "assemble", lambda work, name, out: done.append("arch"))
    monkeypatch.setattr(nano, "pack_in_parallel", lambda work, seed, name, ranks: done.append(f"pack {name}"))
    monkeypatch.setattr(nano, "train_leg", lambda work, name, seed, ranks: done.append(name))
    monkeypatch.setattr(nano, "train_on_estimates", lambda work, seed: done.append("decoder"))
    monkeypatch.setattr(nano, "bundle", lambda work, out: done.append("bundle"))
    return done


class Beside:
    """In place of the processes beside: what they were asked for, and how they end."""

    def __init__(self, work):
        self.work, self.code, self.asked = work, 0, []

    def __call__(self, command):
        assert command[1:3] == ["-m", "data_tools.nano"]
        assert command[-4:] == ["--work", str(self.work), "--seed", "3"]
        self.asked.append(command[3:-4])
        return self

    def wait(self):
        for stage in self.asked[-1]:
            (self.work / f".{stage}.done").touch()
        return self.code


@pytest.fixture
def beside(monkeypatch, tmp_path):
    processes = Beside(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", processes)
    return processes


def test_every_stage_is_done_once_and_in_order(worked, beside, tmp_path):
    nano.run_all(tmp_path, 3, ranks=2)
    packs = [f"pack {name}" for name in nano.CLIPS]
    assert worked == ["vae", "arch", "arch", *packs, *nano.LEGS, "bundle"]
    assert beside.asked == [["text", "vision"], ["polish"], ["decoder"]]
    assert {path.name for path in tmp_path.glob(".*.done")} == {f".{stage}.done" for stage in nano.STAGES}
    once = [*worked]
    nano.run_all(tmp_path, 3, ranks=2)
    assert worked == once


def test_a_failed_process_beside_ends_it_before_anything_needs_it(worked, beside, tmp_path):
    beside.code = 1
    with pytest.raises(DataError, match="text or vision failed"):
        nano.run_all(tmp_path, 3, ranks=2)
    assert worked == ["vae"]


def test_two_processes_are_not_at_one_stage(worked, tmp_path):
    with lock(tmp_path / ".vae.lock"), pytest.raises(DataError, match="another writer is at work here"):
        nano.run_stage("vae", tmp_path, 0, ranks=2)
    nano.run_stage("vae", tmp_path, 0, ranks=2)
    assert worked == ["vae"]


def test_an_unknown_stage_is_named_with_the_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nano", "vae2"])
    with pytest.raises(SystemExit):
        nano.main()
    assert "no stage 'vae2'; there are vae, text, vision, arch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ training


class Net(torch.nn.Module):
    """A kernel for Muon, a gain for Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.linspace(-1, 1, 16 * 12).view(16, 12).sin())
        self.gain = torch.nn.Parameter(torch.ones(12))


def stage(folder) -> nano.Stage:
    net = Net()
    return nano.Stage(folder, net, nano.muon_and_adam(net, 0.02, 1e-2), steps=4, save_every=2)


def loss_of(net: Net, asked: list[int], killed_at: int | None = None):
    def loss(step: int) -> torch.Tensor:
        asked.append(step)
        if step == killed_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        return ((x * net.gain) @ net.kernel.T).square().mean()

    return loss


def test_a_stage_that_was_stopped_ends_as_if_it_had_not_been(tmp_path):
    whole, begun = stage(tmp_path / "whole"), stage(tmp_path / "halves")
    asked: list[int] = []
    whole.run(loss_of(whole.module, asked), "whole")
    with pytest.raises(KeyboardInterrupt):
        begun.run(loss_of(begun.module, asked, killed_at=3), "halves")  # its third step is lost, two are kept
    again = stage(tmp_path / "halves")
    again.run(loss_of(again.module, asked), "halves")
    assert asked == [0, 1, 2, 3] + [0, 1, 2, 3] + [2, 3]
    for ours, theirs in zip(again.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(whole.module.kernel, Net().kernel) and not torch.equal(whole.module.gain, Net().gain)


# ------------------------------------------------------------------------------------------------ what is shipped

SHIPPED = ("teacher", "i2v", "student")
NANO = Path(__file__).parents[1] / "v4e/assets/wan-nano"


def test_the_bundle_is_small_and_in_bf16():
    files = [path for path in NANO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4 * len(SHIPPED)  # transformer, vae, text_encoder, image_encoder
    for path in weights:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}, path


@pytest.mark.parametrize("name", SHIPPED)
def test_stock_diffusers_runs_what_is_shipped(name):
    edit = world.draw(7, 0, "heldout", size=64, tasks=("night",))
    first, last = (Image.fromarray(image.transpose(1, 2, 0)) for image in (edit.source, edit.target))
    stock = WanImageToVideoPipeline.from_pretrained(NANO / name)
    ends = {"last_image": last} if name == "teacher" else {}
    options = {"height": 64, "width": 64, "num_frames": nano.FRAMES.get(name, 5), "num_inference_steps": 2}
    made = stock(first, edit.instruction, **ends, **options, guidance_scale=1.0, output_type="np").frames
    assert made.shape == (1, options["num_frames"], 64, 64, 3) and np.isfinite(made).all()
    assert 10 * np.log10(1 / ((made[0, 0] - edit.source.transpose(1, 2, 0) / 255) ** 2).mean()) > 20  # the first frame


def test_the_shipped_student_edits():
    """Held-out photographs of a draw that no report uses, two of a task, one sampling seed.

    It notices weights that are broken or not those; the thresholds, of means over many, are asked by `make student`.
    """
    tasks = ("night", "grayscale", "add", "recolour", "remove", "background")
    edits = [world.draw(8, i, "heldout", tasks=tasks) for i in range(12)]
    student = EditPipeline.from_pretrained(NANO / "student")
    sources = [Clip(torch.from_numpy(edit.source)[None]) for edit in edits]
    made = student.edit_batch(sources, [edit.instruction for edit in edits], seeds=[*range(12)], steps=4, batch=4)
    done, gain = 0, 0.0
    for edit, clip in zip(edits, made, strict=True):
        output, target, mask = clip.frames_T3HW[-1], torch.from_numpy(edit.target), torch.from_numpy(edit.mask)
        gains = psnr(output, target, mask) - psnr(torch.from_numpy(edit.source), target, mask)
        assert gains > (4 if edit.task == "remove" else 5), edit.key
        done, gain = done + world.judge(edit, output.numpy()).success, gain + gains
    assert done >= 11 and gain / len(edits) > 10
