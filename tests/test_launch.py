"""The launch scripts: exact commands by --dry-run, and what they do when programs of the cluster answer."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from v4e import cli

ROOT = Path(__file__).parents[1]
CONFIG = ["configs/nano/video4edit.yaml", "loop.data=/a b", "loop.output=runs/x"]
TRAIN = ["--no_local_rank", "--module", "v4e.cli", "train", *CONFIG]


def launch(script: str, *words: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | environment
    if path:
        env["PATH"] = f"{path}:{env['PATH']}"
    command = [f"launch/{script}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def printed(*words: object, **environment: str) -> list[list[str]]:
    done = launch(*map(str, words), **environment)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def program(folder: Path, name: str, body: str) -> None:
    """A stand-in for a program of the cluster."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two machines\nnode-a slots=8\n\nnode-b slots=8\n")
    return path


# ------------------------------------------------------------------------------------------------ one node


def test_one_node():
    ((*command,),) = printed("one_node.sh", "-n", 2, "--dry-run", *CONFIG)
    port = command.pop(command.index("--master_port") + 1)
    assert 20000 <= int(port) < 40000
    assert command == ["deepspeed", "--num_gpus", "2", "--master_port", *TRAIN]


# ------------------------------------------------------------------------------------------------ hostfile


def test_hosts_by_pdsh(hostfile):
    ((program, *words),) = printed("hosts.sh", hostfile, "--launcher", "pdsh", "--port", 29500, "--dry-run", *CONFIG)
    assert Path(program).name == "deepspeed"
    front = ["--hostfile", str(hostfile), "--master_port", "29500", "--no_local_rank", "--force_multi"]
    assert words == [*front, "--launcher", "pdsh", *TRAIN[1:]]


def test_hosts_by_ssh(hostfile):
    """A machine each, by its number; the first one is where they meet. Words with spaces survive three shells."""
    commands = printed("hosts.sh", hostfile, "--port", 29500, "--dry-run", *CONFIG)
    for number, (host, command) in enumerate(zip(("node-a", "node-b"), commands, strict=True)):
        *reach, there, inside = command
        assert reach[:4] == ["ssh", "-tt", "-o", "BatchMode=yes"] and there == host
        *shell, script = shlex.split(inside)
        assert shell == ["stty", "-onlcr;", "exec", "bash", "-o", "pipefail", "-c"]
        script, _, prefixed = script.partition(" 2>&1 | ")
        assert prefixed == f"sed -u s/^/{host}:\\ /"
        words = shlex.split(script)
        assert words[: words.index("USR1") + 2] == ["cd", str(ROOT), "&&", "trap", "", "USR1", "&&"]
        front = ["--hostfile", str(hostfile), "--master_port", "29500", "--no_local_rank"]
        place = ["--no_ssh", "--node_rank", str(number), "--master_addr", "node-a"]
        assert words[words.index("--hostfile") :] == [*front, *place, *TRAIN[1:]]


def test_a_machine_that_fails_ends_the_others_with_its_code(hostfile, tmp_path):
    log = tmp_path / "log"
    wait = f'trap "echo ended >> {log}; kill \\$!; exit 1" HUP; sleep 40 & wait'
    program(tmp_path / "bin", "ssh", f'echo "$8" >> {log}; [[ "$8" == node-b ]] && exit 7; {wait}')
    done = launch("hosts.sh", str(hostfile), *CONFIG, path=tmp_path / "bin")
    assert done.returncode == 7 and "node-b ended with code 7" in done.stderr
    assert sorted(log.read_text().split()) == ["ended", "node-a", "node-b"]


def test_a_request_to_stop_is_handed_on_to_the_ranks_of_the_first_machine(hostfile, tmp_path):
    """By a second ssh; the ones that hold the job let the signal pass, and end with what the ranks then say."""
    log, flag = tmp_path / "log", tmp_path / "flag"
    asked = f'[[ "$1" == -tt ]] || {{ echo "$3 $4" >> {log}; touch {flag}; exit 0; }}'
    program(tmp_path / "bin", "ssh", f"{asked}; echo up >> {log}; until [[ -e {flag} ]]; do sleep 0.1; done; exit 75")
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["launch/hosts.sh", str(hostfile), "--port", "29500", *CONFIG]
    with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True) as job:
        while not (log.exists() and log.read_text().split() == ["up", "up"]):
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGUSR1)
        assert job.wait(timeout=30) == 75
    (told,) = [line for line in log.read_text().splitlines() if line != "up"]
    assert told.startswith("node-a pkill -USR1 -P") and "--master_port=29500" in told


def test_what_a_stopped_run_says_reaches_the_caller(hostfile, tmp_path):
    program(tmp_path / "bin", "ssh", "exit 75")
    assert launch("hosts.sh", str(hostfile), *CONFIG, path=tmp_path / "bin").returncode == 75


@pytest.mark.parametrize(
    ("content", "words", "fault"),
    [
        ("node-a slots=8\n", ["--launcher", "carrier-pigeon"], "--launcher is ssh or pdsh"),
        ("node-a\n", [], "HOST slots=RANKS"),
        ("node-a slots=0\n", [], "HOST slots=RANKS"),
        ("# nobody\n", [], "names no host"),
    ],
)
def test_hosts_refuses(tmp_path, content, words, fault):
    (tmp_path / "hosts").write_text(content)
    done = launch("hosts.sh", str(tmp_path / "hosts"), *words, "--dry-run", *CONFIG)
    assert done.returncode == 2 and fault in done.stderr
    assert launch("hosts.sh", str(tmp_path / "none"), *CONFIG).returncode == 2


