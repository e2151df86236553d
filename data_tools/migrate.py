"""`v4e-shards migrate`: a set as an older v4e wrote it, in a new folder as this one would have written it.

There has been one format, number 1; sets of its first days lack the quick hashes (xxh3) by which training checks what
it reads, which takes them 25 times as long. They are read as they are, and this adds the hashes. No sample changes and
the old set stays untouched: tars are linked where they can be, each of their members is read and held against its
strong hash on the way, and indexes and manifest are made anew. Killed, it goes on after its last whole shard.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from v4e.data.disk import agree, copy, lock, publish, readable, scratch, to_json, writable
from v4e.data.places import Place, exists, make_folder, place, read_bytes
from v4e.data.shards import ShardSet, finish, finished, index_path, refuse_format
from v4e.errors import ConfigError, DataError
from v4e.journal import progress

Task = tuple[str, int]  # a shard's name, and the number of its first sample


def migrate(folder: str | Place, out: str | Place, *, watch: Callable = iter) -> ShardSet:
    """The same samples in the same shards, with all that an index holds today.

    Args:
        watch: wraps the shards, for a progress bar.

    Raises:
        ConfigError: there is nothing to migrate, or ``out`` is the folder itself.
        DataError: the format is not one that this v4e reads, the set is unfinished or damaged, or ``out`` was begun
            with another set.
    """
    old, out = ShardSet.open(folder), place(out)
    _refuse_needless(old, str(out))
    with writable(out):
        make_folder(out)
        with lock(scratch(out) / ".lock-migrate"):
            agree(out / "settings.json", json.loads(read_bytes(old.folder / "settings.json")))
            agree(out / "migrated.json", {"of": old.identity})
            done = set(finished(out))
            for name, first in watch([task for task in _tasks(old) if task[0] not in done]):
                _take(old, name, first, out)
    new = finish(out)
    if len(new) != len(old):
        raise DataError(f"holds {len(new)} samples and not {len(old)}", where=str(out), fix="migrate into a new folder")
    return new


def _refuse_needless(old: ShardSet, out: str) -> None:
    if out == str(old.folder):
        raise ConfigError("a set is not migrated in its own place", where=out, fix="write to a new folder")
    if all(map(_is_of_today, _bodies(old))):
        raise ConfigError("nothing to migrate: the set is as this v4e writes it", where=str(old.folder))


def _is_of_today(index: dict) -> bool:
    return "quick" in index


def _bodies(old: ShardSet) -> Iterator[dict]:
    """Every index as it was written, held against the manifest."""
    for number, shard in enumerate(old.shards):
        old.index(number)
        yield _body(index_path(old.folder / shard.name))


def _body(path: Place) -> dict:
    with readable(str(path)):
        body = json.loads(read_bytes(path))
        refuse_format(body["format"], str(path))
        return body


def _tasks(old: ShardSet) -> list[Task]:
    return [*zip((s.name for s in old.shards), accumulate((s.samples for s in old.shards), initial=0), strict=False)]


def _take(old: ShardSet, name: str, first: int, out: Place) -> None:
    """The tar, what lies beside it, the index: that is what says that the shard is whole."""
    index = _hashed_anew(old, _body(index_path(old.folder / name)), first)
    copy(old.folder / name, out / name)
    for beside in (f"{Path(name).stem}_stats.json", f"{Path(name).stem}_rejects.jsonl"):
        if exists(old.folder / beside):
            publish(out / beside, read_bytes(old.folder / beside))
    publish(index_path(out / name), to_json(index))


def _hashed_anew(old: ShardSet, body: dict, first: int) -> dict:
    """An index with the quick hash of each member, whose bytes are those that its strong hash pins."""
    quick = []
    for i, (_, row) in enumerate(body["samples"], first):
        members = old.members(i, list(row), strong=True)
        quick += [xxh3_128_hexdigest(members[kind]) for kind in row]
    return {**body, "quick": quick}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards migrate`."""
    parser.add_argument("folder", help="shard folder or URL, as an older v4e wrote it")
    parser.add_argument("out", help="folder or URL of the new set; an unfinished one is gone on with")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    new = migrate(args.folder, args.out, watch=lambda shards: progress(shards, "migrate"))
    print(json.dumps({"samples": len(new), "shards": len(new.shards), "identity": new.identity}))
    return 0
