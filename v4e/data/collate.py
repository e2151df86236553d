"""Samples to batches: stack, pad words, build masks. Knows shapes, no model."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v4e.data import buffers
from v4e.errors import DataError
from v4e.nouns import (
    Conditions,
    EditBatch,
    Encoded,
    Grid,
    Rollout,
    RolloutBatch,
    Sample,
    known_mask_4thw,
)

TextKind = Literal["instruction", "evolution"]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as fp32; on a CPU cast into their place, in memory that an earlier batch has left.

    Raises:
        DataError: they are of several shapes.
    """
    first = tensors[0]
    if odd := [list(x.shape) for x in tensors if x.shape != first.shape]:
        raise DataError(f"tensors of {list(first.shape)} and {odd[0]} in one batch")
    if not first.is_cpu:
        return torch.stack(list(tensors)).float()
    stacked = buffers.empty(len(tensors), *first.shape)
    for row, x in zip(stacked.unbind(), tensors, strict=True):
        row.copy_(x)
    return stacked


def stack_words(texts_LE: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of different lengths to ([B, L, E] zero-padded to the longest, words [B])."""
    words_B = torch.tensor([t.shape[0] for t in texts_LE])
    return pad_sequence(list(texts_LE), batch_first=True).float(), words_B


def stack_conditions(
    texts_LE: Sequence[Tensor], vision_NV: Sequence[Tensor], known_Cthw: Sequence[Tensor], *, last: bool
) -> Conditions:
    """Conditions of a batch; with ``last``, ``vision_NV`` lists first and last image of each sample in turn."""
    text, words = stack_words(texts_LE)
    known = stack(known_Cthw)
    mask = known_mask_4thw(Grid.of_latents(*known.shape[2:]), last).expand(len(known), -1, -1, -1, -1)
    return Conditions(text, words, stack(vision_NV), known, mask)


def student_conditions(encoded: Sequence[Encoded], text: TextKind) -> Conditions:
    """What I2V is told: the source and a text."""
    texts = [e.text_LE if text == "instruction" else e.evolution_LE for e in encoded]
    return stack_conditions(texts, [e.vision_NV for e in encoded], [e.known_Cthw for e in encoded], last=False)


def teacher_conditions(encoded: Sequence[Encoded]) -> Conditions:
    """What FLF2V is told: source, edited image and the evolution prompt."""
    vision = [v for e in encoded for v in (e.vision_NV, e.vision_last_NV)]
    known = [e.teacher_known_Cthw for e in encoded]
    return stack_conditions([e.evolution_LE for e in encoded], vision, known, last=True)


def stack_rollouts(rollouts: Sequence[Rollout], teacher: Conditions) -> RolloutBatch:
    """Roll-outs with the conditions they were made under."""

    def stacked(name: str) -> Tensor:
        return stack([getattr(r, name) for r in rollouts])

    return RolloutBatch(
        stacked("sigma_K"), stacked("x_KCthw"), stacked("v_KCthw"), stacked("full_KCthw"), stacked("end_Cthw"), teacher
    )


def collate(
    samples: Sequence[Sample],
    weights: Sequence[float],
    *,
    text: TextKind = "instruction",
    first_and_last: bool = False,
    rollout: bool = False,
) -> EditBatch:
    """Stack samples.

    Args:
        text: which prompt conditions the model to be trained.
        first_and_last: condition on both ends (FLF2V) instead of the source alone.
        rollout: also stack the teacher's states.

    Raises:
        DataError: a sample has no latents, or no roll-out where one is asked for; it names the key.
    """
    encoded = [_encoded(s) for s in samples]
    teacher = teacher_conditions(encoded) if first_and_last or rollout else None
    conditions = teacher if first_and_last and teacher else student_conditions(encoded, text)
    null, null_words = stack_words([e.null_LE for e in encoded])
    return EditBatch(
        keys=tuple(s.key for s in samples),
        weight_B=torch.tensor(weights, dtype=torch.float32),
        clip_BCthw=stack([e.clip_Cthw for e in encoded]),
        change_Bthw=stack([e.change_thw for e in encoded]),
        conditions=conditions,
        null_BLE=null,
        null_words_B=null_words,
        rollout=stack_rollouts([_rollout(s) for s in samples], teacher) if rollout and teacher else None,
    )


def _encoded(sample: Sample) -> Encoded:
    if sample.encoded is None:
        raise DataError("has no latents", where=f"sample {sample.key}", fix="pack it with `v4e-shards rollout`")
    return sample.encoded


def _rollout(sample: Sample) -> Rollout:
    if sample.rollout is None:
        raise DataError(
            "has no teacher roll-out",
            where=f"sample {sample.key}",
            fix="run `v4e-shards rollout` with a teacher, or train with recipe flow_matching",
        )
    return sample.rollout
