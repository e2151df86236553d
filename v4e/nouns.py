"""The nouns every room speaks.

Legend: capitals are pixels, lower case latents. B batch, T frames, H W pixels; t h w latent grid; C latent
channels; L words, E text width; N vision tokens, V vision width; S DiT tokens, D DiT width; K kept roll-out
states. A name such as ``x_BCthw`` spells its own shape.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from v4e.errors import ConfigError, ShapeError

TEXT_TOKENS = 512  # Wan pads every prompt to 512 tokens of zeros and attends to the padding


@dataclass(frozen=True)
class Grid:
    """A clip's size in pixels and in latents: the only home of the strides 4, 8 and of the DiT patch.

    Args:
        T, H, W: frames and pixels.
        stride: VAE strides (time, height, width).
        patch: DiT patch (time, height, width), in latents.

    Raises:
        ShapeError: T - 1 is no multiple of the temporal stride, or H, W do not divide into whole patches.
    """

    T: int
    H: int
    W: int
    stride: tuple[int, int, int] = (4, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if self.T < 1 or (self.T - 1) % self.stride[0]:
            lower = max(1, (self.T - 1) // self.stride[0] * self.stride[0] + 1)
            raise ShapeError(
                f"{self.T} frames are no legal clip length: it must be {self.stride[0]} * n + 1",
                fix=f"use {lower} or {lower + self.stride[0]}",
            )
        for name, size, multiple in zip("HW", (self.H, self.W), self.multiple, strict=True):
            if size < multiple or size % multiple:
                raise ShapeError(
                    f"{name} = {size} does not divide into latent patches of {multiple} pixels",
                    fix=f"use {max(multiple, size // multiple * multiple)}",
                )

    @property
    def multiple(self) -> tuple[int, int]:
        """Height and width must be multiples of these many pixels."""
        return self.stride[1] * self.patch[1], self.stride[2] * self.patch[2]

    @property
    def t(self) -> int:
        return (self.T - 1) // self.stride[0] + 1

    @property
    def h(self) -> int:
        return self.H // self.stride[1]

    @property
    def w(self) -> int:
        return self.W // self.stride[2]

    @property
    def tokens(self) -> int:
        """DiT tokens of one clip, S."""
        return (self.t // self.patch[0]) * (self.h // self.patch[1]) * (self.w // self.patch[2])

    @staticmethod
    def of_latents(t: int, h: int, w: int) -> "Grid":
        """A grid with these latents and the usual strides, where only the latent size matters."""
        return Grid((t - 1) * 4 + 1, h * 8, w * 8)

    def with_frames(self, T: int) -> "Grid":
        """The same picture size at another clip length."""
        return replace(self, T=T)


def shared_frames(t_long: int, t_short: int) -> tuple[int, ...]:
    """Indices of the latent frames that a shorter clip keeps: evenly spread, both ends included; of one, the last."""
    if t_short == 1:
        return (t_long - 1,)
    return tuple(round(i * (t_long - 1) / (t_short - 1)) for i in range(t_short))


@dataclass(frozen=True)
class Clip:
    """Pixels: uint8 frames [T, 3, H, W]; an image is T = 1. Floats exist only inside the codec."""

    frames_T3HW: Tensor
    fps: float | None = None

    def __post_init__(self) -> None:
        x = self.frames_T3HW
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ShapeError(f"a clip is uint8 [T, 3, H, W], not {x.dtype} {list(x.shape)}")

    def __len__(self) -> int:
        return self.frames_T3HW.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.frames_T3HW.shape[2], self.frames_T3HW.shape[3]

    def frame(self, index: int) -> "Clip":
        """One frame as an image; negative indices count from the end."""
        index = range(len(self))[index]
        return Clip(self.frames_T3HW[index : index + 1])

    @staticmethod
    def join(clips: Iterable["Clip"]) -> "Clip":
        """Clips of one size, one after the other."""
        return Clip(torch.cat([c.frames_T3HW for c in clips]))


@dataclass(frozen=True)
class Rollout:
    """What is kept of a teacher's roll-out, at K noise levels in falling order.

    Args:
        sigma_K: noise levels, fp32.
        x_KCthw: states fed to the model there, restricted to the student's latent frames.
        v_KCthw: the guided velocity there, same frames.
        full_KCthw: the states over the teacher's whole clip, for block matching.
        end_Cthw: the path's clean end x(0), student's frames.
    """

    sigma_K: Tensor
    x_KCthw: Tensor
    v_KCthw: Tensor
    full_KCthw: Tensor
    end_Cthw: Tensor


@dataclass(frozen=True)
class Encoded:
    """A sample as the DiTs see it; made once by the codec, so that a training step meets no encoder.

    Args:
        clip_Cthw: normalised latents of the student's own clip (for a triplet: source, then the edit held still).
        known_Cthw: latents of that clip with every frame but the first one black: what I2V is told.
        text_LE: the instruction, trimmed to its real tokens.
        null_LE: the empty prompt, trimmed.
        vision_NV: vision tokens of the source.
        evolution_LE: the evolution prompt.
        teacher_known_Cthw: latents of the teacher's clip with all but first and last frame black.
        vision_last_NV: vision tokens of the edited image.
        change_thw: how much each place differs from the first frame, in [0, 1] (losses.change_map); where an edit
            happens is known from the roll-out's two ends, and the losses may look there.
    """

    clip_Cthw: Tensor
    known_Cthw: Tensor
    text_LE: Tensor
    null_LE: Tensor
    vision_NV: Tensor
    evolution_LE: Tensor
    teacher_known_Cthw: Tensor
    vision_last_NV: Tensor
    change_thw: Tensor


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from, as text that survives a release.

    ``inputs`` is a hash of all that determined it: pictures, words, models and settings. It may be empty.
    ``writer`` is who wrote the evolution prompt, with its version; empty where the data brought it.
    """

    dataset: str = ""
    licence: str = ""
    teacher: str = ""
    seed: int = 0
    tool: str = ""
    inputs: str = ""
    writer: str = ""


