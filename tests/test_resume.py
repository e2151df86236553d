"""A run goes on as if nothing had happened: on any number of ranks, after any signal, and as no other run."""

import json
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from resume_bars import PREEMPTED, TOLERANCE, losses, order, run, tensors
from test_engines import seal
from test_train import SMALL, checkpoints, damage, weights
from toy_training import Toy, ToyStream, launch, toy

from v4e import config, dist, journal
from v4e.errors import CheckpointError, PreemptedError, TrainingError
from v4e.recipes import pick
from v4e.train import checkpoint
from v4e.train.fragments import Archive
from v4e.train.run import Run, open_run, train_recipe


def train(recipe: Toy, data: str = "", fate: str = "-1:0:") -> Path:
    return train_recipe(recipe, lambda r, w: ToyStream(recipe.loop, r, w, fate=fate), data=data)


def opened(recipe: Toy, data: str = "", **changes: object) -> Run:
    other = replace(recipe, loop=replace(recipe.loop, **changes))
    return open_run(other, lambda r, w: ToyStream(other.loop, r, w), None, "auto", dist.start(1), data)


@pytest.fixture
def half(tmp_path) -> Toy:
    """A run of 6 steps with a falling learning rate, stopped after 4."""
    words = ("loop.steps=6", "loop.save_every=1", "loop.keep_every=2", "loop.keep_last=1", "zero_stage=0")
    recipe = toy(tmp_path / "run", *SMALL, *words, "loop.schedule.kind=wsd", "loop.schedule.decay=0.3")
    with pytest.raises(PreemptedError, match=r"step 4: stopped by SIGTERM, saved .the same command goes on"):
        train(recipe, "shards-a", "4:0:SIGTERM")
    return recipe


def test_damaged_samples_are_counted_over_all_processes_of_a_run(half):
    """A run that is often stopped may not meet the allowed number anew each time."""
    place = Path(half.loop.output) / "checkpoints/step_0000004"
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"quarantined": {"7": "torn", "8": "torn"}}))
    seal(place)
    going_on = replace(half, loop=replace(half.loop, max_bad_samples=2))
    train(going_on, "shards-a")
    assert journal.read(Path(half.loop.output))[-1]["quarantined"] == 2
    last = Path(half.loop.output) / "checkpoints/step_0000006/state.json"
    assert json.loads(last.read_text())["quarantined"] == {"7": "torn", "8": "torn"}


def test_more_damaged_samples_than_allowed_stop_a_run_that_goes_on(half):
    place = Path(half.loop.output) / "checkpoints/step_0000004"
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"quarantined": {"7": "torn"}}))
    seal(place)
    with pytest.raises(TrainingError, match="1 damaged samples, more than loop.max_bad_samples = 0: 7: torn"):
        train(half, "shards-a")


