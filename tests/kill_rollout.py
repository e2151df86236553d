"""Kill ranks of a roll-out with SIGKILL, again and again, and compare what comes out with a run that nobody disturbed.

    python -m tests.kill_rollout --triplets 200 --kills 20
    python -m tests.kill_rollout --triplets 200 --kills 20 --s3

A round starts 1 to 4 ranks (the first one 4), each a process of its own, and kills all of them at random moments.
After the last round a run is let through to the end. With ``--s3`` the set is on a moto server of this process.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.ingest import Triplet
from data_tools.rollout import RolloutConfig, Worker, rollout
from data_tools.rollout.spool import Spool
from tests.builders import wan_folder
from v4e.config import Wandb
from v4e.data.places import Place, place, read_bytes, sizes, system
from v4e.data.shards import ShardSet

FORK = multiprocessing.get_context("fork")  # importing torch for each of a hundred ranks would take half an hour
SIZE = 32


@dataclass(frozen=True)
class Verdict:
    """What became of a set whose ranks were killed.

    Args:
        samples, lost, doubled: of the final set, against the list.
        different: samples that are not, member by member, those of the undisturbed run.
        killed: ranks that died by the signal.
        begun, unfinished: units that were begun, and those of them that a kill took.
        repeated: units that were begun although they were safe.
    """

    rounds: int
    samples: int
    lost: int
    doubled: int
    different: int
    killed: int
    begun: int
    unfinished: int
    repeated: int
    whole_shards_equal: bool

    @property
    def holds(self) -> bool:
        nothing = self.lost + self.doubled + self.different + self.repeated
        return not nothing and self.unfinished <= self.killed and self.whole_shards_equal


def trial(folder: Path, triplets: int, rounds: int, seed: int, url: str = "") -> Verdict:
    """Roll out twice, once undisturbed, and compare.

    Args:
        url: of the set whose ranks are killed; in ``folder`` by default.
    """
    out = place(url or folder / "set")
    torch.set_num_threads(1)
    rows, config = make_triplets(folder / "in", triplets), settings(wan_folder(folder / "teacher", "flf2v"))
    rollout(rows, folder / "calm", config)
    draw, log = random.Random(seed), folder / "log"
    killed = sum(_round(rows, out, config, log, draw, 4 if n == 0 else None) for n in range(rounds))
    _let_through(rows, out, config, log, draw.randint(1, 4))
    return _compare(folder / "calm", out, [t.id for t in rows], log, killed, rounds)


@contextmanager
def s3() -> Iterator[str]:
    """A bucket on a moto server, which every process that is started within reaches."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel("ERROR")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "trial", "AWS_SECRET_ACCESS_KEY": "trial", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    system(place("s3://trial/set")).mkdir("trial")
    yield "s3://trial/set"
    server.stop()


def make_triplets(folder: Path, count: int) -> list[Triplet]:
    """Edits of small random pictures."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in (f"{kind}{i}.png" for i in range(count) for kind in "se"):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / name)
    words = {"instruction": "make the sky red", "evolution": "the sky turn red"}
    return [
        Triplet(id=f"t{i}", source=folder / f"s{i}.png", edited=folder / f"e{i}.png", **words) for i in range(count)
    ]


def settings(teacher: Path) -> RolloutConfig:
    quiet = Wandb(mode="disabled")
    return RolloutConfig(
        teacher=str(teacher), teacher_frames=9, step_counts=(1, 2), guidance=2.0, batch=4, samples_per_shard=12,
        dtype="fp32", attention="native", threads=1, parts=1, wandb=quiet,
    )  # fmt: skip


def _round(rows, out: Place, config: RolloutConfig, log: Path, draw: random.Random, ranks: int | None) -> int:
    """Start ranks and kill each at a moment of its own; how many were still alive then."""
    parts = ranks or draw.randint(1, 4)
    processes = _start(rows, out, config, log, parts)
    goal = len(_lines(log)) + draw.randint(1, 5)
    while len(_lines(log)) < goal and any(p.is_alive() for p in processes):
        time.sleep(0.005)
    for process in draw.sample(processes, parts):
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
    for process in processes:
        process.join()
    return sum(p.exitcode == -signal.SIGKILL for p in processes)


def _let_through(rows, out: Place, config: RolloutConfig, log: Path, parts: int) -> None:
    processes = _start(rows, out, config, log, parts)
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * parts, log.with_name("stderr").read_text()[-2000:]


def _start(rows, out: Place, config: RolloutConfig, log: Path, parts: int) -> list:
    shares = [replace(config, part=part, parts=parts) for part in range(parts)]
    processes = [FORK.Process(target=_rank, args=(rows, out, share, log)) for share in shares]
    for process in processes:
        process.start()
    return processes


def _rank(rows, out: Place, config: RolloutConfig, log: Path) -> None:
    """One rank, which notes what it begins and what is safe; a line is one write, which a kill does not tear."""
    sys.stderr = open(log.with_name("stderr"), "a")  # noqa: SIM115
    work, save = Worker.work, Spool.save
    note = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def noted_work(self, unit):
        os.write(note, f"begun {unit[0].id}\n".encode())
        return work(self, unit)

    def noted_save(self, unit, outcome):
        save(self, unit, outcome)
        os.write(note, f"safe {self.plan.unit(unit)[0].id}\n".encode())

    Worker.work, Spool.save = noted_work, noted_save
    rollout(rows, out, config)


def _lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def _compare(whole: Path, out: Place, keys: list[str], log: Path, killed: int, rounds: int) -> Verdict:
    calm, made = ShardSet.open(whole), ShardSet.open(out, verify="none")
    counts = Counter(made.keys)
    places = {key: i for i, key in enumerate(made.keys)}
    same = [_members(calm, i) == _members(made, places[key]) for i, key in enumerate(calm.keys) if key in places]
    lines = _lines(log)
    safe, repeated = set(), 0
    for what, unit in lines:
        repeated += what == "begun" and unit in safe
        safe |= {unit} if what == "safe" else set()
    begun = sum(what == "begun" for what, _ in lines)
    tars = [{name: read_bytes(at / name) for name in sizes(at) if name.endswith(".tar")} for at in (whole, out)]
    return Verdict(
        rounds=rounds,
        samples=len(made),
        lost=len(set(keys) - set(counts)),
        doubled=sum(n > 1 for n in counts.values()),
        different=len(keys) - sum(same),
        killed=killed,
        begun=begun,
        unfinished=begun - sum(what == "safe" for what, _ in lines),
        repeated=repeated,
        whole_shards_equal=tars[0] == tars[1],
    )


def _members(shards: ShardSet, i: int) -> list[tuple[str, bytes | None]]:
    return [(kind, shards.raw(i, kind)) for kind in shards.kinds(i)]


def main() -> int:
    """Print the verdict, and say by the exit code whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20, help="rounds, in each of which all ranks are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true", help="roll out to an S3 server")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3() if args.s3 else nullcontext("") as url:
        verdict = trial(Path(folder), args.triplets, args.kills, args.seed, url)
    print(json.dumps({**vars(verdict), "holds": verdict.holds}, indent=1))
    return int(not verdict.holds)


if __name__ == "__main__":
    sys.exit(main())
