"""Pipelines in the manner of diffusers: EditPipeline (few-step student) and TeacherPipeline (FLF2V roll-out).

Both are stock ``WanImageToVideoPipeline`` folders with a Backbone for a transformer: they load what diffusers loads,
and what they save, diffusers loads. Unlike the stock pipeline they take batches of *different* images.
"""

import inspect
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from diffusers import ChronoEditPipeline, ContextParallelConfig, UniPCMultistepScheduler, WanImageToVideoPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from PIL import Image, ImageOps
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from v4e import flow
from v4e.data.members import as_image
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.models.attention import Attention
from v4e.models.codec import WanCodec
from v4e.models.folder import locate
from v4e.models.wan import SKIP, WanBackbone, load_backbone, stock_transformer
from v4e.nouns import TEXT_TOKENS, Clip, Conditions, Grid
from v4e.verbs import Backbone

CARD = "v4e.json"
MODEL_INDEX = "model_index.json"
CODEC_PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")
MOST_SQUEEZED = 4.0  # a photograph's shape against the nearest trained one; beyond, little of it would be left
Solver = Literal["unipc", "euler"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """How a model wants to be asked: ``v4e.json`` in its folder. The defaults are Wan2.1's at 480P.

    Args:
        frames: clip length in pixel frames.
        sizes: (height, width) in pixels it was trained at; a photograph takes the one of nearest shape.
        shift: of the few-step grid.
        steps: fewest steps it was trained for that are recommended.
        guidance: scale; 1 where guidance is distilled into the model.
    """

    frames: int = 5
    sizes: tuple[tuple[int, int], ...] = ((480, 832), (832, 480), (624, 624), (544, 720), (720, 544))
    shift: float = 3.0
    steps: int = 4
    guidance: float = 1.0

    @staticmethod
    def read(folder: Path) -> "Card":
        """The card of a folder; the defaults where it has none.

        Raises:
            CheckpointError: the card is no JSON object with these fields.
        """
        path = folder / CARD
        if not path.is_file():
            return Card()
        try:
            values = json.loads(path.read_text())
            return Card(**values | {"sizes": tuple((int(h), int(w)) for h, w in values["sizes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"no model card: {error}", where=str(path), fix="export the model again") from error

    def write(self, folder: Path) -> None:
        """Put the card into a folder."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The trained (height, width) whose shape is nearest to a photograph's."""
        wanted = torch.tensor(height / width).log()
        return min(self.sizes, key=lambda size: abs(torch.tensor(size[0] / size[1]).log() - wanted).item())


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with ``scale`` at noise levels from ``low`` to ``high``, and none elsewhere.

    An interval saves forwards and keeps early steps from over-saturating (arXiv 2404.07724).
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def at(self, sigma: float) -> float:
        return self.scale if self.low <= sigma <= self.high else 1.0


@dataclass(frozen=True)
class Trajectory:
    """A batch's way from noise to data: at every stop the state fed to the model and the guided velocity there.

    Args:
        sigma_K: noise levels, fp32, falling.
        x_BKCthw, v_BKCthw: fp32.
        end_BCthw: the clean end.
    """

    sigma_K: Tensor
    x_BKCthw: Tensor
    v_BKCthw: Tensor
    end_BCthw: Tensor


# ------------------------------------------------------------------------------------------------- solvers


def few_step_scheduler(shift: float) -> UniPCMultistepScheduler:
    """Euler on the rectified flow, spelled as a stock UniPC: order 1, no corrector; its levels are flow.time_grid's."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
        disable_corrector=list(range(flow.TRAIN_STEPS)),
    )


def scheduler_at(base: UniPCMultistepScheduler, solver: Solver, levels: Tensor) -> UniPCMultistepScheduler:
    """A scheduler that stops exactly at ``levels`` [K + 1], falling to 0.

    ``set_timesteps`` would shift the levels it is given, so the shift, already in them, is set to 1.
    """
    plain = {"flow_shift": 1.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    euler = {"solver_order": 1, "disable_corrector": list(range(flow.TRAIN_STEPS))} if solver == "euler" else {}
    scheduler: Any = UniPCMultistepScheduler.from_config(base.config, **plain, **euler)
    scheduler.set_timesteps(sigmas=levels[:-1].double().numpy())
    scheduler.set_begin_index(0)  # levels may share an integer timestep, and it would look itself up by that
    return scheduler


def spreadable(backend: Attention) -> Attention:
    """The backend for a forward that is spread over GPUs; ``auto`` picks one that can, and says so.

    Raises:
        ConfigError: this one cannot.
    """
    if backend == "auto":
        log.info("attention=auto uses native: xformers has no context parallelism")
        return "native"
    if backend in ("xformers", "matmul"):
        fix = "use attention=auto, native, flash or sage"
        raise ConfigError(f"attention backend {backend!r} has no context parallelism", where="key span", fix=fix)
    return backend


Watch = Callable[[float, Tensor, Tensor], None]


@torch.no_grad()
def denoise(
    backbone: Backbone,
    scheduler: UniPCMultistepScheduler,
    x_BCthw: Tensor,
    conditions: Conditions,
    null: Conditions | None,
    guidance: Guidance,
    watch: Watch = lambda sigma, x_BCthw, v_BCthw: None,
    steps: slice = slice(None),  # noqa: B008  immutable
) -> Tensor:
    """From noise to data [B, C, t, h, w], by a scheduler whose timesteps are set; the stock pipeline's loop.

    Args:
        null: the same conditions under the empty prompt; None where nothing is guided.
        watch: told the noise level, the state fed to the model and the guided velocity of every step.
        steps: only these, where the way is gone in parts.
    """
    for sigma, t in [*zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True)][steps]:
        v_BCthw = _guided(backbone, x_BCthw, fed_level(sigma, int(t)), conditions, null, guidance.at(sigma))
        watch(sigma, x_BCthw, v_BCthw)
        x_BCthw = scheduler.step(v_BCthw, t, x_BCthw, return_dict=False)[0]
    return x_BCthw


def fed_level(sigma: float, timestep: int) -> float:
    """The noise level itself, or, where rounding would make another integer timestep of it than stock's, the middle of
    that timestep."""
    same = flow.timestep(torch.tensor(sigma)).item() == timestep
    return sigma if same else (timestep + 0.5) / flow.TRAIN_STEPS


def _guided(
    backbone: Backbone, x_BCthw: Tensor, sigma: float, conditions: Conditions, null: Conditions | None, scale: float
) -> Tensor:
    sigma_B = torch.full((x_BCthw.shape[0],), sigma, device=x_BCthw.device)
    v = backbone(x_BCthw, sigma_B, conditions)[0]
    if null is None or scale <= 1:
        return v
    return flow.guide(v, backbone(x_BCthw, sigma_B, null)[0], scale)


@torch.no_grad()
def denoise_reasoning(
    backbone: Backbone,
    scheduler: UniPCMultistepScheduler,
    x_BCthw: Tensor,
    conditions: Conditions,
    null: Conditions | None,
    guidance: Guidance,
    watch: Watch,
    steps: int,
) -> Tensor:
    """:func:`denoise` a long clip for ``steps``, and from there on its first and last latent frame alone.

    The frames between are where the model lays out how the edit comes about; once that is settled they only cost time
    (ChronoEdit, arXiv 2510.04290). The solver's memory is cut as the state is.
    """
    x_BCthw = denoise(backbone, scheduler, x_BCthw, conditions, null, guidance, watch, slice(steps))
    outputs, sample = scheduler.model_outputs, scheduler.last_sample
    scheduler.model_outputs = [None if v is None else ends_of(v) for v in outputs]
    scheduler.last_sample = None if sample is None else ends_of(sample)
    ends, null_ends = _known_ends(conditions), None if null is None else _known_ends(null)
    return denoise(backbone, scheduler, ends_of(x_BCthw), ends, null_ends, guidance, watch, slice(steps, None))


def ends_of(x_BCthw: Tensor) -> Tensor:
    """First and last latent frame [B, C, 2, h, w]."""
    return x_BCthw[:, :, [0, -1]]


def _known_ends(conditions: Conditions) -> Conditions:
    known, mask = ends_of(conditions.known_BCthw), ends_of(conditions.known_mask_B4thw)
    return replace(conditions, known_BCthw=known, known_mask_B4thw=mask)


def noise_of(seeds: Sequence[int], *shape: int) -> Tensor:
    """Standard normal noise [B, *shape], fp32: each sample from its own CPU generator, as in the stock pipeline."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


# ----------------------------------------------------------------------------------------------- pipelines


class BatchCodec(WanCodec):
    """The codec with eight samples to a VAE pass, channels last: 2.6 times faster on a CPU.

    A sample's latents then depend on its neighbours in their last bits, so it is for work whose units are fixed, or
    whose last bits do not matter.
    """

    @classmethod
    def over(cls, codec: WanCodec):
        """The same codec, sharing its loaded parts."""
        fast = cls(codec.source, codec.device, codec.dtype)
        vars(fast).update(vars(codec))
        return fast

    @staticmethod
    def _one_by_one(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        laid_out = batch.contiguous(memory_format=torch.channels_last_3d)
        return torch.cat([function(some) for some in laid_out.split(8)]).contiguous()


class WanPipeline(WanImageToVideoPipeline):
    """What both pipelines share: a stock folder's components, a Backbone in place of its transformer, and its card."""

    card = Card()
    attention: Attention = "auto"
    home = ""  # the folder it was loaded from: a Hub id would have the Hub asked at every edit

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        attention: Attention = "auto",
        transformer: WanBackbone | None = None,
    ):
        """Load a folder in diffusers layout, or a Hub id: v4e's own export or any stock Wan2.1 I2V or FLF2V.

        Args:
            dtype: of transformer and text encoder; the VAE and the vision encoder stay in fp32, as diffusers advises.
            transformer: use this one instead of the folder's.

        Raises:
            CheckpointError: the folder or one of its components is missing or damaged.
        """
        backbone = transformer or load_backbone(source, dtype=dtype, attention=attention)
        dtypes = {"vae": torch.float32, "image_encoder": torch.float32, "default": dtype}
        try:
            pipeline = super().from_pretrained(str(source), transformer=backbone, dtype=dtypes)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"not a Wan pipeline: {str(error).splitlines()[0]}", where=str(source), fix="give a diffusers folder"
            ) from error
        home = locate(source, [CARD, "*/config.json"])
        pipeline.home, pipeline.card, pipeline.attention = str(home), Card.read(home), attention
        return pipeline

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that stock diffusers and ``from_pretrained`` load."""
        parts: dict[str, Any] = self.components | {"transformer": None}
        WanImageToVideoPipeline(**parts).save_pretrained(folder)
        self.backbone.save_stock(Path(folder) / "transformer", dtype)
        name_stock_classes(Path(folder), self.backbone.config)
        self.card.write(Path(folder))

    @property
    def backbone(self) -> WanBackbone:
        return self.transformer

    @property
    def codec(self) -> WanCodec:
        """Pixels to latents and embeddings, by this pipeline's own components, wherever they are now."""
        codec = WanCodec(self.home or self.name_or_path, self._execution_device)
        vars(codec).update({part: getattr(self, part) for part in CODEC_PARTS})
        return codec

    def told(
        self,
        first: Sequence[Clip],
        texts: Sequence[str],
        grid: Grid,
        last: Sequence[Clip] | None = None,
        fast: bool = False,
    ) -> Conditions:
        """Encode what the model is told of a batch; ``fast`` uses the :class:`BatchCodec`."""
        codec = BatchCodec.over(self.codec) if fast else self.codec
        seen = None if last is None else codec.look(last)
        return codec.conditions(codec.read(texts), codec.look(first), codec.known(first, grid, last), grid, seen)

    def grid(self, frames: int, size: tuple[int, int]) -> Grid:
        """The latent grid of a clip.

        Raises:
            ShapeError: this model cannot make clips of that size.
        """
        return self.codec.grid(frames, *size)

    def null_of(self, conditions: Conditions, null_LE: Tensor | None = None) -> Conditions:
        """The same conditions under the empty prompt, whose embedding may be known."""
        text_LE = (self.codec.read([""])[0] if null_LE is None else null_LE).to(conditions.text_BLE)
        words_B = torch.full_like(conditions.words_B, text_LE.shape[0])
        return replace(conditions, text_BLE=text_LE.expand(len(words_B), -1, -1), words_B=words_B)

    def _noise(self, seeds: Sequence[int], grid: Grid) -> Tensor:
        return noise_of(seeds, self.vae.config.z_dim, grid.t, grid.h, grid.w).to(self._execution_device)


def stock_pipeline(config: Mapping[str, Any]) -> type[WanImageToVideoPipeline] | type[ChronoEditPipeline]:
    """Diffusers' class for a transformer of this config."""
    return ChronoEditPipeline if config.get(SKIP) else WanImageToVideoPipeline


def name_stock_classes(folder: Path, config: Mapping[str, Any]) -> None:
    """Make ``model_index.json`` name the stock pipeline and transformer, which the folder holds."""
    path, pipeline = folder / MODEL_INDEX, stock_pipeline(config)
    parts = inspect.signature(pipeline.__init__).parameters
    index = {k: v for k, v in json.loads(path.read_text()).items() if k.startswith("_") or k in parts}
    index |= {"_class_name": pipeline.__name__, "transformer": ["diffusers", stock_transformer(config).__name__]}
    path.write_text(json.dumps(index, indent=2) + "\n")


class Asked(TypedDict, total=False):
    """Keywords of an edit; :meth:`EditPipeline.__call__` says what they mean."""

    seed: int
    steps: int | None
    guidance: float | None
    frames: int | None
    return_frames: bool
    reasoning_frames: int
    reasoning_steps: int
    progress: Callable[[int], None]


class EditPipeline(WanPipeline):
    """Edit images with a few-step student: a short clip whose last frame is kept."""

    _last_told: tuple[object, Conditions] | None = None

    def __call__(
        self,
        image: Clip | Image.Image,
        instruction: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        frames: int | None = None,
        return_frames: bool = False,
        reasoning_frames: int = 0,
        reasoning_steps: int = 0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Clip:
        """Edit one image; the model's card says what None means.

        The frames are those of stock ``WanImageToVideoPipeline`` with this many steps and frames and a CPU generator
        of this seed.

        Args:
            frames: clip length T.
            return_frames: all T frames instead of the last one.
            reasoning_frames, reasoning_steps: imagine a clip of this length for the first so many steps, and go on
                with its first and last latent frame alone (T = 5), as ChronoEdit does; 0 for off.
            progress: told how many steps are done.

        Raises:
            ShapeError: the image's size does not divide into latent patches; ``edit_photo`` takes any size.
            DataError: the instruction is empty.
            ConfigError: the reasoning asked for is half said.
        """
        clip = as_clip(image).frame(0)
        z_BCthw = self.edit_latents(
            [clip],
            [instruction],
            [seed],
            steps,
            guidance,
            frames,
            reasoning_frames=reasoning_frames,
            reasoning_steps=reasoning_steps,
            progress=progress,
        )
        edited = self.codec.decode(z_BCthw, None if return_frames else [-1])[0]
        self.maybe_free_model_hooks()  # where parts are offloaded
        return edited

    def edit_batch(
        self,
        images: Sequence[Clip],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        frames: int | None = None,
        batch: int = 16,
        fold: bool = True,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Clip]:
        """Edit different images of one size; the last frame of each.

        Args:
            batch: images per forward pass.
            fold: be fast: one pad stands for all of a prompt's padding, and the VAE takes several images a pass. The
                same sums in another order; a small model is several times faster.
            progress: told how many images are done.
        """
        edited, codec = list[Clip](), BatchCodec.over(self.codec) if fold else self.codec
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            z = self.edit_latents(images[part], instructions[part], seeds[part], steps, guidance, frames, fold=fold)
            edited += codec.decode_last(z)
            progress(len(edited))
        return edited

    @torch.no_grad()
    def edit_latents(
        self,
        images: Sequence[Clip],
        instructions: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        frames: int | None = None,
        *,
        fold: bool = False,
        reasoning_frames: int = 0,
        reasoning_steps: int = 0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """The edits as latents [B, C, t, h, w]; see :meth:`edit_batch` and :meth:`__call__`."""
        _require_words(instructions)
        _require_reasoning(reasoning_frames, reasoning_steps, frames)
        grid = self.grid(reasoning_frames or frames or self.card.frames, images[0].size)
        guide = Guidance(self.card.guidance if guidance is None else guidance)
        conditions = self._told_before(images, instructions, grid) if fold else self.told(images, instructions, grid)
        null = self.null_of(conditions) if guide.scale > 1 else None
        self.backbone.set_attention(self.attention, fold)
        self.scheduler.set_timesteps(steps or self.card.steps)
        x_BCthw, watch = self._noise(seeds, grid), _counting(progress)
        way = (self.backbone, self.scheduler, x_BCthw, conditions, null, guide, watch)
        with self.backbone.remembering():
            return denoise_reasoning(*way, reasoning_steps) if reasoning_frames else denoise(*way)

    def _told_before(self, images: Sequence[Clip], instructions: Sequence[str], grid: Grid) -> Conditions:
        """``told``, remembering the last batch: an evaluation asks for it at several step counts and seeds."""
        key = (tuple(image.frames_T3HW.numpy().tobytes() for image in images), tuple(instructions), grid)
        if self._last_told is None or self._last_told[0] != key:
            self._last_told = (key, self.told(images, instructions, grid, fast=True))
        return self._last_told[1]

    def edit_photo(self, photo: Image.Image, instruction: str, **asked: Unpack[Asked]) -> Image.Image:
        """Edit a photograph of any size, turned as its EXIF says; the result has the photograph's size.

        The model works at the trained size of nearest shape, so fine detail is the model's own.

        Raises:
            DataError: the photograph is too long or too wide, or the model cannot read the instruction.
        """
        upright = ImageOps.exif_transpose(photo)
        return as_image(self.photo_clip(upright, instruction, **asked)).resize(upright.size, Image.Resampling.LANCZOS)

    def photo_clip(self, photo: Image.Image, instruction: str, **asked: Unpack[Asked]) -> Clip:
        """The clip of a photograph's edit, at the trained size of nearest shape; see :meth:`edit_photo`."""
        height, width = self.card.size_for(photo.height, photo.width)
        squeezed = photo.height * width / (photo.width * height)
        if max(squeezed, 1 / squeezed) > MOST_SQUEEZED:
            what = f"{photo.width} x {photo.height} pixels are too long a shape for a model of {width} x {height}"
            raise DataError(what, fix="crop it first")
        self._require_known_words(instruction)
        return self(photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), instruction, **asked)

    def _require_known_words(self, instruction: str) -> None:
        """What the text encoder would cut off, or not know a word of, is refused; batches leave that to their maker."""
        tokens = self.tokenizer(prompt_clean(instruction), verbose=False).input_ids
        if len(tokens) > TEXT_TOKENS:
            what = f"the instruction is {len(tokens)} tokens long, and the model reads {TEXT_TOKENS}"
            raise DataError(what, fix="say it shorter")
        if not set(tokens) - {*self.tokenizer.all_special_ids}:
            raise DataError("the model knows no word of the instruction", fix='use words, such as "make it snow"')


@dataclass(frozen=True)
class PipelineEditor:
    """An :class:`EditPipeline` as a :class:`v4e.verbs.Editor`."""

    pipeline: EditPipeline
    steps: int | None = None
    guidance: float | None = None

    def __call__(self, clip: Clip, instruction: str, *, seed: int) -> Clip:
        return self.pipeline(clip, instruction, seed=seed, steps=self.steps, guidance=self.guidance)


class TeacherPipeline(WanPipeline):
    """FLF2V: imagine how the first image becomes the last one, for batches of different images."""

    _is_spread = False

    def spread(self, mesh: DeviceMesh) -> None:
        """Share each forward among the ranks of a mesh with dimensions ring and ulysses, by tokens and by heads.

        All of them must then call this pipeline with the same arguments.

        Raises:
            ConfigError: the attention backend cannot.
        """
        self.backbone.set_attention(spreadable(self.attention), False)
        # Not the plan's first entry, which is about an argument that the stock forward has.
        plan = {module: split for module, split in WanBackbone._cp_plan.items() if module}
        degree = mesh["ulysses"].size()
        parallel = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=True, mesh=mesh)
        self.backbone.enable_parallelism(config=parallel, cp_plan=plan)
        self._is_spread = True

    def __call__(
        self,
        first: Sequence[Clip],
        last: Sequence[Clip],
        evolutions: Sequence[str],
        *,
        seeds: Sequence[int],
        frames: int | None = None,
        steps: int = 50,
        guidance: Guidance = Guidance(),
        fold: bool = False,
    ) -> list[Clip]:
        """Clips between first and last image, as stock diffusers makes them with the folder's own scheduler.

        Raises:
            ShapeError: sizes do not divide into latent patches.
        """
        grid = self.grid(frames or self.card.frames, first[0].size)
        conditions = self.told(first, evolutions, grid, last, fast=fold)
        self.scheduler.set_timesteps(steps)
        end = self._denoise(self.scheduler, self._noise(seeds, grid), conditions, guidance, fold)
        return (BatchCodec.over(self.codec) if fold else self.codec).decode(end)

    def rollout(
        self,
        noise_BCthw: Tensor,
        conditions: Conditions,
        levels: Tensor,
        *,
        steps: int = 0,
        shift: float = 0.0,
        solver: Solver = "unipc",
        guidance: Guidance = Guidance(),
        fold: bool = False,
        onednn: bool = False,
        null_LE: Tensor | None = None,
    ) -> Trajectory:
        """Roll out and keep what is at ``levels``.

        Args:
            noise_BCthw: x(1), fp32.
            levels: noise levels [K + 1] to keep, falling to 0 (flow.union_grid).
            steps: of the solver; 0 for K.
            shift: spreads the further steps between the levels (flow.refine); 0 for the folder's own.
            fold: see :meth:`EditPipeline.edit_batch`.
            onednn: see :meth:`WanBackbone.remembering`.
            null_LE: the empty prompt's embedding, where it is known.
        """
        kept: list[tuple[float, Tensor, Tensor]] = []
        grid = flow.refine(levels, steps, shift or self.scheduler.config.flow_shift) if steps else levels
        scheduler, wanted = scheduler_at(self.scheduler, solver, grid), iter(torch.isin(grid, levels).tolist())

        def keep(sigma: float, x_BCthw: Tensor, v_BCthw: Tensor) -> None:
            if next(wanted):
                kept.append((sigma, x_BCthw, v_BCthw))

        end = self._denoise(scheduler, noise_BCthw, conditions, guidance, fold, onednn, keep, null_LE)
        sigmas, states, velocities = zip(*kept, strict=True)
        x_BKCthw, v_BKCthw = (torch.stack([x.float() for x in xs], dim=1) for xs in (states, velocities))
        return Trajectory(torch.tensor(sigmas), x_BKCthw, v_BKCthw, end.float())

    def _denoise(
        self,
        scheduler: UniPCMultistepScheduler,
        noise_BCthw: Tensor,
        conditions: Conditions,
        guidance: Guidance,
        fold: bool,
        onednn: bool = False,
        watch: Watch = lambda sigma, x_BCthw, v_BCthw: None,
        null_LE: Tensor | None = None,
    ) -> Tensor:
        if not self._is_spread:  # which new processors would undo
            self.backbone.set_attention(self.attention, fold)
        device = self._execution_device
        conditions = conditions.to(device)
        null = self.null_of(conditions, null_LE) if guidance.scale > 1 else None
        with self.backbone.remembering(onednn):
            return denoise(self.backbone, scheduler, noise_BCthw.to(device), conditions, null, guidance, watch)


# -------------------------------------------------------------------------------------------------- images


def as_clip(image: Clip | Image.Image) -> Clip:
    """A picture as a clip of length one."""
    if isinstance(image, Clip):
        return image
    rgb = image.convert("RGB")
    data = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return Clip(data.view(1, rgb.height, rgb.width, 3).movedim(-1, 1).contiguous())


def _counting(progress: Callable[[int], None]) -> Watch:
    """Tells how many steps were watched."""
    done = itertools.count(1)
    return lambda sigma, x_BCthw, v_BCthw: progress(next(done))


def _require_reasoning(reasoning_frames: int, reasoning_steps: int, frames: int | None) -> None:
    if (reasoning_frames > 0) != (reasoning_steps > 0):
        raise ConfigError(
            f"reasoning_frames={reasoning_frames} with reasoning_steps={reasoning_steps}",
            fix="give both, such as 29 frames for 1 step, or neither",
        )
    if reasoning_frames == 1:
        raise ConfigError("reasoning_frames=1 leaves no frame to drop", fix="give 9 or more, such as 29")
    if reasoning_frames and frames:
        raise ConfigError("frames says nothing where reasoning_frames does", fix="leave frames out")


def _require_words(instructions: Sequence[str]) -> None:
    if any(not text.strip() for text in instructions):
        raise DataError("the instruction is empty", fix='say what to change, such as "make it snow"')
