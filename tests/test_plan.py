"""A plan's formulas, held against numbers worked out by hand and against what autograd really keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import shared_wan_folder
from test_shards import META, make_sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from v4e import cli, config, plan
from v4e.config import Loop, Offload, Share
from v4e.data.mixture import Mixture
from v4e.data.shards import SetMeta, ShardSet, ShardWriter
from v4e.errors import ConfigError
from v4e.models.recompute import _policy
from v4e.models.wan import _construct, _skeleton
from v4e.nouns import Grid
from v4e.plan import Census, Data, Machine, Shape
from v4e.recipes import pick

ROOT = Path(__file__).parents[1]
SHAPE = Shape(width=10, ffn=30, layers=2, images=1)
PLAYER = Census("student", 3, trained=1000, frozen=0, whole=100, hidden=600, shape=SHAPE)
CLIPS = [Data(Grid(5, 720, 1280), Grid(81, 720, 1280), 100)]
BIG = 16_394_878_784  # parameters of I2V-14B, counted in tests/test_real_sizes.py


def test_state_under_zero_3():
    """bf16 on 4 ranks: weights 2 (900/4 + 200), gradients 2/4, masters 4/4, Adam 8/4, averages 4/4 of a thousand."""
    assert plan.state(PLAYER, 2, 4, "adamw", True) == {
        "weights": 850, "gradients": 500, "masters": 1000, "optimiser": 2000, "EMA": 1000
    }  # fmt: skip


def test_stages_cut_one_thing_more_each():
    def sizes(stage):
        return [*plan.state(replace(PLAYER, stage=stage), 2, 4, "adamw", False).values()]

    assert sizes(0) == [2000, 2000, 4000, 8000, 0]
    assert sizes(1) == [2000, 2000, 1000, 2000, 0]
    assert sizes(2) == [2000, 500, 1000, 2000, 0]


def test_in_fp32_the_weights_are_the_masters_unless_stage_1_or_2_copies_them():
    assert [plan.state(replace(PLAYER, stage=s), 4, 4, "adamw", False)["masters"] for s in range(4)] == [
        0,
        1000,
        1000,
        0,
    ]


def test_muon_keeps_one_number_for_a_hidden_weight():
    assert plan.state(PLAYER, 2, 1, "muon", False)["optimiser"] == 600 * 4 + 400 * 8


def test_8_bits_are_a_quarter_and_a_scale_for_each_block():
    assert plan.state(PLAYER, 2, 1, "adamw8bit", False)["optimiser"] == 2000 + 2 * 4 * 1000 / 256


def test_what_is_offloaded_moves_to_main_memory():
    """250 elements a rank: 4 bytes of master and average, 8 of moments, 4 of gradient and 2 of its copy each."""
    away = Loop(ema=0.9, offload=Offload("cpu", "cpu", ""))
    here, main = plan.placed(PLAYER, 2, 4, "adamw", away)
    assert here == {"weights": 200, "gradients": 0, "masters": 0, "optimiser": 0, "EMA": 0}
    assert main == {"masters": 1000, "gradients": 1500, "optimiser": 2000, "EMA": 1000, "weights": 650}
    disk = replace(away, offload=Offload("nvme", "none", "/disk"))
    here, main = plan.placed(PLAYER, 2, 4, "adamw", disk)
    assert here["weights"] == 850 and main == {"swap buffers": 4000, "gradients": 500, "EMA": 1000}
    first = plan.placed(replace(PLAYER, stage=1), 2, 4, "adamw", replace(away, offload=Offload("cpu")))[0]
    assert first["gradients"] == 2000  # reduced after the backward pass alone
    nothing = plan.placed(PLAYER, 2, 4, "adamw", Loop(ema=0.9))
    assert nothing == (plan.state(PLAYER, 2, 4, "adamw", True), {})


def test_frozen_players_hold_weights_alone():
    frozen = replace(PLAYER, trained=0, frozen=1000, hidden=0)
    assert plan.held(frozen, 2, 4) == 850
    assert plan.held(replace(frozen, stage=0), 2, 4) == 2000
    assert sum(plan.state(frozen, 2, 4, "adamw", True).values()) == 850


def test_what_passes():
    """An fp32 gradient; beside it its bf16 copy with fused kernels, Adam's root without."""
    assert plan.update(PLAYER, 2, 4, fused=True) == 250 * 6
    assert plan.update(PLAYER, 2, 4, fused=False) == 250 * 8
    assert [plan.gathered(replace(PLAYER, stage=s), 2, 4) for s in (2, 3)] == [0, 1800]
    assert plan.gathered(PLAYER, 2, 1) == 0
    assert plan.gathered(replace(PLAYER, trained=BIG), 2, 4) == 2 * plan.LIVE
    assert plan.buckets(PLAYER, 2, 50, overlap=True) == 200 and plan.buckets(PLAYER, 2, 5000, overlap=False) == 2000


