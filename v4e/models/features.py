"""Networks that look at pictures for an evaluation: CLIP, DINO, and any network whose layers are compared.

All come from a local folder in transformers layout, or from the Hub's cache; nothing is downloaded. A picture is scaled
to the network's square as a whole, bicubically, where a stock processor would cut its sides off: an edit may be there.

Legend: B pictures, E embedding width, C channels of a layer, h w its places.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel

from v4e.errors import CheckpointError, V4EError

TINY = 1e-10  # added to norms, as in LPIPS
AT_ONCE = 32  # pictures in a forward


class Eye:
    """A network and how it wants its pictures.

    Raises:
        CheckpointError: nothing there, another kind of network, or weights that are missing, damaged or pickled.
    """

    kinds: tuple[str, ...] = ()  # the model types it may be, as config.json names them; any by default
    model_class: Any = AutoModel

    def __init__(self, source: str | Path, device: str = "cpu") -> None:
        self.folder, self.device = _cached(source), device
        with _telling(self.folder):
            self.side, self.mean_3, self.std_3 = _processor(self.folder)
            self._require_kind()
            model, found = self.model_class.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
        if lost := sorted(found["missing_keys"]):
            raise CheckpointError(f"{len(lost)} weights are missing, such as {lost[0]}", where=str(self.folder))
        self.model: Any = model.to(device).requires_grad_(False).eval()

    def pixels(self, images_B3HW: Tensor) -> Tensor:
        """Uint8 pictures as the network's normalised floats [B, 3, side, side]."""
        x = images_B3HW.to(self.device).float() / 255
        x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean_3, self.std_3))
        return (x - mean) / std

    def _require_kind(self) -> None:
        kind = AutoConfig.from_pretrained(self.folder, local_files_only=True).model_type
        if self.kinds and not kind.startswith(self.kinds):
            raise CheckpointError(f"a network of type {kind!r}, not {self.kinds[0]!r}", where=str(self.folder))


class Clipper(Eye):
    """CLIP: pictures and sentences in one space (Radford et al. 2021)."""

    kinds, model_class = ("clip",), CLIPModel

    def __init__(self, source: str | Path, device: str = "cpu") -> None:
        super().__init__(source, device)
        with _telling(self.folder):
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @torch.no_grad()
    def images(self, images_B3HW: Tensor) -> Tensor:
        """Embeddings [B, E]."""
        parts = self.pixels(images_B3HW).split(AT_ONCE)
        return torch.cat([self.model.get_image_features(pixel_values=x).pooler_output for x in parts]).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, E]; what CLIP cannot hold of a text is cut off."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([*texts], padding=True, truncation=True, max_length=most, return_tensors="pt")
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return self.model.get_text_features(**inputs).pooler_output.cpu()


class Dino(Eye):
    """DINO: what a picture shows, learned without words; the class token of the last layer (Oquab et al. 2023)."""

    kinds = ("dinov2", "dinov3_vit")

    @torch.no_grad()
    def images(self, images_B3HW: Tensor) -> Tensor:
        """Embeddings [B, E]."""
        parts = self.pixels(images_B3HW).split(AT_ONCE)
        return torch.cat([self.model(pixel_values=x).pooler_output for x in parts]).cpu()


class Layers(Eye):
    """The layers of any vision network that gives its hidden states: ResNet, ConvNeXt, ViT, DINO, CLIP."""

    @torch.no_grad()
    def maps(self, images_B3HW: Tensor) -> list[Tensor]:
        """Each layer's features [B, C, h, w], of length one over the channels; the stem is left out."""
        looking = getattr(self.model, "vision_model", self.model)  # CLIP's half that takes pictures
        parts = [self._states(looking, x) for x in self.pixels(images_B3HW).split(AT_ONCE)]
        whole = [torch.cat(states).cpu() for states in zip(*parts, strict=True)]
        return [x / (x.norm(dim=1, keepdim=True) + TINY) for x in whole]

    def _states(self, looking: Any, x: Tensor) -> list[Tensor]:
        states = looking(pixel_values=x, output_hidden_states=True).hidden_states
        return [self._as_map(state) for state in states[1:]]

    def _as_map(self, state: Tensor) -> Tensor:
        """[B, C, h, w] of tokens [B, n + h * w, C], whose first n belong to no place."""
        if state.ndim == 4:
            return state
        config = getattr(self.model.config, "vision_config", self.model.config)
        h = self.side // config.patch_size
        return state[:, -h * h :].transpose(1, 2).unflatten(2, (h, h))


def cosine(a_BE: Tensor, b_BE: Tensor) -> list[float]:
    """Row by row, in fp64."""
    return F.cosine_similarity(a_BE.double(), b_BE.double(), dim=1).tolist()


def _cached(source: str | Path) -> Path:
    """A folder, or what the Hub's cache holds of a Hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except Exception as error:  # whatever the Hub's client says, it means that there are no weights
        raise CheckpointError(
            "neither a folder nor in the Hub's cache", where=str(source), fix="fetch it first, with `hf download`"
        ) from error


def _processor(folder: Path) -> tuple[int, list[float], list[float]]:
    """Side in pixels, mean and standard deviation of the three channels."""
    said = json.loads((folder / "preprocessor_config.json").read_text())
    size = said.get("crop_size") or said["size"]
    side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
    return int(side), [float(v) for v in said["image_mean"]], [float(v) for v in said["image_std"]]


@contextmanager
def _telling(folder: Path):
    """What transformers says of a folder it cannot use, as one sentence."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # it prints a table of missing weights; ours is a sentence
    try:
        yield
    except V4EError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        what = f"cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        raise CheckpointError(what, where=str(folder), fix="give a folder in transformers layout") from error
    finally:
        log.setLevel(level)
