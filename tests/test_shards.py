"""Shards survive: round trip, stock readers, killed writers, full disks, and every kind of damage named."""

import errno
import fcntl
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from data_tools import look, verify
from v4e.data import buffers
from v4e.data.disk import lock, writable
from v4e.data.members import MEMBERS, all_finite, load_tensors, save_tensors
from v4e.data.places import sizes
from v4e.data.shards import Index, SetMeta, ShardSet, ShardWriter, finish, index_path
from v4e.errors import DataError
from v4e.nouns import Clip, Encoded, Grid, Origin, Rollout, Sample

ROOT = Path(__file__).parents[1]
STUDENT, TEACHER = Grid(5, 16, 16), Grid(9, 16, 16)
META = SetMeta("rollout", STUDENT, TEACHER, {"guidance": 5.5, "seed": 0})
K, C, E, V = 4, 2, 6, 5


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int) -> Clip:
    return Clip((random(seed, 1, 3, 16, 16).sigmoid() * 255).to(torch.uint8))


def make_sample(n: int, key: str = "", pictures: bool = True, rolled: bool = True) -> Sample:
    encoded = Encoded(
        clip_Cthw=random(n, C, 2, 2, 2),
        known_Cthw=random(n + 1, C, 2, 2, 2),
        text_LE=(text := random(n + 2, 3, E)),
        null_LE=text[:1],  # shares memory with the text
        vision_NV=random(n + 3, 4, V),
        evolution_LE=random(n + 4, 7, E),
        teacher_known_Cthw=random(n + 5, C, 3, 2, 2),
        vision_last_NV=random(n + 6, 4, V).T.contiguous().T,  # not contiguous
        change_thw=random(n + 7, 2, 2, 2).sigmoid(),
    )
    full = random(n + 8, K, C, 3, 2, 2)[: K if n % 2 else 0]
    levels = torch.linspace(1, 0.1, K)
    path = [random(n + s, K, C, 2, 2, 2) for s in (9, 10)]
    rollout = Rollout(levels, *path, full, random(n + 11, C, 2, 2, 2)) if rolled else None
    pair = (image(n), image(n + 1)) if pictures else (None, None)
    origin = Origin("demo", "CC0", "teacher", n, "test")
    return Sample(key or f"s{n:04d}", f"make it {n}, größer", "it grows", *pair, encoded, rollout, "add", origin)


def write(folder: Path, n: int = 7, per_shard: int = 3, **options) -> ShardSet:
    with ShardWriter(folder, META, samples_per_shard=per_shard, **options) as writer:
        for i in range(n):
            writer.add(make_sample(i))
    return ShardSet.open(folder)


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return write(tmp_path / "set")


def contents(folder: Path) -> dict[str, bytes]:
    """Every byte that counts: stats tell how long it took."""
    files = [*folder.glob("*.tar"), *folder.glob("*.index.json"), folder / "manifest.json", folder / "settings.json"]
    return {p.name: p.read_bytes() for p in files}


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def same(a: Sample, b: Sample, dtype: torch.dtype) -> None:
    for name in ("key", "instruction", "evolution", "task", "origin"):
        assert getattr(a, name) == getattr(b, name)
    for part, other in ((a.encoded, b.encoded), (a.rollout, b.rollout)):
        for name, x in vars(part).items():
            stored = torch.float32 if name == "sigma_K" else dtype
            assert torch.equal(getattr(other, name), x.to(stored)) and getattr(other, name).dtype == stored


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip(tmp_path, dtype):
    shards = write(tmp_path, dtype=dtype)
    assert len(shards) == 7 and [s.samples for s in shards.shards] == [3, 3, 1] and shards.meta == META
    assert shards.keys == [f"s{i:04d}" for i in range(7)]
    for i in (6, 0, 3):
        sample, made = shards.sample(i, pictures=True), make_sample(i)
        same(made, sample, dtype)
        assert torch.equal(sample.source.frames_T3HW, made.source.frames_T3HW)
        assert torch.equal(sample.target.frames_T3HW, made.target.frames_T3HW)
    assert shards.sample(0).source is None


