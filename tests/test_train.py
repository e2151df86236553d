"""DeepSpeed computes what PyTorch does, and a killed run goes on as if nothing had happened."""

import json
import math
import random
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from toy_training import Duo, Net, Toy, ToyStream, launch, made, plain, tensors, toy

from v4e import __version__, dist, journal
from v4e.config import Loop, Schedule, flat
from v4e.dist import Ranks
from v4e.errors import CheckpointError, ConfigError, DataError, TrainingError
from v4e.nouns import Draw, Optim, Player, Sample
from v4e.train.engines import accumulation, cast
from v4e.train.meter import Work, named_peak, rates
from v4e.train.norms import block_groups
from v4e.train.optimisers import is_hidden_matrix
from v4e.train.run import Run, open_run, train_recipe
from v4e.train.schedule import factor

ROOT = Path(__file__).parents[1]
SMALL = ("loop.steps=3", "loop.batch=4", "loop.micro_batch=2", "loop.precision=fp32")


def train(recipe: Toy, resume: str = "auto", stream: ToyStream | None = None) -> Path:
    return train_recipe(recipe, lambda rank, world: stream or ToyStream(recipe.loop, rank, world), resume=resume)


def numbers(recipe: Toy, name: str) -> list[float]:
    return [line[name] for line in journal.read(Path(recipe.loop.output))]


def weights(recipe: Toy, stem: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.loop.output) / f"weights/student/{stem}.safetensors")


