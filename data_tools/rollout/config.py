"""Everything that decides what is in the shards, and how the work is shared."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from v4e import flow
from v4e.config import Wandb
from v4e.errors import ConfigError
from v4e.models.attention import Attention
from v4e.pipelines import Guidance, Solver

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_TEACHER = "none"
# Where things lie and who does which share change no sample; teacher and codec count by their content.
NOT_IN_A_SAMPLE = (
    *("teacher", "codec", "device", "part", "parts", "height", "width", "samples_per_shard"),
    *("changed", "max_reject_fraction", "wandb"),
)


@dataclass(frozen=True)
class RolloutConfig:
    """Everything that decides what is in the shards, and how the work is shared.

    Args:
        teacher: FLF2V folder or Hub id; ``none`` encodes the triplets without roll-outs, for plain flow matching.
        codec: folder or Hub id whose VAE and encoders are used; empty for the teacher's.
        height, width: pixels; triplets of another size are scaled and cropped to it. 0 for the size that each has.
        teacher_frames: clip length of the teacher; Wan2.1's FLF2V knows 81.
        student_frames: clip length of the student.
        student_shift, step_counts: the states kept are those at all levels of the student's few-step grids.
        steps: of the solver; 0 for one from each kept level to the next.
        shift: how the levels in between are spread; 0 for the teacher folder's own.
        solver: ``unipc`` as the teacher's folder sets it, or ``euler``.
        guidance, guidance_low, guidance_high: scale, and the noise levels between which it acts.
        keep_full: also keep the teacher's whole clip at each kept level; the `block` term needs it.
        batch: triplets a pass of teacher and VAE; also the unit of work, the most that a killed rank loses.
        dtype: the teacher's. ``stored``: of tensors in shards.
        fold_text_padding: faster text attention in a small model; see v4e/models/attention.py.
        onednn: the teacher's blocks in fp32 on a CPU by oneDNN; see v4e/models/onednn.py.
        threads: CPU threads, part of what makes restarts exact; 0 leaves torch's choice.
        span: GPUs that work on one roll-out together, by context parallelism.
        part, parts: this process's share; ``parts: 0`` asks the launcher, or Slurm.
        changed: what to do when a triplet that is finished has other pictures or words now.
        max_reject_fraction: more quarantined triplets than this share are an error, after all others are written.
    """

    teacher: str = ""
    codec: str = ""
    height: int = 0
    width: int = 0
    teacher_frames: int = 81
    student_frames: int = 5
    student_shift: float = 3.0
    step_counts: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 0
    shift: float = 0.0
    solver: Solver = "unipc"
    guidance: float = 5.5
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    keep_full: bool = True
    seed: int = 0
    batch: int = 1
    samples_per_shard: int = 64
    dtype: Literal["fp32", "bf16"] = "bf16"
    stored: Literal["fp32", "bf16"] = "bf16"
    attention: Attention = "auto"
    fold_text_padding: bool = False
    onednn: bool = False
    threads: int = 0
    device: str = ""
    span: int = 1
    part: int = 0
    parts: int = 0
    changed: Literal["refuse", "reroll"] = "refuse"
    max_reject_fraction: float = 0.0
    dataset: str = ""
    licence: str = ""
    wandb: Wandb = Wandb()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ConfigError("no teacher is named", where="key teacher", fix="give a folder, a Hub id, or none")
        if not self.codec and self.teacher == NO_TEACHER:
            raise ConfigError("without a teacher, name a folder with a VAE and encoders", where="key codec")
        if not 0 <= self.part < max(1, self.parts):
            raise ConfigError(f"part {self.part} is not one of {self.parts}", where="keys part and parts")
        if bool(self.height) != bool(self.width):
            raise ConfigError("height and width are given together or not at all", where="keys height and width")
        if 0 < self.steps < (kept := len(self.levels) - 1):
            raise ConfigError(f"steps = {self.steps} are fewer than the {kept} levels kept", where="key steps")
        self._check_span()
        self._check_onednn()

    def _check_onednn(self) -> None:
        if self.onednn and not (self.fold_text_padding and self.dtype == "fp32" and self.span == 1):
            fix = "give fold_text_padding=true dtype=fp32 span=1, or leave onednn out"
            raise ConfigError("oneDNN is for folded text padding in fp32", where="key onednn", fix=fix)

    def _check_span(self) -> None:
        if self.span < 1:
            raise ConfigError(f"span = {self.span} must be at least 1", where="key span")
        if self.span > 1 and self.fold_text_padding:
            fix = "leave out fold_text_padding; at real sizes it saves little"
            raise ConfigError("folded text padding cannot be spread over GPUs", where="key span", fix=fix)

    @property
    def levels(self) -> Tensor:
        """Noise levels [K + 1] at which states are kept, fp64, falling to 0."""
        return flow.union_grid(self.step_counts, self.student_shift)

    @property
    def guide(self) -> Guidance:
        return Guidance(self.guidance, self.guidance_low, self.guidance_high)

    @property
    def settings(self) -> dict[str, str | int | float | bool]:
        """What changes a sample's bytes, but for models and triplets, which count by their content."""
        values = {k: v for k, v in asdict(self).items() if k not in NOT_IN_A_SAMPLE}
        if not self.onednn:  # folders that are older than this setting go on
            del values["onednn"]
        return values | {"step_counts": " ".join(map(str, self.step_counts))}
