"""A journal tells a run once, in order, keeps its secrets, and leaves everything to one rank."""

import json
import sys

import pytest
from PIL import Image

from v4e import journal
from v4e.config import Wandb
from v4e.errors import ConfigError
from v4e.journal import DROPPED, LINES, Journal, open_bar, progress, scrub

SECRETS = {
    "wandb_api_key": "anything at all",
    "password": "hunter2",
    "hub": {"token": "abc"},
    "note": "log in with hf_abcdefghijklmnopqrstuv, then Bearer abc.def-ghi",
    "remote": "https://me:s3cret@example.org/repository",
    "list": ["sk-abcdefghijklmnopqrstuvwxyz", "0123456789abcdef0123456789abcdef01234567"],
}
HIDDEN = ("anything at all", "hunter2", "abc.def", "hf_abc", "s3cret", "sk-abc", "0123456789abcdef")


def steps(folder) -> list[float]:
    return [line["step"] for line in journal.read(folder)]


def test_a_resumed_journal_goes_on_where_the_checkpoint_was(tmp_path):
    first = Journal(tmp_path)
    for step in range(1, 6):
        first.log(step, {"loss": 1 / step})
    first.close()
    with open(tmp_path / LINES, "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = Journal(tmp_path, resume_step=3)
    second.say("going on")
    second.log(4, {"loss": 0.25})
    second.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert len((tmp_path / DROPPED).read_text().splitlines()) == 3


def test_a_new_run_in_an_old_folder_starts_its_own_journal(tmp_path):
    for _ in range(2):
        with_one_line = Journal(tmp_path)
        with_one_line.log(1, {"loss": 2.0})
        with_one_line.close()
    assert steps(tmp_path) == [1]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    told = Journal(tmp_path)
    told.log(1, {"loss": float("nan"), "norm": float("inf")})
    told.close()
    text = (tmp_path / LINES).read_text().splitlines()[-1]
    line = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert (line["loss"], line["norm"]) == ("nan", "inf")


def test_only_the_writing_rank_leaves_anything(tmp_path):
    silent = Journal(tmp_path / "run", Wandb(mode="offline"), writes=False)
    silent.log(1, {"loss": 1.0})
    silent.picture(1, "sheet", Image.new("RGB", (2, 2)))
    silent.note("a", "b")
    silent.say("c")
    with silent.bar("train", 3) as bar:
        bar.advance()
    silent.close()
    assert not (tmp_path / "run").exists()


def test_secrets_are_starred_out():
    said = json.dumps(scrub(SECRETS))
    assert not [word for word in HIDDEN if word in said]
    harmless = {"text_tokens": 512, "author": "me", "key": "sample-1", "tokenizer": "umt5", "hash": "0123456789abcdef"}
    assert scrub(harmless) == harmless


def test_curves_go_on_in_the_same_run_and_hold_no_secret(tmp_path, monkeypatch):
    """Each process is killed, the second one before it has come to where the first was."""
    sent: list[tuple[str, float]] = []
    settings = Wandb(mode="offline", project="test")
    for resume_step, logged in ((None, (1, 2, 3, 4, 5)), (2, (3, 4)), (2, (3, 4, 5, 6))):
        told = Journal(tmp_path, settings, SECRETS, resume_step=resume_step)
        assert told._curves
        run = told._curves._run
        monkeypatch.setattr(run, "log", lambda d, r=run: sent.append((r.id, d["step"])))
        for step in logged:
            told.picture(step, "sheet", Image.new("RGB", (2, 2)))
            told.log(step, {"loss": 1.0})
        told.close()
    assert [step for _, step in sent] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert len({run for run, _ in sent}) == 1
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.name for p in files if any(w.encode() in p.read_bytes() for w in HIDDEN)] == []


def test_curves_without_a_login_are_refused(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "login", lambda **_: False)
    with pytest.raises(ConfigError, match="no login .run `wandb login`"):
        Journal(tmp_path, Wandb(mode="online"))


def test_pictures_are_kept_as_png(tmp_path):
    told = Journal(tmp_path)
    told.picture(12, "sheet", Image.new("RGB", (4, 3), (1, 2, 3)))
    told.close()
    assert Image.open(tmp_path / "sheets/sheet_0000012.png").getpixel((0, 0)) == (1, 2, 3)


def test_progress_has_rate_and_eta(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    clock = iter(float(t) for t in range(0, 1000, 2))
    monkeypatch.setattr(journal.time, "monotonic", lambda: next(clock))
    with open_bar("train", 4000, done=3990) as bar:
        bar.began = 0.0
        bar.advance(5, loss=0.5)
        assert bar.rate > 0
    assert "train 3995/4000" in (told := capsys.readouterr().err)
    assert "ETA 0:00:" in told
    assert "loss 0.5" in told
    assert list(progress("abc", "spell")) == ["a", "b", "c"]
    assert "spell 3/3" in capsys.readouterr().err
