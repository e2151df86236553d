"""Contact sheets during training: fixed validation edits, made by the student as it is, and what they are worth.

Beside them stand the source, the teacher's edit where the set holds roll-outs, and the target.

Validation is a pre-encoded shard set, so no encoder is needed: every rank runs the same forwards, because ZeRO-3
gathers from all of them, and rank 0 alone decodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from v4e import flow
from v4e.data.collate import TextKind, student_conditions
from v4e.data.shards import ShardSet
from v4e.dist import Ranks
from v4e.errors import ConfigError, DataError
from v4e.eval.metrics import edit_mask, score
from v4e.eval.sheet import Column, SheetRow, draw
from v4e.models.codec import WanCodec
from v4e.nouns import Clip, Conditions, Sample, seed_of
from v4e.verbs import Backbone

MEASURED = ("psnr", "edit_psnr", "keep_psnr", "ssim", "sharpness")
LARGEST, WIDEST = 3, 512  # times, and pixels of a picture on the sheet, which must stay one that viewers open


@dataclass
class ContactSheet:
    """Makes the same edits each time, and shows and measures them.

    Args:
        validation: shard folder with encoded triplets.
        codec: diffusers folder or Hub id whose VAE decodes.
        player: who is shown.
        text: which prompt it reads.
        shift, steps: of the few-step grid.
        rows: validation samples shown, the first ones.
    """

    validation: str | Path
    codec: str
    ranks: Ranks
    player: str = "student"
    text: TextKind = "instruction"
    shift: float = 3.0
    steps: int = 4
    rows: int = 11

    @staticmethod
    def of(recipe: Any, ranks: Ranks) -> "ContactSheet":
        """The edits of a recipe's own validation set.

        Raises:
            ConfigError: the recipe's model is told both ends.
        """
        if getattr(recipe, "conditioned_on", "first") != "first":
            what = "a contact sheet shows edits made of the source alone, and this model is told both ends"
            raise ConfigError(what, where="key loop.validation", fix="leave it empty")
        text: TextKind = getattr(recipe, "text", "instruction")
        return ContactSheet(recipe.loop.validation, recipe.codec, ranks, text=text, shift=recipe.shift)

    def prepare(self) -> None:
        """Read what every sheet needs; a run calls it before its first step.

        Raises:
            DataError: there is no set, or nothing in it.
            CheckpointError: there is no VAE to decode with.
        """
        if not self._samples:
            raise DataError("holds no sample to show", where=str(self.validation), fix="leave loop.validation empty")
        self._conditions.to(self.ranks.device)
        if self.ranks.is_main:
            self._codec.vae.to("cpu")

    def edit(self, players: Mapping[str, Backbone]) -> Tensor:
        """Edit every validation sample once, from the same noise each time; latents on the CPU."""
        model, conditions = players[self.player], self._conditions.to(self.ranks.device)

        def velocity(x_BCthw: Tensor, sigma_B: Tensor) -> Tensor:
            return model(x_BCthw, sigma_B, conditions)[0].float()

        with torch.no_grad():
            grid = flow.time_grid(self.steps, self.shift)
            return flow.euler(velocity, self._noise.to(self.ranks.device), grid).cpu()

    def show(self, step: int, edits: Mapping[str, Tensor]) -> tuple[Image.Image, dict[str, float]]:
        """The sheet, a column for each maker, and ``maker/metric`` -> mean over the samples.

        Between them and the target stands what the teacher's roll-outs ended in, where the samples have them.
        """
        edited = {maker: self._decode(z_BCthw) for maker, z_BCthw in edits.items()}
        metrics = {f"{m}/{name}": value for m, clips in edited.items() for name, value in self._measure(clips).items()}
        shown = edited | ({"teacher": self._taught} if self._taught else {})
        words = Column("instruction", text_width=150)
        columns = [self._column("source"), words, *map(self._column, shown), self._column("target")]
        made = zip(*shown.values(), strict=True)
        rows = [SheetRow(self._cells(s, clips)) for s, clips in zip(self._samples, made, strict=True)]
        return draw(f"step {step}, {self.steps} solver steps", columns, rows), metrics

    def _column(self, title: str) -> Column:
        sizes = [sample.source.size for sample in self._samples if sample.source]
        return Column(title, min(LARGEST, WIDEST / max(width for _, width in sizes)))

    def _measure(self, edited: Sequence[Clip]) -> dict[str, float]:
        """Means over the samples of what :mod:`v4e.eval.metrics` says without a judge; of those that have it."""
        each = [vars(score(*_pictures(s, clip))) for s, clip in zip(self._samples, edited, strict=True)]
        told = {name: [one[name] for one in each if one[name] is not None] for name in MEASURED}
        return {name: fmean(values) for name, values in told.items() if values}

    @staticmethod
    def _cells(sample: Sample, made: Sequence[Clip]) -> tuple[Clip | str, ...]:
        assert sample.source and sample.target  # read with pictures
        return sample.source, f"{sample.task}:\n{sample.instruction}", *made, sample.target

    @cached_property
    def _samples(self) -> list[Sample]:
        shards = ShardSet.open(self.validation)
        return [shards.sample(i, pictures=True) for i in range(min(self.rows, len(shards)))]

    @cached_property
    def _taught(self) -> list[Clip]:
        """The teacher's edits of the samples; none unless all were rolled out."""
        ends = [s.rollout.end_Cthw.float() for s in self._samples if s.rollout]
        return self._decode(torch.stack(ends)) if len(ends) == len(self._samples) else []

    @cached_property
    def _conditions(self) -> Conditions:
        return student_conditions([s.encoded for s in self._samples if s.encoded], self.text)

    @cached_property
    def _noise(self) -> Tensor:
        shape = self._conditions.known_BCthw.shape[1:]
        seeds = [seed_of("contact sheet", s.key) for s in self._samples]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _decode(self, z_BCthw: Tensor) -> list[Clip]:
        """By the accelerator, where the others wait for this rank; between sheets the VAE leaves it to the training."""
        vae = self._codec.vae.to(self.ranks.device)
        try:
            return self._codec.decode_last(z_BCthw)
        finally:
            vae.to("cpu")

    @cached_property
    def _codec(self) -> WanCodec:
        return WanCodec.load(self.codec, self.ranks.device)


def _pictures(sample: Sample, edited: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """Output, target, and a mask of where the target differs from the source."""
    assert sample.source and sample.target  # read with pictures
    source, target = sample.source.frames_T3HW[0], sample.target.frames_T3HW[0]
    return edited.frames_T3HW[-1], target, edit_mask(source, target)
