"""A contact sheet shows source, student, average, teacher and target of the same edits each time, and measures them."""

from dataclasses import replace

import pytest
import torch
from builders import TEXT_WIDTH, VISION_TOKENS, VISION_WIDTH, C, shared_wan_folder

from v4e import flow
from v4e.config import Loop
from v4e.data.shards import SetMeta, ShardWriter
from v4e.dist import Ranks
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.eval import contact
from v4e.eval.contact import ContactSheet
from v4e.eval.metrics import edit_mask, score
from v4e.eval.sheet import MARGIN, SheetRow, draw
from v4e.models.codec import WanCodec
from v4e.nouns import Clip, Encoded, Grid, Rollout, Sample
from v4e.recipes.flow_matching import FlowMatching

GRID, TEACHER, K = Grid(5, 32, 32), Grid(9, 32, 32), 2


def rolled_out(n: int) -> Sample:
    draw = torch.Generator().manual_seed(n)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    def picture() -> Clip:
        return Clip((random(1, 3, 32, 32).sigmoid() * 255).to(torch.uint8))

    clip = (C, GRID.t, GRID.h, GRID.w)
    text, vision = random(3, TEXT_WIDTH), random(VISION_TOKENS, VISION_WIDTH)
    full, change = random(K, C, TEACHER.t, GRID.h, GRID.w), random(*clip[1:]).sigmoid()
    encoded = Encoded(random(*clip), random(*clip), text, text[:1], vision, text, full[0], vision, change)
    rollout = Rollout(torch.tensor([1.0, 0.5]), random(K, *clip), random(K, *clip), full, random(*clip))
    return Sample(f"s{n}", "make it red", "it turns red", picture(), picture(), encoded, rollout, "recolor")


@pytest.fixture(params=[True, False], ids=["rolled out", "encoded alone"])
def sheet(request, tmp_path) -> ContactSheet:
    with ShardWriter(tmp_path, SetMeta("rollout" if request.param else "encoded", GRID, TEACHER)) as writer:
        for n in range(3):
            writer.add(rolled_out(n) if request.param else replace(rolled_out(n), rollout=None))
    return ContactSheet(tmp_path, str(shared_wan_folder()), Ranks(), rows=2)


def test_what_is_missing_is_said_before_the_first_step(sheet, tmp_path):
    sheet.prepare()
    with pytest.raises(DataError, match="none"):
        replace(sheet, validation=tmp_path / "none").prepare()
    with pytest.raises(CheckpointError, match="no readable pipeline index"):
        (tmp_path / "model").mkdir()
        replace(sheet, codec=str(tmp_path / "model")).prepare()
    with ShardWriter(tmp_path / "empty", SetMeta("encoded", GRID, TEACHER)):
        pass
    with pytest.raises(DataError, match="empty: holds no sample to show"):
        replace(sheet, validation=tmp_path / "empty").prepare()


def test_a_sheet_reads_what_its_model_was_trained_on(sheet):
    recipe = FlowMatching(init="i2v", text="evolution", loop=Loop(validation=str(sheet.validation)))
    told = ContactSheet.of(recipe, Ranks())
    assert (told.text, told.codec, told.validation) == ("evolution", "i2v", str(sheet.validation))
    for text, name in (("instruction", "text_LE"), ("evolution", "evolution_LE")):
        samples = sheet._samples
        samples = [replace(s, encoded=replace(s.encoded, evolution_LE=s.encoded.evolution_LE[:2])) for s in samples]
        one = replace(sheet, text=text)
        one.__dict__["_samples"] = samples
        assert one._conditions.words_B.tolist() == [len(getattr(s.encoded, name)) for s in samples]
    with pytest.raises(ConfigError, match="key loop.validation: .* told both ends"):
        ContactSheet.of(replace(recipe, conditioned_on="first_and_last"), Ranks())


@pytest.mark.parametrize(("width", "shown"), [(32, 96), (128, 384), (480, 512), (1280, 512)])
def test_a_sheet_of_large_pictures_can_be_opened(width, shown):
    """Eleven of 720p in four columns, as they are, would be more pixels than Pillow opens."""
    picture = Clip(torch.zeros(1, 3, width * 9 // 16, width, dtype=torch.uint8))
    sheet = ContactSheet("", "", Ranks())
    sheet.__dict__["_samples"] = [replace(rolled_out(0), source=picture)]
    column = sheet._column("source")
    image = draw("title", [column], [SheetRow((picture,))] * 11)
    assert image.width - 2 * MARGIN == shown and image.height < 11 * shown


def test_source_makers_teacher_and_target_stand_side_by_side(sheet, monkeypatch):
    drawn = {}
    monkeypatch.setattr(contact, "draw", lambda title, columns, rows: drawn.update(columns=columns, rows=rows))
    latents = torch.randn(2, 2, C, GRID.t, GRID.h, GRID.w)
    edits = {"student": latents[0], "average": latents[1]}
    _, metrics = sheet.show(7, edits)
    codec, samples = WanCodec.load(str(shared_wan_folder()), Ranks().device), sheet._samples
    ends = [s.rollout.end_Cthw.float() for s in samples if s.rollout]
    wanted = {
        name: codec.decode_last(z) for name, z in (edits | ({"teacher": torch.stack(ends)} if ends else {})).items()
    }
    assert [c.title for c in drawn["columns"]] == ["source", "instruction", *wanted, "target"]
    for i, row in enumerate(drawn["rows"]):
        source, words, *made, target = row.cells
        assert words == "recolor:\nmake it red"
        pictures = [samples[i].source, *(clips[i] for clips in wanted.values()), samples[i].target]
        for found, picture in zip([source, *made, target], pictures, strict=True):
            assert torch.equal(found.frames_T3HW, picture.frames_T3HW)
    pairs = [(s.source.frames_T3HW[0], s.target.frames_T3HW[0]) for s in samples]
    each = [
        score(clip.frames_T3HW[-1], target, edit_mask(source, target)).psnr
        for clip, (source, target) in zip(wanted["average"], pairs, strict=True)
    ]
    assert metrics["average/psnr"] == pytest.approx(sum(each) / 2)
    assert {name.split("/")[0] for name in metrics} == {"student", "average"}


def test_the_same_noise_is_carried_down_the_same_grid_each_time(sheet):
    """A velocity that is the state itself: each Euler step multiplies the noise by what can be worked out."""
    calls = []

    def student(x, sigma_B, conditions):
        calls.append(float(sigma_B[0]))
        return (x,)

    first, second = sheet.edit({"student": student}), sheet.edit({"student": student})
    levels = flow.time_grid(4, 3.0)
    shrunk = torch.prod(1 + levels[1:] - levels[:-1])
    assert torch.equal(first, second) and first.shape == (2, C, GRID.t, GRID.h, GRID.w)
    torch.testing.assert_close(first, sheet._noise * float(shrunk))
    assert calls == pytest.approx([*levels[:-1].tolist()] * 2)
