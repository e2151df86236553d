"""The trials of tests/cluster: real sshd, real pdsh and a real Slurm; they skip where these are not installed."""

import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
import torch

from v4e.errors import TrainingError
from v4e.train.checkpoint import _save_file

ROOT = Path(__file__).parents[1]
SKIPPED = 77  # of a trial that lacks a program, which it names
TRIALS = sorted(p.name for p in (ROOT / "tests/cluster").glob("*.sh") if p.name != "common.sh")


def trial(name: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [f"tests/cluster/{name}", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=3000)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_trial(name, tmp_path):
    done = trial(name, tmp_path)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("the same to the bit")


@pytest.mark.parametrize("name", TRIALS)
def test_a_machine_without_the_programs_skips_and_says_what_to_install(name, tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    for program in ("bash", "dirname", "mkdir", "env"):
        (bare / program).symlink_to(Path("/bin") / program)
    wrapper = tmp_path / "bash_env"  # the trial puts the system's folders into PATH, and must not find them there
    wrapper.write_text('command() { [[ "$1" == -v ]] && return 1; builtin command "$@"; }\n')
    done = trial(name, tmp_path / "work", PATH=str(bare), BASH_ENV=str(wrapper))
    assert done.returncode == SKIPPED, done.stderr
    assert re.fullmatch(r"SKIP: no \w+ \(apt install [\w-]+\)\n", done.stdout)


@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_says_how_to_be_run(name, tmp_path):
    text = (ROOT / "tests/cluster" / name).read_text()
    assert f"#   tests/cluster/{name} FOLDER\n" in text and "#   apt install " in text
    done = subprocess.run([f"tests/cluster/{name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "FOLDER" in done.stderr


def test_a_disk_that_takes_no_checkpoint_is_told_in_a_sentence(tmp_path):
    """As on one machine of several: a limit on the size of files stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(TrainingError, match=r"safetensors: the checkpoint cannot be written: .*too large"):
            _save_file(tmp_path / "rank_00001_000.safetensors", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file = tmp_path / "rank_00001_000.safetensors"
    _save_file(file, {"x": torch.zeros(1000)})
    assert file.stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o666  # whoever may read the folder goes on from it
