"""Where DeepSpeed keeps and how it steps what trains: offload, 8 bits, compiled blocks; and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_bars import PREEMPTED, losses, run, tensors
from safetensors.torch import load_file
from test_train import SMALL, assert_same, checkpoints, numbers, train, weights
from torch._dynamo.utils import counters
from toy_training import Toy, ToyStream, toy

from v4e import dist
from v4e.dist import Ranks
from v4e.errors import CheckpointError, ConfigError, PreemptedError
from v4e.train import possible
from v4e.train.engines import deepspeed_config
from v4e.train.operators import fault
from v4e.train.run import open_run

OFFLOAD = "loop.offload.optimizer=cpu"
NEAR = 1e-5  # relative, of fp32 losses: DeepSpeed's AdamW for CPUs multiplies and adds in another order


def halves(tmp_path: Path, *words: str) -> tuple[Toy, Toy]:
    """The same run straight, and stopped after 2 of 4 steps and gone on with."""
    whole, parts = (toy(tmp_path / name, *SMALL, "loop.steps=4", "loop.ema=0.9", *words) for name in ("whole", "parts"))
    train(whole)
    with pytest.raises(PreemptedError):
        train(parts, stream=ToyStream(parts.loop, 0, 1, fate="2:0:SIGTERM"))
    train(parts)
    return whole, parts


# ---------------------------------------------------------------------------------------------- refused at once


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("zero_stage=0", OFFLOAD), r"loop.offload.optimizer: without ZeRO the optimiser stays .*zero_stage=1"),
        (("zero_stage=2", "loop.offload.optimizer=nvme"), r"ZeRO stage 2 offloads to main memory alone"),
        (("zero_stage=2", "loop.offload.parameters=cpu"), r"loop.offload.parameters: ZeRO stage 2 keeps whole weights"),
        (("zero_stage=1", OFFLOAD, "optim.name=muon", "loop.clip=0"), r"DeepSpeed steps AdamW alone, not muon"),
        (("zero_stage=1", OFFLOAD, "optim.name=adamw8bit"), r"DeepSpeed steps AdamW alone, not adamw8bit"),
        (("zero_stage=3", "loop.offload.parameters=nvme"), r"no folder to offload to .name one on a local NVMe"),
        (("zero_stage=3", "loop.offload.parameters=nvme", "loop.offload.folder=/none"), r"/none is no folder"),
        (("zero_stage=3", "loop.compile=true"), r"loop.compile: ZeRO stage 3 hangs hooks .*zero_stage=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, monkeypatch, words, told):
    monkeypatch.setattr(possible, "fault", lambda _: "")
    with pytest.raises(ConfigError, match=told):
        train(toy(tmp_path, *SMALL, *words))


def test_what_cannot_be_compiled_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"AdamW for CPUs cannot be compiled: no g\+\+ and no ninja .apt install g"):
        train(toy(tmp_path, *SMALL, "zero_stage=1", OFFLOAD))
    away = ("zero_stage=3", "loop.offload.parameters=nvme", f"loop.offload.folder={tmp_path}")
    with pytest.raises(ConfigError, match=r"input and output cannot be compiled: no g\+\+.*apt install libaio-dev"):
        train(toy(tmp_path, *SMALL, *away))
    with pytest.raises(ConfigError, match=r"torch.compile needs a C\+\+ compiler"):
        train(toy(tmp_path, *SMALL, "zero_stage=0", "loop.compile=true"))


def test_a_setting_younger_than_the_checkpoint_is_at_its_default(tmp_path):
    recipe = toy(tmp_path, *SMALL, "zero_stage=0", "loop.save_every=3")
    train(recipe)
    place = tmp_path / "checkpoints/step_0000003"
    state = json.loads((place / "state.json").read_text())
    young = ("offload", "compile", "poison_from")
    state["config"] = {k: v for k, v in state["config"].items() if not any(word in k for word in young)}
    (place / "state.json").write_text(json.dumps(state))
    (place / "COMPLETE.json").unlink()
    seal(place)
    assert opened(recipe).progress.step == 3
    with pytest.raises(CheckpointError, match="loop.compile was False and is now True"):
        opened(replace(recipe, loop=replace(recipe.loop, compile=True)))
    with pytest.raises(CheckpointError, match="poison_from was 0 and is now 7"):
        opened(replace(recipe, poison_from=7))


def seal(place: Path) -> None:
    from v4e.train.checkpoint import SEAL, _hash_together

    (place / SEAL).write_text(json.dumps({"files": _hash_together(place, Ranks())}))


def opened(recipe: Toy):
    return open_run(recipe, lambda r, w: ToyStream(recipe.loop, r, w), None, "auto", dist.start(1))


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path):
    """Blocks fuse what they compute, in fp32 to the last digits; names and files are those of any run."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    words = (*SMALL, "zero_stage=0", "loop.checkpointing=true")
    plain, compiled = toy(tmp_path / "plain", *words), toy(tmp_path / "compiled", *words, "loop.compile=true")
    counters.clear()
    train(compiled)
    assert counters["stats"]["unique_graphs"] >= 1
    train(plain)
    for name in ("student/loss", "student/grad_norm"):
        assert numbers(compiled, name) == pytest.approx(numbers(plain, name), rel=NEAR)
    assert weights(compiled).keys() == weights(plain).keys()


