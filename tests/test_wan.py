"""We run Wan, not something like Wan: parity with diffusers' own forward, and what we add to it."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from builders import TEXT_WIDTH, VISION_TOKENS, VISION_WIDTH, WAN, C, shared_wan_folder, wan_folder
from deepspeed.utils import safe_get_full_grad
from diffusers import ChronoEditTransformer3DModel, WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from v4e import dist, flow
from v4e.config import Loop
from v4e.errors import CheckpointError, ConfigError, ShapeError
from v4e.models import attention
from v4e.models.wan import WanBackbone, declare, fresh, load_backbone
from v4e.nouns import TEXT_TOKENS, Conditions, Grid, Player, known_mask_4thw, pad_words
from v4e.train.engines import cast

GRID = Grid(9, 32, 48)
KINDS = ("i2v", "flf2v")
POSITIONS = "condition_embedder.image_embedder.pos_embed"
SIGMAS = torch.tensor([0.9, 0.3, 1.0, 0.05])


def state(B, seed=0):
    return torch.randn(B, C, GRID.t, GRID.h, GRID.w, generator=torch.Generator().manual_seed(seed))


def conditions(kind, B, words=(6, 3, 0, 5)):
    g = torch.Generator().manual_seed(1)
    words_B = torch.tensor(words[:B])
    text_BLE = torch.randn(B, max(words[:B]), TEXT_WIDTH, generator=g)
    text_BLE *= (torch.arange(text_BLE.shape[1]) < words_B[:, None])[..., None]
    vision_BNV = torch.randn(B * (2 if kind == "flf2v" else 1), VISION_TOKENS, VISION_WIDTH, generator=g)
    mask = known_mask_4thw(GRID, kind == "flf2v").expand(B, -1, -1, -1, -1)
    return Conditions(text_BLE, words_B, vision_BNV, state(B, seed=2), mask)


def models(kind, dtype=torch.float32):
    """Ours and diffusers', with the same weights, all in one dtype but for the rotary tables."""
    ours = load_backbone(shared_wan_folder(kind), attention="native").to(dtype)
    stock = WanTransformer3DModel.from_pretrained(shared_wan_folder(kind) / "transformer")
    tables = stock.rope.freqs_cos, stock.rope.freqs_sin
    stock.to(dtype)
    stock.rope.freqs_cos, stock.rope.freqs_sin = tables
    return ours.requires_grad_(True), stock


def stock_forward(stock, x, sigma_B, c):
    dtype = stock.patch_embedding.weight.dtype
    return stock(
        hidden_states=torch.cat([x, c.known_mask_B4thw, c.known_BCthw], dim=1).to(dtype),
        timestep=flow.timestep(sigma_B),
        encoder_hidden_states=pad_words(c.text_BLE, TEXT_TOKENS).to(dtype),
        encoder_hidden_states_image=c.vision_BNV.to(dtype),
        return_dict=False,
    )[0]


def gradients(model, out):
    model.zero_grad(set_to_none=True)
    out.float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True, "selective"])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_velocity_and_gradients_equal_the_stock_forward_bitwise(kind, dtype, B, recompute):
    ours, stock = models(kind, dtype)
    ours.gradient_checkpointing, ours.selective = bool(recompute), recompute == "selective"
    if recompute:
        stock.enable_gradient_checkpointing()
    x, c = state(B), conditions(kind, B)
    v = ours(x, SIGMAS[:B], c)[0]
    expected = stock_forward(stock, x, SIGMAS[:B], c)
    assert v.dtype == dtype and torch.equal(v, expected)
    theirs = gradients(stock, expected)
    assert all(torch.equal(g, theirs[name]) for name, g in gradients(ours, v).items())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_equals_from_pretrained_bitwise(kind):
    """The stock default keeps norms, tables and the time embedder in fp32; so does load_backbone."""
    ours = load_backbone(shared_wan_folder(kind), attention="native", dtype=torch.bfloat16)
    stock = WanTransformer3DModel.from_pretrained(shared_wan_folder(kind) / "transformer", torch_dtype=torch.bfloat16)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in stock.named_parameters()}
    x, c = state(2), conditions(kind, 2)
    assert torch.equal(ours(x, SIGMAS[:2], c)[0], stock_forward(stock, x, SIGMAS[:2], c))


