"""The page: what it is given is edited as by `v4e edit`, or refused in one sentence, and nothing leaves the machine."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import gradio  # noqa: F401  now, since it makes a folder where temporary files go at the time
import httpx
import imageio_ffmpeg
import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, MISSING, Browser, browser
from builders import wan_folder
from PIL import Image, ImageCms

from v4e import app, cli, photos
from v4e.errors import ConfigError, DataError
from v4e.jobs import Job, Settings
from v4e.pipelines import Card
from v4e.studio import Memory, Studio

SNOW = "make it snow"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = wan_folder(tmp_path_factory.mktemp("models") / "tiny & small")
    Card(frames=5, sizes=((32, 48), (48, 32)), steps=2).write(folder)
    return folder


@pytest.fixture(scope="module")
def studio(model) -> Studio:
    return Studio.open(str(model), "cpu", Memory())


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """Noise with a profile, wider than high."""
    path = tmp_path_factory.mktemp("photos") / "cat (1).jpg"
    Image.effect_noise((130, 97), 80).convert("RGB").save(path, icc_profile=SRGB)
    return path


def opened(path: Path) -> photos.Photo:
    return photos.decode(path.read_bytes(), str(path))


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean distance of two pictures of one size, in levels."""
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


# ----------------------------------------------------------------------------------------- behind the page


def test_a_view_is_no_larger_than_a_screen_and_keeps_its_colours():
    shown = app.view(photos.Photo(Image.new("RGB", (4000, 1000), "teal"), profile=SRGB))
    assert shown.size == (1600, 400) and shown.getpixel((9, 9)) == (0, 128, 128)
    assert shown.info == {"icc_profile": SRGB}
    small = Image.new("RGB", (30, 20))
    assert app.view(photos.Photo(small)).size == (30, 20) and app.view(photos.Photo(small)) is not small


def test_an_edit_is_the_one_that_the_command_makes(studio, photo, tmp_path):
    told, settings = [], Settings(seed=3, steps=3)
    edit = app.edited(studio, str(photo), SNOW, settings, tmp_path, told.append)
    asked = Job(str(photo), SNOW, tmp_path / "by hand.jpg", settings)
    job = replace(asked, settings=replace(settings, frames="strip"))
    made = studio.make(job, opened(photo), studio.recipe(asked, photo.read_bytes()))
    assert edit.output.read_bytes() == made[job.output] and edit.strip.read_bytes() == made[job.frames_output]
    assert edit.output.name == "cat-1-edited.jpg" and edit.size == (130, 97) and told == [1, 2, 3]
    assert edit.said == photos.recipe_in(made[job.output]) and (edit.said["seed"], edit.said["steps"]) == (3, 3)
    assert distance(edit.before, opened(photo).rgb) == 0 and edit.after.info["icc_profile"] == SRGB
    assert {p.name for p in tmp_path.iterdir()} == {edit.output.name, edit.strip.name, edit.video.name}


