"""What we ship is what we trained: a run's weights and adapters, out of stock diffusers, in every form."""

import ast
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import stock_bars
import stock_edit
import torch
from builders import shared_wan_folder
from diffusers import ChronoEditPipeline, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_recipes import flow_matching, samples
from test_shards import write as write_shards

from v4e import cli, export, provenance
from v4e.config import Loop, Lora, Wandb
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.export import export_run
from v4e.models.lora import in_authors_words, in_diffusers_words
from v4e.nouns import Optim
from v4e.pipelines import Card, EditPipeline
from v4e.provenance import COMFYUI, identity
from v4e.train.run import train_recipe

NAME = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
BAR = 1e-5  # of 1: adapters beside the weights against adapters added to them


def a_run(path: Path, kind: str = "i2v", *, average: bool = True, **settings: str) -> Path:
    """A finished run: last weights and averages, each the base's weights moved a little."""
    base = shared_wan_folder(kind)
    checkpoint, weights = path / "checkpoints/step_0000002", path / "weights/student"
    checkpoint.mkdir(parents=True)
    weights.mkdir(parents=True)
    (checkpoint / "COMPLETE.json").write_text("{}")
    config = {"student": str(base), "shift": "5.0", "loop.data": "nowhere"} | settings
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "data": "", "config": config}))
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
    out = export_run(a_run(tmp_path / "run"), tmp_path / "student", dtype=torch.float32)
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


def test_frames_that_stand_apart_are_exported_for_chronoedit(tmp_path):
    run = a_run(tmp_path / "run", temporal_skip="3")
    out = export_run(run, tmp_path / "student", dtype=torch.float32)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "ChronoEditPipeline" and "transformer_2" not in index
    assert index["transformer"] == ["diffusers", "ChronoEditTransformer3DModel"]
    assert "from diffusers import ChronoEditPipeline" in (out / "README.md").read_text()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    stock = ChronoEditPipeline.from_pretrained(out)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        image, "snow", height=32, width=32, num_inference_steps=3, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(4),
    ).frames[0]  # fmt: skip
    ours = EditPipeline.from_pretrained(out, attention="native")
    made = ours(image, "snow", seed=4, steps=3, guidance=1.0, return_frames=True).frames_T3HW
    assert torch.equal(made, torch.from_numpy((theirs * 255).round().astype(np.uint8)).movedim(-1, 1))
    near = EditPipeline.from_pretrained(export_run(a_run(tmp_path / "near"), tmp_path / "stock", dtype=torch.float32))
    assert not torch.equal(made, near(image, "snow", seed=4, steps=3, guidance=1.0, return_frames=True).frames_T3HW)
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/model_index.json").read_text())["_class_name"] == "ChronoEditPipeline"


@pytest.mark.parametrize("form", ["lora", "original"])
def test_a_form_that_cannot_say_that_frames_stand_apart_is_refused(tmp_path, form):
    with pytest.raises(ConfigError, match=f"stand apart .*which {form} cannot say"):
        export_run(a_run(tmp_path / "run", temporal_skip="3"), tmp_path / "student", form=form)
    assert not (tmp_path / "student").exists()


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
    export_run(run, tmp_path / "student", weights="last")
    (tmp_path / ".student.old/transformer").mkdir(parents=True)  # of an export that was killed before it tidied up
    export_run(run, tmp_path / "student", weights="average", dtype=torch.float32)
    assert load_file(tmp_path / "student/transformer" / NAME)["proj_out.weight"].dtype == torch.float32
    (tmp_path / "precious").mkdir()
    with pytest.raises(CheckpointError, match="precious"):
        export_run(run, tmp_path / "precious")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "run", "student"]


