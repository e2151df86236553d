"""What we sample is what stock diffusers samples; and batches of different images equal one by one."""

import json

import numpy as np
import pytest
import torch
from builders import C, one_thread, shared_wan_folder  # noqa: F401  (a fixture for all tests here)
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image

from v4e import flow
from v4e.errors import CheckpointError, DataError, ShapeError
from v4e.nouns import Clip
from v4e.pipelines import (
    Card,
    EditPipeline,
    Guidance,
    PipelineEditor,
    TeacherPipeline,
    as_clip,
    as_image,
    denoise,
    fed_level,
    few_step_scheduler,
    noise_of,
    scheduler_at,
)

SIZE = 32


def picture(seed: int, height: int = SIZE, width: int = SIZE) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def stock(kind: str) -> WanImageToVideoPipeline:
    pipe = WanImageToVideoPipeline.from_pretrained(shared_wan_folder(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_call(pipe, image, prompt, seed, *, frames, steps, kind="np", guidance=1.0, last=None):
    return pipe(
        image=image,
        prompt=prompt,
        last_image=last,
        height=SIZE,
        width=SIZE,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type=kind,
    ).frames[0]


def to_uint8(frames_THW3: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((frames_THW3 * 255).round().astype(np.uint8)).movedim(-1, 1)


@pytest.fixture(scope="module")
def editor() -> EditPipeline:
    pipe = EditPipeline.from_pretrained(shared_wan_folder("i2v"), attention="native")
    pipe.scheduler = few_step_scheduler(3.0)
    return pipe


@pytest.fixture(scope="module")
def teacher() -> TeacherPipeline:
    return TeacherPipeline.from_pretrained(shared_wan_folder("flf2v"), attention="native")


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (2, 3.0)])
def test_edit_equals_stock_diffusers(editor, steps, guidance):
    pipe = stock("i2v")
    pipe.scheduler = few_step_scheduler(3.0)
    image, text = picture(1), "make the sky red"
    latents = stock_call(pipe, image, text, 7, frames=5, steps=steps, guidance=guidance, kind="latent")
    ours = editor.edit_latents([as_clip(image)], [text], [7], steps, guidance, 5)
    assert torch.equal(ours[0], latents)
    frames = to_uint8(stock_call(pipe, image, text, 7, frames=5, steps=steps, guidance=guidance))
    clip = editor(image, text, seed=7, steps=steps, guidance=guidance, frames=5, return_frames=True)
    assert torch.equal(clip.frames_T3HW, frames)
    kept = editor(image, text, seed=7, steps=steps, guidance=guidance, frames=5)
    assert torch.equal(kept.frames_T3HW, frames[-1:])


def test_teacher_equals_stock_diffusers_with_its_own_scheduler(teacher):
    pipe, first, last = stock("flf2v"), picture(1), picture(2)
    frames = to_uint8(stock_call(pipe, first, "the sky turn red", 3, frames=9, steps=5, guidance=2.0, last=last))
    clips = teacher(
        [as_clip(first)], [as_clip(last)], ["the sky turn red"], seeds=[3], frames=9, steps=5, guidance=Guidance(2.0)
    )
    assert torch.equal(clips[0].frames_T3HW, frames)


def test_a_rollout_at_the_schedulers_own_levels_equals_stock_diffusers(teacher):
    first, last, text = picture(1), picture(2), "the sky turn red"
    latents = stock_call(stock("flf2v"), first, text, 3, frames=9, steps=5, guidance=2.0, last=last, kind="latent")
    grid = teacher.grid(9, (SIZE, SIZE))
    told = teacher.told([as_clip(first)], [text], grid, [as_clip(last)])
    teacher.scheduler.set_timesteps(5)
    noise, levels = noise_of([3], C, grid.t, grid.h, grid.w), teacher.scheduler.sigmas.clone()
    assert torch.equal(teacher.rollout(noise, told, levels, guidance=Guidance(2.0)).end_BCthw[0], latents)


def test_a_batch_of_different_images_equals_one_by_one(editor, teacher):
    images, texts = [as_clip(picture(i)) for i in range(3)], ["add a dog", "make night", "replace the car with a cat"]
    batch = editor.edit_latents(images, texts, [5, 6, 7], 4, 2.0, 5)
    alone = [editor.edit_latents([i], [t], [s], 4, 2.0, 5) for i, t, s in zip(images, texts, [5, 6, 7], strict=True)]
    assert torch.allclose(batch, torch.cat(alone), atol=2e-5)
    lasts = [as_clip(picture(i + 10)) for i in range(3)]
    grid = teacher.grid(9, (SIZE, SIZE))
    conditions = teacher.told(images, texts, grid, lasts)
    noise, levels = noise_of([1, 2, 3], C, grid.t, grid.h, grid.w), flow.union_grid((1, 2, 4), 3.0)
    together = teacher.rollout(noise, conditions, levels, guidance=Guidance(2.0))
    for b in range(3):
        told = teacher.told(images[b : b + 1], texts[b : b + 1], grid, lasts[b : b + 1])
        single = teacher.rollout(noise[b : b + 1], told, levels, guidance=Guidance(2.0))
        assert torch.allclose(together.end_BCthw[b], single.end_BCthw[0], atol=2e-5)
        assert torch.allclose(together.v_BKCthw[b], single.v_BKCthw[0], atol=2e-5)


def test_edit_batch_is_the_edit_of_each_and_folding_changes_rounding_only(editor):
    images, texts = [as_clip(picture(i)) for i in range(3)], ["add a dog", "make night", "snow"]
    done = []
    arguments = {"steps": 2, "frames": 5, "batch": 2}
    plain = editor.edit_batch(images, texts, [1, 2, 3], fold=False, progress=done.append, **arguments)
    folded = editor.edit_batch(images, texts, [1, 2, 3], fold=True, **arguments)
    assert done == [2, 3]
    for image, text, seed, a, b in zip(images, texts, [1, 2, 3], plain, folded, strict=True):
        alone = editor(image, text, seed=seed, steps=2, frames=5).frames_T3HW.int()
        assert (alone - a.frames_T3HW.int()).abs().max() <= 1
        assert (alone - b.frames_T3HW.int()).abs().max() <= 1


def test_folding_does_not_leak_into_a_later_plain_edit(editor):
    image = as_clip(picture(4))
    before = editor.edit_latents([image], ["snow"], [1], 2, 1.0, 5)
    editor.edit_batch([image], ["snow"], [1], steps=2, frames=5, fold=True)
    assert torch.equal(before, editor.edit_latents([image], ["snow"], [1], 2, 1.0, 5))


# ------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 16.0])
def test_few_step_levels_and_fed_timesteps_are_stocks(shift):
    for steps in (1, 2, 3, 4, 8, 20, 50):
        scheduler = few_step_scheduler(shift)
        scheduler.set_timesteps(steps)
        assert torch.equal(scheduler.sigmas, flow.time_grid(steps, shift).float())
        fed = [fed_level(s, int(t)) for s, t in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True)]
        assert torch.equal(flow.timestep(torch.tensor(fed)), scheduler.timesteps)


