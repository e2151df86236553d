"""The benchmark for GPUs: every part at tiny sizes on any machine, its sums by hand, and what fails stays alone."""

import json

import pytest
import torch

from data_tools.bench import gpu, random_wan
from v4e.errors import ConfigError
from v4e.models.original import SIZES, released_config
from v4e.models.wan import WanBackbone, fresh

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found() -> dict:
    threads = torch.get_num_threads()
    yield {name: gpu.attempt(work) for name, work in gpu.cases(gpu.QUICK).items()}
    torch.set_num_threads(threads)


def test_every_part_works_and_counts_its_operations(found):
    """A forward of n layers and S tokens that see L: n (2 (5760 S + 1152 L) + 96 (S^2 + S L)); 4 S^2 24 of attention
    alone. Three of one and of two layers make a training step; two a guided step."""
    expected = {
        "matmul_peak": 2 * 64**3,
        "attention.480p": 96 * 18**2,
        "attention.720p": 96 * 36**2,
        "zero3_step.1": 3 * (2 * (5760 * 24 + 1152 * 769) + 96 * (576 + 24 * 769)),
        "zero3_step.2": 6 * (2 * (5760 * 24 + 1152 * 769) + 96 * (576 + 24 * 769)),
        "rollout.480p": 6 * (2 * (5760 * 18 + 1152 * 1026) + 96 * (324 + 18 * 1026)),
        "rollout.720p": 6 * (2 * (5760 * 36 + 1152 * 1026) + 96 * (1296 + 36 * 1026)),
        "edit.480p": 3 * (2 * (5760 * 12 + 1152 * 769) + 96 * (144 + 12 * 769)),
        "edit.720p": 3 * (2 * (5760 * 24 + 1152 * 769) + 96 * (576 + 24 * 769)),
    }
    assert [name for name, result in found.items() if "fault" in result] == []
    assert {name: result["flops"] for name, result in found.items() if name != "lora_step"} == expected
    assert all(len(result["laps"]) >= gpu.QUICK.timed for name, result in found.items() if "laps" in result)
    assert all(min(result["laps"]) > 0 for result in found.values() if "laps" in result)


def test_adapters_train_alone(found):
    """In a block ten layers of 24 x 24, and two of 24 x 48, with two matrices of rank 2 each; in three blocks. Their
    gradients cost their share of the weights' pass."""
    result, forward = found["lora_step"], 3 * (2 * (5760 * 24 + 1152 * 769) + 96 * (576 + 24 * 769))
    assert result["trained"] == 3 * (10 * 2 * 48 + 2 * 2 * 72)
    assert 2 * forward < result["flops"] < 2.2 * forward


def test_backends_are_held_against_fp32_or_say_why_not(found):
    result = found["attention.480p"]
    tried, rounding = result["backends"], result["rounding"]["rms"]
    assert set(tried) == {*gpu.NAMES, *gpu.KERNELS}
    assert all(("fault" in each) != ("rms" in each) for each in tried.values())
    assert all(0 < tried[name]["rms"] < gpu.MOST * rounding for name in ("native", "matmul"))
    assert 0 < result["pairs"]["native, matmul"]["rms"] < 2 * gpu.MOST * rounding
    if not torch.cuda.is_available():
        assert "without CUDA" in tried["xformers"]["fault"]


def test_a_wrong_backend_shows(monkeypatch):
    def late(q, k, v, bias=None, own=gpu.matmul_attention):
        return own(q, k, v) if q.dtype == torch.float32 else own(q, k, v) * 1.02

    monkeypatch.setattr(gpu, "matmul_attention", late)
    result = gpu.attention(gpu.QUICK, "480p")
    assert result["backends"]["matmul"]["rms"] == pytest.approx(0.02, rel=0.1)
    bad = [row for row in gpu._attention("attention.480p", result, None).splitlines() if "**" in row]
    assert [row.split()[1] for row in bad] == ["`matmul`"]


def test_the_sizes_are_those_of_the_released_models():
    heads, layers, ffn = SIZES[5120]
    assert (random_wan.Sizes().heads, random_wan.Sizes().layers, random_wan.Sizes().ffn) == (heads, layers, ffn)
    into = {"patch_embedding.weight": torch.Size([5120, 36, 1, 2, 2])}
    seen = {"condition_embedder.image_embedder.norm1.weight": torch.Size([1280])}
    positions = {"condition_embedder.image_embedder.pos_embed": torch.Size([1, 514, 1280])}
    for kind, shapes in (("i2v", into | seen), ("flf2v", into | seen | positions)):
        told = random_wan.Sizes().config(kind)
        assert told.pop("text_dim") == 4096
        assert told == released_config(shapes, "")
    assert [gpu.REAL.grid(name, 81).tokens for name in ("480p", "720p")] == [21 * 30 * 52, 21 * 45 * 80]


def test_random_weights_keep_norms_and_tables():
    config = gpu.QUICK.sizes.config("flf2v")
    model, usual = random_wan.whole(config, CPU), fresh(config, 0).build()
    assert isinstance(usual, WanBackbone)
    assert torch.equal(model.rope.freqs_cos, usual.rope.freqs_cos)
    assert torch.equal(model.blocks[0].attn1.norm_q.weight, torch.ones(24).bfloat16())
    assert model.scale_shift_table.dtype == torch.float32 and model.proj_out.weight.dtype == torch.bfloat16
    deviation = torch.cat([p.flatten().float() for p in model.parameters() if p.ndim > 1]).std()
    assert deviation == pytest.approx(random_wan.DEVIATION, rel=0.05)
    built = random_wan.built_on(random_wan.player(config, CPU), CPU).build()
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32