@dataclass(frozen=True)
class Sample:
    """One tar group of a shard. ``key`` holds no dots (webdataset splits names at the first one).

    ``source`` and ``target`` are images; None when the reader was asked for tensors alone.
    """

    key: str
    instruction: str
    evolution: str
    source: Clip | None
    target: Clip | None
    encoded: Encoded | None = None
    rollout: Rollout | None = None
    task: str = ""
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if not self.key or "." in self.key or "/" in self.key:
            raise ConfigError(f"sample key {self.key!r} must be non-empty and hold neither dots nor slashes")


@dataclass(frozen=True)
class Conditions:
    """What is known about a batch of clips. The Backbone decides where to put it.

    Args:
        text_BLE: text embeddings, padded with zeros to the longest of the batch.
        words_B: how many of the L tokens are real, int64.
        vision_BNV: vision tokens; for FLF2V [2B, N, V], first and last frame interleaved per sample, because
            diffusers pairs consecutive rows.
        known_BCthw: latents of the known frames.
        known_mask_B4thw: one where a pixel frame is known; the 4 sub-channels are the frames of a latent frame.
    """

    text_BLE: Tensor
    words_B: Tensor
    vision_BNV: Tensor
    known_BCthw: Tensor
    known_mask_B4thw: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditions":
        """Move to a device; floats also to ``dtype``."""
        move = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in vars(self).items()}
        return Conditions(**move)

    def drop_text(self, null_BLE: Tensor, words_B: Tensor, drop_B: Tensor) -> "Conditions":
        """Replace the text of the samples with ``drop_B`` true by the empty prompt (guidance dropout)."""
        L = max(self.text_BLE.shape[1], null_BLE.shape[1])
        text, null = pad_words(self.text_BLE, L), pad_words(null_BLE, L)
        return replace(
            self,
            text_BLE=torch.where(drop_B[:, None, None], null, text),
            words_B=torch.where(drop_B, words_B, self.words_B),
        )


def pad_words(text_BLE: Tensor, L: int) -> Tensor:
    """Zero-pad text embeddings [B, L', E] to L tokens, as Wan does; the pads are attended to."""
    return nn.functional.pad(text_BLE, (0, 0, 0, L - text_BLE.shape[1]))


