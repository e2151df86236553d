"""`v4e-shards reshard`: the same samples, in the same order, cut into shards of another size; nothing is encoded again.

The same set and size make the same bytes. Killed, it goes on after its last whole shard.
"""

import argparse
import json
from collections.abc import Callable

import torch

from v4e.data.disk import agree
from v4e.data.members import WORDS
from v4e.data.places import Place
from v4e.data.shards import ShardSet, ShardWriter, layout_of
from v4e.errors import ConfigError
from v4e.journal import progress

TYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def reshard(
    folder: str | Place, out: str | Place, samples_per_shard: int, max_bytes: int = 0, *, watch: Callable = iter
) -> ShardSet:
    """Copy a set into shards of ``samples_per_shard``, each finished earlier when it has grown to ``max_bytes``.

    Args:
        watch: wraps the sample numbers, for a progress bar.

    Raises:
        ConfigError: ``out`` is the folder itself.
        DataError: a member's bytes are not those that were written, or ``out`` was begun with another set or size.
    """
    whole = ShardSet.open(folder)
    if str(out) == str(folder):
        raise ConfigError("a set cannot be cut anew in its own place", where=str(out), fix="write to a new folder")
    dtype = TYPES.get(str(layout_of(whole.folder).get("dtype")), torch.bfloat16)  # of what would be added later
    with ShardWriter(out, whole.meta, samples_per_shard=samples_per_shard, max_bytes=max_bytes, dtype=dtype) as writer:
        agree(writer.folder / "resharded.json", {"of": whole.identity})
        for i in watch(range(len(whole))):
            if (key := whole.keys[i]) not in writer.done:
                members = {kind: bytes(content) for kind, content in whole.members(i, strong=True).items()}
                writer.add_packed(key, json.loads(members[WORDS])["task"], members)
    return ShardSet.open(out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards reshard`."""
    parser.add_argument("folder", help="shard folder or URL")
    parser.add_argument("out", help="folder or URL of the new set; an unfinished one is gone on with")
    parser.add_argument("--samples-per-shard", type=int, required=True, help="samples after which a shard is finished")
    parser.add_argument("--max-bytes", type=int, default=0, help="finish it earlier at this size; 0 for never")


def run(args: argparse.Namespace) -> int:
    """The verb."""
    cut = reshard(args.folder, args.out, args.samples_per_shard, args.max_bytes, watch=lambda n: progress(n, "reshard"))
    print(json.dumps({"samples": len(cut), "shards": len(cut.shards), "identity": cut.identity}))
    return 0
