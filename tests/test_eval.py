"""Every number of a report can be computed again from the pictures beside it."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image

from v4e.errors import DataError
from v4e.eval import report, run, sheet
from v4e.eval.report import Bar, Key, Report
from v4e.eval.run import Case, Method
from v4e.nouns import Clip

SIZE = 16


def picture(seed: int, frames: int = 1) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    return Clip(torch.randint(0, 256, (frames, 3, SIZE, SIZE), generator=generator).to(torch.uint8))


def case(index: int, task: str) -> Case:
    mask = torch.ones(SIZE, SIZE, dtype=torch.bool)
    if task != "snow":
        mask[:, : SIZE // 2] = False
    source, target, middle = picture(index), picture(100 + index), picture(200 + index, frames=3)
    groups = ("style",) if task == "snow" else ("local",)
    return Case(f"{task}-{index}", task, f"make {task}", source, target, mask, groups, middle)


CASES = [case(0, "recolour"), case(1, "recolour"), case(2, "snow")]


def noisy(cases, seeds, steps) -> list[Clip]:
    """Targets with noise that depends on the seed and shrinks with the steps."""
    made = []
    for c, seed in zip(cases, seeds, strict=True):
        noise = torch.randn(c.target.frames_T3HW.shape, generator=torch.Generator().manual_seed(seed)) * 40 / steps
        made.append(Clip((c.target.frames_T3HW + noise).clamp(0, 255).to(torch.uint8)))
    return made


def true_clip(cases, seeds, steps) -> list[Clip]:
    return [Clip.join([c.source, c.middle, c.target]) for c in cases]


METHODS = [
    Method("copy", run.copy_source),
    Method("teacher", true_clip, steps=(8,)),
    Method("student", noisy, steps=(1, 4), seeds=(0, 1, 2)),
]


def judge(case: Case, output: Clip) -> bool:
    return bool((output.frames_T3HW.float() - case.target.frames_T3HW.float()).abs().mean() < 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    run.evaluate(CASES, METHODS, judge, folder, batch=2)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return run.aggregate(run.read_results(folder))


def row(rows, method, steps, group="overall", seed=None):
    return next(r for r in rows if (r.method, r.steps, r.group, r.seed) == (method, steps, group, seed))


def test_recomputed_from_the_files(folder):
    assert run.recompute(folder, judge) == run.read_results(folder)
    assert run.recompute(folder) == run.read_results(folder)


def test_every_edit_is_on_disk(folder):
    results = run.read_results(folder)
    assert len(results) == 3 * (1 + 1 + 2 * 3)
    assert all((folder / r.files.output).is_file() for r in results)
    assert torch.equal(run.case_of(results[0], folder).mask_HW, CASES[0].mask_HW)


def test_a_perfect_clip_scores_perfectly(rows):
    mean = row(rows, "teacher", 8).mean
    assert (mean.edit_psnr, mean.middle_psnr, mean.success, mean.sharpness) == (100, 100, 1, 1)
    assert row(rows, "student", 4).mean.middle_psnr is None


def test_means_and_spread_by_hand(folder, rows):
    mine = [r for r in run.read_results(folder) if (r.method, r.steps) == ("student", 4)]
    seeds = [sum(r.metrics.edit_psnr for r in mine if r.seed == s) / 3 for s in (0, 1, 2)]
    overall = row(rows, "student", 4)
    assert overall.mean.edit_psnr == pytest.approx(sum(seeds) / 3)
    assert overall.spread.edit_psnr == pytest.approx(torch.tensor(seeds, dtype=torch.float64).std().item())
    assert row(rows, "student", 4, seed=1).mean.edit_psnr == pytest.approx(seeds[1])
    assert (overall.mean.n, overall.mean.n_keep) == (9, 6)


def test_a_style_keeps_nothing_and_says_so(rows):
    snow = row(rows, "student", 4, "snow")
    assert (snow.mean.keep_psnr, snow.mean.n_keep, snow.mean.n) == (None, 0, 3)
    assert row(rows, "student", 4, "style").mean == snow.mean


def test_seeds_differ_between_cases_and_seeds(folder):
    seen = []

    def watch(cases, seeds, steps):
        seen.extend(seeds)
        return noisy(cases, seeds, steps)

    run.evaluate(CASES, [Method("student", watch, (4,), (0, 1))], judge, folder / "again")
    assert len(set(seen)) == len(CASES) * 2


class Painter:
    """A method's ``make`` that counts its batches, and kills its process at one of them."""

    def __init__(self, last: int = 0) -> None:
        self.last, self.asked = last, []

    def __call__(self, cases, seeds, steps) -> list[Clip]:
        self.asked.append(([c.id for c in cases], steps))
        if len(self.asked) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return noisy(cases, seeds, steps)