def test_a_signal_saves_within_a_step_and_some_checkpoints_stay_for_good(half):
    assert checkpoints(half) == ["step_0000002", "step_0000004"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(PreemptedError, match="step 4"):  # before its first step: nothing new to save
        train(half, "shards-a", "4:0:SIGUSR1")
    train(half, "shards-a")
    assert checkpoints(half) == ["step_0000002", "step_0000004", "step_0000006"]


def test_another_run_is_refused_with_both_values_unless_allowed(half):
    with pytest.raises(CheckpointError, match=r"data was shards-a and is now shards-b.*allow_change=\[data\]"):
        opened(half, "shards-b")
    assert opened(half, "shards-b", allow_change=("data",)).progress.step == 4
    with pytest.raises(CheckpointError, match=r"loop.schedule.decay was 0.3 and is now 0.5"):
        opened(half, "shards-a", schedule=replace(half.loop.schedule, decay=0.5))
    state = Path(half.loop.output) / "checkpoints/step_0000004/state.json"
    told = checkpoint.read_state(state.parent)
    with pytest.raises(CheckpointError, match=r"format was 1 and is now 2"):
        checkpoint.agree(replace(told, format=1), told, half, state)


def test_a_longer_run_is_the_same_run_while_its_learning_rates_are(half):
    """The fall is over the last two of six steps, none of them done; cut to five, the fourth would have fallen."""
    assert opened(half, "shards-a", steps=9).progress.step == 4
    with pytest.raises(CheckpointError, match=r"loop.steps was 6 and is now 4"):
        opened(half, "shards-a", steps=4)


def test_a_longer_run_is_another_where_its_terms_were_weighted_otherwise(half, monkeypatch):
    by_length = {"velocity": lambda self, step: step / self.loop.steps, "block": lambda self, step: 1.0}
    told = lambda self, step: {name: weight(self, step) for name, weight in by_length.items()}  # noqa: E731
    monkeypatch.setattr(type(half), "weights_at", told)
    with pytest.raises(CheckpointError, match=r"loop.steps was 6 and is now 9"):
        opened(half, "shards-a", steps=9)
    assert opened(half, "shards-a", steps=9, allow_change=("loop.steps",)).progress.step == 4


@pytest.mark.parametrize(("step", "same"), [(9, True), (10, True), (12, False), (60, False)])
def test_video4edit_may_be_prolonged_until_its_hand_over_begins(step, same, tmp_path):
    recipe = config.load("configs/nano/video4edit.yaml", ["loop.steps=100", "loop.schedule.kind=constant"], pick)
    longer = replace(recipe, loop=replace(recipe.loop, steps=200))
    before, now = (checkpoint.State(step, 2, config.flat(each), "", checkpoint.FORMAT) for each in (recipe, longer))
    with nullcontext() if same else pytest.raises(CheckpointError, match="loop.steps was 100 and is now 200"):
        checkpoint.agree(before, now, longer, tmp_path)


def test_weights_of_an_earlier_end_are_set_aside_when_there_is_more_to_do(half):
    weights = Path(half.loop.output) / "weights"
    train(half, "shards-a")
    ended = {p.name: p.read_bytes() for p in (weights / "student").iterdir()}
    train(half, "shards-a")  # nothing is left to do: the same once more
    assert {p.name: p.read_bytes() for p in (weights / "student").iterdir()} == ended
    with pytest.raises(PreemptedError, match="step 7"):
        train(replace(half, loop=replace(half.loop, steps=9, allow_change=("loop.steps",))), "shards-a", "7:0:SIGTERM")
    assert not weights.exists()  # nothing that an export might take for those of step 7
    assert {p.name: p.read_bytes() for p in weights.with_name("weights.old").glob("student/*")} == ended


def test_what_was_just_saved_stays_below_a_damaged_checkpoint(half):
    damage(Path(half.loop.output) / "checkpoints/step_0000004/state.json")
    with pytest.raises(PreemptedError, match="step 3"):
        train(half, "shards-a", "3:0:SIGTERM")
    assert "step_0000003" in checkpoints(half)
    assert opened(half, "shards-a").progress.step == 3


@pytest.mark.parametrize(("every", "logged"), [(0, [5]), (2, [2, 4, 5]), (1, [1, 2, 3, 4, 5])])
def test_steps_that_are_logged(tmp_path, every, logged):
    train(toy(tmp_path, *SMALL, "loop.steps=5", f"loop.log_every={every}", "zero_stage=0"))
    assert [row["step"] for row in journal.read(tmp_path) if "student/loss" in row] == logged


def test_a_run_says_where_it_begins(half, capsys):
    """So that a mistyped folder is no silent beginning from zero."""
    opened(half, "shards-a")
    assert "resuming from" in (told := capsys.readouterr().err) and "beginning" not in told
    opened(half, "shards-a", output=f"{half.loop.output}-mistyped")
    assert "run-mistyped: beginning at step 0" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("name", ["state.json", "COMPLETE.json", "rank_00000_000.safetensors"])
def test_a_changed_byte_in_any_file_is_found(half, name, capsys):
    damage(Path(half.loop.output) / "checkpoints/step_0000004" / name)
    assert opened(half, "shards-a").progress.step == 2
    assert "step_0000004 is damaged" in capsys.readouterr().err.replace("\n", "")


def test_a_torn_save_beside_a_whole_checkpoint_is_swept(half):
    folder = Path(half.loop.output) / "checkpoints"
    shutil.copytree(folder / "step_0000004", folder / ".step_0000005.partial")
    (folder / ".step_0000005.partial/COMPLETE.json").unlink()
    train(half, "shards-a")
    assert checkpoints(half) == ["step_0000002", "step_0000004", "step_0000006"]


def test_runs_of_elements_are_put_together_across_files(tmp_path):
    from safetensors.torch import save_file

    whole = torch.arange(10.0)
    save_file({"p|master|w|0": whole[:4].clone(), "p|master|w|7": whole[7:].clone()}, tmp_path / "a.safetensors")
    save_file({"p|master|w|3": whole[3:7].clone(), "p|#step|w|0": torch.tensor([5.0])}, tmp_path / "b.safetensors")
    archive = Archive(tmp_path.glob("*"))
    for start in range(10):
        for size in range(1, 11 - start):
            assert torch.equal(archive.read("p", "master", "w", start, size), whole[start : start + size])
    assert archive.kinds("p", "w") == {"master", "#step"}
    with pytest.raises(CheckpointError, match="no master of w from element 10 on"):
        archive.read("p", "master", "w", 8, 3)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "rank_0.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"rank_0.safetensors: not readable"):
        Archive(tmp_path.glob("*"))


KINDS = {
    "adamw": (),
    "muon": ("optim.name=muon", "loop.clip=0.0"),
    "adapters": ("loop.lora.rank=2", "loop.lora.layers=['blocks.*.up']", "loop.lora.scale=0.5", "optim.lr=0.05"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["adamw", "muon", "adapters"])
def test_two_ranks_then_one_then_four(tmp_path, stage, kind):
    """The same keys in the same order, and the same losses but for the order in which floats are added."""
    tolerance = TOLERANCE["muon" if kind == "muon" else "adamw"]
    words = KINDS[kind]
    words = (f"zero_stage={stage}", "loop.precision=fp32", "loop.steps=6", *words)
    assert run(tmp_path / "whole", 2, *words) == [0, 0]
    for ranks, fate in ((2, "2:1:SIGTERM"), (1, "4:0:SIGUSR1")):
        assert run(tmp_path / "parts", ranks, *words, fate=fate) == [PREEMPTED] * ranks
    assert run(tmp_path / "parts", 4, *words) == [0] * 4
    assert order(tmp_path / "parts", lambda s: (2, 2, 1, 1, 4, 4)[s]) == order(tmp_path / "whole", lambda _: 2)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=tolerance)


@pytest.mark.slow
def test_the_launcher_passes_the_code_on(tmp_path):
    """A real ``deepspeed``: one rank is signalled, both save, and the launcher ends with their code."""
    ended = launch(2, str(tmp_path), "loop.batch=8", "loop.micro_batch=2", "loop.steps=4", "--fate", "2:1:SIGTERM")
    assert ended.returncode == PREEMPTED, ended.stderr[-3000:]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_0000002"]


@pytest.mark.slow
def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(tmp_path):
    words = ("zero_stage=3", "loop.steps=4", "loop.save_every=1")
    assert run(tmp_path / "whole", 2, *words) == [0, 0]
    assert -9 in run(tmp_path / "torn", 2, *words, fate="2:1:SIGKILL-in-save")
    whole = sorted(p.name for p in (tmp_path / "torn/checkpoints").glob("step_*"))
    assert whole == ["step_0000001", "step_0000002"]
    assert list((tmp_path / "torn/checkpoints").glob(".step_0000003.partial"))
    assert run(tmp_path / "torn", 2, *words) == [0, 0]
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "torn")
    assert all(torch.equal(t, other[k]) for k, t in one.items())