def test_a_full_disk_is_a_sentence(tmp_path):
    """A limit on the size of files stands for it; what copies a folder collects errors and has no number."""
    run, before = a_run(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(DataError, match="the disk is full"):
            export_run(run, tmp_path / "student")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        out = export_run(a_run(tmp_path / "run"), tmp_path / "student")
    finally:
        os.umask(before)
    modes = {p.relative_to(out): p.stat().st_mode & 0o777 for p in (out / "transformer").iterdir()}
    assert modes == {Path("transformer/config.json"): mode, Path("transformer") / NAME: mode}


def test_other_frames_are_an_error_and_leave_nothing(tmp_path, monkeypatch):
    """A stock pipeline that reads other weights than were trained."""
    real = export._in_memory

    def scaled(making, state):
        return real(making, {name: t * 1.5 for name, t in state.items()})

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


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (7e4, torch.float16)], ids=["nan", "overflow"])
def test_weights_that_are_not_finite_are_no_export(tmp_path, value, dtype):
    """Their frames would agree, as all are black."""
    run = a_run(tmp_path / "run", average=False)
    file = run / "weights/student/weights.safetensors"
    save_file(load_file(file) | {"proj_out.bias": torch.full((4 * 4,), value)}, file)
    with pytest.raises(CheckpointError, match=r"1 tensors are not finite as \w+: proj_out.bias"):
        export_run(run, tmp_path / "out", dtype=dtype)


def test_a_run_that_does_not_say_its_base_asks_for_one(tmp_path):
    run = a_run(tmp_path / "run", student="")
    with pytest.raises(ConfigError, match="--base"):
        export_run(run, tmp_path / "out")
    assert export_run(run, tmp_path / "out", base=str(shared_wan_folder("i2v"))).is_dir()


@pytest.mark.parametrize("form", ["diffusers", "lora", "original"])
def test_a_base_that_is_a_transformer_alone_says_what_is_wanted(tmp_path, lora_run, form):
    """As the release of Fun-InP is; named by the run, in the authors' words."""
    run = lora_run if form == "lora" else a_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="--base; docs/loading.md says how a transformer alone becomes one"):
        export_run(run, tmp_path / "out", form=form, base=str(shared_wan_folder("i2v") / "transformer"))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- variant


def test_both_are_the_last_weights_and_the_averages_as_diffusers_variant(tmp_path):
    out = export_run(a_run(tmp_path / "run"), tmp_path / "student", weights="both", dtype=torch.float32)
    stored = {
        variant: WanTransformer3DModel.from_pretrained(out / "transformer", variant=variant).state_dict()
        for variant in (None, "ema")
    }
    base = load_file(shared_wan_folder("i2v") / "transformer" / NAME)
    for variant, moved in ((None, 1.01), ("ema", 1.02)):
        assert all(torch.equal(stored[variant][k], t * moved) for k, t in base.items())
    pipe = WanImageToVideoPipeline.from_pretrained(out, variant="ema")
    assert torch.equal(pipe.transformer.proj_out.weight, base["proj_out.weight"] * 1.02)
    assert "(last, and as variant ema averaged weights)" in (out / "README.md").read_text()


def test_averages_that_were_not_kept_are_not_made_up(tmp_path):
    run = a_run(tmp_path / "run", average=False)
    for weights in ("average", "both"):
        with pytest.raises(CheckpointError, match=r"kept no averages.*loop.ema"):
            export_run(run, tmp_path / "out", weights=weights)
    with pytest.raises(ConfigError, match="variants are diffusers'"):
        export_run(a_run(tmp_path / "other"), tmp_path / "out", form="original", weights="both")


# ------------------------------------------------------------------------------------------------------- original


@pytest.mark.parametrize("size", [None, "20KB"], ids=["one file", "shards"])
def test_the_authors_names_of_a_run(tmp_path, size):
    """Read back by diffusers' own loader of single files, to the bit."""
    run = a_run(tmp_path / "run")
    out = export_run(run, tmp_path / "original", form="original", dtype=torch.float32, shard_size=size)
    files = sorted(out.glob("*.safetensors"))
    assert [f.name for f in files] == [NAME] if size is None else len(files) > 2
    state = {name: t for file in files for name, t in load_file(file).items()}
    trained = load_file(run / "weights/student/average.safetensors")
    assert torch.equal(state["blocks.1.self_attn.q.weight"], trained["blocks.1.attn1.to_q.weight"])
    assert len(state) == len(trained)
    single = tmp_path / "single.safetensors"
    save_file(state, single)
    folder = str(shared_wan_folder("i2v"))
    stock = WanTransformer3DModel.from_single_file(str(single), config=folder, subfolder="transformer").state_dict()
    assert all(torch.equal(stock[k], t) for k, t in trained.items())
    assert ("from_single_file" in (out / "README.md").read_text()) == (size is None)


