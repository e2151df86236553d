"""Wan under its authors' names: read, written, and refused when it is not what it says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import WAN, Kind, shared_wan_folder, transformer
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file

from v4e.errors import CheckpointError
from v4e.models import folder as folders
from v4e.models.original import (
    POSITIONS,
    authors_config,
    authors_names,
    diffusers_config,
    diffusers_names,
    released_config,
    save_original,
)
from v4e.models.wan import WanBackbone, declare, load_backbone
from v4e.pipelines import EditPipeline

KINDS: tuple[Kind, ...] = ("i2v", "flf2v")
NAME = "diffusion_pytorch_model.safetensors"


def stock_state(kind: Kind) -> dict[str, torch.Tensor]:
    return load_file(shared_wan_folder(kind) / "transformer" / NAME)


def original(path: Path, kind: Kind = "i2v", change=lambda tensors: tensors, **sizes: str) -> Path:
    """The shared model as its authors would have written it, its tensors gone through ``change``."""
    save_original(path, transformer(kind).config, stock_state(kind), **sizes)
    if not sizes:
        save_file(change(load_file(path / NAME)), path / NAME)
    return path


def parameters(source: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in declare(source).weights() if not name.startswith("rope.")}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(t.dtype == wanted[n].dtype and torch.equal(t, wanted[n]) for n, t in found.items())


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("sizes", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_to_original_to_v4e_to_diffusers_bitwise(tmp_path, kind, sizes):
    source = original(tmp_path / "original", kind, **sizes)
    assert (len(list(source.glob("*.safetensors"))) > 1) == bool(sizes)
    ours = load_backbone(source, attention="native")
    ours.save_stock(tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / NAME), stock_state(kind))
    assert isinstance(WanTransformer3DModel.from_pretrained(tmp_path / "back"), WanTransformer3DModel)
    for word, value in WAN.items():
        assert word == "rope_max_seq_len" or ours.config[word] == value, word  # the authors' code has 1024, always


def test_names_are_those_that_the_authors_wrote():
    """A few, by hand: names of the published checkpoints."""
    pairs = {
        "blocks.7.self_attn.q.weight": "blocks.7.attn1.to_q.weight",
        "blocks.7.self_attn.o.bias": "blocks.7.attn1.to_out.0.bias",
        "blocks.7.self_attn.norm_k.weight": "blocks.7.attn1.norm_k.weight",
        "blocks.7.cross_attn.k_img.weight": "blocks.7.attn2.add_k_proj.weight",
        "blocks.7.cross_attn.norm_k_img.weight": "blocks.7.attn2.norm_added_k.weight",
        "blocks.7.norm3.weight": "blocks.7.norm2.weight",
        "blocks.7.ffn.0.weight": "blocks.7.ffn.net.0.proj.weight",
        "blocks.7.modulation": "blocks.7.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head.bias": "proj_out.bias",
        "img_emb.proj.4.weight": "condition_embedder.image_embedder.norm2.weight",
        "img_emb.emb_pos": POSITIONS,
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
        "patch_embedding.weight": "patch_embedding.weight",
    }
    assert diffusers_names(pairs.keys()) == pairs
    assert authors_names(pairs.values()) == {new: old for old, new in pairs.items()}
    prefixed = {f"model.diffusion_model.{old}": new for old, new in pairs.items()}
    assert diffusers_names(prefixed.keys()) == prefixed
    assert diffusers_names(pairs.values()) == {name: name for name in pairs.values()}


def test_what_we_write_is_what_diffusers_own_loader_reads(tmp_path):
    written = load_file(original(tmp_path) / NAME)
    assert_same(convert_wan_transformer_to_diffusers(dict(written)), stock_state("i2v"))
    stock = WanTransformer3DModel.from_single_file(
        str(tmp_path / NAME), config=str(shared_wan_folder("i2v")), subfolder="transformer"
    )
    assert_same({n: p.detach() for n, p in stock.named_parameters()}, stock_state("i2v"))


def test_a_name_that_the_authors_do_not_have_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"1 tensors that Wan2.1 has not: blocks.0.attn1.to_z.weight"):
        save_original(tmp_path, WAN, {"blocks.0.attn1.to_z.weight": torch.zeros(1)})


# --------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_the_same_in_both_words(kind):
    config = dict(transformer(kind).config)
    again = diffusers_config(json.loads(json.dumps(authors_config(config))))
    assert {word: again[word] for word in (*WAN, "pos_embed_seq_len") if word != "rope_max_seq_len"} == {
        word: config[word] for word in (*WAN, "pos_embed_seq_len") if word != "rope_max_seq_len"
    }
    assert authors_config(config)["model_type"] == kind


def test_configs_of_other_models_and_broken_ones_are_refused():
    whole = authors_config(dict(transformer("i2v").config))
    with pytest.raises(CheckpointError, match="Wan's vace, which v4e does not run"):
        diffusers_config(whole | {"model_type": "vace"})
    with pytest.raises(CheckpointError, match="has no dim, ffn_dim"):
        diffusers_config({word: v for word, v in whole.items() if word not in ("dim", "ffn_dim")})


def test_a_file_without_a_config_must_be_of_a_released_size(tmp_path):
    lone = tmp_path / "lone.safetensors"
    shutil.copy(original(tmp_path / "whole") / NAME, lone)
    with pytest.raises(CheckpointError, match="no released Wan is 24 wide.*config.json beside"):
        declare(lone)
    shapes = {"patch_embedding.weight": torch.Size([5120, 36, 1, 2, 2]), POSITIONS: torch.Size([1, 514, 1280])}
    found = released_config(shapes, "x")
    assert (found["num_layers"], found["pos_embed_seq_len"], found["image_dim"]) == (40, 514, 1280)


# --------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("where", ["folder", "file", "prefixed file", "diffusers folder", "transformer alone"])
def test_every_way_to_name_a_source(tmp_path, where):
    source = original(tmp_path / "original")
    if where == "file":
        source = source / NAME
    if where == "prefixed file":
        source = (source / NAME).rename(source / "comfy.safetensors")
        save_file({f"model.diffusion_model.{n}": t for n, t in load_file(source).items()}, source)
    if where == "diffusers folder":  # the authors' tensors under diffusers' config
        (tmp_path / "pipeline").mkdir()
        source = source.rename(tmp_path / "pipeline/transformer").parent
        shutil.copy(shared_wan_folder("i2v") / "transformer/config.json", source / "transformer")
    if where == "transformer alone":
        source = shared_wan_folder("i2v") / "transformer"
    assert_same(parameters(source), stock_state("i2v"))


def test_a_hub_repository_is_asked_for_its_transformer_alone(tmp_path, monkeypatch):
    """Of Wan's own layout: config first, weights when they are asked for, and never its pickles."""
    store, cache, asked = original(tmp_path / "store"), tmp_path / "cache", []
    (store / "Wan2.1_VAE.pth").write_bytes(b"pickle")

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        cache.mkdir(exist_ok=True)
        for file in {file for pattern in allow_patterns for file in store.glob(pattern)}:
            shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(folders, "snapshot_download", snapshot_download)
    declared = declare("Wan-AI/Wan2.1-I2V-14B-720P")
    assert [file.name for file in cache.iterdir()] == ["config.json"]
    assert isinstance(declared.build(), WanBackbone)
    assert_same({n: t for n, t in declared.weights() if "rope" not in n}, stock_state("i2v"))
    assert sorted(file.name for file in cache.iterdir()) == ["config.json", NAME]
    assert len(asked) == 2


