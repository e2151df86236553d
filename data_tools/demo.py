"""`v4e demo`: the whole road on one machine, in stages that are skipped once they are done.

    triplets -> evolve -> rollout -> verify -> distill -> export
    -> sft_equal_steps -> sft_equal_compute -> evaluate -> report

Every stage leaves ``stages/NAME.json`` with its seconds and headline, written last, so that an interrupted demo goes on
where it stopped; training goes on inside its stage.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_tools import evolve, ingest, verify, world
from data_tools.rollout import NO_TEACHER, TYPES, RolloutConfig, content_hash, rollout
from data_tools.stopwatch import Stopwatch
from v4e import config as settings_of
from v4e.data.disk import agree, read_bytes, to_json, writable, write_atomically
from v4e.errors import CheckpointError, ConfigError, TrainingError
from v4e.eval import report, run, sheet
from v4e.eval.own import COPY, named_models
from v4e.eval.report import Bar, Key, Outcome, Report
from v4e.eval.run import Case, Method, Result, Row
from v4e.journal import progress
from v4e.models.codec import WanCodec
from v4e.nouns import Clip
from v4e.pipelines import EditPipeline, TeacherPipeline

ASSETS = Path(__file__).parents[1] / "v4e" / "assets"
MODELS = "models.json"
LOCAL = ("add", "remove", "replace", "recolour", "move")
SHEET_FRAMES = 5  # of the teacher's clip
# dB of a decoded frame against its picture: of the world's edits, wan-nano's codec leaves 16 at least, in sketches, and
# another picture is at 12 or so.
LEAST_DECODED = 15.0


@dataclass(frozen=True)
class DemoConfig:
    """The demo's settings: ``v4e demo key=value ...``.

    Args:
        output: folder for everything.
        bundle: folder with the models ``teacher`` (FLF2V) and ``i2v``, in diffusers layout.
        recipe, baseline: training configs of the student and of plain flow matching on the same triplets.
        train: ``key=value`` words for both trainings, over those files.
        triplets: edits to train on.
        tasks: of those edits, in turn.
        per_task: held-out edits of each task to evaluate on.
        validation: held-out edits, others than those, for the training's contact sheets.
        size: pixels of every picture's side.
        steps: training steps; 0 leaves them as the configs say.
        compute_ratio: the sft_equal_compute row trains for this many times the student's steps. It is fixed, so that
            the run is reproducible, and chosen so that its seconds match those of roll-out and distillation together;
            the report shows both.
        ranks: processes of a training; where there are fewer GPUs, one for each.
        seed: of the triplets, the roll-outs and the trainings.
        seeds: sampling seeds of the evaluation.
        step_counts: solver steps to evaluate; ``headline``: the one that the bars are about.
        teacher_steps: solver steps of the teacher row, whose guidance is the roll-out's.
        dtype: of the weights of the students that are evaluated.
        rollout: the roll-out's own settings; its teacher, sizes and seed follow from those above.
    """

    output: str = "runs/demo"
    bundle: str = str(ASSETS / "wan-nano")
    recipe: str = "configs/nano/video4edit.yaml"
    baseline: str = "configs/nano/flow_matching.yaml"
    train: tuple[str, ...] = ()
    triplets: int = 256
    tasks: tuple[str, ...] = world.SCHEDULE
    per_task: int = 2
    validation: int = 11
    size: int = 64
    steps: int = 0
    compute_ratio: float = 2.25
    ranks: int = 2
    seed: int = 0
    seeds: int = 3
    step_counts: tuple[int, ...] = (1, 2, 4, 8, 50)
    headline: int = 4
    teacher_steps: int = 8
    dtype: Literal["fp32", "bf16"] = "bf16"
    batch: int = 22
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(
            teacher="teacher of the bundle",
            teacher_frames=9,
            batch=16,
            guidance=1.0,
            attention="matmul",
            fold_text_padding=True,
            dataset="v4e world",
        )
    )

    @property
    def root(self) -> Path:
        return Path(self.output)

    @property
    def teacher(self) -> Path:
        return Path(self.bundle) / "teacher"

    @property
    def i2v(self) -> Path:
        return Path(self.bundle) / "i2v"

    @property
    def rolling(self) -> RolloutConfig:
        """The roll-out's settings, completed."""
        size = {"height": self.size, "width": self.size}
        return replace(self.rollout, teacher=str(self.teacher), seed=self.seed, **size)

    @property
    def student_steps(self) -> int:
        return self.steps or _loop_of(self.recipe).steps