# ------------------------------------------------------------------------------------- the same as PyTorch


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_computes_what_pytorch_does(tmp_path, stage):
    recipe = toy(tmp_path, *SMALL, f"zero_stage={stage}", "loop.checkpointing=true")
    train(recipe)
    told, norms, net = plain(recipe, 3)
    torch.testing.assert_close(numbers(recipe, "student/loss"), told, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(numbers(recipe, "student/grad_norm"), norms, rtol=1e-5, atol=1e-6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(weights(recipe)[name], p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_keeps_fp32_masters(tmp_path, stage):
    """Its curves follow fp32's, from the first step on: no step of Adam's is spent before training."""
    recipe = toy(tmp_path, *SMALL, f"zero_stage={stage}", "loop.precision=bf16")
    train(recipe)
    torch.testing.assert_close(numbers(recipe, "student/loss"), plain(recipe, 3)[0], rtol=0.02, atol=0.02)
    found = weights(recipe)["blocks.0.up.weight"]
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("stage", [0, 3])
def test_rope_like_buffers_survive_bf16(tmp_path, stage):
    """zero.Init in bf16 patches torch.arange; tables come from outside instead."""
    recipe = toy(tmp_path, f"zero_stage={stage}", "loop.precision=bf16")
    players = cast(recipe.players(), recipe.loop, dist.start(1))
    table = dict(made(1).named_buffers())["table"]
    for engine in players.values():
        assert torch.equal(engine.module.table, table)
        assert engine.module.table.dtype == torch.float32
    assert all(p.grad is None for p in players["teacher"].parameters())
    assert not any(p.requires_grad for p in players["teacher"].parameters())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_turn_improves_its_player_alone(tmp_path, stage):
    """The student's gradients pass through the critic's engine and leave nothing there."""
    duo = Duo(**vars(toy(tmp_path, *SMALL, f"zero_stage={stage}", "loop.steps=2")))
    train(duo)
    nets = {"student": made(1), "critic": made(3)}
    adams = {n: torch.optim.AdamW(net.parameters(), 1e-2, duo.optim.betas, weight_decay=0) for n, net in nets.items()}
    for step in range(2):
        positions = tuple(range(step * 4, step * 4 + 4))
        batch = duo.batch([Sample(str(p), "", "", None, None) for p in positions], [1.0] * 4)
        for turn, adam in adams.items():
            for net in nets.values():
                net.zero_grad()
            duo.losses(nets, batch, Draw(0, positions), turn, step).total.backward()
            nn.utils.clip_grad_norm_(nets[turn].parameters(), 1.0)
            adam.step()
    for player, net in nets.items():
        found = load_file(tmp_path / f"weights/{player}/weights.safetensors")
        for name, p in net.named_parameters():
            torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_forward_in_fp32_is_plain_pytorch_to_the_bit(tmp_path, stage):
    recipe = toy(tmp_path, f"zero_stage={stage}", "loop.precision=fp32")
    players = cast(recipe.players(), recipe.loop, dist.start(1))
    x, sigma = torch.randn(3, 6, 4), torch.rand(3)
    for ours, seed in (("student", 1), ("teacher", 2)):
        for found, wanted in zip(players[ours](x, sigma, None, (1,)), made(seed)(x, sigma, None, (1,)), strict=True):
            assert torch.equal(found, wanted)


def test_accumulation_is_one_batch(tmp_path):
    whole = toy(tmp_path / "a", *SMALL, "loop.micro_batch=4", "zero_stage=1")
    parts = toy(tmp_path / "b", *SMALL, "loop.micro_batch=1", "zero_stage=1")
    train(whole)
    train(parts)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"batch 6 is no multiple of 2 ranks \* micro_batch 2"):
        accumulation(Loop(batch=6, micro_batch=2), world=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_averages_move_towards_the_weights(tmp_path, stage, precision):
    words = (f"zero_stage={stage}", f"loop.precision={precision}")
    recipe = toy(tmp_path, *SMALL, "loop.ema=0.5", "loop.steps=1", *words)
    train(recipe)
    decay = min(0.5, 2 / 11)  # quicker while young
    for name, start in made(1).named_parameters():
        begun = start.detach() if precision == "fp32" else start.detach().bfloat16().float()
        wanted = decay * begun + (1 - decay) * weights(recipe)[name]
        torch.testing.assert_close(weights(recipe, "average")[name], wanted)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_chosen_blocks_train_alone(tmp_path, stage):
    recipe = toy(tmp_path, *SMALL, "loop.train=['blocks.1.*','head.bias']", f"zero_stage={stage}", "loop.ema=0.9")
    train(recipe)
    start = dict(made(1).named_parameters())
    moved = {name for name, tensor in weights(recipe).items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if name.startswith("blocks.1.") or name == "head.bias"}
    assert set(weights(recipe, "average")) == set(start)
    with pytest.raises(ConfigError, match=r"loop.train: no parameter that could train is called blocks.9.*"):
        train(toy(tmp_path / "b", *SMALL, "loop.train=['blocks.9.*']"))


# --------------------------------------------------------------------------------------------- optimisers


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_moves_hidden_matrices_by_orthogonal_steps(tmp_path, stage):
    words = ("optim.name=muon", "optim.lr=0.0", "optim.muon_lr=0.1", f"zero_stage={stage}", "loop.clip=0.0")
    recipe = toy(tmp_path, *SMALL, *words, "loop.steps=1")
    train(recipe)
    gradients = {name: p.grad for name, p in plain(recipe, 1)[2].named_parameters()}
    for name, start in made(1).named_parameters():
        step = weights(recipe)[name] - start.detach()
        if not is_hidden_matrix(name, start.ndim):
            assert not step.any(), name
            continue
        u, _, v = torch.linalg.svd(gradients[name])
        main = -(u[:, :3].T @ step @ v[:3].T)  # the directions that are well determined in bf16
        main /= max(1.0, step.shape[0] / step.shape[1]) ** 0.5
        assert ((main.diagonal() > 0.06) & (main.diagonal() < 0.13)).all(), (name, main)
        assert (main - main.diagonal().diag()).abs().max() < 0.02, (name, main)
    assert numbers(recipe, "student/lr/muon") == [0.1]


def test_muon_and_clipping_are_refused_where_the_update_would_be_clipped(tmp_path):
    recipe = toy(tmp_path, *SMALL, "optim.name=muon", "zero_stage=2")
    with pytest.raises(ConfigError, match=r"ZeRO stage 2 clips Muon's orthogonalised update.*loop.clip=0"):
        train(recipe)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Schedule("constant", warmup=4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule("wsd", warmup=2, decay=0.4), [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        (Schedule("wsd", decay=0.2, floor=0.1), [1, 1, 1, 1, 1, 1, 1, 1, 0.55, 0.1]),
        (
            Schedule("cosine", warmup=2, floor=0.2),
            [0.5, 1] + [0.2 + 0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)],
        ),
    ],
)
def test_schedules(schedule, wanted):
    assert [factor(schedule, step, 10) for step in range(10)] == pytest.approx(wanted)


def test_the_schedule_reaches_the_optimiser(tmp_path):
    words = ("loop.schedule.kind=wsd", "loop.schedule.decay=1.0", "optim.lr=0.3", "zero_stage=0")
    recipe = toy(tmp_path, *SMALL, *words)
    train(recipe)
    assert numbers(recipe, "student/lr/adamw") == pytest.approx([0.2, 0.1, 0.0])


# ------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, stage, precision):
    words = (f"zero_stage={stage}", f"loop.precision={precision}")
    bad = toy(tmp_path / "bad", *SMALL, *words, "poison='5'", "loop.steps=2", "optim.lr=0.05")
    short = toy(tmp_path / "short", *SMALL, *words, "loop.steps=1", "optim.lr=0.05")
    train(bad)
    train(short)
    assert numbers(bad, "skipped_steps") == [0, 1]
    for name, tensor in weights(short).items():
        assert torch.equal(weights(bad)[name], tensor), name


def test_steps_that_stay_bad_stop_the_run_and_name_the_samples(tmp_path):
    recipe = toy(tmp_path, *SMALL, "poison='1'", "loop.max_bad_steps=1", "zero_stage=1")
    with pytest.raises(TrainingError, match=r"not finite for 1 steps in a row; last samples: 0, 1 "):
        train(recipe)


def test_too_many_damaged_samples_stop_the_run_and_are_listed(tmp_path):
    recipe = toy(tmp_path, *SMALL, "zero_stage=0", "loop.max_bad_samples=1")
    stream = ToyStream(recipe.loop, 0, 1)
    stream.quarantined["a"] = "torn"
    train(recipe, stream=stream)
    assert numbers(recipe, "quarantined") == [1, 1, 1]
    stream.quarantined["b"] = "a byte flipped"
    with pytest.raises(TrainingError, match=r"2 damaged samples, more than .* = 1: a: torn; b: a byte flipped"):
        train(recipe, "never", stream)


class Other(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("build", "given", "told"),
    [
        (Other, tensors(made(1)), r"no weights for 2 tensors: extra.bias, extra.weight"),
        (Net, [("nose", torch.zeros(1))], r"the weights hold nose, which the model does not"),
        (Net, [("head.bias", torch.zeros(9))], r"head.bias is \(9,\) in the weights and \(4,\) in the model"),
    ],
)
def test_weights_that_do_not_fit_are_named(build, given, told):
    player = Player("student", build, lambda: given, True, Optim(), 1)
    with pytest.raises(CheckpointError, match=told):
        cast([player], Loop(precision="fp32"), dist.start(1))


# ---------------------------------------------------------------------------------------------- checkpoints


def checkpoints(recipe: Toy) -> list[str]:
    return sorted(p.name for p in (Path(recipe.loop.output) / "checkpoints").iterdir())


@pytest.fixture
def finished(tmp_path) -> Toy:
    recipe = toy(tmp_path / "run", *SMALL, "loop.steps=6", "loop.save_every=2", "loop.ema=0.9", "zero_stage=1")
    train(recipe)
    return recipe


def resumed(recipe: Toy, **changes: object) -> Run:
    return begun(replace(recipe, loop=replace(recipe.loop, **changes)), "auto")


def begun(recipe: Toy, resume: str) -> Run:
    return open_run(recipe, lambda r, w: ToyStream(recipe.loop, r, w), None, resume, dist.start(1))


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    place = random.Random(0).randrange(len(raw))
    raw[place] ^= 1
    path.write_bytes(raw)


def test_only_the_last_checkpoints_are_kept(finished):
    assert checkpoints(finished) == ["step_0000004", "step_0000006"]


def test_a_damaged_checkpoint_is_named_and_passed_over(finished, capsys):
    folder = Path(finished.loop.output) / "checkpoints"
    damage(folder / "step_0000006/rank_00000_000.safetensors")
    (folder / ".step_0000008.partial").mkdir()
    assert resumed(finished).progress.step == 4
    told = capsys.readouterr().err.replace("\n", "")
    assert "step_0000006 is damaged" in told
    assert "rank_00000_000.safetensors differs" in told
    (folder / "step_0000004/COMPLETE.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_0000004 is damaged .no readable COMPLETE.json.*--resume never"):
        resumed(finished)


def test_settings_that_matter_may_not_change(finished):
    assert resumed(finished, steps=9, save_every=3, max_bad_steps=2).progress.step == 6
    with pytest.raises(CheckpointError, match=r"loop.batch was 4 and is now 8; loop.seed was 0 and is now 7"):
        resumed(finished, batch=8, seed=7)


def test_auto_goes_on_from_a_checkpoint_that_was_named(finished, capsys):
    """It would else prefer the later ones, of the branch that was left; those are kept, each of them."""
    left = ["step_0000004", "step_0000006"]
    run = Path(finished.loop.output)
    begun(finished, str(run / "checkpoints/step_0000004"))
    assert "set aside in" in (told := capsys.readouterr().err.replace("\n", "")) and "step_0000006" in told
    assert checkpoints(finished) == ["step_0000004"] and (run / "checkpoints.old/step_0000006/COMPLETE.json").is_file()
    assert resumed(finished).progress.step == 4
    begun(finished, str(run / "checkpoints.old/step_0000006"))
    assert checkpoints(finished) == ["step_0000006"] and resumed(finished).progress.step == 6
    begun(finished, str(run / "checkpoints.old/step_0000004"))
    assert checkpoints(finished) == ["step_0000004"] and resumed(finished).progress.step == 4
    assert {p.name for p in (run / "checkpoints.old").iterdir()} == {*left, f"{left[1]}.1"}


def test_never_starts_anew_and_a_named_checkpoint_is_used(finished):
    run = Path(finished.loop.output)
    train(finished, resume=str(run / "checkpoints/step_0000004"))
    with pytest.raises(CheckpointError, match=r"nowhere: no such checkpoint"):
        train(finished, resume=str(run / "nowhere"))
    train(replace(finished, loop=replace(finished.loop, seed=3, steps=2)), resume="never")
    assert checkpoints(finished) == ["step_0000002"]
    assert [line["step"] for line in journal.read(run)] == [1, 2]


@pytest.mark.parametrize("words", [("optim.name=muon", "loop.clip=0.0"), ("zero_stage=0", "optim.name=muon"), ()])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact_on_one_rank(tmp_path, words, precision):
    common = (*SMALL, "loop.ema=0.9", "loop.steps=4", "loop.save_every=2", "zero_stage=2", *words)
    whole, halves = (toy(tmp_path / n, *common, f"loop.precision={precision}") for n in ("whole", "halves"))
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(halves, stream=Interrupted(halves.loop, 0, 1))
    train(halves)
    assert_same(whole, halves)


class Interrupted(ToyStream):
    def step(self, step: int) -> list:
        if step == 3:
            raise KeyboardInterrupt
        return super().step(step)


def assert_same(whole: Toy, halves: Toy) -> None:
    """Weights, averages and the optimiser's files to the bit, losses to the last digit."""
    for stem in ("weights", "average"):
        for name, tensor in weights(whole, stem).items():
            assert torch.equal(weights(halves, stem)[name], tensor), (stem, name)
    for name in ("student/loss", "student/grad_norm"):
        assert numbers(halves, name) == numbers(whole, name)
    last = max(checkpoints(whole))
    one, other = (stored(Path(r.loop.output) / "checkpoints" / last) for r in (whole, halves))
    assert sum("|exp_avg_sq|" in key for key in one) > 3
    assert one == other


def stored(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes in a checkpoint: weights, averages, optimiser state, generators."""
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return {k: v.view(torch.uint8).numpy().tobytes() for file in files for k, v in file.items()}


# -------------------------------------------------------------------------------------------------- two ranks


def test_two_ranks_zero_3(tmp_path):
    """As PyTorch alone; a rank's bad sample makes both skip; 4 steps are 2, SIGKILL, and 2."""
    common = ("loop.batch=8", "loop.micro_batch=2", "loop.checkpointing=true", "zero_stage=3")
    exact = (*common, "loop.precision=fp32", "loop.steps=3")
    bad = (*common, "loop.precision=bf16", "loop.steps=3", "poison='10'", "loop.save_every=1")
    half = (*common, "loop.precision=bf16", "loop.steps=4", "loop.save_every=2", "loop.ema=0.9")
    folders = {name: str(tmp_path / name) for name in ("exact", "bad", "whole", "halves")}
    first = [folders["exact"], *exact, "--then", folders["bad"], *bad, "--then", folders["whole"], *half]
    killed = launch(2, *first, "--then", folders["halves"], *half, "--fate", "3:0:SIGKILL")
    assert killed.returncode != 0
    again = launch(2, folders["halves"], *half)
    assert again.returncode == 0, again.stderr[-3000:]

    recipe = toy(tmp_path / "exact", *exact)
    told, norms, net = plain(recipe, 3)
    torch.testing.assert_close(numbers(recipe, "student/loss"), told, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(numbers(recipe, "student/grad_norm"), norms, rtol=1e-5, atol=1e-6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(weights(recipe)[name], p.detach(), rtol=1e-4, atol=1e-5)

    assert numbers(toy(tmp_path / "bad", *bad), "skipped_steps") == [0, 1, 1]
    assert_same(toy(tmp_path / "whole", *half), toy(tmp_path / "halves", *half))
    for rank in (0, 1):
        lines = (tmp_path / f"halves/keys_{rank}.txt").read_text().splitlines()
        assert [*lines[:2], *lines[-2:]] == (tmp_path / f"whole/keys_{rank}.txt").read_text().splitlines()


def test_the_launcher_script_says_what_it_would_run():
    command = [ROOT / "launch/one_node.sh", "-n", "2", "--dry-run", "a.yaml", "x=1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--num_gpus 2" in said
    assert said.split()[-4:] == ["v4e.cli", "train", "a.yaml", "x=1"]


class Sheet:
    """Shows what the student makes of zeros."""

    def prepare(self):
        pass

    def edit(self, players):
        v = players["student"](torch.zeros(1, 6, 4), torch.zeros(1), None)[0]
        assert not v.requires_grad
        return v

    def show(self, step, edits):
        return Image.new("RGB", (step, 1)), {f"{maker}/mean": float(v.mean()) for maker, v in edits.items()}


def test_a_sheet_that_cannot_be_drawn_stops_a_run_before_its_first_step(tmp_path):
    class Lacking(Sheet):
        def prepare(self):
            raise DataError("there is no such set")

    recipe = toy(tmp_path / "run", *SMALL)
    with pytest.raises(DataError, match="no such set"):
        train_recipe(recipe, lambda rank, world: ToyStream(recipe.loop, rank, world), Lacking())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (3, "bf16")])
def test_validation_edits_are_made_by_student_and_average_and_change_nothing(tmp_path, stage, precision):
    words = (*SMALL, "loop.sheet_every=2", f"zero_stage={stage}", f"loop.precision={precision}", "loop.ema=0.9")
    shown, plain = toy(tmp_path / "shown", *words), toy(tmp_path / "plain", *words)
    train_recipe(shown, lambda rank, world: ToyStream(shown.loop, rank, world), Sheet())
    train(plain)
    drawn = {p.name: Image.open(p).width for p in (tmp_path / "shown/sheets").iterdir()}
    assert drawn == {"sheet_0000002.png": 2, "sheet_0000003.png": 3}
    for stem in ("weights", "average"):
        assert all(torch.equal(weights(shown, stem)[name], t) for name, t in weights(plain, stem).items())
    last = {m: journal.read(tmp_path / "shown")[-1][f"validation/{m}/mean"] for m in ("student", "average")}
    for maker, stem in (("student", "weights"), ("average", "average")):
        net = made(1)
        net.load_state_dict(weights(shown, stem) | {"table": net.table}, strict=False)
        net = net if precision == "fp32" else net.bfloat16()
        net.table = made(1).table
        wanted = net(torch.zeros(1, 6, 4), torch.zeros(1), None)[0].mean()
        assert last[maker] == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
    assert last["student"] != last["average"]


# --------------------------------------------------------------------------------------- what the journal is told


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_of_block_groups_add_up(tmp_path, stage, precision):
    """Their squares to the whole gradient's; each to what PyTorch finds for its parameters."""
    recipe = toy(tmp_path, *SMALL, f"zero_stage={stage}", f"loop.precision={precision}", "loop.steps=1")
    train(recipe)
    (line,) = journal.read(tmp_path)
    found = {k.removeprefix("student/grad_norm/"): v for k, v in line.items() if "grad_norm/" in k}
    gradients = {name: p.grad for name, p in plain_gradients(recipe).items()}
    wanted = {
        group: sum(float(g.norm()) ** 2 for name, g in gradients.items() if name.startswith(group) == (group != "rest"))
        for group in ("blocks.0", "blocks.1")
    }
    wanted["rest"] = sum(float(g.norm()) ** 2 for name, g in gradients.items() if not name.startswith("blocks"))
    near = 1e-5 if precision == "fp32" else 0.02
    assert found == pytest.approx({group: square**0.5 for group, square in wanted.items()}, rel=near)
    assert sum(v**2 for v in found.values()) ** 0.5 == pytest.approx(line["student/grad_norm"], rel=1e-5)


def plain_gradients(recipe: Toy) -> dict[str, torch.nn.Parameter]:
    """After the first step, before clipping."""
    unclipped = replace(recipe, loop=replace(recipe.loop, clip=0.0))
    return dict(plain(unclipped, 1)[2].named_parameters())


def test_blocks_are_grouped_in_at_most_eight():
    names = [f"blocks.{i}.up.weight" for i in range(40)] + ["head.weight", "proj.0.lora_A.default.weight"]
    groups = block_groups(names)
    assert groups["blocks.4.up.weight"] == "blocks.0-4" and groups["blocks.39.up.weight"] == "blocks.35-39"
    assert len({g for g in groups.values() if g.startswith("blocks")}) == 8
    assert (groups["head.weight"], groups["proj.0.lora_A.default.weight"]) == ("rest", "proj.0")
    uneven = block_groups([f"blocks.{i}.w" for i in range(10)])
    for name, group in uneven.items():
        first, _, last = group.removeprefix("blocks.").partition("-")
        assert int(first) <= int(name.split(".")[1]) <= int(last or first)


def test_rates_are_told_by_hand():
    """16 samples of 100 tokens in 2 s; 8e12 FLOPs in 2 s on two cards of 4 TFLOP/s are half of what they could."""
    loop = Loop(batch=16, peak_tflops=4.0)
    told = rates(Work(tokens=100, flops=8e12), loop, 2.0, Ranks(world=2))
    assert told == {"step_s": 2.0, "samples_per_s": 8.0, "tokens_per_s": 800.0, "mfu": 0.5}
    assert rates(Work(), Loop(batch=16), 2.0, Ranks()) == {"step_s": 2.0, "samples_per_s": 8.0}
    assert "mfu" not in rates(Work(1, 1e12), Loop(batch=16), 2.0, Ranks())  # nobody knows a CPU's peak
    assert [named_peak(n) / 1e12 for n in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "GeForce 3")] == [989, 756, 0]


def test_the_journal_says_what_was_run_and_how_fast(tmp_path):
    recipe = toy(tmp_path, *SMALL, "zero_stage=0", "loop.peak_tflops=1.0")
    train_recipe(recipe, lambda r, w: ToyStream(recipe.loop, r, w), data="shards-a", work=lambda: Work(6, 3e6))
    first, said, *lines = map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines())
    assert said["say"] == f"no checkpoint in {tmp_path}: beginning at step 0"
    assert first["config"]["loop"]["batch"] == 4 and first["config"]["optim"]["lr"] == 0.01
    run = first["config"]["run"]
    assert (run["data"], run["ranks"], run["v4e"]) == ("shards-a", 1, __version__)
    assert re.fullmatch(r"([0-9a-f]{12}(-dirty)?)?", run["revision"])
    told = {"student/term/velocity", "student/weight/block", "student/lr/adamw", "student/grad_norm", "data_wait_s"}
    told |= {"tokens_per_s", "samples_per_s", "mfu", "host_memory_gb", "quarantined", "skipped_steps", "loss_spikes"}
    assert all(told <= set(line) for line in lines)
    assert lines[0]["mfu"] == pytest.approx(3e6 / lines[0]["step_s"] / 1e12)
    assert all(0.1 < lines[0][name] < 64 for name in ("host_memory_gb", "host_memory_peak_gb"))


def test_no_key_reaches_what_a_run_writes(tmp_path, monkeypatch, capsys):
    """Planted in the environment, in settings and in what goes wrong; a checkpoint alone holds settings as given."""
    key = "0123456789abcdef" * 2 + "01234567"
    for variable in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, key)
    words = ("loop.wandb.mode=offline", f"loop.wandb.name=run-{key}", f"loop.data=s3://me:{key}@host/shards")
    recipe = toy(tmp_path, *SMALL, *words, "zero_stage=0", "loop.max_bad_samples=1")
    stream = ToyStream(recipe.loop, 0, 1)
    stream.quarantined["a"] = f"Bearer {key}"
    train(recipe, stream=stream)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "state.json"]
    assert any(p.suffix == ".wandb" for p in written)
    state = json.loads((tmp_path / "checkpoints/step_0000003/state.json").read_text())
    assert state["quarantined"] == {"a": "Bearer ***"}
    assert [p for p in written if key.encode() in p.read_bytes()] == []
    assert key not in "".join(capsys.readouterr())


def test_flat():
    assert flat(Loop())["schedule.kind"] == "constant"
