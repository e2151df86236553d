"""Contact sheets during training: fixed validation edits, made by the student as it is.

Validation is a pre-encoded shard set, so no encoder is needed: every rank runs the same forwards, because ZeRO-3
gathers from all of them, and rank 0 alone decodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from v4e import flow
from v4e.data.collate import student_conditions
from v4e.data.shards import ShardSet
from v4e.dist import Ranks
from v4e.eval.sheet import Column, SheetRow, draw
from v4e.models.codec import WanCodec
from v4e.nouns import Clip, Conditions, Sample, seed_of
from v4e.verbs import Backbone


@dataclass
class ContactSheet:
    """Callable (step, players) -> picture on rank 0, None elsewhere.

    Args:
        validation: shard folder with encoded triplets.
        codec: diffusers folder or Hub id whose VAE decodes.
        player: who is shown.
        shift, steps: of the few-step grid.
        rows: validation samples shown, the first ones.
    """

    validation: str | Path
    codec: str
    ranks: Ranks
    player: str = "student"
    shift: float = 3.0
    steps: int = 4
    rows: int = 11

    def __call__(self, step: int, players: Mapping[str, Backbone]) -> Image.Image | None:
        """Edit every validation sample once, from the same noise each time."""
        model, conditions = players[self.player], self._conditions.to(self.ranks.device)

        def velocity(x_BCthw: Tensor, sigma_B: Tensor) -> Tensor:
            return model(x_BCthw, sigma_B, conditions)[0].float()

        with torch.no_grad():
            z_BCthw = flow.euler(velocity, self._noise.to(self.ranks.device), flow.time_grid(self.steps, self.shift))
        return self._draw(step, z_BCthw.cpu()) if self.ranks.is_main else None

    def _draw(self, step: int, z_BCthw: Tensor) -> Image.Image:
        edited = self._decoder.decode_last(z_BCthw)
        columns = [Column("source"), Column("instruction", text_width=150), Column(self.player), Column("target")]
        rows = [SheetRow(self._cells(s, clip)) for s, clip in zip(self._samples, edited, strict=True)]
        return draw(f"step {step}, {self.steps} solver steps", columns, rows)

    @staticmethod
    def _cells(sample: Sample, edited: Clip) -> tuple[Clip | str, ...]:
        assert sample.source and sample.target  # read with pictures
        return sample.source, f"{sample.task}:\n{sample.instruction}", edited, sample.target

    @cached_property
    def _samples(self) -> list[Sample]:
        shards = ShardSet.open(self.validation)
        return [shards.sample(i, pictures=True) for i in range(min(self.rows, len(shards)))]

    @cached_property
    def _conditions(self) -> Conditions:
        return student_conditions([s.encoded for s in self._samples if s.encoded], "instruction")

    @cached_property
    def _noise(self) -> Tensor:
        shape = self._conditions.known_BCthw.shape[1:]
        seeds = [seed_of("contact sheet", s.key) for s in self._samples]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    @cached_property
    def _decoder(self) -> WanCodec:
        return WanCodec.load(self.codec)