# ---------------------------------------------------------------------------------------------------- the sums


def test_a_line_by_hand():
    """Means 28/3 and 2; slope 12 / (224/3) = 9/56; the first point lies a seventh below."""
    exact = gpu.line({4: 1.0, 8: 2.0, 16: 4.0})
    assert exact.at(40) == pytest.approx(10) and exact.off == pytest.approx(0)
    bent = gpu.line({4: 1.0, 8: 2.0, 16: 3.0})
    assert (bent.base, bent.slope, bent.off) == pytest.approx((0.5, 9 / 56, 1 / 7))


def test_differences_by_hand():
    a, b, exact = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    assert gpu.apart(a, b, exact) == pytest.approx({"rms": 0.5**0.5, "max": 1.0})


def step(layers: int, seconds: float, memory: float) -> dict:
    laps = [2 * seconds, seconds, 0.5 * seconds]
    return {"laps": laps, "flops": 1e12, "layers": layers, "remark": "x", "memory_gb": memory, "machine": "M"}


def test_the_report_takes_medians_and_the_measured_peak():
    peak = {"laps": [1.0, 0.5, 9.0], "flops": 4e12, "remark": "", "memory_gb": 1.0, "machine": "M"}
    found = {"matmul_peak": peak, "zero3_step.4": step(4, 1, 10), "zero3_step.8": step(8, 2, 14)}
    found |= {"zero3_step.16": {"fault": "out of memory"}, "edit.480p": step(0, 2.0, 3) | {"steps": 4}}
    text = gpu.report(found, 40)
    assert text.splitlines()[0] == "M"
    assert "| `zero3_step.4` | 1 | 0.5 .. 2 |  | 1 | 25.0% | 10.0 | x |" in text
    assert "| `edit.480p` | 2 | 1 .. 4 | 4 take 8 | 0.5 | 12.5% | 3.0 | x |" in text
    assert "| `zero3_step.16` | | | | | | | out of memory |" in text
    assert "| `zero3_step.40` | 10 | | | | | 46.0 | not measured: a line through 4, 8 layers, 0 + 0.25" in text
    alone = gpu.report({"zero3_step.4": found["zero3_step.4"]}, 40)
    assert "zero3_step.40" not in alone and "| 1 |  | 10.0 |" in alone


# ------------------------------------------------------------------------------------------------ the processes


def starved(*_) -> dict:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 457 GiB. | GPU 0")


def test_too_little_memory_is_told():
    result = gpu.attempt(starved)
    assert result["fault"] == "out of memory: CUDA out of memory" and result["machine"] == gpu.machine()


def test_a_clip_that_does_not_fit_is_shortened():
    met = []

    def work(frames: int) -> dict:
        met.append(frames)
        return {"T": frames} if frames <= 25 else starved()

    assert gpu.first_that_fits((81, 49, 25, 9), work) == {"T": 25} and met == [81, 49, 25]
    with pytest.raises(torch.OutOfMemoryError):
        gpu.first_that_fits((81, 49), starved)


@pytest.mark.parametrize(
    ("script", "result"),
    [
        ("echo noise; echo '{\"laps\": [1]}'; echo farewell", {"laps": [1]}),
        ("echo '{}'; exit 3", {"fault": "ended with exit code 3"}),
        ("kill -9 $$", {"fault": "ended with exit code -9"}),
    ],
)
def test_a_case_that_dies_is_told(tmp_path, monkeypatch, script, result):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(program))
    assert gpu._alone("lora_step", quick=False) == result


def test_each_case_is_written_at_once_and_none_stops_the_others(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "gpu.json"
    seen = []

    def alone(name: str, quick: bool) -> dict:
        seen.append(json.loads(out.read_text()) if out.is_file() else {})
        return {"fault": "out of memory"} if name.endswith("16") else step(int(name.split(".")[1]), 1, 1)

    monkeypatch.setattr(gpu, "_alone", alone)
    names = [name for name in gpu.cases(gpu.REAL) if gpu.part_of(name) == "zero3_step"]
    assert gpu.measure(names[::-1], gpu.REAL, out, quick=False) == 1
    assert [[*each] for each in seen] == [[], names[2:], names[:0:-1]]
    assert gpu.measure(["zero3_step.8"], gpu.REAL, out, quick=False) == 0
    assert set(json.loads(out.read_text())) == set(names)
    printed = capsys.readouterr().out
    assert printed.count("`zero3_step.16` | | | | | | | out of memory") == 2 and "`zero3_step.40` | 1 " in printed
    assert gpu.measure(["zero3_step.8"], gpu.REAL, tmp_path / "none.json", quick=True) == 0
    assert not (tmp_path / "none.json").exists()


def test_without_a_gpu_only_a_look_is_possible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu.sys, "argv", ["gpu"])
    with pytest.raises(ConfigError, match="no GPU"):
        gpu.main()
    monkeypatch.setattr(gpu.sys, "argv", ["gpu", "--parts", "edit,rolout"])
    with pytest.raises(ConfigError, match="rolout"):
        gpu.main()
