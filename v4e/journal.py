"""One way to report, for roll-outs and for training: numbers, pictures, progress.

A journal is a folder: ``journal.jsonl`` (one object a line), ``sheets/*.png``, ``notes/*``, and Weights & Biases'
offline run. Only the rank that ``writes`` leaves anything; the others may call everything just the same.
"""

import json
import math
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from v4e.config import Wandb
from v4e.errors import ConfigError

X = TypeVar("X")
LINES, DROPPED, RUN = "journal.jsonl", "journal.dropped.jsonl", "wandb_run.json"
PLAIN_EVERY_S = 15.0  # where there is no terminal, a line of progress now and then

_SECRET_NAME = re.compile(r"(api_?key|secret|passw(or)?d|credential|access_?key|(^|_)token$)", re.I)
_SECRET_TEXT = re.compile(
    r"hf_[A-Za-z0-9]{16,}|wandb_v\d_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abpr]-[\w-]{10,}|\b[0-9a-f]{40}\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=Bearer )[\w.~+/-]+"
)


def scrub(value: object, name: str = "") -> object:
    """The same value with anything that looks like a key, token or password starred out."""
    if isinstance(value, Mapping):
        return {k: scrub(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(v, name) for v in value]
    if not isinstance(value, str):
        return value
    return "***" if value and _SECRET_NAME.search(name) else _SECRET_TEXT.sub("***", value)


class Journal:
    """What a run has to say.

    Args:
        folder: of the run; made if missing.
        wandb: where the curves also go.
        config: shown once; secrets are starred out.
        facts: of this process, told beside the config: revision, identity of the data, ranks.
        resume_step: the last step that counts; later lines of an earlier process are set aside. None starts anew.
        writes: whether this rank leaves anything.

    Raises:
        ConfigError: Weights & Biases is asked for online but has no login, or is not installed.
    """

    def __init__(
        self,
        folder: Path,
        wandb: Wandb = Wandb(mode="disabled"),  # noqa: B008  frozen
        config: Mapping[str, object] | None = None,
        facts: Mapping[str, object] | None = None,
        *,
        resume_step: int | None = None,
        writes: bool = True,
    ) -> None:
        self.folder, self.writes = Path(folder), writes
        self._lines: TextIO | None = None
        self._curves: _Curves | None = None
        if writes:
            self._open(wandb, {**(config or {}), "run": facts or {}}, resume_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step; steps never fall."""
        if self._lines is None:
            return
        tidy = {k: float(v) for k, v in numbers.items()}
        self._write({"step": step, "time": round(time.time(), 3), **{k: _json_number(v) for k, v in tidy.items()}})
        if self._curves:
            self._curves.log(step, tidy)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A contact sheet: sheets/<name>_<step>.png, and in the curves."""
        if self._lines is None:
            return
        path = self.folder / "sheets" / f"{name}_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        if self._curves:
            self._curves.picture(step, name, path)

    def note(self, name: str, text: str) -> None:
        """A text worth keeping, notes/<name>."""
        if self._lines is None:
            return
        path = self.folder / "notes" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(scrub(text)))

    def say(self, text: str) -> None:
        """A sentence for whoever watches, and for the record."""
        if self._lines is None:
            return
        text = str(scrub(text))
        self._write({"time": round(time.time(), 3), "say": text})
        Console(stderr=True).print(text, style="bold", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator["Bar"]:
        """Progress with rate and ETA, on a terminal as a bar and elsewhere as a line now and then."""
        if self.writes:
            with open_bar(title, total, done) as bar:
                yield bar
        else:
            yield Bar(title, total, done)

    def close(self, exit_code: int = 0) -> None:
        """Flush; harmless when repeated."""
        if self._curves:
            self._curves.close(exit_code)
        if self._lines:
            self._lines.close()
        self._curves = self._lines = None

    def _open(self, wandb: Wandb, config: Mapping[str, object], resume_step: int | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _set_aside(self.folder, -1 if resume_step is None else resume_step)
        self._lines = open(self.folder / LINES, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._write({"time": round(time.time(), 3), "config": scrub(config)})
        if wandb.mode != "disabled":
            self._curves = _Curves(self.folder, wandb, scrub(config), fresh=resume_step is None)

    def _write(self, line: Mapping[str, object]) -> None:
        assert self._lines is not None
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()


class _Curves:
    """Weights & Biases. A resumed process continues the same run.

    A killed run has logged steps that its resumed self computes again. As resuming is exact they are the same numbers,
    so they are not sent twice and the run's steps only rise.
    """

    def __init__(self, folder: Path, settings: Wandb, config: object, fresh: bool) -> None:
        self._wandb = _import_wandb()
        identity, self._seen = _curve(folder, fresh)
        self._last = self._seen
        self._run = self._wandb.init(
            dir=folder,
            project=settings.project,
            name=str(scrub(settings.name)) or None,
            mode=self._allowed(settings.mode),
            id=identity,
            resume="never" if fresh else "allow",
            config=config,
            settings=self._wandb.Settings(
                silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step > self._last:
            self._last = step
            self._run.log({"step": step, **numbers})

    def picture(self, step: int, name: str, path: Path) -> None:
        if step > self._seen:
            self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def _allowed(self, mode: str) -> str:
        if mode == "online" and not self._wandb.login(anonymous="never", verify=False, relogin=False):
            fix = "run `wandb login`, or use offline"
            raise ConfigError("Weights & Biases has no login", where="loop.wandb.mode", fix=fix)
        return mode


def revision() -> str:
    """Twelve hex digits of the git commit this code is at, with ``-dirty`` where it was changed; empty outside git."""
    root = Path(__file__).resolve().parents[1]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return ""  # installed somewhere inside another repository
        return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


@dataclass
class Bar:
    """Counts progress; this one says nothing."""

    title: str
    total: int
    done: int
    began: float = field(default_factory=time.monotonic)
    first: int = field(init=False)
    numbers: str = ""

    def __post_init__(self) -> None:
        self.first = self.done

    def advance(self, by: int = 1, **numbers: float) -> None:
        """Count, and show a few numbers."""
        self.done += by
        self.numbers = " ".join(f"{k} {v:.4g}" for k, v in numbers.items()) or self.numbers
        self.show()

    def show(self) -> None:
        """Bring it before the eye."""

    @property
    def rate(self) -> float:
        """Units a second since the bar was opened."""
        return (self.done - self.first) / max(1e-9, time.monotonic() - self.began)

    @property
    def left_s(self) -> float:
        """Seconds to go."""
        return (self.total - self.done) / self.rate if self.rate else math.inf

    @property
    def speed(self) -> str:
        return f"{self.rate:.2f}/s" if self.rate >= 1 or not self.rate else f"{1 / self.rate:.2f} s each"


@contextmanager
def open_bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar on a terminal; a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield PlainBar(title, total, done)
        return
    with _rich_progress() as shown:
        yield RichBar(title, total, done, shown)


def progress(items: Iterable[X], title: str, total: int | None = None, start: int = 0) -> Iterator[X]:
    """Pass items on while showing how far they are.

    Args:
        total: where the items go to; their length if they have one.
        start: how many were done before, counted in ``total``.
    """
    if total is None:
        total = start + len(items) if isinstance(items, Sized) else 0
    with open_bar(title, total, start) as bar:
        for item in items:
            yield item
            bar.advance()


@dataclass
class PlainBar(Bar):
    """Lines on stderr, for logs."""

    spoke: float = -math.inf

    def show(self) -> None:
        now = time.monotonic()
        if now - self.spoke >= PLAIN_EVERY_S or self.done == self.total:
            self.spoke = now
            print(
                f"{self.title} {self.done}/{self.total}  {self.speed}  ETA {_clock(self.left_s)}  {self.numbers}",
                file=sys.stderr,
                flush=True,
            )


class RichBar(Bar):
    """A bar on a terminal."""

    def __init__(self, title: str, total: int, done: int, progress: Progress) -> None:
        super().__init__(title, total, done)
        self._progress = progress
        self._task = progress.add_task(title, total=total, completed=done, speed="", numbers="")

    def show(self) -> None:
        self._progress.update(self._task, completed=self.done, speed=self.speed, numbers=self.numbers)


def _rich_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def _json_number(value: float) -> float | str:
    """JSON has no NaN; a word keeps the line readable for every parser."""
    return value if math.isfinite(value) else str(value)


def read(folder: Path) -> list[dict[str, float]]:
    """The numbers of a journal, a line each; a last line that a killed writer left unfinished is no line."""
    path = Path(folder) / LINES
    lines = [_parsed(text) for text in path.read_text().splitlines()] if path.is_file() else []
    return [{k: float(v) for k, v in line.items()} for line in lines if line and "step" in line]


def _parsed(text: str) -> dict | None:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _set_aside(folder: Path, last: int) -> None:
    """Move lines after step ``last`` to another file."""
    path = folder / LINES
    texts = path.read_text().splitlines() if path.is_file() else []
    steps = [*map(_step, texts)]
    first_late = next((i for i, step in enumerate(steps) if step > last), len(texts))
    if first_late < len(texts) or (texts and _parsed(texts[-1]) is None):
        _append(folder / DROPPED, texts[first_late:])
        path.write_text("".join(t + "\n" for t in texts[:first_late] if _parsed(t) is not None))


def _step(text: str) -> int:
    return (_parsed(text) or {}).get("step", -1)


def _append(path: Path, texts: list[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(t + "\n" for t in texts)


def _curve(folder: Path, fresh: bool) -> tuple[str, int]:
    """The run's identity, kept in the folder from one process to the next, and the latest step that it has been told.

    A step may be in the lines, or among those dropped since the run was begun: by each process that was killed.
    """
    path, dropped = folder / RUN, folder / DROPPED
    if fresh or not path.is_file():
        before = dropped.stat().st_size if dropped.is_file() else 0
        path.write_text(json.dumps({"id": uuid.uuid4().hex[:8], "dropped_before": before}))
    run = json.loads(path.read_text())
    since = dropped.read_bytes()[run.get("dropped_before", 0) :].decode() if dropped.is_file() else ""
    texts = [*(folder / LINES).read_text().splitlines(), *since.splitlines()]
    return str(run["id"]), max(map(_step, texts), default=-1)


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        fix = "pip install wandb, or use disabled"
        raise ConfigError("wandb is not installed", where="loop.wandb.mode", fix=fix) from error
    return wandb