def test_the_video_is_the_strip_in_time(studio, photo, tmp_path):
    edit = app.edited(studio, str(photo), SNOW, Settings(steps=1), tmp_path, lambda done: None)
    strip = Image.open(edit.strip).convert("RGB")
    width = (strip.width + 1) // 5 - 1
    reader = imageio_ffmpeg.read_frames(str(edit.video))
    size = next(reader)["size"]
    frames = [Image.frombytes("RGB", size, frame) for frame in reader]
    assert len(frames) == 5 and size == (width // 2 * 2, strip.height // 2 * 2)
    for n, frame in enumerate(frames):
        there = strip.crop((n * (width + 1), 0, n * (width + 1) + width, strip.height)).resize(size)
        assert distance(frame.convert("L"), there.convert("L")) < 12  # noise is hard on H.264


@pytest.mark.parametrize(
    ("path", "said"), [(None, "no photograph"), ("nowhere.png", "no such photograph"), (".", "a folder")]
)
def test_what_is_no_photograph_is_refused(path, said, studio, tmp_path):
    with pytest.raises(DataError, match=said):
        app.edited(studio, path, SNOW, Settings(), tmp_path, lambda done: None)
    assert not [*tmp_path.iterdir()]


def test_a_sentence_shows_no_folder_and_is_no_html():
    error = DataError("<b>torn</b> & cut", where="/secret/folder/a<i>.png", fix='say "x"')
    assert app.sentence(error) == 'a&lt;i&gt;.png: &lt;b&gt;torn&lt;/b&gt; &amp; cut (say "x")'
    assert app.sentence(DataError("the instruction is empty")) == "the instruction is empty"


@pytest.mark.parametrize("package", ["gradio", "imageio_ffmpeg"])
def test_what_is_not_installed_is_named_before_a_model_is_loaded(package, monkeypatch, capsys):
    gone = lambda name: None if name == package else SimpleNamespace(name=name)  # noqa: E731
    monkeypatch.setattr(app, "find_spec", gone)
    monkeypatch.setattr(photos, "find_spec", gone)
    assert cli.main(["app", "--model", "nowhere"]) == ConfigError.exit_code
    assert package.replace("_", "-") in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_is_one(port):
    with pytest.raises(SystemExit):
        cli.main(["app", "--port", port])


def test_a_port_that_is_taken(studio):
    before = tempfile.gettempdir()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError) as refused:
        app.serve(studio, "127.0.0.1", port := taken.getsockname()[1])
    assert str(refused.value) == f"no page can be served at 127.0.0.1, port {port} (name another --port, or --host)"
    assert tempfile.gettempdir() == before


@contextmanager
def served_here(studio: Studio, port: int, **options: object) -> Iterator[httpx.Client]:
    """The page within this process, and a client without a browser."""
    blocks = app.page(studio)
    _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=port, **app.ALONE | options)
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            yield client
    finally:
        blocks.close(verbose=False)


def test_what_is_larger_than_a_photograph_is_not_taken(studio, photo, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    size = photo.stat().st_size
    with served_here(studio, free_port(), max_file_size=size) as client:
        kept, refused = (
            client.post("gradio_api/upload", files={"files": ("a.jpg", content)})
            for content in (photo.read_bytes(), bytes(size + 1))
        )
    assert (kept.status_code, refused.status_code) == (200, 413)
    assert Path(kept.json()[0]).is_relative_to(tmp_path) and not Path(kept.json()[0]).exists()  # swept at the end
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) == 0


def test_files_of_former_edits_are_swept(studio, photo, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(app, "SWEPT", 1)
    monkeypatch.setattr(app, "KEPT", 1)
    with served_here(studio, free_port()) as client:
        kept = Path(client.post("gradio_api/upload", files={"files": ("a.jpg", photo.read_bytes())}).json()[0])
        end = time.monotonic() + 30
        while kept.exists():
            assert time.monotonic() < end
            time.sleep(0.2)


def test_files_of_this_machine_are_not_served(studio, photo):
    with served_here(studio, free_port()) as client:
        for path in (photo, Path(__file__), Path("/etc/passwd"), Path("setup.py").resolve()):
            assert client.get(f"gradio_api/file={path}").status_code == 403
        assert client.get("gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


# ------------------------------------------------------------------------------------------- in a browser


RECORDER = """
import sys

def record(event, args):
    if event in ("socket.getaddrinfo", "socket.connect"):
        with open({log!r}, "a") as file:
            print(args[0] if event == "socket.getaddrinfo" else args[1], file=file)

sys.addaudithook(record)
"""


@dataclass(frozen=True)
class Served:
    """`v4e app` as a process of its own, whose temporary files and whose connections are watched."""

    url: str
    process: subprocess.Popen
    temporary: Path
    log: Path
    said: Path

    def called(self) -> list[str]:
        """What it connected to, or looked up, that is not this machine."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if not re.match(r"127\.0\.0\.1|localhost|\('127\.0\.0\.1', \d+\)", line)]

    def stop(self) -> int:
        """Its exit code; where it does not end, what its threads are at."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(10)
            pytest.fail(self.said.read_text())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(folder: Path, *words: object) -> Iterator[Served]:
    """Start `v4e app`, and end it."""
    (folder / "hooks").mkdir()
    (folder / "temporary").mkdir()
    (folder / "hooks" / "sitecustomize.py").write_text(RECORDER.format(log=str(folder / "called")))
    environment = os.environ | {"PYTHONPATH": str(folder / "hooks"), "TMPDIR": str(folder / "temporary")}
    environment |= {"PYTHONFAULTHANDLER": "1"}
    port = free_port()
    command = [sys.executable, "-m", "v4e.cli", "app", "--port", str(port), "--device", "cpu", *map(str, words)]
    with (
        open(folder / "said", "w") as said,
        subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=Path(__file__).parents[1]) as process,
    ):
        try:
            end = time.monotonic() + 600
            while "the editor is at" not in (folder / "said").read_text():
                assert process.poll() is None and time.monotonic() < end, (folder / "said").read_text()
                time.sleep(0.2)
            url = f"http://127.0.0.1:{port}/"
            yield Served(url, process, folder / "temporary", folder / "called", folder / "said")
        finally:
            process.terminate()


needs_browser = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page")) as process:
        yield process


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("window")) as opened:
        yield opened


