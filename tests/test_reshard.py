"""Sets are put together and cut anew without one byte of a sample changing."""

import os
from pathlib import Path

import pytest
import torch
from test_shards import META, contents, flip, make_sample, write

from data_tools import cli
from data_tools.merge import merge
from data_tools.reshard import reshard
from v4e.data import disk
from v4e.data.members import MEMBERS
from v4e.data.shards import SetMeta, ShardSet, ShardWriter
from v4e.errors import ConfigError, DataError


def part_of(folder: Path, numbers: range, per_shard: int = 2, meta: SetMeta = META, **options) -> ShardSet:
    with ShardWriter(folder, meta, samples_per_shard=per_shard, **options) as writer:
        for n in numbers:
            writer.add(make_sample(n))
    return ShardSet.open(folder)


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    return [part_of(tmp_path / "b", range(5, 8)).folder, part_of(tmp_path / "a", range(5), per_shard=3).folder]


def raw(shards: ShardSet) -> list[tuple[str, dict[str, bytes | None]]]:
    return [(key, {kind: shards.raw(i, kind) for kind in MEMBERS}) for i, key in enumerate(shards.keys)]


def test_merged_sets_keep_order_and_bytes(parts, tmp_path):
    merged = merge(parts, tmp_path / "all")
    assert merged.keys == [f"s{n:04d}" for n in (5, 6, 7, 0, 1, 2, 3, 4)]
    assert [s.name for s in merged.shards] == [
        f"{name}.tar" for name in ("000-000000", "000-000001", "001-000000", "001-000001")
    ]
    assert raw(merged) == [row for part in parts for row in raw(ShardSet.open(part))]
    assert (tmp_path / "all/001-000001_stats.json").read_bytes() == (parts[1] / "000-000001_stats.json").read_bytes()
    assert (tmp_path / "all/000-000000.tar").samefile(parts[0] / "000-000000.tar")
    assert not list((tmp_path / "all").glob(".tmp-*"))


def test_merging_where_there_are_no_links(parts, tmp_path, monkeypatch):
    linked = merge(parts, tmp_path / "linked")

    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = merge(parts, tmp_path / "copied")
    assert contents(copied.folder) == contents(linked.folder)
    assert not (tmp_path / "copied/000-000000.tar").samefile(parts[0] / "000-000000.tar")


@pytest.mark.parametrize("published", range(0, 12, 2))
def test_a_merge_that_was_stopped_goes_on(parts, tmp_path, monkeypatch, published):
    """Stopped before any file becomes visible; a tar without its index is made again."""
    whole, publish, left = contents(merge(parts, tmp_path / "whole").folder), disk.publish, [published]

    def publish_or_stop(*words: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        publish(*words)

    for module in ("data_tools.merge", "v4e.data.disk"):
        monkeypatch.setattr(f"{module}.publish", publish_or_stop)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "all")
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(tmp_path / "all")
    left[0] = 100
    assert contents(merge(parts, tmp_path / "all").folder) == whole


def test_sets_that_do_not_fit_are_refused(parts, tmp_path):
    other = part_of(
        tmp_path / "other", range(9, 11), meta=SetMeta("rollout", META.student, META.teacher, {"guidance": 6.0})
    )
    with pytest.raises(DataError, match=r"settings.guidance was 5.5 and is now 6.0"):
        merge([*parts, other.folder], tmp_path / "all")
    precise = part_of(tmp_path / "precise", range(9, 11), dtype=torch.float32)
    with pytest.raises(DataError, match=r"layout.dtype was 'torch.bfloat16' and is now 'torch.float32'"):
        merge([*parts, precise.folder], tmp_path / "all2")
    twice = part_of(tmp_path / "twice", range(5, 6))
    with pytest.raises(DataError, match=r"key 's0005' occurs twice, in .*b/000-000000.tar and .*twice/000-000000.tar"):
        merge([*parts, twice.folder], tmp_path / "all3")
    assert not (tmp_path / "all3").exists()
    for folders, out in (([parts[0], parts[0]], "all4"), (parts, "a")):
        with pytest.raises(ConfigError, match="is named twice"):
            merge(folders, tmp_path / out)


def test_a_merged_folder_belongs_to_its_sets(parts, tmp_path):
    merge(parts, tmp_path / "all")
    with pytest.raises(DataError, match="begun with other settings: sets was"):
        merge(parts[:1], tmp_path / "all")


def test_a_damaged_index_is_not_merged(parts, tmp_path):
    flip(parts[1] / "000-000001.index.json", 40)
    with pytest.raises(DataError, match="a/000-000001.index.json: the index is not the one the manifest names"):
        merge(parts, tmp_path / "all")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_resharding_changes_the_cut_alone(tmp_path, size):
    whole = write(tmp_path / "old")
    cut = reshard(whole.folder, tmp_path / "new", size)
    assert [s.samples for s in cut.shards] == {1: [1] * 7, 3: [3, 3, 1], 100: [7]}[size]
    assert cut.meta == whole.meta and raw(cut) == raw(whole)
    if size == 3:
        assert [s.name for s in cut.shards] == [s.name for s in whole.shards]
        assert cut.identity == whole.identity


def test_resharding_goes_on_and_refuses_other_cuts(tmp_path, monkeypatch):
    whole = write(tmp_path / "old")
    at_once = reshard(whole.folder, tmp_path / "at once", 2)

    def stop(numbers):
        yield from list(numbers)[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(whole.folder, tmp_path / "new", 2, watch=stop)
    assert len(list((tmp_path / "new").glob("*.tar"))) == 2
    with pytest.raises(DataError, match="samples_per_shard was 2 and is now 3"):
        reshard(whole.folder, tmp_path / "new", 3)
    with pytest.raises(DataError, match="resharded.json.*of was"):
        reshard(write(tmp_path / "shorter", n=6).folder, tmp_path / "new", 2)
    assert contents(reshard(whole.folder, tmp_path / "new", 2).folder) == contents(at_once.folder)
    with pytest.raises(ConfigError, match="cut anew in its own place"):
        reshard(whole.folder, whole.folder, 2)


def test_resharding_stops_at_damage(tmp_path):
    whole = write(tmp_path / "old")
    flip(tmp_path / "old/000-000001.tar", whole.index(1).member(1, "target.png").offset + 20)
    with pytest.raises(DataError, match="000-000001.tar, key s0004.target.png: its bytes are not those"):
        reshard(whole.folder, tmp_path / "new", 2)


def test_the_verbs(parts, tmp_path, capsys):
    assert cli.main(["merge", *map(str, parts), "--out", str(tmp_path / "all")]) == 0
    assert cli.main(["reshard", str(tmp_path / "all"), str(tmp_path / "new"), "--samples-per-shard", "4"]) == 0
    assert [s.samples for s in ShardSet.open(tmp_path / "new").shards] == [4, 4]
    assert '"samples": 8' in capsys.readouterr().out
    assert cli.main(["merge", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == DataError.exit_code
