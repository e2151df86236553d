"""Shards into training batches, against reading the same bytes in a row and parsing the same tensors; and their scale.

The other side is the least that any reader does: one thread takes each shard from its first byte to its last and hands
every tensor to the library's parser; it checks nothing and makes no batch. Both sides take turns with the same files,
with no byte of them in the page cache, as a set larger than memory is read, and with all. Ratios are of the clock;
``_cpu`` is of the processor's time, which other work on the machine disturbs less; in ``_threads`` the other side has
as many threads, each with shards of its own. What ours does more: it reads in the run's order, checks hashes and
numbers, and makes batches in fp32, twice the bytes that were read.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from xxhash import xxh3_128_hexdigest

from data_tools.bench.clock import Lap
from v4e.data.collate import collate
from v4e.data.disk import hash_of, to_json
from v4e.data.index import Index
from v4e.data.members import TENSORS, pack
from v4e.data.mixture import Mixture
from v4e.data.shards import FORMAT, SetMeta, ShardInfo, ShardSet, ShardWriter, index_path
from v4e.data.stream import Stream, readers_of
from v4e.nouns import Encoded, Grid, Rollout, Sample
from v4e.train.meter import resident

STUDENT, TEACHER = Grid(5, 64, 64, (4, 4, 4)), Grid(9, 64, 64, (4, 4, 4))
META = SetMeta("rollout", STUDENT, TEACHER)
C, K, E, V = 16, 8, 128, 128  # latent channels, kept states, widths of text and vision: wan-nano's
DIFFERENT = 32  # samples of random numbers; they are written again and again
BATCH, MICRO = 64, 8
Found = Mapping[str, float | list[float]]


def measure(samples: int = 2000, rounds: int = 5, largest: int = 1_000_000, steps: int = 2000) -> Found:
    """``read_ratio`` and what it is made of, the rates in MB a second; then scale and the slope of memory.

    Args:
        rounds: both sides alternate so many times; medians count.
        largest: samples of the largest set that is only opened, in shards of a hundred.
        steps: over which memory must not grow.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = fixture(Path(folder) / "set", samples)
        size = sum(s.bytes for s in shards.shards) / 1e6
        cold, warm = (_alternate(shards, rounds, drop) for drop in (True, False))
    return {
        **_ratios("read_ratio", cold),
        **_ratios("read_ratio_warm", warm),
        "read_batches_mb_s": [round(size / ours.wall, 1) for ours, _, _ in cold],
        "read_raw_mb_s": [round(size / raw.wall, 1) for _, raw, _ in cold],
        **scale(largest, largest // 100),
        **steady(steps),
    }


def fixture(folder: Path, samples: int) -> ShardSet:
    """A set of samples as large as those of wan-nano's roll-outs."""
    members = [pack(_sample(n)) for n in range(DIFFERENT)]
    with ShardWriter(folder, META, samples_per_shard=100) as writer:
        for n in range(samples):
            writer.add_packed(f"s{n:06d}", "add", members[n % DIFFERENT])
    return ShardSet.open(folder)


def read_in_a_row(shards: ShardSet, threads: int = 1) -> None:
    """What no reader can be without: every byte from the disk, and the library's parser; a shard at a time a thread."""
    paths = [str(shards.folder / shard.name) for shard in shards.shards]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(_read_shard, paths, shards.indexes):
            pass


def _read_shard(path: str, index: Index) -> None:
    with open(path, "rb", buffering=1 << 20) as file:
        for row in range(len(index)):
            for kind, member in index.members(row).items():
                file.seek(member.offset)
                content = file.read(member.size)
                if kind in TENSORS:
                    load(content)


def read_batches(shards: ShardSet) -> None:
    """An epoch as training takes it."""
    stream = Stream(shards, seed=0, batch=BATCH, micro_batch=MICRO)
    for step in range(len(shards) // BATCH):
        for piece in stream.step(step):
            collate(piece.samples, piece.weights, rollout=True)
    stream.close()


def _alternate(shards: ShardSet, rounds: int, cold: bool) -> list[tuple[Lap, Lap, Lap]]:
    """Reading batches, and reading in a row with one thread and with as many, round by round.

    A round before them fills the memory that is used again.
    """
    works = (read_batches, read_in_a_row, partial(read_in_a_row, threads=readers_of(Mixture((shards,)))))
    read_batches(shards)
    laps = [tuple(_timed(work, shards, cold) for work in works) for _ in range(rounds)]
    return [(ours, alone, together) for ours, alone, together in laps]


def _ratios(name: str, laps: Sequence[tuple[Lap, Lap, Lap]]) -> dict[str, list[float]]:
    return {
        name: [round(alone.wall / ours.wall, 3) for ours, alone, _ in laps],
        f"{name}_cpu": [round(alone.cpu / ours.cpu, 3) for ours, alone, _ in laps],
        f"{name}_threads": [round(together.wall / ours.wall, 3) for ours, _, together in laps],
    }


def _timed(work: Callable[[ShardSet], None], shards: ShardSet, cold: bool) -> Lap:
    for path in Path(str(shards.folder)).iterdir() if cold else ():
        _forget(path)
    again = ShardSet.open(shards.folder)
    return Lap.of(lambda: work(again))


def _forget(path: Path) -> None:
    """Out of the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _sample(n: int) -> Sample:
    draw = torch.Generator().manual_seed(n)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    t, h, w = STUDENT.t, STUDENT.h, STUDENT.w
    encoded = Encoded(
        clip_Cthw=random(C, t, h, w),
        known_Cthw=random(C, t, h, w),
        text_LE=random(8 + n % 5, E),
        null_LE=random(1, E),
        vision_NV=random(17, V),
        evolution_LE=random(30 + n % 9, E),
        teacher_known_Cthw=random(C, TEACHER.t, h, w),
        vision_last_NV=random(17, V),
        change_thw=random(t, h, w).sigmoid(),
    )
    states, velocities, full = (random(K, C, frames, h, w) for frames in (t, t, TEACHER.t))
    rollout = Rollout(torch.linspace(1, 0.1, K), states, velocities, full, random(C, t, h, w))
    return Sample(f"s{n}", "add a boat", "a boat appears", None, None, encoded, rollout)


# ------------------------------------------------------------------------------------------------------- scale


def scale(samples: int = 1_000_000, shards: int = 10_000, seeks: int = 2000) -> dict[str, float]:
    """``open_s`` of a set so large, ``permute_s`` for an epoch's order, and ``seek_us`` to any of its positions.

    In seconds of this process, which other work on the machine disturbs less than a clock on the wall.
    """
    with tempfile.TemporaryDirectory() as folder:
        forge(Path(folder), samples, shards)
        began = time.process_time()
        stream = Stream(folder, seed=0, batch=1, micro_batch=1)
        opened = time.process_time()
        stream.order[0]
        permuted, (whole,) = time.process_time(), stream.mixture.sets
        for n in range(seeks):
            whole.locate(stream.order[n * 7919 % samples].index)
        found = time.process_time()
    return {
        "open_s": round(opened - began, 3),
        "permute_s": round(permuted - opened, 3),
        "seek_us": round((found - permuted) / seeks * 1e6, 2),
    }


def steady(steps: int = 2000, samples: int = 200, batch: int = 8, lap: int = 50) -> dict[str, float]:
    """``loader_memory_slope``: MB that reading and batching grow by in 1,000 steps, after a quarter of them.

    A line through the largest sizes of each lap: within one, what the allocator gives back comes and goes.
    """
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(fixture(Path(folder), samples), seed=0, batch=batch, micro_batch=batch)
        held = []
        for step in range(steps):
            for piece in stream.step(step):
                collate(piece.samples, piece.weights, rollout=True)
            held.append(resident("VmRSS") / 1e6)
        stream.close()
    peaks = [max(held[n : n + lap]) for n in range(steps // 4, steps - lap + 1, lap)]
    return {"loader_memory_slope": round(float(np.polyfit(range(len(peaks)), peaks, 1)[0]) * 1000 / lap, 3)}


def forge(folder: Path, samples: int, shards: int) -> None:
    """A set whose samples are a word each: its tars are holes, its indexes and its manifest are real."""
    each, word = samples // shards, b"{}"
    strong, quick = hash_of(word), xxh3_128_hexdigest(word)
    infos = []
    for shard in range(shards):
        rows = ",".join(f'["s{shard * each + n}",{{"json":[{1024 * n + 512},2,"{strong}"]}}]' for n in range(each))
        quicks = ",".join([f'"{quick}"'] * each)
        index = f'{{"format":{FORMAT},"bytes":{1024 * each},"samples":[{rows}],"quick":[{quicks}]}}'.encode()
        tar = folder / f"000-{shard:06d}.tar"
        tar.touch()
        os.truncate(tar, 1024 * each)
        index_path(tar).write_bytes(index)
        infos.append(asdict(ShardInfo(tar.name, each, 1024 * each, hash_of(index))))
    manifest = {"format": FORMAT, **META.to_dict(), "samples": samples, "shards": infos}
    (folder / "manifest.json").write_bytes(to_json(manifest, indent=1))


if __name__ == "__main__":
    print(measure())