@pytest.fixture
def visitor(page, window) -> Browser:
    """Someone who has just come to the page."""
    return come(window, page.url)


def come(window: Browser, url: str) -> Browser:
    window.open(url)
    window.wait("document.querySelector('#photo input[type=file]')")
    return window


def give(visitor: Browser, photo: Path) -> None:
    visitor.type("#photo input[type=file]", str(photo))
    visitor.wait("document.querySelector('#alone img')?.naturalWidth")


def status(visitor: Browser, word: str = "pixels in") -> str:
    """What the page says once that holds a word."""
    visitor.wait(f"document.querySelector('#status').innerText.includes({json.dumps(word)})")
    return visitor.text("#status").strip()


def pictures(visitor: Browser, css: str) -> list[Image.Image]:
    """The pictures of a part as the browser has loaded them."""
    ready = f"[...document.querySelectorAll('{css} img')].every(i => i.complete && i.naturalWidth)"
    visitor.wait(ready)
    urls = visitor.run(f"return [...document.querySelectorAll('{css} img')].map(i => i.src)")
    return [Image.open(io.BytesIO(httpx.get(url, trust_env=False, timeout=60).content)) for url in urls]


def downloaded(visitor: Browser) -> Path:
    """The file that a click on Download brings, whole."""
    visitor.click("#download")
    end = time.monotonic() + 20
    while not (files := [p for p in visitor.downloads.iterdir() if p.suffix == ".jpg"]):
        assert time.monotonic() < end, [*visitor.downloads.iterdir()]
        time.sleep(0.1)
    return files[0]


@needs_browser
def test_a_photograph_is_edited_and_shown(visitor, page, photo, tmp_path):
    give(visitor, photo)
    assert visitor.run("return document.title") == "v4e"
    visitor.type("#instruction textarea", SNOW)
    visitor.replace("#seed input", "5")
    visitor.click("#go")
    assert re.fullmatch(r"130 × 97 pixels in \d+\.\d s", status(visitor))
    before, after = pictures(visitor, "#slider")
    assert before.size == after.size == (130, 97) and before.info["icc_profile"] == SRGB
    assert distance(before.convert("RGB"), opened(photo).rgb) == 0 and distance(before, after) > 5

    file = downloaded(visitor)
    assert file.name == "cat-1-edited.jpg" and distance(after.convert("RGB"), opened(file).rgb) == 0
    words = ["edit", photo, SNOW, "--seed", "5", "--device", "cpu", "-o", tmp_path / "by hand.jpg"]
    assert cli.main([str(w) for w in words]) == 0
    assert photos.recipe_in(file.read_bytes()) == photos.recipe_in((tmp_path / "by hand.jpg").read_bytes())
    assert distance(opened(file).rgb, opened(tmp_path / "by hand.jpg").rgb) < 1  # threads may differ

    (strip,) = pictures(visitor, "#strip")
    assert strip.width == 5 * (round(strip.height * 130 / 97) + 1) - 1
    assert photos.recipe_in(file.read_bytes())["steps"] == 4 and f"instruction {SNOW}" in visitor.text("#said")
    elsewhere = [u for u in visitor.asked_for() if not u.startswith((page.url, "data:", "blob:", "chrome:"))]
    assert elsewhere == []  # the last of these are pages of the browser's own


