"""Roll-outs: what is stored is what was fed, and neither a kill nor another number of processes changes a byte."""

import argparse
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from builders import shared_wan_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools import rollout as room
from data_tools.ingest import Listed, Triplet, ingest, iterate, read_triplets, write_triplets
from data_tools.ingest import triplets as triplets_module
from data_tools.rollout import Evolving, RolloutConfig, Worker, pack_clips, rollout, work
from data_tools.rollout.encode import RolloutCodec
from data_tools.rollout.plan import Chosen, Plan
from data_tools.rollout.run import by_size
from data_tools.rollout.spool import Spool
from v4e import dist, flow, journal
from v4e.config import Wandb
from v4e.data import places
from v4e.data.collate import collate
from v4e.data.index import index_path
from v4e.data.members import unpack
from v4e.data.shards import ShardSet, read_manifest, write_shard
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.models.codec import WanCodec
from v4e.models.wan import WanBackbone
from v4e.nouns import Clip, seed_of
from v4e.pipelines import Guidance, TeacherPipeline, noise_of, spreadable

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
    assert torch.allclose(e.text_LE, codec.read(["make the sky red"])[0], atol=1e-5)
    assert torch.allclose(e.evolution_LE, codec.read(["the sky turn red 4"])[0], atol=1e-5)
    assert torch.allclose(e.null_LE, codec.read([""])[0], atol=1e-5)
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


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]), os.SEEK_SET)
print("held", flush=True)
time.sleep(600)
"""


def test_a_unit_that_another_rank_has_claimed_is_left_to_it(triplets, tmp_path, monkeypatch):
    """The other rank is a real process, for locks are between processes."""
    rows, made = read_triplets(triplets), kept_counts(monkeypatch)
    (tmp_path / "set").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "set/.claims"), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        rollout(rows, tmp_path / "set", settings())
        assert made == [["t0", "t1"], ["t4"]]
        assert not (tmp_path / "set/manifest.json").exists()
        holder.kill()
    rollout(rows, tmp_path / "set", settings())
    assert made[2:] == [["t2", "t3"]]
    assert len(ShardSet.open(tmp_path / "set")) == COUNT


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


def unhashed(folder: Path) -> list[Triplet]:
    """Triplets as a list without hashes would have them, so that their pictures may change."""
    return [replace(row, hashes={}) for row in read_triplets(folder)]


def test_a_changed_triplet_is_refused_or_done_again_with_its_neighbours(own, whole, monkeypatch):
    rows = unhashed(own[0])
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
    rows = unhashed(shutil.copytree(triplets, tmp_path / "in"))
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
    rows = unhashed(own[0])
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
    rows[2].source.unlink()  # what cannot be read has not changed
    rollout(rows, tmp_path / "new", config)
    picture(57).save(rows[2].source)
    with pytest.raises(DataError, match="t2: was of no use, and has changed"):
        rollout(rows, tmp_path / "new", config)
    rollout(rows, tmp_path / "new", replace(config, changed="reroll"))
    assert ShardSet.open(tmp_path / "new").keys == ["t0", "t1", "t2", "t3"]


def test_a_picture_that_was_hashed_but_not_read_is_tried_again(own, tmp_path, monkeypatch):
    rows, config, real = unhashed(own[0]), settings(max_reject_fraction=0.2), triplets_module.read_bytes

    def faulty(where):
        if where == rows[2].source:
            with places.reaching(where):
                raise OSError(errno.EIO, "a bad sector")
        return real(where)

    with monkeypatch.context() as patched:
        patched.setattr(triplets_module, "read_bytes", faulty)
        assert ShardSet.open(rollout(rows, tmp_path / "new", config)).keys == ["t0", "t1", "t3", "t4"]
    with pytest.raises(DataError, match="t2: was of no use, and has changed"):
        rollout(rows, tmp_path / "new", config)
    rollout(rows, tmp_path / "new", replace(config, changed="reroll"))
    assert ShardSet.open(tmp_path / "new").keys == ["t0", "t1", "t2", "t3", "t4"]


@pytest.mark.parametrize(
    ("fault", "is_the_triplets"),
    [
        (FileNotFoundError(errno.ENOENT, "no such file"), True),
        (PermissionError(errno.EACCES, "a file of somebody else"), True),
        (OSError(errno.EIO, "a bad sector"), True),
        (OSError(errno.ESTALE, "a mount that has gone"), False),
        (OSError(errno.EMFILE, "too many open files"), False),
        (PermissionError("one object is not ours"), True),
        (PermissionError("credentials have expired"), False),
        (RuntimeError("botocore: no route to host"), False),
    ],
    ids=lambda value: str(value),
)
def test_a_fault_of_the_machine_is_no_triplets(own, tmp_path, monkeypatch, fault, is_the_triplets):
    """What would befall every other triplet stops the rank; none is taken for a bad one."""
    rows = unhashed(own[0])

    real, read = work.read_bytes, []

    def faulty(where):
        gone = "expired" in str(fault) and len(read) >= 4  # both pictures of two triplets, then none
        read.append(where)
        if gone or where == rows[2].source:
            with places.reaching(where):
                raise fault
        return real(where)

    monkeypatch.setattr(places.time, "sleep", lambda _: None)
    monkeypatch.setattr(work, "read_bytes", faulty)
    config = settings(max_reject_fraction=0.4)
    if is_the_triplets:
        assert ShardSet.open(rollout(rows, tmp_path / "new", config)).keys == ["t0", "t1", "t3", "t4"]
        return
    with pytest.raises(DataError, match=re.escape(str(fault.args[-1]))):
        rollout(rows, tmp_path / "new", config)
    monkeypatch.setattr(work, "read_bytes", real)
    assert ShardSet.open(rollout(rows, tmp_path / "new", config)).keys == ["t0", "t1", "t2", "t3", "t4"]


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
    words = [
        str(triplets),
        str(tmp_path / "set"),
        "seed=3",
        "wandb.mode=disabled",
        "--teacher",
        settings().teacher,
        "--config",
    ]
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


# ------------------------------------------------------------------------------------------- steps and guidance


@given(st.integers(8, 40), st.floats(0.5, 16))
@hypothesis.settings(max_examples=20, deadline=None)
def test_a_refined_grid_keeps_its_levels_and_falls(steps, by):
    levels = flow.union_grid((1, 2, 4, 8), 3.0)
    grid = flow.refine(levels, steps, by)
    assert len(grid) == steps + 1
    assert torch.isin(levels, grid).all()
    assert (grid[1:] < grid[:-1]).all()


def test_further_steps_go_where_steps_are_longest():
    """Of 5 steps three go into the first of two equal halves, and two into the other."""
    grid = flow.refine(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), 5, 1.0)
    assert torch.allclose(grid, torch.tensor([1, 5 / 6, 4 / 6, 0.5, 0.25, 0], dtype=torch.float64))


def counted(monkeypatch) -> list[float]:
    """Noise levels that the teacher is asked about from now on."""
    real, asked = WanBackbone.forward, []

    def forward(self, x, sigma_B, *rest, **named):
        asked.append(round(float(sigma_B[0]), 4))
        return real(self, x, sigma_B, *rest, **named)

    monkeypatch.setattr(WanBackbone, "forward", forward)
    return asked


def test_steps_solver_and_guidance_are_real(triplets, monkeypatch):
    unit = read_triplets(triplets)[:2]
    asked = counted(monkeypatch)

    def rolled(**changes):
        asked.clear()
        made = Worker.load(settings(guidance=8.0, **changes), (SIZE, SIZE)).work(unit).made[1]
        return unpack(made.key, made.members, "").rollout

    plain = rolled()
    assert len(asked) == 4 and len(plain.sigma_K) == 2
    more = rolled(steps=6)
    assert len(asked) == 12
    assert torch.equal(more.sigma_K, plain.sigma_K)
    assert torch.equal(more.full_KCthw[0], plain.full_KCthw[0])
    assert not torch.allclose(more.full_KCthw[1], plain.full_KCthw[1], atol=1e-4)
    interval = rolled(steps=6, guidance_high=0.8, guidance_low=0.3)
    assert len(asked) == 6 + sum(0.3 <= sigma <= 0.8 for sigma in set(asked)) < 12
    assert not torch.allclose(interval.end_Cthw, more.end_Cthw, atol=1e-4)
    assert not torch.allclose(rolled(steps=6, solver="euler").end_Cthw, more.end_Cthw, atol=1e-4)
    assert not torch.allclose(rolled(steps=6, shift=2.0).end_Cthw, more.end_Cthw, atol=1e-4)


def test_what_is_known_is_embedded_once(triplets, monkeypatch):
    """Of 5 triplets with two texts each: every text, and every picture, goes through its encoder once."""
    rows, texts, looks = read_triplets(triplets), [], []
    read, look = RolloutCodec._read_one, RolloutCodec._look_one
    monkeypatch.setattr(RolloutCodec, "_read_one", lambda self, text: texts.append(text) or read(self, text))
    monkeypatch.setattr(RolloutCodec, "_look_one", lambda self, clip: looks.append(clip) or look(self, clip))
    twin = replace(rows[1], id="twin", source=rows[0].source, hashes={})
    worker = Worker.load(settings(batch=3), (SIZE, SIZE))
    assert not worker.work([rows[0], rows[1], twin]).rejects
    assert sorted(texts) == ["", "make the sky red", "the sky turn red 0", "the sky turn red 1"]
    assert len(looks) == 4


def test_remembering_changes_no_bit():
    """What a backbone remembers of the conditions is what it would compute."""
    teacher = TeacherPipeline.from_pretrained(shared_wan_folder("flf2v"), attention="native")
    codec, grid = teacher.codec, teacher.grid(9, (SIZE, SIZE))
    images = [clip.clip.frame(0) for clip in clips(4, 1)]
    known = codec.known(images[:2], grid, images[2:])
    texts, first, last = codec.read(["make red", "a sky"]), codec.look(images[:2]), codec.look(images[2:])
    told = codec.conditions(texts, first, known, grid, last)
    x = noise_of([0, 1], 4, grid.t, grid.h, grid.w)
    for fold in (False, True):
        backbone = teacher.backbone.set_attention("native", fold)
        levels = [torch.full((2,), sigma) for sigma in (0.9, 0.4)]
        plain = [backbone(x, sigma, told)[0] for sigma in levels]
        with backbone.remembering():
            assert all(torch.equal(backbone(x, sigma, told)[0], v) for sigma, v in zip(levels, plain, strict=True))


# ---------------------------------------------------------------------------------------------- what is in memory


def test_a_list_is_read_line_by_line_where_it_is_needed(triplets, tmp_path):
    folder = shutil.copytree(triplets, tmp_path / "in")
    listed, rows = Listed(folder), [*iterate(folder)]
    assert [*listed] == rows and listed[1:4] == rows[1:4] and listed[-1] == rows[-1] and len(listed) == COUNT
    assert [*Chosen(listed, [3, 0])] == [rows[3], rows[0]] and Chosen(listed, [3, 0])[1:] == [rows[0]]
    with pytest.raises(IndexError):
        listed[COUNT]
    write_triplets(folder, [replace(row, instruction="another") for row in reversed(rows)])
    assert listed[2] == rows[2]  # that of the list as it was
    write_triplets(folder, [*rows, rows[1], rows[0]])
    with pytest.raises(DataError, match=r"triplets\.jsonl, line 6: an earlier line has the id 't1' too"):
        Listed(folder)


def test_a_triplet_of_a_roll_out_takes_some_bytes_and_not_its_line(triplets, whole, tmp_path):
    """At their most, while the list is held against the folder's; a triplet itself is 2.5 kB."""
    row, most = next(iterate(triplets)), []
    (tmp_path / "in").mkdir()
    for count in (100, 1100):
        write_triplets(tmp_path / "in", (replace(row, id=f"t{n}") for n in range(count)))
        tracemalloc.start()
        ((_, chosen),) = by_size(Listed(tmp_path / "in"), settings()).items()
        spool = Spool(tmp_path / f"set{count}", Plan(chosen, 1, 4), read_manifest(whole)[0], torch.float32)
        assert len([*spool.missing()]) == len(spool.plan.triplets) == count
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        spool.claims.close()
    assert most[1] - most[0] < 200 * 1000


