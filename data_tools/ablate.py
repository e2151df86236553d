"""`v4e ablate`: which term of the objective pays, and how many triplets an editor needs.

Two questions, one list of runs (:func:`plan`):

- the table: Video4Edit as the recipe has it, then with one thing less each time, and plain flow matching beside it;
- the curve: 16 ... 1,024 triplets, distilled or plainly fine-tuned, from the video-pretrained I2V or from fresh
  weights of the same architecture.

All runs learn from the same triplets (a smaller set is the beginning of a larger one), take the demo's road and are
measured by its evaluator. Every step leaves ``stages/NAME.json``, written last, so that the same command goes on where
it stopped, inside a training too.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch

from data_tools import demo, world
from data_tools.demo import DemoConfig
from data_tools.ingest import read_triplets
from data_tools.rollout import TYPES
from v4e import config as settings_of
from v4e.data.disk import agree, to_json, writable, write_atomically
from v4e.data.shards import ShardSet, ShardWriter
from v4e.errors import ConfigError
from v4e.eval import chart, report
from v4e.eval import run as evaluator
from v4e.eval.report import Metric, Report
from v4e.eval.run import OVERALL, Method, Result, Row
from v4e.journal import progress
from v4e.recipes import pick

Objective = Literal["distilled", "sft"]
Start = Literal["prior", "fresh"]
COPY, INIT = "copy", "init"
ABOUT = {name: text for name, text in report.ABOUT.items() if name not in ("middle_psnr", "spread")}
TITLES = {"distilled": "distilled", "sft": "plain flow matching", "prior": "video-pretrained", "fresh": "fresh weights"}

# Without one of `velocity` and `trajectory`, the other must carry the whole run: weight that is handed over to a term
# of weight 0 would be lost, and the row would show a training without its main term.
TERMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "minus_velocity": ("terms.velocity=0", "terms.handover=[-1,0]"),
    "minus_trajectory": ("terms.trajectory=0", "terms.handover=[1,2]"),
    "minus_tail": ("terms.tail=0",),
    "minus_block": ("terms.block=0",),
    "minus_flow": ("terms.flow=0",),
    "minus_own": ("own_every=0",),
    "no_guidance": ("guidance=1",),
    "no_edit_boost": ("edit_boost=0",),
    "no_flow_share": ("flow_share=0",),
    "no_level_bias": ("level_bias=0",),
}
BASELINES = ("sft", "sft_edit_boost")
# The journal's jsonl stays; contact sheets and W&B would cost a tenth of a run's time, and edits/ holds every picture.
QUIET = ('loop.validation=""', "loop.wandb.mode=disabled")


@dataclass(frozen=True)
class AblateConfig:
    """The ablation's settings: ``v4e ablate key=value ...``.

    Args:
        output: folder for everything.
        runs: which runs to do now, names or globs with commas between; the report shows all that are done.
        counts: numbers of triplets of the curve.
        table: number of triplets of the table's runs.
        train_seeds: every run is trained once with each; they may be added to later.
        fresh_ratio: runs from fresh weights train for this many times the steps.
        keep_models: keep every exported model, and not its journal and pictures only.
        road: the demo's settings, for all that a run shares with it: models, training configs and steps, sizes,
            ranks, held-out edits, sampling seeds. Its folder and number of triplets follow from those above.
    """

    output: str = "runs/ablate"
    runs: str = "*"
    counts: tuple[int, ...] = (16, 64, 256, 1024)
    table: int = 256
    train_seeds: tuple[int, ...] = (0, 1, 2)
    fresh_ratio: float = 1.0
    keep_models: bool = False
    road: DemoConfig = field(default_factory=lambda: DemoConfig(per_task=12))

    def __post_init__(self) -> None:
        if not self.counts or not self.train_seeds or min(self.table, *self.counts) < 1:
            raise ConfigError(
                "the curve needs numbers of triplets of at least 1, and a seed", where="keys counts, table"
            )

    @property
    def root(self) -> Path:
        return Path(self.output)

    @property
    def pool(self) -> DemoConfig:
        """The road to the shards of all triplets."""
        return replace(self.road, output=str(self.root / "data"), triplets=max(self.table, *self.counts))

    def shards(self, triplets: int) -> Path:
        """Where the first so many triplets lie."""
        return self.pool.root / ("shards" if triplets == self.pool.triplets else f"shards-{triplets}")


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: its row in the table or its point on the curve.
        words: what it changes in its training config.
        alias: its other name, where a row of the table is also a point of the curve.
    """

    name: str
    objective: Objective
    triplets: int
    start: Start = "prior"
    words: tuple[str, ...] = ()
    alias: str = ""


