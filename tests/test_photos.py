"""Photographs as people have them: each edited, or refused in one readable sentence; what was kept is really there."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import C, shared_wan_folder
from diffusers import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_photographs import SNOW, half_clear, odd_files, picture, saved, served, table
from PIL import Image, ImageCms

from v4e import flow, photos
from v4e.errors import ConfigError, DataError, V4EError
from v4e.jobs import Job, Settings, parse
from v4e.nouns import Conditions
from v4e.pipelines import Card, EditPipeline, Guidance, denoise_reasoning, scheduler_at
from v4e.studio import QUARANTINE, Memory, Studio, run_batch, settle, weights_hash

RECIPE = json.dumps({"instruction": 'say "snow" \N{SNOWFLAKE}', "seed": 7}).encode()


@pytest.fixture(scope="module")
def studio() -> Studio:
    pipeline = EditPipeline.from_pretrained(shared_wan_folder("i2v"), attention="native")
    pipeline.card = Card(frames=5, sizes=((32, 48), (48, 32)), steps=2)
    return Studio(pipeline, "tiny", weights_hash(pipeline.backbone))


# ------------------------------------------------------------------------------------------------- reading


def test_every_odd_photograph_is_edited_or_refused_in_one_sentence(studio, tmp_path):
    with served(tmp_path) as url:
        rows = {name: (code, said) for name, code, said in table(tmp_path, studio, url)}
    assert len(rows) >= 50
    for code, said in rows.values():
        assert "\n" not in said and len(said) < 400 and "Traceback" not in said and " at 0x" not in said
        assert code in (0, 3, 4)
    refused = {name for name, (code, _) in rows.items() if code}
    assert refused == REFUSED
    sizes = {"1x1.png": "1 x 1", "8000x6000.jpg": "8000 x 6000", "lying on its side.jpg": "97 x 130"}
    for name, size in sizes.items():
        assert rows[name][1].endswith(size)
    assert "JPEG" in rows["8000x6000.jpg"][1] and "PNG RGBA" in rows["palette with alpha.png"][1]


REFUSED = {
    "7x4000.png", "4000x7.jpg", "floating point.tif", "truncated.jpg", "truncated.png", "a bit flipped.png", "bomb.png",
    "text.png", "page.jpg", "drawing.svg", "program.eps", "empty.jpg", "a folder", "missing.jpg", "/dev/zero",
    "http://host/missing.jpg", "https://me:...@example.org/a.jpg", "pipe:cat a.jpg",
    *(f"instruction: {what}" for what in ("empty", "blank", "invisible", "emoji only")),
    *(f"instruction: {what}" for what in ("10,000 characters", "600 words", "half an emoji")),
}  # fmt: skip


def test_sixteen_bits_keep_their_upper_eight():
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert np.asarray(photos.decode(saved(deep, "PNG")).rgb).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]


def test_transparency_is_laid_on_white_and_remembered():
    dot = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    dot.putpixel((1, 0), (255, 0, 0, 255))
    photo = photos.decode(saved(dot, "PNG"))
    assert np.asarray(photo.rgb).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert photo.alpha and np.asarray(photo.alpha).tolist() == [[0, 255]]
    assert photos.decode(saved(picture("RGBA"), "PNG")).alpha is None  # all opaque


def test_orientation_turns_the_pixels_and_is_not_written_again():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    photo = photos.decode(saved(Image.linear_gradient("L").resize((40, 20)), "PNG", exif=exif))
    assert photo.rgb.size == (20, 40)
    assert photo.rgb.getpixel((0, 0)) > photo.rgb.getpixel((19, 0))  # what was the top, dark, is now on the right
    again = Image.open(io.BytesIO(photos.encode(photo.rgb, Path("a.jpg"), RECIPE, photo)))
    assert again.size == (20, 40) and 0x0112 not in again.getexif()


def test_a_profile_of_lights_is_kept_and_one_of_greys_is_gone_through():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = photos.decode(saved(picture(), "PNG", icc_profile=srgb))
    assert photo.profile == srgb and photo.rgb.tobytes() == picture().tobytes()
    for suffix in photos.KINDS:
        written = Image.open(io.BytesIO(photos.encode(photo.rgb, Path(f"a{suffix}"), RECIPE, photo)))
        assert written.info.get("icc_profile") == srgb, suffix
    inks = photos.decode(saved(picture("CMYK"), "JPEG", icc_profile=srgb))
    assert inks.profile is None and inks.rgb.mode == "RGB"


# ------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("suffix", photos.KINDS)
def test_every_format_tells_its_recipe_and_keeps_what_transparency_it_can(suffix):
    photo = photos.decode(saved(half_clear(), "PNG"))
    content = photos.encode(photo.rgb, Path(f"edit{suffix}"), RECIPE, photo)
    assert photos.recipe_in(content) == json.loads(RECIPE)
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == photo.rgb.size
        assert image.has_transparency_data == photos.KINDS[suffix].alpha
        if suffix == ".png":
            assert image.getchannel("A").tobytes() == photo.alpha.tobytes()


def test_a_file_without_a_recipe_says_so():
    for content in (saved(picture(), "PNG"), b"no picture"):
        with pytest.raises(DataError, match="no recipe"):
            photos.recipe_in(content, "a.png")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.binary(min_size=1, max_size=64))
def test_what_is_torn_is_refused_and_never_crashes(width, height, noise):
    whole = saved(picture(size=(width, height)), "PNG")
    at = noise[0] * len(whole) // 256
    torn = whole[:at] + noise + whole[at + len(noise) :]
    try:
        assert photos.decode(torn, "torn.png").rgb.size == (width, height)
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["webp", "gif", "mp4"])
def test_an_evolution_moves(kind):
    if kind == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "green", "blue")]
    content = photos.animate(frames, Path(f"a.{kind}"), RECIPE)
    if kind == "mp4":
        assert content[4:8] == b"ftyp"
    else:
        image = Image.open(io.BytesIO(content))
        assert image.n_frames == 3 and image.size == (32, 24)


def test_a_strip_holds_every_frame():
    strip = photos.strip([Image.new("RGB", (2, 3), colour) for colour in ("red", "blue")])
    assert strip.size == (5, 3)
    assert [strip.getpixel((x, 1)) for x in (0, 2, 4)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]


# ---------------------------------------------------------------------------------------------------- jobs


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"photo": "a.jpg", "instruction": "snow"', "no JSON"),
        ('["a.jpg", "snow"]', "no JSON object"),
        ('{"instruction": "snow"}', "photo is missing"),
        ('{"photo": 3, "instruction": "snow"}', "photo is 3 and no text"),
        ('{"photo": "a.jpg", "instruction": "snow", "sead": 3}', "did you mean seed"),
        ('{"photo": "a.jpg", "instruction": "snow", "seed": -1}', "seed=-1"),
        ('{"photo": "a.jpg", "instruction": "snow", "seed": true}', "seed=True"),
        ('{"photo": "a.jpg", "instruction": "snow", "steps": 0}', "steps=0"),
        ('{"photo": "a.jpg", "instruction": "snow", "guidance": NaN}', "guidance=nan"),
        ('{"photo": "a.jpg", "instruction": "snow", "frames": "avi"}', "frames='avi'"),
        ('{"photo": "a.jpg", "instruction": "snow", "output": "../b.png"}', "out of the folder"),
        ('{"photo": "a.jpg", "instruction": "snow", "output": "b.tiles"}', "no picture format"),
        ('{"photo": "a.jpg", "instruction": "snow", "output": "%s.png"}' % ("b" * 300), "too long a name"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_bad_line_says_what_is_wrong_with_it(line, said, tmp_path):
    with pytest.raises(V4EError, match=said):
        parse(line.encode(), 1, tmp_path, tmp_path / "out", Settings())


def test_a_line_overrides_the_defaults_and_is_named_by_its_number(tmp_path):
    line = json.dumps({"photo": "http://h/My photo.webp?x=1", "instruction": SNOW, "seed": 5, "steps": 3}).encode()
    job = parse(line, 12, tmp_path, tmp_path / "out", Settings(seed=1, guidance=2.0))
    assert job.settings == Settings(seed=5, steps=3, guidance=2.0)
    assert job.output == tmp_path / "out" / "000012-My-photo.webp"
    local = parse(b'{"photo": "b.gif", "instruction": "snow"}', 3, tmp_path, tmp_path / "out", Settings())
    assert (local.photo, local.output.name) == (str(tmp_path / "b.gif"), "000003-b.png")


def test_no_photograph_is_written_over(tmp_path):
    with pytest.raises(DataError, match="written over"):
        Job(str(tmp_path / "a.jpg"), SNOW, tmp_path / "." / "a.jpg")
    with pytest.raises(DataError, match="written over"):
        Job(str(tmp_path / "a.frames.png"), SNOW, tmp_path / "a.jpg", Settings(frames="strip"))
    Job(str(tmp_path / "a.frames.png"), SNOW, tmp_path / "a.jpg")


# ------------------------------------------------------------------------------------------------- batches


def _batch(folder, lines) -> None:
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_batch_goes_on_where_it_was_stopped_and_makes_again_only_what_changed(studio, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(odd_files()["grey.jpg"])
    lines = [{"photo": "a.jpg", "instruction": text, "output": f"{text}.png"} for text in ("snow", "night", "red")]
    _batch(tmp_path, [*lines, {"photo": "a.jpg", "instruction": "", "output": "none.png"}, lines[0]])
    out, made = tmp_path / "out", Studio.make
    calls = []

    def stopping(self, job, *args):
        calls.append(job.instruction)
        if job.instruction == "night" and len(calls) == 2:
            raise KeyboardInterrupt
        return made(self, job, *args)

    monkeypatch.setattr(Studio, "make", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_batch(studio, tmp_path / "jobs.jsonl", out, Settings(steps=1))
    first = (out / "snow.png").stat()
    tally = run_batch(studio, tmp_path / "jobs.jsonl", out, Settings(steps=1))
    assert (tally.made, tally.kept, tally.refused) == (2, 1, 2)
    assert calls == ["snow", "night", "night", "red"]
    assert (out / "snow.png").stat().st_mtime_ns == first.st_mtime_ns
    refused = [json.loads(line) for line in (out / QUARANTINE).read_text().splitlines()]
    assert [entry["line"] for entry in refused] == [4, 5]
    assert "empty" in refused[0]["error"] and "line 1 writes the same output" in refused[1]["error"]
    assert not [*out.glob(".tmp-*")]

    (tmp_path / "a.jpg").write_bytes(odd_files()["profile.jpg"])  # another photograph under the same name
    (out / "red.png").write_bytes(b"torn")
    again = run_batch(studio, tmp_path / "jobs.jsonl", out, Settings(steps=1))
    assert (again.made, again.kept, again.refused) == (3, 0, 2)


def test_an_evolution_is_that_of_the_edit_beside_it(studio, tmp_path):
    (tmp_path / "a.jpg").write_bytes(odd_files()["grey.jpg"])
    out, line = tmp_path / "out", {"photo": "a.jpg", "instruction": SNOW, "output": "a.png"}

    def evolution(**asked) -> tuple[bytes, int]:
        _batch(tmp_path, [line | asked])
        made = run_batch(studio, tmp_path / "jobs.jsonl", out, Settings(steps=1)).made
        return (out / "a.frames.png").read_bytes(), made

    first, _ = evolution(frames="strip", seed=0)
    assert evolution(seed=0) == (first, 0) and evolution(seed=1) == (first, 1)
    second, made = evolution(frames="strip", seed=1)
    assert made == 1 and second != first and evolution(frames="strip", seed=1) == (second, 0)
    _batch(tmp_path, [line | {"frames": "strip"}, line | {"frames": "strip", "output": "a.webp"}])
    assert run_batch(studio, tmp_path / "jobs.jsonl", out, Settings(steps=1)).refused == 1
    assert "a.frames.png: line 1 writes the same output" in (out / QUARANTINE).read_text()


def test_an_edit_tells_all_that_determines_it(studio, tmp_path):
    content = odd_files()["profile.jpg"]
    job = Job("a.jpg", SNOW, tmp_path / "b.webp", Settings(seed=3, frames="webp"))
    recipe = studio.recipe(job, content)
    files = studio.make(job, photos.decode(content), recipe)
    assert [path.name for path in files] == ["b.frames.webp", "b.webp"]
    said = photos.recipe_in(files[tmp_path / "b.webp"])
    assert said == json.loads(recipe)
    assert (said["instruction"], said["seed"], said["steps"], said["model"]) == (SNOW, 3, 2, "tiny")
    assert (said["dtype"], said["frames"]) == ("float32", "webp") and "vae_tiling" not in said
    small = replace(studio, memory=Memory(torch.bfloat16, vae_tiling=True))
    other = json.loads(small.recipe(job, content))
    assert {k for k in other if other[k] != said.get(k)} == {"dtype", "vae_tiling"}
    moving = Image.open(io.BytesIO(files[tmp_path / "b.frames.webp"]))
    assert moving.n_frames == 5 and abs(moving.width / moving.height - 130 / 97) < 0.05


# ------------------------------------------------------------------------------------- reasoning and memory


def test_reasoning_frames_are_dropped_and_off_is_the_edit_of_before(studio):
    editor, seen = studio.pipeline, []
    small = picture(size=(48, 32))
    plain = editor(small, SNOW, seed=1, return_frames=True)
    off = editor(small, SNOW, seed=1, return_frames=True, reasoning_frames=0, reasoning_steps=0)
    assert torch.equal(plain.frames_T3HW, off.frames_T3HW)
    hook = editor.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    try:
        thought = editor(small, SNOW, seed=1, steps=3, return_frames=True, reasoning_frames=13, reasoning_steps=2)
    finally:
        hook.remove()
    assert seen == [4, 4, 2]  # 13 frames are 4 latent ones
    assert len(thought) == 5 and thought.size == (32, 48)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_dropping_frames_leaves_a_straight_path_exact(solver, steps):
    """With v = noise - x0 the ends arrive at x0's ends, whenever the others leave and whatever the solver remembers."""
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, C, 4, 2, 2, generator=g) for _ in range(2))
    base = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler = scheduler_at(base, solver, flow.time_grid(3, 3.0))

    def field(x_BCthw, sigma_B, conditions):
        v = noise - x0
        assert conditions.known_BCthw.shape[2] == conditions.known_mask_B4thw.shape[2] == x_BCthw.shape[2]
        return (v if x_BCthw.shape[2] == 4 else v[:, :, [0, -1]],)

    told = Conditions(torch.zeros(1, 1, 1), torch.ones(1), torch.zeros(1, 1, 1), x0, torch.zeros(1, 4, 4, 2, 2))
    end = denoise_reasoning(field, scheduler, noise, told, None, Guidance(), lambda *_: None, steps)
    assert torch.allclose(end, x0[:, :, [0, -1]], atol=1e-5)