def test_parts_of_a_sample_are_optional(tmp_path):
    with ShardWriter(tmp_path, META) as writer:
        writer.add(make_sample(0, pictures=False, rolled=False))
        writer.add(Sample("bare", "do it", "", image(0), None))
    first, bare = (ShardSet.open(tmp_path).sample(i, pictures=True) for i in range(2))
    assert first.source is None and first.rollout is None and first.encoded is not None
    assert bare.encoded is None and bare.source is not None and bare.target is None


def test_fast_tensor_writer_makes_what_the_library_makes():
    from safetensors.torch import save

    tensors = {"b": random(0, 3, 4).bfloat16(), "a": random(1, 5), "n": torch.arange(3), "e": torch.zeros(0, 4)}
    assert save_tensors(tensors) == save(tensors)


@given(
    st.dictionaries(st.text("ab", min_size=1), st.lists(st.integers(0, 3), max_size=4), max_size=4),
    st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.uint8]),
    st.booleans(),
)
def test_fast_tensor_reader_reads_what_the_library_reads(shapes, dtype, writable):
    from safetensors.torch import load, save

    content = save({name: random(n, *shape).to(dtype) for n, (name, shape) in enumerate(shapes.items())})
    read, wanted = load_tensors(bytearray(content) if writable else content), load(content)
    assert read.keys() == wanted.keys()
    assert all(read[k].equal(x) and read[k].dtype == x.dtype and read[k].shape == x.shape for k, x in wanted.items())


def test_memory_is_used_again_and_never_while_something_refers_to_it():
    first = buffers.take(100_000)
    address, rest = torch.frombuffer(first, dtype=torch.uint8).data_ptr(), first[10:20]
    tensor = torch.frombuffer(rest, dtype=torch.uint8)
    tensor.fill_(7)
    del first, rest
    others = [buffers.take(100_000) for _ in range(3)]
    for other in others:
        torch.frombuffer(other, dtype=torch.uint8).fill_(1)
    assert tensor.tolist() == [7] * 10 and address not in map(_address, others)
    del tensor
    assert _address(again := buffers.take(98_305)) == address and len(again) == 98_305
    assert [len(buffers.take(n)) for n in (0, 1, 4097)] == [0, 1, 4097]


def _address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


@given(st.integers(1, 10**10))
def test_little_memory_is_taken_in_vain(size):
    rounded = buffers._rounded(size)
    assert size <= rounded <= max(size + 4095, size * 1.25) and rounded % 4096 == 0


NUMBERS = st.lists(st.floats(-1e4, 1e4) | st.sampled_from([math.inf, -math.inf, math.nan, -0.0]), max_size=5)
FLOATS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@given(st.lists(st.tuples(NUMBERS, FLOATS), max_size=4))
def test_numbers_that_are_not_finite_are_found_as_integers(parts):
    from safetensors.torch import save

    tensors = {f"x{n}": torch.tensor(numbers, dtype=dtype) for n, (numbers, dtype) in enumerate(parts)}
    content = save({**tensors, "ones": torch.full((3,), -1), "flags": torch.tensor([True])})  # their bits are all ones
    assert all_finite(content) == all(math.isfinite(number) for numbers, _ in parts for number in numbers)
    for _, dtype in parts:
        edges = torch.finfo(dtype)
        assert all_finite(save({"x": torch.tensor([edges.max, edges.min, edges.tiny], dtype=dtype)}))


@pytest.mark.parametrize("row", [(0, 5), (4, 8), (0, 2**40), (-4, 0), (4, 0)])
def test_tensors_that_do_not_lie_in_their_file_are_refused(row):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": row}}).encode()
    with pytest.raises(ValueError, match="does not lie in bytes"):
        load_tensors(len(header).to_bytes(8, "little") + header + bytes(4))


def test_max_bytes_finishes_a_shard_early(tmp_path):
    shards = write(tmp_path, per_shard=100, max_bytes=20_000)
    assert len(shards.shards) > 1 and all(s.bytes < 40_000 for s in shards.shards)


