"""The ablation asks what it says it asks, and its tables hold what was measured."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from builders import shared_wan_folder
from PIL import Image

from data_tools import ablate, demo, world
from data_tools.ablate import AblateConfig, Run, Trained
from data_tools.ingest import Triplet
from v4e import cli
from v4e import config as settings_of
from v4e.data.disk import to_json
from v4e.data.shards import SetMeta, ShardSet, ShardWriter
from v4e.errors import ConfigError, DataError
from v4e.eval import chart
from v4e.eval import run as evaluator
from v4e.eval.metrics import Scores
from v4e.eval.run import Files, Result
from v4e.nouns import Clip, Encoded, Grid, Sample
from v4e.recipes import pick
from v4e.recipes.flow_matching import FlowMatching
from v4e.recipes.video4edit import Video4Edit

COUNTS = (16, 64, 256, 1024)


def settings(**fields) -> AblateConfig:
    return AblateConfig(**fields)


def recipe_of(run: Run, seed: int = 0, **fields) -> Video4Edit | FlowMatching:
    """What `v4e train` would make of a run's words."""
    trained = Trained(run, seed, settings(**fields))
    words = [*trained.words, f"loop.steps={trained.steps}"]
    return settings_of.load(trained.recipe, words, pick)


def named(name: str, **fields) -> Run:
    return ablate.select(ablate.plan(settings(**fields)), name)[0]


# ---------------------------------------------------------------------------------------------------- plan


def test_the_plan_is_complete():
    runs = ablate.plan(settings())
    table = {"full", "minus_velocity", "minus_trajectory", "minus_tail", "minus_block", "minus_flow", "minus_own"}
    table |= {"no_guidance", "no_edit_boost", "no_flow_share", "no_level_bias", "sft", "sft_edit_boost"}
    curve = {f"{s}_{o}_{n}" for s, o, n in product(("prior", "fresh"), ("distilled", "sft"), COUNTS)}
    names = [run.name for run in runs] + [run.alias for run in runs if run.alias]
    assert len(names) == len(set(names))
    assert {*names} == table | curve
    assert len(runs) == len(table) + len(curve) - 2
    assert named("full").alias == "prior_distilled_256"
    assert named("sft").alias == "prior_sft_256"


def test_where_the_table_has_its_own_number_of_triplets_nothing_is_shared():
    runs = ablate.plan(settings(counts=(8, 32), table=24))
    assert not any(run.alias for run in runs)
    assert len(runs) == 13 + 8
    assert {run.triplets for run in runs if run.name in ablate.TERMS} == {24}
    assert settings(counts=(8, 32), table=24).pool.triplets == 32
    assert settings(counts=(8, 32), table=64).pool.triplets == 64


@pytest.mark.parametrize("run", ablate.plan(settings()), ids=lambda run: run.name)
def test_every_run_trains_its_recipe_on_its_triplets(run):
    made = recipe_of(run, seed=3)
    assert isinstance(made, Video4Edit if run.objective == "distilled" else FlowMatching)
    assert made.loop.seed == 3
    assert made.loop.validation == ""
    assert made.fresh == (run.start == "fresh")
    assert Path(made.loop.data).name == ("shards" if run.triplets == 1024 else f"shards-{run.triplets}")
    assert made.loop.steps == settings_of.load("configs/nano/video4edit.yaml", [], pick).loop.steps
    start = made.student if isinstance(made, Video4Edit) else made.init
    assert start == str(settings().road.i2v)


REMOVED = [
    ("minus_velocity", ("terms", "velocity")),
    ("minus_trajectory", ("terms", "trajectory")),
    ("minus_tail", ("terms", "tail")),
    ("minus_block", ("terms", "block")),
    ("minus_flow", ("terms", "flow")),
    ("minus_own", ("own_every",)),
    ("no_edit_boost", ("edit_boost",)),
    ("no_flow_share", ("flow_share",)),
    ("no_level_bias", ("level_bias",)),
    ("no_guidance", ("guidance",)),  # whose nothing is a scale of one
]


@pytest.mark.parametrize(("name", "path"), REMOVED)
def test_a_row_of_the_table_differs_from_the_full_objective_in_one_thing(name, path):
    full, less = settings_of.to_dict(recipe_of(named("full"))), settings_of.to_dict(recipe_of(named(name)))
    full["terms"].pop("handover")
    less["terms"].pop("handover")
    whole, part = full, less
    for key in path[:-1]:
        whole, part = whole[key], part[key]
    nothing = 1 if name == "no_guidance" else 0
    assert whole.pop(path[-1]) > nothing
    assert part.pop(path[-1]) == nothing
    assert full == less


