"""Every byte of a set is held against something, and a repair keeps every good sample and drops nothing else."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from test_shards import META, Painter, contents, flip, forge, make_sample, painted, read_tar, write

import data_tools.verify as verify_module
from data_tools.repair import ASIDE, repair
from data_tools.verify import verify
from v4e.data.disk import hash_of, to_json
from v4e.data.shards import Index, ShardSet, ShardWriter, finish, index_path, write_shard
from v4e.errors import DataError

FIRST = "000-000000.tar"


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return write(tmp_path / "set")


def index_of(shards: ShardSet, name: str = FIRST) -> Index:
    return Index(index_path(shards.folder / name))


def keys_of(folder: Path) -> list[str]:
    return sorted(k for path in folder.glob("*.index.json") for k in Index(path).keys)


def fill_up(folder: Path, n: int = 7) -> ShardSet:
    """What the writer does that is run again: the samples that are not done."""
    with ShardWriter(folder, META, samples_per_shard=3) as writer:
        for i in range(n):
            if f"s{i:04d}" not in writer.done:
                writer.add(make_sample(i))
    return ShardSet.open(folder)


def samples_of(shards: ShardSet) -> dict[str, dict[str, bytes]]:
    return {shards.keys[i]: {k: bytes(v) for k, v in shards.members(i).items()} for i in range(len(shards))}


# ------------------------------------------------------------------------------------------------------- verify


def test_ends_of_shards_that_are_empty_are_looked_at(tmp_path):
    """All triplets of a shard may have been rejected."""
    with ShardWriter(tmp_path, META) as writer:
        writer.add(make_sample(0))
    (tmp_path / "manifest.json").unlink()
    for name in ("000-000001.tar", "000-000002.tar"):
        write_shard(tmp_path / name, ())
    finish(tmp_path)
    assert not verify(tmp_path).problems
    for name in (FIRST, "000-000001.tar", "000-000002.tar"):
        flip(tmp_path / name, (tmp_path / name).stat().st_size - 1)
        assert [p.shard for p in verify(tmp_path).problems] == [name]
        flip(tmp_path / name, (tmp_path / name).stat().st_size - 1)


def test_every_byte_counts(tmp_path):
    """Also those that no reader looks at: owner fields, padding, the end."""
    shards = write(tmp_path, n=2, per_shard=2)
    path = shards.folder / FIRST
    member = index_of(shards).member(0, "json")
    silent = []
    for at in [5, 110, 140, 265, 500, member.offset + member.size, *range(700, path.stat().st_size, 977)]:
        flip(path, at)
        silent += [at] * (not verify(tmp_path).problems)
        flip(path, at)
    assert silent == [] and not verify(tmp_path).problems


@pytest.mark.parametrize("workers", [1, 3])
def test_faults_name_shard_key_and_row(shards, workers):
    flip(shards.folder / FIRST, index_of(shards).member(1, "rollout.safetensors").offset + 40)
    flip(shards.folder / FIRST, index_of(shards).member(2, "target.png").offset - 300)
    found = [(p.kind, p.shard, p.key, p.row) for p in verify(shards.folder, workers=workers).problems]
    assert found == [("hash", FIRST, "s0001", 1), ("tar structure", FIRST, "s0002", 2)]


def two_with_doubles(folder: Path) -> None:
    """Two shards that nobody compared: samples 0, 1, 2 and 3, 1, 2."""
    for part in (0, 1):
        with ShardWriter(folder / str(part), META, part=part, manifest=False) as writer:
            for n in (3 * part, 1, 2):
                writer.add(make_sample(n))
        for path in (folder / str(part)).iterdir():
            path.rename(folder / path.name)


def test_all_doubles_are_named(tmp_path):
    two_with_doubles(tmp_path)
    report = verify(tmp_path)
    doubles = [(p.shard, p.key) for p in report.problems if p.kind == "double key"]
    assert doubles == [("001-000000.tar", "s0001"), ("001-000000.tar", "s0002")]
    assert report.counts["manifest"] == 1 and report.samples == 6


def test_a_picture_of_another_size_is_refused_before_it_is_unpacked(shards):
    members = {info.name: content for info, content in read_tar(shards.folder / FIRST)}
    bomb = bytearray(members["s0001.source.png"])
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    rewrite(shards, {"s0001.source.png": bytes(bomb)})
    (problem,) = verify(shards.folder).problems
    assert problem.kind == "picture" and problem.key == "s0001" and "60000x60000, not 16x16" in problem.detail


def rewrite(shards: ShardSet, changed: dict[str, bytes]) -> None:
    """The first shard with other contents and all hashes in agreement: what a faulty writer would leave."""
    with tarfile.open(shards.folder / FIRST) as tar:
        rows = [(i.name, changed.get(i.name, tar.extractfile(i).read())) for i in tar]
    forge(shards, [(named(name, content), content) for name, content in rows if content is not None])
    index, places = json.loads(index_path(shards.folder / FIRST).read_bytes()), {}
    index.pop("quick")
    with tarfile.open(shards.folder / FIRST) as tar:
        for info in tar:
            key, _, kind = info.name.partition(".")
            places.setdefault(key, {})[kind] = [info.offset_data, info.size, hash_of(tar.extractfile(info).read())]
    index_path(shards.folder / FIRST).write_text(json.dumps({**index, "samples": [*places.items()]}))
    finish(shards.folder)


def named(name: str, content: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info


def test_a_forged_index_cannot_ask_for_the_moon(shards):
    path = index_path(shards.folder / FIRST)
    body = json.loads(path.read_bytes())
    body["samples"][1][1]["json"][1] = 1 << 60
    path.write_text(json.dumps(body))
    (shards.folder / "manifest.json").unlink()
    assert {p.key for p in verify(shards.folder).problems if p.kind == "hash"} == {"s0001"}


# ------------------------------------------------------------------------------------------------------- repair


def test_a_repair_drops_what_is_bad_and_the_writer_makes_it_again(shards):
    before = samples_of(shards)
    flip(shards.folder / FIRST, index_of(shards).member(1, "rollout.safetensors").offset + 40)
    done = repair(shards.folder, verify(shards.folder), most=0.5)
    assert [(p.shard, p.key, p.kind) for p in done.dropped] == [(FIRST, "s0001", "hash")] and not done.whole
    assert keys_of(shards.folder) == sorted(before.keys() - {"s0001"})
    assert json.loads((shards.folder / "dropped.jsonl").read_text())["key"] == "s0001"
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(shards.folder)
    again = fill_up(shards.folder)
    assert samples_of(again) == before and not verify(shards.folder).problems


@pytest.mark.parametrize("older", [False, True])
def test_damage_between_samples_costs_none(shards, older):
    """Also in a set from before indexes held xxh3."""
    for path in shards.folder.glob("*.index.json") if older else ():
        body = json.loads(path.read_bytes())
        path.write_bytes(to_json({name: body[name] for name in body if name != "quick"}))
    finish(shards.folder)
    before = contents(shards.folder)
    with open(shards.folder / FIRST, "ab") as file:
        file.write(b"junk")
    flip(shards.folder / "000-000001.tar", 300)
    flip(index_path(shards.folder / "000-000002.tar"), 30)
    done = repair(shards.folder, verify(shards.folder))
    assert sorted(done.restored) == [FIRST, "000-000001.tar", "000-000002.index.json"]
    assert done.whole and not done.dropped and contents(shards.folder) == before
    assert sorted(p.name for p in (shards.folder / ASIDE).iterdir()) == sorted(done.restored)
    assert not verify(shards.folder).problems


def test_of_a_truncated_shard_the_front_is_kept(shards):
    end = index_of(shards).member(1, "encoded.safetensors").offset
    os.truncate(shards.folder / FIRST, end)
    done = repair(shards.folder, verify(shards.folder), most=0.5)
    assert [p.key for p in done.dropped] == ["s0001", "s0002"]
    assert keys_of(shards.folder) == ["s0000", *(f"s{n:04d}" for n in range(3, 7))]
    assert len(fill_up(shards.folder)) == 7 and not verify(shards.folder).problems


def test_a_missing_shard_is_made_again(shards):
    (shards.folder / "000-000001.tar").unlink()
    assert [p.key for p in repair(shards.folder, verify(shards.folder), most=1).dropped] == ["s0003", "s0004", "s0005"]
    assert len(fill_up(shards.folder)) == 7 and not verify(shards.folder).problems


def test_damaged_index_and_tar_still_give_what_can_be_proven(shards):
    flip(index_path(shards.folder / FIRST), index_path(shards.folder / FIRST).read_bytes().index(b"target.png") + 25)
    flip(shards.folder / FIRST, index_of(shards).member(2, "json").offset + 3)
    done = repair(shards.folder, verify(shards.folder), most=1)
    assert "s0002" in [p.key for p in done.dropped] and len(done.dropped) == 2
    assert len(fill_up(shards.folder)) == 7 and not verify(shards.folder).problems


def test_of_doubles_the_first_good_one_stays(tmp_path):
    two_with_doubles(tmp_path)
    flip(tmp_path / FIRST, Index(index_path(tmp_path / FIRST)).member(1, "json").offset + 3)
    done = repair(tmp_path, verify(tmp_path), most=1, seal=True)
    assert [(p.shard[:3], p.key, p.kind) for p in done.dropped] == [
        ("000", "s0001", "hash"),
        ("001", "s0002", "double key"),
    ]
    assert done.whole and keys_of(tmp_path) == ["s0000", "s0001", "s0002", "s0003"]
    assert not verify(tmp_path).problems


def test_a_repair_that_was_killed_is_run_again(shards, monkeypatch):
    flip(shards.folder / FIRST, index_of(shards).member(1, "json").offset + 4)
    report = verify(shards.folder)
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.repair._set_aside", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            repair(shards.folder, report, most=0.15)
    assert verify(shards.folder).counts["double key"] == 2
    repair(shards.folder, verify(shards.folder), most=0.15)  # one sample of seven is lost, and no second of the doubles
    assert keys_of(shards.folder) == [f"s{n:04d}" for n in range(7) if n != 1]
    assert len(fill_up(shards.folder)) == 7 and not verify(shards.folder).problems


def test_too_much_damage_changes_nothing(shards):
    os.truncate(shards.folder / FIRST, 0)
    before = {p.name: p.read_bytes() for p in shards.folder.iterdir() if p.is_file()}
    with pytest.raises(DataError, match="3 of 7 samples.*--most-dropped"):
        repair(shards.folder, verify(shards.folder))
    assert {p.name: p.read_bytes() for p in shards.folder.iterdir() if p.is_file()} == before


def test_what_cannot_be_read_is_not_dropped(shards, monkeypatch):
    def broken(path, offset, size):
        raise DataError("cannot be read: Input/output error", where=str(path))

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.verify.read_range", broken)
        report = verify(shards.folder)
    assert report.counts["unread"] >= 7
    done = repair(shards.folder, report)
    assert done.dropped == [] and len(done.left) == len(report.problems) and len(ShardSet.open(shards.folder)) == 7


def test_what_cannot_be_read_while_it_is_mended_is_not_dropped(shards, monkeypatch):
    """One sample is damaged; while its shard is read again, the store does not give another one."""
    index = index_of(shards)
    flip(shards.folder / FIRST, index.member(1, "json").offset + 4)
    report, before, read = verify(shards.folder), contents(shards.folder), verify_module.read_range

    def reset(path, offset, size):
        if offset <= index.member(0, "json").offset < offset + size:
            raise DataError("cannot be read: Connection reset by peer", where=str(path))
        return read(path, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "read_range", reset)
        with pytest.raises(DataError, match="Connection reset by peer.*; nothing was dropped"):
            repair(shards.folder, report, most=1)
    assert contents(shards.folder) == before
    assert [p.key for p in repair(shards.folder, report, most=1).dropped] == ["s0001"]


def test_a_writer_at_work_is_not_disturbed(shards):
    flip(shards.folder / FIRST, index_of(shards).member(1, "json").offset + 4)
    report = verify(shards.folder)
    with ShardWriter(shards.folder, META, samples_per_shard=3), pytest.raises(DataError, match="another writer"):
        repair(shards.folder, report, most=1)


def test_latents_of_another_picture_are_dropped(tmp_path):
    with ShardWriter(tmp_path, META) as writer:
        for n, pair in enumerate([(0.25, 0.75), (0.9, 0.75), (0.25, 0.75)]):
            writer.add(painted(n, *pair))
    done = repair(tmp_path, verify(tmp_path, codec=Painter(), decode=0), most=1, seal=True)
    assert [(p.key, p.kind) for p in done.dropped] == [("s0001", "decode")] and keys_of(tmp_path) == ["s0000", "s0002"]


def test_samples_of_a_rollout_wait_as_units(tmp_path):
    """The set's plan has a name for every shard: what is good goes back to the units of which shards are packed."""
    from data_tools.rollout.spool import Unit

    shards = write(tmp_path, n=6, per_shard=6)
    settings = json.loads((tmp_path / "settings.json").read_bytes())
    settings["settings"]["batch"] = 2
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "triplets.json").write_text(json.dumps([f"s{n:04d}" for n in range(6)]))
    before = samples_of(shards)
    flip(tmp_path / FIRST, index_of(shards).member(2, "json").offset + 4)
    repair(tmp_path, verify(tmp_path), most=1)
    units = {p.name: Unit.from_bytes(p.read_bytes(), "") for p in (tmp_path / ".units").iterdir()}
    assert {name: [m.key for m in u.made] for name, u in units.items()} == {
        "00000000.unit": ["s0000", "s0001"],
        "00000002.unit": ["s0004", "s0005"],
    }
    assert {m.key: m.members for u in units.values() for m in u.made} == {
        k: before[k] for k in before if k not in ("s0002", "s0003")
    }
    assert not list(tmp_path.glob("000-*.tar")) and not list(tmp_path.glob("*.index.json"))


def test_what_a_repair_dropped_is_rolled_again(tmp_path):
    """The real command fills the gap, and the set is the same to the byte."""
    from builders import shared_wan_folder

    from data_tools.ingest import ingest, read_triplets
    from data_tools.rollout import RolloutConfig, rollout
    from tests.corruption import SIZE, raw_list

    raw_list(tmp_path)
    ingest(tmp_path / "edits.jsonl", tmp_path / "in", (SIZE, SIZE), workers=1)
    triplets, out = read_triplets(tmp_path / "in"), tmp_path / "out"
    codec = str(shared_wan_folder("i2v"))
    config = RolloutConfig(teacher="none", codec=codec, batch=1, samples_per_shard=2, device="cpu", threads=1)
    rollout(triplets, out, config)
    before = contents(out)
    flip(out / FIRST, Index(index_path(out / FIRST)).member(1, "source.png").offset + 30)
    done = repair(out, verify(out), most=1)
    assert [p.key for p in done.dropped] == ["x1"] and not (out / "manifest.json").exists()
    rollout(triplets, out, config)
    assert contents(out) == before and not verify(out).problems
