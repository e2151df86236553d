"""Wan checkpoints in their authors' words: ``blocks.0.self_attn.q`` is diffusers' ``blocks.0.attn1.to_q``.

Tensors are the same under both names, so that names alone are mapped, and each tensor can be streamed. The mapping is
diffusers' own, asked with names in the place of tensors; its inverse is the same mapping, of every name that Wan's
authors use, turned round.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from v4e.errors import CheckpointError

POSITIONS = "condition_embedder.image_embedder.pos_embed"
NOT_IN_DIFFUSERS = {"img_emb.emb_pos": POSITIONS}  # FLF2V's, which diffusers' mapping passes over
OTHER_MODELS = ("face_adapter.", "motion_encoder.")  # Wan-Animate's, whose tensors the mapping wants to see

LAYERS_AROUND = (
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
    "time_projection.1", "img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4", "head.head",
)  # fmt: skip
TABLES_AROUND = ("img_emb.emb_pos", "head.modulation")
ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k")
LAYERS_IN_A_BLOCK = (
    *(f"self_attn.{layer}" for layer in ATTENTION),
    *(f"cross_attn.{layer}" for layer in (*ATTENTION, "k_img", "v_img", "norm_k_img")),
    "norm3", "ffn.0", "ffn.2",
)  # fmt: skip

CONFIG_WORDS = {  # authors' -> diffusers'
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
}
CONFIG_WORDS_WITH_DEFAULTS = {"freq_dim": "freq_dim", "text_dim": "text_dim", "eps": "eps", "patch_size": "patch_size"}
CONSTANTS = {"image_dim": 1280, "pos_embed_seq_len": 514}  # in the authors' code; we write others into the config
SIZES = {5120: (40, 40, 13824), 1536: (12, 30, 8960)}  # of the released models: width -> heads, layers, ffn


def diffusers_names(names: Collection[str]) -> dict[str, str]:
    """Name in a checkpoint -> diffusers' name of it: the same where it follows diffusers, or is of another model.

    ComfyUI's prefix ``model.diffusion_model.`` is dropped.
    """
    same = {name: name for name in names}
    if not any(".self_attn." in name for name in names):
        return same
    known = {name: name for name in names if not any(part in name for part in OTHER_MODELS)}
    renamed: dict[str, str] = convert_wan_transformer_to_diffusers(known)
    return same | {old: NOT_IN_DIFFUSERS.get(new, new) for new, old in renamed.items()}


def authors_names(names: Collection[str]) -> dict[str, str]:
    """Diffusers' name -> the authors' name.

    Raises:
        CheckpointError: a name that their Wan has not.
    """
    layers = 1 + max((int(number) for name in names for number in re.findall(r"^blocks\.(\d+)\.", name)), default=-1)
    turned = {new: old for old, new in diffusers_names([*_every_name(layers)]).items()}
    if strange := sorted(set(names) - turned.keys()):
        raise CheckpointError(f"{len(strange)} tensors that Wan2.1 has not: {', '.join(strange[:3])}")
    return {name: turned[name] for name in names}


def _every_name(layers: int) -> Iterator[str]:
    """What an original Wan of any kind may hold, and biases that its norms have not."""
    in_a_block = [f"{layer}.{leaf}" for layer in LAYERS_IN_A_BLOCK for leaf in ("weight", "bias")]
    yield from (f"{layer}.{leaf}" for layer in LAYERS_AROUND for leaf in ("weight", "bias"))
    yield from TABLES_AROUND
    yield from (f"blocks.{i}.{name}" for i in range(layers) for name in (*in_a_block, "modulation"))


def is_authors(config: Mapping[str, object]) -> bool:
    """Whether a config.json is in the authors' words."""
    return "num_heads" in config


def diffusers_config(authors: Mapping[str, object]) -> dict[str, object]:
    """An architecture in diffusers' words.

    Raises:
        CheckpointError: the config lacks a size, or is of another model than text- or image-to-video.
    """
    kind = authors.get("model_type", "t2v")
    if kind not in ("t2v", "i2v", "flf2v"):
        raise CheckpointError(f"the model is Wan's {kind}, which v4e does not run", fix="use an I2V or FLF2V model")
    if missing := [word for word in ("dim", *CONFIG_WORDS) if word not in authors]:
        raise CheckpointError(f"the model's config has no {', '.join(missing)}", fix="take the one of its release")
    words = CONFIG_WORDS | {word: own for word, own in CONFIG_WORDS_WITH_DEFAULTS.items() if word in authors}
    width, constants = int(str(authors["dim"])), {word: authors.get(word, value) for word, value in CONSTANTS.items()}
    sees, knows_the_end = kind != "t2v", kind == "flf2v"
    return {own: authors[word] for word, own in words.items()} | {
        "attention_head_dim": width // int(str(authors["num_heads"])),
        "image_dim": constants["image_dim"] if sees else None,
        "added_kv_proj_dim": width if sees else None,
        "pos_embed_seq_len": constants["pos_embed_seq_len"] if knows_the_end else None,
    }


def authors_config(config: Mapping[str, object]) -> dict[str, object]:
    """The inverse of :func:`diffusers_config`."""
    words = CONFIG_WORDS | CONFIG_WORDS_WITH_DEFAULTS
    width = int(str(config["num_attention_heads"])) * int(str(config["attention_head_dim"]))
    kind = "t2v" if not config.get("image_dim") else "flf2v" if config.get("pos_embed_seq_len") else "i2v"
    unusual = {word: config[word] for word, value in CONSTANTS.items() if config.get(word) not in (None, value)}
    return {
        "_class_name": "WanModel",
        "model_type": kind,
        "dim": width,
        "text_len": 512,
        **{word: config[own] for word, own in words.items() if own in config},
        **unusual,
    }


def released_config(shapes: Mapping[str, torch.Size], where: str) -> dict[str, object]:
    """The architecture, in diffusers' words, of a checkpoint without a config, by its width and its first layers.

    Args:
        shapes: by diffusers' names.

    Raises:
        CheckpointError: no released Wan is of this width.
    """
    into = shapes.get("patch_embedding.weight", torch.Size([0, 0]))
    if into[0] not in SIZES:
        raise CheckpointError(
            f"there is no config.json, and no released Wan is {into[0]} wide",
            where=where,
            fix="put the model's config.json beside the file",
        )
    heads, layers, ffn = SIZES[into[0]]
    sees, positions = "condition_embedder.image_embedder.norm1.weight" in shapes, shapes.get(POSITIONS)
    return diffusers_config(
        {
            "model_type": "flf2v" if positions else "i2v" if sees else "t2v",
            "dim": into[0],
            "in_dim": into[1],
            "out_dim": 16,
            "num_heads": heads,
            "num_layers": layers,
            "ffn_dim": ffn,
        }
    )


def save_original(
    folder: str | Path, config: Mapping[str, object], state: Mapping[str, Tensor], max_shard_size: str = "10GB"
) -> None:
    """Write a folder as Wan's authors do: config.json, and safetensors under their names.

    Args:
        config: diffusers'.
        state: every parameter, by diffusers' names.

    Raises:
        CheckpointError: a tensor that their Wan has not.
    """
    names, folder = authors_names(state), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {names[name]: tensor.detach() for name, tensor in state.items()},
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    (folder / "config.json").write_text(json.dumps(authors_config(config), indent=2) + "\n")