def test_packing_holds_one_unit_at_a_time(triplets, tmp_path, monkeypatch):
    """Of a shard of five: the one that is written, and the next one, which is being read."""
    outcome, held, alive = Spool.outcome, [], []

    def noted(self, unit):
        held.append(weakref.ref(found := outcome(self, unit)))
        alive.append(sum(ref() is not None for ref in held))
        return found

    monkeypatch.setattr(Spool, "outcome", noted)
    rollout(read_triplets(triplets), tmp_path / "set", settings(batch=1, samples_per_shard=COUNT))
    assert len(alive) == COUNT and max(alive) <= 2
    sheet = json.loads((tmp_path / "set/000-000000_stats.json").read_text())
    assert sheet["samples"] == COUNT


# ------------------------------------------------------------------------------------------------ sizes, ranks


def test_sizes_are_sets_of_their_own(triplets, tmp_path):
    rows = [replace(row, size=(SIZE, SIZE if i % 2 else 2 * SIZE)) for i, row in enumerate(read_triplets(triplets))]
    rollout(rows, tmp_path / "set", settings(height=0, width=0))
    square, wide = ShardSet.open(tmp_path / "set/32x32"), ShardSet.open(tmp_path / "set/32x64")
    assert [*square.keys] == ["t1", "t3"]
    assert [*wide.keys] == ["t0", "t2", "t4"]
    assert wide.sample(0).encoded.clip_Cthw.shape[-2:] == (4, 8)
    assert (wide.meta.student.W, square.meta.student.W) == (64, 32)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}, (5, 6, 2)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}, (2, 4, 0)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7"}, (0, 1, 0)),
        (
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
            | {"SLURM_ARRAY_TASK_STEP": "2", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            (5, 6, 1),
        ),
    ],
)
def test_where_a_rank_stands(monkeypatch, variables, place):
    for name in [*os.environ]:
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ranks = dist.place()
    assert (ranks.rank, ranks.world, ranks.local_rank) == place


