"""DeepSpeed's own operators, compiled on first use, of which offloading needs some."""

import shutil

from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

BUILDERS = {"cpu_adam": ("optimiser on the CPU", CPUAdamBuilder), "async_io": ("offload to NVMe", AsyncIOBuilder)}


def compilable() -> dict[str, tuple[str, str]]:
    """Operator -> (what it is for, why it cannot be compiled here; empty where it can)."""
    return {name: (purpose, _fault(builder)) for name, (purpose, builder) in BUILDERS.items()}


def _fault(builder: type) -> str:
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)}"
    return "" if builder().is_compatible(verbose=False) else "its libraries are missing"
