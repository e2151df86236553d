"""What this machine has and lacks for v4e, and the fix for each; nothing is changed, and no key or token is shown."""

import netrc
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal, get_args

from v4e import dist
from v4e.errors import ConfigError

NEEDED = (
    "torch",
    "deepspeed",
    "diffusers",
    "transformers",
    "webdataset",
    "safetensors",
    "omegaconf",
    "huggingface_hub",
)
OPTIONAL = {  # package -> what brings it
    "xformers": "pip install 'v4e[gpu]'",
    "peft": "pip install 'v4e[lora]'",
    "bitsandbytes": "pip install 'v4e[8bit]'",
    "wandb": "pip install wandb",
}
PROBE = 32 * 1024**2  # bytes written to learn a disk's speed
ROOM, SPEED, SHARED = 20e9, 100e6, 1e9  # free bytes and bytes per second below which a run will suffer
DEVICES, INTERFACES, FABRIC = Path("/dev/shm"), Path("/sys/class/net"), Path("/sys/class/infiniband")

State = Literal["ok", "lacks", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line: ``lacks`` is what v4e can do without, ``broken`` what it cannot.

    Args:
        seen: what was found.
        fix: what to do about it; empty where all is well.
    """

    name: str
    state: State
    seen: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:<7}{self.name}: {self.seen}" + (f"\n       -> {self.fix}" if self.fix else "")


Check = Callable[[], Iterator[Finding]]


def examine(output: Path) -> list[Finding]:
    """Everything, looked at in turn; a look that fails is a finding itself."""
    checks: dict[str, Check] = {
        "Python": python,
        "packages": packages,
        "devices": accelerators,
        "attention": attention,
        "DeepSpeed": operators,
        "network": network,
        "disk": lambda: disk(output),
        "shared memory": shared_memory,
        "Weights & Biases": curves,
        "Hub": hub,
    }
    return [finding for name, check in checks.items() for finding in _guarded(name, check)]


def report(findings: Sequence[Finding]) -> str:
    """What a person reads, or pastes into a bug report."""
    count = {state: sum(f.state == state for f in findings) for state in get_args(State)}
    return "\n".join([*map(str, findings), ", ".join(f"{n} {state}" for state, n in count.items())])


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where something is broken."""
    return int(any(f.state == "broken" for f in findings))


# ------------------------------------------------------------------------------------------------- checks


def python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if good else "broken", version, "" if good else "make PYTHON=python3.11")


def packages() -> Iterator[Finding]:
    """Versions; what is needed is broken where it is missing."""
    for name in ("v4e", *NEEDED, *OPTIONAL):
        version, fault = version_of(name), "broken" if name in NEEDED else "lacks"
        install = "pip install --no-deps -e ." if name == "v4e" else "pip install -r constraints.txt"
        fix = OPTIONAL.get(name, install)
        yield Finding(name, "ok" if version else fault, version or "not installed", "" if version else fix)


def accelerators() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU", "ok", f"{cores} cores for this process, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
        fix = "wan-nano trains on a CPU; for a GPU install its driver and a torch for its CUDA"
        yield Finding("CUDA", "lacks", f"no GPU; {built}", fix)
        return
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        bf16 = device.major >= 8
        seen = f"{device.name}, {device.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        fix = "" if bf16 else "it has no bf16: train with loop.precision=fp32"
        yield Finding(f"GPU {i}", "ok" if bf16 else "lacks", seen, fix)


def attention() -> Iterator[Finding]:
    """Each backend, tried."""
    from v4e.models.attention import Attention, resolve

    for backend in get_args(Attention):
        try:
            yield Finding(f"attention={backend}", "ok", f"works as {resolve(backend)}")
        except ConfigError as error:
            yield Finding(f"attention={backend}", "lacks", error.what, error.fix)


def operators() -> Iterator[Finding]:
    """What DeepSpeed would compile here."""
    from v4e.train.operators import compilable

    for name, (purpose, fault) in compilable().items():
        fix = f"without it there is no {purpose}" if fault else ""
        yield Finding(f"DeepSpeed {name}", "lacks" if fault else "ok", fault or "can be compiled", fix)