@needs_browser
def test_the_slider_is_dragged_and_the_video_plays(visitor, photo):
    give(visitor, photo)
    visitor.type("#instruction textarea", f"{SNOW}\n")  # Enter edits too
    status(visitor)
    pictures(visitor, "#slider")
    handle = "return document.querySelector('#slider .inner').getBoundingClientRect().left"
    at = visitor.run(handle)
    visitor.drag("#slider .inner", 60)
    assert visitor.run(handle) == pytest.approx(at + 60, abs=2)
    video = "document.querySelector('#video video')"
    visitor.wait(f"{video}.readyState == 4")
    height, seconds = visitor.run(f"return [{video}.videoHeight, {video}.duration]")
    assert 40 <= height <= 64 and seconds == pytest.approx(5 / 4, abs=0.1)
    visitor.wait(f"{video}.played.length > 0 && {video}.loop")


@needs_browser
def test_another_photograph_takes_the_edits_place(visitor, photo, tmp_path):
    give(visitor, photo)
    visitor.type("#instruction textarea", SNOW)
    visitor.replace("#steps input[type=number]", "1\t")
    visitor.click("#go")
    status(visitor)
    assert "steps 1\n" in visitor.text("#said")
    visitor.click("#photo button[aria-label='Clear']")
    visitor.wait("!document.querySelector('#slider')?.offsetParent && !document.querySelector('#alone img')")
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "teal.png")
    give(visitor, tmp_path / "teal.png")
    (shown,) = pictures(visitor, "#alone")
    assert shown.size == (30, 20) and shown.getpixel((0, 0)) == (0, 128, 128)
    assert visitor.run("return document.querySelector('#download').disabled") and visitor.text("#status") == ""


@needs_browser
def test_what_is_no_photograph_is_refused_in_one_sentence(visitor, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    visitor.type("#photo input[type=file]", str(tmp_path / "page.jpg"))
    said = "page.jpg: not a readable picture: no format that is known here"
    assert status(visitor, "page.jpg").startswith(f"{said} (give one of PNG, JPEG")
    assert "Error" not in visitor.text("body") and "\n" not in visitor.text("#status")


@needs_browser
def test_what_is_missing_is_said_in_one_sentence(visitor, photo):
    visitor.click("#go")
    assert status(visitor, "photo") == "no photograph (drop one into the box)"
    give(visitor, photo)
    visitor.wait("document.querySelector('#status').innerText == ''")
    visitor.click("#go")
    assert status(visitor, "empty") == 'the instruction is empty (say what to change, such as "make it snow")'
    visitor.type("#instruction textarea", SNOW)
    visitor.replace("#seed input", "-1")
    visitor.click("#go")
    assert status(visitor, "seed").startswith("seed=-1 is no whole number from 0")


@needs_browser
def test_a_file_beyond_all_photographs_is_refused(visitor, tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(photos.MAX_BYTES + 1)  # a hole, which takes no room
    visitor.type("#photo input[type=file]", str(tmp_path / "huge.png"))
    visitor.wait("document.body.innerText.includes('exceed the maximum allowed size of 1.0')")


@needs_browser
def test_a_model_of_ones_own(model, window, photo, tmp_path):
    with served(tmp_path, "--model", model) as process:
        visitor = come(window, process.url)
        assert visitor.text("#head") == "v4e\ntiny & small at 48 × 32, 32 × 48 pixels"
        give(visitor, photo)
        visitor.type("#instruction textarea", f"{SNOW}\n")
        status(visitor)
        assert "model tiny & small\n" in visitor.text("#said")
        assert process.stop() == 0
    assert process.called() == []


@needs_browser
def test_nothing_was_called_and_nothing_is_left(page):
    """After all of the above."""
    (folder,) = page.temporary.glob("v4e-app-*")
    assert folder.stat().st_mode & 0o077 == 0  # others of this machine see no photograph
    assert page.stop() == 0
    assert page.called() == []
    assert [*page.temporary.glob("v4e-*")] == []
    assert [p for p in page.temporary.rglob("*") if p.suffix in (".jpg", ".png", ".mp4")] == []