def test_a_transformer_alone_and_the_parts_of_another_model_make_a_stock_folder(tmp_path):
    """As docs/loading.md does with Fun-InP, whose release holds its encoders as pickles."""
    parts = shutil.copytree(shared_wan_folder("i2v"), tmp_path / "parts", ignore=lambda *_: ["transformer"])
    other = {name: 1.01 * t for name, t in stock_state("i2v").items()}
    save_original(tmp_path / "fun", transformer("i2v").config, other)
    whole = tmp_path / "whole"
    backbone = load_backbone(tmp_path / "fun", attention="native")
    EditPipeline.from_pretrained(parts, transformer=backbone).save_pretrained(whole)
    assert_same(load_file(whole / "transformer" / NAME), other)
    stock = WanImageToVideoPipeline.from_pretrained(whole)
    ours = EditPipeline.from_pretrained(whole, attention="native")
    photo = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    clip = ours(photo, "make it snow", seed=2, steps=2, guidance=1.0, frames=5, return_frames=True)
    asked = {"num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "generator": torch.manual_seed(2)}
    made = stock(photo, "make it snow", height=32, width=32, output_type="pt", **asked).frames[0]
    assert torch.equal(clip.frames_T3HW, (made * 255).round().to(torch.uint8))


def test_flf2v_under_original_names_becomes_i2v(tmp_path):
    source = original(tmp_path, "flf2v")
    i2v = declare(source, kind="i2v")
    assert {n for n, _ in declare(source).weights()} - {n for n, _ in i2v.weights()} == {POSITIONS}


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_wrong_checkpoint_is_refused_with_what_is_wrong(tmp_path):
    def change(tensors):
        tensors["head.head.bias"] = torch.zeros(3)
        del tensors["blocks.0.ffn.2.bias"], tensors["blocks.1.cross_attn.k_img.weight"]
        return tensors | {"face_adapter.fuser_blocks.0.linear1_kv.weight": torch.zeros(2, 2)}

    with pytest.raises(CheckpointError) as error:
        dict(declare(original(tmp_path, change=change)).weights())
    told = str(error.value)
    assert "2 missing (blocks.0.ffn.net.2.bias, blocks.1.attn2.add_k_proj.weight)" in told
    assert "1 unexpected (face_adapter.fuser_blocks.0.linear1_kv.weight)" in told
    assert "1 of another shape (proj_out.bias [3] for [16])" in told


def test_an_index_that_promises_more_than_the_shards_hold(tmp_path):
    index = original(tmp_path, max_shard_size="20KB") / f"{NAME}.index.json"
    written = json.loads(index.read_text())
    shard = tmp_path / written["weight_map"]["head.modulation"]
    save_file({n: t for n, t in load_file(shard).items() if n != "head.modulation"}, shard)
    with pytest.raises(CheckpointError, match=r"1 missing \(scale_shift_table\)"):
        parameters(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing shards: {shard.name}"):
        parameters(tmp_path)
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match="unreadable index"):
            parameters(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "wan.pth", "wan.ckpt"])
def test_pickles_are_never_read(tmp_path, name):
    source = original(tmp_path)
    (source / NAME).unlink()
    torch.save(torch.zeros(1), source / name)
    for place in (source, source / name):
        with pytest.raises(CheckpointError, match="a pickle, which may run code.*docs/loading.md"):
            dict(declare(place).weights())


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_loading_takes_a_rank_its_share_and_little_more(tmp_path):
    """A bar on each rank's peak: 1.5 GB into 4 ranks."""
    command = [sys.executable, str(Path(__file__).with_name("memory_of_loading.py")), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