@dataclass(frozen=True)
class Stage:
    """A step of the road: ``work`` returns its headline."""

    name: str
    work: Callable[[DemoConfig], str]


@dataclass(frozen=True)
class Done:
    """What a finished stage left."""

    seconds: float
    headline: str


def main(path: str | None, overrides: Sequence[str], draw: int | None = None, models: Sequence[str] = ()) -> int:
    """Run the demo; what is done already is not done again. With ``draw``, judge a finished one, or models, again."""
    demo = settings_of.load(path, overrides, lambda _: DemoConfig, recipe="demo")
    torch.set_num_threads(1)  # the demo's parallelism is processes; small tensors lose by threads
    if models and not draw:
        raise ConfigError("models are judged on a draw", where="--model", fix="add --draw N")
    if draw:
        _refuse_words(path, overrides)
        return judge_again(demo.root, draw, _folders(models))
    walk(demo)
    print(closing(demo))
    return 0


def walk(demo: DemoConfig) -> None:
    """All stages.

    Raises:
        CheckpointError: the bundle is missing.
        ConfigError: a task is none of the world's.
        DataError: the output folder was begun with other settings or models, or the disk is full.
        TrainingError: a training ended badly.
    """
    check_bundle(demo)
    check_tasks(demo)
    with writable(demo.root):
        (demo.root / "stages").mkdir(parents=True, exist_ok=True)
        agree(demo.root / "demo.json", asdict(demo))
        _remember_models(demo)
        for number, stage in enumerate(STAGES, 1):
            _walk_stage(demo, stage, number)


def check_bundle(demo: DemoConfig) -> None:
    """CheckpointError when the models are missing."""
    if not (demo.teacher.is_dir() and demo.i2v.is_dir()):
        raise CheckpointError("no models `teacher` and `i2v`", where=demo.bundle, fix="train them with `make nano`")


def check_tasks(demo: DemoConfig) -> None:
    """ConfigError when a task is none of the world's, or there is none."""
    if unknown := [task for task in demo.tasks if task not in world.TASKS]:
        raise ConfigError(f"no task `{unknown[0]}`", where="key tasks", fix=f"choose among {', '.join(world.TASKS)}")
    if not demo.tasks:
        raise ConfigError("no task to draw triplets of", where="key tasks", fix="leave the key out for all of them")


def _remember_models(demo: DemoConfig) -> None:
    """Refuse a bundle that has changed in its place (`make nano`) since the demo was begun."""
    begun = any((demo.root / "stages").iterdir())
    if (place := demo.root / MODELS).is_file() or not begun:  # one that is older than this file is taken as it is
        agree(place, models(demo))


def models(demo: DemoConfig) -> dict[str, str]:
    """The bundle's, by their content."""
    return {"teacher": content_hash(str(demo.teacher)), "i2v": content_hash(str(demo.i2v))}


def recompute(edits: Path) -> int:
    """Print every row of an evaluation again, computed from its pictures by the world's own judge."""
    results = run.recompute(edits, judge)
    print(report.overview(Report(tuple(run.aggregate(results)), tasks=world.TASKS)))
    changed = sum(a != b for a, b in zip(results, run.read_results(edits), strict=True))
    print(f"{len(results)} edits recomputed, {changed} differ from {edits / run.LINES}")
    return 1 if changed else 0


