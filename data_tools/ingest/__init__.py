"""`v4e-shards ingest`: edits of any common layout to checked triplets with their pictures, in one folder.

Both pictures are decoded wholly and must show an edit; what cannot be used goes to ``rejects.jsonl`` with key, file and
reason. The others are listed in ``triplets.jsonl``, their files kept as they came, each with the size that it is to be
scaled to. Run again, it reads only what is new, changed or was rejected.
"""

import argparse

from data_tools.ingest.layouts import NAMED, Layout, layout_of
from data_tools.ingest.listed import Listed, read_triplets
from data_tools.ingest.pictures import MAX_PIXELS, Rejected, Size, buckets
from data_tools.ingest.sources import count
from data_tools.ingest.triplets import (
    Triplet,
    iterate,
    sole_writer,
    verify_triplets,
    write_triplets,
)
from data_tools.ingest.work import Report, ingest
from v4e.config import Wandb
from v4e.errors import ConfigError
from v4e.journal import progress

__all__ = [
    "Layout",
    "Listed",
    "Rejected",
    "Report",
    "Size",
    "Triplet",
    "add_arguments",
    "buckets",
    "ingest",
    "iterate",
    "layout_of",
    "read_triplets",
    "run",
    "sole_writer",
    "verify_triplets",
    "write_triplets",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards ingest`."""
    add = parser.add_argument
    add("source", help="path, glob or URL of jsonl, csv, parquet or tar files, or a folder of pictures")
    add("out", help="folder to fill; an unfinished one is gone on with")
    add("--layout", default="v4e", help=f"which column is what: {', '.join(NAMED)}, or a YAML file")
    add("--root", default="", help="folder out of which no name in a list may lead; the list's own by default")
    add("--height", type=int, default=0, help="of every image, in pixels")
    add("--width", type=int, default=0, help="of every image, in pixels")
    add("--area", default="", metavar="HxW", help="in place of height and width: buckets of at most so many pixels")
    add("--buckets", nargs="+", default=[], metavar="HxW", help="or exactly these sizes")
    add("--longest", type=float, default=2.0, help="with --area: the greatest ratio of the two sides")
    add("--fit", choices=("crop", "exact"), default="crop", help="scale and crop, or refuse other sizes")
    for name, default in (("--duplicates", "reject"), ("--near-duplicates", "flag")):
        add(name, choices=("reject", "flag", "keep"), default=default, help=f"{default} by default")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="of a picture; more is a decompression bomb")
    add("--max-reject-fraction", type=float, default=0.0, help="more rejects than this are an error")
    add("--forget", action="store_true", help="let go what was taken before and is not in the source now")
    add("--workers", type=int, default=2, help="threads that read and decode")
    add("--wandb", choices=("online", "offline", "disabled"), default="disabled", help="curves of speed and rejects")


def run(args: argparse.Namespace) -> int:
    """Run the verb; too many rejects raise an error with its own exit code."""
    report = ingest(
        args.source,
        args.out,
        sizes_of(args),
        layout=layout_of(args.layout),
        root=args.root,
        fit=args.fit,
        duplicates=args.duplicates,
        near_duplicates=args.near_duplicates,
        max_pixels=args.max_pixels,
        max_reject_fraction=args.max_reject_fraction,
        forget=args.forget,
        workers=args.workers,
        wandb=Wandb(args.wandb),
        watch=lambda rows: progress(rows, "ingest", total=count(args.source)),
    )
    print(report)
    return 0


def sizes_of(args: argparse.Namespace) -> tuple[Size, ...]:
    """The sizes that one of the three ways of saying them means."""
    fixed = (args.height, args.width)
    if sum(map(bool, (any(fixed), args.area, args.buckets))) != 1 or any(fixed) != all(fixed):
        raise ConfigError("sizes are said in one way", fix="give --height with --width, or --area, or --buckets")
    if args.area:
        height, width = _size(args.area)
        return buckets(height * width, args.longest)
    return tuple(map(_size, args.buckets)) or (fixed,)


def _size(text: str) -> Size:
    """480x832 -> (480, 832)."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError as error:
        raise ConfigError(f"{text!r} is no size", fix="write height x width, such as 480x832") from error
    return height, width