def test_few_step_scheduler_is_euler():
    scheduler, x = few_step_scheduler(3.0), torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)

    def field(x, sigma_B, conditions=None):
        return (torch.tanh(x) + flow.like(sigma_B, x),)

    ours = denoise(field, scheduler, x, None, None, Guidance())
    euler = flow.euler(lambda x, s: field(x, s)[0], x, flow.time_grid(4, 3.0))
    assert torch.allclose(ours, euler, atol=1e-5)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_a_rollout_stops_exactly_on_the_given_levels(solver):
    base = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=16.0)
    levels = flow.union_grid((1, 2, 4, 8), 3.0)
    scheduler = scheduler_at(base, solver, levels)
    assert torch.equal(scheduler.sigmas, levels.float())
    assert torch.equal(flow.timestep(levels[:-1]), scheduler.timesteps)


def test_rollout_records_what_was_fed_and_a_linear_field_is_exact(teacher):
    """With v = noise - x0 everywhere, states lie on the straight line and the end is x0, whatever the solver."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(1, C, 2, 4, 4, generator=g), torch.randn(1, C, 2, 4, 4, generator=g)
    levels, seen = flow.union_grid((1, 2, 4), 3.0), []
    for solver in ("unipc", "euler"):
        seen.clear()
        scheduler = scheduler_at(teacher.scheduler, solver, levels)
        end = denoise(
            lambda x, s, c: (noise - x0,), scheduler, noise, None, None, Guidance(), lambda *stop: seen.append(stop)
        )
        assert torch.allclose(end, x0, atol=1e-5)
        for sigma, x, v in seen:
            assert torch.allclose(x, flow.mix(x0, noise, torch.tensor(sigma)), atol=1e-5)
            assert torch.equal(v, noise - x0)
        assert torch.tensor([s for s, *_ in seen]).equal(levels[:-1].float())


def test_guidance_acts_within_its_interval_only():
    calls = []

    def field(x, sigma_B, conditions):
        calls.append((round(float(sigma_B[0]), 3), conditions))
        return (torch.full_like(x, {"text": 3.0, "null": 1.0}[conditions]),)

    scheduler = few_step_scheduler(1.0)
    scheduler.set_timesteps(4)
    told, x, guidance = [], torch.zeros(1, 1, 1, 1, 1), Guidance(2.0, 0.4, 0.8)
    denoise(field, scheduler, x, "text", "null", guidance, lambda sigma, x, v: told.append(v.item()))
    assert told == [3.0, 5.0, 5.0, 3.0]  # 1 + 2 * (3 - 1) at 0.75 and 0.5
    assert [sigma for sigma, kind in calls if kind == "null"] == [0.75, 0.501]


# ------------------------------------------------------------------------------------------------- folders


def test_a_saved_pipeline_is_a_stock_folder_and_comes_back(editor, tmp_path):
    editor.card = Card(frames=5, sizes=((SIZE, SIZE),), shift=3.0, steps=2)
    editor.save_pretrained(tmp_path / "student")
    index = json.loads((tmp_path / "student/model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    frames = to_uint8(stock_call(pipe, picture(1), "snow", 0, frames=5, steps=2))
    again = EditPipeline.from_pretrained(tmp_path / "student", attention="native")
    assert again.card == editor.card
    assert torch.equal(again(picture(1), "snow", return_frames=True).frames_T3HW, frames)


def test_missing_folders_and_broken_cards_say_so(tmp_path):
    with pytest.raises(CheckpointError, match="no-such-folder"):
        EditPipeline.from_pretrained(tmp_path / "no-such-folder")
    (tmp_path / "v4e.json").write_text('{"frames": 5}')
    with pytest.raises(CheckpointError, match="v4e.json"):
        Card.read(tmp_path)


def test_bad_requests_say_what_is_wrong(editor):
    with pytest.raises(DataError, match="empty"):
        editor(picture(1), "  ")
    with pytest.raises(ShapeError, match="H = 40"):
        editor(picture(1, 40, 32), "snow", frames=5)


def test_a_photograph_of_any_size_keeps_its_size_and_its_exif_turn(editor, monkeypatch):
    seen = []
    monkeypatch.setattr(editor, "card", Card(frames=5, sizes=((32, 64), (64, 32), (32, 32)), steps=1))

    def echo(self, image, text, **_):
        seen.append(image.size)
        return as_clip(image)

    monkeypatch.setattr(EditPipeline, "__call__", echo)
    photo = picture(1, height=50, width=110)
    assert editor.edit_photo(photo, "snow").size == (110, 50)
    exif = photo.getexif()
    exif[0x0112] = 6  # stored lying on its side
    photo.info["exif"] = exif.tobytes()
    assert editor.edit_photo(photo, "snow").size == (50, 110)
    assert seen == [(64, 32), (32, 64)]


def test_editor_verb_and_pictures_round_trip(editor):
    clip = as_clip(picture(3))
    assert torch.equal(as_clip(as_image(clip)).frames_T3HW, clip.frames_T3HW)
    monk = PipelineEditor(editor, steps=1)
    assert torch.equal(monk(clip, "snow", seed=2).frames_T3HW, editor(clip, "snow", seed=2, steps=1).frames_T3HW)
    assert isinstance(monk(clip, "snow", seed=2), Clip)