def judge_again(folder: Path, draw: int, others: Mapping[str, Path] | None = None) -> int:
    """Every method of a finished demo at the headline's steps, on held-out edits of another draw.

    The demo's own draw is what settings are chosen by; one that nobody has looked at says what that choice was worth.

    Args:
        others: models to judge in place of the demo's methods, such as those of trials; nothing is asked of them.

    Raises:
        ConfigError: the folder holds no finished demo.
        DataError: it was made with other models than its bundle holds now.
    """
    demo = replace(_read_demo(folder), output=str(folder))
    if not (folder / MODELS).is_file():
        raise ConfigError(f"no {MODELS} says which models it was made with", where=str(folder), fix="run a new demo")
    agree(folder / MODELS, models(demo))
    again = replace(demo, step_counts=(demo.headline,))
    place = folder / (f"draw-{draw}-" + "+".join(others) if others else f"draw-{draw}")
    judged = (
        [_copy(), *(method(*one, again, again.step_counts) for one in others.items())] if others else methods(again)
    )
    results = run.evaluate(cases(again, draw), judged, judge, place / "edits", again.batch, again.ranks)
    rows = run.aggregate(results)
    whose = ", ".join(f"{name}: {where}" for name, where in others.items()) if others else f"The models of {folder}"
    note = f"{whose}, on held-out edits of draw {draw}; {demo.per_task} of each task."
    outcomes = () if others else _outcomes(demo, rows)
    made = Report(tuple(rows), world.TASKS, outcomes, demo.headline, notes=(note,))
    report.write(made, place)
    last = [_tables(made), "", *([] if others else [_passed(made)]), f"report    {place / 'report.md'}"]
    print("\n".join(last))
    return 0


def _folders(models: Sequence[str]) -> dict[str, Path]:
    folders = {name: Path(model) for name, model in named_models(models, "--model", rows=[COPY]).items()}
    if lost := next((name for name, folder in folders.items() if not folder.is_dir()), None):
        raise ConfigError(f"no folder {folders[lost]}", where=f"--model {lost}", fix="name a model's folder")
    return folders


def _read_demo(folder: Path) -> DemoConfig:
    if not (folder / "report.json").is_file():
        raise ConfigError("no demo has ended here", where=str(folder), fix="name a folder that `v4e demo` has finished")
    return settings_of.load(folder / "demo.json", [], lambda _: DemoConfig, recipe="demo")  # JSON is YAML


def _refuse_words(path: str | None, overrides: Sequence[str]) -> None:
    if path or (others := [word for word in overrides if not word.startswith("output=")]):
        told = path or ", ".join(others)
        raise ConfigError(f"{told}: a demo is judged again as it was set up", fix="name its output= alone, and --draw")


def closing(demo: DemoConfig) -> str:
    """The last words: the tables, and where the pictures are."""
    made = _report(demo)
    student = demo.root / "student"
    return "\n".join(
        [
            "",
            _tables(made),
            "",
            f"{_passed(made)}; {sum((made.seconds or {}).values()) / 60:.1f} minutes in all",
            f"pictures  {demo.root / 'sheet.png'}, every edit in {demo.root / 'edits'}",
            f"report    {demo.root / 'report.md'}",
            f'try it    v4e edit PHOTO "make it snow" --model {student} -o out.png --steps {demo.headline}',
        ]
    )


# -------------------------------------------------------------------------------------------------- stages


def _walk_stage(demo: DemoConfig, stage: Stage, number: int) -> None:
    once(_marker(demo, stage), f"[{number}/{len(STAGES)}] {stage.name}", lambda: stage.work(demo))


def once(marker: Path, title: str, work: Callable[[], str]) -> None:
    """Do what was not done before; the marker, written last, holds the seconds of all attempts and the headline."""
    if marker.is_file():
        print(f"{title}: {read_done(marker).headline} (done before)", flush=True)
        return
    print(f"{title} ...", flush=True)
    with Stopwatch(marker.with_suffix(".spent")) as watch:
        headline = work()
        done = Done(watch.seconds(), headline)
        write_atomically(marker, to_json(asdict(done)))
    print(f"{title}: {headline} ({done.seconds:.0f} s)", flush=True)


def _marker(demo: DemoConfig, stage: Stage) -> Path:
    return demo.root / "stages" / f"{stage.name}.json"


def read_done(marker: Path) -> Done:
    """A finished stage's marker."""
    return Done(**json.loads(read_bytes(marker)))


