"""The whole offline stage on stores: every verb takes URLs, and a kill costs no more there than on a disk."""

import json
import multiprocessing
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from builders import one_thread  # noqa: F401  (a fixture for all tests here)
from test_migrate import as_of_old
from test_rollout import picture, settings
from test_shards import write
from test_storage import s3  # noqa: F401  (a fixture)

from data_tools import cli, evolve
from data_tools.evolve import writers
from data_tools.ingest import ingest, read_triplets, sole_writer, verify_triplets, write_triplets
from data_tools.ingest.triplets import to_row
from data_tools.migrate import migrate
from data_tools.rollout import Worker, rollout
from data_tools.rollout.spool import Spool
from v4e import journal
from v4e.data import disk
from v4e.data.places import exists, names, place, put, put_new, read_bytes, sizes
from v4e.data.shards import Index, ShardSet
from v4e.errors import ConfigError, DataError
from v4e.models.vlm import Reply

FORK = multiprocessing.get_context("fork")
COUNT = 5


@pytest.fixture
def url(s3, request) -> str:  # noqa: F811
    return f"{s3}/{request.node.name}".replace("[", "-").replace("]", "")


@pytest.fixture(autouse=True)
def machine(tmp_path_factory, monkeypatch):
    """Go to another machine: one whose local folders know nothing of earlier work."""

    def go(name: str) -> None:
        folder = tmp_path_factory.mktemp(name)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))

    go("here")
    return go


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Raw edits, what was made of them on the disk by the same verbs, and what a store is held against."""
    home = tmp_path_factory.mktemp("local")
    rows = []
    for i in range(COUNT):
        names = [f"{kind}{i}.png" for kind in ("source", "edited")]
        for n, name in enumerate(names):
            picture(100 * n + i).save(home / name)
        rows.append({"id": f"t{i}", "instruction": f"make sky {i} red", "source": names[0], "edited": names[1]})
    (home / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ingest(home / "raw.jsonl", home / "edits", (32, 32))
    evolve.add_evolutions(home / "edits")
    rollout(read_triplets(home / "edits"), home / "set", settings())
    return home


def upload(local: Path, url: str) -> None:
    """A folder as it is, with the folders in it."""
    for path in (p for p in local.rglob("*") if p.is_file() and not p.name.startswith(".")):
        put_new(place(url) / str(path.relative_to(local)), path)


def tars(folder: Path | str) -> dict[str, bytes]:
    """Every byte that counts of a set: tars, indexes, manifest, settings."""
    there = place(folder)
    wanted = [n for n in sizes(there) if n.endswith((".tar", ".index.json", "manifest.json", "settings.json"))]
    return {name: read_bytes(there / name) for name in sorted(wanted)}


def worked_on(monkeypatch) -> list[list[str]]:
    """The units that are begun from now on."""
    real, made = Worker.work, []
    monkeypatch.setattr(Worker, "work", lambda self, unit: made.append([t.id for t in unit]) or real(self, unit))
    return made


# --------------------------------------------------------------------------------------------------- every verb


def test_every_verb_reads_and_writes_a_store(url, local, capsys):
    """By the command line, from a list on the store to a page on the store; the same bytes as on the disk."""
    for path in local.glob("*.*"):
        put_new(place(url) / path.name, path)
    edits, shards, config = f"{url}/edits", f"{url}/set", settings()
    words = [f"{k}={getattr(config, k)}" for k in ("height", "width", "teacher_frames", "guidance", "batch", "dtype")]
    words += ["step_counts=[1,2]", "samples_per_shard=2", "stored=fp32", "attention=native", "dataset=tests"]
    for command in (
        ["ingest", f"{url}/raw.jsonl", edits, "--height", "32", "--width", "32"],
        ["evolve", edits],
        ["verify", edits],
        ["rollout", edits, shards, "--teacher", config.teacher, *words, "wandb.mode=disabled", "parts=1"],
        ["verify", shards, "--codec", config.teacher, "--least-psnr", "0"],
        ["stats", shards, "--json"],
        ["filter", shards, "tasks=[add,colour]", "--out", f"{url}/good", "--drops", f"{url}/drops.jsonl"],
        ["merge", shards, "--out", f"{url}/merged"],
        ["reshard", f"{url}/merged", f"{url}/cut", "--samples-per-shard", "4"],
        ["look", f"{url}/cut"],
    ):
        assert cli.main(command) == 0, (command, capsys.readouterr())
    assert tars(shards) == tars(local / "set")
    assert read_bytes(place(edits) / "triplets.jsonl") != b""
    assert [replace(t, stamp="") for t in read_triplets(edits)] == [
        replace(t, stamp="", **{k: place(edits) / p.relative_to(local / "edits") for k, p in t.files.items()})
        for t in read_triplets(local / "edits")
    ]
    assert [len(ShardSet.open(f"{url}/{name}")) for name in ("good", "merged", "cut")] == [COUNT] * 3
    page = read_bytes(place(url) / "cut/look.html").decode()
    assert page.startswith("<!doctype html>") and "make sky 4 red" in page
    assert not Path("s3:").exists()


@pytest.mark.parametrize("verb", ["evolve", "rollout", "verify", "stats", "filter", "reshard", "merge", "look"])
@pytest.mark.parametrize(("where", "why"), [("pipe:rm -rf x", "neither"), ("https://me:pw@host/x", "credentials")])
def test_no_verb_opens_what_would_run_a_shell_or_tell_a_password(verb, where, why, local, capsys):
    more = {
        "rollout": [str(local / "out"), "--teacher", "none", "codec=x"],
        "filter": ["tasks=[add]", "--dry-run"],
        "reshard": [str(local / "out"), "--samples-per-shard", "2"],
        "merge": ["--out", str(local / "out")],
    }
    assert cli.main([verb, where, *more.get(verb, [])]) == DataError.exit_code
    told = capsys.readouterr().err
    assert why in told and "pw@" not in told
    if verb == "rollout":
        words = ["--teacher", settings().teacher]
        assert cli.main([verb, str(local / "edits"), where, *words]) == DataError.exit_code


# ---------------------------------------------------------------------------------------------- rolling out to S3


def stuck(rows, out: str, unit: int, step: str, say) -> None:
    """A rank that stops for ever at that unit: in its work, or when its shard's index is to be uploaded."""

    def wait(*_):
        say.send("stuck")
        signal.pause()

    work, put = Worker.work, disk.put_new
    if step == "work":
        Worker.work = lambda self, pairs: wait() if pairs[0].id == rows[unit].id else work(self, pairs)
    else:
        disk.put_new = lambda where, source: wait() if where.name.endswith("1.index.json") else put(where, source)
    rollout(rows, out, settings())


