"""Roll-outs: what is stored is what was fed, and neither a kill nor another number of processes changes a byte."""

import argparse
import contextlib
import errno
import hashlib
import json
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import shared_wan_folder
from PIL import Image

from data_tools import rollout as room
from data_tools.ingest import ingest, read_triplets
from data_tools.rollout import Evolving, RolloutConfig, Worker, pack_clips, rollout
from data_tools.rollout.plan import Claims
from data_tools.rollout.spool import Spool
from v4e import flow
from v4e.config import Wandb
from v4e.data.collate import collate
from v4e.data.shards import ShardSet
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.models.codec import WanCodec
from v4e.nouns import Clip, seed_of
from v4e.pipelines import Guidance, TeacherPipeline, noise_of

SIZE = 32
COUNT = 5


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triplets")
    rows = []
    for i in range(COUNT):
        for kind, seed in (("source", i), ("edited", 100 + i)):
            picture(seed).save(folder / f"{kind}{i}.png")
        words = {"instruction": "make the sky red", "evolution": f"the sky turn red {i}", "task": "recolour"}
        rows.append({"id": f"t{i}", "source": f"source{i}.png", "edited": f"edited{i}.png", **words})
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest(folder / "list.jsonl", folder / "in", (SIZE, SIZE))
    return folder / "in"