def test_what_takes_over_from_a_missing_term_carries_the_whole_run():
    for name, zero, one in (
        ("minus_velocity", "velocity", "trajectory"),
        ("minus_trajectory", "trajectory", "velocity"),
    ):
        recipe = recipe_of(named(name))
        for step in (0, recipe.loop.steps // 2, recipe.loop.steps):
            weights = recipe.weights_at(step)
            assert (weights[zero], weights[one]) == (0, 1)


def test_the_boosted_baseline_has_the_distillations_region_weight():
    assert recipe_of(named("sft_edit_boost")).edit_boost == recipe_of(named("full")).edit_boost
    assert recipe_of(named("sft")).edit_boost == 0


def test_fresh_weights_may_train_longer_and_steps_may_be_few():
    fields = {"road": demo.DemoConfig(steps=10), "fresh_ratio": 2.5}
    assert recipe_of(named("fresh_sft_64"), **fields).loop.steps == 25
    assert recipe_of(named("prior_sft_64"), **fields).loop.steps == 10


def test_a_fresh_student_has_the_architecture_and_none_of_the_weights():
    folder = str(shared_wan_folder("i2v"))
    weights = {}
    for words in ((), ("fresh=true",), ("fresh=true", "loop.seed=1"), ("fresh=true",)):
        overrides = [f"student={folder}", "student_blocks=[]", "teacher_blocks=[]", *words]
        made = settings_of.load("configs/nano/video4edit.yaml", overrides, pick)
        player = made.players()[0]
        weights.setdefault(words, []).append({n: t.clone() for n, t in player.weights()})
    stored, fresh, other = (weights[w][0] for w in ((), ("fresh=true",), ("fresh=true", "loop.seed=1")))
    assert stored.keys() == fresh.keys()
    name = "blocks.0.attn1.to_q.weight"
    assert stored[name].shape == fresh[name].shape
    assert not torch.equal(stored[name], fresh[name])
    assert not torch.equal(other[name], fresh[name])
    assert torch.equal(weights[("fresh=true",)][1][name], fresh[name])


def test_runs_are_chosen_by_either_name_or_by_pattern():
    runs = ablate.plan(settings())
    assert ablate.select(runs, "*") == list(runs)
    chosen = [run.name for run in ablate.select(runs, "minus_*, prior_sft_256")]
    assert chosen == [*(f"minus_{t}" for t in ("velocity", "trajectory", "tail", "block", "flow", "own")), "sft"]
    assert len(ablate.select(runs, "prior_*")) == 8
    with pytest.raises(ConfigError, match=r"no run is called 'minus_it'.*choose among full, minus_velocity"):
        ablate.select(runs, "full,minus_it")


def test_impossible_settings_say_so():
    for fields in ({"counts": ()}, {"train_seeds": ()}, {"table": 0}, {"counts": (16, 0)}):
        with pytest.raises(ConfigError, match="counts"):
            settings(**fields)


def test_the_door_reads_the_words_and_a_mistake_is_one_sentence(tmp_path, capsys):
    words = [f"output={tmp_path}", f"road.bundle={tmp_path}", "counts=[4]", "runs=full"]
    for extra, told in (([], "make nano"), (["road.stepz=1"], "did you mean road.steps"), (["counts=a"], "counts")):
        assert cli.main(["ablate", *words, *extra]) != 0
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert told in lines[0]


# ---------------------------------------------------------------------------------------------------- sets


def sample(n: int) -> Sample:
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(n)).bfloat16()  # noqa: E731
    encoded = Encoded(
        clip_Cthw=draw(2, 2, 2, 2),
        known_Cthw=draw(2, 2, 2, 2),
        text_LE=draw(3, 6),
        null_LE=draw(1, 6),
        vision_NV=draw(4, 5),
        evolution_LE=draw(7, 6),
        teacher_known_Cthw=draw(2, 3, 2, 2),
        vision_last_NV=draw(4, 5),
        change_thw=draw(2, 2, 2).sigmoid(),
    )
    picture = Clip(torch.full((1, 3, 16, 16), n, dtype=torch.uint8))
    return Sample(f"s{n}", f"make it {n}", "it grows", picture, picture, encoded, None, "add")