@pytest.mark.parametrize(
    ("unit", "step", "left"),
    [(2, "work", [["t2", "t3"], ["t4"]]), pytest.param(2, "index", [["t4"]], marks=pytest.mark.slow)],
)
def test_sigkill_in_a_rollout_to_s3(url, local, monkeypatch, machine, unit, step, left):
    """One batch is lost and no other; another machine, which has nothing but the store, goes on to the same bytes."""
    rows = read_triplets(local / "edits")
    listen, say = FORK.Pipe()
    rank = FORK.Process(target=stuck, args=(rows, url, unit, step, say), daemon=True)
    rank.start()
    assert listen.poll(120) and listen.recv() == "stuck"
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    assert rank.exitcode == -signal.SIGKILL and not exists(place(url) / "manifest.json")
    assert ("000-000001.tar" in sizes(place(url))) == (step == "index")
    machine("there")
    made = worked_on(monkeypatch)
    rollout(rows, url, settings())
    assert made == left
    assert tars(url) == tars(local / "set") and names(place(url) / ".units") == set()
    made.clear()
    rollout(rows, url, settings())
    assert made == []


def test_ranks_of_two_machines_keep_to_their_shares(url, local, monkeypatch, machine):
    """No lock reaches another machine, so nobody does what may be begun there; the journal goes with the set."""
    rows, made = read_triplets(local / "edits"), worked_on(monkeypatch)
    rollout(rows, url, settings(part=0, parts=2))
    assert made == [["t0", "t1"], ["t4"]] and not exists(place(url) / "manifest.json")
    machine("there")
    rollout(rows, url, settings())
    assert made[2:] == [["t2", "t3"]] and tars(url) == tars(local / "set")
    here = disk.scratch(place(url)) / "journal"
    assert read_bytes(place(url) / "journal/journal.jsonl") == (here / "journal.jsonl").read_bytes()
    lines = journal.read(here)
    size = sum(n for name, n in sizes(place(url)).items() if name.endswith(".tar"))
    counts = [(line["samples"], line["rejects"]) for line in lines]
    assert (3, 0) in counts and counts[-1] == (COUNT, 0)
    assert lines[-1]["packed_bytes"] == size and lines[-1]["packed_seconds"] > 0