def make_triplets(demo: DemoConfig) -> str:
    """Draw the world's edits, for training and for contact sheets, and ingest them."""
    wanted: tuple[tuple[str, world.Split, int, Sequence[str]], ...] = (
        ("triplets", "train", demo.triplets, demo.tasks),
        ("validation", "heldout", demo.validation, world.SCHEDULE),
    )
    for folder, split, count, tasks in wanted:
        raw = demo.root / folder / "raw"
        seed, drawing = _seed_of(demo, folder), partial(progress, title=f"draw {folder}")
        world.write_triplets(raw, count, split, seed, size=demo.size, tasks=tasks, watch=drawing)
        reading = partial(progress, title=f"ingest {folder}", total=count)
        taken = ingest.ingest(raw / "triplets.jsonl", demo.root / folder, (demo.size, demo.size), watch=reading)
    return f"{demo.triplets} edits of {len(world.TRAIN_PHOTOS)} photographs; validation: {taken}"


def write_evolutions(demo: DemoConfig) -> str:
    """Give every triplet its evolution prompt."""
    for folder in ("triplets", "validation"):
        made = evolve.add_evolutions(demo.root / folder)
    return f"such as: {ingest.read_triplets(demo.root / 'triplets')[0].evolution} ({len(made.written)} tasks)"


def roll_out(demo: DemoConfig) -> str:
    """The teacher's roll-outs as shards; the validation's triplets are encoded only."""
    config = demo.rolling
    _roll_in_parts(demo, config)
    encode = replace(config, teacher=NO_TEACHER, codec=str(demo.teacher))
    rollout(ingest.read_triplets(demo.root / "validation"), demo.root / "validation" / "shards", encode)
    return f"{demo.triplets} clips of {config.teacher_frames} frames, {len(config.levels) - 1} states of each"


def _roll_in_parts(demo: DemoConfig, config: RolloutConfig) -> None:
    """One single-threaded process a rank; each does its share of the units."""
    places = [str(demo.root / "triplets"), str(demo.root / "shards")]
    command = [sys.executable, "-m", "data_tools.cli", "rollout", *places]
    shares = [replace(config, part=part, parts=demo.ranks, threads=1) for part in range(demo.ranks)]
    running = [subprocess.Popen([*command, *_words(share)], stdin=subprocess.DEVNULL) for share in shares]
    codes = [process.wait() for process in running]
    if any(codes):
        raise TrainingError("the roll-out failed", where=str(demo.root / "shards"), fix="see above; `v4e demo` goes on")


