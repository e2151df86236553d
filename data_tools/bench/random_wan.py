"""Wans of any size with random weights, drawn on the device that uses them, and random things to tell them.

Neither speed nor memory depends on what the numbers are, as long as they stay finite. A CPU would take minutes to draw
the 16 billion of Wan-14B, and hold them in fp32.

Legend: C latent channels; t h w latent grid; L words, E text width; N vision tokens, V vision width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from v4e.data.shards import SetMeta, ShardWriter
from v4e.models.original import diffusers_config
from v4e.models.wan import TABLES, Kind, WanBackbone, fresh
from v4e.nouns import Conditions, Encoded, Grid, Player, Sample, known_mask_4thw
from v4e.plan import VISION_TOKENS, WORDS

C = 16
DEVIATION = 0.02  # of a random weight


@dataclass(frozen=True)
class Sizes:
    """A Wan's; the defaults are those of Wan2.1-14B, I2V and FLF2V."""

    heads: int = 40
    width: int = 5120
    ffn: int = 13824
    layers: int = 40
    text: int = 4096
    vision: int = 1280

    def config(self, kind: Kind) -> dict[str, object]:
        """In diffusers' words."""
        own = {"dim": self.width, "num_heads": self.heads, "ffn_dim": self.ffn, "num_layers": self.layers}
        around = {"in_dim": 2 * C + 4, "out_dim": C, "text_dim": self.text, "image_dim": self.vision}
        return diffusers_config({"model_type": kind, **own, **around})


def player(
    config: Mapping[str, object],
    device: torch.device,
    *,
    trains: bool = False,
    stage: int = 0,
    checkpointing: bool = False,
) -> Player:
    """A Wan with random weights, as a recipe would cast it."""
    build = fresh(config, 0, checkpointing=checkpointing).build
    return Player("student", build, lambda: _drawn(build, device), trains, zero_stage=stage)  # type: ignore[arg-type]


def built_on(there: Player, device: torch.device) -> Player:
    """The same player, built in bf16 on the device, where without ZeRO it would begin in fp32 in main memory."""

    def build() -> torch.nn.Module:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                return there.build()
        finally:
            torch.set_default_dtype(usual)

    return replace(there, build=build)


def whole(config: Mapping[str, object], device: torch.device) -> WanBackbone:
    """A Wan for inference in bf16; what diffusers keeps in fp32, as :func:`v4e.models.wan.load_backbone` does, is."""
    declared = player(config, device)
    with torch.device("meta"):
        model = declared.build()
    assert isinstance(model, WanBackbone)
    tensors = dict(declared.weights())
    for table in TABLES:
        setattr(model.rope, table, tensors.pop(f"rope.{table}"))
    delicate = WanBackbone._keep_in_fp32_modules
    state = {name: t.float() if any(part in name for part in delicate) else t for name, t in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def conditions(grid: Grid, sizes: Sizes, images: int, device: torch.device, words: int = WORDS) -> Conditions:
    """What one clip's model is told; two images are the ends of a clip whose last frame is known."""
    return Conditions(
        text_BLE=torch.randn(1, words, sizes.text, device=device),
        words_B=torch.tensor([words], device=device),
        vision_BNV=torch.randn(images, VISION_TOKENS, sizes.vision, device=device),
        known_BCthw=torch.randn(1, C, grid.t, grid.h, grid.w, device=device),
        known_mask_B4thw=known_mask_4thw(grid, images == 2)[None].to(device),
    )


def shards(folder: Path, grid: Grid, sizes: Sizes, samples: int = 2) -> Path:
    """A set to train on, without roll-outs."""
    with ShardWriter(folder, SetMeta("encoded", grid)) as writer:
        for n in range(samples):
            writer.add(Sample(f"s{n}", "add a boat", "", None, None, _encoded(grid, sizes)))
    return folder


def _encoded(grid: Grid, sizes: Sizes) -> Encoded:
    clip, known = torch.randn(2, C, grid.t, grid.h, grid.w)
    text, vision = torch.randn(WORDS, sizes.text), torch.randn(VISION_TOKENS, sizes.vision)
    change = torch.rand(grid.t, grid.h, grid.w)
    return Encoded(clip, known, text, text[:1], vision, text, known, vision, change)


def _drawn(build: Callable[[], WanBackbone], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, bf16 tensor) of every parameter, one at a time, then the rotary tables in fp32."""
    with torch.device("meta"):
        model = build()
    draw = torch.Generator(device).manual_seed(0)
    yield from ((name, _values(name, p.shape, draw)) for name, p in model.named_parameters())
    c = model.config
    rope = WanRotaryPosEmbed(c["attention_head_dim"], c["patch_size"], c["rope_max_seq_len"])
    yield from ((f"rope.{name}", getattr(rope, name).to(device)) for name in TABLES)


def _values(name: str, shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Norms leave their input as it is, biases are zero, all else is normal."""
    kind = {"device": draw.device, "dtype": torch.bfloat16}
    if len(shape) > 1:
        return DEVIATION * torch.randn(shape, generator=draw, **kind)
    return torch.ones(shape, **kind) if name.endswith("weight") else torch.zeros(shape, **kind)