@pytest.mark.slow
def test_a_unit_done_by_two_machines_is_one_sample(url, local, monkeypatch, machine):
    """Both begin the same share; what one has packed, the other finds, and its own unit does not stay behind."""
    rows, save = read_triplets(local / "edits"), Spool.save

    def other_first(self, unit, outcome):
        monkeypatch.setattr(Spool, "save", save)
        machine("there")
        rollout(rows, url, settings())
        save(self, unit, outcome)

    monkeypatch.setattr(Spool, "save", other_first)
    rollout(rows, url, settings())
    assert tars(url) == tars(local / "set") and names(place(url) / ".units") == set()


@pytest.mark.slow
def test_a_changed_triplet_on_a_store_is_refused_or_done_again(url, local, monkeypatch):
    rows, out = read_triplets(local / "edits"), f"{url}/set"
    upload(local / "set", out)
    rows[3] = replace(rows[3], instruction="make it green")
    with pytest.raises(DataError, match="t3: instruction was 'make sky 3 red' and is now 'make it green'"):
        rollout(rows, out, settings())
    made = worked_on(monkeypatch)
    rollout(rows, out, settings(changed="reroll"))
    assert made == [["t2", "t3"]] and ShardSet.open(out, verify="index").sample(3).instruction == "make it green"
    assert cli.main(["verify", out]) == 0


# ---------------------------------------------------------------------------------------------------- repairing


def spoil(folder: Path | str, name: str, at: int) -> None:
    path = place(folder) / name
    content = bytearray(read_bytes(path))
    content[at] ^= 1
    path.write_bytes(bytes(content))


def objects(folder: Path | str) -> dict[str, bytes]:
    """Every file that a repair may touch."""
    found = {}
    for at in (place(folder), place(folder) / ".damaged"):
        kept = [n for n in names(at) if not n.startswith(".") and not n.endswith("_stats.json")]
        found |= {f"{at.name * (at.name == '.damaged')}{n}": read_bytes(at / n) for n in kept}
    return found


def test_a_repair_on_a_store_is_that_on_a_disk(url, tmp_path):
    """A torn header, an index and a sample, each in a shard of its own; then nothing is left to say."""
    sets = [write(folder, n=12, per_shard=3).folder for folder in (tmp_path / "set", url)]
    sample = Index(sets[0] / "000-000002.index.json").member(1, "rollout.safetensors")
    for folder in sets:
        spoil(folder, "000-000000.tar", 140)
        spoil(folder, "000-000001.index.json", 200)
        spoil(folder, "000-000002.tar", sample.offset + 40)
        assert cli.main(["verify", str(folder), "--repair", "--seal"]) == DataError.exit_code
        assert cli.main(["verify", str(folder)]) == 0
    here, there = map(objects, sets)
    dropped = [json.loads(content.pop("dropped.jsonl")) for content in (here, there)]
    assert [(d["shard"], d["key"], d["kind"]) for d in dropped] == [("000-000002.tar", "s0007", "hash")] * 2
    assert there == here and {".damaged000-000000.tar", ".damaged000-000002.tar"} <= here.keys()
    assert len(ShardSet.open(url)) == 11 and not exists(place(url) / "000-000002.tar")


@pytest.mark.slow
def test_what_a_repair_dropped_on_a_store_is_rolled_again(url, local, monkeypatch):
    upload(local / "set", url)
    member = Index(local / "set/000-000001.index.json").member(0, "encoded.safetensors")
    spoil(url, "000-000001.tar", member.offset + 99)
    assert cli.main(["verify", url, "--repair", "--most-dropped", "0.5"]) == DataError.exit_code
    made = worked_on(monkeypatch)
    rollout(read_triplets(local / "edits"), url, settings())
    assert made == [["t2", "t3"]] and tars(url) == tars(local / "set")


# ---------------------------------------------------------------------------------------------------- migrating