def test_same_samples_same_bytes(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert contents(a.folder) == contents(b.folder) and a.identity == b.identity
    assert write(tmp_path / "c", n=6).identity != a.identity


def test_stats_tell_what_a_shard_holds(shards):
    stats = json.loads((shards.folder / "000-000000_stats.json").read_bytes())
    assert stats["samples"] == 3 and stats["tasks"] == {"add": 3}
    assert stats["members"] == dict.fromkeys(sorted(MEMBERS), 3)


def test_stock_webdataset_reads_it(shards):
    wds = pytest.importorskip("webdataset")
    urls = [str(shards.folder / s.name) for s in shards.shards]
    read = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in read] == shards.keys
    assert read[2]["json"]["instruction"] == "make it 2, größer" and read[2]["source.png"].size == (16, 16)
    assert {k for k in read[2] if not k.startswith("__")} == set(MEMBERS)


def test_examples_of_the_docs_run(shards, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shards").symlink_to(shards.folder)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/shards.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    process = run_python("\n".join(blocks))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("größer") == 1 + len(shards)


# ------------------------------------------------------------------------------------------ going on, being killed


def test_going_on_makes_the_same_set(tmp_path):
    whole = write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "set", META, samples_per_shard=3) as writer:
        for i in range(5):
            writer.add(make_sample(i))
        raise KeyboardInterrupt
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(tmp_path / "set")
    with ShardWriter(tmp_path / "set", META, samples_per_shard=3) as writer:
        assert writer.done == {"s0000", "s0001", "s0002"}
        for i in range(3, 7):
            writer.add(make_sample(i))
    assert contents(tmp_path / "set") == contents(whole.folder)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from test_shards import META, ShardWriter, make_sample
    with ShardWriter(sys.argv[1], META, samples_per_shard=3) as writer:
        for i in range(7):
            if f"s{i:04d}" not in writer.done:
                writer.add(make_sample(i))
            if i == 4:
                print("begun", flush=True)
                signal.pause()
