"""The editor as a page in a browser: a photograph, an instruction, and what the model made of them.

What stands behind the page knows nothing of gradio and makes the files that `v4e edit` makes; the page asks for nothing
from outside this machine.
"""

import html
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from v4e import photos
from v4e.errors import ConfigError, DataError, V4EError
from v4e.jobs import Job, Settings
from v4e.studio import Studio, evolution_of, files_of, write

if TYPE_CHECKING:
    import gradio as gr

LONGEST_VIEW = 1600  # pixels; a browser needs no more, and the file itself is for downloading
MOST_STEPS = 50
CSS = Path(__file__).with_name("app.css")
SWEPT, KEPT = 3600, 24 * 3600  # seconds; how often files of former edits are looked for, and how old they may get


@dataclass(frozen=True)
class Edited:
    """An edit as the page shows it; the paths are files within the folder that it was made in.

    Args:
        before, after: no larger than a screen.
        size: (width, height) of ``output`` in pixels.
        said: how it was made, as the file ``output`` says.
    """

    before: Image.Image
    after: Image.Image
    size: tuple[int, int]
    strip: Path
    video: Path
    output: Path
    said: dict[str, object]


# ----------------------------------------------------------------------------------------- behind the page


def view(photo: photos.Photo) -> Image.Image:
    """A photograph as large as a screen shows it, in its own colours."""
    small = photo.rgb.copy()
    small.thumbnail((LONGEST_VIEW, LONGEST_VIEW), Image.Resampling.LANCZOS)
    small.info = {"icc_profile": photo.profile} if photo.profile else {}
    return small


def opened(path: str | None) -> tuple[bytes, photos.Photo]:
    """An uploaded file's bytes, and as a photograph.

    Raises:
        DataError: nothing was uploaded, or it is no photograph.
    """
    if path is None:
        raise DataError("no photograph", fix="drop one into the box")
    content = photos.fetch(path)
    return content, photos.decode(content, path)


def edited(
    studio: Studio, path: str | None, instruction: str, settings: Settings, folder: Path, tell: Callable[[int], None]
) -> Edited:
    """Edit an uploaded file; the files go into ``folder``.

    Args:
        tell: is told how many steps are done.

    Raises:
        DataError, StopError: what the photograph, the instruction or the machine lacks.
    """
    content, photo = opened(path)
    name = f"{photos.tidy_name(str(path))}-edited{photos.written(photo.suffix)}"
    asked = Job(str(path), instruction, folder / name, settings)
    job, moving = (replace(asked, settings=replace(settings, frames=kind)) for kind in ("strip", "mp4"))
    recipe = studio.recipe(asked, content)  # what is downloaded has no evolution beside it
    clip = studio.imagine(job, photo, tell)
    video = {moving.frames_output: evolution_of(clip, moving, photo.rgb.size, recipe)}
    files = video | files_of(clip, job, photo, recipe)
    write(files)
    after, said = photos.decode(files[job.output], name), photos.recipe_in(files[job.output], name)
    return Edited(view(photo), view(after), after.rgb.size, job.frames_output, moving.frames_output, job.output, said)


def sentence(error: V4EError) -> str:
    """An error for the page: without the folder that an upload lies in, and with nothing that would count as HTML."""
    return html.escape(str(type(error)(error.what, where=Path(error.where).name, fix=error.fix)), quote=False)


# ------------------------------------------------------------------------------------------------ the page


def require_gradio() -> None:
    """Raises ConfigError where what draws the page, or its videos, is not installed."""
    if find_spec("gradio") is None:
        raise ConfigError("the page needs gradio", fix="pip install 'v4e[app]'")
    photos.require_mp4()


