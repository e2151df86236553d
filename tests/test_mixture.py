"""Several sets as one order: exact shares, one size a micro-batch, nothing lost at an epoch's end, on any world."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
from builders import shared_wan_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contact import rolled_out
from test_shards import META, ShardSet, ShardWriter, flip, make_sample, write
from toy_training import random_port

from v4e import journal
from v4e.config import Loop, Share
from v4e.data.collate import collate
from v4e.data.mixture import Epochs, Mixture, Order, Turns
from v4e.data.shards import Index, SetMeta, ShardInfo, index_path
from v4e.data.stream import Stream, slice_positions
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.nouns import Grid, Sample
from v4e.recipes.flow_matching import FlowMatching
from v4e.train import checkpoint

WIDE = Grid(5, 16, 32)


class Paper(ShardSet):
    """A set that says its shapes and holds no samples."""

    def __init__(self, sizes: list[int], width: int = 2) -> None:
        super().__init__(Path("paper"), META, [ShardInfo(f"000-{n:06d}.tar", s, 1, "") for n, s in enumerate(sizes)])
        self.width = width

    def members(self, i, kinds=(), strong=False):
        tensors = {"clip_Cthw": {"dtype": "bfloat16", "shape": [2, 2, 2, self.width]}}
        return {"json": json.dumps({"tensors": {"encoded": tensors}}).encode()}

    def place(self, i):
        return f"paper, {i}"


def shares(*weights: int) -> list[Fraction]:
    return [Fraction(w, sum(weights)) for w in weights]


# -------------------------------------------------------------------------------------------------------- shares


def test_turns_by_hand():
    """Three to one: the first is due 3/4; then both are due 1/2 and it is listed first; then the second is due 3/4."""
    turns = Turns(shares(3, 1))
    assert [turns[n] for n in range(8)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_no_prefix_strays_by_a_sample(weights):
    turns, exact, had = Turns(shares(*weights)), shares(*weights), Counter()
    bound = Fraction(2 * len(weights) - 3, 2 * len(weights) - 2) if len(weights) > 1 else 0
    for n in range(2 * sum(weights) + 1):
        assert max(abs(had[who] - n * share) for who, share in enumerate(exact)) <= bound
        who, before = turns[n]
        assert before == had[who]
        had[who] += 1


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (7, 2, 1), (1.4, 0.4, 0.2)])
def test_weights_are_what_they_say_in_decimals(weights):
    assert Mixture(tuple(Paper([5]) for _ in weights), weights).shares == shares(7, 2, 1)


def test_weights_that_never_come_out_even_are_refused():
    with pytest.raises(ConfigError, match=r"only every 1000003 samples.*round them: 33333, 66667"):
        Mixture((Paper([5]), Paper([5])), (333_333, 666_670))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"loop.mixture: weight {weight} is not positive"):
            Mixture((Paper([5]), Paper([5])), (1.0, weight))


# --------------------------------------------------------------------------------------------------------- order

MIXED = st.lists(
    st.tuples(
        st.lists(st.integers(1, 5), min_size=1, max_size=4),  # samples of each shard
        st.sampled_from([2, 4, 6]),  # what keeps samples from stacking
        st.integers(1, 9),  # weight
    ),
    min_size=1,
    max_size=5,
)


@given(MIXED, st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_over_epochs_and_no_micro_batch_mixes_sizes(sets, micro, unit, window, seed):
    """Any sets, weights, units and windows: what a rank of any world takes is its part of one order."""
    papers = tuple(Paper(sizes, width) for sizes, width, _ in sets)
    unit, batch = unit * micro, 24 * micro if unit else 8 * micro
    mixture = Mixture(papers, tuple(w for *_, w in sets), unit, window)
    order, met = Order(mixture, seed, batch), [[] for _ in sets]
    bucket_of = {number: n for n, bucket in enumerate(mixture.buckets) for number in bucket}
    for step in range(6):
        for world in (1, 2, 4):
            slices = [slice_positions(step, batch, micro, rank, world) for rank in range(world)]
            assert len({len(mine) for mine in slices}) == 1  # all ranks accumulate equally often
            for piece in (piece for mine in slices for piece in mine):
                assert len({bucket_of[order[p].set] for p in piece}) == 1
        for p in range(step * batch, (step + 1) * batch):
            met[order[p].set].append(order[p].index)
    for paper, found in zip(papers, met, strict=True):
        rest = iter(found)
        while epoch := list(islice(rest, len(paper))):
            assert len(set(epoch)) == len(epoch)  # with as many as there are: each once
    again = Order(mixture, seed, batch)
    assert [again[p] for p in (5 * batch, 3, batch)] == [order[p] for p in (5 * batch, 3, batch)]


@given(MIXED, st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_shares_hold_within_a_sample_or_a_unit(sets, positions):
    mixture = Mixture(tuple(Paper(sizes, width) for sizes, width, _ in sets), tuple(w for *_, w in sets), unit=4)
    order = Order(mixture, seed=0, step=4)
    found = Counter(order[p].set for p in range(positions))
    limit = 1 if len(mixture.buckets) == 1 else 5  # one unit and one sample of it
    assert all(abs(found[n] - positions * share) < limit for n, share in enumerate(mixture.shares))


def test_a_set_is_ordered_in_a_mixture_as_alone():
    """The first one's turns are those of a run over it alone; two sets of one size are not ordered alike."""
    alone = Order(Mixture((Paper([7, 4]),)), 5, 1)
    both = Order(Mixture((Paper([7, 4]), Paper([11]))), 5, 1)
    met = [[s.index for s in map(both.__getitem__, range(44)) if s.set == n] for n in (0, 1)]
    assert met[0] == [alone[p].index for p in range(22)]
    assert sorted(met[1][:11]) == list(range(11)) and met[1][:11] != met[0][:11]


