"""What is freed while weights stream in leaves the process; afterwards malloc keeps blocks for their next use."""

import json
import os
import platform
import subprocess
import sys

import pytest

from v4e import dist

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")

HOLES = """
import ctypes, json
from contextlib import nullcontext
from v4e.train.heap import given_back
from v4e.train.meter import resident

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def taken(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

def left(around):
    '''MB that stay of 100 MB when they are freed, small blocks that stay lying between them.'''
    before = resident("VmRSS") / 1e6
    with around:
        blocks = [(taken(2 << 20), taken(1 << 14)) for _ in range(50)]
        for large, small in blocks:
            libc.free(large)
    return resident("VmRSS") / 1e6 - before

libc.free(taken(24 << 20))  # from which malloc learns to keep blocks of that size
print(json.dumps([left(given_back()), left(nullcontext())]))
"""


def holes(**variables: str) -> list[float]:
    """MB left inside and afterwards, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", HOLES],
        env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_freed_blocks_leave_inside_and_are_kept_afterwards():
    inside, afterwards = holes()
    assert inside < 10 and afterwards > 90


def test_what_the_environment_says_of_malloc_stands():
    inside, _ = holes(MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert inside > 90


def test_the_environment_is_asked(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert not dist.malloc_is_told()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert dist.malloc_is_told()