# --------------------------------------------------------------------------------------------------- slurm


def test_slurm_submits():
    ((*command,),) = printed(
        "slurm.sh", "-N", 8, "-n", 8, "--notice", 600, "--sbatch=--partition=big", "--dry-run", *CONFIG
    )
    said = ["--job-name", "v4e", "--nodes", "8", "--ntasks-per-node", "1", "--requeue", "--open-mode", "append"]
    said += ["--signal", "USR1@600", "--output", "slurm-%j.log", "--gpus-per-node", "8", "--partition=big"]
    assert command == ["sbatch", *said, "launch/slurm.sh", "--job", "8", "gpu", *CONFIG]


def test_slurm_without_gpus_asks_for_none():
    ((*command,),) = printed("slurm.sh", "--cpu", "-n", 2, "--dry-run", *CONFIG)
    assert "--gpus-per-node" not in command and command[command.index("--job") :] == ["--job", "2", "cpu", *CONFIG]


def test_slurm_rolls_out_in_an_array():
    triplets = ["data/edits", "data/shards", "--config", "a b.yaml", "seed=1"]
    said = ["--job-name", "v4e-rollout", "--array", "0-15", "--nodes", "1", "--ntasks", "1", "--requeue"]
    said += ["--open-mode", "append", "--output", "rollout-%A-%a.log"]
    job = ["launch/rollout.sh", "-n", "8", *triplets]
    ((*command,),) = printed("rollout_slurm.sh", "-j", 16, "-n", 8, "--sbatch=--time=4:00:00", "--dry-run", *triplets)
    assert command == ["sbatch", *said, "--gpus-per-node", "8", "--time=4:00:00", *job]
    ((*command,),) = printed("rollout_slurm.sh", "-j", 16, "-n", 8, "--cpu", "--dry-run", *triplets)
    assert command == ["sbatch", *said, *job]


@pytest.mark.parametrize("words", [["-N", "none"], ["-n", "0"], ["--notice", "5m"], ["--unknown"], []])
def test_slurm_refuses(words):
    assert launch("slurm.sh", *words, "--dry-run", *(CONFIG if words else [])).returncode == 2


@pytest.fixture
def cluster(tmp_path):
    """Slurm's programs: srun starts the task of either node, one after the other; all is logged."""
    bin, log = tmp_path / "bin", tmp_path / "log"
    program(
        bin,
        "scontrol",
        f'if [[ "$2" == hostnames ]]; then printf "n1\\nn2\\n"; else echo "scontrol $*" >> {log}; fi',
    )
    nodes = 'code=0; for i in 0 1; do SLURM_NODEID=$i "${@:6}" || code=$?; done; exit $code'
    program(bin, "srun", f'echo "srun ${{*:1:5}}" >> {log}; {nodes}')
    told = f'echo "deepspeed ${{*:3}}" >> {log}; cat "$2" >> {log}; kill -USR1 $$; exit ${{CODE:-0}}'
    program(bin, "deepspeed", told)
    return bin, log


def run_job(cluster, code: int, *words: str, **more: str) -> tuple[int, list[str]]:
    bin, log = cluster
    job = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[1-2]", "CODE": str(code)} | more
    done = launch("slurm.sh", "--job", "4", "cpu", *CONFIG, *words, path=bin, **job)
    return done.returncode, log.read_text().splitlines()


def test_a_slurm_job_starts_every_node(cluster):
    """The launcher of each is told its number and the hosts, and SIGUSR1, meant for its ranks, does not end it."""
    code, lines = run_job(cluster, 0)
    assert code == 0
    assert lines[0] == "srun --ntasks-per-node 1 --kill-on-bad-exit=0 --wait 60"
    for number in (0, 1):
        place = f"--no_ssh --node_rank {number} --master_addr n1 --master_port 20007"
        assert f"deepspeed {place} {' '.join(TRAIN)}" in lines
    assert lines.count("n1 slots=4") == lines.count("n2 slots=4") == 2
    assert not re.search("requeue", "\n".join(lines))


@pytest.mark.parametrize(("code", "again"), [(75, 1), (7, 0), (1, 0)])
def test_only_what_was_asked_to_stop_is_requeued(cluster, code, again):
    ended, lines = run_job(cluster, code)
    assert ended == code
    assert lines.count("scontrol requeue 20007") == again


def test_a_job_that_was_requeued_goes_on_though_it_was_to_begin_anew(cluster):
    _, lines = run_job(cluster, 0, "--resume", "never", SLURM_RESTART_COUNT="1")
    (words, _) = (line.split()[line.split().index("train") :] for line in lines if line.startswith("deepspeed"))
    assert cli.parser().parse_args(words).resume == "auto"
    assert not any("--resume auto" in line for line in run_job(cluster, 0, SLURM_RESTART_COUNT="0")[1][len(lines) :])


LAUNCHERS = sorted(
    p.name for p in (ROOT / "launch").glob("*.sh") if p.name != "first_day.sh"
)  # that is a list of stages


@pytest.mark.parametrize("script", LAUNCHERS)
def test_scripts_know_no_hyper_parameter(script):
    text = (ROOT / "launch" / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert not re.search(r"\b(loop|optim|terms)\.\w", text)