def painted(folder, painter: Painter, identity: str = "weights 1") -> list[run.Result]:
    methods = [METHODS[0], Method("student", painter, (1, 4), (0, 1), identity)]
    return run.evaluate(CASES, methods, judge, folder, batch=2)


def killed(folder, last: int) -> None:
    def work() -> None:
        torch.set_num_threads(1)  # the parent's pool of threads is not there
        painted(folder, Painter(last))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_it_goes_on_after_the_last_finished_batch(tmp_path):
    whole = painted(tmp_path / "whole", every := Painter())
    killed(tmp_path / "cut", last=6)
    resumed = painted(tmp_path / "cut", rest := Painter())
    assert len(every.asked) == 8 and rest.asked == every.asked[5:]
    assert resumed == whole == run.recompute(tmp_path / "cut", judge)
    assert not (tmp_path / "cut" / run.UNITS).exists()


def test_finished_batches_of_other_weights_are_made_again(tmp_path):
    killed(tmp_path, last=6)
    painted(tmp_path, painter := Painter(), "weights 2")
    assert len(painter.asked) == 8


def test_a_finished_evaluation_is_made_again_when_asked(tmp_path):
    painted(tmp_path, Painter())
    painted(tmp_path, painter := Painter())
    assert len(painter.asked) == 8


def test_bars(rows):
    lead = Bar("edit_psnr", Key("student", 4), over=Key("student", 1), beyond_spread=True)
    held = report.hold(
        [
            Bar("success", Key("teacher", 8), low=0.85),
            Bar("sharpness", Key("teacher", 8), low=1.1, high=1.2),
            lead,
            replace(lead, row=Key("student", 1), over=Key("student", 4)),
            Bar("psnr", Key("nobody", 4), low=1),
        ],
        rows,
    )
    assert [o.passed for o in held] == [True, False, True, False, False]
    assert held[2].low > 0 and held[4].value is None


def test_report_files(rows, tmp_path):
    bars = report.hold([Bar("edit_psnr", Key("student", 4, "recolour"), low=8, over=Key("copy", 0, "recolour"))], rows)
    made = Report(tuple(rows), ("recolour", "snow"), bars, seconds={"evaluate": 3.2}, notes=("A note.",))
    report.write(made, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    student = saved["methods"]["student"]["4"]
    assert student["overall"]["edit_psnr"] == row(rows, "student", 4).mean.edit_psnr
    assert student["seeds"]["2"]["tasks"]["snow"]["n"] == 1
    assert set(student["groups"]) == {"style", "local"} and "spread" in student["overall"]
    assert saved["bars"][0]["passed"] and saved["seconds"] == {"evaluate": 3.2}
    text = (tmp_path / "report.md").read_text()
    assert "student@4 recolour: edit PSNR over copy recolour" in text and "A note." in text


def test_refusals(folder, tmp_path):
    with pytest.raises(DataError, match="two cases are called"):
        run.evaluate([CASES[0], CASES[0]], METHODS, judge, tmp_path)
    with pytest.raises(DataError, match="made clips of"):
        run.evaluate(CASES, [Method("short", lambda *_: [])], judge, tmp_path)
    (tmp_path / run.LINES).write_text('{"id": "x"}\n')
    with pytest.raises(DataError, match=r"edits.jsonl:1"):
        run.read_results(tmp_path)


def test_sheet_shows_every_cell(tmp_path):
    columns = [sheet.Column("source", 3), sheet.Column("instruction", text_width=90), sheet.Column("teacher", 2)]
    white = Clip(torch.full((3, 3, SIZE, SIZE), 255, dtype=torch.uint8))
    red = Clip(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, SIZE, SIZE))
    sheet.save(tmp_path / "sheet.png", "A title", columns, [sheet.SheetRow((red, "turn the square blue", white))] * 2)
    drawn = Image.open(tmp_path / "sheet.png").convert("RGB")
    reds = sum(n for n, colour in drawn.getcolors(1 << 20) if colour == (255, 0, 0))
    assert reds == 2 * (3 * SIZE) ** 2