def test_activations_by_hand():
    """A block of 8 tokens: 8 (54 * 10 + 4 * 30) + 769 * 6 * 10; checkpointing keeps 2 * 8 * 10 of each, one whole."""
    block = 8 * 660 + 769 * 60
    assert plan.block_saved(SHAPE, 8, 2) == block
    passing = 8 * (2 * 30 + 10 * 10)
    assert plan.activations(SHAPE, 8, 2, 1, checkpointing=False) == 2 * block + passing
    assert plan.activations(SHAPE, 8, 2, 3, checkpointing=True) == 3 * (2 * 160 + block + passing)
    dear = 2 * (8 * (10 * 10 + 30) + 2 * 769 * 10)
    assert plan.activations(SHAPE, 8, 2, 3, checkpointing="selective") == 3 * (2 * (160 + dear) + block + passing)


def test_flops_by_hand():
    """A layer of 8 tokens that see 769: 2 (8 * (6 * 100 + 2 * 300) + 769 * 200) + 4 * 10 * (64 + 8 * 769)."""
    assert plan.forward_flops(SHAPE, 8) == 2 * (2 * (8 * 1200 + 769 * 200) + 40 * (64 + 6152))


def test_passes_of_the_recipe():
    assert plan.passes({"own_every": 4}, checkpointing=True) == 4.25
    assert plan.passes({}, checkpointing=False) == plan.passes({}, checkpointing="selective") == 3.0
    assert plan.passes({}, checkpointing=False, trained=0.01) == 2.01
    assert plan.frozen_passes("teacher", {"block_every": 2}) == 0.5 and plan.frozen_passes("teacher", {}) == 1.0
    assert plan.frozen_passes("prior", {"block_every": 2}) == 2.0
    data = Data(Grid(5, 16, 16), Grid(9, 16, 16), 1)
    assert (plan.met("teacher", data), plan.met("prior", data)) == (data.teacher, data.student)


def test_traffic():
    """Three quarters come from others: at ZeRO-3 the weights for each round and micro-batch, and the gradients."""
    assert plan.traffic(PLAYER, 2, 4, 5, 2.0) == 0.75 * 2 * (1000 * 2 * 5 + 1000 * 5)
    assert plan.traffic(replace(PLAYER, stage=0), 2, 4, 5, 2.0) == 0.75 * 2 * 2000
    assert plan.traffic(PLAYER, 2, 1, 5, 2.0) == 0


def test_storage_by_hand():
    data = Data(Grid(5, 16, 16), Grid(9, 16, 16), 1)  # latents 2 x 2 x 2 and 3 x 2 x 2
    numbers = 4 * (2 * 128 + 192) + 128 + 2 * 128 + 192 + 8 + 2 * 257 * 1280 + (2 * plan.WORDS + 1) * 4096
    assert plan.sample_bytes(data, levels=4) == 2 * numbers + 2 * plan.PNG * 256
    assert plan.checkpoint_bytes(PLAYER, "adamw", True) == 16_000
    assert plan.checkpoint_bytes(PLAYER, "adamw", False) == 12_000


@pytest.mark.parametrize(
    ("words", "kept"), [({}, 1), ({"save_every": 10}, 3), ({"save_every": 10, "keep_every": 50}, 5)]
)
def test_checkpoints_at_the_fullest_moment(words, kept):
    """Two are kept while a third is written; every fiftieth of a hundred steps for good."""
    assert plan.checkpoints_kept(Loop(steps=100, **words)) == kept