def network() -> Iterator[Finding]:
    """Where NCCL and gloo would talk: interfaces that are up, a fabric, and whether the machine's name leads there."""
    up = [d.name for d in sorted(INTERFACES.glob("*")) if d.name != "lo" and _text(d / "operstate") != "down"]
    fabric = [d.name for d in sorted(FABRIC.glob("*"))]
    seen = f"up: {', '.join(up) or 'none'}; fabric: {', '.join(fabric) or 'none'}"
    fix = "" if up else "one machine is all this can be; check `ip link` for a second"
    yield Finding("network", "ok" if up else "lacks", seen, fix)
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield Finding("host name", "broken", f"{name} is unknown: {error}", f"add `127.0.0.1 {name}` to /etc/hosts")
        return
    local = address.startswith("127.")
    choice = f"for several machines: export NCCL_SOCKET_IFNAME={up[0]} GLOO_SOCKET_IFNAME={up[0]}" if up else ""
    yield Finding("host name", "lacks" if local else "ok", f"{name} is {address}", choice if local else "")


def disk(output: Path) -> Iterator[Finding]:
    """Room and speed of the place a run would be written to."""
    folder = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
    try:
        free, speed = shutil.disk_usage(folder).free, write_speed(folder)
    except OSError as error:
        yield Finding("disk", "broken", f"{folder}: {error.strerror}", "name another with --output, or make room")
        return
    yield Finding(
        "disk room",
        "ok" if free >= ROOM else "lacks",
        f"{free / 1e9:.0f} GB free at {folder}",
        "" if free >= ROOM else "`v4e plan` says what a run needs; make room, or keep fewer with loop.keep_last",
    )
    yield Finding(
        "disk speed",
        "ok" if speed >= SPEED else "lacks",
        f"{speed / 1e6:.0f} MB/s written and synced at {folder}",
        "" if speed >= SPEED else "checkpoints will take long: raise loop.save_every, or write to a local disk",
    )


def shared_memory() -> Iterator[Finding]:
    """NCCL's ranks of one machine talk through it."""
    if not DEVICES.is_dir():
        yield Finding("shared memory", "lacks", f"no {DEVICES}", "mount a tmpfs there")
        return
    free = shutil.disk_usage(DEVICES).free
    fix = "" if free >= SHARED else "give the container more: docker run --shm-size=8g"
    yield Finding("shared memory", "ok" if free >= SHARED else "lacks", f"{free / 1e9:.1f} GB free", fix)


def curves() -> Iterator[Finding]:
    """Whether Weights & Biases could be online; offline needs nothing."""
    known = _is_set("WANDB_API_KEY") or _in_netrc("api.wandb.ai")
    fix = "" if known else "`wandb login` for loop.wandb.mode=online; offline runs need none and can be synced later"
    yield Finding("W&B login", "ok" if known else "lacks", "present" if known else "none", fix)


def hub() -> Iterator[Finding]:
    """Where models are downloaded to, and whether a token is there for those that ask for one."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    models = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*"))
    seen = f"{cache}: {', '.join(models) or 'no models'}"
    yield Finding(
        "Hub cache", "ok" if models else "lacks", seen, "" if models else "`hf download MODEL`, or use folders"
    )
    known = get_token() is not None
    fix = "" if known else "`hf auth login`, if a model asks for it; Wan's do not"
    yield Finding("Hub token", "ok" if known else "lacks", "present" if known else "none", fix)


# ------------------------------------------------------------------------------------------------- inside


def version_of(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def write_speed(folder: Path) -> float:
    """Bytes per second, of a file that leaves no trace."""
    content = os.urandom(PROBE)
    with TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return PROBE / (time.perf_counter() - began)


def _guarded(name: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # a driver, a package or a file system may fail in any way, and that is worth a line
        return [
            Finding(name, "broken", f"{type(error).__name__}: {error}", "mend what the message names, and ask again")
        ]


def _is_set(variable: str) -> bool:
    try:
        return bool(dist.secret(variable))
    except ConfigError:
        return False


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # there is none, or nobody can read it
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