def _words(config: object) -> list[str]:
    """A config as ``key=value`` words; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings_of.to_dict(config).items()]


def check_shards(demo: DemoConfig) -> str:
    """Read every byte again; a fault ends the demo."""
    codec = WanCodec.load(demo.teacher)
    watch = partial(progress, title="verify")
    found = verify.verify(demo.root / "shards", codec=codec, least_psnr=LEAST_DECODED, watch=watch)
    if found.problems:
        fix = f"delete it and {demo.root / 'stages' / 'rollout.json'}, and run again"
        raise TrainingError("; ".join(found.lines()), where=str(demo.root / "shards"), fix=fix)
    return next(iter(found.lines()))


def distill(demo: DemoConfig) -> str:
    """Video4Edit under ZeRO-3."""
    words = [f"teacher={demo.teacher}", f"student={demo.i2v}"]
    return train(demo, demo.recipe, demo.root / "train", demo.student_steps, words)


def export_student(demo: DemoConfig) -> str:
    """The run as a diffusers folder."""
    return export(demo.root / "train", demo.root / "student")


def train_sft(demo: DemoConfig, name: str, ratio: float) -> str:
    """Plain flow matching on the same triplets from the same weights, and its export."""
    place, steps = demo.root / "baselines" / name, round(demo.student_steps * ratio)
    headline = train(demo, demo.baseline, place / "train", steps, [f"init={demo.i2v}"])
    export(place / "train", place / "model")
    return headline


def evaluate(demo: DemoConfig) -> str:
    """Every method on the held-out edits."""
    results = run.evaluate(cases(demo), methods(demo), judge, demo.root / "edits", demo.batch, demo.ranks)
    return f"{len(results)} edits of {len({r.id for r in results})} held-out pictures"


def write_report(demo: DemoConfig) -> str:
    """report.json, report.md and sheet.png."""
    made = _report(demo)
    draw_sheet(demo)
    report.write(made, demo.root)
    return _passed(made)


STAGES = (
    Stage("triplets", make_triplets),
    Stage("evolve", write_evolutions),
    Stage("rollout", roll_out),
    Stage("verify", check_shards),
    Stage("distill", distill),
    Stage("export", export_student),
    Stage("sft_equal_steps", lambda demo: train_sft(demo, "sft_equal_steps", 1.0)),
    Stage("sft_equal_compute", lambda demo: train_sft(demo, "sft_equal_compute", demo.compute_ratio)),
    Stage("evaluate", evaluate),
    Stage("report", write_report),
)


# ------------------------------------------------------------------------------------------------ training


def train(demo: DemoConfig, config: str, output: Path, steps: int, words: Sequence[str]) -> str:
    """One training under the deepspeed launcher; started again, it goes on from its last checkpoint.

    ``words`` may also replace the demo's own shards and seed.
    """
    shards = [f"loop.data={demo.root / 'shards'}", f"loop.validation={demo.root / 'validation' / 'shards'}"]
    own = [f"loop.output={output}", f"loop.steps={steps}", f"loop.seed={demo.seed}"]
    ranks = ranks_here(demo.ranks)
    command = [*launcher(ranks), "train", config, *shards, *own, *words, *demo.train]
    print(f"$ {' '.join(command)}", flush=True)
    if code := subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode:
        raise TrainingError(
            f"the training ended with exit code {code}", where=str(output), fix="see above; the same command goes on"
        )
    return f"{steps} steps on {ranks} rank{'s' * (ranks > 1)}"


def ranks_here(wanted: int) -> int:
    """Each rank has a GPU to itself, where there are any."""
    return min(wanted, torch.cuda.device_count()) if torch.cuda.is_available() else wanted


def launcher(ranks: int) -> list[str]:
    """A local deepspeed launch of the door; the rank count is said because CPU sockets would be counted instead."""
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(ranks)]
    local = ["--master_addr", "127.0.0.1", "--master_port", str(_free_port()), "--no_local_rank"]
    return [*deepspeed, *local, "--module", "v4e.cli"]


def export(training: Path, output: Path) -> str:
    """A finished training as a diffusers folder."""
    from v4e.export import export_run

    export_run(training, output)
    return str(output)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _loop_of(path: str) -> settings_of.Loop:
    from v4e.recipes import pick

    return settings_of.load(path, [], pick).loop


# ---------------------------------------------------------------------------------------------- evaluation


def cases(demo: DemoConfig, draw: int = 0) -> list[Case]:
    """Held-out edits, the same number of every task; photographs and combinations that no training saw.

    Args:
        draw: 0 for the demo's own, 1 to 7 for others.
    """
    numbers, seed = range(demo.per_task), _seed_of(demo, "test") + draw
    return [_case(_draw(seed, task, n, demo.size), demo) for task in world.TASKS for n in numbers]


def methods(demo: DemoConfig) -> list[Method]:
    """The rows of the report."""
    students = {
        "init": demo.i2v,
        "sft_equal_steps": demo.root / "baselines" / "sft_equal_steps" / "model",
        "sft_equal_compute": demo.root / "baselines" / "sft_equal_compute" / "model",
        "student": demo.root / "student",
    }
    told = content_hash(str(demo.teacher))
    return [
        _copy(),
        Method("vae", _through_vae(demo), identity=told),
        Method("teacher", _imagine(demo), (demo.teacher_steps,), identity=told),
        *(method(name, folder, demo, demo.step_counts) for name, folder in students.items()),
    ]


def _copy() -> Method:
    """The input unchanged."""
    return Method(COPY, run.copy_source)


def method(name: str, folder: Path, demo: DemoConfig, steps: tuple[int, ...]) -> Method:
    """The row of a student, with every sampling seed."""
    make = run.of_editor(editor(folder, demo))
    return Method(name, make, steps, tuple(range(demo.seeds)), content_hash(str(folder)))


def editor(folder: Path, demo: DemoConfig) -> run.Edit:
    """A student as the evaluator wants it; loaded when first used."""
    how: Any = {"dtype": TYPES[demo.dtype], "attention": demo.rollout.attention}
    load = cache(lambda: EditPipeline.from_pretrained(folder, **how))

    def edit(images: Sequence[Clip], instructions: Sequence[str], seeds: Sequence[int], steps: int) -> list[Clip]:
        return load().edit_batch(
            images, instructions, seeds, steps=steps, batch=len(images), fold=demo.rollout.fold_text_padding
        )

    return edit


def judge(case: Case, output: Clip) -> bool:
    """The world's oracle: the edit is drawn again from its id."""
    edit = _edit_of(case.id, case.task, case.source.size[0])
    return world.judge(edit, output.frames_T3HW[-1].numpy()).success


