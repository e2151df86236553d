"""The door: `v4e demo | train | edit | app | eval | export | ablate | plan | doctor`.

`python -m v4e.cli` is the same door for launchers. Rooms are imported when a verb needs them, so that `v4e --help` and
a mistyped path answer at once.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from v4e.errors import ConfigError, DataError, V4EError

EMBEDDED = Path(__file__).parent / "assets/wan-nano/student"


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


class _Verb(argparse.ArgumentParser):
    """Takes settings behind options too, where argparse loses sight of them."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        found, rest = super().parse_known_args(args, namespace)
        if "overrides" in found:
            found.overrides += [word for word in rest if _is_setting(word)]
            rest = [word for word in rest if not _is_setting(word)]
        return found, rest


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="v4e", description="Video models as few-step image editors.")
    top.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers put it before the verb
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Verb)
    for add in (
        _add_demo,
        _add_train,
        _add_edit,
        _add_app,
        _add_eval,
        _add_export,
        _add_ablate,
        _add_plan,
        _add_doctor,
    ):
        add(verbs)
    return top


# --------------------------------------------------------------------------------------------------- verbs


def demo(args: argparse.Namespace) -> int:
    """The whole road on this machine."""
    from data_tools import demo as road

    return road.main(args.config, args.overrides, args.draw, args.model)


def ablate(args: argparse.Namespace) -> int:
    """The demo's training with terms removed and triplets varied."""
    from data_tools import ablate as table

    return table.main(args.config, args.overrides)


def train(args: argparse.Namespace) -> int:
    """Train a recipe; under a launcher, every rank runs this."""
    from v4e import config, dist, recipes

    recipe = config.load(args.config, args.overrides, recipes.pick)
    from v4e.data.mixture import Mixture
    from v4e.data.stream import Stream
    from v4e.eval.contact import ContactSheet
    from v4e.plan import clips_of, work
    from v4e.train.run import train_recipe

    loop, ranks = recipe.loop, dist.start(recipe.loop.threads)
    # One rank reads every index, so that a key met twice stops the run at once.
    shards = Mixture.of(loop, verify="index" if ranks.is_main else "sizes")

    def stream(rank: int, world: int) -> Stream:
        sizes = {"batch": loop.batch, "micro_batch": loop.micro_batch, "rank": rank, "world": world}
        return Stream(shards, seed=loop.seed, cache=loop.cache_bytes, **sizes)

    sheet = ContactSheet.of(recipe, ranks) if loop.validation else None

    def effort():
        return work(recipe, ranks.world, clips_of(shards))

    train_recipe(recipe, stream, sheet, resume=args.resume, data=shards.identity, work=effort)
    return 0


def edit(args: argparse.Namespace) -> int:
    """Edit one photograph of any size, or those that a jobs file lists; or say how an edit was made."""
    from v4e import photos

    if args.recipe:
        print(json.dumps(photos.recipe_in(photos.fetch(args.recipe), args.recipe), indent=2, ensure_ascii=False))
        return 0
    return _edit_batch(args) if args.batch else _edit_one(args)