@pytest.mark.parametrize("road", ["store to store", "disk to store", "store to disk"])
def test_a_migration_goes_on_on_another_machine(url, tmp_path, monkeypatch, machine, road):
    """Stopped when the second tar is there and its index is not; the bytes are those of a set written today."""
    today = write(tmp_path / "today").folder
    old = as_of_old(write(tmp_path / "old").folder)
    source, target = road.split(" to ")
    out = f"{url}/new" if target == "store" else str(tmp_path / "new")
    if source == "store":
        upload(old, f"{url}/old")
        old = f"{url}/old"
    publish = disk.publish

    def publish_or_stop(where, content):
        if where.name == "000-000001.index.json":
            raise KeyboardInterrupt
        publish(where, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("data_tools.migrate.publish", publish_or_stop)
        migrate(old, out)
    assert {"000-000000.index.json", "000-000001.tar"} <= names(place(out)) and not exists(place(out) / "manifest.json")
    machine("there")
    read, members = [], ShardSet.members
    monkeypatch.setattr(
        ShardSet, "members", lambda self, i, *words, **how: read.append(i) or members(self, i, *words, **how)
    )
    assert cli.main(["migrate", str(old), out]) == 0
    assert read == [3, 4, 5, 6] and tars(out) == tars(today)  # three samples a shard
    assert cli.main(["verify", out]) == 0 and not Path("s3:").exists()
    assert cli.main(["migrate", out, f"{out}-again"]) == ConfigError.exit_code  # nothing to do


def test_a_migration_is_not_mixed_with_another_writers(url, tmp_path):
    """Another tar of that name is on the store already; the old set is refused in its own place by any spelling."""
    old = as_of_old(write(tmp_path / "old").folder)
    put(place(url) / "new/000-000001.tar", b"of another")
    with pytest.raises(DataError, match=r"000-000001\.tar: another writer has made this file"):
        migrate(old, f"{url}/new")
    upload(old, f"{url}/old")
    with pytest.raises(ConfigError, match="own place"):
        migrate(f"{url}/old", f"{url}/old/")


# --------------------------------------------------------------------------------------------------- evolving on S3


class Stops:
    """A writer that is interrupted after so many prompts."""

    signature = "stops 1"

    def __init__(self, after: int) -> None:
        self.left, self.asked = after, []

    def drafts(self, triplets):
        for triplet in triplets:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked.append(triplet.id)
            yield [writers.Draft(triplet, f"film of {triplet.id}")]


@pytest.fixture
def bare(url, local) -> str:
    """Edits on the store without prompts."""
    upload(local / "edits", url)
    write_triplets(url, [replace(t, evolution="", writer="", task="") for t in read_triplets(url)])
    return url


def test_evolving_on_s3_goes_on_after_a_stop(bare):
    with pytest.raises(KeyboardInterrupt):
        evolve.add_evolutions(bare, Stops(2))
    assert [t.evolution for t in read_triplets(bare)] == [""] * COUNT
    writer = Stops(9)
    report = evolve.add_evolutions(bare, writer)
    assert (report.written.total(), report.kept, writer.asked) == (3, {"stops 1": 2}, ["t2", "t3", "t4"])
    assert [t.evolution for t in read_triplets(bare)] == [f"film of t{i}" for i in range(COUNT)]
    assert json.loads(read_bytes(place(bare) / "evolve.json"))["kept"] == {"stops 1": 2}
    assert [*verify_triplets(bare)] == [] and not (disk.scratch(place(bare)) / ".evolved.jsonl").exists()


def test_a_list_that_another_machine_replaced_is_not_written_over(bare, monkeypatch):
    """What was finished waits in the log, and goes into the new list."""
    rows, writer, path = read_triplets(bare), Stops(9), place(bare) / "triplets.jsonl"
    other = to_row(replace(rows[0], evolution="of another", writer="other 1"), place(bare))

    def while_another_writes(triplets):
        yield from triplets
        put(path, b"".join([other, *(to_row(row, place(bare)) for row in rows[1:])]))

    with monkeypatch.context() as patched:
        patched.setattr(evolve.verb, "write_triplets", lambda f, t: write_triplets(f, while_another_writes(t)))
        with pytest.raises(DataError, match="triplets.jsonl: another writer has replaced it meanwhile"):
            evolve.add_evolutions(bare, writer)
    assert read_triplets(bare)[0].evolution == "of another" and writer.asked == [f"t{i}" for i in range(COUNT)]
    evolve.add_evolutions(bare, writer)
    assert [t.evolution for t in read_triplets(bare)] == [f"film of t{i}" for i in range(COUNT)]
    assert len(writer.asked) == COUNT


def test_answers_are_kept_on_the_store(url):
    cache = writers.Cache(place(url) / "answers")
    assert cache.get("ab12") is None
    cache.put("ab12", Reply(text="Start: a dog", read=3, wrote=4))
    assert cache.get("ab12") == Reply(text="Start: a dog")
    (place(url) / "answers/ab/ab12.json").write_bytes(b"torn")
    assert cache.get("ab12") is None
    with pytest.raises(DataError, match="bucket does not exist"):
        writers.Cache(place("s3://nowhere/answers")).put("ab12", Reply(text="x"))


def test_two_at_work_on_one_machine(bare):
    with sole_writer(place(bare)), pytest.raises(DataError, match="another writer"):
        evolve.add_evolutions(bare)