def settings(**changes) -> RolloutConfig:
    values = {
        "teacher": str(shared_wan_folder("flf2v")),
        "height": SIZE,
        "width": SIZE,
        "teacher_frames": 9,
        "step_counts": (1, 2),
        "guidance": 2.0,
        "batch": 2,
        "samples_per_shard": 2,
        "dtype": "fp32",
        "stored": "fp32",
        "attention": "native",
        "dataset": "tests",
        "wandb": Wandb(mode="disabled"),
        "parts": 1,
    }
    return RolloutConfig(**values | changes)


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def whole(triplets, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "set"
    rollout(read_triplets(triplets), out, settings())
    return out


def test_a_sample_holds_the_teachers_path_at_the_students_frames(whole, triplets):
    """Computed again for one sample, from the pictures, by the pipeline alone."""
    config, shards = settings(), ShardSet.open(whole)
    sample, triplet = shards.sample(3, pictures=True), read_triplets(triplets)[3]
    teacher = TeacherPipeline.from_pretrained(config.teacher, attention="native")
    grid = teacher.grid(9, (SIZE, SIZE))
    source, target = triplet.read_source(), triplet.read_target()
    conditions = teacher.told([source], [triplet.evolution], grid, [target])
    noise = noise_of([seed_of(0, "t3", "noise")], 4, grid.t, grid.h, grid.w)
    path = teacher.rollout(noise, conditions, config.levels, guidance=Guidance(2.0))
    kept, tight = sample.rollout, {"atol": 2e-5, "rtol": 1e-4}
    assert torch.equal(kept.sigma_K, flow.union_grid((1, 2), 3.0)[:-1].float())
    assert torch.equal(kept.full_KCthw[0], noise[0])
    assert torch.equal(kept.x_KCthw, kept.full_KCthw[:, :, [0, 2]])
    assert torch.allclose(kept.full_KCthw, path.x_BKCthw[0], **tight)
    assert torch.allclose(kept.v_KCthw, path.v_BKCthw[0][:, :, [0, 2]], **tight)
    assert torch.allclose(kept.end_Cthw, path.end_BCthw[0][:, [0, 2]], **tight)
    assert torch.equal(sample.source.frames_T3HW, source.frames_T3HW)


def test_a_sample_holds_what_both_models_are_told(whole, triplets):
    codec, triplet = WanCodec.load(shared_wan_folder("flf2v")), read_triplets(triplets)[4]
    sample = ShardSet.open(whole).sample(4)
    source, target, e = triplet.read_source(), triplet.read_target(), sample.encoded
    student, teacher = codec.grid(5, SIZE, SIZE), codec.grid(9, SIZE, SIZE)
    assert torch.allclose(e.clip_Cthw, codec.encode([Clip.join([source, *[target] * 4])])[0], atol=1e-5)
    assert torch.allclose(e.known_Cthw, codec.known([source], student)[0], atol=1e-5)
    assert torch.allclose(e.teacher_known_Cthw, codec.known([source], teacher, [target])[0], atol=1e-5)
    assert torch.equal(e.text_LE, codec.read(["make the sky red"])[0])
    assert torch.equal(e.evolution_LE, codec.read(["the sky turn red 4"])[0])
    assert torch.equal(e.null_LE, codec.read([""])[0])
    assert torch.equal(e.vision_NV, codec.look([source])[0])
    assert torch.equal(e.vision_last_NV, codec.look([target])[0])
    assert e.change_thw.shape == (student.t, student.h, student.w)
    assert (e.change_thw[0] == 0).all()
    assert (sample.task, sample.origin.dataset, sample.origin.seed) == ("recolour", "tests", 0)
    assert room.content_hash(settings().teacher) in sample.origin.teacher


def test_the_set_goes_into_a_batch(whole):
    batch = collate([ShardSet.open(whole).sample(i) for i in range(COUNT)], [1.0] * COUNT, rollout=True)
    assert batch.rollout.full_BKCthw.shape == (COUNT, 2, 4, 3, 4, 4)
    assert batch.rollout.x_BKCthw.shape == (COUNT, 2, 4, 2, 4, 4)


def kept_counts(monkeypatch) -> list[list[str]]:
    """The units that are worked on from now on."""
    real, made = Worker.work, []
    monkeypatch.setattr(Worker, "work", lambda self, unit: made.append([t.id for t in unit]) or real(self, unit))
    return made


def kill_after(monkeypatch, units: int, step: str = "save") -> None:
    """End the process, as far as a test can, when so many units are safe and the next is about to be."""
    real, left = getattr(Spool, step), [units]

    def killed(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(self, *args)

    monkeypatch.setattr(Spool, step, killed)


def test_a_killed_rollout_loses_one_unit_and_goes_on_to_the_same_bytes(whole, triplets, tmp_path, monkeypatch):
    rows = read_triplets(triplets)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_after(patched, 1)
        rollout(rows, tmp_path / "set", settings())
    assert not (tmp_path / "set/manifest.json").exists()
    made = kept_counts(monkeypatch)
    rollout(rows, tmp_path / "set", settings())
    assert made == [["t2", "t3"], ["t4"]]
    assert bytes_of(tmp_path / "set") == bytes_of(whole)
    made.clear()
    rollout(rows, tmp_path / "set", settings())
    assert made == []


def test_units_are_safe_before_their_shard_is(triplets, tmp_path, monkeypatch):
    """Killed between the units of a shard, and between its last unit and its packing: nothing is done again."""
    rows, config = read_triplets(triplets), settings(batch=1, samples_per_shard=3)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_after(patched, 2, "pack")
        rollout(rows, tmp_path / "set", config)
    assert not list((tmp_path / "set").glob("*.tar"))
    made = kept_counts(monkeypatch)
    rollout(rows, tmp_path / "set", config)
    assert made == [["t3"], ["t4"]]
    rollout(rows, tmp_path / "other", config)
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "other")
    assert [s.samples for s in ShardSet.open(tmp_path / "set").shards] == [3, 2]


@pytest.mark.parametrize("worlds", [[(1, 2), (0, 2)], [(2, 3), (0, 1)], [(0, 4)], [(3, 4), (1, 2), (0, 2)]])
def test_any_ranks_in_any_order_make_the_same_bytes(whole, triplets, tmp_path, monkeypatch, worlds):
    """Each rank is stopped after a unit but the last, which does what is left."""
    rows = read_triplets(triplets)
    for part, parts in worlds[:-1]:
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            kill_after(patched, 1)
            rollout(rows, tmp_path / "set", settings(part=part, parts=parts))
    made = kept_counts(monkeypatch)
    rollout(rows, tmp_path / "set", settings(part=worlds[-1][0], parts=worlds[-1][1]))
    assert len(made) == 3 - (len(worlds) - 1)
    assert bytes_of(tmp_path / "set") == bytes_of(whole)
    assert manifest_of(tmp_path / "set") == manifest_of(whole)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_bytes())


def test_a_unit_that_another_rank_has_claimed_is_left_to_it(triplets, tmp_path, monkeypatch):
    """The other rank is a real process, for locks are between processes."""
    rows, made = read_triplets(triplets), kept_counts(monkeypatch)
    (tmp_path / "set").mkdir()
    holder = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "set/.claims", 1))
    holder.start()
    while not (tmp_path / "set/.claims.held").exists():
        time.sleep(0.02)
    rollout(rows, tmp_path / "set", settings())
    assert made == [["t0", "t1"], ["t4"]]
    assert not (tmp_path / "set/manifest.json").exists()
    holder.kill()
    holder.join()
    rollout(rows, tmp_path / "set", settings())
    assert made[2:] == [["t2", "t3"]]
    assert len(ShardSet.open(tmp_path / "set")) == COUNT