@dataclass(frozen=True)
class Trained:
    """A run with one seed, and where its things lie."""

    run: Run
    seed: int
    config: AblateConfig

    @property
    def name(self) -> str:
        return f"{self.run.name}.seed-{self.seed}"

    @property
    def home(self) -> Path:
        return self.config.root / "runs" / self.name

    @property
    def steps(self) -> int:
        ratio = self.config.fresh_ratio if self.run.start == "fresh" else 1.0
        return round(self.config.road.student_steps * ratio)

    @property
    def recipe(self) -> str:
        """The training config."""
        return self.config.road.recipe if self.run.objective == "distilled" else self.config.road.baseline

    @property
    def words(self) -> list[str]:
        """What this training adds to its config, but for its number of steps and its folder."""
        road = self.config.road
        models = [f"teacher={road.teacher}", f"student={road.i2v}"]
        models = models if self.run.objective == "distilled" else [f"init={road.i2v}"]
        fresh = ["fresh=true"] if self.run.start == "fresh" else []
        place = f"loop.data={self.config.shards(self.run.triplets)}"
        return [*models, *fresh, *self.run.words, place, f"loop.seed={self.seed}", *QUIET]

    def marker(self, stage: str) -> Path:
        return _marker(self.config, f"{self.name}.{stage}")

    def is_done(self) -> bool:
        return self.marker("evaluate").is_file()


@dataclass(frozen=True)
class Measured:
    """What is known of a finished run.

    Args:
        rows: all its rows at the headline's steps, over all seeds, by group.
        seconds: a training's, mean over the seeds.
        trainings: seeds it was trained with.
    """

    run: Run
    rows: tuple[Row, ...]
    seconds: float
    trainings: int

    def row(self, group: str = OVERALL) -> Row:
        """The row of a group of edits, all of which every evaluation has."""
        return next(row for row in self.rows if row.group == group)


def main(path: str | None, overrides: Sequence[str]) -> int:
    """Run the ablation; what is done already is not done again."""
    config = settings_of.load(path, overrides, lambda _: AblateConfig, recipe="ablate")
    torch.set_num_threads(1)  # parallelism is processes; small tensors lose by threads
    walk(config)
    print(f"\n{terms_table(read(config))}\n\nreport    {config.root / 'report.md'}")
    return 0


def walk(config: AblateConfig) -> None:
    """All that was chosen.

    Raises:
        CheckpointError: the bundle is missing.
        ConfigError: no run has a name that was asked for.
        DataError: the output folder was begun with other settings, or the disk is full.
        TrainingError: a training ended badly.
    """
    demo.check_bundle(config.road)
    chosen = [Trained(run, seed, config) for seed in config.train_seeds for run in select(plan(config), config.runs)]
    with writable(config.root):
        (config.root / "stages").mkdir(parents=True, exist_ok=True)
        agree(config.root / "ablate.json", _lasting(config))
        _make_data(config)
        _once(config, "references", "references", partial(_measure_references, config))
        for number, trained in enumerate(chosen, 1):
            _do(trained, f"[{number}/{len(chosen)}] {trained.name}")
            write_report(config)
        write_report(config)


# ---------------------------------------------------------------------------------------------------- plan


def plan(config: AblateConfig) -> tuple[Run, ...]:
    """Every run: the table's, then the curve's. Runs that are the same training are one, with two names."""
    table = [Run(name, "distilled", config.table, words=words) for name, words in TERMS.items()]
    table += [Run("sft", "sft", config.table), Run("sft_edit_boost", "sft", config.table, words=_region_weight(config))]
    known: dict[Run, Run] = {}
    for run in [*table, *curve(config)]:
        training = replace(run, name="")
        known[training] = replace(known[training], alias=run.name) if training in known else run
    return tuple(known.values())


def _region_weight(config: AblateConfig) -> tuple[str, ...]:
    """The distillation's, for plain flow matching: what of the difference between the two is that weight's?"""
    return (f"edit_boost={_recipe(config.road.recipe)['edit_boost']}",)


def curve(config: AblateConfig) -> Iterator[Run]:
    """The points: with and without distillation, from the prior and from nothing, at every number of triplets."""
    starts: tuple[Start, ...] = ("prior", "fresh")
    objectives: tuple[Objective, ...] = ("distilled", "sft")
    for start in starts:
        for objective in objectives:
            for triplets in _counts(config):
                yield Run(f"{start}_{objective}_{triplets}", objective, triplets, start)


