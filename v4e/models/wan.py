"""Wan as a Backbone: a short block loop over diffusers' own modules, with hidden states as outputs.

Legend: B batch; C latent channels; t h w latent grid; S = t * h/2 * w/2 tokens; D width; L words, E text width;
N vision tokens, V vision width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from diffusers import ChronoEditTransformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_chronoedit import ChronoEditRotaryPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from v4e import flow
from v4e.config import Checkpointing
from v4e.errors import CheckpointError, ConfigError, ShapeError
from v4e.models.attention import Attention, Context, fold_padding, install
from v4e.models.folder import STEM, Tensors, check, is_file_of_weights, locate, read_config
from v4e.models.onednn import OneDnnBlocks
from v4e.models.original import diffusers_config, diffusers_names, is_authors, released_config
from v4e.models.recompute import recomputed
from v4e.nouns import TEXT_TOKENS, Conditions, pad_words

Kind = Literal["i2v", "flf2v"]
Stock = WanTransformer3DModel | ChronoEditTransformer3DModel
Wan = TypeVar("Wan", bound=Stock)
TABLES = ("freqs_cos", "freqs_sin")
SKIP = "rope_temporal_skip_len"  # in the config of diffusers' ChronoEdit: a Wan whose two latent frames stand apart


class WanBackbone(WanTransformer3DModel):
    """``WanTransformer3DModel`` with the signature of :class:`v4e.verbs.Backbone`: same names, weights and config.

    On a CPU its velocity and gradients equal the stock forward's to the bit, unless text padding is folded.
    ``gradient_checkpointing`` recomputes activations block by block in the backward pass, ``selective`` all but the
    costly ones (:mod:`v4e.models.recompute`).
    """

    selective = False
    _fold_text_padding = False
    _memory: dict[int, tuple[Conditions, Tensor | Context]] | None = None
    _onednn: OneDnnBlocks | None = None
    _asked: tuple[Tensor, ...] = ()

    @contextmanager
    def remembering(self, onednn: bool = False) -> Iterator[None]:
        """Within, what is known is embedded once for each conditions object; a solver meets it at every step.

        Nothing that the model is given may be written to within.

        Args:
            onednn: also run the blocks by :mod:`v4e.models.onednn`, where text padding is folded and a batch shares
                its noise level.

        Raises:
            ConfigError: oneDNN cannot take these weights.
        """
        self._memory, self._onednn = {}, OneDnnBlocks(self.blocks) if onednn else None
        try:
            yield
        finally:
            self._memory, self._onednn, self._asked = None, None, ()

    def forward(
        self, x_BCthw: Tensor, sigma_B: Tensor, conditions: Conditions, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Return (velocity [B, C, t, h, w], hidden states [B, S, D] after each tapped block, in their order).

        Inputs are cast to the weights' dtype. A plain tuple leaves the module, as ZeRO-3's hooks need.

        Raises:
            ShapeError: the known latents do not fit the state, or the images are not one (FLF2V: two) per sample.
            ConfigError: a tap is no block.
        """
        dtype = self.patch_embedding.weight.dtype
        inputs = self._inputs(x_BCthw, conditions).to(dtype)
        rotary = self.rope(inputs)
        temb_BD, modulation_B6D, context = self._embed(sigma_B, conditions, dtype)
        h_BSD = self.patch_embedding(inputs).flatten(2).transpose(1, 2).contiguous()
        if self._onednn is not None and not taps and isinstance(context, Context) and _is_shared(modulation_B6D):
            again = self._is_asked_again(x_BCthw, sigma_B, conditions)
            h_BSD = self._onednn(h_BSD, context, modulation_B6D[:1], rotary, again)
            return (self._head(h_BSD, temb_BD, inputs.shape[2:]),)
        h_BSD, tapped = self._blocks(h_BSD, context, modulation_B6D, rotary, taps)
        return (self._head(h_BSD, temb_BD, inputs.shape[2:]), *tapped)

    def _inputs(self, x_BCthw: Tensor, conditions: Conditions) -> Tensor:
        """State, mask and known latents along the channels: the order of the stock pipeline's ``prepare_latents``."""
        known, mask = conditions.known_BCthw, conditions.known_mask_B4thw
        if known.shape != x_BCthw.shape or mask.shape[2:] != x_BCthw.shape[2:]:
            raise ShapeError(f"known latents {list(known.shape)} do not fit the state {list(x_BCthw.shape)}")
        return torch.cat([x_BCthw, mask.to(x_BCthw), known.to(x_BCthw)], dim=1)

    def _embed(
        self, sigma_B: Tensor, conditions: Conditions, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | Context]:
        """Time embedding [B, D], its modulation [B, 6, D], and what cross-attention attends to."""
        known = None if self._memory is None else self._memory.get(id(conditions))
        text_BLE, bias_B11L = conditions.text_BLE.to(dtype), None
        if known is not None:
            text_BLE = text_BLE[:, :0]
        elif self._fold_text_padding:
            text_BLE, bias_B11L = fold_padding(text_BLE, conditions.words_B)
        else:
            text_BLE = pad_words(text_BLE, TEXT_TOKENS)
        temb_BD, modulation_BD, text_BLD, vision_BND = self.condition_embedder(
            flow.timestep(sigma_B), text_BLE, None if known else self._vision(conditions, dtype)
        )
        context = known[1] if known else self._context(conditions, text_BLD, vision_BND, bias_B11L)
        return temb_BD, modulation_BD.unflatten(1, (6, -1)), context

    def _context(
        self, conditions: Conditions, text_BLD: Tensor, vision_BND: Tensor | None, bias_B11L: Tensor | None
    ) -> Tensor | Context:
        """Vision tokens, then text tokens; with their bias where they are folded."""
        tokens_BLD = text_BLD if vision_BND is None else torch.cat([vision_BND, text_BLD], dim=1)
        if bias_B11L is None:
            context = tokens_BLD
        else:
            images = tokens_BLD.shape[1] - text_BLD.shape[1]
            context = Context(tokens_BLD, images, bias_B11L, None if self._memory is None else {})
        if self._memory is not None:
            self._memory[id(conditions)] = conditions, context  # held, so that its id is not given to another
        return context

    def _vision(self, conditions: Conditions, dtype: torch.dtype) -> Tensor | None:
        """Vision tokens, of one image per sample or, with positions (FLF2V), of two; None if the model is blind."""
        if self.condition_embedder.image_embedder is None:
            return None
        images = 1 if self.config["pos_embed_seq_len"] is None else 2
        if len(conditions.vision_BNV) != images * len(conditions.text_BLE):
            raise ShapeError(
                f"vision tokens of {len(conditions.vision_BNV)} images for {len(conditions.text_BLE)} samples, where "
                f"the model takes {images} each"
            )
        return conditions.vision_BNV.to(dtype)

    def _blocks(
        self,
        h_BSD: Tensor,
        context: Tensor | Context,
        modulation_B6D: Tensor,
        rotary: tuple[Tensor, Tensor],
        taps: tuple[int, ...],
    ) -> tuple[Tensor, list[Tensor]]:
        if bad := [i for i in taps if not 0 <= i < len(self.blocks)]:
            raise ConfigError(f"taps {bad} are no blocks of this model", fix=f"use 0 to {len(self.blocks) - 1}")
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        seen = {}
        for i, block in enumerate(self.blocks):
            arguments = (h_BSD, context, modulation_B6D, rotary)
            h_BSD = recomputed(block, *arguments, selective=self.selective) if recompute else block(*arguments)
            if i in taps:
                seen[i] = h_BSD
        return h_BSD, [seen[i] for i in taps]

    def _is_asked_again(self, x_BCthw: Tensor, sigma_B: Tensor, conditions: Conditions) -> bool:
        """Whether this is the last call's state under another prompt."""
        before = self._asked
        self._asked = x_BCthw, sigma_B, conditions.known_BCthw, conditions.known_mask_B4thw
        return len(before) > 0 and all(a is b for a, b in zip(before, self._asked, strict=True))

    def _head(self, h_BSD: Tensor, temb_BD: Tensor, grid: torch.Size) -> Tensor:
        """Modulate, project and put the patches back: [B, C, t, h, w]."""
        shift, scale = (self.scale_shift_table + temb_BD[:, None]).chunk(2, dim=1)
        h_BSD = (self.norm_out(h_BSD.float()) * (1 + scale) + shift).type_as(h_BSD)
        p = self.config["patch_size"]
        cells = [size // step for size, step in zip(grid, p, strict=True)]
        patches = self.proj_out(h_BSD).reshape(len(h_BSD), *cells, *p, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    @property
    def fold_text_padding(self) -> bool:
        """Whether one pad stands for all; see :mod:`v4e.models.attention`. Set by :meth:`set_attention`."""
        return self._fold_text_padding

    def stand_apart(self, temporal_skip: int) -> "WanBackbone":
        """Two latent frames are taken for the ends of a clip of so many, as ChronoEdit does; returns self.

        Clips of other lengths keep the positions 0, 1, ...
        """
        c = self.config
        size = c["attention_head_dim"], c["patch_size"], c["rope_max_seq_len"]
        self.rope = ChronoEditRotaryPosEmbed(*size, temporal_skip_len=temporal_skip)
        self.register_to_config(**{SKIP: temporal_skip})
        return self

    def set_attention(self, backend: Attention = "auto", fold_text_padding: bool = False) -> "WanBackbone":
        """Choose how attention is computed; returns self.

        Raises:
            ConfigError: the backend is unknown or does not work on this machine.
        """
        install(self, backend, fold_text_padding)
        self._fold_text_padding = fold_text_padding
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WanBackbone":
        """Keep the rotary tables in fp32 whatever dtype the module is cast to, as ``from_pretrained`` does."""
        tables = {name: getattr(self.rope, name) for name in TABLES}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            cast = getattr(self.rope, name)
            if cast.dtype != table.dtype:
                setattr(self.rope, name, table.to(cast.device))
        return self

    def save_stock(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        max_shard_size: str = "10GB",
        state: Mapping[str, Tensor] | None = None,
        variant: str | None = None,
    ) -> None:
        """Write a folder that plain diffusers loads as ``WanTransformer3DModel``, or as ChronoEdit's where frames
        stand apart.

        Args:
            folder: the component's folder, such as ``export/transformer``.
            dtype: to store in; None keeps each tensor's.
            state: full tensors, where this module's own are partitioned.
            variant: diffusers' word for other weights in the same folder, such as ``ema``.
        """
        state = self.state_dict() if state is None else state
        stock = _skeleton(self.config)
        stock.load_state_dict({k: v.detach().to(dtype or v.dtype) for k, v in state.items()}, assign=True)
        stock.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)


def _is_shared(modulation_B6D: Tensor) -> bool:
    return torch.equal(modulation_B6D, modulation_B6D[:1].expand_as(modulation_B6D))


class Declared(NamedTuple):
    """The two halves of a :class:`v4e.nouns.Player`: how to build the module, and where its weights come from."""

    build: Callable[[], WanBackbone]
    weights: Callable[[], Iterator[tuple[str, Tensor]]]


def declare(
    source: str | Path,
    subfolder: str = "transformer",
    *,
    kind: Kind | None = None,
    fresh_seed: int | None = None,
    attention: Attention = "auto",
    fold_text_padding: bool = False,
    checkpointing: Checkpointing = False,
    vision_tokens: int | None = None,
    temporal_skip: int = 0,
) -> Declared:
    """Declare a Wan of a folder, file or Hub repository; nothing is built, and only its config is read, until asked.

    Args:
        source: folder or Hub id, in diffusers' layout or Wan's authors'; or one safetensors file (docs/loading.md).
        subfolder: the component in it, where the layout is diffusers'.
        kind: the architecture wanted; where the source is of the other one, it is initialised from it: ``i2v``
            drops FLF2V's vision positions, ``flf2v`` adds them as zeros.
        fresh_seed: keep the architecture alone and draw new weights; see :func:`fresh`.
        attention, fold_text_padding, checkpointing: see :class:`WanBackbone`.
        vision_tokens: tokens of one image, where positions are added; None asks the source's image encoder.
        temporal_skip: see :meth:`WanBackbone.stand_apart`; 0 leaves the source's own positions.

    Raises:
        ConfigError: there are no such positions.
        CheckpointError: the folder, its config or weights are missing, damaged or of another model.
    """
    stored = _find(source, subfolder)
    config = _config_as(stored.config, kind, vision_tokens or _vision_tokens(stored.home))
    config = _apart(config, temporal_skip) if temporal_skip else config
    if fresh_seed is not None:
        return fresh(
            config, fresh_seed, attention=attention, fold_text_padding=fold_text_padding, checkpointing=checkpointing
        )
    return Declared(
        _builder(config, attention, fold_text_padding, checkpointing),
        lambda: _stored_weights(stored, config),
    )


def fresh(
    config: Mapping[str, object],
    seed: int,
    *,
    attention: Attention = "auto",
    fold_text_padding: bool = False,
    checkpointing: Checkpointing = False,
) -> Declared:
    """Declare a new Wan with random weights, a pure function of ``seed``, drawn as Wan's authors draw them.

    The velocity is zero at first, because the last layer is: all other gradients start at the second step.
    """

    def weights() -> Iterator[tuple[str, Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _construct(stock_transformer(config), config)
            _initialise(model)
        yield from ((name, p.detach()) for name, p in model.named_parameters())
        yield from _tables(config)

    return Declared(_builder(config, attention, fold_text_padding, checkpointing), weights)


def refuse_lost_skip(temporal_skip: int, frames: int) -> None:
    """ConfigError where a clip has not the two latent frames that would stand apart."""
    if temporal_skip and frames != 2:
        raise ConfigError(
            f"the clips have {frames} latent frames, and two alone can stand apart",
            where="key temporal_skip",
            fix="set it to 0, or roll out with student_frames=5",
        )


def load_backbone(
    source: str | Path,
    subfolder: str = "transformer",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: Kind | None = None,
    attention: Attention = "auto",
    fold_text_padding: bool = False,
) -> WanBackbone:
    """A Wan for inference: on its device, in eval mode, without gradients.

    As with diffusers' ``from_pretrained``, norms, tables and the time embedder stay in fp32 whatever ``dtype`` is.
    """
    build, weights = declare(source, subfolder, kind=kind, attention=attention, fold_text_padding=fold_text_padding)
    with torch.device("meta"):
        model = build()
    for name, tensor in weights():
        delicate = any(part in name for part in WanBackbone._keep_in_fp32_modules)
        _assign(model, name, tensor.to(device, torch.float32 if delicate else dtype))
    return model.requires_grad_(False).eval()


def _builder(
    config: Mapping[str, object], backend: Attention, fold: bool, checkpointing: Checkpointing
) -> Callable[[], WanBackbone]:
    def build() -> WanBackbone:
        plain = {key: value for key, value in config.items() if key != SKIP}
        model = _construct(WanBackbone, plain).set_attention(backend, fold)
        if skip := config.get(SKIP):
            model.stand_apart(int(str(skip)))
        model.gradient_checkpointing, model.selective = bool(checkpointing), checkpointing == "selective"
        return model

    return build


class _Stored(NamedTuple):
    """A transformer that lies somewhere: what it is, in diffusers' words, and how to reach its tensors.

    Args:
        home: the folder in which its image encoder may lie.
        place: of the weights, for messages.
    """

    home: Path
    place: str
    config: dict[str, object]
    tensors: Callable[[], Tensors]


def _find(source: str | Path, subfolder: str) -> _Stored:
    if is_file_of_weights(source):
        file = Path(source).expanduser()
        tensors = _tensors(file)
        beside = file.with_name("config.json")
        config = _in_diffusers_words(file.parent) if beside.is_file() else released_config(tensors.shapes(), str(file))
        return _Stored(file.parent, str(file), config, lambda: tensors)
    home = locate(source, [f"{subfolder}/config.json", "image_encoder/config.json", "config.json"])
    bare = (home / "config.json").is_file() and not (home / subfolder).is_dir()  # a transformer and no pipeline
    part, patterns = ("", ["config.json", f"{STEM}*"]) if bare else (subfolder, [f"{subfolder}/*"])
    return _Stored(
        home, str(home / part), _in_diffusers_words(home / part), lambda: _tensors(locate(source, patterns) / part)
    )


def _in_diffusers_words(folder: Path) -> dict[str, object]:
    config = read_config(folder)
    return diffusers_config(config) if is_authors(config) else config


def _tensors(place: Path) -> Tensors:
    return Tensors(place, WanTransformer3DModel._keys_to_ignore_on_load_unexpected or (), diffusers_names)


def _config_as(config: dict[str, object], kind: Kind | None, vision_tokens: int) -> dict[str, object]:
    """The config of the architecture wanted; a model with vision positions is FLF2V."""
    if kind is None or (kind == "flf2v") == (config.get("pos_embed_seq_len") is not None):
        return config
    if config.get("image_dim") is None:
        raise CheckpointError(f"the model has no image embedder, so it cannot become {kind}")
    return config | {"pos_embed_seq_len": 2 * vision_tokens if kind == "flf2v" else None}


def _apart(config: dict[str, object], temporal_skip: int) -> dict[str, object]:
    if config.get("pos_embed_seq_len") is not None:
        raise ConfigError(
            "FLF2V is told both ends and keeps its positions", where="key temporal_skip", fix="set it to 0"
        )
    most = _skeleton(config).config["rope_max_seq_len"]
    if not 2 <= temporal_skip <= most:
        raise ConfigError(
            f"{temporal_skip} latent frames have no two ends among the model's {most} positions",
            where="key temporal_skip",
            fix="give the latent frames of the teacher's clip, 21 for 81 frames, or 0 for the model's own",
        )
    return config | {SKIP: temporal_skip}


def _vision_tokens(home: Path) -> int:
    """Tokens of one image: patches and a class token, as the source's image encoder makes them; Wan's 257 else."""
    try:
        encoder = read_config(home / "image_encoder")
        return (int(str(encoder["image_size"])) // int(str(encoder["patch_size"]))) ** 2 + 1
    except (CheckpointError, KeyError):
        return 257


def _stored_weights(stored: _Stored, config: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, checked against its own config and fitted to the wanted one, then the tables."""
    tensors, own, wanted = stored.tensors(), _shapes(stored.config), _shapes(config)
    check(own, tensors.shapes(), stored.place)
    yield from ((name, tensor) for name, tensor in tensors.stream() if name in wanted)
    yield from ((name, torch.zeros(wanted[name])) for name in sorted(wanted.keys() - own.keys()))
    yield from _tables(config)


def _construct(cls: type[Wan], config: Mapping[str, object]) -> Wan:
    model = cls.from_config(dict(config))
    assert isinstance(model, cls)  # a tuple only when asked for unused values
    return model


def stock_transformer(config: Mapping[str, object]) -> type[Stock]:
    """Diffusers' class of a transformer."""
    return ChronoEditTransformer3DModel if config.get(SKIP) else WanTransformer3DModel


def _skeleton(config: Mapping[str, object]) -> Stock:
    """The stock model without memory: names, shapes and the complete config."""
    with torch.device("meta"):
        return _construct(stock_transformer(config), config)


def _shapes(config: Mapping[str, object]) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in _skeleton(config).named_parameters()}


def _tables(config: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """The rotary tables, computed on their own: inside zero.Init in bf16 they come out wrong."""
    c = _skeleton(config).config
    rope = WanRotaryPosEmbed(c["attention_head_dim"], c["patch_size"], c["rope_max_seq_len"])
    yield from ((f"rope.{name}", getattr(rope, name)) for name in TABLES)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer on the meta device."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


@torch.no_grad()
def _initialise(model: Stock) -> None:
    """Wan's own initialisation (Wan2.1 ``wan/modules/model.py``, ``init_weights``)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    embedder = model.condition_embedder
    for module in (*embedder.text_embedder.modules(), *embedder.time_embedder.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