def app(args: argparse.Namespace) -> int:
    """The editor as a page in a browser, until interrupted."""
    from v4e.app import require_gradio, serve

    require_gradio()  # before a model is loaded
    serve(_studio(args), args.host, args.port)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measure a model on one's own edits; without any, compute an evaluation's metrics again from its pictures."""
    if args.data:
        return _evaluate_own(args)
    from data_tools import demo as road

    return road.recompute(Path(args.run_folder))


def export(args: argparse.Namespace) -> int:
    """Write a run for others, load that with their libraries and compare."""
    import torch

    from v4e.export import export_run

    options = {name: getattr(args, name) for name in ("form", "weights", "player", "base", "shard_size", "base_model")}
    options |= {"dtype": getattr(torch, args.dtype) if args.dtype else None}
    export_run(Path(args.run_folder), Path(args.output), **options, report=Path(args.report) if args.report else None)
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
    print(page(answer, remedy, data, recipe.loop))
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
    draws = "judge the finished demo in output= again, on held-out edits of another draw, 1 to 7"
    verb.add_argument("--draw", type=int, choices=range(1, 8), metavar="N", help=draws)
    models = "with --draw: judge this model in place of the demo's own; repeatable"
    verb.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help=models)
    _add_overrides(verb, "triplets=64 output=runs/small")
    verb.set_defaults(run=demo)


def _add_train(verbs) -> None:
    verb = verbs.add_parser("train", help="train a recipe; run it under `deepspeed --module v4e.cli train ...`")
    verb.add_argument("config", help="YAML file such as configs/nano/video4edit.yaml")
    _add_overrides(verb, "loop.steps=100 optim.lr=1e-4")
    resume = "auto (the default): go on from the last checkpoint; never: start anew; or a folder checkpoints/step_*"
    verb.add_argument("--resume", default="auto", metavar="WHENCE", help=resume)
    verb.set_defaults(run=train)


def _add_edit(verbs) -> None:
    verb = verbs.add_parser("edit", help="edit photographs")
    verb.add_argument("photo", nargs="?", help="path or URL; any size, any format that Pillow reads")
    verb.add_argument("instruction", nargs="?", help='what to change, such as "make it snow"')
    verb.add_argument("--batch", metavar="JOBS", help="jsonl file whose lines name photo and instruction, and more")
    verb.add_argument("--recipe", metavar="FILE", help="print how an edit was made, as its file says")
    verb.add_argument("-o", "--output", help="picture to write, edited.png; with --batch a folder, edited")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--steps", type=_positive, help="solver steps; the model's card says how many by default")
    verb.add_argument("--guidance", type=float, help="guidance scale; the model's card says which by default")
    frames = ("strip", "webp", "gif", "mp4")
    verb.add_argument("--frames", nargs="?", const="strip", choices=frames, help="write the evolution too; a strip")
    verb.add_argument(
        "--reasoning-frames", type=_positive, default=0, help="imagine a longer clip at first, such as 29"
    )
    verb.add_argument("--reasoning-steps", type=_positive, default=0, help="for so many steps")
    _add_model(verb)
    verb.set_defaults(run=edit)


def _add_app(verbs) -> None:
    verb = verbs.add_parser("app", help="edit photographs on a page in a browser")
    verb.add_argument("--host", default="127.0.0.1", help="address to serve at; this machine alone by default")
    verb.add_argument("--port", type=_port, help="the first free one from 7860 on by default")
    _add_model(verb)
    verb.set_defaults(run=app)


def _add_eval(verbs) -> None:
    verb = verbs.add_parser("eval", help="measure a model on edits of one's own; or an evaluation again, by its files")
    run = "training run, export or model folder; without --data a folder with edits.jsonl, such as runs/demo/edits"
    verb.add_argument("run_folder", metavar="run", help=run)
    verb.add_argument("--data", help="shard set, ingested folder, or jsonl of id, instruction, source, edited")
    verb.add_argument("-o", "--output", default="evaluated", help="folder for edits and report; evaluated by default")
    verb.add_argument("--baseline", action="append", default=[], metavar="NAME=MODEL", help="a further row; repeatable")
    verb.add_argument("--steps", type=_positive, nargs="+", default=[], help="solver steps; the card's by default")
    verb.add_argument("--seeds", type=_positive, default=1, help="sampling seeds of every edit")
    verb.add_argument("--guidance", type=float, help="guidance scale; each model's card says which by default")
    verb.add_argument("--batch", type=_positive, default=4, help="edits made together")
    verb.add_argument("--most", type=int, default=0, help="edits to take, evenly spread; 0 for all")
    verb.add_argument("--shown", type=_positive, default=48, help="edits on the page, the worst of every task")
    verb.add_argument("--clip", default="", help="CLIP's folder, or a Hub id that is in the cache")
    verb.add_argument("--dino", default="", help="DINOv2's, likewise")
    verb.add_argument("--perceptual", default="", help="any vision network's, whose layers are compared")
    verb.add_argument("--device", help="torch device; a GPU where there is one by default")
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    verb.set_defaults(run=evaluate)


def _add_export(verbs) -> None:
    verb = verbs.add_parser("export", help="a run for diffusers and ComfyUI: a pipeline, a LoRA or original weights")
    verb.add_argument("run_folder", metavar="run", help="loop.output of a training run")
    verb.add_argument("output", help="folder to write")
    forms = ("diffusers", "lora", "original")
    verb.add_argument("--form", choices=forms, default="diffusers", help="a pipeline; adapters; Wan's own key names")
    which = ("average", "last", "both")
    verb.add_argument("--weights", choices=which, help="averages where kept by default; both: these as variant ema")
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16; float32 for a LoRA")
    verb.add_argument("--shard-size", metavar="SIZE", help="most bytes of a file, such as 5GB")
    verb.add_argument("--player", default="student", help="whose weights")
    verb.add_argument("--base", help="diffusers folder or Hub id, where the run began with something else")
    verb.add_argument("--base-model", metavar="ID", default="", help="the base's id on the Hub, for the README")
    verb.add_argument("--report", metavar="FILE", help="report.json for the README; one beside the run by default")
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
    verb.add_argument("--gpu-memory", type=_above_zero, default=80, help="of each, in GB of 10^9 bytes; 80 by default")
    verb.add_argument("--tflops", type=_above_zero, default=989, help="dense bf16 peak of each; an H100's by default")
    verb.add_argument("--utilisation", type=_above_zero, default=0.25, help="share of the peak that is assumed")
    verb.add_argument("--bandwidth", type=_above_zero, default=50, help="GB/s that each receives from the others")
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


def _add_model(verb: argparse.ArgumentParser) -> None:
    """The model that edits, and how it is fitted into memory."""
    verb.add_argument("--model", help="diffusers folder or Hub id; the embedded nano student by default")
    verb.add_argument("--device", help="torch device; a GPU where there is one by default")
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    offload = ("none", "model", "sequential")
    verb.add_argument("--offload", choices=offload, default="none", help="keep one part, or one layer, on the GPU")
    verb.add_argument("--vae-tiling", action="store_true", help="decode in tiles, for large pictures on a small GPU")
    verb.add_argument("--vae-slicing", action="store_true", help="decode one sample at a time")


def _add_overrides(verb: argparse.ArgumentParser, example: str) -> None:
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings, such as {example}")


# --------------------------------------------------------------------------------------------------- inside


def _is_setting(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _above_zero(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _port(text: str) -> int:
    if (value := int(text)) not in range(1, 1 << 16):
        raise argparse.ArgumentTypeError(f"{value} is no port, which are 1 to 65535")
    return value


def _edit_one(args: argparse.Namespace) -> int:
    """Whatever can be refused is refused before a model is loaded."""
    from v4e import photos
    from v4e.jobs import Job

    if args.photo is None or args.instruction is None:
        raise ConfigError("no photograph or no instruction", fix='v4e edit PHOTO "make it snow"')
    job = Job(args.photo, args.instruction, Path(args.output or "edited.png"), _settings(args))
    if not job.output.parent.is_dir():
        raise ConfigError("its folder does not exist", where=str(job.output), fix=f"mkdir -p {job.output.parent}")
    content = photos.fetch(job.photo)
    photo = photos.decode(content, job.shown)
    if photo.frames > 1:
        print(f"the first of {photo.frames} frames is edited")
    from v4e.journal import open_bar
    from v4e.studio import write

    studio = _studio(args)
    with open_bar("steps", job.settings.steps or studio.pipeline.card.steps) as bar:
        files = studio.make(job, photo, studio.recipe(job, content), lambda done: bar.advance())
    write(files)
    print("\n".join(f"wrote {path}" for path in files))
    return 0


def _edit_batch(args: argparse.Namespace) -> int:
    if args.photo is not None:
        raise ConfigError("--batch takes photographs and instructions from its file", fix="leave PHOTO out")
    from v4e.data.places import is_remote, place, shown
    from v4e.photos import fetch

    if is_remote(place(args.batch)):
        fix = "download it first; its photographs may be URLs"
        raise ConfigError("a jobs file lies on this machine", where=shown(args.batch), fix=fix)
    settings, jobs, folder = _settings(args), Path(args.batch), Path(args.output or "edited")
    fetch(args.batch, "jobs file")  # before a model is loaded
    from v4e.studio import QUARANTINE, run_batch

    tally = run_batch(_studio(args), jobs, folder, settings)
    print(f"{tally}: {folder / QUARANTINE if tally.refused else folder}")
    return DataError.exit_code if tally.refused else 0


def _evaluate_own(args: argparse.Namespace) -> int:
    from data_tools.evolve import family_of
    from v4e.eval import bench
    from v4e.eval.measures import Eyes
    from v4e.export import Trained, export_run

    device = args.device or _device()
    words = {name: getattr(args, name) for name in ("data", "seeds", "guidance", "batch", "most", "shown", "dtype")}
    asked = bench.Asked(
        args.run_folder, baselines=tuple(args.baseline), steps=tuple(args.steps), device=device, **words
    )
    rooms = bench.Rooms(export_run, lambda run: Trained.of(run).base, family_of)
    eyes = Eyes.open(args.clip, args.dino, args.perceptual, device)
    for sentence in eyes.absent.values():
        print(sentence, file=sys.stderr)
    summary = bench.measure(asked, eyes, Path(args.output), rooms)
    print(bench.closing(summary, Path(args.output)))
    return DataError.exit_code if summary.evaluation.refused else 0


def _settings(args: argparse.Namespace):
    from v4e.jobs import Settings

    reasoning = {"reasoning_frames": args.reasoning_frames, "reasoning_steps": args.reasoning_steps}
    return Settings(args.seed, args.steps, args.guidance, **reasoning, frames=args.frames)


def _studio(args: argparse.Namespace):
    """The loaded model.

    Raises:
        ConfigError: none is named, and this installation embeds none.
    """
    if args.model is None and not EMBEDDED.is_dir():
        raise ConfigError("no model was named", fix="--model FOLDER, which `v4e export` or `v4e demo` wrote")
    import torch

    from v4e.studio import Memory, Studio

    memory = Memory(getattr(torch, args.dtype), args.offload, args.vae_tiling, args.vae_slicing)
    return Studio.open(args.model or str(EMBEDDED), args.device or _device(), memory)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
