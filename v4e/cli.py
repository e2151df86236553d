"""The door: `v4e demo | train | edit | eval | export | ablate | plan | doctor`, and `python -m v4e.cli` for launchers.

Rooms are imported when a verb needs them, so that `v4e --help` and a mistyped path answer at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from v4e.errors import ConfigError, DataError, V4EError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a mistake of the user's is one sentence on stderr and an exit code of its own."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except V4EError as error:
        print(f"v4e: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("v4e: interrupted; the same command goes on from the last whole checkpoint or stage", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="v4e", description="Video models as few-step image editors.")
    top.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers put it before the verb
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_demo, _add_train, _add_edit, _add_eval, _add_export, _add_ablate, _add_plan, _add_doctor):
        add(verbs)
    return top


# --------------------------------------------------------------------------------------------------- verbs


def demo(args: argparse.Namespace) -> int:
    """The whole road on this machine."""
    from data_tools import demo as road

    return road.main(args.config, args.overrides)


def ablate(args: argparse.Namespace) -> int:
    """The demo's training with terms removed and triplets varied."""
    from data_tools import ablate as table

    return table.main(args.config, args.overrides)


def train(args: argparse.Namespace) -> int:
    """Train a recipe; under a launcher, every rank runs this."""
    from v4e import config, dist, recipes

    recipe = config.load(args.config, args.overrides, recipes.pick)
    from v4e.data.shards import ShardSet
    from v4e.data.stream import Stream
    from v4e.eval.contact import ContactSheet
    from v4e.train.run import train_recipe

    loop, ranks = recipe.loop, dist.start(recipe.loop.threads)
    shards = ShardSet.open(loop.data, verify="sizes" if ranks.rank else "index")  # a key met twice stops the run at once

    def stream(rank: int, world: int) -> Stream:
        sizes = {"batch": loop.batch, "micro_batch": loop.micro_batch, "rank": rank, "world": world}
        return Stream(shards, seed=loop.seed, cache=loop.cache_bytes, **sizes)

    sheet = ContactSheet(loop.validation, recipe.codec, ranks, shift=recipe.shift) if loop.validation else None
    train_recipe(recipe, stream, sheet, resume=args.resume, data=shards.identity)
    return 0