@pytest.mark.parametrize("recompute", [False, True])
def test_taps_are_what_hooks_on_the_stock_blocks_see(recompute):
    ours, stock = models("i2v")
    ours.gradient_checkpointing = recompute
    x, c, seen = state(2), conditions("i2v", 2), {}
    for i, block in enumerate(stock.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: seen.setdefault(i, out))
    v, h2, h0 = ours(x, SIGMAS[:2], c, taps=(2, 0))
    expected = stock_forward(stock, x, SIGMAS[:2], c)
    assert torch.equal(v, expected) and torch.equal(h2, seen[2]) and torch.equal(h0, seen[0])
    theirs = gradients(stock, seen[0] + seen[2])
    assert all(
        g is None and theirs[name] is None or torch.equal(g, theirs[name])
        for name, g in gradients(ours, h0 + h2).items()
    )


class Counted(TorchDispatchMode):
    """How often each operator is computed, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["native", "matmul"])
def test_selective_checkpointing_computes_no_product_with_a_weight_twice(backend):
    """Nor fused attention; in a step of 3 blocks, what lies between them is computed as often as without keeping it."""
    counts = {}
    for recompute in (False, True, "selective"):
        ours, _ = models("i2v")
        ours.set_attention(backend)
        ours.gradient_checkpointing, ours.selective = bool(recompute), recompute == "selective"
        with Counted() as counted:
            gradients(ours, ours(state(2), SIGMAS[:2], conditions("i2v", 2))[0])
        counts[recompute] = counted.calls
    plain, whole, selective = counts.values()
    per_block = 4 + 6 + 2  # self-attention's, cross-attention's with keys and values of the image, feed-forward's
    products = [c["mm"] + c["addmm"] for c in (plain, whole, selective)]
    assert products[1] - products[0] == 3 * per_block and products[2] == products[0]
    assert whole["gelu"] == selective["gelu"] == plain["gelu"] + 3
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert [c[fused] for c in (plain, whole, selective)] == ([9, 18, 9] if backend == "native" else [0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_samples_one_by_one(kind):
    """Different images, texts of different lengths, different noise levels. GEMMs are not batch-invariant: 1e-5."""
    ours, _ = models(kind)
    x, c = state(4), conditions(kind, 4)
    together = ours(x, SIGMAS, c)[0]
    per = 2 if kind == "flf2v" else 1
    for b in range(4):
        alone = replace(
            c,
            text_BLE=c.text_BLE[b : b + 1],
            words_B=c.words_B[b : b + 1],
            vision_BNV=c.vision_BNV[b * per : (b + 1) * per],
            known_BCthw=c.known_BCthw[b : b + 1],
            known_mask_B4thw=c.known_mask_B4thw[b : b + 1],
        )
        torch.testing.assert_close(
            together[b : b + 1], ours(x[b : b + 1], SIGMAS[b : b + 1], alone)[0], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["native", "matmul"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pad_stands_for_all(kind, backend, recompute):
    ours, stock = models(kind)
    ours.set_attention(backend, fold_text_padding=True)
    ours.gradient_checkpointing = recompute
    x, c = state(4), conditions(kind, 4)
    v, expected = ours(x, SIGMAS, c)[0], stock_forward(stock, x, SIGMAS, c)
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-5)
    theirs = gradients(stock, expected)
    for name, g in gradients(ours, v).items():
        torch.testing.assert_close(g, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_folding_a_prompt_that_fills_all_512_tokens():
    ours, stock = models("i2v")
    ours.set_attention("native", fold_text_padding=True)
    x, c = state(2), conditions("i2v", 2, words=(TEXT_TOKENS, 7))
    v = ours(x, SIGMAS[:2], c)[0]
    torch.testing.assert_close(v, stock_forward(stock, x, SIGMAS[:2], c), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fold", [False, True])
def test_matmul_in_bf16_is_as_near_to_fp32_as_stock_is(fold):
    ours, stock = models("flf2v", torch.bfloat16)
    ours.set_attention("matmul", fold)
    _, exact = models("flf2v")
    x, c = state(2), conditions("flf2v", 2)
    expected = stock_forward(exact, x, SIGMAS[:2], c)
    own_error = (ours(x, SIGMAS[:2], c)[0] - expected).abs().max()
    assert own_error < 2 * (stock_forward(stock, x, SIGMAS[:2], c) - expected).abs().max()


def test_rotary_tables_stay_exact_in_bf16():
    ours, _ = models("i2v", torch.bfloat16)
    assert ours.rope.freqs_cos.dtype == torch.float32
    assert torch.equal(ours.rope.freqs_cos, WanBackbone(**WAN).rope.freqs_cos)


def test_faults_are_named():
    ours, _ = models("i2v")
    x, c = state(1), conditions("i2v", 1)
    with pytest.raises(ConfigError, match=r"taps \[3\]"):
        ours(x, SIGMAS[:1], c, taps=(0, 3))
    with pytest.raises(ShapeError, match="known latents"):
        ours(x[:, :, :2], SIGMAS[:1], c)
    with pytest.raises(ShapeError, match="2 images for 1 samples"):
        ours(x, SIGMAS[:1], conditions("flf2v", 1))
    with pytest.raises(ConfigError, match="unknown attention backend 'flsh'"):
        ours.set_attention("flsh")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_backends_without_a_gpu(caplog):
    ours, _ = models("i2v")
    for name in ("xformers", "flash", "sage"):
        with pytest.raises(ConfigError, match=name):
            ours.set_attention(name)
    attention._said.clear()
    caplog.clear()
    with caplog.at_level("INFO", logger="v4e.models.attention"):
        ours.set_attention("auto")
        ours.set_attention("auto")
    assert [r.getMessage() for r in caplog.records] == [
        "attention=auto uses native (xformers: it has no operator without CUDA)"
    ]


# In a ZeRO-3 engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True, "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_zero_3_velocity_gradients_and_tables_are_stocks_bitwise(kind, precision, recompute):
    """Built inside zero.Init and filled tensor by tensor: partitions, hooks and bf16 change no bit."""
    declared = declare(shared_wan_folder(kind), attention="native", checkpointing=recompute)
    loop = Loop(precision=precision, batch=1, micro_batch=1)
    engine = cast([Player("wan", *declared, trains=True, zero_stage=3)], loop, dist.start(1))["wan"]
    _, stock = models(kind, torch.bfloat16 if precision == "bf16" else torch.float32)
    for name in ("freqs_cos", "freqs_sin"):
        assert torch.equal(getattr(engine.module.rope, name), getattr(stock.rope, name))
    x, c = state(2), conditions(kind, 2)
    v, expected = engine(x, SIGMAS[:2], c)[0], stock_forward(stock, x, SIGMAS[:2], c)
    assert v.dtype == expected.dtype and torch.equal(v, expected)
    theirs = gradients(stock, expected)
    engine.backward(v.float().square().mean())
    found = {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters()}
    assert all(torch.equal(g, theirs[name].float()) for name, g in found.items())
    one, told = state(1), conditions(kind, 1)
    with torch.no_grad():
        assert torch.equal(engine(one, SIGMAS[:1], told)[0], stock_forward(stock, one, SIGMAS[:1], told))


# Weights ------------------------------------------------------------------------------------------------------------


def named(declared):
    return dict(declared.weights())


@pytest.mark.parametrize("kind", KINDS)
def test_declared_weights_name_every_parameter_and_buffer(kind):
    declared = declare(shared_wan_folder(kind))
    module, weights = declared.build(), named(declared)
    wanted = dict(module.named_parameters()) | dict(module.named_buffers())
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in wanted.items()}
    assert torch.equal(weights["rope.freqs_sin"], module.rope.freqs_sin)


def test_i2v_from_flf2v_and_back():
    stored = named(declare(shared_wan_folder("flf2v")))
    i2v = declare(shared_wan_folder("flf2v"), kind="i2v")
    assert i2v.build().config["pos_embed_seq_len"] is None
    assert stored.keys() - named(i2v).keys() == {POSITIONS}
    assert all(torch.equal(t, stored[n]) for n, t in i2v.weights())
    flf2v = declare(shared_wan_folder("i2v"), kind="flf2v")  # tokens counted from the folder's image encoder
    added = named(flf2v)[POSITIONS]
    assert added.shape == (1, 2 * VISION_TOKENS, VISION_WIDTH) and not added.any()
    assert declare(shared_wan_folder("i2v"), kind="flf2v", vision_tokens=7).build().config["pos_embed_seq_len"] == 14


def test_fresh_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    first, other = named(fresh(WAN, seed=1)), named(fresh(WAN, seed=2))
    rng = torch.get_rng_state()
    again = named(declare(shared_wan_folder("i2v"), fresh_seed=1))
    assert torch.equal(rng, torch.get_rng_state())
    assert first.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in first.items())
    assert not torch.equal(first["blocks.0.attn1.to_q.weight"], other["blocks.0.attn1.to_q.weight"])
    assert not first["proj_out.weight"].any()


def test_stock_loads_what_we_save(tmp_path):
    ours, _ = models("flf2v")
    ours.save_stock(tmp_path / "whole")
    ours.save_stock(tmp_path / "shards", dtype=torch.bfloat16, max_shard_size="20KB")
    assert json.loads((tmp_path / "whole/config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    again = WanTransformer3DModel.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(p, dict(ours.named_parameters())[n]) for n, p in again.named_parameters())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    sharded = named(declare(tmp_path, "shards"))
    assert all(torch.equal(p.bfloat16(), sharded[n]) for n, p in ours.named_parameters())


def test_norm_added_q_of_older_exports_is_passed_over(tmp_path):
    folder = damaged(tmp_path, lambda tensors: tensors | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)})
    assert "blocks.0.attn2.norm_added_q.weight" not in named(declare(folder))


def test_weights_of_another_model_are_refused(tmp_path):
    def change(tensors):
        tensors["proj_out.bias"] = torch.zeros(3)
        del tensors["blocks.0.ffn.net.2.bias"], tensors["blocks.1.ffn.net.2.bias"]
        return tensors | {"blocks.9.ffn.net.2.bias": torch.zeros(24)}

    with pytest.raises(CheckpointError) as error:
        named(declare(damaged(tmp_path, change)))
    assert "2 missing (blocks.0.ffn.net.2.bias, blocks.1.ffn.net.2.bias)" in str(error.value)
    assert "1 unexpected (blocks.9.ffn.net.2.bias)" in str(error.value)
    assert "1 of another shape (proj_out.bias [3] for [16])" in str(error.value)


def test_missing_and_damaged_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("", tmp_path / "nowhere", "tests/nowhere", "a/b/c", "nobody/no-such-model"):
        with pytest.raises(CheckpointError) as error:
            declare(source)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="config.json"):
        declare(tmp_path)
    folder = damaged(tmp_path, lambda tensors: tensors)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="unreadable weights"):
        named(declare(folder))
    file.unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        named(declare(folder))


def damaged(tmp_path, change):
    """A folder whose transformer's tensors went through ``change``."""
    folder = wan_folder(tmp_path / "wan")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


