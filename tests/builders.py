"""Tiny Wan folders in diffusers layout, with random weights, for every test that needs a model."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

Kind = Literal["i2v", "flf2v"]
WORDS = [
    "add",
    "remove",
    "make",
    "replace",
    "turn",
    "the",
    "a",
    "sky",
    "tree",
    "car",
    "red",
    "blue",
    "green",
    "dog",
    "cat",
    "house",
    "into",
    "with",
    "of",
    "night",
    "snow",
]
C, VISION_TOKENS, VISION_WIDTH, TEXT_WIDTH = 4, 5, 16, 24

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 2 * C + 4,
    "out_channels": C,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 3,
    "image_dim": VISION_WIDTH,
    "added_kv_proj_dim": 24,
    "rope_max_seq_len": 64,
}


def wan_folder(path: Path, kind: Kind = "i2v", seed: int = 0) -> Path:
    """Write a tiny pipeline to ``path``: every component that the real folders have. A pure function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = WanImageToVideoPipeline(
            tokenizer=tokenizer(),
            text_encoder=text_encoder(),
            vae=vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=16.0 if kind == "flf2v" else 3.0
            ),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
            image_encoder=image_encoder(),
            transformer=transformer(kind),
        )
    pipeline.save_pretrained(path)
    return Path(path)


@functools.cache
def shared_wan_folder(kind: Kind = "i2v", seed: int = 0) -> Path:
    """One such folder per test session; read only."""
    path = tempfile.mkdtemp(prefix=f"wan-{kind}-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return wan_folder(Path(path), kind, seed)


def transformer(kind: Kind) -> WanTransformer3DModel:
    model = WanTransformer3DModel(**WAN, pos_embed_seq_len=2 * VISION_TOKENS if kind == "flf2v" else None)
    if kind == "flf2v":  # zeros would hide a mistake in the pairing of first and last
        torch.nn.init.normal_(model.condition_embedder.image_embedder.pos_embed)
    return model


def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=C,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 1.0, 0.8],
    )


def text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def image_encoder() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return CLIPVisionModel(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, lower case; ends with </s> as umT5's does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """OpenMP's threads do not live through the fork of a rank, which would wait for them for ever.

    And on a busy machine MKL takes fewer of them, and products split otherwise differ in their last bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