def edit(args: argparse.Namespace) -> int:
    """Edit one photograph of any size."""
    instruction, photo = _instruction(args.instruction), _photograph(args.photo)
    _check_output(args.output)
    from v4e.pipelines import EditPipeline

    pipeline = EditPipeline.from_pretrained(args.model).to(args.device or _device())
    edited = pipeline.edit_photo(photo, instruction, seed=args.seed, steps=args.steps, guidance=args.guidance)
    _save(edited, args.output)
    print(f"wrote {args.output}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Compute every metric again from the pictures of an evaluation."""
    from data_tools import demo as road

    return road.recompute(Path(args.edits))


def export(args: argparse.Namespace) -> int:
    """Turn a run into a diffusers folder, load it again and compare."""
    from v4e.export import export_run

    export_run(Path(args.run_folder), Path(args.output))
    return 0


def plan(args: argparse.Namespace) -> int:
    """What a training would need; 1 where it does not fit."""
    from v4e import config, recipes
    from v4e.plan import GB, Machine, clips, page, planned

    recipe = config.load(args.config, args.overrides, recipes.pick)
    machine = Machine(
        args.gpus, args.gpu_memory * GB, args.tflops * 1e12, args.utilisation, args.bandwidth * GB, not args.cpu
    )
    data = clips(recipe.loop, args.height, args.width, args.frames, args.teacher_frames, args.samples)
    answer, remedy = planned(recipe, machine, data)
    print(page(answer, remedy, data, recipe.loop.steps))
    return 0 if answer.fits else 1


def doctor(args: argparse.Namespace) -> int:
    """What this machine has and lacks; 1 where something is broken."""
    from v4e.doctor import examine, exit_code, report

    findings = examine(Path(args.output))
    print(report(findings))
    return exit_code(findings)


# ----------------------------------------------------------------------------------------------- arguments


def _add_demo(verbs) -> None:
    verb = verbs.add_parser("demo", help="the whole road with wan-nano, in about ten minutes on two CPU cores")
    verb.add_argument("--config", help="YAML file with the settings of data_tools/demo.py")
    _add_overrides(verb, "triplets=64 output=runs/small")
    verb.set_defaults(run=demo)


def _add_train(verbs) -> None:
    verb = verbs.add_parser("train", help="train a recipe; run it under `deepspeed --module v4e.cli train ...`")
    verb.add_argument("config", help="YAML file such as configs/nano/video4edit.yaml")
    _add_overrides(verb, "loop.steps=100 optim.lr=1e-4")
    verb.add_argument("--resume", choices=("auto", "never"), default="auto", help="go on from the last checkpoint")
    verb.set_defaults(run=train)


def _add_edit(verbs) -> None:
    verb = verbs.add_parser("edit", help="edit a photograph")
    verb.add_argument("photo", help="any size, any format that Pillow reads")
    verb.add_argument("instruction", help='what to change, such as "make it snow"')
    verb.add_argument("--model", required=True, help="diffusers folder that `v4e export` or `v4e demo` wrote")
    verb.add_argument("-o", "--output", default="edited.png", help="picture to write")
    verb.add_argument("--steps", type=_positive, help="solver steps; the model's card says how many by default")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--guidance", type=float, help="guidance scale; the model's card says which by default")
    verb.add_argument("--device", help="torch device; a GPU where there is one by default")
    verb.set_defaults(run=edit)


def _add_eval(verbs) -> None:
    verb = verbs.add_parser("eval", help="compute all metrics of an evaluation again, from its pictures")
    verb.add_argument("edits", help="folder with edits.jsonl, such as runs/demo/edits")
    verb.set_defaults(run=evaluate)


def _add_export(verbs) -> None:
    verb = verbs.add_parser("export", help="run directory -> diffusers folder")
    verb.add_argument("run_folder", metavar="run", help="loop.output of a training run")
    verb.add_argument("output", help="folder to write")
    verb.set_defaults(run=export)


def _add_ablate(verbs) -> None:
    verb = verbs.add_parser("ablate", help="every term removed in turn, and a curve over the number of triplets; hours")
    verb.add_argument("--config", help="YAML file with the settings of data_tools/ablate.py")
    _add_overrides(verb, "output=runs/ablate")
    verb.set_defaults(run=ablate)


def _add_plan(verbs) -> None:
    verb = verbs.add_parser("plan", help="memory, time and storage of a training before it is begun; code 1: no room")
    verb.add_argument("config", help="YAML file such as configs/video4edit.yaml")
    verb.add_argument("--gpus", type=_positive, default=8, help="ranks, one on each accelerator; 8 by default")
    verb.add_argument("--gpu-memory", type=float, default=80, help="of each, in GB of 10^9 bytes; 80 by default")
    verb.add_argument("--tflops", type=float, default=989, help="dense bf16 peak of each; an H100's by default")
    verb.add_argument("--utilisation", type=float, default=0.25, help="share of the peak that is assumed")
    verb.add_argument("--bandwidth", type=float, default=50, help="GB/s each is assumed to receive from the others")
    verb.add_argument("--cpu", action="store_true", help="ranks on CPUs, whose optimisers make temporaries")
    verb.add_argument("--height", type=_positive, default=720, help="of the clips, unless loop.data is there to say")
    verb.add_argument("--width", type=_positive, default=1280)
    verb.add_argument("--frames", type=_positive, default=5, help="of the student's clip")
    verb.add_argument("--teacher-frames", type=_positive, default=81)
    verb.add_argument("--samples", type=_positive, default=10_000)
    _add_overrides(verb, "loop.micro_batch=1 loop.checkpointing=true")
    verb.set_defaults(run=plan)


def _add_doctor(verbs) -> None:
    verb = verbs.add_parser("doctor", help="what this machine has and lacks, and the fix for each; code 1: broken")
    verb.add_argument("--output", default=".", help="folder whose disk a run would be written to")
    verb.set_defaults(run=doctor)


def _add_overrides(verb: argparse.ArgumentParser, example: str) -> None:
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings, such as {example}")


# --------------------------------------------------------------------------------------------------- inside


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _instruction(text: str) -> str:
    """The instruction, or a DataError: empty, or bytes that were no UTF-8."""
    if not text.strip():
        raise DataError("the instruction is empty", fix='say what to change, such as "make it snow"')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the shell's bytes come as lone surrogates
        raise DataError(f"the instruction is not UTF-8: {text!r}", fix="type it in a UTF-8 terminal") from error
    return text


def _photograph(path: str):
    """The decoded photograph, or a DataError that names the file."""
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise DataError("no such photograph", where=path)
    try:
        photo = Image.open(path)
        photo.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"not a readable picture: {error}", where=path, fix="give a PNG or JPEG file") from error
    return photo


def _check_output(path: str) -> None:
    """Refuse a place that cannot be written before a model is loaded."""
    from PIL import Image

    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ConfigError("no picture format has this ending", where=path, fix="use .png or .jpg")
    if not Path(path).parent.is_dir():
        raise ConfigError("its folder does not exist", where=path, fix=f"mkdir -p {Path(path).parent}")


def _save(picture, path: str) -> None:
    try:
        picture.save(path)
    except OSError as error:
        raise DataError(f"cannot be written: {error}", where=path) from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
