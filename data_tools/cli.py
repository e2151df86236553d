"""The yard's door: `v4e-shards ingest | evolve | rollout | verify | look`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from v4e.errors import DataError, V4EError


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


def ingest(args: argparse.Namespace) -> int:
    from data_tools import ingest as room
    from v4e.journal import progress

    report = room.ingest(
        args.jsonl,
        args.out,
        (args.height, args.width),
        fit=args.fit,
        max_reject_fraction=args.max_reject_fraction,
        workers=args.workers,
        watch=lambda lines: progress(lines, "ingest", total=_lines_in(args.jsonl)),
    )
    print(report)
    return 0


def evolve(args: argparse.Namespace) -> int:
    from data_tools.ingest import add_evolutions
    from v4e.journal import progress

    counts = add_evolutions(args.folder, again=args.again, watch=lambda rows: progress(rows, "evolve"))
    print(", ".join(f"{n} {task}" for task, n in counts.most_common()) or "every prompt was there already")
    return 0


def verify(args: argparse.Namespace) -> int:
    from data_tools import verify as room
    from v4e.journal import progress

    report = room.verify(
        args.folder,
        codec=_codec(args.codec),
        decode=args.decode,
        least_psnr=args.least_psnr,
        watch=lambda numbers: progress(numbers, "verify"),
    )
    print("\n".join(report.lines()))
    return DataError.exit_code if report.problems else 0


def look(args: argparse.Namespace) -> int:
    from data_tools import look as room
    from v4e.journal import progress

    page = args.page or Path(args.folder) / "look.html"
    codec = _codec(args.codec)
    print(room.look(args.folder, page, codec=codec, rows=args.rows, watch=lambda n: progress(n, "measure")))
    return 0


def _codec(folder: str):
    """The codec of a model's folder, or None; its libraries are slow to import and seldom needed."""
    if not folder:
        return None
    from v4e.models.codec import WanCodec

    return WanCodec.load(folder)


def _lines_in(jsonl: str) -> int | None:
    try:
        with open(jsonl, "rb") as file:
            return sum(bool(line.strip()) for line in file)
    except OSError:
        return None  # ingest says what is wrong with it


def parse(words: Sequence[str]) -> argparse.Namespace:
    """A command line; its ``run`` is the verb."""
    if list(words[:1]) != ["rollout"]:
        return _parser().parse_args(words)
    from data_tools import rollout  # imports the models, which takes seconds that `--help` should not

    parser = argparse.ArgumentParser(prog="v4e-shards rollout", description=_ROLLOUT)
    parser.set_defaults(run=rollout.run)
    rollout.add_arguments(parser)
    return parser.parse_intermixed_args(words[1:])  # settings may follow options


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="v4e-shards", description="From edit triplets to shards for training.")
    verbs = top.add_subparsers(metavar="VERB", required=True)
    _add_ingest(verbs.add_parser("ingest", help="check and normalise triplets", description=_INGEST))
    _add_evolve(verbs.add_parser("evolve", help="write evolution prompts"))
    verbs.add_parser("rollout", help=_ROLLOUT)
    _add_verify(verbs.add_parser("verify", help="read every byte of a shard folder"))
    _add_look(verbs.add_parser("look", help="show a shard folder on one HTML page"))
    return top


_ROLLOUT = "encode triplets and roll out the teacher, into shards"
_INGEST = "Each line of the jsonl holds id, instruction, source, edited and, if it likes, mask, task, evolution, extra."


def _add_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jsonl", help="one triplet a line; its paths are relative to the file")
    parser.add_argument("out", help="folder to fill; an unfinished one is gone on with")
    parser.add_argument("--height", type=int, required=True, help="of every image, in pixels")
    parser.add_argument("--width", type=int, required=True, help="of every image, in pixels")
    parser.add_argument(
        "--fit", choices=("crop", "exact"), default="crop", help="scale and crop, or refuse other sizes"
    )
    parser.add_argument("--max-reject-fraction", type=float, default=0.0, help="more rejects than this are an error")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode")
    parser.set_defaults(run=ingest)


def _add_evolve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder written by ingest")
    parser.add_argument("--again", action="store_true", help="also rewrite prompts that evolve wrote before")
    parser.set_defaults(run=evolve)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="shard folder")
    parser.add_argument("--codec", default="", help="model folder; some samples are decoded and compared")
    parser.add_argument("--decode", type=int, default=16, help="how many of them")
    parser.add_argument("--least-psnr", type=float, default=20.0, help="in dB, of a decoded frame against its picture")
    parser.set_defaults(run=verify)


def _add_look(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="shard folder")
    parser.add_argument("--page", default="", help="HTML file to write; look.html in the folder by default")
    parser.add_argument("--codec", default="", help="model folder; decodes what the roll-outs came to")
    parser.add_argument("--rows", type=int, default=24, help="samples to show")
    parser.set_defaults(run=look)


if __name__ == "__main__":
    sys.exit(main())