def test_a_teacher_under_the_authors_names(tmp_path):
    """FLF2V's positions, which diffusers' mapping passes over, are in the file and in the comparison."""
    run = a_run(tmp_path / "run", "flf2v", init=str(shared_wan_folder("flf2v")), student="")
    out = export_run(run, tmp_path / "original", form="original", dtype=torch.float32)
    trained = load_file(run / "weights/student/average.safetensors")
    assert torch.equal(load_file(out / NAME)["img_emb.emb_pos"], trained[export.POSITIONS])
    assert json.loads((out / "config.json").read_text())["model_type"] == "flf2v"


def test_a_file_that_stock_reads_otherwise_is_an_error(tmp_path, monkeypatch):
    """Two layers of the same shape under each other's names: diffusers loads it, and makes other frames."""
    real = export.save_original

    def swapped(folder, config, state, size):
        a, b = "blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_v.weight"
        real(folder, config, state | {a: state[b] * 3, b: state[a]}, size)

    monkeypatch.setattr(export, "save_original", swapped)
    with pytest.raises(CheckpointError, match="other frames"):
        export_run(a_run(tmp_path / "run"), tmp_path / "out", form="original")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Slice:
    samples: tuple
    weights: tuple = (1.0, 1.0)
    positions: tuple = (0, 1)


class Samples:
    """The same two samples at every step."""

    quarantined: dict = {}

    def step(self, step: int) -> list[Slice]:
        return [Slice(tuple(samples(2)), positions=(2 * step, 2 * step + 1))]


def train_lora(folder: Path, **lora) -> Path:
    """Four steps of adapters with averages, under ZeRO-3."""
    settings = {"precision": "fp32", "ema": 0.5, "wandb": Wandb("disabled"), "threads": 1, "log_every": 4}
    loop = Loop(str(folder), steps=4, batch=2, micro_batch=2, lora=Lora(**lora), **settings)
    recipe = flow_matching(zero_stage=3, optim=Optim(lr=0.05), loop=loop)
    train_recipe(recipe, lambda rank, world: Samples())
    return folder


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    """Adapters in all blocks, with a scale that is no power of two."""
    return train_lora(tmp_path_factory.mktemp("lora") / "run", rank=3, scale=0.7)


def adapters_of(run: Path, stem: str = "average") -> dict[str, torch.Tensor]:
    return load_file(run / f"weights/student/adapters/{stem}.safetensors")


def test_adapters_are_written_alone_as_well(lora_run):
    """weights = base + scale * up @ down, of the last weights and of the averages."""
    base = load_file(shared_wan_folder("i2v") / "transformer" / NAME)
    for stem in ("weights", "average"):
        whole, alone = load_file(lora_run / f"weights/student/{stem}.safetensors"), adapters_of(lora_run, stem)
        layers = {name.rpartition(".lora_")[0] for name in alone}
        assert len(layers) == 3 * 12  # blocks, with 4 + 6 layers of attention and 2 of the network behind it
        assert len(alone) == 2 * len(layers)
        for layer in layers:
            up, down = alone[f"{layer}.lora_B.weight"], alone[f"{layer}.lora_A.weight"]
            assert down.shape[0] == up.shape[1] == 3 and up.abs().max() > 0
            torch.testing.assert_close(whole[f"{layer}.weight"], base[f"{layer}.weight"] + 0.7 * up @ down)
    assert not torch.equal(up, adapters_of(lora_run, "weights")[f"{layer}.lora_B.weight"])


def floats(model: Path, lora: Path | None = None, file: str | None = None) -> np.ndarray:
    """Frames in [0, 1] by the script that knows no v4e."""
    pipe = stock_edit.open_pipeline(str(model), str(lora) if lora else None, file)
    card = {"sizes": [[32, 32]], "frames": 5, "steps": 3, "guidance": 1.0}
    return stock_edit.edit(pipe, card, picture(), "snow", None, seed=4)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def lora(lora_run, tmp_path_factory) -> Path:
    """The averaged adapters, exported."""
    return export_run(lora_run, tmp_path_factory.mktemp("lora") / "out", form="lora")