def through_a_block(low: torch.dtype, width: int, ffn: int, tokens: int) -> torch.nn.Module:
    """A real block, after its forward pass of one clip."""
    config = {"num_attention_heads": 2, "attention_head_dim": width // 2, "ffn_dim": ffn, "num_layers": 1}
    config |= {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": width, "text_dim": 64, "freq_dim": 32}
    block = _construct(type(_skeleton(config)), config).to(low).blocks[0]
    hidden, context = torch.randn(1, tokens, width).to(low), torch.randn(1, 512 + 257, width).to(low)
    freqs = torch.randn(1, tokens, 1, width // 2)
    out = block(hidden.requires_grad_(), context.requires_grad_(), torch.randn(1, 6, width), (freqs, freqs))
    assert out.shape == hidden.shape
    return block


def saved_by_autograd(low: torch.dtype, width: int, ffn: int, tokens: int) -> int:
    """Bytes that one real block keeps for its backward pass, counted once for each storage, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        block = through_a_block(low, width, ffn, tokens)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    return sum(size for place, size in kept.items() if place not in parameters)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_block_keeps_what_the_formula_says(low):
    """A CPU's RMSNorm is put together of parts: each of three keeps 8 bytes a width, in fp32, and not bf16's 2."""
    width, ffn = 128, 344
    bytes_each, unfused, near = {torch.bfloat16: (2, 18, 0.05), torch.float32: (4, 0, 0.2)}[low]
    extra = [saved_by_autograd(low, width, ffn, tokens) for tokens in (512, 1024)]
    shape = Shape(width, ffn, 1, 1)
    said = plan.block_saved(shape, 1024, bytes_each) - plan.block_saved(shape, 512, bytes_each)
    assert extra[1] - extra[0] == pytest.approx(said + unfused * width * 512, rel=near)


class Dear(TorchDispatchMode):
    """Bytes that selective checkpointing would keep of what runs inside."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if _policy(None, func) is CheckpointPolicy.MUST_SAVE:
            self.size += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_selective_checkpointing_keeps_of_a_block_what_the_formula_says(low):
    """Attention also keeps a number of each token and head, which the formula leaves out."""
    with Dear() as dear:
        through_a_block(low, 128, 344, 512)
    said = plan.products_saved(Shape(128, 344, 1, 1), 512, low.itemsize)
    assert 0 <= dear.size - said <= 3 * 512 * 2 * 4


def real(name: str = "video4edit", *words: str):
    return config.load(ROOT / f"configs/{name}.yaml", list(words), pick)


@pytest.fixture(scope="module")
def video4edit():
    """On 64 cards, and on 8."""
    return [plan.planned(real(), Machine(ranks=n), CLIPS) for n in (64, 8)]


def test_the_real_size(video4edit):
    """I2V-14B on 64 ranks: 4 + 8 + 4 bytes of 16.4e9 parameters over 64, and three epochs of nothing hidden."""
    far, near = (answer for answer, _ in video4edit)
    assert far.parts["optimiser"] == 8 * BIG / 64
    assert far.storage["a checkpoint"] == 16 * BIG
    assert far.peak < near.peak and far.flops == near.flops
    assert far.arithmetic == pytest.approx(near.arithmetic / 8)
    assert far.fits


def test_what_does_not_fit_is_told_what_would():
    recipe = real("video4edit", "loop.checkpointing=false", "loop.micro_batch=2")
    answer, remedy = plan.planned(recipe, Machine(ranks=4), CLIPS)
    assert not answer.fits
    assert remedy.startswith("loop.checkpointing=true loop.micro_batch=1")
    ranks = int(remedy.split("--gpus ")[1])
    mended = real("video4edit", "loop.checkpointing=true", "loop.micro_batch=1")
    assert plan.planned(mended, Machine(ranks=ranks), CLIPS)[0].fits
    assert not plan.planned(mended, Machine(ranks=ranks // 2), CLIPS)[0].fits


def test_adapters_are_counted_by_hand(tmp_path):
    """On each linear layer of a block, in and out: 8 and 2 of 5120 square, and two between 5120 and 13824."""
    recipe = plan.stand_in(real("flow_matching", "loop.lora.rank=16"), tmp_path)
    (player,) = recipe.players()
    counted = plan.census(player, recipe.loop)
    assert counted.trained == 40 * 16 * (10 * (5120 + 5120) + 2 * (5120 + 13824))
    assert counted.frozen == BIG


def test_chosen_blocks_alone_are_trained(tmp_path):
    recipe = plan.stand_in(real("flow_matching", "loop.train=[blocks.0.*]"), tmp_path)
    counted = plan.census(recipe.players()[0], recipe.loop)
    D, F = 5120, 13824
    assert counted.trained == 10 * (D * D + D) + 5 * D + 2 * D + 2 * D * F + F + D + 6 * D
    assert counted.elements == BIG


def test_one_card_holds_the_adapters_for_one_card():
    card = Machine(ranks=1)
    assert plan.planned(real("video4edit_lora_one_gpu"), card, CLIPS)[0].fits
    assert not plan.planned(real("video4edit_lora"), card, CLIPS)[0].fits
    assert plan.planned(real("video4edit_lora"), Machine(ranks=8), CLIPS)[0].fits


def test_work_counts_nothing_twice():
    """Of a sample of 2 latent frames: 7200 tokens, three forward passes, none for checkpointing."""
    recipe, once = real("flow_matching", "loop.checkpointing=true"), real("flow_matching", "loop.checkpointing=false")
    told = plan.work(recipe, 8, CLIPS)
    assert told.tokens == 2 * 45 * 80
    assert told.flops == plan.planned(once, Machine(ranks=8), CLIPS)[0].flops
    shape = Shape(5120, 13824, 40, 1)
    assert told.flops == pytest.approx(recipe.loop.batch * 3 * plan.forward_flops(shape, 2 * 45 * 80))


def test_offloading_lets_the_optimiser_fit_where_it_did_not():
    card = Machine(ranks=8)
    answer = plan.planned(real("video4edit", "loop.offload.optimizer=cpu"), card, CLIPS)[0]
    assert answer.peak < plan.planned(real("video4edit"), card, CLIPS)[0].peak
    assert answer.main["optimiser"] == BIG and answer.update["step"] == 0
    assert "main memory: optimiser" in plan.page(answer, "", CLIPS, Loop(steps=10))


def test_released_models_need_no_folder_and_others_do(tmp_path):
    recipe = plan.stand_in(real("flow_matching"), tmp_path)
    assert plan.census(recipe.players()[0], recipe.loop).trained == BIG
    assert plan.stand_in(replace(recipe, init="my/own"), tmp_path / "x").init == "my/own"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[ShardSet, ShardSet]:
    """Seven samples of 5 x 16 x 16 with a teacher's 9 frames, and two of 16 x 32 without a teacher."""
    home = tmp_path_factory.mktemp("sets")
    sets = {"square": (META, 7), "wide": (SetMeta("encoded", Grid(5, 16, 32), None), 2)}
    for name, (meta, count) in sets.items():
        with ShardWriter(home / name, meta, samples_per_shard=3) as writer:
            for n in range(count):
                writer.add(make_sample(n))
    square, wide = (ShardSet.open(home / name) for name in sets)
    return square, wide


def test_every_set_of_a_mixture_says_its_own(mixed):
    """Three quarters of a step are square; what is not there yet is of the sizes given."""
    shares = [Share(str(mixed[0].folder), 6), Share(str(mixed[1].folder), 1), Share("/nowhere", 1)]
    square, wide, missing = plan.clips(Loop(mixture=shares), 720, 1280, 5, 81, 100)
    size = [sum(path.stat().st_size for path in s.folder.glob("*.tar")) for s in mixed]
    assert square == Data(Grid(5, 16, 16), Grid(9, 16, 16), 7, 0.75, size[0], shares[0].path)
    assert wide == Data(Grid(5, 16, 32), Grid(5, 16, 32), 2, 0.125, size[1], shares[1].path)
    assert missing == Data(Grid(5, 720, 1280), Grid(81, 720, 1280), 100, 0.125, 0, "/nowhere")
    assert plan.clips(Loop(), 720, 1280, 5, 81, 100) == CLIPS
    assert plan.clips_of(Mixture(mixed, (3, 1))) == [square, replace(wide, share=0.25)]


def test_what_training_refuses_is_not_planned(mixed):
    path = str(mixed[0].folder)
    with pytest.raises(ConfigError, match="both loop.data and loop.mixture"):
        plan.clips(Loop(data=path, mixture=[Share(path)]), 720, 1280, 5, 81, 100)
    with pytest.raises(ConfigError, match=r"weight -1 is not positive"):
        plan.clips(Loop(mixture=[Share(path), Share(path, -1)]), 720, 1280, 5, 81, 100)


def test_a_mixture_takes_the_mean_time_the_largest_clips_memory_and_every_sets_storage(video4edit):
    small, large = (Data(Grid(5, h, w), Grid(81, h, w), 100) for h, w in ((480, 832), (720, 1280)))
    mixture = [replace(small, share=0.25, size=1000), replace(large, share=0.75)]
    one, both = (plan.planned(real(), Machine(ranks=64), data)[0] for data in ([small], mixture))
    other, _ = video4edit[0]
    assert both.flops == pytest.approx(0.25 * one.flops + 0.75 * other.flops)
    assert both.compute == other.compute and other.compute["activations"] > one.compute["activations"]
    assert both.storage["shards"] == 1000 + other.storage["shards"]
    assert both.storage["a sample"] == both.storage["shards"] / 200
    said = plan.page(both, "", mixture, Loop(steps=10, batch=40))
    assert "  100 of 5 x 480 x 832, 25% of each step, each met 1.0 times\n" in said
    assert "time: 6180 tokens" in said  # 0.25 * 2 * 30 * 52 + 0.75 * 2 * 45 * 80
    assert "  100 of 5 x 720 x 1280, 75% of each step, each met 3.0 times\n" in said


def test_the_door_reads_local_models_and_ends_with_the_verdict(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        f"recipe: flow_matching\ninit: {shared_wan_folder()}\nloop: {{batch: 2, micro_batch: 1}}\n"
    )
    words = ["plan", str(tmp_path / "c.yaml"), "--gpus", "2", "--height", "32", "--width", "48"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "fits in 80 GB" in said and "assumed 25% of 989 TFLOP/s" in said
    assert cli.main([*words, "--gpu-memory", "1"]) == 1  # the reserve alone is more
    assert "does not fit" in capsys.readouterr().out
    assert cli.main([*words, "loop.batch=3"]) == 3
    assert "batch 3 is no multiple" in capsys.readouterr().err