def serve(studio: Studio, host: str, port: int | None) -> None:
    """Show the page until interrupted.

    Args:
        port: None for the first free one from 7860 on.

    Raises:
        ConfigError: the port is taken.
    """
    with _folder_of_ones_own():
        blocks = page(studio)
        try:
            _, url, _ = blocks.launch(server_name=host, server_port=port, **_dress(), **ALONE)
        except OSError as error:
            what = f"no page can be served at {host}, {f'port {port}' if port else 'any port'}"
            raise ConfigError(what, fix="name another --port, or --host") from error
        print(f"the editor is at {url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()


@contextmanager
def _folder_of_ones_own() -> Iterator[None]:
    """Temporary files of this process go where no other user looks, and are gone when it ends, by Ctrl-C or by kill."""
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    before = tempfile.tempdir
    try:
        with tempfile.TemporaryDirectory(prefix="v4e-app-") as tempfile.tempdir:
            yield
    finally:
        tempfile.tempdir = before
        signal.signal(signal.SIGTERM, handler)


ALONE: dict[str, Any] = {  # nothing is shared, served or asked for that the page does not need
    "share": False,
    "ssr_mode": False,
    "mcp_server": False,
    "enable_monitoring": False,
    "run_history": False,
    "pwa": False,
    "footer_links": [],
    "quiet": True,
    "prevent_thread_lock": True,
    "max_file_size": photos.MAX_BYTES,
}


@dataclass(frozen=True)
class Parts:
    """What the page is made of: what is asked for, and what is shown."""

    photo: "gr.File"
    instruction: "gr.Textbox"
    steps: "gr.Slider"
    seed: "gr.Number"
    go: "gr.Button"
    download: "gr.DownloadButton"
    status: "gr.HTML"
    alone: "gr.Image"
    slider: "gr.ImageSlider"
    evolution: "gr.Column"
    strip: "gr.Image"
    video: "gr.Video"
    said: "gr.HTML"


COLOURS = {  # those of the other pages (v4e/eval/markup.css), in the light and in the dark
    "body_background_fill": ("#fbfaf7", "#151514"),
    "body_text_color": ("#23221f", "#e9e6df"),
    "body_text_color_subdued": ("#6f6c65", "#98948b"),
    "block_background_fill": ("#fff", "#1d1d1b"),
    "block_border_color": ("#e4e1d9", "#32312d"),
    "border_color_primary": ("#e4e1d9", "#32312d"),
    "block_label_text_color": ("#6f6c65", "#98948b"),
    "block_title_text_color": ("#6f6c65", "#98948b"),
    "input_background_fill": ("#fbfaf7", "#151514"),
    "link_text_color": ("#2c6e71", "#74b9ba"),
    "link_text_color_hover": ("#235a5d", "#8bc8c9"),
    "slider_color": ("#2c6e71", "#74b9ba"),
    "button_primary_background_fill": ("#2c6e71", "#74b9ba"),
    "button_primary_background_fill_hover": ("#235a5d", "#8bc8c9"),
    "button_primary_text_color": ("#fff", "#151514"),
}
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "DejaVu Sans Mono", "monospace")


def _dress() -> "dict[str, Any]":
    """The page's looks, of which nothing is fetched."""
    import gradio as gr

    theme = gr.themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="lg", font=FONTS, font_mono=MONO)
    light = {name: colour for name, (colour, _) in COLOURS.items()}
    dark = {f"{name}_dark": colour for name, (_, colour) in COLOURS.items()}
    return {"theme": theme.set(**light, **dark), "css_paths": CSS}