def select(runs: Sequence[Run], patterns: str) -> list[Run]:
    """The runs of which one of the names fits one of the patterns, in the plan's order.

    Raises:
        ConfigError: a pattern fits no run.
    """
    wanted = patterns.replace(",", " ").split()
    if lost := [p for p in wanted if not any(_fits(run, p) for run in runs)]:
        names = ", ".join(run.name for run in runs)
        raise ConfigError(f"no run is called {lost[0]!r}", where="key runs", fix=f"choose among {names}")
    return [run for run in runs if any(_fits(run, p) for p in wanted)]


def _fits(run: Run, pattern: str) -> bool:
    return any(name and fnmatchcase(name, pattern) for name in (run.name, run.alias))


def _lasting(config: AblateConfig) -> dict[str, object]:
    """What may not change from one call to the next: settings, training configs and models, by their content."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("runs", "train_seeds", "keep_models")}
    recipes = {path: _recipe(path) for path in (config.road.recipe, config.road.baseline)}
    return {**settings, **recipes, "models": [*demo.models(config.road).values()]}


def _recipe(path: str) -> dict[str, object]:
    return settings_of.to_dict(settings_of.load(path, [], pick))


# ----------------------------------------------------------------------------------------------------- data


def _make_data(config: AblateConfig) -> None:
    """The largest set by the demo's road, then its beginnings."""
    for work in (demo.make_triplets, demo.write_evolutions, demo.roll_out, demo.check_shards):
        _once(config, work.__name__, work.__name__.replace("_", " "), partial(work, config.pool))
    for triplets in sorted({*config.counts, config.table} - {config.pool.triplets}):
        _once(config, f"shards-{triplets}", f"the first {triplets} triplets", partial(_begin, config, triplets))


def _begin(config: AblateConfig, triplets: int) -> str:
    """The beginning of the pool as a set of its own: the same bytes, so that only the number differs."""
    keys = [triplet.id for triplet in read_triplets(config.pool.root / "triplets")[:triplets]]
    take(config.shards(config.pool.triplets), config.shards(triplets), keys, TYPES[config.road.rollout.stored])
    return f"{triplets} of {config.pool.triplets}"


def take(whole: Path, out: Path, keys: Sequence[str], dtype: torch.dtype = torch.bfloat16) -> None:
    """Write these samples of a set as a set of their own, in this order: several processes wrote the whole one."""
    source = ShardSet.open(whole)
    meta = replace(source.meta, settings={**source.meta.settings, "taken": len(keys)})
    with ShardWriter(out, meta, samples_per_shard=64, dtype=dtype) as writer:
        for key in progress([k for k in keys if k not in writer.done], f"take {len(keys)}"):
            writer.add(source.sample(source.keys.index(key), pictures=True))


# ----------------------------------------------------------------------------------------------------- runs


def _once(config: AblateConfig, stage: str, title: str, work: Callable[[], str]) -> None:
    demo.once(_marker(config, stage), title, work)


def _marker(config: AblateConfig, stage: str) -> Path:
    return config.root / "stages" / f"{stage}.json"


def _do(trained: Trained, title: str) -> None:
    """Train, export, evaluate."""
    for stage, work in (("train", _train), ("export", _export), ("evaluate", _evaluate)):
        demo.once(trained.marker(stage), f"{title}: {stage}", partial(work, trained))


def _train(trained: Trained) -> str:
    pool = trained.config.pool
    return demo.train(pool, trained.recipe, trained.home / "train", trained.steps, trained.words)


def _export(trained: Trained) -> str:
    return demo.export(trained.home / "train", trained.home / "model")


def _evaluate(trained: Trained) -> str:
    """Measure, then drop what is large and has served: so many runs would fill a disk."""
    row = _method(trained.run.name, trained.home / "model", trained.config)
    results = _measure(trained.config, [row], trained.home / "edits")
    for folder in ("train/checkpoints", "train/weights", *([] if trained.config.keep_models else ["model"])):
        shutil.rmtree(trained.home / folder, ignore_errors=True)
    return f"{len(results)} edits"


def _measure_references(config: AblateConfig) -> str:
    """Doing nothing, and the video model as it is."""
    init = _method(INIT, config.road.i2v, config)
    return f"{len(_measure(config, [Method(COPY, evaluator.copy_source), init], config.root / 'references'))} edits"


def _method(name: str, model: Path, config: AblateConfig) -> Method:
    return demo.method(name, model, config.pool, (config.road.headline,))


def _measure(config: AblateConfig, methods: Sequence[Method], folder: Path) -> list[Result]:
    road = config.road
    return evaluator.evaluate(demo.cases(config.pool), methods, demo.judge, folder, road.batch, road.ranks)


# --------------------------------------------------------------------------------------------------- report