def test_the_saved_pipeline_is_stock():
    pipeline = WanImageToVideoPipeline.from_pretrained(shared_wan_folder("flf2v"))
    assert type(pipeline.transformer) is WanTransformer3DModel


# ---------------------------------------------------------------------------------------------- frames that stand apart


def apart(temporal_skip: int) -> WanBackbone:
    """The tiny I2V, its two latent frames taken for the ends of a longer clip."""
    build, weights = declare(shared_wan_folder("i2v"), attention="native", temporal_skip=temporal_skip)
    model = build()
    model.load_state_dict({name: t for name, t in weights() if not name.startswith("rope.")})
    return model


def two_frames(B=2):
    grid, c = Grid(5, 32, 48), conditions("i2v", B)
    x, known = (state(B, seed)[:, :, : grid.t] for seed in (0, 2))
    return x, replace(c, known_BCthw=known, known_mask_B4thw=known_mask_4thw(grid, False).expand(B, -1, -1, -1, -1))


def test_frames_that_stand_apart_have_the_ends_positions_of_the_longer_clip():
    x, _ = two_frames()
    stock = apart(2).rope  # 0 and 1, as stock
    long = [table.unflatten(1, (3, -1)) for table in stock(torch.zeros(1, 36, 3, *x.shape[3:]))]
    for skip, frames in ((2, [0, 1]), (3, [0, 2])):
        found = apart(skip).rope(x)
        assert all(torch.equal(f, t[:, frames].flatten(1, 2)) for f, t in zip(found, long, strict=True))