def _imagine(demo: DemoConfig) -> run.Make:
    """The teacher between true source and true target, told the true pace."""
    rolling = demo.rolling
    load = cache(lambda: TeacherPipeline.from_pretrained(demo.teacher, attention=demo.rollout.attention))

    def make(cases: Sequence[Case], seeds: Sequence[int], steps: int) -> list[Clip]:
        captions = [_edit_of(c.id, c.task, demo.size).evolution for c in cases]
        return load()(
            [c.source for c in cases],
            [c.target for c in cases],
            captions,
            seeds=seeds,
            frames=rolling.teacher_frames,
            steps=steps,
            guidance=rolling.guide,
            fold=rolling.fold_text_padding,
        )

    return make


def _through_vae(demo: DemoConfig) -> run.Make:
    """The true clip encoded and decoded: what no model in this latent space can beat."""
    load = cache(lambda: WanCodec.load(demo.teacher))

    def make(cases: Sequence[Case], seeds: Sequence[int], steps: int) -> list[Clip]:
        clips = [Clip.join([c.source, *([c.middle] if c.middle else []), c.target]) for c in cases]
        return load().decode(load().encode(clips))

    return make


def _case(edit: world.Edit, demo: DemoConfig) -> Case:
    frames = torch.from_numpy(edit.clip(demo.rolling.teacher_frames))
    return Case(
        id=edit.key,
        task=edit.task,
        instruction=edit.instruction,
        source=_clip(edit.source),
        target=_clip(edit.target),
        mask_HW=torch.from_numpy(edit.mask),
        groups=("local",) if edit.task in LOCAL else ("style",) if edit.task in world.STYLES else (),
        middle=Clip(frames[1:-1].contiguous()),
    )


def _clip(picture: np.ndarray) -> Clip:
    return Clip(torch.from_numpy(np.ascontiguousarray(picture))[None])


def _draw(seed: int, task: str, number: int, size: int) -> world.Edit:
    """The number-th held-out edit of a task; its key holds seed and index, so that it can be drawn again."""
    return world.draw(seed, 1000 * world.TASKS.index(task) + number, "heldout", size=size, tasks=(task,))


@cache
def _edit_of(key: str, task: str, size: int) -> world.Edit:
    """The edit that :func:`_draw` gave this key."""
    _, seed, index = key.split("-")
    return world.draw(int(seed), int(index), "heldout", size=size, tasks=(task,))


def _seed_of(demo: DemoConfig, purpose: str) -> int:
    """Seeds of the world: training, contact sheets and test never share an edit."""
    return 10 * demo.seed + ("triplets", "validation", "test").index(purpose)


# -------------------------------------------------------------------------------------------------- report


def bars(steps: int) -> list[Bar]:
    """The quality that the project asks of the student at few steps, and of teacher and VAE."""
    gains = {"recolour": 8.0, "add": 5.0, "remove": 4.5, "replace": 2.5, "move": 2.5, "background": 5.0, "sketch": 6.0}
    gains |= {style: 8.0 for style in world.STYLES if style != "sketch"}
    shares = {
        "recolour": 0.85,
        "add": 0.85,
        "remove": 0.85,
        "style": 0.85,
        "replace": 0.6,
        "move": 0.6,
        "background": 0.6,
    }
    student = partial(Key, "student", steps)
    rivals = [Key(name, steps) for name in ("init", "sft_equal_steps", "sft_equal_compute")]
    return [
        *(Bar("edit_psnr", student(task), low=gain, over=Key("copy", 0, task)) for task, gain in gains.items()),
        Bar("keep_psnr", student("local"), low=26.0),
        *(Bar("success", student(task), low=share) for task, share in shares.items()),
        Bar("sharpness", student(), low=0.8, high=1.2),
        *(Bar(m, student(), over=rival, beyond_spread=True) for rival in rivals for m in ("edit_psnr", "success")),
        Bar("psnr", Key("vae", 0), low=28.0),
    ]