def known_mask_4thw(grid: Grid, last: bool) -> Tensor:
    """Wan's mask of known frames [4, t, h, w]: first frame known, and with ``last`` the last one too.

    The first latent frame holds one pixel frame, repeated into all 4 sub-channels; any later one holds 4, so the
    last frame is known only in the final sub-channel (diffusers' ``prepare_latents``; Wan2.1#513).
    """
    mask = torch.zeros(grid.stride[0], grid.t, grid.h, grid.w)
    mask[:, 0] = 1
    if last and grid.t > 1:
        mask[-1, -1] = 1
    return mask


@dataclass(frozen=True)
class RolloutBatch:
    """Stacked roll-outs: see :class:`Rollout` for the fields."""

    sigma_BK: Tensor
    x_BKCthw: Tensor
    v_BKCthw: Tensor
    full_BKCthw: Tensor
    end_BCthw: Tensor
    teacher: Conditions


@dataclass(frozen=True)
class EditBatch:
    """What a recipe makes of samples; opaque to the loop but for keys and weights.

    Args:
        keys: sample keys, in batch order.
        weight_B: 1, or 0 for a quarantined sample that keeps its place.
        clip_BCthw: clean latents of the clip to be made; its last latent frame is the tail.
        change_Bthw: see :class:`Encoded`.
        conditions: the student's.
        null_BLE, null_words_B: the empty prompt.
        rollout: the teacher's states, when the recipe uses them.
    """

    keys: tuple[str, ...]
    weight_B: Tensor
    clip_BCthw: Tensor
    change_Bthw: Tensor
    conditions: Conditions
    null_BLE: Tensor
    null_words_B: Tensor
    rollout: RolloutBatch | None = None

    @property
    def tail_BChw(self) -> Tensor:  # noqa: N802 (shapes live in names)
        """Latents of the last latent frame: the edited image held still."""
        return self.clip_BCthw[:, :, -1]


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a pure function of its parts."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Draw:
    """Randomness as a value: the same for a sample whatever rank, batch, worker or device it lands on.

    Args:
        seed: of the run.
        positions: of each of the batch's samples in the run's global order, counted over all epochs.
        device: where the numbers are put; they are always drawn by CPU generators.
    """

    seed: int
    positions: tuple[int, ...]
    device: torch.device = torch.device("cpu")

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal numbers [B, *shape], fp32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators(name)]).to(self.device)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) [B, *shape], fp32."""
        return torch.stack([torch.rand(shape, generator=g) for g in self._generators(name)]).to(self.device)

    def integers(self, name: str, high: int) -> Tensor:
        """Integers in [0, high) [B], int64."""
        return (self.uniform(name) * high).long().clamp_(max=high - 1)

    def _generators(self, name: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed_of(self.seed, p, name)) for p in self.positions]


@dataclass(frozen=True)
class Levels:
    """How noise levels of flow matching are drawn, before the recipe's shift.

    Args:
        kind: ``uniform``, or ``logit_normal``, whose logit is normal with ``mean`` and ``std``: most levels in the
            middle (Stable Diffusion 3, arXiv 2403.03206, eq. 19).
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Optim:
    """Optimiser settings of one player."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: float = 1e-5
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    eps: float = 1e-8


@dataclass(frozen=True)
class Player:
    """A network a recipe casts; declared here, materialised as a DeepSpeed engine by train/engines.py.

    Args:
        name: unique within the recipe.
        build: makes the module with its architecture only; weights follow.
        weights: yields (name, tensor) of every parameter and every buffer, one at a time. Buffers are included
            because zero.Init in bf16 corrupts those computed during construction (Wan's RoPE tables).
        trains: whether it gets gradients and an optimiser.
        optim: its settings.
        zero_stage: ZeRO stage, 0 to 3.
    """

    name: str
    build: Callable[[], nn.Module]
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    trains: bool = False
    optim: Optim = field(default_factory=Optim)
    zero_stage: Literal[0, 1, 2, 3] = 3


@dataclass(frozen=True)
class Losses:
    """Scalar terms and their weights; a term without a weight is an error."""

    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if missing := sorted(set(self.terms) - set(self.weights)):
            raise ConfigError(f"loss terms without a weight: {', '.join(missing)}")

    @property
    def total(self) -> Tensor:
        """The weighted sum."""
        return sum((self.weights[k] * v for k, v in self.terms.items()), torch.zeros(()))


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one edit."""

    success: bool
    wanted: str
    seen: str
