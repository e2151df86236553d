"""The published models at their real size, on the meta device: the numbers of docs/loading.md are those of the code."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from v4e import config, flow
from v4e.models.original import (
    POSITIONS,
    authors_config,
    authors_names,
    diffusers_config,
    diffusers_names,
    released_config,
)
from v4e.models.wan import fresh
from v4e.recipes import pick

ROOT = Path(__file__).parents[1]


class Released(NamedTuple):
    """A row of docs/loading.md."""

    name: str
    model_type: str
    channels: tuple[int, int]
    heads: int
    head_width: int
    layers: int
    ffn: int
    image: int
    positions: int | None
    parameters: int
    shift: float | None

    @property
    def authors(self) -> Mapping[str, object]:
        """The config.json of the release, in the authors' words."""
        width, (into, out) = self.heads * self.head_width, self.channels
        sizes = {"dim": width, "ffn_dim": self.ffn, "num_heads": self.heads, "num_layers": self.layers}
        return {"model_type": self.model_type, "in_dim": into, "out_dim": out, "freq_dim": 256, "eps": 1e-6} | sizes


def numbers(cell: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,.]*", cell)]


def row(line: str) -> Released:
    name, kind, *cells = (cell.strip() for cell in line.strip("|\n ").split("|"))
    channels, heads, layers, ffn, seen, parameters, shift = (numbers(cell) for cell in cells)
    heads, head_width, layers, ffn, image = (int(n) for n in (*heads, *layers, *ffn, seen[0]))
    positions = int(seen[1]) if len(seen) > 1 else None
    into, out = map(int, channels)
    sizes = (into, out), heads, head_width, layers, ffn, image, positions
    return Released(name, kind, *sizes, int(parameters[0]), shift[0] if shift else None)


ROWS = [row(line) for line in (ROOT / "docs/loading.md").read_text().splitlines() if line.startswith("| Wan2.1-")]
BIG = {  # of diffusers' conversion of the 14B models, besides what distinguishes them
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
    "rope_max_seq_len": 1024,
    "patch_size": (1, 2, 2),
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
SMALL = BIG | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "added_kv_proj_dim": 1536}
EXPECTED = {
    "Wan2.1-I2V-14B-480P": (BIG, None, 3.0),
    "Wan2.1-I2V-14B-720P": (BIG, None, 5.0),
    "Wan2.1-FLF2V-14B-720P": (BIG, 514, 16.0),
    "Wan2.1-Fun-1.3B-InP": (SMALL, None, None),
    "Wan2.1-Fun-14B-InP": (BIG, None, None),
}
each = pytest.mark.parametrize("released", ROWS, ids=lambda released: released.name)


@functools.cache
def built(released: Released) -> WanTransformer3DModel:
    with torch.device("meta"):
        return fresh(diffusers_config(released.authors), seed=0).build()


def counted(D: int, F: int, L: int, positions: int) -> int:
    """Parameters of an image-to-video Wan by hand: width D, feed-forward F, L layers."""
    linear = D * D + D
    attention = 4 * linear + 2 * D  # q, k, v, o and two norms
    block = 2 * attention + (2 * linear + D) + 2 * D + (2 * D * F + F + D) + 6 * D  # images, norm, ffn, modulation
    text, time = 4096 * D + D + linear, 256 * D + D + linear + 6 * linear
    images = 2 * 1280 + (1280 * 1280 + 1280) + (1280 * D + D) + 2 * D + positions * 1280
    patches, head = 36 * 4 * D + D, D * 64 + 64 + 2 * D
    return L * block + text + time + images + patches + head


def test_the_page_lists_every_model_that_is_promised():
    assert [released.name for released in ROWS] == list(EXPECTED)


@each
def test_numbers_of_the_known_models(released):
    sizes, positions, shift = EXPECTED[released.name]
    model = built(released)
    assert {word: model.config[word] for word in sizes} == sizes
    assert model.config["pos_embed_seq_len"] == positions == released.positions
    assert released.shift == shift
    D = sizes["num_attention_heads"] * 128
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["patch_embedding.weight"] == (D, 36, 1, 2, 2)
    assert shapes[f"blocks.{sizes['num_layers'] - 1}.ffn.net.0.proj.weight"] == (sizes["ffn_dim"], D)
    assert shapes["blocks.0.attn2.add_k_proj.weight"] == (D, D)
    assert shapes.get(POSITIONS) == ((1, 514, 1280) if positions else None)
    assert model.rope.freqs_cos.shape == (1024, 128)
    total = sum(p.numel() for p in model.parameters())
    assert total == released.parameters == counted(D, sizes["ffn_dim"], sizes["num_layers"], positions or 0)


@each
def test_every_key_of_the_real_size_goes_to_the_authors_and_back(released):
    model = built(released)
    names = authors_names([name for name, _ in model.named_parameters()])
    assert len(set(names.values())) == len(names) == released.layers * 32 + 23 + bool(released.positions)
    assert diffusers_names(names.values()) == {old: new for new, old in names.items()}
    assert ("img_emb.emb_pos" in names.values()) == bool(released.positions)
    assert diffusers_config(authors_config(model.config)).items() <= dict(model.config).items()


@each
def test_a_file_alone_tells_which_model_it_is(released):
    """From the shapes in its header: what ComfyUI's repackaged files are."""
    model = built(released)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert released_config(shapes, "file").items() <= dict(model.config).items()


@pytest.mark.parametrize("shift", sorted({released.shift for released in ROWS if released.shift}))
def test_shifts_are_those_of_stock_schedulers(shift):
    stock = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    stock.set_timesteps(50)
    ours = flow.time_grid(50, shift)
    assert len(stock.sigmas) == len(ours) and torch.allclose(stock.sigmas.double(), ours.double(), atol=2e-3)


def test_the_real_recipe_has_the_shift_of_its_model():
    recipe = config.load(ROOT / "configs/video4edit.yaml", [], pick)
    (name,) = (released for released in ROWS if released.name in recipe.student)
    assert recipe.shift == name.shift
