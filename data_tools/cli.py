"""The yard's door: `v4e-shards VERB`. Each room brings its arguments and its ``run``."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from v4e.errors import V4EError

VERBS = {
    "ingest": "check and normalise triplets",
    "evolve": "write evolution prompts",
    "rollout": "encode triplets and roll out the teacher, into shards",
    "verify": "read every byte of a shard folder",
    "stats": "count what a shard folder holds and measure its roll-outs",
    "filter": "leave out roll-outs that are not good enough",
    "merge": "make one shard folder of several",
    "reshard": "cut a set into shards of another size",
    "migrate": "bring a set that an older v4e wrote up to date",
    "look": "show a shard folder on one HTML page",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; an error the user can mend is one line on stderr and its own exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        return args.run(args)
    except V4EError as error:
        print(f"v4e-shards: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("v4e-shards: stopped; run the same command again to go on", file=sys.stderr)
        return 130


def parse(words: Sequence[str]) -> argparse.Namespace:
    """A command line; its ``run`` is the verb. Only that verb's room is imported, as some take seconds."""
    top = argparse.ArgumentParser(prog="v4e-shards", description="From edit triplets to shards for training.")
    verbs = top.add_subparsers(metavar="VERB", required=True, dest="verb")
    for name, purpose in VERBS.items():
        verbs.add_parser(name, help=purpose, add_help=False)
    verb = top.parse_known_args(words[:1])[0].verb
    room = import_module(f"data_tools.{verb}")
    parser = argparse.ArgumentParser(prog=f"v4e-shards {verb}", description=room.__doc__)
    parser.set_defaults(run=room.run)
    room.add_arguments(parser)
    return parser.parse_intermixed_args(words[1:])  # settings may follow options


if __name__ == "__main__":
    sys.exit(main())