def test_only_the_shards_of_a_window_are_shuffled_together():
    epochs = Epochs(Paper([3, 1, 4, 2, 5]), seed=1, window=2, number=0)
    shard_of = [0] * 3 + [1] + [2] * 4 + [3] * 2 + [4] * 5
    firsts = set()
    for epoch in range(8):
        found = [epochs[epoch * 15 + n] for n in range(15)]
        assert sorted(found) == list(range(15))
        runs = []
        for shard in (shard_of[i] for i in found):
            if not runs or len(runs[-1] | {shard}) > 2:
                runs.append(set())
            runs[-1].add(shard)
        assert sorted(map(len, runs)) == [1, 2, 2]
        firsts.add(frozenset(runs[0]))
    assert len(firsts) > 2


# -------------------------------------------------------------------------------------------------- real sets


def wide(sample: Sample) -> Sample:
    """The same, twice as wide."""
    encoded = sample.encoded
    across = {n: x.repeat_interleave(2, -1) for n, x in vars(encoded).items() if n.endswith("thw")}
    return replace(sample, encoded=replace(encoded, **across))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[ShardSet, ShardSet]:
    """Five square samples and three wide ones, of the same names."""
    home, sets = tmp_path_factory.mktemp("mixture"), []
    for name, grid, count in (("square", META.student, 5), ("wide", WIDE, 3)):
        with ShardWriter(home / name, SetMeta("encoded", grid, Grid(9, grid.H, grid.W)), samples_per_shard=2) as writer:
            for n in range(count):
                sample = make_sample(n, pictures=False, rolled=False)
                writer.add(wide(sample) if name == "wide" else sample)
        sets.append(ShardSet.open(home / name))
    return sets[0], sets[1]


@pytest.mark.parametrize("world", [1, 2])
def test_sets_of_two_sizes_train_together(pair, world):
    mixture = Mixture(pair, (2.0, 1.0), unit=2)
    assert mixture.buckets == [[0], [1]]
    seen: dict[int, list[str]] = {16: [], 32: []}
    streams = [Stream(mixture, seed=3, batch=8, micro_batch=2, rank=r, world=world) for r in range(world)]
    for step in range(3):
        met = {}
        for piece in (piece for stream in streams for piece in stream.step(step)):
            assert set(piece.weights) == {1.0}
            batch = collate(piece.samples, piece.weights)
            width = batch.clip_BCthw.shape[-1] * 8
            met |= {p: (width, key) for p, key in zip(piece.positions, batch.keys, strict=True)}
        for _, (width, key) in sorted(met.items()):
            seen[width].append(key)
    assert len(seen[16]) == 16 and len(seen[32]) == 8
    assert sorted(seen[16][:5]) == [f"s{n:04d}" for n in range(5)] == sorted(seen[16][5:10])
    assert sorted(seen[32][:3]) == ["s0000", "s0001", "s0002"] == sorted(seen[32][3:6])
    assert seen == _walk(mixture)
    for stream in streams:
        stream.close()


def _walk(mixture: Mixture) -> dict[int, list[str]]:
    order, seen = Order(mixture, 3, 8), {16: [], 32: []}
    for spot in map(order.__getitem__, range(24)):
        seen[(16, 32)[spot.set]].append(mixture.sets[spot.set].name(spot.index))
    return seen


