"""Video4Edit: distil a first-and-last-frame video teacher into a few-step image editor (arXiv 2511.18131).

Public sources name the two parts, block-wise DiT distillation and tail-frame supervision in the VAE's latent space,
and the few-step goal, but no formula. Every term below is v4e's own reading; docs/recipes/video4edit.md says so and
`v4e ablate` judges it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from v4e import flow, losses
from v4e.config import Loop
from v4e.data.collate import collate
from v4e.errors import ConfigError, found_at
from v4e.models import wan
from v4e.nouns import Conditions, Draw, EditBatch, Levels, Losses, Optim, Player, RolloutBatch, Sample, shared_frames
from v4e.verbs import Backbone


@dataclass(frozen=True)
class Terms:
    """Weights of the terms; over ``handover`` of the run, weight moves from ``velocity`` to ``trajectory``.

    Args:
        velocity: the teacher's guided, anchored velocity at the stored state.
        trajectory: the mean velocity from the stored state to the path's clean end, on the few-step grid.
        tail: clean estimate of the last latent frame against the tail target.
        block: hidden states of chosen blocks.
        flow: flow matching at noise levels off the grid.
        own: from a state the student itself reached, the mean velocity to the path's clean end.
        handover: (start, end) as fractions of the run.
    """

    velocity: float = 1.0
    trajectory: float = 1.0
    tail: float = 0.5
    block: float = 0.1
    flow: float = 1.0
    own: float = 1.0
    handover: tuple[float, float] = (0.1, 0.4)


OFF_GRID, OWN = -1, -2


class Point(NamedTuple):
    """Where the student is trained: a state, its noise level, and what the path says there.

    Args:
        kept_B: index of the stored level, or OFF_GRID where the state was made by flow matching, or OWN where the
            student reached it.
    """

    x_BCthw: Tensor
    sigma_B: Tensor
    velocity_BCthw: Tensor
    end_BCthw: Tensor
    kept_B: Tensor


@dataclass(frozen=True)
class Video4Edit:
    """Config and recipe.

    Args:
        teacher, student: diffusers folders or hub ids of FLF2V and I2V.
        fresh: keep only the architecture of ``student`` and start from random weights.
        shift: the student's own; its few-step grids must be among the stored levels.
        few_steps: grids whose levels the ``trajectory`` term trains.
        flow_share: share of samples trained off the grid by flow matching, at ``levels``.
        level_bias: a stored level is drawn with probability proportional to its noise level to this power. Near noise
            the model must decide the edit from source and instruction; further down the state already shows it.
        edit_boost: extra weight of places the roll-out changes (losses.region_weight).
        student_blocks, teacher_blocks: pairs that are matched.
        block_every: steps between two with the `block` term, which costs a forward of the teacher.
        own_every: steps between two that train at the student's own states instead of stored ones, which costs a
            forward of the student; 0 for none.
        own_from: the lowest noise level of those states. Asked to mend its own guess, a student answers with a mean;
            at stored states further down it keeps the detail that it is shown.
        guidance: scale of the guidance that is distilled; 1 for none. More adds a frozen player, the ``prior``: the
            weights of ``student``, also where the student itself begins ``fresh``, told the evolution prompt and the
            empty one.
        terms: weights and their schedule.
        temporal_skip: latent frames of the clip whose ends the student's two frames are taken for, as ChronoEdit does:
            the teacher's, 21 for 81 frames. 0 keeps the positions of ``student``, in stock Wan 0 and 1.
    """

    teacher: str = ""
    student: str = ""
    fresh: bool = False
    shift: float = 3.0
    few_steps: tuple[int, ...] = (1, 2, 4, 8)
    flow_share: float = 0.25
    levels: Levels = field(default_factory=Levels)
    level_bias: float = 0.0
    edit_boost: float = 4.0
    student_blocks: tuple[int, ...] = ()
    teacher_blocks: tuple[int, ...] = ()
    block_every: int = 1
    own_every: int = 0
    own_from: float = 0.0
    guidance: float = 1.0
    terms: Terms = field(default_factory=Terms)
    temporal_skip: int = 0
    attention: wan.Attention = "auto"
    fold_text_padding: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 3
    optim: Optim = field(default_factory=Optim)
    loop: Loop = field(default_factory=Loop)

    def players(self) -> Sequence[Player]:
        self._refuse_unpaired()
        declared = self._declare("student", "i2v", self.loop.seed if self.fresh else None)
        student = Player("student", *declared, True, self.optim, self.zero_stage)
        players = [student]
        if self._matches_blocks:
            players.append(Player("teacher", *self._declare("teacher", "flf2v"), False, zero_stage=self.zero_stage))
        if self._is_guided:
            players.append(Player("prior", *self._declare("student", "i2v"), False, zero_stage=self.zero_stage))
        return players

    def batch(self, samples: Sequence[Sample], weights: Sequence[float]) -> EditBatch:
        batch = collate(samples, weights, rollout=True)
        assert batch.rollout is not None
        self._refuse_unfit(batch.rollout)
        wan.refuse_lost_skip(self.temporal_skip, batch.clip_BCthw.shape[2])
        return batch

    def turns(self, step: int) -> Sequence[str]:
        return ("student",)

    def losses(self, players: Mapping[str, Backbone], batch: EditBatch, draw: Draw, turn: str, step: int) -> Losses:
        assert batch.rollout is not None  # collate(rollout=True) refuses samples without one
        point = self._point(batch, batch.rollout, draw)
        own = self.own_every > 0 and (step + 1) % self.own_every == 0
        if own:
            point = self._reached(players[turn], point, batch, draw)
        if self._is_guided:
            point = self._guided(players["prior"], point, batch, batch.rollout.teacher)
        matches = self._matches_blocks and step % self.block_every == 0
        taps = self.student_blocks if matches else ()
        v, *hidden = players[turn](point.x_BCthw, point.sigma_B, batch.conditions, taps)
        terms = self._terms(v, point, batch, own)
        if matches:
            terms["block"] = self._block_term(players["teacher"], hidden, point, batch, batch.rollout)
        return Losses(terms, self.weights_at(step))

    def weights_at(self, step: int) -> dict[str, float]:
        """The terms' weights at a step; the hand-over moves weight from `velocity` to `trajectory`."""
        start, end = self.terms.handover
        progress = step / max(1, self.loop.steps)
        passed = min(1.0, max(0.0, (progress - start) / max(end - start, 1e-9)))
        return {
            "velocity": self.terms.velocity * (1 - passed),
            "trajectory": self.terms.trajectory * passed,
            "tail": self.terms.tail,
            "block": self.terms.block,
            "flow": self.terms.flow,
            "own": self.terms.own,
        }

    @property
    def codec(self) -> str:
        """Folder or Hub id whose VAE decodes contact sheets."""
        return self.student

    @property
    def _matches_blocks(self) -> bool:
        return self.terms.block > 0 and bool(self.student_blocks)

    @property
    def _is_guided(self) -> bool:
        return self.guidance != 1.0

    @property
    def _few_levels(self) -> Tensor:
        return flow.union_grid(self.few_steps, self.shift)[:-1].float()

    @property
    def _own_levels(self) -> Tensor:
        levels = self._few_levels[1:]
        return levels[levels >= self.own_from]

    def _refuse_unfit(self, rollout: RolloutBatch) -> None:
        """Roll-outs that lack what the terms need would silently train something else."""
        levels = self._few_levels
        missing = [level for kept_K in rollout.sigma_BK for level in levels[at_levels(levels, kept_K) == 0].tolist()]
        if missing:
            raise ConfigError(
                f"the roll-outs do not stop at {missing[0]:.4f}, a level of the student's few-step grids",
                where="keys shift and few_steps",
                fix=f"roll out with student_shift={self.shift} and all of {list(self.few_steps)} among the step_counts",
            )
        if self._matches_blocks and not rollout.full_BKCthw.shape[1]:
            raise ConfigError(
                "the roll-outs hold no full states, which the term block needs",
                where="key terms.block",
                fix="roll out with keep_full=true, or set terms.block=0",
            )
        if self.own_every and not len(self._own_levels):
            raise ConfigError(
                f"no level of the grids of {list(self.few_steps)} steps is between {self.own_from} and 1",
                where="keys own_from and few_steps",
                fix="lower own_from, add a grid of more steps, or set own_every=0",
            )

    def _refuse_unpaired(self) -> None:
        ours, theirs = len(self.student_blocks), len(self.teacher_blocks)
        if self._matches_blocks and ours != theirs:
            raise ConfigError(
                f"{ours} blocks of the student, {theirs} of the teacher, which are matched one by one",
                where="keys student_blocks and teacher_blocks",
                fix="name as many of each",
            )

    def _declare(self, key: Literal["teacher", "student"], kind: wan.Kind, fresh_seed: int | None = None):
        with found_at(key):
            return wan.declare(
                self.teacher if key == "teacher" else self.student,
                kind=kind,
                fresh_seed=fresh_seed,
                attention=self.attention,
                fold_text_padding=self.fold_text_padding,
                checkpointing=self.loop.checkpointing,
                temporal_skip=self.temporal_skip if kind == "i2v" else 0,
            )

    def _point(self, batch: EditBatch, rollout: RolloutBatch, draw: Draw) -> Point:
        """A stored, anchored state for most samples; a freshly mixed one for ``flow_share`` of them."""
        kept_B = draw_levels(draw.uniform("kept"), rollout.sigma_BK, self.level_bias)
        stored = anchored(batch, rollout, kept_B)
        mixed = self._mixed(batch, draw)
        return choose(draw.uniform("flow") < self.flow_share, mixed, stored)

    def _mixed(self, batch: EditBatch, draw: Draw) -> Point:
        """Flow matching's own point: straight path, noise level drawn and shifted."""
        noise = draw.normal("noise", *batch.clip_BCthw.shape[1:])
        sigma_B = flow.draw_sigma(draw, self.levels, self.shift)
        x = flow.mix(batch.clip_BCthw, noise, sigma_B)
        none_kept = torch.full_like(sigma_B, OFF_GRID, dtype=torch.long)
        return Point(x, sigma_B, flow.velocity(batch.clip_BCthw, noise), batch.clip_BCthw, none_kept)

    def _reached(self, student: Backbone, point: Point, batch: EditBatch, draw: Draw) -> Point:
        """Where the sampler's first step takes the student, in place of the stored states.

        From noise, one Euler step to a level drawn from those of the few-step grids. The path's clean end stays the
        target, whatever the state shows by then: what a first step got wrong, the next ones are to mend.
        """
        noise = draw.normal("own", *batch.clip_BCthw.shape[1:]).to(point.x_BCthw.device)
        first, own = self._few_levels[0].to(noise.device), self._own_levels.to(noise.device)
        sigma_B = own[draw.integers("own_level", len(own)).to(noise.device)]
        with torch.no_grad():
            v = student(noise, first.expand(len(noise)), batch.conditions)[0]
        x = noise + flow.like(sigma_B - first, noise) * v.float()
        mean_v = flow.from_x0(x, point.end_BCthw, sigma_B)
        reached = Point(x, sigma_B, mean_v, point.end_BCthw, torch.full_like(point.kept_B, OWN))
        return choose(point.kept_B >= 0, reached, point)

    def _guided(self, prior: Backbone, point: Point, batch: EditBatch, teacher: Conditions) -> Point:
        """The point as guidance would have it: velocity and clean end move on by (w' - 1) (v_evolution - v_empty).

        Model-guidance (Tang et al. 2025, arXiv 2502.12154), but by a model that stays as it was: the prior
        knows what an evolution prompt asks of a picture before the student knows it of an instruction. The more
        of the picture an edit covers, the less it is guided: a style needs no decision, and would over-saturate.
        """
        told = replace(batch.conditions, text_BLE=teacher.text_BLE, words_B=teacher.words_B)
        empty = told.drop_text(batch.null_BLE, batch.null_words_B, torch.ones_like(told.words_B, dtype=torch.bool))
        with torch.no_grad():
            v, v_empty = (prior(point.x_BCthw, point.sigma_B, c)[0].float() for c in (told, empty))
        scale_B = (self.guidance - 1) * (1 - losses.coverage(batch.change_Bthw))
        offset = flow.like(scale_B, v) * (v - v_empty)
        end = point.end_BCthw - flow.like(point.sigma_B, offset) * offset
        return point._replace(velocity_BCthw=point.velocity_BCthw + offset, end_BCthw=end)

    def _terms(self, v: Tensor, point: Point, batch: EditBatch, own: bool) -> dict[str, Tensor]:
        region = losses.region_weight(batch.change_Bthw, self.edit_boost)
        on_grid_B = (point.kept_B >= 0).float() * batch.weight_B
        off_grid_B = (point.kept_B == OFF_GRID).float() * batch.weight_B
        few_B = on_grid_B * at_levels(point.sigma_B, self._few_levels.to(v.device))
        mean_v = flow.from_x0(point.x_BCthw, point.end_BCthw, point.sigma_B)
        tail = flow.to_x0(point.x_BCthw, v.float(), point.sigma_B)[:, :, -1:]
        terms = {
            "velocity": losses.squared(v, point.velocity_BCthw, on_grid_B, region),
            "trajectory": losses.squared(v, mean_v, few_B, region),
            "tail": losses.squared(tail, point.end_BCthw[:, :, -1:], on_grid_B, region[:, :, -1:]),
            "flow": losses.squared(v, point.velocity_BCthw, off_grid_B, region),
        }
        if own:
            own_B = (point.kept_B == OWN).float() * batch.weight_B
            terms["own"] = losses.squared(v, point.velocity_BCthw, own_B, region)
        return terms

    def _block_term(
        self, teacher: Backbone, hidden: Sequence[Tensor], point: Point, batch: EditBatch, rollout: RolloutBatch
    ) -> Tensor:
        """Match at the tokens of the student's frames; the teacher runs on its own full-clip state."""
        kept_B = point.kept_B.clamp(min=0)
        rows = torch.arange(len(kept_B))
        with torch.no_grad():
            full = rollout.full_BKCthw[rows, kept_B]
            _, *theirs = teacher(full, rollout.sigma_BK[rows, kept_B], rollout.teacher, self.teacher_blocks)
        if hidden[0].shape[-1] != theirs[0].shape[-1]:
            raise ConfigError(
                f"the student's hidden states have {hidden[0].shape[-1]} channels, the teacher's {theirs[0].shape[-1]}",
                where="key terms.block",
                fix="take models of one width, or set terms.block=0",
            )
        weight_B = (point.kept_B >= 0).float() * batch.weight_B
        t_student, t_teacher = point.x_BCthw.shape[2], full.shape[2]
        pairs = zip(hidden, theirs, strict=True)
        return sum(
            (losses.block_match(h, shared_tokens(g, t_teacher, t_student), weight_B) for h, g in pairs), torch.zeros(())
        ) / len(hidden)


