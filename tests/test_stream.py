"""The order is a pure function of (seed, step): the same on any number of ranks, and with damaged samples."""

import math
import os
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_shards import META, ShardSet, ShardWriter, flip, make_sample, write

from data_tools.bench import reading
from v4e.data.collate import stack
from v4e.data.mixture import Spot
from v4e.data.places import announce
from v4e.data.shards import Index, index_path
from v4e.data.soundness import check_shapes
from v4e.data.stream import Slice, Stream, slice_positions
from v4e.errors import ConfigError, DataError

N = 11
ORDER = [0, 9, 6, 1, 3, 7, 4, 2, 5, 8, 10, 3, 2, 1, 6, 4, 7, 0, 10, 5, 9, 8]  # of seed 5, two epochs


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return write(tmp_path_factory.mktemp("stream") / "set", n=N, per_shard=4)


def gather(shards: ShardSet, step: int, world: int, batch: int, micro: int, seed: int = 0) -> list[tuple[int, str]]:
    """(position, key) of a step over all ranks, in global order."""
    slices: list[Slice] = []
    for rank in range(world):
        stream = Stream(shards, seed=seed, batch=batch, micro_batch=micro, rank=rank, world=world)
        slices += stream.step(step)
        stream.close()
    return sorted((p, s.key) for piece in slices for p, s in zip(piece.positions, piece.samples, strict=True))


