"""The stages of `make nano`: done once, by one process at a time, encoders beside the VAE."""

import subprocess
import sys

import pytest

from data_tools import nano
from v4e.data.disk import lock
from v4e.errors import DataError


@pytest.fixture
def worked(monkeypatch):
    """Stages that leave their names in a list."""
    done = []
    monkeypatch.setattr(nano, "train_vae", lambda work, seed: done.append("vae"))
    monkeypatch.setattr(nano, "assemble", lambda work, name, out: done.append("arch"))
    monkeypatch.setattr(nano, "pack_in_parallel", lambda work, seed, name, ranks: done.append(f"pack {name}"))
    monkeypatch.setattr(nano, "train_leg", lambda work, name, ranks: done.append(name))
    monkeypatch.setattr(nano, "train_on_estimates", lambda work, seed: done.append("decoder"))
    monkeypatch.setattr(nano, "bundle", lambda work, out: done.append("bundle"))
    return done


class Encoders:
    """In place of the process beside: what it was asked for, and how it ends."""

    def __init__(self, code):
        self.code, self.command = code, None

    def __call__(self, command):
        self.command = command
        return self

    def wait(self):
        for stage in nano.ENCODERS:
            (self.work / f".{stage}.done").touch()
        return self.code


@pytest.fixture
def encoders(monkeypatch, tmp_path):
    beside = Encoders(0)
    beside.work = tmp_path
    monkeypatch.setattr(subprocess, "Popen", beside)
    return beside


def test_every_stage_is_done_once_and_in_order(worked, encoders, tmp_path):
    nano.run_all(tmp_path, 3, ranks=2)
    packs = [f"pack {name}" for name in nano.CLIPS]
    assert worked == ["vae", "arch", "arch", *packs, *nano.LEGS, "decoder", "bundle"]
    assert encoders.command[1:] == ["-m", "data_tools.nano", "text", "vision", "--work", str(tmp_path), "--seed", "3"]
    once = [*worked]
    nano.run_all(tmp_path, 3, ranks=2)
    assert worked == once


def test_a_failed_encoder_ends_it_before_anything_needs_it(worked, encoders, tmp_path):
    encoders.code = 1
    with pytest.raises(DataError, match="training the encoders failed"):
        nano.run_all(tmp_path, 0, ranks=2)
    assert worked == ["vae"]


def test_two_processes_are_not_at_one_stage(worked, tmp_path):
    with lock(tmp_path / ".vae.lock"), pytest.raises(DataError, match="another writer is at work here"):
        nano.run_stage("vae", tmp_path, 0, ranks=2)
    nano.run_stage("vae", tmp_path, 0, ranks=2)
    assert worked == ["vae"]


def test_an_unknown_stage_is_named_with_the_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nano", "vae2"])
    with pytest.raises(SystemExit):
        nano.main()
    assert "no stage 'vae2'; there are vae, text, vision, arch" in capsys.readouterr().err
