"""`v4e-shards rollout`: triplets and a teacher in, shards out, by any number of ranks that may be killed at any time.

How it is shared and what makes it exact is told in docs/rollout.md.
"""

import argparse

from data_tools.ingest import Listed
from data_tools.rollout.config import NO_TEACHER, TYPES, RolloutConfig
from data_tools.rollout.encode import TOOL, Evolving, content_hash, pack_clips
from data_tools.rollout.run import rollout
from data_tools.rollout.work import Worker
from v4e import config as settings_of
from v4e.errors import ConfigError

__all__ = [
    "NO_TEACHER",
    "TOOL",
    "TYPES",
    "Evolving",
    "RolloutConfig",
    "Worker",
    "add_arguments",
    "content_hash",
    "pack_clips",
    "rollout",
    "run",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards rollout`."""
    parser.add_argument("triplets", help="folder or URL written by `v4e-shards ingest` and `evolve`")
    parser.add_argument("out", help="shard folder or URL; an unfinished one is gone on with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, over those of the file")
    parser.add_argument("--teacher", help="FLF2V folder or Hub id, or none; short for teacher=...")
    parser.add_argument("--part", metavar="I/N", help="do share I of N, from 0; else as the launcher or Slurm says")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="WORD", help="a YAML file with the settings, key=value, or both"
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    words = [*args.overrides, *(word for word in args.config if "=" in word)]
    files = [word for word in args.config if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one settings file is enough, not {len(files)}", where=f"--config {' '.join(files)}")
    words = [*([f"teacher={args.teacher}"] if args.teacher else []), *words, *_share(args.part)]
    config = settings_of.load(files[0] if files else None, words, lambda _: RolloutConfig, recipe="rollout")
    print(settings_of.to_yaml(config))
    rollout(Listed(args.triplets), args.out, config)
    return 0


def _share(part: str | None) -> list[str]:
    if not part:
        return []
    number, slash, parts = part.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal()):
        raise ConfigError(f"{part!r} is no share", where="--part", fix="give two numbers, such as 0/4")
    return [f"part={number}", f"parts={parts}"]