@pytest.mark.slow
def test_selective_checkpointing_trains_alike_where_weights_are_gathered(tmp_path):
    """Blocks gather again what they compute again, and a kept product is not spoilt by the bias."""
    words = ("zero_stage=3", "loop.precision=fp32", "loop.steps=4")
    for kind in ("true", "selective"):
        assert run(tmp_path / kind, 2, *words, f"loop.checkpointing={kind}") == [0, 0]
    assert losses(tmp_path / "selective") == pytest.approx(losses(tmp_path / "true"), rel=NEAR)


@pytest.mark.parametrize(
    ("ranks", "words", "forgets"),
    [
        (1, (), False),
        (2, (), True),
        (1, ("loop.offload.parameters=cpu",), True),
        (2, ("loop.checkpointing=selective",), False),
    ],
)
def test_linear_layers_are_pytorchs_where_no_weight_has_to_go_between_passes(tmp_path, ranks, words, forgets):
    recipe = toy(tmp_path, "loop.batch=8", "loop.micro_batch=2", *words)
    zero = deepspeed_config(recipe.players()[0], 3, recipe.loop, Ranks(0, ranks))["zero_optimization"]
    assert zero["memory_efficient_linear"] == forgets and zero["reduce_scatter"] == (ranks > 1)


# ----------------------------------------------------------------------------------------------------- in 8 bits


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")])
def test_moments_are_kept_in_8_bits_and_resumed_to_the_bit(tmp_path, bitsandbytes, stage, precision):
    """hidden=192 makes matrices of 6144 elements, of which bitsandbytes keeps the moments in 8 bits."""
    words = (
        "optim.name=adamw8bit",
        "hidden=192",
        "optim.lr=1e-3",
        f"zero_stage={stage}",
        f"loop.precision={precision}",
    )
    whole, parts = halves(tmp_path, *words)
    for stem in ("weights", "average"):
        assert all(torch.equal(weights(parts, stem)[name], t) for name, t in weights(whole, stem).items())
    one, other = (stored(recipe) for recipe in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())
    codes = [t for k, t in one.items() if "|=state" in k and t.dtype == torch.uint8]
    assert sum(t.numel() for t in codes) >= 2 * 4 * 6144
    plain = toy(tmp_path / "plain", *SMALL, "loop.steps=4", *words[1:])
    train(plain)
    assert numbers(whole, "student/loss") == pytest.approx(numbers(plain, "student/loss"), rel=0.01)
    assert numbers(whole, "student/loss") != numbers(plain, "student/loss")


