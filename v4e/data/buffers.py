"""Memory for samples and batches, taken from the system once and used again as soon as nothing refers to it.

Threads that get and free blocks of ever other sizes leave holes in malloc's arenas, and a process that grows for days.
"""

import math
import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

KEPT = 128  # free blocks of one size
_free: dict[int, deque[mmap.mmap]] = {}


def take(size: int) -> memoryview:
    """So many writable bytes, of any content; tensors made of them keep them."""
    rounded = _rounded(size)
    free = _free.setdefault(rounded, deque(maxlen=KEPT))  # a deque needs no lock, which a finaliser must not wait for
    try:
        block = free.pop()
    except IndexError:
        block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    content = np.frombuffer(block, np.uint8)[:size]
    weakref.finalize(content, free.append, block).atexit = False
    return content.data


def empty(*shape: int) -> Tensor:
    """An fp32 tensor of any content in such memory."""
    if not (count := math.prod(shape)):
        return torch.empty(shape)
    return torch.frombuffer(take(4 * count), dtype=torch.float32, count=count).view(shape)


def _rounded(size: int) -> int:
    """To whole pages, and to three binary digits, so that blocks fit again."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 3))
    return max(1, -(-size // step)) * step
