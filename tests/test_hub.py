"""hf:// by the Hub's own client, against a server of this process that answers as the Hub does."""

import json
from collections.abc import Iterator

import pytest
from builders import one_thread  # noqa: F401  (a fixture for all tests here)
from hub import hub
from test_offline_urls import local, tars  # noqa: F401  (a fixture)
from test_rollout import settings
from test_shards import make_sample, same, write

from data_tools import cli, evolve
from data_tools.ingest import ingest, read_triplets
from data_tools.ingest.triplets import replacing
from data_tools.rollout import rollout
from v4e.data.places import _connected, exists, names, place, put, put_new, read_bytes, read_range, sizes
from v4e.data.shards import ShardSet
from v4e.data.stream import Stream
from v4e.errors import DataError


@pytest.fixture
def url() -> Iterator[str]:
    with hub() as found:
        yield found


def elsewhere():
    """Another machine's client."""
    return _connected.__wrapped__("hf", 0)


def test_files_are_written_whole_listed_and_read_in_parts(url):
    file = place(url) / "set/a.txt"
    assert sizes(file.parent) == {} and not exists(file)
    put_new(file, b"hello")
    assert (names(file.parent), read_bytes(file), bytes(read_range(file, 1, 3))) == ({"a.txt"}, b"hello", b"ell")
    put_new(file, b"hello")
    with pytest.raises(DataError, match=r"hf://datasets/lab/edits/set/a\.txt: another writer has made this file"):
        put_new(file, b"other")


def test_what_another_machine_did_since_is_seen(url):
    """The client keeps what a folder held, whatever it is told; files that come later would never be there."""
    folder = place(url) / "set"
    put(folder / "a", b"1")
    assert sizes(folder) == {"a": 1} and not exists(folder / "b")
    elsewhere().pipe_file(f"{folder.path}/b", b"22")
    assert exists(folder / "b") and sizes(folder) == {"a": 1, "b": 2}
    elsewhere().rm_file(f"{folder.path}/a")
    assert sizes(folder) == {"b": 2} and not exists(folder / "a")


def test_a_list_that_another_machine_replaced_is_not_written_over(url):
    path = place(url) / "triplets.jsonl"
    put(path, b"old\n")
    with pytest.raises(DataError, match="another writer has replaced it meanwhile"), replacing(path) as file:
        elsewhere().pipe_file(path.path, b"of another\n")
        file.write(b"ours\n")
    assert read_bytes(path) == b"of another\n"


def test_a_set_on_the_hub_is_the_set_on_disk_and_is_trained_on(url, tmp_path):
    here, there = write(tmp_path / "set"), write(f"{url}/set")
    assert there.identity == here.identity and tars(f"{url}/set") == tars(tmp_path / "set")
    same(make_sample(5), there.sample(5), here.sample(5).encoded.clip_Cthw.dtype)
    for piece in (stream := Stream(ShardSet.open(f"{url}/set"), seed=0, batch=4, micro_batch=2)).step(0):
        assert piece.weights == (1.0, 1.0)
    stream.close()


def test_the_offline_stage_on_the_hub(url, local, capsys):  # noqa: F811
    """From a list and pictures that are there to shards that are there: the bytes of the disk."""
    for path in (p for p in local.iterdir() if p.is_file()):
        put(place(url) / "raw" / path.name, path.read_bytes())
    ingest(f"{url}/raw/raw.jsonl", f"{url}/edits", (32, 32))
    evolve.add_evolutions(f"{url}/edits")
    rollout(read_triplets(f"{url}/edits"), f"{url}/set", settings())
    assert tars(f"{url}/set") == tars(local / "set")
    for words in (
        ["verify", f"{url}/edits"],
        ["verify", f"{url}/set"],
        ["stats", f"{url}/set"],
        ["look", f"{url}/set"],
    ):
        assert cli.main(words) == 0, (words, capsys.readouterr())
    assert read_bytes(place(url) / "set/look.html").startswith(b"<!doctype html>")
    assert json.loads(read_bytes(place(url) / "edits/evolve.json"))["written"]


def test_a_repository_that_is_not_there_is_named(url):
    with pytest.raises(DataError, match=r"hf://datasets/lab/none/set: no manifest\.json"):
        ShardSet.open("hf://datasets/lab/none/set")
    with pytest.raises(DataError, match="hf://datasets/lab/none/set"):
        write("hf://datasets/lab/none/set")