def stored(recipe: Toy) -> dict[str, torch.Tensor]:
    folder = Path(recipe.loop.output) / "checkpoints" / max(checkpoints(recipe))
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def test_8_bits_without_their_library_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"AdamW in 8 bits needs bitsandbytes .pip install 'v4e\[8bit\]'"):
        train(toy(tmp_path, *SMALL, "optim.name=adamw8bit", "zero_stage=0"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_8_bits_go_on_among_other_ranks_only_where_they_can(tmp_path, bitsandbytes, stage):
    words = ("optim.name=adamw8bit", "hidden=192", "optim.lr=1e-3", f"zero_stage={stage}", "loop.precision=fp32")
    words = (*words, "loop.steps=4")
    assert run(tmp_path / "whole", 2, *words) == [0, 0]
    assert run(tmp_path / "parts", 2, *words, fate="2:1:SIGTERM") == [PREEMPTED] * 2
    if stage:
        assert run(tmp_path / "parts", 1, *words) == [CheckpointError.exit_code]
        assert (
            "8-bit states are cut into blocks that fit the number of ranks" in (tmp_path / "parts/stderr.0").read_text()
        )
        assert run(tmp_path / "parts", 2, *words) == [0, 0]
        one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
        assert all(torch.equal(t, other[k]) for k, t in one.items())
    else:
        assert run(tmp_path / "parts", 1, *words) == [0]
        assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


# ------------------------------------------------------------------------------------------------------- offload


@pytest.fixture
def cpu_adam():
    if lacking := fault("cpu_adam"):
        pytest.skip(f"DeepSpeed's AdamW for CPUs cannot be compiled: {lacking}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimiser_trains_alike_and_goes_on_to_the_bit(tmp_path, cpu_adam, stage):
    words = (
        f"zero_stage={stage}",
        "loop.precision=bf16",
        "loop.offload.parameters=" + ("cpu" if stage == 3 else "none"),
    )
    whole, parts = halves(tmp_path, *words, OFFLOAD)
    assert_same(whole, parts)
    here = toy(tmp_path / "here", *SMALL, "loop.steps=4", "loop.ema=0.9", *words[:2])
    train(here)
    for name in ("student/loss", "student/grad_norm", "student/grad_norm/blocks.1"):
        assert numbers(whole, name) == pytest.approx(numbers(here, name), rel=1e-3)
    assert (Path(whole.loop.output) / "notes/deepspeed_student.json").read_text().count('"device": "cpu"') == 1 + (
        stage == 3
    )


@pytest.mark.slow
def test_two_ranks_offloaded_lose_alike_and_go_on_as_one(tmp_path, cpu_adam):
    """Without offload; with; and with, but from 2 ranks to 1 to 2, and at last without: one checkpoint serves all."""
    words = ("zero_stage=2", "loop.precision=fp32", "loop.steps=6")
    assert run(tmp_path / "here", 2, *words) == [0, 0]
    assert run(tmp_path / "away", 2, *words, OFFLOAD) == [0, 0]
    assert losses(tmp_path / "away") == pytest.approx(losses(tmp_path / "here"), rel=NEAR)
    assert run(tmp_path / "parts", 2, *words, OFFLOAD, fate="2:1:SIGTERM") == [PREEMPTED] * 2
    assert run(tmp_path / "parts", 1, *words, OFFLOAD, fate="4:0:SIGTERM") == [PREEMPTED]
    assert run(tmp_path / "parts", 2, *words) == [CheckpointError.exit_code] * 2
    assert run(tmp_path / "parts", 2, *words, "loop.allow_change=[loop.offload]") == [0, 0]
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "here"), rel=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["none", "cpu", "nvme"])
def test_on_a_disk_it_trains_as_in_main_memory_and_goes_on_to_the_bit(tmp_path, cpu_adam, parameters):
    """hidden=16384 makes more than the mebibyte below which DeepSpeed keeps states in memory."""
    if lacking := fault("async_io"):
        pytest.skip(f"DeepSpeed's asynchronous input and output cannot be compiled: {lacking}")
    words = ("hidden=16384", "optim.lr=1e-4", "zero_stage=3", "loop.precision=bf16")
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = ("loop.offload.optimizer=nvme", f"loop.offload.parameters={parameters}", f"loop.offload.folder={folder}")
    whole, parts = halves(tmp_path, *words, *disk)
    assert list(folder.rglob("*exp_avg*.swp"))
    assert_same(whole, parts)
    memory = toy(tmp_path / "memory", *SMALL, "loop.steps=4", "loop.ema=0.9", *words, OFFLOAD)
    train(memory)
    assert numbers(whole, "student/loss") == pytest.approx(numbers(memory, "student/loss"), rel=1e-4)
    for stem in ("weights", "average"):
        for name, tensor in weights(memory, stem).items():
            torch.testing.assert_close(weights(whole, stem)[name], tensor, rtol=1e-3, atol=2e-6)
