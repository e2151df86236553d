"""Plain flow matching: pre-training on evolving clips, and the baseline that a distilled student must beat.

L = E | v(x_sigma, sigma, conditions) - (noise - x0) |^2 on x_sigma = (1 - sigma) x0 + sigma noise (Lipman et al. 2023,
arXiv 2210.02747; the rectified path of arXiv 2209.03003).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from v4e import flow, losses
from v4e.config import Loop
from v4e.data.collate import TextKind, collate
from v4e.errors import found_at
from v4e.models import wan
from v4e.nouns import Draw, EditBatch, Levels, Losses, Optim, Player, Sample
from v4e.verbs import Backbone


@dataclass(frozen=True)
class FlowMatching:
    """Config and recipe.

    Args:
        init: diffusers folder or hub id the weights come from.
        fresh: keep only the architecture of ``init`` and start from random weights.
        conditioned_on: the first frame (I2V) or both ends (FLF2V).
        text: which prompt the model reads.
        shift: noise levels are drawn as ``levels`` says, then shifted by this.
        edit_boost: extra weight of places that change (losses.region_weight); 0 is plain flow matching.
        drop_text: share of samples that see the empty prompt, for guidance.
        temporal_skip: see :class:`v4e.recipes.video4edit.Video4Edit`.
    """

    init: str = ""
    fresh: bool = False
    conditioned_on: Literal["first", "first_and_last"] = "first"
    text: TextKind = "instruction"
    shift: float = 3.0
    levels: Levels = field(default_factory=Levels)
    edit_boost: float = 0.0
    drop_text: float = 0.1
    temporal_skip: int = 0
    attention: wan.Attention = "auto"
    fold_text_padding: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 3
    optim: Optim = field(default_factory=Optim)
    loop: Loop = field(default_factory=Loop)

    @property
    def codec(self) -> str:
        """Folder or Hub id whose VAE decodes contact sheets."""
        return self.init

    def players(self) -> Sequence[Player]:
        with found_at("init"):
            build, weights = wan.declare(
                self.init,
                kind="i2v" if self.conditioned_on == "first" else "flf2v",
                fresh_seed=self.loop.seed if self.fresh else None,
                attention=self.attention,
                fold_text_padding=self.fold_text_padding,
                checkpointing=self.loop.checkpointing,
                temporal_skip=self.temporal_skip,
            )
        return [Player("student", build, weights, trains=True, optim=self.optim, zero_stage=self.zero_stage)]

    def batch(self, samples: Sequence[Sample], weights: Sequence[float]) -> EditBatch:
        batch = collate(samples, weights, text=self.text, first_and_last=self.conditioned_on == "first_and_last")
        wan.refuse_lost_skip(self.temporal_skip, batch.clip_BCthw.shape[2])
        return batch

    def turns(self, step: int) -> Sequence[str]:
        return ("student",)

    def weights_at(self, step: int) -> Mapping[str, float]:
        return {"flow": 1.0}

    def losses(self, players: Mapping[str, Backbone], batch: EditBatch, draw: Draw, turn: str, step: int) -> Losses:
        noise = draw.normal("noise", *batch.clip_BCthw.shape[1:]).to(batch.clip_BCthw.device)
        sigma_B = flow.draw_sigma(draw, self.levels, self.shift).to(noise.device)
        dropped = draw.uniform("drop_text") < self.drop_text
        conditions = batch.conditions.drop_text(batch.null_BLE, batch.null_words_B, dropped)
        v = players[turn](flow.mix(batch.clip_BCthw, noise, sigma_B), sigma_B, conditions)[0]
        region = losses.region_weight(batch.change_Bthw, self.edit_boost) if self.edit_boost else None
        term = losses.squared(v, flow.velocity(batch.clip_BCthw, noise), batch.weight_B, region)
        return Losses({"flow": term}, self.weights_at(step))
