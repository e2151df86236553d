"""What hf:// has to itself: its client remembers, and a repository is another machine's too."""

from collections.abc import Iterator

import pytest
from hub import hub

from data_tools.ingest.triplets import replacing
from v4e.data.places import _connected, exists, place, put, read_bytes, sizes
from v4e.errors import DataError


@pytest.fixture
def url() -> Iterator[str]:
    with hub() as found:
        yield found


def elsewhere():
    """Another machine's client."""
    return _connected.__wrapped__("hf", 0)


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
