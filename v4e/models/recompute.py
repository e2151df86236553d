"""What a block computes again in the backward pass instead of keeping it: everything, or all but what costs most."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)  # of activations with weights
KERNELS = ("attention", "flash")  # in the names of fused attention's operators: PyTorch's, xformers', flash-attn's


def recomputed(block: Callable[..., Tensor], *arguments: object, selective: bool) -> Tensor:
    """A block's output, whose backward pass computes the block again.

    Args:
        selective: keep what products with weights and fused attention gave. They are most of the arithmetic and the
            smaller part of what autograd keeps; norms, gates and activations are computed again.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy) if selective else noop_context_fn
    # Nothing in a block is random, so the generators' states need not be kept for the second pass.
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # type: ignore[return-value]


def _policy(_: object, operator: object, *arguments: object, **named: object) -> CheckpointPolicy:
    kept = operator in PRODUCTS or any(word in str(operator) for word in KERNELS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