def test_adapters_in_stock_diffusers_make_v4es_frames(lora_run, lora, tmp_path):
    """v4e = stock to the bit with the whole weights; these and base plus adapters, in either file, within the bar."""
    whole, base = export_run(lora_run, tmp_path / "whole", dtype=torch.float32), shared_wan_folder("i2v")
    wanted, beside = floats(whole), floats(base, lora)
    assert np.array_equal(frames_of_v4e(whole), (wanted * 255).round().astype(np.uint8))
    assert np.array_equal(frames_of_v4e(base, lora), (beside * 255).round().astype(np.uint8))
    assert np.abs(beside - wanted).max() < BAR
    assert np.abs(floats(base, lora, COMFYUI) - wanted).max() < BAR
    assert np.abs(floats(base) - wanted).max() > 100 * BAR  # adapters change more than the bar


def frames_of_v4e(model: Path, lora: Path | None = None) -> np.ndarray:
    editor = EditPipeline.from_pretrained(model, attention="native")
    if lora:
        editor.load_lora_weights(lora)
        editor.scheduler = UniPCMultistepScheduler.from_pretrained(lora, subfolder="scheduler")
    clip = editor(picture(), "snow", seed=4, steps=3, guidance=1.0, frames=5, return_frames=True)
    return clip.frames_T3HW.movedim(1, -1).numpy()


def test_last_and_averaged_adapters(lora_run, lora, tmp_path):
    """The exported tensors are those trained: down as it is, up times the scale."""
    last = export_run(lora_run, tmp_path / "last", form="lora", weights="last")
    for out, stem in ((last, "weights"), (lora, "average")):
        stored, trained = load_file(out / LORA), adapters_of(lora_run, stem)
        for name, tensor in trained.items():
            wanted = 0.7 * tensor if "lora_B" in name else tensor
            assert torch.equal(stored[f"transformer.{name}"], wanted)
        assert len(stored) == len(trained)


def test_diffusers_own_converter_reads_the_authors_names(lora):
    authors, ours = load_file(lora / COMFYUI), load_file(lora / LORA)
    assert authors["diffusion_model.blocks.0.self_attn.q.alpha"].item() == pytest.approx(0.7 * 3)
    converted = _convert_non_diffusers_wan_lora_to_diffusers(dict(authors))
    assert converted.keys() == ours.keys()
    for name in (n for n in ours if "lora_A" in n):
        up = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(converted[up] @ converted[name], ours[up] @ ours[name], rtol=1e-6, atol=1e-8)


def test_names_of_adapters_by_hand():
    """Layers of both kinds, and the scale where each reader looks for it."""
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    layers = ("blocks.7.attn2.add_k_proj", "blocks.7.ffn.net.0.proj", "proj_out")
    adapters = {f"{layer}.lora_{half}.weight": t for layer in layers for half, t in (("A", down), ("B", up))}
    found = in_authors_words(adapters, 0.5)
    inside = ("diffusion_model.blocks.7.cross_attn.k_img", "diffusion_model.blocks.7.ffn.0")
    outside = "diffusion_model.head.head"
    leaves = ("lora_down.weight", "lora_up.weight")
    assert found.keys() == {f"{o}.{leaf}" for o in (*inside, outside) for leaf in leaves} | {
        f"{o}.alpha" for o in inside
    }
    assert found[f"{inside[0]}.alpha"].item() == 0.5 and found[f"{inside[0]}.alpha"].ndim == 0
    assert torch.equal(found[f"{inside[0]}.lora_up.weight"], up)
    assert torch.equal(found[f"{outside}.lora_up.weight"], 0.5 * up)
    stored = in_diffusers_words(adapters, 0.5)
    assert torch.equal(stored["transformer.proj_out.lora_B.weight"], 0.5 * up)
    assert torch.equal(stored["transformer.proj_out.lora_A.weight"], down)


@pytest.mark.slow
def test_every_linear_layer_may_have_adapters(tmp_path):
    out = export_run(a_run_of_adapters(tmp_path / "run", lambda name: True), tmp_path / "lora", form="lora")
    names = {name.removeprefix("diffusion_model.") for name in load_file(out / COMFYUI)}
    assert {"head.head.lora_up.weight", "time_projection.1.lora_down.weight", "img_emb.proj.3.lora_up.weight"} <= names


