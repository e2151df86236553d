"""`v4e-shards merge`: several shard folders become one, without encoding anything again.

Tars are linked where they can be and copied where not, under the set's number and their own. Killed, it goes on.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from v4e.data.disk import agree, copy, hash_of, lock, publish, scratch, writable
from v4e.data.places import Place, exists, make_folder, place, read_bytes
from v4e.data.shards import ShardInfo, ShardSet, finish, index_path, layout_of, refuse_doubles
from v4e.errors import ConfigError, DataError
from v4e.journal import progress

Pair = tuple[Place, ShardInfo, Place]  # a folder, one of its shards, and what it will be


def merge(folders: Sequence[str | Place], out: str | Place, *, watch: Callable = iter) -> ShardSet:
    """One set of all samples, in the order of the folders.

    Args:
        watch: wraps the shards, for a progress bar.

    Raises:
        ConfigError: ``out`` is among the folders, or one of them is named twice.
        DataError: a set is unfinished or damaged, two hold the same key, their settings differ (both values are
            named), or ``out`` was begun with other sets.
    """
    out, sets = place(out), [ShardSet.open(folder) for folder in folders]
    _refuse_repeats([str(s.folder) for s in sets], str(out))
    refuse_doubles(sets)
    with writable(out):
        make_folder(out)
        with lock(scratch(out) / ".lock-merge"):
            for whole in sets:
                layout = {"dtype": layout_of(whole.folder).get("dtype"), "shards": "those of the merged sets"}
                agree(out / "settings.json", {**whole.meta.to_dict(), "layout": layout})
            agree(out / "merged.json", {"sets": [s.identity for s in sets]})
            for folder, shard, target in watch(list(_pairs(sets, out))):
                _take(folder, shard, target)
    merged = finish(out)
    if len(merged) != (wanted := sum(map(len, sets))):
        raise DataError(f"holds {len(merged)} samples and not {wanted}", where=str(out), fix="merge into a new folder")
    return merged


def _refuse_repeats(folders: Sequence[str], out: str) -> None:
    if repeated := sorted(f for f in {*folders, out} if [*folders, out].count(f) > 1):
        raise ConfigError(f"{repeated[0]} is named twice", where="merge", fix="merge different folders into a new one")


def _pairs(sets: Iterable[ShardSet], out: Place) -> Iterator[Pair]:
    for part, whole in enumerate(sets):
        for number, shard in enumerate(whole.shards):
            yield whole.folder, shard, out / f"{part:03d}-{number:06d}.tar"


def _take(folder: Place, shard: ShardInfo, target: Place) -> None:
    """Tar, statistics, index: the index is what says that the shard is whole."""
    source = folder / shard.name
    if hash_of(index := read_bytes(index_path(source))) != shard.index:
        raise DataError("the index is not the one the manifest names", where=str(index_path(source)))
    if exists(index_path(target)) and read_bytes(index_path(target)) == index:
        return
    copy(source, target)
    if exists(stats := _stats_of(source)):
        publish(_stats_of(target), read_bytes(stats))
    publish(index_path(target), index)


def _stats_of(tar: Place) -> Place:
    return tar.with_name(f"{Path(tar.name).stem}_stats.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards merge`."""
    parser.add_argument("folders", nargs="+", help="shard folders or URLs, in the order their samples will have")
    parser.add_argument("--out", required=True, help="folder or URL of the new set; an unfinished one is gone on with")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    merged = merge(args.folders, args.out, watch=lambda pairs: progress(pairs, "merge"))
    print(json.dumps({"samples": len(merged), "shards": len(merged.shards), "identity": merged.identity}))
    return 0
