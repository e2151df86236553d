"""Break the input of each stage in every way we could think of, many times, and see whether it is told.

    python -m tests.corruption --faults 500

Each trial takes a healthy input, puts one fault into it at a random place, and runs the stage. A fault is *detected*
when the stage says anything, *named* when it says the file, and the key where the fault belongs to one sample,
*harmless* when what the stage handed on is what it hands on without the fault. Anything else is silent, or a crash.
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.evolve import add_evolutions
from data_tools.evolve.writers import LocalSettings, LocalWriter
from data_tools.ingest import ingest, iterate, read_triplets
from data_tools.verify import verify
from v4e.data.disk import hash_of, to_json
from v4e.data.members import pack, save_tensors
from v4e.data.shards import SetMeta, ShardSet, ShardWriter, index_path
from v4e.data.stream import Stream
from v4e.errors import V4EError
from v4e.models.vlm import Question, Reply
from v4e.nouns import Clip, Encoded, Grid, Rollout, Sample

SIZE, SAMPLES = 32, 4
GRIDS = Grid(5, SIZE, SIZE), Grid(9, SIZE, SIZE)
TAR = "000-000000.tar"
BOMB = 60000  # pixels a side: 10 GB once decoded
PICKLE = b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."

Names = Sequence[str]
Inject = Callable[[Path, random.Random], Names]


@dataclass(frozen=True)
class Stage:
    """A stage and what can be wrong with its input.

    Args:
        make: writes a healthy input into a folder.
        run: reads it; what the stage complains of, and a digest of what it hands on.
        faults: each changes a healthy input, and returns what must be named.
    """

    name: str
    make: Callable[[Path], None]
    run: Callable[[Path], tuple[list[str], str]]
    faults: Mapping[str, Inject]


@dataclass
class Table:
    """Outcomes by (fault, stage)."""

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    bad: list[str] = field(default_factory=list)

    def add(self, fault: str, stage: str, outcome: str, story: str) -> None:
        self.counts[fault, stage]["injected"] += 1
        self.counts[fault, stage][outcome] += 1
        if outcome not in ("named", "harmless"):
            self.bad.append(f"{outcome}: {fault} at {stage}: {story}")

    def __str__(self) -> str:
        """Markdown: injected / detected / named, and how many were harmless."""
        stages = list(dict.fromkeys(stage for _, stage in self.counts))
        lines = [f"| fault | {' | '.join(stages)} |", f"|---|{'---|' * len(stages)}"]
        for fault in dict.fromkeys(fault for fault, _ in self.counts):
            lines.append(f"| {fault} | {' | '.join(_cell(self.counts.get((fault, s))) for s in stages)} |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        table: dict[str, dict[str, dict[str, int]]] = {}
        for (fault, stage), counter in self.counts.items():
            table.setdefault(fault, {})[stage] = dict(counter)
        return table


def _cell(counter: Counter[str] | None) -> str:
    if not counter:
        return "–"
    told = counter["named"] + counter["unnamed"]
    harmless = f" + {counter['harmless']} harmless" if counter["harmless"] else ""
    return f"{counter['injected']} / {told} / {counter['named']}{harmless}"


def trials(stages: Sequence[Stage], faults: int, seed: int, folder: Path) -> Table:
    """Put ``faults`` faults, evenly over stages and kinds, each into a fresh copy of its stage's healthy input."""
    table, pairs = Table(), [(stage, fault) for stage in stages for fault in stage.faults]
    healthy = {stage.name: _healthy(stage, folder / stage.name.replace(" ", "-")) for stage in stages}
    for n in range(faults):
        stage, fault = pairs[n * len(pairs) // faults if faults >= len(pairs) else n * 7 % len(pairs)]
        broken = folder / "trial"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder / stage.name.replace(" ", "-"), broken)
        names = stage.faults[fault](broken, random.Random(f"{seed} {n}"))
        table.add(fault, stage.name, *_outcome(stage, broken, names, healthy[stage.name]))
    return table