def hold(path: Path, unit: int) -> None:
    with Claims(path).take(unit):
        Path(f"{path}.held").touch()
        time.sleep(600)


def test_without_locks_a_rank_keeps_to_its_share(whole, triplets, tmp_path, monkeypatch):
    rows, made = read_triplets(triplets), kept_counts(monkeypatch)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    rollout(rows, tmp_path / "set", settings(part=1, parts=2))
    assert made == [["t2", "t3"]]
    rollout(rows, tmp_path / "set", settings(part=0, parts=2))
    assert bytes_of(tmp_path / "set") == bytes_of(whole)
    assert (tmp_path / "set/manifest.json").exists()


def test_other_settings_are_refused_and_named(whole, triplets):
    with pytest.raises(DataError, match=r"guidance was 2\.0 and is now 4\.0"):
        rollout(read_triplets(triplets), whole, settings(guidance=4.0))
    with pytest.raises(DataError, match=r"5 were listed and 4 are now, new: none, gone: t0"):
        rollout(read_triplets(triplets)[1:], whole, settings())


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"solver": "euler"},
            {"steps": 5},
            {"shift": 2.0},
            {"seed": 1},
            {"step_counts": (1,)},
            {"student_shift": 5.0},
        ),
        *(
            {"guidance_high": 0.9},
            {"keep_full": False},
            {"dtype": "bf16"},
            {"stored": "bf16"},
            {"height": 64, "width": 64},
        ),
        *({"teacher_frames": 13}, {"batch": 1}, {"attention": "matmul"}, {"licence": "CC0"}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_setting_that_changes_a_sample_can_change(whole, triplets, change):
    with pytest.raises(DataError, match="begun with other settings"):
        rollout(read_triplets(triplets), whole, settings(**change))


def test_other_weights_are_refused_and_moved_ones_are_not(whole, triplets, tmp_path):
    moved = shutil.copytree(shared_wan_folder("flf2v"), tmp_path / "moved")
    rollout(read_triplets(triplets), whole, settings(teacher=str(moved)))
    with pytest.raises(DataError, match="teacher was"):
        rollout(read_triplets(triplets), whole, settings(teacher=str(shared_wan_folder("flf2v", 1))))


@pytest.fixture
def own(triplets, whole, tmp_path):
    """A copy of triplets and finished set, to be spoilt."""
    return shutil.copytree(triplets, tmp_path / "in"), shutil.copytree(whole, tmp_path / "set")


def test_a_changed_triplet_is_refused_or_done_again_with_its_neighbours(own, whole, monkeypatch):
    rows = read_triplets(own[0])
    picture(55).save(rows[1].source)
    rows[3] = replace(rows[3], instruction="make the sky green")
    with pytest.raises(DataError) as caught:
        rollout(rows, own[1], settings())
    assert "2 finished triplets" in str(caught.value)
    assert "t1: its pictures have changed" in str(caught.value)
    assert "t3: instruction was 'make the sky red' and is now 'make the sky green'" in str(caught.value)
    made = kept_counts(monkeypatch)
    rollout(rows, own[1], settings(changed="reroll"))
    assert sorted(made) == [["t0", "t1"], ["t2", "t3"]]
    now, before = ShardSet.open(own[1]), ShardSet.open(whole)
    assert now.keys == before.keys
    inputs = [(now.sample(i).origin.inputs, before.sample(i).origin.inputs) for i in range(COUNT)]
    assert [a == b for a, b in inputs] == [True, False, True, False, True]
    assert torch.equal(now.sample(2).rollout.end_Cthw, before.sample(2).rollout.end_Cthw)
    assert not torch.equal(now.sample(1).rollout.end_Cthw, before.sample(1).rollout.end_Cthw)
    rollout(rows, own[1], settings())


def test_doing_one_unit_again_keeps_the_rest_of_its_shard(triplets, tmp_path, monkeypatch):
    rows = read_triplets(shutil.copytree(triplets, tmp_path / "in"))
    config = settings(batch=1, samples_per_shard=5)
    rollout(rows, tmp_path / "set", config)
    before = bytes_of(tmp_path / "set")
    old = rows[2].edited.read_bytes()
    picture(56).save(rows[2].edited)
    made = kept_counts(monkeypatch)
    rollout(rows, tmp_path / "set", replace(config, changed="reroll"))
    assert (made, bytes_of(tmp_path / "set") == before) == ([["t2"]], False)
    rows[2].edited.write_bytes(old)
    rollout(rows, tmp_path / "set", replace(config, changed="reroll"))
    assert (made, bytes_of(tmp_path / "set") == before) == ([["t2"]] * 2, True)


def test_damaged_pictures_are_quarantined_and_the_others_rolled(own, tmp_path, monkeypatch):
    rows = read_triplets(own[0])
    rows[2].source.write_bytes(rows[2].source.read_bytes()[:60])
    rows[4].edited.unlink()
    config = settings(max_reject_fraction=0.4)
    shards = ShardSet.open(rollout(rows, tmp_path / "new", config))
    assert shards.keys == ["t0", "t1", "t3"]
    texts = [path.read_text() for path in sorted((tmp_path / "new").glob("*_rejects.jsonl"))]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    assert [line["key"] for line in lines] == ["t2", "t4"]
    assert str(rows[4].edited) in lines[1]["reason"]
    made = kept_counts(monkeypatch)
    with pytest.raises(DataError, match=r"2 of 5 triplets could not be used.*t2"):
        rollout(rows, tmp_path / "new", settings())
    assert made == []
    picture(57).save(rows[2].source)
    with pytest.raises(DataError, match="t2: was of no use, and has changed"):
        rollout(rows, tmp_path / "new", config)
    rollout(rows, tmp_path / "new", replace(config, changed="reroll"))
    assert ShardSet.open(tmp_path / "new").keys == ["t0", "t1", "t2", "t3"]


def test_a_teacher_that_says_nonsense_is_quarantined(triplets, tmp_path, monkeypatch):
    real = Worker._roll

    def spoilt(self, items, encoded):
        rolled = real(self, items, encoded)
        bad = [item.key == "t1" for item in items]
        return [replace(r, end_Cthw=r.end_Cthw / (1 - b)) for r, b in zip(rolled, bad, strict=True)]

    monkeypatch.setattr(Worker, "_roll", spoilt)
    shards = ShardSet.open(rollout(read_triplets(triplets), tmp_path / "set", settings(max_reject_fraction=0.2)))
    assert shards.keys == ["t0", "t2", "t3", "t4"]
    assert "end_Cthw is not finite" in (tmp_path / "set/000-000000_rejects.jsonl").read_text()


def test_a_damaged_unit_is_done_again(triplets, whole, tmp_path, monkeypatch):
    rows = read_triplets(triplets)
    config = settings(batch=1, samples_per_shard=5)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_after(patched, 2)
        rollout(rows, tmp_path / "set", config)
    unit = tmp_path / "set/.units/00000001.unit"
    unit.write_bytes(unit.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="damaged"):
        rollout(rows, tmp_path / "set", config)
    rollout(rows, tmp_path / "set", replace(config, changed="reroll"))
    assert bytes_of(tmp_path / "set") == bytes_of(rollout(rows, tmp_path / "other", config))


def test_without_a_teacher_the_same_encodings_and_no_rollout(whole, triplets, tmp_path):
    config = settings(teacher="none", codec=settings().teacher)
    shards = ShardSet.open(rollout(read_triplets(triplets), tmp_path / "set", config))
    ours, theirs = shards.sample(2), ShardSet.open(whole).sample(2)
    assert ours.rollout is None
    assert torch.equal(ours.encoded.clip_Cthw, theirs.encoded.clip_Cthw)
    assert torch.equal(ours.encoded.text_LE, theirs.encoded.text_LE)
    assert collate([ours], [1.0]).clip_BCthw.shape == (1, 4, 2, 4, 4)


def test_full_states_can_be_left_out(triplets, tmp_path):
    shards = ShardSet.open(rollout(read_triplets(triplets)[:1], tmp_path / "set", settings(keep_full=False)))
    assert shards.sample(0).rollout.full_KCthw.numel() == 0


def test_missing_prompts_teachers_and_settings_say_so(triplets, tmp_path):
    rows = read_triplets(triplets)
    with pytest.raises(DataError, match="evolve"):
        rollout([replace(rows[0], evolution="")], tmp_path / "set", settings())
    with pytest.raises(CheckpointError, match="no-such"):
        rollout(rows, tmp_path / "set", settings(teacher="/no-such"))
    with pytest.raises(ConfigError, match="teacher"):
        settings(teacher="")
    with pytest.raises(ConfigError, match="part 2"):
        settings(part=2, parts=2)


def test_the_verb_reads_its_settings_from_yaml_and_words(triplets, tmp_path, capsys):
    (tmp_path / "rollout.yaml").write_text(
        f"height: {SIZE}\nwidth: {SIZE}\nteacher_frames: 9\nstep_counts: [1]\nguidance: 1.0\nattention: native\n"
    )
    parser = argparse.ArgumentParser()
    room.add_arguments(parser)
    words = [str(triplets), str(tmp_path / "set"), "seed=3", "--teacher", settings().teacher, "--config"]
    args = parser.parse_args([*words, str(tmp_path / "rollout.yaml"), "batch=4", "dtype=fp32"])
    assert room.run(args) == 0
    assert len(ShardSet.open(tmp_path / "set")) == COUNT
    shown = capsys.readouterr().out
    assert "batch: 4" in shown
    assert "seed: 3" in shown


# ------------------------------------------------------------------------------------------- evolving clips


def clips(count: int, T: int = 5) -> list[Evolving]:
    frames = torch.from_numpy(np.stack([np.asarray(picture(i)) for i in range(count * T)])).movedim(-1, 1)
    parts = [Clip(part.contiguous()) for part in frames.split(T)]
    return [Evolving(f"c{i}", clip, "the sky turn red", f"make {i}", "recolour") for i, clip in enumerate(parts)]


def test_packed_clips_are_their_own_latents(tmp_path):
    codec, items = WanCodec.load(shared_wan_folder("i2v")), clips(3)
    grid = codec.grid(5, SIZE, SIZE)
    shards = ShardSet.open(pack_clips(items, tmp_path / "set", codec, grid, batch=2))
    assert shards.keys == ["c0", "c1", "c2"]
    e = shards.sample(2).encoded
    near = {"atol": 2e-2, "rtol": 1e-2}  # stored in bf16
    assert torch.allclose(e.clip_Cthw.float(), codec.encode([items[2].clip])[0], **near)
    first, last = items[2].clip.frame(0), items[2].clip.frame(-1)
    assert torch.allclose(e.known_Cthw.float(), codec.known([first], grid)[0], **near)
    assert torch.allclose(e.teacher_known_Cthw.float(), codec.known([first], grid, [last])[0], **near)
    assert torch.equal(e.text_LE, codec.read(["make 2"])[0].bfloat16())


def test_packing_for_one_model_goes_into_its_batches_only(tmp_path):
    codec, items = WanCodec.load(shared_wan_folder("i2v")), clips(2)
    grid = codec.grid(5, SIZE, SIZE)
    i2v = ShardSet.open(pack_clips(items, tmp_path / "i2v", codec, grid, ends="first"))
    flf = ShardSet.open(pack_clips(items, tmp_path / "flf", codec, grid, ends="first_and_last"))
    assert i2v.sample(0).encoded.teacher_known_Cthw.numel() == 0
    assert collate([i2v.sample(0)], [1.0], text="evolution").conditions.known_BCthw.shape == (1, 4, 2, 4, 4)
    assert flf.sample(0).encoded.known_Cthw.numel() == 0
    both = collate([flf.sample(0)], [1.0], first_and_last=True).conditions
    assert both.vision_BNV.shape[0] == 2


def test_packing_by_two_processes_goes_on_to_the_same_bytes(tmp_path):
    codec, items = WanCodec.load(shared_wan_folder("i2v")), clips(5)
    grid = codec.grid(5, SIZE, SIZE)
    whole, split = tmp_path / "whole", tmp_path / "split"
    for part in (0, 1):
        pack_clips(items, whole, codec, grid, batch=2, samples_per_shard=2, part=part, parts=2)
    for part in (1, 0, 1):
        pack_clips(iter(items), split, codec, grid, batch=2, samples_per_shard=2, part=part, parts=2)
    assert ShardSet.open(split).keys == ["c0", "c1", "c4", "c2", "c3"]
    assert bytes_of(whole) == bytes_of(split)