def test_layers_that_diffusers_does_not_convert_are_an_error(tmp_path):
    """Its converter takes adapters on the image's keys only together with those on its values."""
    run = a_run_of_adapters(tmp_path / "run", lambda name: "add_k_proj" in name)
    with pytest.raises(CheckpointError, match=r"lora_comfyui.safetensors: stock diffusers does not load it"):
        export_run(run, tmp_path / "out", form="lora")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def a_run_of_adapters(path: Path, has: Callable[[str], bool]) -> Path:
    """A finished run of untrained adapters on the matrices that ``has`` says."""
    run = a_run(path, average=False, **{"loop.lora.scale": "0.5"})
    state = load_file(shared_wan_folder("i2v") / "transformer" / NAME)
    generator, adapters = torch.Generator().manual_seed(0), {}
    for name in [n for n, t in state.items() if t.ndim == 2 and has(n)]:
        layer, (outwards, inwards) = name.removesuffix(".weight"), state[name].shape
        down, up = (torch.randn(size, generator=generator) / 8 for size in ((2, inwards), (outwards, 2)))
        adapters |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        state[name] = state[name] + 0.5 * up @ down
    save_file(state, run / "weights/student/weights.safetensors")
    (run / "weights/student/adapters").mkdir()
    save_file(adapters, run / "weights/student/adapters/weights.safetensors")
    return run


def test_adapters_of_other_values_are_an_error(lora_run, tmp_path, monkeypatch, capsys):
    """A file whose scale was forgotten; by the command, with its exit code."""
    monkeypatch.setattr(export, "in_diffusers_words", lambda adapters, scale: in_diffusers_words(adapters, 30.0))
    assert cli.main(["export", str(lora_run), str(tmp_path / "out"), "--form", "lora"]) == CheckpointError.exit_code
    assert "stock diffusers makes other frames of the export" in capsys.readouterr().err.strip().splitlines()[-1]
    assert [*tmp_path.iterdir()] == []


def test_adapters_belong_to_the_base_they_were_trained_on(lora_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"frozen tensors are not the base's"):
        export_run(lora_run, tmp_path / "out", form="lora", base=str(shared_wan_folder("i2v", 1)))
    with pytest.raises(CheckpointError, match=r"1 unexpected \(condition_embedder.image_embedder.pos_embed\)"):
        export_run(lora_run, tmp_path / "out", form="lora", base=str(shared_wan_folder("flf2v")))
    with pytest.raises(ConfigError, match=r"trained no adapters.*loop.lora.rank"):
        export_run(a_run(tmp_path / "run"), tmp_path / "out", form="lora")


# --------------------------------------------------------------------------------------------------------- README


def test_the_readme_says_where_it_comes_from(tmp_path):
    shards = write_shards(tmp_path / "shards", 7)
    base = shared_wan_folder("i2v")
    run = a_run(
        tmp_path / "lab/run",
        **{"loop.data": str(shards.folder), "loop.batch": "4", "teacher": "Wan-AI/none"},
        **{"loop.wandb.name": "hf_abcdefghijklmnopqrstuv"},
    )
    report = {"methods": {"student": {"4": {"overall": {"psnr": 24.831, "ssim": None, "n": 66, "spread": {}}}}}}
    (tmp_path / "lab/report.json").write_text(json.dumps(report))
    card = ModelCard.load(export_run(run, tmp_path / "out", base_model="Wan-AI/Wan2.1") / "README.md")
    front = card.data.to_dict()
    assert (front["license"], front["base_model"]) == ("apache-2.0", "Wan-AI/Wan2.1")
    assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "image-to-image")
    assert front["base_model_relation"] == "finetune"
    assert f"| student | `{base}` | {identity(str(base))} |" in card.text
    assert "| teacher | `Wan-AI/none` | not at hand |" in card.text
    assert f"| shards | `{shards.folder}` | manifest {shards.identity}, 7 samples |" in card.text
    assert json.loads((tmp_path / "out/v4e.json").read_text())["sizes"] == [[16, 16]]
    assert "2 steps of 4 samples." in card.text
    assert "| method | solver steps | psnr |\n| --- | --- | --- |\n| student | 4 | 24.83 |" in card.text
    assert "| `shift` | `5.0` |" in card.text and "| `loop.wandb.name` | `***` |" in card.text
    assert "\n# out\n" in card.text


