"""glibc's malloc while weights stream in: what is freed goes back to the system at once.

By itself it learns from blocks that are freed to keep ever larger ones, up to 32 MB. A rank to which a model is shown
tensor by tensor then keeps holes of every size between its own shares: up to 1,040 MB above an empty run where 490 are
in use. The setting is the process's, so a training is handed what malloc's own learning ends with: there, blocks that
every step takes again are better kept.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from v4e import dist

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
RETURNED = 1 << 20  # bytes from which a block is mapped by itself, and unmapped when it is freed
LEARNED = 32 << 20  # the most that it learns by itself; it then trims what is free above twice as much


@contextmanager
def given_back() -> Iterator[None]:
    """Inside, freed blocks leave the process. Other mallocs, and one that the user has set up, are left alone."""
    if platform.libc_ver()[0] != "glibc" or dist.malloc_is_told():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, RETURNED)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, LEARNED)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LEARNED)
