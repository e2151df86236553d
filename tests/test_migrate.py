"""A set as an older v4e wrote it becomes what this one would write; what cannot be read is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from test_shards import contents, flip, write

from data_tools import cli
from data_tools.migrate import migrate
from data_tools.verify import verify
from v4e.data import disk
from v4e.data.members import MEMBERS
from v4e.data.shards import ShardSet, finish, finished
from v4e.errors import ConfigError, DataError


def as_of_old(folder: Path, shards: str = "*") -> Path:
    """The first writer's set: its indexes knew no quick hashes, all else is the same to this day."""
    for path in folder.glob(f"{shards}.index.json"):
        body = json.loads(path.read_bytes())
        first = {key: body[key] for key in ("format", "bytes", "samples")}
        path.write_text(json.dumps(first, ensure_ascii=False, separators=(",", ":")))
    (folder / "manifest.json").unlink()
    finish(folder)
    return folder


@pytest.fixture
def today(tmp_path) -> ShardSet:
    return write(tmp_path / "today")


@pytest.fixture
def old(today, tmp_path) -> Path:
    return as_of_old(Path(shutil.copytree(today.folder, tmp_path / "old")))


def everything(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_migrated_set_is_the_one_that_would_be_written_today(today, old, tmp_path):
    before = everything(old)
    assert ShardSet.open(old).index(0).member(0, "json").quick is None
    new = migrate(old, tmp_path / "new")
    assert contents(new.folder) == contents(today.folder) and new.identity == today.identity
    assert new.index(0).member(0, "json").quick == today.index(0).member(0, "json").quick is not None
    assert everything(old) == before
    assert (new.folder / "000-000000.tar").samefile(old / "000-000000.tar")
    assert not verify(new.folder).problems


def test_only_some_shards_may_be_old(today, tmp_path):
    """A writer that was updated half-way: the shards it then wrote stay as they are."""
    mixed = as_of_old(Path(shutil.copytree(today.folder, tmp_path / "mixed")), "000-000001")
    (mixed / "000-000001_rejects.jsonl").write_text('{"key": "x"}\n')
    new = migrate(mixed, tmp_path / "new")
    assert contents(new.folder) == contents(today.folder)
    assert (new.folder / "000-000001_rejects.jsonl").read_text() == '{"key": "x"}\n'


@pytest.mark.parametrize("published", range(8))
def test_a_migration_that_was_stopped_goes_on(today, old, tmp_path, monkeypatch, published):
    """Stopped before any file becomes visible; a shard that is whole is not read again."""
    publish, left, read = disk.publish, [published], []

    def publish_or_stop(*words: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        publish(*words)

    for module in ("data_tools.migrate", "v4e.data.disk"):
        monkeypatch.setattr(f"{module}.publish", publish_or_stop)
    with pytest.raises(KeyboardInterrupt):
        migrate(old, tmp_path / "new")
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(tmp_path / "new")
    left[0], members, whole = 100, ShardSet.members, len(finished(tmp_path / "new"))

    def noted(shards: ShardSet, i: int, *words: object, **options: object) -> dict:
        read.append(i)
        return members(shards, i, *words, **options)

    monkeypatch.setattr(ShardSet, "members", noted)
    assert contents(migrate(old, tmp_path / "new").folder) == contents(today.folder)
    assert read == list(range(3 * whole, 7))  # three samples a shard


def test_damage_is_found_on_the_way_and_nothing_is_called_whole(old, tmp_path):
    member = ShardSet.open(old).index(1).member(0, "encoded.safetensors")
    flip(old / "000-000001.tar", member.offset + 9)
    with pytest.raises(DataError, match=r"000-000001\.tar, key s0003\.encoded.*not those that were written"):
        migrate(old, tmp_path / "new")
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(tmp_path / "new")
    flip(old / "000-000001.tar", member.offset + 9)
    assert len(migrate(old, tmp_path / "new")) == 7


def test_what_there_is_nothing_to_do_about_is_refused(today, old, tmp_path):
    with pytest.raises(ConfigError, match="nothing to migrate"):
        migrate(today.folder, tmp_path / "new")
    with pytest.raises(ConfigError, match="own place"):
        migrate(old, old)
    migrate(old, tmp_path / "new")
    with pytest.raises(DataError, match="other settings"):
        migrate(as_of_old(write(tmp_path / "other", n=2).folder), tmp_path / "new")


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (2, "format 2, but this v4e reads format 1 (a newer v4e wrote it: update this one)"),
        (0, "format 0, but this v4e reads format 1 (no v4e wrote such a one: make the set again)"),
        ("webdataset", "format 'webdataset', but this v4e reads format 1 (no v4e wrote such a one"),
        (True, "format True, but"),
    ],
)
@pytest.mark.parametrize("verb", ["migrate", "reshard"])
def test_other_formats_are_refused_by_name(old, tmp_path, capsys, number, told, verb):
    path = old / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": number}))
    words = ["--samples-per-shard", "2"] if verb == "reshard" else []
    assert cli.main([verb, str(old), str(tmp_path / "new"), *words]) == DataError.exit_code
    assert told in (error := capsys.readouterr().err) and str(path) in error
    assert not (tmp_path / "new").exists()


def test_an_index_of_another_format_is_refused(old, tmp_path):
    path = old / "000-000001.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    (old / "manifest.json").unlink()
    finish(old)
    with pytest.raises(DataError, match=r"000-000001\.index\.json: format 3"):
        migrate(old, tmp_path / "new")


def test_the_verb(today, old, tmp_path, capsys):
    assert cli.main(["migrate", str(old), str(tmp_path / "new")]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out == {"samples": 7, "shards": 3, "identity": today.identity}
    raw = [[s.raw(i, kind) for i in range(7) for kind in MEMBERS] for s in map(ShardSet.open, (old, tmp_path / "new"))]
    assert raw[0] == raw[1]