def page(studio: Studio) -> "gr.Blocks":
    """The page, not yet served."""
    import gradio as gr

    with gr.Blocks(title="v4e", analytics_enabled=False, delete_cache=(SWEPT, KEPT)) as blocks:
        gr.HTML(_head(studio), elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                asked = _controls(studio.pipeline.card.steps)
            with gr.Column(scale=5, min_width=360):
                shown = _stage()
        _wire(studio, Parts(**asked, **shown))
    return blocks.queue(default_concurrency_limit=1, api_open=False)


def _head(studio: Studio) -> str:
    sizes = ", ".join(f"{width} × {height}" for height, width in studio.pipeline.card.sizes)
    return f"<h1>v4e</h1><span>{html.escape(studio.model)} at {sizes} pixels</span>"


def _controls(steps: int) -> "dict[str, Any]":
    import gradio as gr

    hint = "what to change, such as: make it snow"
    return {
        "photo": gr.File(label="Photograph", height=140, elem_id="photo"),
        "instruction": gr.Textbox(label="Instruction", placeholder=hint, max_lines=6, elem_id="instruction"),
        "steps": gr.Slider(1, max(MOST_STEPS, steps), value=steps, step=1, label="Steps", elem_id="steps"),
        "seed": gr.Number(value=0, precision=0, label="Seed", elem_id="seed"),
        "go": gr.Button("Edit", variant="primary", elem_id="go"),
        "download": gr.DownloadButton("Download", interactive=False, elem_id="download"),
        "status": gr.HTML(elem_id="status"),
    }


def _stage() -> "dict[str, Any]":
    import gradio as gr

    still: dict[str, Any] = {"interactive": False, "format": "png"}
    alone = gr.Image(show_label=False, height=520, buttons=[], elem_id="alone", **still)
    slider = gr.ImageSlider(
        label="Before and after", max_height=520, visible=False, buttons=["fullscreen"], elem_id="slider", **still
    )
    with gr.Column(visible=False) as evolution:
        strip = gr.Image(label="Evolution", buttons=["download", "fullscreen"], elem_id="strip", **still)
        with gr.Row():
            video = gr.Video(
                label="Evolution, moving",
                height=290,
                min_width=300,
                autoplay=True,
                loop=True,
                interactive=False,
                elem_id="video",
            )
            said = gr.HTML(min_height=290, elem_id="said")
    return {"alone": alone, "slider": slider, "evolution": evolution, "strip": strip, "video": video, "said": said}


def _wire(studio: Studio, parts: Parts) -> None:
    """What happens on the page: a photograph comes, goes, or is edited."""
    import gradio as gr

    def look(path: str | None):
        try:
            picture, status = view(opened(path)[1]), ""
        except V4EError as error:
            picture, status = None, _refusal(error)
        return {
            parts.alone: gr.Image(picture, visible=True),
            parts.slider: gr.ImageSlider(visible=False),
            parts.evolution: gr.Column(visible=False),
            parts.download: gr.DownloadButton(value=None, interactive=False),
            parts.status: status,
        }

    def clear():
        return look(None) | {parts.status: ""}

    def make(path: str | None, instruction: str, steps: int, seed: int, progress=gr.Progress()):  # noqa: B008
        def tell(done: int) -> None:
            progress((done, steps), desc="denoising", unit="steps")

        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="v4e-") as folder:
                settings = Settings(seed=seed, steps=steps)
                edit = edited(studio, path, instruction, settings, Path(folder), tell)
                yield _results(parts, edit, time.monotonic() - began)  # which takes copies of the files
        except V4EError as error:
            yield {parts.status: _refusal(error)}

    shown = [parts.alone, parts.slider, parts.evolution, parts.download, parts.status]
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    parts.photo.upload(look, parts.photo, shown, **quiet)
    parts.photo.clear(clear, None, shown, **quiet)
    gr.on(
        [parts.go.click, parts.instruction.submit],
        make,
        [parts.photo, parts.instruction, parts.steps, parts.seed],
        [*shown, parts.strip, parts.video, parts.said],
        show_progress_on=[parts.alone, parts.slider],
        trigger_mode="once",
        api_visibility="private",
    )


def _results(parts: Parts, edit: Edited, seconds: float) -> "dict[Any, Any]":
    import gradio as gr

    size = edit.size
    return {
        parts.alone: gr.Image(visible=False),
        parts.slider: gr.ImageSlider((edit.before, edit.after), visible=True),
        parts.evolution: gr.Column(visible=True),
        parts.strip: edit.strip,
        parts.video: edit.video,
        parts.said: _table(edit.said),
        parts.download: gr.DownloadButton(value=edit.output, interactive=True),
        parts.status: f"<p>{size[0]} × {size[1]} pixels in {seconds:.1f} s</p>",
    }


def _table(said: dict[str, object]) -> str:
    """A recipe, in the order of its making."""
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in said.items())
    return f"<p>Recipe, as the file says</p><table>{rows}</table>"


def _refusal(error: V4EError) -> str:
    return f"<p class=refusal role=alert>{sentence(error)}</p>"