def read(config: AblateConfig) -> list[Measured]:
    """All that is done, in the plan's order; the references come first."""
    references = evaluator.read_results(config.root / "references")
    found = [_referred(name, references) for name in (COPY, INIT)]
    return found + [m for run in plan(config) if (m := _read_run(run, config))]


def _read_run(run: Run, config: AblateConfig) -> Measured | None:
    done = [t for seed in config.train_seeds if (t := Trained(run, seed, config)).is_done()]
    if not done:
        return None
    results = [(t.seed, evaluator.read_results(t.home / "edits")) for t in done]
    return measured(run, results, [demo.read_done(t.marker("train")).seconds for t in done])


def measured(run: Run, results: Sequence[tuple[int, Sequence[Result]]], seconds: Sequence[float]) -> Measured:
    """Join the trainings of a run.

    Args:
        results: (training seed, its results). With several of them, a seed's mean is over its sampling seeds and the
            spread is that of the trainings; with one, that of the sampling seeds.
    """
    several = len(results) > 1
    together = [replace(r, seed=seed) if several else r for seed, some in results for r in some]
    return Measured(run, _over_seeds(together), fmean(seconds) if seconds else 0.0, len(results))


def _referred(name: str, references: Iterable[Result]) -> Measured:
    return Measured(Run(name, "sft", 0), _over_seeds(r for r in references if r.method == name), 0.0, 0)


def _over_seeds(results: Iterable[Result]) -> tuple[Row, ...]:
    return tuple(row for row in evaluator.aggregate(results) if row.seed is None)


def write_report(config: AblateConfig) -> None:
    """report.json, report.md and curve.png, of all that is done."""
    found = read(config)
    draw_curve(config, found)
    write_atomically(config.root / "report.json", to_json(to_dict(config, found), indent=1) + b"\n")
    write_atomically(config.root / "report.md", to_markdown(config, found).encode())


def to_dict(config: AblateConfig, found: Sequence[Measured]) -> dict[str, object]:
    """``runs`` -> name -> what it is, and its figures as in the demo's report.json; ``missing``: not yet done."""
    rows = tuple(replace(row, method=m.run.name) for m in found for row in m.rows)
    figures = report.to_dict(Report(rows, world.TASKS, headline=config.road.headline, notes=notes(config)))
    trained = [m for m in found if m.trainings]
    said = {m.run.name: asdict(m.run) | {"seconds": m.seconds, "trainings": m.trainings} for m in trained}
    missing = [run.name for run in plan(config) if run.name not in said]
    return {**figures, "about": ABOUT, "runs": said, "missing": missing, "settings": asdict(config)}


def to_markdown(config: AblateConfig, found: Sequence[Measured]) -> str:
    """The report for people."""
    about = "\n".join(f"- {name}: {text}" for name, text in ABOUT.items())
    parts = [
        "# Ablation",
        *notes(config),
        f"## Terms\n\n{terms_table(found)}",
        f"## Terms, by kind of edit\n\n{groups_table(found)}",
        "## Triplets\n\n![curve](curve.png)",
        f"Success:\n\n{curve_table(config, found, 'success')}",
        f"Edit-region PSNR over `{COPY}`, in dB:\n\n{curve_table(config, found, 'edit_psnr')}",
        f"## How it is measured\n\n{about}",
    ]
    return "\n\n".join(parts) + "\n"


def notes(config: AblateConfig) -> tuple[str, ...]:
    """Sentences for the reader."""
    trainings, road = len(config.train_seeds), config.road
    longer = f", {config.fresh_ratio:g} times as many from fresh weights" if config.fresh_ratio != 1 else ""
    several = f"the {trainings} trainings of each run, or of those of them that are done"
    once = f"the {road.seeds} sampling seeds; each run was trained once, so a difference may be a training's luck"
    return (
        f"Every run: {road.student_steps} steps on {road.ranks} ranks{longer}; {road.per_task} held-out edits of each "
        f"of {len(world.TASKS)} tasks, sampling seeds: {road.seeds}, solver steps: {road.headline}.",
        f"± is the standard deviation (n - 1) of the means of {several if trainings > 1 else once}. `(within)`: the "
        "difference does not exceed the sum of both runs' spreads.",
    )


def terms_table(found: Sequence[Measured]) -> str:
    """One line per run of the table: figures, and success against the full objective's."""
    copy, full = _row_of(found, COPY), _row_of(found, "full")
    head = ["run", f"edit PSNR over {COPY}", "keep PSNR", "sharpness", "success", "over full", "n", "seconds"]
    return report.text_table(head, [_terms_line(m, copy, full) for m in _of_table(found)])