def test_adapters_are_trained_saved_and_merged_alone(tmp_path):
    """Resumed to the bit; what is frozen stays, and the merged weights are those of a network without adapters."""
    words = ("loop.lora.rank=2", "loop.lora.layers=['blocks.*.up']", "loop.lora.scale=0.5", "loop.ema=0.9")
    made = {}
    for name, fates in (("whole", ("-1:0:",)), ("halves", ("2:0:SIGTERM", "-1:0:"))):
        recipe = made[name] = toy(tmp_path / name, *SMALL, *words, "loop.steps=4", "zero_stage=3", "optim.lr=0.05")
        for fate in fates[:-1]:
            with pytest.raises(PreemptedError):
                train(recipe, fate=fate)
        train(recipe, fate=fates[-1])
    start = dict(recipe.players()[0].weights())
    one, other = weights(made["whole"]), weights(made["halves"])
    moved = {k for k, t in one.items() if not torch.equal(t, start[k])}
    assert moved == {"blocks.0.up.weight", "blocks.1.up.weight"}
    assert set(one) == {k for k in start if k != "table"}
    assert all(torch.equal(t, other[k]) for k, t in one.items())
    assert all(torch.linalg.matrix_rank(one[k] - start[k], rtol=1e-3) == 2 for k in moved)
    state = json.loads((tmp_path / "whole/checkpoints/step_0000004/COMPLETE.json").read_text())["files"]
    size = sum((tmp_path / "whole/checkpoints/step_0000004" / f).stat().st_size for f in state if "rank" in f)
    assert size < 60_000  # of 4 * 4 * 386 adapter values, the generator and headers; the whole net would be 170 kB
