"""The doctor names what is missing and how to mend it, and shows no secret."""

from collections import namedtuple

import pytest

import v4e.train.operators  # noqa: F401  DeepSpeed says on stdout, once, that it found no GPU
from v4e import cli, doctor
from v4e.doctor import Finding

TOKEN = "0123456789abcdef0123456789abcdef01234567"


def only(findings, name):
    (found,) = (f for f in findings if f.name == name)
    return found


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A home without logins."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


def test_the_door(bare, capsys, monkeypatch):
    monkeypatch.setattr("v4e.train.operators.compilable", dict)  # asking starts compilers
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code = cli.main(["doctor", "--output", str(bare)])
    said = capsys.readouterr().out
    assert "torch: 2" in said and "attention=native: works as native" in said
    assert TOKEN not in said and "W&B login: present" in said and "Hub token: present" in said
    assert code == int("broken " in said.rsplit("\n", 2)[0])
    for line in said.splitlines()[:-2]:
        assert line.startswith(("ok ", "lacks ", "broken ", "       -> ")), line


def test_every_fault_has_a_fix(bare, monkeypatch):
    monkeypatch.setattr("v4e.train.operators.compilable", dict)
    assert [f for f in doctor.examine(bare) if (f.state == "ok") == bool(f.fix)] == []


def test_only_what_is_broken_counts():
    lacks, broken = Finding("a", "lacks", "none", "get one"), Finding("b", "broken", "none", "get one")
    assert (doctor.exit_code([lacks]), doctor.exit_code([lacks, broken])) == (0, 1)
    assert doctor.report([lacks, broken]).splitlines()[-1] == "0 ok, 1 lacks, 1 broken"


def test_a_missing_package_is_broken_if_needed(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: "" if name in ("deepspeed", "bitsandbytes") else "1")
    found = list(doctor.packages())
    needed, optional = only(found, "deepspeed"), only(found, "bitsandbytes")
    assert (needed.state, needed.fix) == ("broken", "pip install -r constraints.txt")
    assert (optional.state, optional.fix) == ("lacks", "pip install 'v4e[8bit]'")


def test_a_full_or_slow_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(5e9))
    monkeypatch.setattr(doctor, "write_speed", lambda _: 30e6)
    room, speed = doctor.disk(tmp_path / "not/yet/there")
    assert (room.state, speed.state) == ("lacks", "lacks")
    assert "5 GB free" in room.seen and "30 MB/s" in speed.seen and str(tmp_path) in speed.seen


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor, "write_speed", full)
    (found,) = doctor.disk(tmp_path)
    assert found.state == "broken" and "No space left" in found.seen


def test_speed_is_measured_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", 1024)
    assert doctor.write_speed(tmp_path) > 0 and not list(tmp_path.iterdir())


def test_interfaces(tmp_path, monkeypatch):
    for name, state in (("lo", "unknown"), ("eth0", "down"), ("ib0", "up")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(state + "\n")
    monkeypatch.setattr(doctor, "INTERFACES", tmp_path)
    monkeypatch.setattr(doctor, "FABRIC", tmp_path / "none")
    monkeypatch.setattr(doctor.socket, "gethostbyname", lambda _: "127.0.1.1")
    links, name = doctor.network()
    assert links.seen == "up: ib0; fabric: none"
    assert name.state == "lacks" and "NCCL_SOCKET_IFNAME=ib0" in name.fix


def test_a_host_nobody_knows(monkeypatch):
    def unknown(_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(doctor.socket, "gethostbyname", unknown)
    assert [*doctor.network()][1].state == "broken"


def test_logins(bare):
    (found,) = doctor.curves()
    assert found.state == "lacks"
    netrc = bare / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {TOKEN}\n")
    netrc.chmod(0o600)
    (found,) = doctor.curves()
    assert found.state == "ok" and TOKEN not in str(found)


def test_a_look_that_fails_is_a_finding(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("driver and library differ")
        yield

    monkeypatch.setattr(doctor, "accelerators", broken)
    monkeypatch.setattr("v4e.train.operators.compilable", dict)
    found = doctor.examine(tmp_path)
    failed = only(found, "devices")
    assert (failed.state, failed.seen) == ("broken", "RuntimeError: driver and library differ")
    assert only(found, "Python").state == "ok"
