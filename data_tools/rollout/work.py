"""A unit of triplets to the members of its samples: read, encode, roll out, pack."""

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from data_tools.ingest import Size, Triplet
from data_tools.rollout.config import NO_TEACHER, TYPES, RolloutConfig
from data_tools.rollout.encode import TOOL, Encoder, Evolving, Grids, RolloutCodec, content_hash, padded, sample_of
from data_tools.rollout.spool import Made, Reject, Unit
from v4e import dist
from v4e.data.collate import teacher_conditions
from v4e.data.disk import hash_of, to_json
from v4e.data.members import pack
from v4e.data.places import PassingError, patiently, read_bytes
from v4e.data.shards import FORMAT, SetMeta
from v4e.errors import DataError
from v4e.models.codec import WanCodec
from v4e.models.onednn import require_onednn
from v4e.nouns import Clip, Encoded, Origin, Rollout, Sample, seed_of, shared_frames
from v4e.pipelines import CODEC_PARTS, TeacherPipeline, Trajectory, noise_of

# Of a mount that has gone, a limit of the system's, a network: not of a file.
MACHINES_OWN = {
    errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip


class Models:
    """Teacher and codec of a roll-out, loaded when first used: a finished set needs neither."""

    def __init__(self, config: RolloutConfig, device: torch.device, team: dist.Team = dist.ALONE) -> None:
        self.config, self.device, self.team = config, _own(device), team
        if device.type == "cuda":
            torch.cuda.set_device(self.device)  # what names no device else would go to the first one, on every rank
        if config.onednn:
            require_onednn(device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.source = config.codec or config.teacher
        self.rolls = config.teacher != NO_TEACHER
        self.hashes = {
            "codec": content_hash(self.source, CODEC_PARTS),
            "teacher": content_hash(config.teacher) if self.rolls else "",
        }

    @cached_property
    def teacher(self) -> TeacherPipeline:
        config = self.config
        teacher = TeacherPipeline.from_pretrained(config.teacher, dtype=TYPES[config.dtype], attention=config.attention)
        teacher.set_progress_bar_config(disable=True)
        if self.team.mesh is not None:
            teacher.spread(self.team.mesh)
        return teacher.to(self.device)

    @cached_property
    def codec(self) -> WanCodec:
        """The teacher's own parts, unless another folder is named."""
        own = self.rolls and not self.config.codec
        codec = self.teacher.codec if own else WanCodec.load(self.source, self.device)
        return codec if self.config.batch == 1 else RolloutCodec.over(codec)

    def grids(self, size: Size) -> Grids:
        """Of a picture size.

        Raises:
            ShapeError: sizes or frames that the models cannot make.
        """
        student = WanCodec.load(self.source).grid(self.config.student_frames, *size)  # which reads configs alone
        return Grids(student, student.with_frames(self.config.teacher_frames if self.rolls else student.T))


@dataclass(frozen=True)
class Worker:
    """What turns units of triplets of one size into samples."""

    models: Models
    grids: Grids

    @staticmethod
    def load(config: RolloutConfig, size: Size) -> "Worker":
        """A worker by itself, on the best device there is."""
        models = Models(config, torch.device(config.device) if config.device else dist.place().device)
        return Worker(models, models.grids(size))

    @property
    def config(self) -> RolloutConfig:
        return self.models.config

    @cached_property
    def encode(self) -> Encoder:
        return Encoder(self.models.codec, self.grids)

    @cached_property
    def origin(self) -> Origin:
        config, hashes = self.config, self.models.hashes
        name = f"{config.teacher} {hashes['teacher']}" if self.models.rolls else ""
        return Origin(config.dataset, config.licence, name, config.seed, TOOL)

    @cached_property
    def meta(self) -> SetMeta:
        """What the set is; all that changes a sample's bytes is in it but the triplet itself."""
        values = {**self.config.settings, **self.models.hashes, "format": FORMAT}
        return SetMeta("rollout" if self.models.rolls else "encoded", *self.grids, values)

    def inputs(self, triplet: Triplet) -> str:
        """A hash of everything that determines a sample.

        Raises:
            DataError: a picture is not there.
        """
        return hash_of(to_json([self.meta.settings_hash, *_content(triplet)]))

    def work(self, triplets: Sequence[Triplet]) -> Unit:
        """One unit: the same triplets make the same bytes. What cannot be used is told apart, not raised."""
        began, team = time.monotonic(), self.models.team
        read = team.follow([self._read(t) for t in triplets] if team.leads else [])
        good = [r for r in read if isinstance(r, _Pair)]
        packed = [self._pack(sample) for sample in self._samples(good)] if good else []
        return Unit(
            [m for m in packed if isinstance(m, Made)],
            [r for r in [*read, *packed] if isinstance(r, Reject)],
            round(time.monotonic() - began, 3),
        )

    def _read(self, triplet: Triplet) -> "_Pair | Reject":
        """Both pictures; decoders of broken files raise whatever they meet.

        Raises:
            DataError: this machine or its network fails, which says nothing of the triplet.
        """
        inputs, size = "", (self.grids.student.H, self.grids.student.W)
        try:
            inputs = patiently(partial(self.inputs, triplet))
            source, target = (patiently(partial(read, size)) for read in (triplet.read_source, triplet.read_target))
        except Exception as error:
            if self._is_the_machines(error):
                raise
            unread = getattr(error.__cause__, "errno", None)  # nothing was said of what is in the file: try it again
            return Reject(triplet.id, f"{type(error).__name__}: {error}", "" if unread else inputs)
        self._good[:] = [triplet]
        return _Pair(triplet, inputs, source, target)

    @cached_property
    def _good(self) -> list[Triplet]:
        """The last one that could be read."""
        return []

    def _is_the_machines(self, error: Exception) -> bool:
        """Whether it would befall other triplets as well: a network, a mount that has gone, access to a store.

        A store may also deny a single object, such as one that is not there: then it gives what it gave before.
        """
        if isinstance(error, PassingError) or getattr(error.__cause__, "errno", None) in MACHINES_OWN:
            return True
        return _is_denied(error) and any(map(self._is_denied_now, self._good))

    def _is_denied_now(self, triplet: Triplet) -> bool:
        try:
            self.inputs(triplet)
        except DataError as error:
            return _is_denied(error)
        return False

    def _samples(self, pairs: Sequence["_Pair"]) -> list[Sample]:
        items = padded([self._item(pair) for pair in pairs], self.config.batch)
        encoded = self.encode(items)
        rolled = self._roll(items, encoded) if self.models.rolls else [None] * len(items)
        made = zip(pairs, items, encoded, rolled, strict=False)  # the padding is dropped
        return [
            replace(
                sample_of(item, e, r, replace(self.origin, inputs=pair.inputs, writer=pair.triplet.writer)),
                source=pair.source,
                target=pair.target,
            )
            for pair, item, e, r in made
        ]

    def _item(self, pair: "_Pair") -> Evolving:
        """The student's clip: the source, then the edit held still."""
        clip = Clip.join([pair.source, *[pair.target] * (self.grids.student.T - 1)])
        t = pair.triplet
        return Evolving(t.id, clip, t.evolution, t.instruction, t.task)

    def _roll(self, items: Sequence[Evolving], encoded: Sequence[Encoded]) -> list[Rollout]:
        config = self.config
        seeds = [seed_of(config.seed, item.key, "noise") for item in items]
        trajectory = self.models.teacher.rollout(
            noise_of(seeds, *encoded[0].teacher_known_Cthw.shape),
            teacher_conditions(encoded),
            config.levels,
            steps=config.steps,
            shift=config.shift,
            solver=config.solver,
            guidance=config.guide,
            fold=config.fold_text_padding,
            onednn=config.onednn,
            null_LE=encoded[0].null_LE,
        )
        return [self._kept(trajectory, b) for b in range(len(items))]

    def _kept(self, path: Trajectory, b: int) -> Rollout:
        """One sample's path, restricted to the latent frames the student makes."""
        frames = list(shared_frames(self.grids.teacher.t, self.grids.student.t))
        x, v, end = path.x_BKCthw[b], path.v_BKCthw[b], path.end_BCthw[b]
        full = x if self.config.keep_full else x[:0]
        return Rollout(path.sigma_K, x[:, :, frames], v[:, :, frames], full, end[:, frames])

    def _pack(self, sample: Sample) -> Made | Reject:
        """A teacher may also say something that is not finite."""
        try:
            return Made(sample.key, sample.task, pack(sample, TYPES[self.config.stored]))
        except DataError as error:
            return Reject(sample.key, str(error), sample.origin.inputs)


def _is_denied(error: Exception) -> bool:
    return isinstance(error.__cause__, PermissionError)


def _own(device: torch.device) -> torch.device:
    """Of several GPUs this rank's, where the setting names none."""
    numbered = device.type != "cuda" or device.index is not None
    return device if numbered else torch.device("cuda", dist.place().local_rank)


@dataclass(frozen=True)
class _Pair:
    triplet: Triplet
    inputs: str
    source: Clip
    target: Clip


def _content(triplet: Triplet) -> list[str]:
    """A triplet by its content: words, and the bytes of its pictures."""
    pictures = [hash_of(read_bytes(path)) for path in (triplet.source, triplet.edited)]
    return [triplet.id, triplet.instruction, triplet.evolution, triplet.task, triplet.writer, *pictures]