def test_a_smaller_set_holds_the_same_bytes(tmp_path):
    with ShardWriter(tmp_path / "all", SetMeta("encoded", Grid(5, 16, 16)), samples_per_shard=3) as writer:
        for n in range(7):
            writer.add(sample(n))
    wanted = [6, 0, 2, 1]
    for _ in range(2):  # again is harmless
        ablate.take(tmp_path / "all", tmp_path / "few", [f"s{n}" for n in wanted])
    whole, few = ShardSet.open(tmp_path / "all"), ShardSet.open(tmp_path / "few")
    assert few.keys == [f"s{n}" for n in wanted]
    assert few.meta.settings["taken"] == 4
    for i, n in enumerate(wanted):
        assert {k: few.raw(i, k) for k in few.kinds(i)} == {k: whole.raw(n, k) for k in whole.kinds(n)}


# ------------------------------------------------------------------------------------- measuring and telling


def result(name: str, task: str, seed: int, success: float, edit: float, number: int = 0) -> Result:
    groups = ("local",) if task in demo.LOCAL else ("style",) if task in world.STYLES else ()
    scores = Scores(20.0, edit, 25.0, 0.9, 1.0, success)
    key = f"heldout-2-{number:06d}"
    return Result(key, "edit it", task, groups, name, 4, seed, Files("s", "t", "m", "o"), scores)


def results(name: str, *seeds: tuple[float, float]) -> list[Result]:
    """One edit of every task for every sampling seed, each with that seed's success and edit PSNR."""
    return [result(name, task, n, *values) for n, values in enumerate(seeds) for task in world.TASKS]


def test_with_one_training_the_spread_is_that_of_the_sampling_seeds():
    made = ablate.measured(Run("full", "distilled", 256), [(0, results("full", (1, 20), (0, 26)))], [100.0])
    row = made.row()
    assert (row.mean.success, row.mean.edit_psnr, row.mean.n) == (0.5, 23, 2 * len(world.TASKS))
    assert row.spread.success == pytest.approx(0.5**0.5)  # of 1 and 0, n - 1
    assert row.spread.edit_psnr == pytest.approx(18**0.5)  # of 20 and 26
    assert (made.seconds, made.trainings) == (100, 1)
    assert made.row("style").mean.n == 2 * len(world.STYLES)


def test_with_several_trainings_it_is_that_of_the_trainings():
    """Their means are 0.5 and 1; the sampling seeds' spread within the first does not count."""
    some = [(5, results("full", (1, 20), (0, 20))), (6, results("full", (1, 24), (1, 24)))]
    made = ablate.measured(Run("full", "distilled", 256), some, [100.0, 120.0])
    row = made.row()
    assert (row.mean.success, row.mean.edit_psnr, row.mean.n) == (0.75, 22, 4 * len(world.TASKS))
    assert row.spread.success == pytest.approx(0.125**0.5)
    assert row.spread.edit_psnr == pytest.approx(8**0.5)
    assert (made.seconds, made.trainings) == (110, 2)


def test_a_difference_counts_beyond_the_sum_of_both_spreads():
    def row(*successes: float):
        seeds = [(value, 20.0) for value in successes]
        return ablate.measured(Run("a", "sft", 1), [(0, results("a", *seeds))], [1.0]).row()

    one = replace(row(1, 1), mean=replace(row(1, 1).mean, success=0.8))  # spread 0
    assert ablate.difference(one, row(1, 0)) == "+0.30 (within)"  # 0.5 ± 0.71
    assert ablate.difference(one, row(0, 0)) == "+0.80"
    assert ablate.difference(row(0, 0), one) == "-0.80"
    assert ablate.difference(one, row(0)) == "+0.80 (no spread)"
    assert ablate.difference(one, None) == ""


@pytest.fixture
def small(tmp_path) -> AblateConfig:
    """Two counts, one training seed; the references and three runs are done."""
    config = settings(output=str(tmp_path / "out"), counts=(4, 8), table=8, train_seeds=(0,))
    (config.root / "stages").mkdir(parents=True)
    references = config.root / "references"
    references.mkdir()
    evaluator.write_results([*results("copy", (0, 12)), *results("init", (0.25, 13), (0.25, 13))], references)
    finish(config, "full", 200, (1, 20), (1, 20))
    finish(config, "minus_tail", 150, (0, 17), (0, 19))
    finish(config, "prior_distilled_4", 190, (0.5, 16), (0.5, 16))
    return config