@pytest.mark.slow
def test_two_ranks_train_on_uneven_sets_of_two_sizes(tmp_path):
    """By `v4e train`: 5 square samples in shards of 2, 2 and 1, and 3 wide ones of which one is damaged; 40 are met.

    Epochs end within units, and no rank waits for one that has nothing left.
    """
    for name, width, count in (("square", 32, 5), ("wide", 64, 3)):
        with ShardWriter(tmp_path / name, SetMeta("encoded", Grid(5, 32, width)), samples_per_shard=2) as writer:
            for sample in (replace(rolled_out(n), source=None, target=None, rollout=None) for n in range(count)):
                writer.add(wide(sample) if name == "wide" else sample)
    torn = tmp_path / "wide/000-000000.tar"
    flip(torn, Index(index_path(torn)).member(1, "encoded.safetensors").offset + 200)
    (tmp_path / "config.yaml").write_text(f"recipe: flow_matching\ninit: {shared_wan_folder()}\nattention: native\n")
    mixture = f"loop.mixture=[{{path: {tmp_path}/square, weight: 2}}, {{path: {tmp_path}/wide, weight: 1}}]"
    words = ["steps=5", "batch=8", "micro_batch=2", "unit=4", "max_bad_samples=1", "log_every=1", "wandb.mode=disabled"]
    words += [f"output={tmp_path}/run", "threads=1"]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", random_port()]
    command += ["--no_local_rank", "--module", "v4e.cli", "train", str(tmp_path / "config.yaml"), mixture]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *(f"loop.{word}" for word in words)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = journal.read(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and lines[-1]["quarantined"] == 1
    assert all(math.isfinite(line["student/loss"]) and not line["skipped_steps"] for line in lines)


def test_a_damaged_sample_is_named_with_its_folder_and_stood_in_for_by_one_of_its_size(pair, tmp_path):
    with ShardWriter(tmp_path / "wide", pair[1].meta, samples_per_shard=2) as writer:
        for n in range(3):
            writer.add(wide(make_sample(n, pictures=False, rolled=False)))
    flip(
        tmp_path / "wide/000-000000.tar",
        Index(index_path(tmp_path / "wide/000-000000.tar")).member(1, "encoded.safetensors").offset + 200,
    )
    stream = Stream(
        Mixture((pair[0], ShardSet.open(tmp_path / "wide")), unit=2), seed=0, batch=12, micro_batch=2, workers=2
    )
    pieces = stream.step(0)
    assert stream.quarantined.keys() == {str(tmp_path / "wide" / "s0001")}
    assert "s0001.encoded.safetensors: its bytes" in stream.quarantined[str(tmp_path / "wide" / "s0001")]
    for piece in pieces:
        assert len({s.encoded.clip_Cthw.shape for s in piece.samples}) == 1
        assert all(
            w == (s.key != "s0001" or s.encoded.clip_Cthw.shape[-1] == 2)
            for s, w in zip(piece.samples, piece.weights, strict=True)
        )
    stream.close()


def test_units_must_fit_batches_and_micro_batches(pair):
    for unit, micro in ((3, 1), (4, 8), (6, 4)):
        with pytest.raises(ConfigError, match=f"loop.unit: units of {unit} samples do not divide batches of 8"):
            Stream(Mixture(pair, unit=unit), seed=0, batch=8, micro_batch=micro)
    Stream(Mixture((pair[0],), unit=3), seed=0, batch=8, micro_batch=4).close()


def test_another_mixture_is_another_run(pair, tmp_path):
    """Sets, weights, units and windows are told apart, and a resume that changes them is refused with both."""
    square, other = pair
    alike = write(tmp_path / "alike", n=4)
    made = [
        Mixture((square,)),
        Mixture((square,), window=1),
        Mixture((square, other)),
        Mixture((square, other), (2, 1)),
        Mixture((square, other), (2, 1), unit=4),
        Mixture((square, alike), (2, 1)),
        Mixture((other, square), (1, 2)),
    ]
    names = [m.identity for m in made]
    assert names[0] == square.identity and len(set(names)) == len(names)
    assert Mixture((square, other), (4, 2)).identity == names[3]
    assert names[3] == f"2/3 of {square.identity} and 1/3 of {other.identity} in units of a step"
    recipe = FlowMatching()
    state = checkpoint.State(0, 1, {"loop.steps": str(recipe.loop.steps)}, names[3])
    with pytest.raises(CheckpointError) as told:
        checkpoint.agree(state, replace(state, data=names[4]), recipe, tmp_path)
    assert f"data was {names[3]} and is now {names[4]}" in str(told.value)


def test_settings_name_one_set_or_several(pair):
    paths = [str(s.folder) for s in pair]
    one = Mixture.of(Loop(data=paths[0]))
    assert one.identity == pair[0].identity and len(one.sets) == 1
    several = Mixture.of(Loop(mixture=[Share(paths[0], 3), Share(paths[1])], unit=2, window=1))
    assert several.identity == Mixture(pair, (3, 1), 2, 1).identity
    for loop in (Loop(), Loop(data=paths[0], mixture=[Share(paths[1])])):
        with pytest.raises(ConfigError, match=r"loop.data: .*one set in loop.data, or several in loop.mixture"):
            Mixture.of(loop)


def test_empty_and_unreadable_sets_are_refused(pair, tmp_path):
    with ShardWriter(tmp_path / "empty", META):
        pass
    with pytest.raises(DataError, match="empty: the set holds no samples"):
        Mixture((pair[0], ShardSet.open(tmp_path / "empty")))
    torn = write(tmp_path / "torn", n=2)
    (tmp_path / "torn/000-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="torn: not one sample can be read"):
        Mixture((pair[0], torn)).buckets  # noqa: B018
    assert Mixture((torn,)).buckets == [[0]]