"""


def run_python(code: str, *words: object) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_writer_loses_work_but_spoils_nothing(tmp_path):
    whole, folder = write(tmp_path / "whole"), tmp_path / "set"
    process = run_python(KILLED, folder)
    assert process.stdout.readline() == "begun\n"
    with pytest.raises(DataError, match="another writer"):
        ShardWriter(folder, META, samples_per_shard=3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(folder.glob(".tmp-*.tar-*"))
    torn = folder / "000-000001.tar"  # killed between a tar and its index
    torn.write_bytes((whole.folder / torn.name).read_bytes())
    write(folder.parent / "other")
    with ShardWriter(folder, META, samples_per_shard=3) as writer:
        assert writer.done == {"s0000", "s0001", "s0002"} and not list(folder.glob(".tmp-*")) and not torn.exists()
        for i in range(3, 7):
            writer.add(make_sample(i))
    assert contents(folder) == contents(whole.folder)


def test_killed_at_any_moment(tmp_path):
    """Whatever the moment, what is listed as done can be read, and going on gives the same set."""
    loop = """
        import sys
        from test_shards import META, ShardWriter, make_sample
        samples = [make_sample(i) for i in range(30)]
        print("begun", flush=True)
        with ShardWriter(sys.argv[1], META, samples_per_shard=2) as writer:
            for s in samples:
                if s.key not in writer.done:
                    writer.add(s)
    """
    with ShardWriter(tmp_path / "whole", META, samples_per_shard=2) as writer:
        for i in range(30):
            writer.add(make_sample(i))
    process = run_python(loop, tmp_path / "set")
    process.stdout.readline()
    time.sleep(0.02)
    process.kill()
    process.communicate()
    with ShardWriter(tmp_path / "set", META, samples_per_shard=2) as writer:
        for i in range(30):
            if f"s{i:04d}" not in writer.done:
                writer.add(make_sample(i))
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_other_settings_are_refused_with_both_values(tmp_path):
    write(tmp_path)
    other = SetMeta("rollout", STUDENT, TEACHER, {"guidance": 6.0, "seed": 0})
    with pytest.raises(DataError, match=r"settings.guidance was 5.5 and is now 6.0"):
        ShardWriter(tmp_path, other, samples_per_shard=3)
    with pytest.raises(DataError, match=r"layout.samples_per_shard was 3 and is now 4"):
        ShardWriter(tmp_path, META, samples_per_shard=4)
    with ShardWriter(tmp_path, META, samples_per_shard=3):  # the refused ones hold no lock
        pass


def test_several_writers_fill_one_folder(tmp_path):
    for part in (1, 0):
        with ShardWriter(tmp_path, META, part=part, manifest=False) as writer:
            for i in range(part, 6, 2):
                writer.add(make_sample(i))
    assert finish(tmp_path).keys == ["s0000", "s0002", "s0004", "s0001", "s0003", "s0005"]


def test_a_whole_set_may_grow(tmp_path):
    before = write(tmp_path, n=3)
    with ShardWriter(tmp_path, META, samples_per_shard=3) as writer:
        writer.add(make_sample(9))
        assert not (tmp_path / "manifest.json").exists()
    assert ShardSet.open(tmp_path).keys == [*before.keys, "s0009"]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("key", ["../up", "a/b", "a.b", "", "a b", "-x", "ä", "k" * 77, "x\n"])
def test_keys_that_could_leave_the_folder_are_refused(tmp_path, key):
    sample = make_sample(0)
    object.__setattr__(sample, "key", key)
    with ShardWriter(tmp_path, META) as writer, pytest.raises(DataError, match="no legal name"):
        writer.add(sample)


def test_doubled_keys_are_refused(tmp_path):
    with ShardWriter(tmp_path, META, samples_per_shard=1) as writer:
        writer.add(make_sample(0))
        with pytest.raises(DataError, match="'s0000' was written before"):
            writer.add(make_sample(0))
    for name in ("000-000000", "001-000000"):
        for end in (".tar", ".index.json"):
            (tmp_path / f"{name}{end}").write_bytes((tmp_path / f"000-000000{end}").read_bytes())
    with pytest.raises(DataError, match="'s0000' occurs twice, in 000-000000.tar and 001-000000.tar"):
        finish(tmp_path)


def test_nonfinite_tensors_are_refused(tmp_path):
    sample = make_sample(0)
    sample.rollout.v_KCthw[1, 0, 0, 0, 0] = float("nan")
    with ShardWriter(tmp_path, META) as writer:
        with pytest.raises(DataError, match="key s0000.rollout.*v_KCthw is not finite"):
            writer.add(sample)
        big = make_sample(1)
        big.encoded.clip_Cthw.fill_(3e38)  # the sum overflows, no value does
        writer.add(big)


@pytest.mark.parametrize(
    "folder", ["pipe:cat x.tar", " pipe:ls", "ftp://host/set", "s3:/typo", "simplecache::s3://b/x"]
)
def test_strange_urls_are_refused(folder):
    with pytest.raises(DataError, match="neither a local path nor a URL that v4e reads"):
        ShardSet.open(folder)
    with pytest.raises(DataError, match="neither a local path nor a URL that v4e reads"):
        ShardWriter(folder, META)


def test_missing_things_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="no such shard folder.*v4e-shards rollout"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="unfinished.*run again"):
        ShardSet.open(tmp_path)
    with pytest.raises(DataError, match="no set was begun"):
        finish(tmp_path)


@pytest.mark.parametrize("name", ["../000-000000.tar", "/etc/passwd", "pipe:ls", "000-000000.tar.gz"])
def test_shard_names_in_a_manifest_cannot_leave_the_folder(shards, name):
    path = shards.folder / "manifest.json"
    body = json.loads(path.read_bytes())
    body["shards"][0]["name"] = name
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="no shard's name"):
        ShardSet.open(shards.folder)


def test_other_formats_and_broken_manifests(shards):
    path = shards.folder / "manifest.json"
    body = json.loads(path.read_bytes())
    path.write_text(json.dumps({**body, "format": 2}))
    with pytest.raises(DataError, match="format 2"):
        ShardSet.open(shards.folder)
    for broken in ("{", "[]", '{"format": 1}', json.dumps({**body, "student": {"T": 5}})):
        path.write_text(broken)
        with pytest.raises(DataError, match="manifest.json: not readable"):
            ShardSet.open(shards.folder)


# --------------------------------------------------------------------------------------------------- damage


def test_a_flipped_byte_names_shard_and_key(shards):
    row = Index(index_path(shards.folder / "000-000001.tar")).member(1, "encoded.safetensors")
    flip(shards.folder / "000-000001.tar", row.offset + 99)
    again = ShardSet.open(shards.folder)
    with pytest.raises(DataError, match=r"000-000001.tar, key s0004.encoded.safetensors"):
        again.sample(4)
    assert again.sample(3).key == "s0003" and again.sample(5).key == "s0005"


def test_sets_older_than_the_quick_hash_are_read(shards):
    """Their indexes have blake2b alone."""
    member = shards.index(1).member(1, "encoded.safetensors")
    for info in shards.shards:
        path = index_path(shards.folder / info.name)
        body = json.loads(path.read_bytes())
        path.write_text(json.dumps({k: v for k, v in body.items() if k != "quick"}))
    finish(shards.folder)
    flip(shards.folder / "000-000001.tar", member.offset + member.size - 9)
    old = ShardSet.open(shards.folder)
    same(make_sample(3), old.sample(3), torch.bfloat16)
    with pytest.raises(DataError, match="key s0004.encoded.safetensors: its bytes are not those"):
        old.sample(4)


def test_each_hash_finds_damage_alone(shards):
    """The quick one when a sample is read, the strong one when its bytes are; a forged quick hash does not fool it."""
    path = shards.folder / "000-000001.tar"
    member = shards.index(1).member(1, "encoded.safetensors")
    flip(path, member.offset + member.size - 9)
    body = json.loads(index_path(path).read_bytes())
    place = [kind for _, row in body["samples"] for kind in row].index("encoded.safetensors") + len(MEMBERS)
    content = path.read_bytes()[member.offset : member.offset + member.size]
    body["quick"][place] = xxhash.xxh3_128_hexdigest(content)
    index_path(path).write_text(json.dumps(body))
    forged = finish(shards.folder)
    assert forged.sample(4).key == "s0004"
    with pytest.raises(DataError, match="its bytes are not those"):
        forged.raw(4, "encoded.safetensors")


def test_a_truncated_shard(shards):
    path = shards.folder / "000-000000.tar"
    size = path.stat().st_size
    os.truncate(path, 3 * size // 4)
    with pytest.raises(DataError, match=f"cut short: {3 * size // 4} bytes of {size}"):
        ShardSet.open(shards.folder)
    lenient = ShardSet.open(shards.folder, verify="none")
    assert lenient.sample(0).key == "s0000"
    with pytest.raises(DataError, match="key s0002.*cut short"):
        lenient.sample(2)


def test_a_missing_shard_or_index(shards):
    (shards.folder / "000-000002.tar").rename(shards.folder / "away")
    with pytest.raises(DataError, match="000-000002.tar: the shard is missing"):
        ShardSet.open(shards.folder)
    with pytest.raises(DataError, match="key s0006.json: cannot be read"):
        ShardSet.open(shards.folder, verify="none").sample(6)
    index_path(shards.folder / "000-000001.tar").unlink()
    with pytest.raises(DataError, match="000-000001.index.json: cannot be read"):
        ShardSet.open(shards.folder)


def test_a_changed_index(shards):
    flip(index_path(shards.folder / "000-000000.tar"), 50)
    with pytest.raises(DataError, match="not the one the manifest names"):
        ShardSet.open(shards.folder, verify="index")
    lazily = ShardSet.open(shards.folder)
    with pytest.raises(DataError, match="000-000000.index.json: the index is not the one the manifest names"):
        lazily.sample(2)
    assert lazily.sample(3).key == "s0003" and lazily.name(2) == "000-000000-row-2"


def forge(shards: ShardSet, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Replace the first tar, and make index size and manifest agree with it."""
    path = shards.folder / "000-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    index = json.loads(index_path(path).read_bytes())
    index_path(path).write_text(json.dumps({**index, "bytes": path.stat().st_size}))
    finish(shards.folder)