def finish(config: AblateConfig, name: str, seconds: float, *seeds: tuple[float, float]) -> None:
    trained = Trained(named(name, counts=config.counts, table=config.table), 0, config)
    (trained.home / "edits").mkdir(parents=True)
    evaluator.write_results(results(trained.run.name, *seeds), trained.home / "edits")
    for stage in ("train", "export", "evaluate"):
        trained.marker(stage).write_bytes(to_json({"seconds": seconds, "headline": ""}))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_of_terms(small):
    head, _, *lines = cells(ablate.terms_table(ablate.read(small)))
    n = str(2 * len(world.TASKS))
    assert head == ["run", "edit PSNR over copy", "keep PSNR", "sharpness", "success", "over full", "n", "seconds"]
    assert lines == [
        ["copy", "0.0", "25.0", "1.00", "0.00", "", str(len(world.TASKS)), ""],
        ["init", "1.0 ± 0.0", "25.0 ± 0.0", "1.00 ± 0.00", "0.25 ± 0.00", "", n, ""],
        ["full", "8.0 ± 0.0", "25.0 ± 0.0", "1.00 ± 0.00", "1.00 ± 0.00", "", n, "200"],
        ["minus_tail", "6.0 ± 1.4", "25.0 ± 0.0", "1.00 ± 0.00", "0.00 ± 0.00", "-1.00", n, "150"],
    ]


def test_the_curves_table_finds_the_run_that_it_shares_with_the_other(small):
    found = ablate.read(small)
    head, _, *lines = cells(ablate.curve_table(small, found, "success"))
    assert head == ["training", "4", "8"]
    assert lines[0] == ["distilled, video-pretrained", "0.50 ± 0.00", "1.00 ± 0.00"]
    assert [line[1:] for line in lines[1:]] == [["", ""]] * 3
    gains = cells(ablate.curve_table(small, found, "edit_psnr"))
    assert gains[2] == ["distilled, video-pretrained", "4.0 ± 0.0", "8.0 ± 0.0"]


def test_the_report_holds_what_is_done_and_names_what_is_missing(small):
    ablate.write_report(small)
    text, told = (small.root / "report.md").read_text(), json.loads((small.root / "report.json").read_text())
    assert "| minus_tail " in text
    assert "![curve](curve.png)" in text
    assert Image.open(small.root / "curve.png").width > 500
    full = told["methods"]["full"]["4"]
    assert (full["overall"]["success"], full["overall"]["n"], full["overall"]["spread"]["edit_psnr"]) == (1, 22, 0)
    assert full["tasks"]["recolour"]["edit_psnr"] == 20
    assert told["runs"].keys() == {"full", "minus_tail", "prior_distilled_4"}
    assert told["runs"]["full"]["alias"] == "prior_distilled_8"
    assert told["runs"]["minus_tail"]["words"] == ["terms.tail=0"]
    assert len(told["missing"]) == len(ablate.plan(small)) - 3
    assert "fresh_sft_8" in told["missing"]


# --------------------------------------------------------------------------------------------------- walking