def _terms_line(one: Measured, copy: Row | None, full: Row | None) -> list[str]:
    row, is_training = one.row(), one.trainings > 0
    figures = [report.with_spread(row, name) for name in ("keep_psnr", "sharpness", "success")]
    over = difference(row, full) if is_training and row is not full else ""
    return [one.run.name, _gain(row, copy), *figures, over, str(row.mean.n), f"{one.seconds:.0f}" * is_training]


def groups_table(found: Sequence[Measured]) -> str:
    """Success of the table's runs for every kind of edit."""
    groups = (*world.TASKS, "local", "style")
    lines = [[m.run.name, *(report.figure(m.row(g), "success") for g in groups)] for m in _of_table(found)]
    return report.text_table(["success of", *groups], lines)


def _of_table(found: Sequence[Measured]) -> list[Measured]:
    return [m for m in found if m.run.name in (COPY, INIT, *TERMS, *BASELINES)]


def difference(row: Row, other: Row | None) -> str:
    """Success against another's, and whether it lies within the spreads of both; without spreads nobody can tell."""
    if other is None or row.mean.success is None or other.mean.success is None:
        return ""
    value = row.mean.success - other.mean.success
    if row.spread is None or other.spread is None:
        return f"{value:+.2f} (no spread)"
    margin = (row.spread.success or 0.0) + (other.spread.success or 0.0)
    return f"{value:+.2f}" + ("" if abs(value) > margin else " (within)")


def _gain(row: Row | None, copy: Row | None) -> str:
    """Edit PSNR over doing nothing; that is the same in every run, so the spread is the run's own."""
    if row is None or copy is None:
        return ""
    over = replace(row, mean=replace(row.mean, edit_psnr=row.mean.edit_psnr - copy.mean.edit_psnr))
    return report.with_spread(over, "edit_psnr")


# ---------------------------------------------------------------------------------------------------- curve


def curve_table(config: AblateConfig, found: Sequence[Measured], metric: Metric) -> str:
    """One line per way of training, one column per number of triplets; edit PSNR is over doing nothing."""
    copy = _row_of(found, COPY)
    lines = []
    for name, runs in _lines(config).items():
        rows = [_row_of(found, run.name) for run in runs]
        cells = [_gain(row, copy) if metric == "edit_psnr" else report.with_spread(row, metric) for row in rows]
        lines.append([name, *cells])
    return report.text_table(["training", *map(str, _counts(config))], lines)


def draw_curve(config: AblateConfig, found: Sequence[Measured]) -> None:
    """curve.png: success and gain against the number of triplets."""
    copy = _row_of(found, COPY)
    zero = copy.mean.edit_psnr if copy else 0.0
    panels = [_panel(config, found, "success", 0.0), _panel(config, found, "edit_psnr", zero)]
    title = f"Held-out edits in {config.road.headline} steps"
    chart.save(config.root / "curve.png", title, "training triplets", _counts(config), panels)


def _panel(config: AblateConfig, found: Sequence[Measured], metric: Metric, zero: float) -> chart.Panel:
    """A colour per start; plain flow matching is hollow."""
    curves = [
        chart.Curve(name, _points(found, runs, metric, zero), int(runs[0].start == "fresh"), runs[0].objective == "sft")
        for name, runs in _lines(config).items()
    ]
    before = _row_of(found, INIT)
    value = getattr(before.mean, metric) if before else None
    level = None if value is None else ("before training", value - zero)
    title = f"edit PSNR over {COPY}, dB" if metric == "edit_psnr" else metric
    return chart.Panel(title, tuple(curves), level)


def _points(found: Sequence[Measured], runs: Sequence[Run], metric: Metric, zero: float) -> tuple[chart.Point, ...]:
    rows = [(run.triplets, row) for run in runs if (row := _row_of(found, run.name))]
    values = [(n, getattr(row.mean, metric), getattr(row.spread, metric) if row.spread else None) for n, row in rows]
    return tuple(chart.Point(n, value - zero, spread or 0.0) for n, value, spread in values if value is not None)


def _lines(config: AblateConfig) -> dict[str, list[Run]]:
    """The curve's points by the line that joins them."""
    lines: dict[str, list[Run]] = {}
    for run in curve(config):
        lines.setdefault(f"{TITLES[run.objective]}, {TITLES[run.start]}", []).append(run)
    return lines


def _counts(config: AblateConfig) -> list[int]:
    return sorted(set(config.counts))


def _row_of(found: Sequence[Measured], name: str) -> Row | None:
    """The overall row of a run, by either of its names."""
    return next((m.row() for m in found if name in (m.run.name, m.run.alias)), None)