def teacher_bars(steps: int) -> list[Bar]:
    """Last and middle frames: within 1 dB of the VAE's own, and 25 dB at least."""
    teacher, vae = Key("teacher", steps), Key("vae", 0)
    metrics: tuple[report.Metric, ...] = ("psnr", "middle_psnr")
    return [*(Bar(m, teacher, low=-1.0, over=vae) for m in metrics), *(Bar(m, teacher, low=25.0) for m in metrics)]


def draw_sheet(demo: DemoConfig) -> None:
    """The first held-out edit of every task, seed 0: not chosen."""
    table = {(r.id, r.method, r.steps, r.seed): r for r in run.read_results(demo.root / "edits")}
    many = max(demo.step_counts)
    columns = [
        sheet.Column("source"),
        sheet.Column("instruction", text_width=150),
        sheet.Column("the teacher's evolution", scale=2),
        sheet.Column(f"student, {demo.headline} steps"),
        sheet.Column(f"student, {many} steps"),
        sheet.Column("target"),
    ]
    rows = []
    for task in world.TASKS:
        key = _draw(_seed_of(demo, "test"), task, 0, demo.size).key
        teacher, few, long = (
            table[key, name, n, 0]
            for name, n in (("teacher", demo.teacher_steps), ("student", demo.headline), ("student", many))
        )
        rows.append(_sheet_row(demo.root / "edits", teacher, few, long))
    sheet.save(demo.root / "sheet.png", "Held-out photographs, the first edit of every task", columns, rows)


def _sheet_row(edits: Path, teacher: Result, few: Result, many: Result) -> sheet.SheetRow:
    case = run.case_of(teacher, edits)
    clip = run.clip_of(teacher, edits)
    chosen = [round(i * (len(clip) - 1) / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)]
    outputs = [run.output_of(result, edits) for result in (few, many)]
    evolution = Clip(clip.frames_T3HW[chosen])
    return sheet.SheetRow((case.source, f"{case.task}:\n{case.instruction}", evolution, *outputs, case.target))


def _report(demo: DemoConfig) -> Report:
    rows = run.aggregate(run.read_results(demo.root / "edits"))
    seconds = {stage.name: read_done(m).seconds for stage in STAGES if (m := _marker(demo, stage)).is_file()}
    notes = _notes(demo, seconds)
    return Report(tuple(rows), world.TASKS, _outcomes(demo, rows), demo.headline, seconds, notes, ("sheet.png",))


def _outcomes(demo: DemoConfig, rows: Sequence[Row]) -> tuple[Outcome, ...]:
    return report.hold([*bars(demo.headline), *teacher_bars(demo.teacher_steps)], rows)


def _tables(made: Report) -> str:
    bars_met = [report.bar_table(made.outcomes)] if made.outcomes else []
    return "\n\n".join([report.overview(made), report.task_table(made), *bars_met])


def _passed(made: Report) -> str:
    return f"{sum(outcome.passed for outcome in made.outcomes)} of {len(made.outcomes)} bars pass"


def _notes(demo: DemoConfig, seconds: dict[str, float]) -> tuple[str, ...]:
    charged, paid = seconds["rollout"] + seconds["distill"], seconds["sft_equal_compute"]
    return (
        f"{demo.triplets} training triplets; {demo.per_task} held-out edits of each of {len(world.TASKS)} tasks, "
        f"on photographs and combinations of colour, shape and task that no training saw.",
        f"`sft_equal_compute` trains {demo.compute_ratio:g} times as many steps as the student: {paid:.0f} s against "
        f"{charged:.0f} s for roll-out and distillation.",
    )