class Stub:
    """In place of everything that takes long; ``log`` says what was asked for, ``fail`` at what to break off."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.fail = [], ""
        for name in ("make_triplets", "write_evolutions", "roll_out", "check_shards"):
            monkeypatch.setattr(demo, name, self._stage(name))
        monkeypatch.setattr(demo, "check_bundle", lambda road: None)
        monkeypatch.setattr(demo, "content_hash", lambda model: "0" * 16)
        monkeypatch.setattr(demo, "train", self._train)
        monkeypatch.setattr(demo, "export", lambda run, out: (out.mkdir(parents=True), str(out))[1])
        monkeypatch.setattr(
            ablate, "read_triplets", lambda folder: [Triplet(str(n), "", folder, folder) for n in range(9)]
        )
        monkeypatch.setattr(ablate, "take", lambda *a: self._note(f"take {' '.join(a[2])} to {a[1].name}"))
        monkeypatch.setattr(evaluator, "evaluate", self._evaluate)

    def _note(self, what: str) -> str:
        if self.fail and self.fail in what:
            raise KeyboardInterrupt
        self.log.append(what)
        return what

    def _stage(self, name: str):
        def work(road: demo.DemoConfig) -> str:
            return self._note(f"{name} {road.triplets}")

        work.__name__ = name
        return work

    def _train(self, road, config, output, steps, words) -> str:
        for name in ("checkpoints", "weights"):
            (output / name).mkdir(parents=True, exist_ok=True)
        return self._note(f"train {output.parent.name} {steps}")

    def _evaluate(self, cases, methods, judge, folder, batch, processes) -> list[Result]:
        self._note(f"evaluate {folder.parent.name}")
        made = [r for m in methods for r in results(m.name, *[(0.5, 20.0)] * len(m.seeds))]
        folder.mkdir(parents=True, exist_ok=True)
        evaluator.write_results(made, folder)
        return made


@pytest.fixture
def stub(monkeypatch) -> Stub:
    return Stub(monkeypatch)


def tiny(tmp_path: Path, **fields) -> AblateConfig:
    road = demo.DemoConfig(per_task=1, steps=7)
    values = {"counts": (4, 8), "table": 4, "train_seeds": (0,), "runs": "full,fresh_sft_8", "road": road}
    return settings(**{"output": str(tmp_path / "out"), **values, **fields})


def test_a_walk_makes_data_once_and_goes_on_where_it_stopped(tmp_path, stub):
    stub.fail = "evaluate fresh"
    with pytest.raises(KeyboardInterrupt):
        ablate.walk(tiny(tmp_path))
    data = [f"{name} 8" for name in ("make_triplets", "write_evolutions", "roll_out", "check_shards")]
    first = [*data, "take 0 1 2 3 to shards-4", f"evaluate {tiny(tmp_path).root.name}"]
    assert stub.log == [*first, "train full.seed-0 7", "evaluate full.seed-0", "train fresh_sft_8.seed-0 7"]
    assert "| full " in (tiny(tmp_path).root / "report.md").read_text()
    stub.log, stub.fail = [], ""
    ablate.walk(tiny(tmp_path))
    assert stub.log == ["evaluate fresh_sft_8.seed-0"]
    home = tiny(tmp_path).root / "runs/full.seed-0"
    assert not (home / "train/checkpoints").exists()
    assert not (home / "train/weights").exists()
    assert not (home / "model").exists()


def test_seeds_and_runs_may_be_added_but_other_settings_may_not_change(tmp_path, stub, monkeypatch):
    ablate.walk(tiny(tmp_path, runs="full"))
    stub.log = []
    ablate.walk(tiny(tmp_path, runs="full,sft", train_seeds=(0, 1), keep_models=True))
    assert [line for line in stub.log if "train" in line] == [
        f"train {n} 7" for n in ("sft.seed-0", "full.seed-1", "sft.seed-1")
    ]
    assert (tiny(tmp_path).root / "runs/sft.seed-1/model").exists()
    told = json.loads((tiny(tmp_path).root / "report.json").read_text())
    assert told["runs"]["full"]["trainings"] == 2
    with pytest.raises(DataError, match=r"fresh_ratio was 1.0 and is now 2.0"):
        ablate.walk(tiny(tmp_path, fresh_ratio=2.0))
    monkeypatch.setattr(demo, "content_hash", lambda model: "1" * 16)
    with pytest.raises(DataError, match="models was"):
        ablate.walk(tiny(tmp_path))


def test_a_training_config_that_was_edited_meanwhile_is_named(tmp_path, stub):
    recipe = tmp_path / "recipe.yaml"
    text = Path("configs/nano/video4edit.yaml").read_text()
    recipe.write_text(text)
    road = demo.DemoConfig(per_task=1, steps=7, recipe=str(recipe))
    ablate.walk(tiny(tmp_path, runs="sft", road=road))
    recipe.write_text(re.sub(r"flow_share: .*", "flow_share: 0.99", text))
    with pytest.raises(DataError, match=r"flow_share was .* and is now 0.99"):
        ablate.walk(tiny(tmp_path, runs="sft", road=road))


# ----------------------------------------------------------------------------------------------------- chart


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (0.1, 0.9, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (-1.0, 8.5, (-2, 0, 2, 4, 6, 8, 10)),
        (3.0, 3.0, (2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6)),
    ],
)
def test_ticks_are_round_and_enclose(low, high, wanted):
    found = chart.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert found == pytest.approx(wanted)


def test_a_point_lies_where_its_values_say():
    axes = chart.Axes((16, 64, 256), (0.0, 0.5, 1.0))
    wide, high = chart.FINE * chart.WIDTH, chart.FINE * chart.HEIGHT
    assert axes.y(1.0) == 0
    assert axes.y(0.25) == 0.75 * high
    assert axes.x(64) == wide / 2
    assert axes.x(16) == pytest.approx(wide * 0.5 / 5)
    assert axes.x(128) - axes.x(64) == pytest.approx(axes.x(64) - axes.x(32))


def test_a_chart_shows_its_curves_in_their_colours():
    points = (chart.Point(4, 0.0), chart.Point(16, 1.0, 0.1))
    panels = [chart.Panel("a", (chart.Curve("one", points),)), chart.Panel("b", (chart.Curve("two", (), 1),))]
    colours = {colour for _, colour in chart.draw("title", "n", (4, 16), panels).getcolors(1 << 24)}
    assert {chart.COLOURS[0], chart.COLOURS[1], chart.GRID, chart.PAPER} <= colours
