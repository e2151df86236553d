"""gs:// by gcsfs itself against an emulator of Google's store, and hf:// by the Hub's own client against a server of
this process that answers as the Hub does."""

import json
import re
from collections.abc import Iterator

import pytest
from builders import one_thread  # noqa: F401  (a fixture for all tests here)
from gcs import bucket
from hub import hub
from test_offline_urls import local, tars  # noqa: F401  (a fixture)
from test_rollout import settings
from test_shards import make_sample, same, write

from data_tools import cli, evolve
from data_tools.ingest import ingest, read_triplets
from data_tools.rollout import rollout
from v4e.data.places import exists, names, place, put, put_new, read_bytes, read_range, sizes
from v4e.data.shards import ShardSet
from v4e.data.stream import Stream
from v4e.errors import DataError

ABSENT = {"gs": "gs://none/set", "hf": "hf://datasets/lab/none/set"}


@pytest.fixture(params=(bucket, hub), ids=ABSENT)
def url(request) -> Iterator[str]:
    with request.param() as found:
        yield found


def test_files_are_written_whole_listed_and_read_in_parts(url):
    file = place(url) / "set/a.txt"
    assert sizes(file.parent) == {} and not exists(file)
    put_new(file, b"hello")
    assert (names(file.parent), read_bytes(file), bytes(read_range(file, 1, 3))) == ({"a.txt"}, b"hello", b"ell")


def test_a_second_writer_is_refused(url, tmp_path):
    file, refusal = place(url) / "set/a.txt", re.escape(f"{url}/set/a.txt: another writer has made this file")
    put_new(file, b"hello")
    put_new(file, b"hello")
    (tmp_path / "b").write_bytes(b"third")
    for other in (b"other", tmp_path / "b"):
        with pytest.raises(DataError, match=refusal):
            put_new(file, other)
    assert read_bytes(file) == b"hello"


def test_a_set_in_the_store_is_the_set_on_disk_and_is_trained_on(url, tmp_path):
    here, there = write(tmp_path / "set"), write(f"{url}/set")
    assert there.identity == here.identity and tars(f"{url}/set") == tars(tmp_path / "set")
    same(make_sample(5), there.sample(5), here.sample(5).encoded.clip_Cthw.dtype)
    for piece in (stream := Stream(ShardSet.open(f"{url}/set"), seed=0, batch=4, micro_batch=2)).step(0):
        assert piece.weights == (1.0, 1.0)
    stream.close()


def test_the_offline_stage_in_the_store(url, local, capsys):  # noqa: F811
    """From a list and pictures that are there to shards that are there: the bytes of the disk."""
    for path in (p for p in local.iterdir() if p.is_file()):
        put(place(url) / "raw" / path.name, path.read_bytes())
    ingest(f"{url}/raw/raw.jsonl", f"{url}/edits", (32, 32))
    evolve.add_evolutions(f"{url}/edits")
    rollout(read_triplets(f"{url}/edits"), f"{url}/set", settings())
    assert tars(f"{url}/set") == tars(local / "set")
    with pytest.raises(DataError, match=r"guidance was 2\.0 and is now 4\.0"):
        rollout(read_triplets(f"{url}/edits"), f"{url}/set", settings(guidance=4.0))
    for words in ("verify edits", "verify set", "stats set", "look set"):
        verb, folder = words.split()
        assert cli.main([verb, f"{url}/{folder}"]) == 0, (words, capsys.readouterr())
    assert read_bytes(place(url) / "set/look.html").startswith(b"<!doctype html>")
    assert json.loads(read_bytes(place(url) / "edits/evolve.json"))["written"]


def test_what_is_not_there_is_named(url):
    absent = ABSENT[url.split(":")[0]]
    with pytest.raises(DataError, match=rf"{absent}: no manifest\.json"):
        ShardSet.open(absent)
    with pytest.raises(DataError, match=absent):
        write(absent)