def read_tar(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


def kinds(report: verify.Report) -> dict[str, int]:
    return dict(report.counts)


def test_verify_passes_a_good_set(shards):
    report = verify.verify(shards.folder)
    assert (report.shards, report.samples, report.problems) == (3, 7, [])


def test_verify_counts_every_fault(shards):
    first = Index(index_path(shards.folder / "000-000000.tar"))
    flip(shards.folder / "000-000000.tar", first.member(0, "source.png").offset + 9)
    flip(shards.folder / "000-000000.tar", first.member(2, "json").offset + 9)
    os.truncate(shards.folder / "000-000001.tar", 20 * 512)
    (shards.folder / "000-000002.tar").unlink()
    report = verify.verify(shards.folder)
    assert report.counts["hash"] >= 4 and report.counts["shard"] == 2 and report.counts["tar structure"] == 1
    assert any("000-000002.tar: the shard is missing" in p.detail for p in report.problems)
    assert list(report.lines(2))[3].startswith("... and")


def test_verify_finds_a_missing_member(shards):
    forge(shards, [m for m in read_tar(shards.folder / "000-000000.tar") if m[0].name != "s0001.target.png"])
    report = verify.verify(shards.folder)
    assert report.counts["tar structure"] == 1 and report.counts["hash"] >= 1


@pytest.mark.parametrize("name", ["../../escape.json", "/abs.json", "s0000.sh"])
def test_verify_finds_members_that_do_not_belong(shards, name):
    info = tarfile.TarInfo(name)
    forge(shards, [*read_tar(shards.folder / "000-000000.tar"), (info, b"")])
    report = verify.verify(shards.folder)
    assert kinds(report) == {"tar structure": 1} and name in report.problems[0].detail


def test_verify_finds_links_and_doubles(shards):
    members = read_tar(shards.folder / "000-000000.tar")
    link = tarfile.TarInfo("s0009.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for extra in ((link, b""), members[0]):
        forge(shards, [*members, extra])
        assert kinds(verify.verify(shards.folder)) == {"tar structure": 1}


def test_verify_finds_tensors_that_are_not_as_declared(tmp_path, monkeypatch):
    monkeypatch.setattr("v4e.data.members.refuse_nonfinite", lambda *_: None)
    bad, wrong = make_sample(0), make_sample(1)
    bad.encoded.clip_Cthw[0] = float("inf")
    object.__setattr__(wrong.encoded, "known_Cthw", random(0, C, 3, 2, 2))
    wrong.rollout.sigma_K.copy_(wrong.rollout.sigma_K.flip(0).clone())
    with ShardWriter(tmp_path, META) as writer:
        writer.add(bad)
        writer.add(wrong)
    report = verify.verify(tmp_path)
    assert kinds(report) == {"tensors": 1, "shape": 1}
    assert "clip_Cthw is not finite" in report.problems[0].detail and "known_Cthw" in report.problems[1].detail


def test_verify_names_strangers(shards):
    for end in (".tar", ".index.json"):
        (shards.folder / f"005-000000{end}").write_bytes((shards.folder / f"000-000000{end}").read_bytes())
    (shards.folder / ".tmp-000-000009.tar").touch()
    assert kinds(verify.verify(shards.folder)) == {"unlisted shard": 1, "temporary file": 1}


class Painter:
    """A codec of which the first latent channel says how bright each frame is."""

    def decode(self, z_BCthw: torch.Tensor) -> list[Clip]:
        grey = (z_BCthw[:, 0, :, 0, 0].clamp(0, 1) * 255).to(torch.uint8)
        times = [0, *[1] * 4]
        return [Clip(row[times][:, None, None, None].expand(-1, 3, 16, 16).contiguous()) for row in grey]


def painted(n: int, first: float, last: float) -> Sample:
    sample = make_sample(n)
    sample.encoded.clip_Cthw[:, 0], sample.encoded.clip_Cthw[:, 1] = first, last
    clips = [Clip(torch.full((1, 3, 16, 16), int(v * 255), dtype=torch.uint8)) for v in (0.25, 0.75)]
    object.__setattr__(sample, "source", clips[0])
    object.__setattr__(sample, "target", clips[1])
    return sample


def test_verify_decodes_and_compares(tmp_path):
    with ShardWriter(tmp_path, META) as writer:
        for n, pair in enumerate([(0.25, 0.75), (0.9, 0.75), (0.25, 0.1)]):
            writer.add(painted(n, *pair))
    report = verify.verify(tmp_path, codec=Painter())
    assert report.decoded == 3 and kinds(report) == {"decode": 2}
    assert "decode to the source" in report.problems[0].detail and "decode to the target" in report.problems[1].detail


def test_look_makes_one_page(tmp_path):
    with ShardWriter(tmp_path / "set", META) as writer:
        for n in range(4):
            writer.add(painted(n, 0.25, 0.75 + n))
    page = look.look(tmp_path / "set", tmp_path / "look.html", codec=Painter(), rows=3).read_text()
    assert page.count("<section class=") == 3 and "größer" in page and "roll-out's end".replace("'", "&#x27;") in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page and "http" not in page


# ------------------------------------------------------------------------------------------------- full disk

FULL = """
    import resource, sys
    from test_shards import META, ShardWriter, make_sample
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    from v4e.errors import DataError
    try:
        with ShardWriter(sys.argv[1], META, samples_per_shard=1000) as writer:
            for i in range(int(sys.argv[2])):
                writer.add(make_sample(i))
    except DataError as error:
        print(error)
"""


@pytest.mark.parametrize(("samples", "where"), [(20, ""), (200, ", key s0[0-9]{3}")])
def test_a_file_that_may_not_grow(tmp_path, samples, where):
    """RLIMIT_FSIZE stands in for a quota: the write itself fails, at the end or, past the buffer, at a sample."""
    process = run_python(FULL, tmp_path / "set", samples)
    out, err = process.communicate()
    assert "the disk is full" in out and "make room" in out and not err
    assert re.match(f"{tmp_path}/set/000-000000.tar{where}: the disk", out)
    assert not list((tmp_path / "set").glob("*.tar")) and not list((tmp_path / "set").glob(".tmp-*"))


def test_a_file_that_vanishes_while_a_folder_is_listed_hides_no_other(tmp_path, monkeypatch):
    """As temporary files of other parts do: shards that are not seen would be taken for undone, and removed."""
    for name in ("a.tar", ".tmp-b", "c.tar"):
        (tmp_path / name).write_bytes(b"123")
    scan = os.scandir

    @contextmanager
    def racing(folder):
        with scan(folder) as entries:
            listed = [*entries]
            (tmp_path / ".tmp-b").unlink()
            yield listed

    monkeypatch.setattr(os, "scandir", racing)
    assert sizes(tmp_path) == {"a.tar": 3, "c.tar": 3}


def test_a_disk_without_locks_is_not_taken_for_another_writer(tmp_path, monkeypatch):
    with lock(tmp_path / ".lock"), pytest.raises(DataError, match="another writer is at work here"):
        lock(tmp_path / ".lock")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(DataError, match=".lock: cannot be locked: No locks available .mount it with flock"):
        lock(tmp_path / ".lock")


def test_weights_on_a_disk_that_is_full(tmp_path):
    """They are written in Rust, whose errors are none of Python's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        full = pytest.raises(DataError, match="a.safetensors: the disk is full.*make room")
        with full, writable(tmp_path / "a.safetensors"):
            save_file({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk):
    with pytest.raises(DataError, match="the disk is full.*finished ones are safe.*make room"):
        write(small_disk, n=20)
    assert not list(small_disk.glob(".tmp-*"))
    for shard in (tars := list(small_disk.glob("*.tar"))):
        assert shard.stat().st_size == Index(index_path(shard)).bytes
    assert tars
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    with ShardWriter(small_disk, META, samples_per_shard=3) as writer:
        for i in range(20):
            if f"s{i:04d}" not in writer.done:
                writer.add(make_sample(i))
    assert len(ShardSet.open(small_disk)) == 20 and not verify.verify(small_disk).problems