@given(st.sampled_from([(1, 8), (2, 4), (4, 2), (1, 2), (2, 2), (4, 1), (2, 1)]), st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_order_on_any_number_of_ranks(shards, layout, step, seed):
    world, micro = layout
    keys = Stream(shards, seed=seed, batch=8, micro_batch=8).keys_of(step)
    assert gather(shards, step, world, 8, micro, seed) == list(enumerate(keys, start=8 * step))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_positions_are_shared_out_without_gap_or_overlap(world, micro, accumulate, step):
    batch = world * micro * accumulate
    ranges = [slice_positions(step, batch, micro, rank, world) for rank in range(world)]
    assert all(len(r) == accumulate for r in ranges)
    assert [p for a in range(accumulate) for r in ranges for p in r[a]] == list(range(step * batch, (step + 1) * batch))


@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_meets_every_sample_once(shards, seed):
    stream = Stream(shards, seed=seed, batch=1, micro_batch=1)
    epochs = [[stream.order[e * N + i].index for i in range(N)] for e in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_never_changes(shards):
    """Pinned: a numpy or v4e that orders otherwise would silently break every resumed run."""
    stream = Stream(shards, seed=5, batch=1, micro_batch=1)
    assert [stream.order[i].index for i in range(2 * N)] == ORDER


def test_the_step_is_the_whole_state(shards):
    """Forwards, backwards and after a jump, the same step gives the same slices."""
    walked = Stream(shards, seed=1, batch=4, micro_batch=2)
    forwards = [keys_and_weights(walked.step(s)) for s in range(6)]
    assert [keys_and_weights(walked.step(s)) for s in (4, 0, 5, 5)] == [forwards[s] for s in (4, 0, 5, 5)]
    assert keys_and_weights(Stream(shards, seed=1, batch=4, micro_batch=2).step(3)) == forwards[3]


def keys_and_weights(slices: list[Slice]) -> list[tuple[list[str], tuple[float, ...]]]:
    return [([s.key for s in piece.samples], piece.weights) for piece in slices]


@pytest.mark.parametrize(("batch", "micro", "world"), [(6, 4, 1), (8, 4, 3), (0, 1, 1), (4, 0, 1)])
def test_sizes_that_do_not_divide_are_refused(shards, batch, micro, world):
    with pytest.raises(ConfigError, match=f"batch = {batch} is no multiple of {world} ranks . micro_batch = {micro}"):
        Stream(shards, seed=0, batch=batch, micro_batch=micro, world=world)


def test_opening_reads_no_index_and_few_are_kept(shards, monkeypatch):
    read: Counter[str] = Counter()
    monkeypatch.setattr("v4e.data.shards.Index", lambda path, content: read.update([path.name]) or Index(path, content))
    monkeypatch.setattr("v4e.data.shards.INDEXED", 4)
    stream = Stream(shards.folder, seed=0, batch=1, micro_batch=1)
    assert len(stream.mixture.sets[0]) == N and not read
    assert [stream.mixture.name(Spot(0, n)) for n in (9, 8)] == ["s0009", "s0008"]
    assert read == {"000-000002.index.json": 1}


def test_a_damaged_index_costs_its_own_shard_alone(tmp_path):
    write(tmp_path, n=8, per_shard=4)
    flip(tmp_path / "000-000001.index.json", 60)
    stream = Stream(tmp_path, seed=0, batch=8, micro_batch=8)
    (piece,) = stream.step(0)
    assert sum(piece.weights) == 4
    assert stream.quarantined.keys() == {f"000-000001-row-{row}" for row in range(4)}
    assert "000-000001.index.json: the index is not the one" in stream.quarantined["000-000001-row-2"]


@pytest.mark.slow
def test_a_million_samples_open_at_once():
    found = reading.scale()
    print(found)
    assert found["open_s"] < 2 and found["seek_us"] < 100 and found["permute_s"] < 1


@pytest.mark.slow
def test_batches_are_read_nearly_as_fast_as_bytes_and_leave_nothing_behind():
    """The bar is 0.8 (`data_tools/bench/reading.py`); a machine that does other work may halve it."""
    found = reading.measure(samples=1000, largest=10_000)
    print(found)
    assert median(found["read_ratio"]) > 0.4 and found["loader_memory_slope"] < 1


def test_ranks_and_empty_sets(shards, tmp_path):
    with pytest.raises(ConfigError, match="rank 2 is not one of 2"):
        Stream(shards, seed=0, batch=4, micro_batch=2, rank=2, world=2)
    with ShardWriter(tmp_path, META):
        pass
    with pytest.raises(DataError, match="no samples"):
        Stream(tmp_path, seed=0, batch=1, micro_batch=1)


def damage(shards: ShardSet, *rows: int) -> None:
    """Flip a byte in the tensors of the first shard's samples."""
    path = shards.folder / "000-000000.tar"
    for row in rows:
        flip(path, Index(index_path(path)).member(row, "encoded.safetensors").offset + 200)


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_sample_keeps_its_place_with_weight_0(tmp_path, world):
    shards = write(tmp_path, n=8, per_shard=4)
    healthy = [gather(shards, s, 1, 4, 4) for s in range(4)]
    damage(shards, 1, 2)
    streams = [Stream(tmp_path, seed=0, batch=4, micro_batch=2, rank=r, world=world) for r in range(world)]
    weights: Counter[str] = Counter()
    for step in range(4):
        slices = [piece for stream in streams for piece in stream.step(step)]
        found = sorted((p, s.key) for piece in slices for p, s in zip(piece.positions, piece.samples, strict=True))
        assert found == healthy[step]
        for piece in slices:
            weights.update({s.key: w for s, w in zip(piece.samples, piece.weights, strict=True)})
            assert all(s.encoded.clip_Cthw.shape == (2, 2, 2, 2) for s in piece.samples)
    assert weights == {f"s{i:04d}": 0 if i in (1, 2) else 2 for i in range(8)}
    named = {k: why for stream in streams for k, why in stream.quarantined.items()}
    assert named.keys() == {"s0001", "s0002"} and "000-000000.tar, key s0001" in named["s0001"]


def test_a_shard_cut_short_while_training(tmp_path):
    shards = write(tmp_path, n=8, per_shard=4)
    stream = Stream(shards, seed=0, batch=8, micro_batch=8)
    assert stream.quarantined == {}
    os.truncate(tmp_path / "000-000001.tar", 0)
    (piece,) = stream.step(0)
    assert sum(piece.weights) == 4 and stream.quarantined.keys() == {f"s{i:04d}" for i in range(4, 8)}


def test_a_set_without_one_readable_sample_stops(tmp_path):
    shards = write(tmp_path, n=3, per_shard=4)
    damage(shards, 0, 1, 2)
    with pytest.raises(DataError, match="not one sample can be read.*verify"):
        Stream(shards, seed=0, batch=1, micro_batch=1).step(0)


def test_the_cache_keeps_what_fits(shards, monkeypatch):
    reads: Counter[int] = Counter()
    read = ShardSet.sample
    monkeypatch.setattr(
        ShardSet, "sample", lambda self, i, *words, **more: reads.update([i]) or read(self, i, *words, **more)
    )
    for cache, expected in ((10**9, 1), (0, 3)):
        reads.clear()
        stream = Stream(shards, seed=0, batch=N, micro_batch=N, cache=cache)
        for step in range(3):
            stream.step(step)
        stream.close()
        assert all(n >= expected for n in reads.values()) and (max(reads.values()) == 1) == (expected == 1)


def test_pictures_on_demand(shards):
    (piece,) = Stream(shards, seed=0, batch=2, micro_batch=2, pictures=True).step(0)
    assert all(s.source is not None for s in piece.samples)


def test_a_sample_is_held_against_its_names_and_grids():
    def fault(part: str, **wrong: torch.Tensor) -> str:
        sample = make_sample(1)
        changed = replace(sample, **{part: replace(getattr(sample, part), **wrong)})
        with pytest.raises(DataError) as error:
            check_shapes(changed, META.student, META.teacher, "here")
        return error.value.what

    good = make_sample(1)
    check_shapes(good, META.student, META.teacher, "here")
    assert good.rollout
    c, t, h, w = good.encoded.clip_Cthw.shape
    k = len(good.rollout.sigma_K)
    assert fault("encoded", clip_Cthw=torch.ones(c, t, h)) == f"clip_Cthw is {[c, t, h]}, not C t h w"
    assert fault("encoded", clip_Cthw=torch.ones(c, t, h, w + 1)).endswith(f"the grid {[t, h, w]}")
    assert fault("encoded", known_Cthw=torch.ones(c + 1, t, h, w)) == f"known_Cthw has {c + 1} channels, the clip {c}"
    assert fault("encoded", text_LE=torch.ones(3, 77)).startswith("texts are of different widths")
    assert fault("rollout", x_KCthw=torch.ones(k + 1, c, t, h, w)).startswith(f"x_KCthw has {k + 1} states, but {k}")
    assert fault("rollout", sigma_K=torch.ones(k)) == "noise levels do not fall"
    assert fault("rollout", sigma_K=good.rollout.sigma_K * math.nan) == "noise levels do not fall"


def test_batches_of_one_shape_in_memory_of_earlier_ones():
    rows = [torch.randn(3, 5, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(4)]
    stacked = stack(rows)
    assert stacked.dtype == torch.float32 and stacked.equal(torch.stack(rows).float())
    address = stacked.data_ptr()
    del stacked
    assert stack(rows[::-1]).data_ptr() == address and stack([torch.ones(0, 2)] * 3).shape == (3, 0, 2)
    with pytest.raises(DataError, match=r"\[3, 5\] and \[1, 5\] in one batch"):
        stack([*rows, rows[0][:1]])


def test_what_is_read_soon_is_announced_and_a_missing_shard_is_said_by_reading(tmp_path, monkeypatch):
    asked: Counter[str] = Counter()
    monkeypatch.setattr(
        "v4e.data.index.announce", lambda path, *span: asked.update([path.name]) or announce(path, *span)
    )
    stream = Stream(write(tmp_path, n=8, per_shard=4), seed=0, batch=8, micro_batch=8)
    (tmp_path / "000-000001.tar").unlink()
    (piece,) = stream.step(0)
    stream.close()
    assert sum(piece.weights) == 4 and "000-000001.tar" in stream.quarantined["s0004"]
    assert asked["000-000000.tar"] >= 4 and asked["000-000001.tar"] >= 4


def test_announcing_reads_nothing_and_takes_any_span(tmp_path):
    (path := tmp_path / "file").write_bytes(b"abc")
    announce(path, 0, 3)
    announce(path, 2, 1 << 30)
    with pytest.raises(DataError, match="cannot be read"):
        announce(tmp_path / "missing", 0, 1)