@torch.no_grad()
def test_frames_that_stand_apart_are_diffusers_chronoedit(tmp_path):
    ours, (x, c) = apart(3), two_frames()
    v = ours(x, SIGMAS[:2], c)[0]
    ours.save_stock(tmp_path / "transformer")
    stock = ChronoEditTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert stock.config["rope_temporal_skip_len"] == 3
    assert torch.equal(v, stock_forward(stock, x, SIGMAS[:2], c))
    again = load_backbone(tmp_path, attention="native")
    torch.testing.assert_close(again(x, SIGMAS[:2], c)[0], v)
    near = models("i2v")[0]
    torch.testing.assert_close(near(x, SIGMAS[:2], c)[0], apart(2)(x, SIGMAS[:2], c)[0])
    assert (near(x, SIGMAS[:2], c)[0] - v).abs().max() > 1e-3
    longer, told = state(2), conditions("i2v", 2)  # three latent frames stand where they always did
    torch.testing.assert_close(near(longer, SIGMAS[:2], told)[0], ours(longer, SIGMAS[:2], told)[0])


@pytest.mark.parametrize("temporal_skip", [1, 65, -3])
def test_positions_that_do_not_exist_are_refused(temporal_skip):
    with pytest.raises(ConfigError, match="have no two ends among the model's 64 positions"):
        declare(shared_wan_folder("i2v"), temporal_skip=temporal_skip)