def test_an_array_with_gaps_is_refused(monkeypatch):
    for name, value in {"ID": "9", "COUNT": "3", "MIN": "1"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(ConfigError, match="9 is not one of a regular array of 3"):
        dist.place()


def test_the_journal_counts_over_all_ranks(triplets, tmp_path):
    rows = read_triplets(triplets)
    rows[3] = replace(rows[3], source=tmp_path / "gone.png", hashes={})
    rollout(rows, tmp_path / "set", settings(part=1, parts=2, max_reject_fraction=1))
    assert not (tmp_path / "set/journal").exists()
    rollout(rows, tmp_path / "set", settings(part=0, parts=2, max_reject_fraction=1))
    last = journal.read(tmp_path / "set/journal")[-1]
    assert (last["step"], last["samples"], last["rejects"]) == (5, 5, 1)
    assert last["packed_bytes"] == sum(p.stat().st_size for p in (tmp_path / "set").glob("*.tar"))


def test_what_is_packed_is_counted_by_its_statistics_each_read_once(own):
    """Three shards of 2, 2 and 1 triplets, of which the second lacks a sample and the third its statistics."""
    rows, folder = read_triplets(own[0]), own[1]
    sheets = [folder / f"000-{n:06d}_stats.json" for n in range(3)]
    for n, sheet in enumerate(sheets):
        sheet.write_text(json.dumps({"samples": 1, "bytes": 1000 + n, "seconds": 2.5}))
    sheets[0].write_text(json.dumps({"samples": 2, "bytes": 1000, "seconds": 1.25}))
    sheets[2].unlink()
    spool = Spool(folder, Plan(rows, 2, 1), read_manifest(folder)[0], torch.float32)
    size = (folder / "000-000002.tar").stat().st_size
    wanted = {"samples": 4, "bytes": 2001 + size, "seconds": 3.75, "rejects": 1}
    assert spool.tally() == wanted
    sheets[0].write_text("{")
    assert spool.tally() == wanted
    spool.claims.close()


def test_two_that_pack_one_shard_at_once_make_the_same(tmp_path):
    """Without locks it may happen; the second begins while the first is at it, and ends after it."""
    samples = [(f"s{n}", "add", {"json": bytes([65 + n]) * 5000}) for n in range(4)]
    alone, path = tmp_path / "alone/000-000000.tar", tmp_path / "set/000-000000.tar"
    for folder in (alone.parent, path.parent):
        folder.mkdir()
    write_shard(alone, samples)

    def first() -> Iterator[tuple[str, str, dict[str, bytes]]]:
        yield from samples[:2]
        write_shard(path, second())
        yield from samples[2:]

    def second() -> Iterator[tuple[str, str, dict[str, bytes]]]:
        yield samples[0]
        assert len(list(path.parent.glob(".tmp-*"))) == 2
        yield from samples[1:]

    write_shard(path, first())
    assert path.read_bytes() == alone.read_bytes() and index_path(path).read_bytes() == index_path(alone).read_bytes()
    assert not list(path.parent.glob(".tmp-*"))


def test_what_a_killed_packer_had_begun_is_removed_at_the_end(own):
    rows, folder = read_triplets(own[0]), own[1]
    (begun := folder / ".tmp-000-000001.tar-0f").write_bytes(b"half")
    spool = Spool(folder, Plan(rows, 2, 1), read_manifest(folder)[0], torch.float32)
    spool.claims.work = False
    assert spool.finish() and begun.exists()  # without locks somebody may be at it
    spool.claims.work = True
    assert spool.finish() and not begun.exists()
    spool.claims.close()


def test_no_manifest_tells_of_a_shard_that_another_rank_takes_apart_meanwhile(own, monkeypatch):
    """This rank has just seen all shards whole, when the other one drops a unit to do it again."""
    rows, folder = read_triplets(own[0]), own[1]
    spool = Spool(folder, Plan(rows, 2, 1), read_manifest(folder)[0], torch.float32)
    looks = [lambda: set(spool.plan.shards), spool._packed]
    spool.drop(0)
    assert not (folder / "manifest.json").exists()
    monkeypatch.setattr(spool, "_packed", lambda: looks.pop(0)())
    assert not spool.finish()
    assert looks == [] and not (folder / "manifest.json").exists()
    spool.claims.close()


# ------------------------------------------------------------------------------------- one roll-out, several ranks


def test_attention_that_cannot_be_spread_is_refused_and_auto_picks_another(caplog):
    with caplog.at_level("INFO", "v4e.pipelines"):
        assert spreadable("auto") == "native"
    assert "xformers has no context parallelism" in caplog.text
    assert spreadable("sage") == "sage"
    with pytest.raises(ConfigError, match="'xformers' has no context parallelism"):
        spreadable("xformers")
    with pytest.raises(ConfigError, match="folded"):
        settings(span=2, fold_text_padding=True)


@pytest.mark.slow
def test_two_ranks_share_a_roll_out(triplets, whole, tmp_path):
    """By gloo on a CPU. Attention sums in another order, so the states are close and all else is the same."""
    port = str(20000 + os.getpid() % 20000)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=spread_rank, args=(r, port, triplets, tmp_path / "set")) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    ours, theirs = ShardSet.open(tmp_path / "set"), ShardSet.open(whole)
    assert [*ours.keys] == [*theirs.keys]
    for i in range(COUNT):
        a, b = ours.sample(i), theirs.sample(i)
        assert torch.equal(a.encoded.teacher_known_Cthw, b.encoded.teacher_known_Cthw)
        assert torch.allclose(a.rollout.end_Cthw, b.rollout.end_Cthw, atol=2e-5, rtol=1e-4)
        assert torch.allclose(a.rollout.v_KCthw, b.rollout.v_KCthw, atol=2e-5, rtol=1e-4)


def spread_rank(rank: int, port: str, triplets: Path, out: Path) -> None:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a CPU counts none
    rollout(read_triplets(triplets), out, settings(span=2, parts=0))