def test_half_a_reasoning_is_refused(studio):
    with pytest.raises(ConfigError, match="reasoning_steps=0"):
        studio.pipeline(picture(size=(48, 32)), SNOW, reasoning_frames=13)
    with pytest.raises(ConfigError, match="no frame to drop"):
        studio.pipeline(picture(size=(48, 32)), SNOW, reasoning_frames=1, reasoning_steps=1)


def test_steps_are_told_as_they_are_done(studio):
    done = []
    studio.pipeline(picture(size=(48, 32)), SNOW, steps=3, progress=done.append)
    assert done == [1, 2, 3]


def test_memory_means_are_diffusers_own(studio):
    for offload in ("model", "sequential"):
        with pytest.raises(ConfigError, match=f"--offload {offload} .* no GPU"):
            settle(studio.pipeline, "cpu", Memory(offload=offload))
    vae = studio.pipeline.vae
    settle(studio.pipeline, "cpu", Memory(vae_tiling=True, vae_slicing=True))
    assert vae.use_tiling and vae.use_slicing
    vae.disable_tiling()
    vae.disable_slicing()


@pytest.mark.parametrize(
    ("offload", "asked"), [("model", "enable_model_cpu_offload"), ("sequential", "enable_sequential_cpu_offload")]
)
def test_offload_asks_diffusers_for_the_device_that_was_named(studio, monkeypatch, offload, asked):
    """And moves nothing itself: what offloads decides where each part is."""
    called = []
    for name in ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(studio.pipeline, name, lambda *at, n=name, **named: called.append((n, at, named)))
    settle(studio.pipeline, "cuda:1", Memory(offload=offload))
    assert called == [(asked, (), {"device": "cuda:1"})]
