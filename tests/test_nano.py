"""The stages of `make nano`: done once, by one process at a time, some beside others."""

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


class Beside:
    """In place of the processes beside: what they were asked for, and how they end."""

    def __init__(self, work):
        self.work, self.code, self.asked = work, 0, []

    def __call__(self, command):
        assert command[1:3] == ["-m", "data_tools.nano"]
        assert command[-4:] == ["--work", str(self.work), "--seed", "3"]
        self.asked.append(command[3:-4])
        return self

    def wait(self):
        for stage in self.asked[-1]:
            (self.work / f".{stage}.done").touch()
        return self.code


@pytest.fixture
def beside(monkeypatch, tmp_path):
    processes = Beside(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", processes)
    return processes


def test_every_stage_is_done_once_and_in_order(worked, beside, tmp_path):
    nano.run_all(tmp_path, 3, ranks=2)
    packs = [f"pack {name}" for name in nano.CLIPS]
    assert worked == ["vae", "arch", "arch", *packs, *nano.LEGS, "decoder", "bundle"]
    assert beside.asked == [["text", "vision"], ["polish"]]
    assert {path.name for path in tmp_path.glob(".*.done")} == {f".{stage}.done" for stage in nano.STAGES}
    once = [*worked]
    nano.run_all(tmp_path, 3, ranks=2)
    assert worked == once


def test_a_failed_process_beside_ends_it_before_anything_needs_it(worked, beside, tmp_path):
    beside.code = 1
    with pytest.raises(DataError, match="text or vision failed"):
        nano.run_all(tmp_path, 3, ranks=2)
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