def _healthy(stage: Stage, folder: Path) -> str:
    """The digest of what a stage hands on when nothing is wrong; it must say nothing then."""
    folder.mkdir(parents=True)
    stage.make(folder)
    copy = folder.with_name("healthy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    said, digest = stage.run(copy)
    assert not said, said
    return digest


def _outcome(stage: Stage, broken: Path, names: Names, healthy: str) -> tuple[str, str]:
    try:
        said, digest = stage.run(broken)
    except V4EError as error:
        said, digest = [str(error)], ""
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    if not said:
        return ("harmless" if digest == healthy else "silent"), f"{names}"
    missing = [name for name in names if not any(name in line for line in said)]
    return ("unnamed" if missing else "named"), f"{missing} not in {said[:3]}"


# ------------------------------------------------------------------------------------------------------- pieces


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def png(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    buffer = io.BytesIO()
    picture(seed).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 3.6 gigapixels, its checksum right."""
    import zlib

    content = bytearray(png(0))
    content[16:24] = BOMB.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def flip(path: Path, rng: random.Random, first: int = 0, last: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(first, last or len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def tar_of(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path, "r:") as tar:
        return [(info.name, file.read()) for info in tar if (file := tar.extractfile(info))]


def digest_of_all(parts: Iterator[object]) -> str:
    return hash_of("\n".join(map(str, parts)).encode())


# ------------------------------------------------------------------------------------------------------- ingest


def raw_list(folder: Path) -> None:
    """A jsonl and its pictures."""
    rows = []
    for n in range(SAMPLES):
        for part in (0, 1):
            (folder / f"x{n}-{part}.png").write_bytes(png(10 * n + part))
        rows.append({"id": f"x{n}", "instruction": f"edit {n}", "source": f"x{n}-0.png", "edited": f"x{n}-1.png"})
    (folder / "edits.jsonl").write_bytes(b"".join(to_json(row) + b"\n" for row in rows))


def raw_tar(folder: Path) -> None:
    """A webdataset tar: two pictures and an instruction a sample."""
    (folder / "edits.tar").write_bytes(tar_of(_raw_members()))


def _raw_members() -> list[tuple[str, bytes]]:
    rows = []
    for n in range(SAMPLES):
        rows += [(f"x{n}.source.png", png(10 * n)), (f"x{n}.edited.png", png(10 * n + 1))]
        rows += [(f"x{n}.txt", f"edit {n}".encode())]
    return rows


def take(source: str) -> Callable[[Path], tuple[list[str], str]]:
    def run(folder: Path) -> tuple[list[str], str]:
        out = folder / "out"
        ingest(folder / source, out, (SIZE, SIZE), max_reject_fraction=1.0, workers=1)
        said = [" ".join(map(str, json.loads(line).values())) for line in (out / "rejects.jsonl").open()]
        kept = read_triplets(out)
        return said, digest_of_all((t.id, t.instruction, sorted(t.hashes.items())) for t in kept)

    return run


def any_picture(folder: Path, rng: random.Random) -> tuple[Path, str]:
    n, part = rng.randrange(SAMPLES), rng.randrange(2)
    return folder / f"x{n}-{part}.png", f"x{n}"


def on_picture(change: Callable[[Path, random.Random], None]) -> Inject:
    def inject(folder: Path, rng: random.Random) -> Names:
        path, key = any_picture(folder, rng)
        change(path, rng)
        return path.name, key

    return inject


def on_line(change: Callable[[dict, random.Random], str]) -> Inject:
    """Change one row; what must be named besides its id."""

    def inject(folder: Path, rng: random.Random) -> Names:
        path, n = folder / "edits.jsonl", rng.randrange(SAMPLES)
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        name = change(rows[n], rng)
        path.write_bytes(b"".join(to_json(row) + b"\n" for row in rows))
        return name, rows[n]["id"]

    return inject


def _point(name: str) -> Callable[[dict, random.Random], str]:
    def change(row: dict, rng: random.Random) -> str:
        row[rng.choice(["source", "edited"])] = name
        return name

    return change


def _double_id(folder: Path, rng: random.Random) -> Names:
    with open(folder / "edits.jsonl", "ab") as file:
        line = {"id": f"x{rng.randrange(SAMPLES)}", "instruction": "again", "source": "x0-1.png", "edited": "x1-0.png"}
        file.write(to_json(line) + b"\n")
    return "edits.jsonl", line["id"]


def _bad_text(folder: Path, rng: random.Random) -> Names:
    path, n = folder / "edits.jsonl", rng.randrange(SAMPLES)
    path.write_bytes(path.read_bytes().replace(f"edit {n}".encode(), b"edit \xff\xfe"))
    return "edits.jsonl", f"x{n}"


def _misaligned(folder: Path, rng: random.Random) -> Names:
    """The edited image of another shape than the source, which is told of the edited one."""
    n = rng.randrange(SAMPLES)
    (folder / f"x{n}-1.png").write_bytes(png(3, (SIZE, 2 * SIZE)))
    return f"x{n}-1.png", f"x{n}"


def _foreign_list(folder: Path, rng: random.Random) -> Names:
    (folder / "edits.jsonl").write_bytes(rng.choice([tar_of([("a.txt", b"b")]), b"\x00" * 900, rng.randbytes(700)]))
    return ("edits.jsonl",)


def _cut_list(folder: Path, rng: random.Random) -> Names:
    path = folder / "edits.jsonl"
    start = path.read_bytes()[:-1].rfind(b"\n") + 1
    os.truncate(path, rng.randrange(start + 1, path.stat().st_size - 1))
    return ("edits.jsonl",)


LIST = {
    "flipped byte": on_picture(flip),
    "truncation": on_picture(cut),
    "truncated list": _cut_list,
    "missing member": on_picture(lambda path, _: path.unlink()),
    "doubled key": _double_id,
    "wrong shape": _misaligned,
    "foreign file": _foreign_list,
    "path traversal": on_line(_point("../../../../etc/passwd")),
    "pickle member": on_picture(lambda path, _: path.write_bytes(PICKLE) or None),
    "bomb": on_picture(lambda path, _: path.write_bytes(bomb()) or None),
    "0-byte image": on_picture(lambda path, _: path.write_bytes(b"") or None),
    "invalid UTF-8": _bad_text,
}


def on_members(change: Callable[[list[tuple[str, bytes]], int, random.Random], Names]) -> Inject:
    """Change the members of one sample of the raw tar, whose first is at ``at``."""

    def inject(folder: Path, rng: random.Random) -> Names:
        rows, n = _raw_members(), rng.randrange(SAMPLES)
        names = change(rows, 3 * n, rng)
        (folder / "edits.tar").write_bytes(tar_of(rows))
        return *names, f"x{n}"

    return inject


def _member(name: str, content: bytes) -> Callable[[list[tuple[str, bytes]], int, random.Random], Names]:
    """Put another content into a member, or a member more where ``name`` is none of its own."""

    def change(rows: list[tuple[str, bytes]], at: int, rng: random.Random) -> Names:
        key = rows[at][0].partition(".")[0]
        own = [i for i in (at, at + 1, at + 2) if rows[i][0] == f"{key}.{name}"]
        rows[own[0] if own else at : (own[0] + 1) if own else at] = [(f"{key}.{name}", content)]
        return ("edits.tar",) if own else ()

    return change


def _drop(rows: list[tuple[str, bytes]], at: int, rng: random.Random) -> Names:
    del rows[at + rng.randrange(3)]
    return ("edits.tar",)


def _double(rows: list[tuple[str, bytes]], at: int, rng: random.Random) -> Names:
    rows.insert(at + 1, rows[at])
    return ("edits.tar",)


def _flip_raw_tar(folder: Path, rng: random.Random) -> Names:
    """In a header or a picture; what an instruction should say nobody else knows."""
    with tarfile.open(folder / "edits.tar", "r:") as tar:
        infos = list(tar)
    info = rng.choice(infos)
    first, last = (info.offset, info.offset_data), (info.offset_data, info.offset_data + info.size)
    flip(folder / "edits.tar", rng, *(first if info.name.endswith("txt") else rng.choice([first, last])))
    return ("edits.tar",)


def _climb(rows: list[tuple[str, bytes]], at: int, rng: random.Random) -> Names:
    key = rows[at][0].partition(".")[0]
    rows[at] = (f"../../{key}.source.png", rows[at][1])
    return ("edits.tar",)


def on_tar(change: Callable[[Path, random.Random], None]) -> Inject:
    def inject(folder: Path, rng: random.Random) -> Names:
        change(folder / "edits.tar", rng)
        return ("edits.tar",)

    return inject


def _replace_by_foreign(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice([tar_of([("README.md", b"hello"), ("notes/a.py", b"1")]), rng.randbytes(4096), b"PK"]))


TARS = {
    "flipped byte": _flip_raw_tar,
    "truncation": on_tar(cut),
    "missing member": on_members(_drop),
    "doubled key": on_members(_double),
    "wrong shape": on_members(_member("edited.png", png(3, (SIZE, 2 * SIZE)))),
    "foreign file": on_tar(_replace_by_foreign),
    "path traversal": on_members(_climb),
    "pickle member": on_members(_member("pkl", PICKLE)),
    "bomb": on_members(_member("source.png", bomb())),
    "0-byte image": on_members(_member("source.png", b"")),
    "invalid UTF-8": on_members(_member("txt", b"\xff\xfe")),
}


# ------------------------------------------------------------------------------------------------------ rollout


def ingested(folder: Path) -> None:
    raw_list(folder)
    ingest(folder / "edits.jsonl", folder / "in", (SIZE, SIZE), workers=1)


class Reading:
    """What a rank does with its triplets before it works on them."""

    @cached_property
    def worker(self):
        from data_tools.rollout import RolloutConfig, Worker
        from tests.builders import shared_wan_folder

        codec = str(shared_wan_folder("i2v"))
        return Worker.load(RolloutConfig(teacher="none", codec=codec, device="cpu", threads=1), (SIZE, SIZE))

    def __call__(self, folder: Path) -> tuple[list[str], str]:
        from data_tools.rollout.spool import Reject

        read = [self.worker._read(triplet) for triplet in read_triplets(folder / "in")]
        said = [f"{r.key}: {r.reason}" for r in read if isinstance(r, Reject)]
        good = [r for r in read if not isinstance(r, Reject)]
        return said, digest_of_all((r.triplet.id, r.triplet.instruction, r.inputs) for r in good)


def on_taken_picture(change: Callable[[Path, random.Random], None]) -> Inject:
    def inject(folder: Path, rng: random.Random) -> Names:
        path = rng.choice(sorted((folder / "in" / "images").rglob("*.png")))
        change(path, rng)
        return path.name, path.name.partition(".")[0]

    return inject


def on_triplets(change: Callable[[bytes, random.Random], bytes]) -> Inject:
    def inject(folder: Path, rng: random.Random) -> Names:
        path = folder / "in" / "triplets.jsonl"
        path.write_bytes(change(path.read_bytes(), rng))
        return ("triplets.jsonl",)

    return inject


def _flip_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _cut_last(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(content[:-1].rfind(b"\n") + 2, len(content) - 1)]


def _redirect(content: bytes, rng: random.Random) -> bytes:
    return content.replace(f'"images/{hash_of(b"x1")[:2]}/x1.source.png"'.encode(), b'"../../../../etc/passwd"')


TAKEN = {
    "flipped byte": on_taken_picture(flip),
    "flipped byte in the list": on_triplets(_flip_bytes),
    "truncation": on_taken_picture(cut),
    "truncated list": on_triplets(_cut_last),
    "missing member": on_taken_picture(lambda path, _: path.unlink()),
    "doubled key": on_triplets(lambda content, _: content + content.splitlines(keepends=True)[0]),
    "wrong shape": on_taken_picture(lambda path, _: path.write_bytes(png(3, (SIZE, 2 * SIZE))) or None),
    "foreign file": on_triplets(lambda _, rng: tar_of([("a", rng.randbytes(99))])),
    "path traversal": on_triplets(_redirect),
    "pickle member": on_taken_picture(lambda path, _: path.write_bytes(PICKLE) or None),
    "bomb": on_taken_picture(lambda path, _: path.write_bytes(bomb()) or None),
    "0-byte image": on_taken_picture(lambda path, _: path.write_bytes(b"") or None),
    "invalid UTF-8": on_triplets(lambda content, _: content.replace(b"edit 2", b"edit \xff")),
}


# ------------------------------------------------------------------------------------------------------- evolve


class Told:
    """A vision-language model that sees both pictures and always says the same."""

    identity: Mapping[str, object] = {"model": "told"}
    answer = "Start: a grey sky\nProcess: it turns red slowly\nEnd: a red sky\nUnchanged: all else"

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        return [Reply(self.answer) for _ in questions]


def prompted(folder: Path) -> tuple[list[str], str]:
    add_evolutions(folder / "in", LocalWriter(Told(), LocalSettings(model="told")))
    said = (folder / "in" / "evolve_fallbacks.jsonl").read_text().splitlines()
    return said, digest_of_all((t.id, t.instruction, t.evolution) for t in iterate(folder / "in"))


# ------------------------------------------------------------------------------------------------------- shards


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_sample(n: int) -> Sample:
    clip, full = (2, 2, SIZE // 8, SIZE // 8), (2, 3, SIZE // 8, SIZE // 8)
    encoded = Encoded(
        clip_Cthw=draw(n, *clip),
        known_Cthw=draw(n + 1, *clip),
        text_LE=draw(n + 2, 3, 6),
        null_LE=draw(n + 3, 1, 6),
        vision_NV=draw(n + 4, 4, 5),
        evolution_LE=draw(n + 5, 7, 6),
        teacher_known_Cthw=draw(n + 6, *full),
        vision_last_NV=draw(n + 7, 4, 5),
        change_thw=draw(n + 8, *clip[1:]).sigmoid(),
    )
    states = [draw(n + 9 + k, 4, *clip) for k in (0, 1)]
    rollout = Rollout(torch.linspace(1, 0.1, 4), *states, draw(n + 11, 4, *full), draw(n + 12, *clip))
    images = [Clip(torch.from_numpy(np.array(picture(n + k))).permute(2, 0, 1)[None].contiguous()) for k in (0, 1)]
    return Sample(f"s{n}", f"edit {n}", "it changes", *images, encoded, rollout, "add")


def shard_set(folder: Path) -> None:
    with ShardWriter(folder, SetMeta("rollout", *GRIDS), samples_per_shard=2) as writer:
        for n in range(SAMPLES):
            writer.add(make_sample(n))


def verified(folder: Path) -> tuple[list[str], str]:
    report = verify(folder)
    return [p.detail for p in report.problems], ""


def streamed(folder: Path) -> tuple[list[str], str]:
    """One epoch, pictures included, as the first rank of a training run opens and reads it."""
    whole = ShardSet.open(folder, verify="index")
    stream = Stream(whole, seed=0, batch=len(whole), micro_batch=1, pictures=True, workers=1)
    try:
        samples = [s for piece in stream.step(0) for s in piece.samples]
    finally:
        stream.close()
    return list(stream.quarantined.values()), digest_of_all(map(_content, sorted(samples, key=lambda s: s.key)))


def _content(sample: Sample) -> str:
    packed = pack(sample)
    return f"{sample.key} {[hash_of(content) for content in packed.values()]}"


def in_tar(change: Callable[[Path, random.Random], None]) -> Inject:
    """A fault of the bytes alone: hashes do not agree with it."""

    def inject(folder: Path, rng: random.Random) -> Names:
        change(folder / TAR, rng)
        return (TAR,)

    return inject


def forged(change: Callable[[dict[str, bytes], str, random.Random], Names]) -> Inject:
    """A fault that index and manifest agree with, as a faulty or hostile writer would leave it."""

    def inject(folder: Path, rng: random.Random) -> Names:
        members, key = dict(members_of(folder / TAR)), f"s{rng.randrange(2)}"
        names = change(members, key, rng)
        forge(folder, list(members.items()))
        return *names, key

    return inject


def forge(folder: Path, members: Sequence[tuple[str, bytes]], keys: Sequence[str] = ()) -> None:
    """Write the first shard with these members, and an index and a manifest to match.

    Args:
        keys: of the rows of the index, where they are not the members' own.
    """
    (folder / TAR).write_bytes(tar_of(members))
    rows: dict[str, dict[str, list[object]]] = {}
    with tarfile.open(folder / TAR, "r:") as tar:
        for info, (name, content) in zip(tar, members, strict=True):
            key, _, kind = name.partition(".")
            rows.setdefault(key, {})[kind] = [info.offset_data, info.size, hash_of(content)]
    named = [[new, row] for new, row in zip(keys or rows, rows.values(), strict=True)]
    size = (folder / TAR).stat().st_size
    index_path(folder / TAR).write_bytes(to_json({"format": 1, "bytes": size, "samples": named}))
    seal(folder)


def seal(folder: Path) -> None:
    """A manifest over whatever the indexes say."""
    body = json.loads((folder / "manifest.json").read_bytes())
    for shard in body["shards"]:
        content = index_path(folder / shard["name"]).read_bytes()
        index = json.loads(content)
        shard |= {"samples": len(index["samples"]), "bytes": index["bytes"], "index": hash_of(content)}
    body["samples"] = sum(shard["samples"] for shard in body["shards"])
    (folder / "manifest.json").write_bytes(to_json(body))


def _tensors(change: Callable[[Sample, random.Random], Sample]) -> Inject:
    """A sample with other tensors, declared as they are."""

    def put(members: dict[str, bytes], key: str, rng: random.Random) -> Names:
        sample = change(make_sample(int(key[1:])), rng)
        assert sample.encoded and sample.rollout
        for name, part in (("encoded", sample.encoded), ("rollout", sample.rollout)):
            stored = {k: x if k == "sigma_K" else x.bfloat16() for k, x in vars(part).items()}
            members[f"{key}.{name}.safetensors"] = save_tensors({k: x.contiguous() for k, x in stored.items()})
        words = json.loads(members[f"{key}.json"])
        for name, part in (("encoded", sample.encoded), ("rollout", sample.rollout)):
            for k, x in vars(part).items():
                words["tensors"][name][k]["shape"] = list(x.shape)
        members[f"{key}.json"] = to_json(words)
        return (TAR,)

    return forged(put)


def _with_nan(sample: Sample, rng: random.Random) -> Sample:
    part = rng.choice([sample.encoded, sample.rollout])
    x = rng.choice([x for x in vars(part).values() if x.numel() > 1])
    x.view(-1)[rng.randrange(x.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    return sample


def _misshapen(sample: Sample, rng: random.Random) -> Sample:
    part = rng.choice(["encoded", "rollout"])
    old = getattr(sample, part)
    name = rng.choice([k for k in vars(old) if k.endswith("thw")])
    x = getattr(old, name)
    new = rng.choice([x[..., :-1], x.flatten(0, 1), torch.cat([x, x], -2), x[:, :, :, 1:] if x.ndim > 4 else x[:, 1:]])
    return replace(sample, **{part: replace(old, **{name: new.contiguous()})})


def _put(kind: str, content: bytes) -> Callable[[dict[str, bytes], str, random.Random], Names]:
    def change(members: dict[str, bytes], key: str, rng: random.Random) -> Names:
        members[f"{key}.{kind}"] = content
        return (TAR,)

    return change


def _bad_words(members: dict[str, bytes], key: str, rng: random.Random) -> Names:
    members[f"{key}.json"] = members[f"{key}.json"].replace(b"edit", b"\xff\xfe")
    return (TAR,)


def _without(members: dict[str, bytes], key: str, rng: random.Random) -> Names:
    del members[f"{key}.{rng.choice(['json', 'encoded.safetensors', 'rollout.safetensors'])}"]
    return (TAR,)


def _strange_member(members: dict[str, bytes], key: str, rng: random.Random) -> Names:
    """The index names it too, so its key is only known by a reader that does not trust the index."""
    members[f"{key}.pkl"] = PICKLE
    return (TAR.replace(".tar", ".index.json"),)


def _same_key(folder: Path, rng: random.Random) -> Names:
    forge(folder, members_of(folder / TAR), ["s0", rng.choice(["s0", "s2", "s3"])])
    return ("000-00000",)


def _leaving(folder: Path, rng: random.Random) -> Names:
    forge(folder, members_of(folder / TAR), ["s0", rng.choice(["../../s1", "/etc/s1", "a/b", ".."])])
    return (TAR.replace(".tar", ".index.json"),)


def _extra_member(folder: Path, rng: random.Random) -> Names:
    """A member that only stock tools would unpack: the index does not know it."""
    name = rng.choice(["../../escape.json", "/etc/cron.d/x", "s0.sh", "s0.pkl"])
    (folder / TAR).write_bytes(tar_of([*members_of(folder / TAR), (name, PICKLE)]))
    path = index_path(folder / TAR)
    path.write_bytes(to_json({**json.loads(path.read_bytes()), "bytes": (folder / TAR).stat().st_size}))
    seal(folder)
    return TAR, name


def _flip_index(folder: Path, rng: random.Random) -> Names:
    flip(index_path(folder / TAR), rng)
    return (index_path(Path(TAR)).name,)


def _flip_manifest(folder: Path, rng: random.Random) -> Names:
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    shard = rng.choice(body["shards"])
    shard[rng.choice(["samples", "bytes"])] += rng.choice([-1, 1, 512])
    path.write_bytes(to_json(body))
    return ()


def _flip_shard(folder: Path, rng: random.Random) -> Names:
    """Anywhere; in a header or a content the sample is known too."""
    with tarfile.open(folder / TAR, "r:") as tar:
        places = [(info.offset, info.offset_data + info.size, info.name.partition(".")[0]) for info in tar]
    at = rng.randrange((folder / TAR).stat().st_size)
    flip(folder / TAR, rng, at, at + 1)
    return TAR, *(key for first, last, key in places if first <= at < last)


SHARDS = {
    "flipped byte": _flip_shard,
    "flipped byte in the index": _flip_index,
    "wrong manifest": _flip_manifest,
    "truncation": in_tar(cut),
    "missing member": forged(_without),
    "missing shard": in_tar(lambda path, _: path.unlink()),
    "doubled key": _same_key,
    "NaN latent": _tensors(_with_nan),
    "wrong shape": _tensors(_misshapen),
    "foreign file": in_tar(_replace_by_foreign),
    "path traversal": _leaving,
    "extra member": _extra_member,
    "pickle member": forged(_strange_member),
    "pickle for tensors": forged(_put("encoded.safetensors", PICKLE)),
    "bomb": forged(_put("source.png", bomb())),
    "0-byte image": forged(_put("target.png", b"")),
    "invalid UTF-8": forged(_bad_words),
}
STAGES = (
    Stage("ingest jsonl", raw_list, take("edits.jsonl"), LIST),
    Stage("ingest tar", raw_tar, take("edits.tar"), TARS),
    Stage("evolve", ingested, prompted, TAKEN),
    Stage("rollout", ingested, Reading(), TAKEN),
    Stage("verify", shard_set, verified, SHARDS),
    Stage("stream", shard_set, streamed, SHARDS),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", default="", help="also write the table as json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = trials(STAGES, args.faults, args.seed, Path(folder))
    print("injected / detected / named\n")
    print(table)
    print(*table.bad, sep="\n")
    if args.report:
        Path(args.report).write_bytes(to_json({"faults": table.to_dict(), "bad": table.bad}, indent=1))
    return bool(table.bad)


if __name__ == "__main__":
    sys.exit(main())