def test_the_sets_of_a_mixture_and_what_became_of_them(tmp_path):
    sets = [write_shards(tmp_path / name, number) for name, number in (("a", 3), ("b", 4))]
    shares = str([{"path": str(s.folder), "weight": 2.0} for s in sets] + [{"path": "gone", "weight": 0.5}])
    remembered = f"1/2 of {sets[0].identity} and 1/2 of 0123"
    about = provenance.Provenance(
        "it", tmp_path, "x", "", "last", 1, remembered, {"loop.data": "", "loop.mixture": shares}
    )
    text = about.readme("diffusers", Card(), sees_both_ends=False, sharded=False)
    assert f"| shards, weight 2 | `{sets[0].folder}` | manifest {sets[0].identity}, 3 samples |" in text
    assert f"| shards, weight 2 | `{sets[1].folder}` | manifest" in text
    assert f"manifest {remembered}, since changed to {sets[1].identity} |" in text
    assert f"| shards, weight 0.5 | `gone` | manifest {remembered}, no longer at hand |" in text


def test_an_identity_changes_with_any_byte_of_the_weights(tmp_path):
    folder = tmp_path / "model/transformer"
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(4)}, folder / NAME)
    before = identity(str(tmp_path / "model"))
    assert before.startswith("blake2b ") and len(before) == len("blake2b ") + 16
    assert identity(str(folder)) == identity(str(folder / NAME)) == before
    save_file({"a": torch.tensor([0, 0, 0, 1e-30])}, folder / NAME)
    assert identity(str(folder)) != before
    assert identity("Wan-AI/none") == ""


def test_a_hub_base_is_named_and_told_by_its_commit(tmp_path, monkeypatch):
    cached = "/cache/models--Wan-AI--Wan2.1/snapshots/0123abc/transformer/config.json"
    monkeypatch.setattr(provenance, "try_to_load_from_cache", lambda name, file: cached if "transf" in file else None)
    about = provenance.Provenance("it", tmp_path, "Wan-AI/Wan2.1", "", "last", 1, "", {"init": "Wan-AI/Wan2.1"})
    text = about.readme("lora", Card(), sees_both_ends=False, sharded=False)
    front = text.split("---")[1]
    assert "base_model: Wan-AI/Wan2.1\n" in front and "base_model_relation: adapter\n" in front
    assert "| init | `Wan-AI/Wan2.1` | commit 0123abc |" in text
    assert 'pipe.load_lora_weights("THIS_FOLDER")' in text


def test_the_licence_and_base_of_a_local_base_are_its_own(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: Wan-AI/Wan2.1\n---\n# Mine\n")
    about = provenance.Provenance("it", tmp_path, str(tmp_path), "", "last", 1, "", {})
    front = about.readme("diffusers", Card(), sees_both_ends=True, sharded=False).split("---")[1]
    assert "license: mit" in front and "base_model: Wan-AI/Wan2.1" in front and "image-to-video" in front


def test_what_is_no_report_is_named(tmp_path):
    (tmp_path / "report.json").write_text('{"methods": {"student": {"4": 3}}}')
    about = provenance.Provenance("it", tmp_path, "x", "", "last", 1, "", {})
    with pytest.raises(DataError, match=r"report.json: no report of v4e's.*--report"):
        about.readme("diffusers", Card(), sees_both_ends=False, sharded=False)
    (tmp_path / "report.json").write_text('{"coverage": 3}')
    assert "Measured" not in about.readme("diffusers", Card(), sees_both_ends=False, sharded=False)


# ---------------------------------------------------------------------------------------------------- without v4e


def test_the_stock_script_knows_no_v4e():
    tree = ast.parse(Path(stock_edit.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert not [m for m in modules if m.split(".")[0] in ("v4e", "data_tools", "builders")]


@pytest.mark.slow
def test_the_embedded_student_in_stock_diffusers(tmp_path):
    assert stock_bars.pixels_that_differ(stock_bars.NANO / "student", tmp_path) == 0


@pytest.mark.slow
def test_adapters_of_wan_nano_trained_on_two_ranks(tmp_path):
    """configs/nano/video4edit.yaml under ZeRO-3 in bf16: its averages, exported and run without v4e."""
    found = stock_bars.adapters_of_nano(tmp_path)
    assert all(found[file] < BAR for file in (LORA, COMFYUI))
    assert found["no adapters"] > 100 * BAR
    assert stock_bars.pixels_that_differ(tmp_path / "diffusers", tmp_path) == 0
    last, averages = adapters_of(tmp_path / "run", "weights"), adapters_of(tmp_path / "run")
    assert all(t.abs().max() > 0 for t in last.values())
    assert not all(torch.equal(t, last[name]) for name, t in averages.items())
