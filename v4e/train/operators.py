"""DeepSpeed's own operators, compiled on first use, of which offloading needs some."""

import shutil

from deepspeed.accelerator import get_accelerator

BUILDERS = {"cpu_adam": ("CPUAdamBuilder", "optimiser on the CPU"), "async_io": ("AsyncIOBuilder", "offload to NVMe")}


def compilable() -> dict[str, tuple[str, str]]:
    """Operator -> (what it is for, why it cannot be compiled here; empty where it can)."""
    return {name: (purpose, fault(name)) for name, (_, purpose) in BUILDERS.items()}


def fault(name: str) -> str:
    """Why an operator cannot be compiled here; empty where it can."""
    if missing := [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]:
        return f"no {' and no '.join(missing)}"
    accelerator = get_accelerator()
    operator = accelerator.create_op_builder(BUILDERS[name][0]) if accelerator is not None else None
    return "" if operator is not None and operator.is_compatible(verbose=False) else "its libraries are missing"