def anchored(batch: EditBatch, rollout: RolloutBatch, kept_B: Tensor) -> Point:
    """The stored states, bent so that the last latent frame ends at the tail target (flow.anchor).

    With d = z_tail - x(0) at the last frame, x' = x + (1 - sigma) d and v' = v - d are one path that ends at z_tail,
    so that `velocity`, `trajectory` and `tail` agree.
    """
    rows = torch.arange(len(kept_B))
    sigma_B = rollout.sigma_BK[rows, kept_B]
    offset = torch.zeros_like(rollout.end_BCthw)
    offset[:, :, -1] = batch.tail_BChw - rollout.end_BCthw[:, :, -1]
    x, v = flow.anchor(rollout.x_BKCthw[rows, kept_B], rollout.v_BKCthw[rows, kept_B], sigma_B, offset)
    return Point(x, sigma_B, v, rollout.end_BCthw + offset, kept_B)


def choose(pick_B: Tensor, a: Point, b: Point) -> Point:
    """Each sample's point from ``a`` where ``pick_B`` says so, else from ``b``."""
    return Point(*(torch.where(flow.like(pick_B, x).bool(), x, y) for x, y in zip(a, b, strict=True)))


def draw_levels(uniform_B: Tensor, sigma_BK: Tensor, bias: float) -> Tensor:
    """Index of a stored level [B], drawn with probability proportional to sigma ** bias from uniform numbers."""
    odds_BK = sigma_BK**bias
    share_BK = odds_BK.cumsum(1) / odds_BK.sum(1, keepdim=True)
    return (uniform_B[:, None] >= share_BK[:, :-1]).sum(1)


def at_levels(sigma_B: Tensor, levels_K: Tensor) -> Tensor:
    """One where a noise level is among ``levels_K``, to fp32's rounding; else zero."""
    return ((sigma_B[:, None] - levels_K).abs().amin(1) < 1e-5).float()


def shared_tokens(h_BSD: Tensor, t_long: int, t_short: int) -> Tensor:
    """Tokens of the latent frames that the shorter clip keeps [B, S', D]; both ends always among them."""
    frames = list(shared_frames(t_long, t_short))
    return h_BSD.unflatten(1, (t_long, -1))[:, frames].flatten(1, 2)
