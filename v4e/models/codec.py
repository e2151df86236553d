"""Wan's codec: pixels to normalised latents and back, text and images to embeddings.

Legend: B batch, T frames, H W pixels; C t h w latents; L words, E text width; N vision tokens, V vision width.

Every network here sees one sample at a time. A matrix product over a batch need not give each row the bits it would
have alone, and a sample's latents must not depend on which others it was encoded with: shards are rebuilt and resumed.
They do depend on the device and, on a CPU, may depend on the number of threads.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from PIL import Image
from torch import Tensor

from v4e.errors import CheckpointError, ShapeError
from v4e.models.folder import locate, read_config
from v4e.nouns import TEXT_TOKENS, Clip, Conditions, Grid, known_mask_4thw, pad_words


class WanCodec:
    """The frozen half of a Wan pipeline, loaded part by part when first used.

    ``del codec.text_encoder`` frees a part; the next use loads it again.
    """

    def __init__(
        self, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Args as in :meth:`load`."""
        self.source, self.device, self.dtype = source, torch.device(device), dtype

    @classmethod
    def load(
        cls, source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "WanCodec":
        """The codec of a pipeline in diffusers layout.

        Args:
            source: folder, or Hub id.
            device: where the networks live and where latents and embeddings come out.
            dtype: of the text encoder; VAE and image encoder stay in fp32, as Wan's documentation advises.

        Raises:
            CheckpointError: no such pipeline; a part that is missing says so when it is first used.
        """
        _classes(source)
        return cls(source, device, dtype)

    # Parts ---------------------------------------------------------------------------------------------------------

    @cached_property
    def vae(self):
        return self._network("vae", torch_dtype=torch.float32)

    @cached_property
    def text_encoder(self):
        return self._network("text_encoder", dtype=self.dtype)

    @cached_property
    def image_encoder(self):
        return self._network("image_encoder", dtype=torch.float32)

    @cached_property
    def tokenizer(self):
        return _part(self.source, "tokenizer")

    @cached_property
    def image_processor(self):
        return _part(self.source, "image_processor")

    def _network(self, name: str, **dtype: torch.dtype):
        return _part(self.source, name, **dtype).to(self.device).requires_grad_(False).eval()

    # Pixels and latents --------------------------------------------------------------------------------------------

    def grid(self, T: int, H: int, W: int) -> Grid:
        """A clip's size with this VAE's strides and this DiT's patch.

        Raises:
            ShapeError: the clip does not divide.
        """
        return Grid(T, H, W, self._stride, self._patch)

    def encode(self, clips: Sequence[Clip]) -> Tensor:
        """Normalised latents [B, C, t, h, w], fp32, of clips of one size and length: the posterior's mode.

        Raises:
            ShapeError: the clips differ in size or do not divide into latents.
        """
        return self.encode_floats(self._floats(clips))

    def encode_floats(self, video_BCTHW: Tensor) -> Tensor:
        """Normalised latents [B, C, t, h, w] of videos in [-1, 1]; zero is grey."""
        self.grid(*video_BCTHW.shape[2:])
        return self._one_by_one(self._encode_one, video_BCTHW)

    def known(self, firsts: Sequence[Clip], grid: Grid, lasts: Sequence[Clip] | None = None) -> Tensor:
        """Latents [B, C, t, h, w] of what a model is told: the first frame, grey, and with ``lasts`` the last frame.

        Raises:
            ShapeError: an image is not of the grid's size, or there is no room for both ends.
        """
        ends = [self._floats(images, grid.with_frames(1)) for images in (firsts, lasts) if images is not None]
        grey = grid.T - len(ends)
        if grey < 0:
            raise ShapeError("a clip of one frame has no room for a first and a last one", fix="use 5 frames or more")
        B, C, _, H, W = ends[0].shape
        return self.encode_floats(torch.cat([ends[0], ends[0].new_zeros(B, C, grey, H, W), *ends[1:]], dim=2))

    @torch.no_grad()
    def decode(self, z_BCthw: Tensor, frames: Sequence[int] | None = None) -> list[Clip]:
        """Clips of latents; with ``frames`` only these (negative ones count from the end), in their order.

        The decoder is causal: latent frames after the last one asked for are not decoded.
        """
        total = range((z_BCthw.shape[2] - 1) * self._stride[0] + 1)
        wanted = list(total) if frames is None else [total[i] for i in frames]
        enough = -(-max(wanted) // self._stride[0]) + 1
        video_BCTHW = self._one_by_one(self._decode_one, z_BCthw[:, :, :enough])
        pixels = ((video_BCTHW[:, :, wanted] * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return [Clip(clip.transpose(0, 1).contiguous().cpu()) for clip in pixels]

    def decode_last(self, z_BCthw: Tensor) -> list[Clip]:
        """The last frame of each clip: the edit."""
        return self.decode(z_BCthw, [-1])

    def decode_floats(self, z_BCthw: Tensor) -> Tensor:
        """Videos [B, 3, T, H, W], differentiable and not clamped: a clamp has no gradient where it bites."""
        x = self.vae.post_quant_conv(self._denormalise(z_BCthw))
        self.vae.clear_cache()
        out = [self._decode_step(x[:, :, i : i + 1], first=i == 0) for i in range(x.shape[2])]
        self.vae.clear_cache()
        video_BCTHW = torch.cat(out, dim=2)
        patch = self.vae.config.patch_size
        return video_BCTHW if patch is None else unpatchify(video_BCTHW, patch)

    # Words and looks -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """Text embeddings [L, E] of each text, trimmed to its real tokens, at most 512 (``_get_t5_prompt_embeds``)."""
        return [self._read_one(prompt_clean(text)) for text in texts]

    @torch.no_grad()
    def look(self, images: Sequence[Clip]) -> Tensor:
        """Vision tokens [B, N, V] of images: the encoder's last hidden states but one (``encode_image``)."""
        return torch.cat([self._look_one(image) for image in images])

    def conditions(
        self,
        texts_LE: Sequence[Tensor],
        vision_BNV: Tensor,
        known_BCthw: Tensor,
        grid: Grid,
        vision_last_BNV: Tensor | None = None,
    ) -> Conditions:
        """What is known about a batch; with ``vision_last_BNV`` the last frame is known too, as FLF2V is told."""
        longest = max(len(text) for text in texts_LE)
        vision = (vision_BNV,) if vision_last_BNV is None else (vision_BNV, vision_last_BNV)
        mask = known_mask_4thw(grid, last=vision_last_BNV is not None).to(known_BCthw)
        return Conditions(
            text_BLE=torch.cat([pad_words(text[None], longest) for text in texts_LE]),
            words_B=torch.tensor([len(text) for text in texts_LE], device=known_BCthw.device),
            vision_BNV=torch.stack(vision, dim=1).flatten(0, 1),  # first and last of a sample follow each other
            known_BCthw=known_BCthw,
            known_mask_B4thw=mask.expand(len(known_BCthw), *mask.shape),
        )

    # One sample at a time ------------------------------------------------------------------------------------------

    @staticmethod
    def _one_by_one(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        return torch.cat([function(one) for one in batch.split(1)])

    @torch.no_grad()
    def _encode_one(self, video_1CTHW: Tensor) -> Tensor:
        z = self.vae.encode(video_1CTHW.to(self.device, self.vae.dtype)).latent_dist.mode()
        mean, per_std = self._statistics
        return (z.float() - mean) * per_std

    def _decode_one(self, z_1Cthw: Tensor) -> Tensor:
        return self.vae.decode(self._denormalise(z_1Cthw), return_dict=False)[0]

    def _denormalise(self, z_BCthw: Tensor) -> Tensor:
        mean, per_std = self._statistics
        return (z_BCthw.to(self.device, torch.float32) / per_std + mean).to(self.vae.dtype)

    def _decode_step(self, x_BC1hw: Tensor, first: bool) -> Tensor:
        """One latent frame, with the features of earlier ones in the VAE's cache."""
        self.vae._conv_idx = [0]
        return self.vae.decoder(x_BC1hw, feat_cache=self.vae._feat_map, feat_idx=self.vae._conv_idx, first_chunk=first)

    def _read_one(self, text: str) -> Tensor:
        # Padded to 512 even though the padding is cut off again: that is what the stock pipeline computes, to the bit.
        tokens = self.tokenizer(
            [text], padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden[0, : int(tokens.attention_mask.sum())].clone()  # or the padding would live as long as the words

    def _look_one(self, image: Clip) -> Tensor:
        if len(image) != 1:
            raise ShapeError(f"an image is a clip of one frame, not {len(image)}", fix="take clip.frame(i)")
        picture = Image.fromarray(image.frames_T3HW[0].permute(1, 2, 0).cpu().numpy())
        pixels = self.image_processor(images=picture, return_tensors="pt").to(self.device)
        return self.image_encoder(**pixels, output_hidden_states=True).hidden_states[-2]

    def _floats(self, clips: Sequence[Clip], grid: Grid | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1], rounded as diffusers' ``VideoProcessor`` rounds."""
        grid = grid or self.grid(len(clips[0]), *clips[0].size)
        if wrong := [clip for clip in clips if (len(clip), *clip.size) != (grid.T, grid.H, grid.W)]:
            raise ShapeError(
                f"a clip of {len(wrong[0])} frames, {list(wrong[0].size)} pixels among ones of {grid.T}, "
                f"{[grid.H, grid.W]}",
                fix="resize or crop it first",
            )
        return 2 * (torch.stack([clip.frames_T3HW.transpose(0, 1) for clip in clips]).float() / 255) - 1

    # Facts of the folder -------------------------------------------------------------------------------------------

    @cached_property
    def _stride(self) -> tuple[int, int, int]:
        config = read_config(locate(self.source, ["vae/config.json"]) / "vae")
        time, space = config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)
        assert isinstance(time, int) and isinstance(space, int)
        return time, space, space

    @cached_property
    def _patch(self) -> tuple[int, int, int]:
        """The DiT's patch; Wan's own where the folder holds no DiT."""
        home = locate(self.source, ["transformer/config.json"]) / "transformer"
        patch = read_config(home)["patch_size"] if home.is_dir() else (1, 2, 2)
        t, h, w = patch  # pyright: ignore[reportGeneralTypeIssues]
        return t, h, w

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std of the latents [1, C, 1, 1, 1], fp32; the stock pipeline multiplies by the inverse."""
        config = self.vae.config
        mean, std = (
            torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return mean, 1.0 / std


def _classes(source: str | Path) -> dict[str, tuple[str, str]]:
    """Each part's library and class, as the pipeline's model_index.json says."""
    path = locate(source, ["model_index.json"]) / "model_index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no readable pipeline index: {error}", where=str(path), fix="give a folder in diffusers layout"
        ) from error
    return {name: tuple(value) for name, value in index.items() if isinstance(value, list)}


def _part(source: str | Path, name: str, **options: torch.dtype) -> Any:
    """Load one part by the class its pipeline names, as the stock pipeline would.

    Raises:
        CheckpointError: the pipeline has no such part, or it cannot be loaded.
    """
    library, cls = _classes(source).get(name, (None, None))
    folder = locate(source, [f"{name}/*"]) / name
    if library not in ("diffusers", "transformers") or not folder.is_dir():
        raise CheckpointError(
            f"the pipeline has no {name}", where=str(source), fix="export or download all of its parts"
        )
    try:
        return getattr(importlib.import_module(library), str(cls)).from_pretrained(folder, **options)
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {str(error).splitlines()[0]}", where=str(folder)) from error
