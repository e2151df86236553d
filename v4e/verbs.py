"""The verbs, as protocols on one screen. The loop and the house see nothing else of a recipe."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from v4e.config import Loop
from v4e.nouns import Clip, Conditions, Draw, EditBatch, Losses, Player, Sample, Verdict


class Backbone(Protocol):
    """A network that predicts velocity: noise minus data."""

    def __call__(
        self, x_BCthw: Tensor, sigma_B: Tensor, conditions: Conditions, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Return (velocity [B, C, t, h, w], hidden states [B, S, D] of each tapped block)."""
        ...


class Recipe(Protocol):
    """Casts players, turns samples into batches, and says the losses of each (batch, draw).

    A recipe is its own config: a frozen dataclass whose fields are the knobs. It keeps no state.
    """

    @property
    def loop(self) -> Loop: ...

    def players(self) -> Sequence[Player]:
        """The networks, as declarations."""
        ...

    def batch(self, samples: Sequence[Sample], weights: Sequence[float]) -> EditBatch:
        """Collate; ``weights`` is 0 where a sample is quarantined and only keeps its place."""
        ...

    def turns(self, step: int) -> Sequence[str]:
        """The players that are improved at this step, in order."""
        ...

    def weights_at(self, step: int) -> Mapping[str, float]:
        """The terms' weights at a step of a run of ``loop.steps``; a run that is prolonged must have had the same."""
        ...

    def losses(self, players: Mapping[str, Backbone], batch: EditBatch, draw: Draw, turn: str, step: int) -> Losses:
        """The terms that improve ``turn`` on this batch."""
        ...


class Editor(Protocol):
    """Makes an edit."""

    def __call__(self, clip: Clip, instruction: str, *, seed: int) -> Clip: ...


class Slice(Protocol):
    """One micro-batch of one rank, with the global position of each sample; a weight is 0 where one is damaged."""

    @property
    def samples(self) -> Sequence[Sample]: ...

    @property
    def weights(self) -> Sequence[float]: ...

    @property
    def positions(self) -> tuple[int, ...]: ...


class Stream(Protocol):
    """One rank's share of every step; a pure function of the step, so that resuming needs no state.

    Sample m of slice a on a rank has position step * batch + (a * world + rank) * micro_batch + m.
    """

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Key -> why, of the damaged samples this rank has met."""
        ...

    def step(self, step: int) -> Sequence[Slice]:
        """The slices to accumulate, in order."""
        ...


class Codec(Protocol):
    """Pixels to normalised latents and back, text and images to embeddings."""

    def encode(self, clips: Sequence[Clip]) -> Tensor:
        """Normalised latents [B, C, t, h, w] of clips of one size."""
        ...

    def decode(self, z_BCthw: Tensor) -> list[Clip]: ...

    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L, E] of each text, trimmed to its real tokens."""
        ...

    def look(self, images: Sequence[Clip]) -> Tensor:
        """Vision tokens [B, N, V]."""
        ...


class Judge(Protocol):
    """Says whether an edit is the one asked for."""

    def __call__(self, before: Clip, after: Clip, instruction: str) -> Verdict: ...
