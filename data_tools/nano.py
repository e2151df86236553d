"""`make nano`: train wan-nano from nothing, in resumable stages, deterministic by seed.

Stages, each a folder under the work directory with a checkpoint it resumes from:

    vae      AutoencoderKLWan on images, then clips              text     tokenizer and UMT5 encoder
    vision   CLIP vision encoder                                 arch     both folders, their DiTs without weights
    polish   the VAE's decoder alone, on detail and sketches     pack     clips -> shards, as the trainer reads them
    teacher  FLF2V on 9-frame clips (recipes/flow_matching.py)   i2v      I2V on 5-frame clips, from the teacher
    teacher-2          goes on with the same clips               i2v-2 to i2v-5     go on, each on new clips
    decoder            the VAE's decoder, on latents as a few steps leave them    bundle   bf16 folders, to v4e/assets

`--card runs/long/report.json` then writes the model cards with the figures that `make student` measured;
`--student runs/long` ships the student of a longer demo (`make student`) beside them, with its card.

The encoders have no loop of v4e's own: they are what a user of real Wan downloads. The two DiTs are trained by
`v4e train`, as any model is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_tools import world
from data_tools.demo import launcher, ranks_here
from data_tools.rollout import TOOL, Evolving, pack_clips
from data_tools.stopwatch import Stopwatch
from v4e import flow
from v4e.data.collate import stack, student_conditions
from v4e.data.disk import lock, share
from v4e.data.shards import ShardSet
from v4e.errors import DataError
from v4e.eval.metrics import LUMA, ROUNDING_ENERGY
from v4e.export import export_run
from v4e.journal import progress
from v4e.models.codec import WanCodec
from v4e.nouns import Clip, Origin, seed_of
from v4e.pipelines import CARD, Card, EditPipeline, few_step_scheduler

SIZE = 64
BUNDLE = Path("v4e/assets/wan-nano")
IMAGE_STEPS, CLIP_STEPS, WHOLE_STEPS = 700, 1100, 120
DETAIL_STEPS, SHARP_STEPS, SKETCH_STEPS = 500, 300, 900
ESTIMATE_STEPS, LAST_SKETCHES = 1000, 20_000
SKETCHES, LATENT_NOISE = 0.2, 0.1


# ------------------------------------------------------------------------------------------------ optimiser


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix by Newton-Schulz (Jordan et al. 2024, Muon; quintic coefficients)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.flatten(1).float()
    flipped = x.shape[0] > x.shape[1]
    x = x.T if flipped else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        m = x @ x.T
        x = a * x + (b * m + c * m @ m) @ x
    return (x.T if flipped else x).reshape(g.shape)


class ConvMuon(torch.optim.Optimizer):
    """Muon on kernels seen as [out, in * k] matrices; torch's own takes 2-D parameters only."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, p.shape[0] / (p.numel() / p.shape[0])) ** 0.5
                p.add_(update, alpha=-group["lr"] * scale)


def muon_and_adam(module: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for kernels and matrices, AdamW for gains, biases and the thinnest layers."""
    inner = [p for p in module.parameters() if p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 8]
    taken = {id(p) for p in inner}
    rest = [p for p in module.parameters() if id(p) not in taken]
    return [ConvMuon(inner, lr=muon_lr), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)]


@dataclass
class Stage:
    """A resumable training stage: module, optimisers and step are saved together, atomically.

    Args:
        folder: holds state.pt (own file, read with weights_only) while training and done.json after it.
    """

    folder: Path
    module: nn.Module
    optimisers: list[torch.optim.Optimizer]
    steps: int
    save_every: int = 100

    def run(self, loss_of: Callable[[int], Tensor], title: str) -> None:
        """Improve the module for the remaining steps; ``loss_of(step)`` must be a pure function of the step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self._restore()
        peaks = [[g["lr"] for g in o.param_groups] for o in self.optimisers] if not start else self.peaks
        self.peaks, trail = peaks, []
        for step in progress(range(start, self.steps), title, total=self.steps, start=start):
            for o, lrs in zip(self.optimisers, peaks, strict=True):
                for group, lr in zip(o.param_groups, lrs, strict=True):
                    group["lr"] = lr * min(1.0, (step + 1) / 20) * min(1.0, (self.steps - step) / (0.4 * self.steps))
            loss = loss_of(step)
            for o in self.optimisers:
                o.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for o in self.optimisers:
                o.step()
            trail.append(loss.item())
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                print(json.dumps({"stage": title, "step": step + 1, "loss": sum(trail) / len(trail)}), flush=True)
                trail = []
                self._save(step + 1)

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "module": self.module.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "peaks": self.peaks,
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")

    def _restore(self) -> int:
        if not (self.folder / "state.pt").exists():
            return 0
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.module.load_state_dict(state["module"])
        for o, s in zip(self.optimisers, state["optimisers"], strict=True):
            o.load_state_dict(s)
        self.peaks = state["peaks"]
        return state["step"]


# ------------------------------------------------------------------------------------------------------ vae


def new_vae() -> Any:
    """4x in space (8x is too coarse for 64 pixels), 4x in time, 16 channels."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        is_residual=True,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def raw_decode(vae: Any, z: Tensor) -> Tensor:
    """``vae.decode`` without its final clamp, whose gradient is zero where it is most needed."""
    vae.clear_cache()
    x, frames = vae.post_quant_conv(z), []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        first = {"first_chunk": True} if i == 0 else {}
        frames.append(vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
    vae.clear_cache()
    return torch.cat(frames, 2)


def to_float(clips: list[np.ndarray]) -> Tensor:
    """uint8 [T, 3, H, W] arrays to one fp32 tensor [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).movedim(1, 2).float() / 127.5 - 1


def vae_clip(kind: float, edit: world.Edit, T: int) -> np.ndarray:
    """What the VAE must carry: evolving clips, an edit held still, and the grey-filled clips of the conditions."""
    if kind < 0.4:
        return edit.clip(T)
    source, target = edit.source, edit.target
    if kind < 0.75:
        return np.stack([source, *[target] * (T - 1)])
    grey = np.full_like(source, 128)
    return np.stack([source, *[grey] * (T - 2), target if kind < 0.9 else grey])


def vae_batch(step: int, seed: int) -> Tensor:
    """Quarter crops of images, then of clips of 5 and 9 frames in turn, at last whole clips [B, 3, T, H, W].

    A convolutional codec learns as much from a quarter of the picture at a quarter of the cost; only its one
    attention layer must get to know the whole.
    """
    rng = np.random.default_rng([seed, 1, step])
    offset = 1_000_000 + step * 16
    if step < IMAGE_STEPS:
        edits = [world.draw(seed, offset + i, "train", size=SIZE) for i in range(16)]
        return to_float([_quarter((e.source if i % 2 else e.target)[None], rng) for i, e in enumerate(edits)])
    whole = step >= IMAGE_STEPS + CLIP_STEPS
    T, B = ((5, 8), (9, 5))[step % 2] if not whole else ((5, 3), (9, 2))[step % 2]
    clips = [vae_clip(rng.random(), world.draw(seed, offset + i, "train", size=SIZE), T) for i in range(B)]
    return to_float(clips if whole else [_quarter(c, rng) for c in clips])


def sketchy_batch(step: int, seed: int) -> Tensor:
    """Quarter crops of clips, a fifth of them sketches at least: the task of most detail is a twentieth elsewhere."""
    rng = np.random.default_rng([seed, 9, step])
    T, B = ((5, 8), (9, 5))[step % 2]
    clips = []
    for index in range(1_500_000 + step * 16, 1_500_000 + step * 16 + B):
        tasks = ("sketch",) if rng.random() < SKETCHES else world.SCHEDULE
        edit = world.draw(seed, index, "train", size=SIZE, tasks=tasks)
        clips.append(_quarter(vae_clip(rng.random(), edit, T), rng))
    return to_float(clips)


def _quarter(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y, x = rng.integers(0, SIZE // 2 + 1, 2)
    return clip[..., y : y + SIZE // 2, x : x + SIZE // 2]


def texture_energy(x: Tensor) -> Tensor:
    """Root-mean-square Laplacian over 8x8 blocks of every frame: how much fine detail there is, not where."""
    return (F.avg_pool2d(laplacian(x.mean(1)) ** 2, 8, ceil_mode=True) + 1e-5).sqrt()


def log_sharpness(x: Tensor) -> Tensor:
    """Logarithm of each frame's detail energy [B * T]; its differences are those of eval.metrics.sharpness."""
    floor = ROUNDING_ENERGY / 127.5**2
    luma = torch.einsum("c,bcthw->bthw", torch.tensor(LUMA), x)
    return ((laplacian(luma) ** 2).mean((1, 2, 3)) + floor).log()


def laplacian(luma_BTHW: Tensor) -> Tensor:
    """5-point Laplacian of every frame [B * T, 1, H - 2, W - 2]."""
    luma = luma_BTHW.flatten(0, 1)[:, None]
    beside = luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:] + luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1]
    return 4 * luma[..., 1:-1, 1:-1] - beside


def vae_loss(vae: Any, x: Tensor, noise_seed: int) -> Tensor:
    """Squared error, a little KL to keep latents near unit scale, and a little detail energy against blur."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = vae._encode(x)
        mean, log_var = moments.float().chunk(2, dim=1)
        log_var = log_var.clamp(-20, 4)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(noise_seed))
        y = raw_decode(vae, mean + noise * (0.5 * log_var).exp())
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
    return picture_loss(y.float(), x, detail=0.01) + 1e-5 * kl


def decoder_loss(vae: Any, x: Tensor, sharp: float, noise: Callable[[Tensor], Tensor] = lambda mean: mean) -> Tensor:
    """The decoder alone, with more weight on detail: squared error by itself blurs.

    Args:
        sharp: weight of each frame's sharpness, by the ratio that the evaluation measures. Without it the frames of
            most detail, sketches, keep a fifth of it; with much of it squared error suffers.
        noise: what is done to the latents first.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            mean = noise(vae._encode(x).chunk(2, dim=1)[0].float())
        y = raw_decode(vae, mean)
    return detail_loss(y.float(), x, sharp)


def detail_loss(y: Tensor, x: Tensor, sharp: float) -> Tensor:
    return picture_loss(y, x, detail=0.3) + sharp * (log_sharpness(y) - log_sharpness(x)).abs().mean()


def sketchy_loss(vae: Any, std_C: Sequence[float], seed: int, step: int) -> Tensor:
    """Many sketches, from latents that are a little off, as those of a student are."""
    generator = torch.Generator().manual_seed(seed + step)

    def noise(mean_BCthw: Tensor) -> Tensor:
        scale_B1111 = LATENT_NOISE * torch.rand(len(mean_BCthw), 1, 1, 1, 1, generator=generator)
        std = torch.tensor(std_C).view(1, -1, 1, 1, 1)
        return mean_BCthw + scale_B1111 * std * torch.randn(mean_BCthw.shape, generator=generator)

    return decoder_loss(vae, sketchy_batch(step, seed), 0.03, noise)


def picture_loss(y: Tensor, x: Tensor, detail: float) -> Tensor:
    return F.mse_loss(y, x) + detail * F.l1_loss(texture_energy(y), texture_energy(x))


def train_vae(work: Path, seed: int) -> None:
    """Train, measure the latents' mean and deviation per channel, write the diffusers folder."""
    torch.manual_seed(seed_of(seed, "vae"))
    vae = new_vae()
    nn.init.constant_(vae.quant_conv.bias[16:], -5.0)  # start with little posterior noise; KL finds its own level
    stage = Stage(work / "vae", vae, muon_and_adam(vae, 0.02, 3e-3), IMAGE_STEPS + CLIP_STEPS + WHOLE_STEPS)
    stage.run(lambda step: vae_loss(vae, vae_batch(step, seed), seed_of(seed, "noise", step)), "vae")
    mean, std = latent_statistics(vae, seed)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(work / "vae" / "folder")


def load_vae(folder: Path) -> Any:
    return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)


def polish_decoder(work: Path, seed: int) -> None:
    """The decoder goes on with more weight on detail, then on sharpness, at last on many sketches.

    What is packed are latents, so this may happen at the same time.
    """
    vae = load_vae(work / "vae" / "folder")
    std, first, second = vae.config.latents_std, IMAGE_STEPS, IMAGE_STEPS + DETAIL_STEPS
    train_decoder(work / "detail", vae, DETAIL_STEPS, lambda i: decoder_loss(vae, vae_batch(first + i, seed), 0.0))
    train_decoder(work / "sharp", vae, SHARP_STEPS, lambda i: decoder_loss(vae, vae_batch(second + i, seed), 0.03))
    train_decoder(work / "sketch", vae, SKETCH_STEPS, lambda i: sketchy_loss(vae, std, seed, i))
    vae.save_pretrained(work / "polish" / "folder")


def train_decoder(folder: Path, vae: Any, steps: int, loss_of: Callable[[int], Tensor], lr: float = 1.0) -> None:
    """Go on with the decoder; the encoder, and so every latent, stays."""
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv])
    Stage(folder, decoder, muon_and_adam(decoder, 0.01 * lr, 1e-3 * lr), steps).run(loss_of, folder.name)


@torch.no_grad()
def latent_statistics(vae: Any, seed: int, count: int = 64) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation over training clips."""
    clips = to_float([world.draw(seed, 2_000_000 + i, "train", size=SIZE).clip(5) for i in range(count)])
    z = torch.cat([vae.encode(c).latent_dist.mode() for c in clips.split(16)])
    return z.mean((0, 2, 3, 4)).tolist(), z.std((0, 2, 3, 4)).tolist()


@torch.no_grad()
def vae_psnr(vae: Any, count: int = 64, T: int = 5) -> float:
    """Mean PSNR in dB of held-out clips through encode and decode."""
    clips = to_float([world.draw(0, i, "heldout", size=SIZE).clip(T) for i in range(count)])
    y = torch.cat([vae.decode(vae.encode(c).latent_dist.mode()).sample for c in clips.split(16)])
    mse = ((y - clips) / 2).pow(2).mean((1, 2, 3, 4))
    return float((-10 * mse.log10()).mean())


# -------------------------------------------------------------------------------------------- text and vision

WIDTH = 128  # of text and vision embeddings
TEXT_STEPS, VISION_STEPS = 1000, 1000
WORDS = 48  # tokens per text while training


def texts_of(edit: world.Edit) -> list[str]:
    """A concise instruction and an evolution caption: the encoder, as umT5, knows the language of both."""
    return [edit.instruction, edit.evolution]


def train_tokenizer(seed: int, vocabulary: int = 768) -> Any:
    """Byte-level BPE, so that no text is out of vocabulary, over the world's language and a little other English."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [text for i in range(3000) for text in texts_of(world.draw(seed, 3_000_000 + i, "train", size=SIZE))]
    tokenizer.train_from_iterator(corpus + ["a photo of a dog and a cat, a man, a woman, a car, a house"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>",
        model_max_length=512, padding_side="right",
    )  # fmt: skip


def new_text_encoder(vocabulary: int):
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        is_encoder_decoder=False,
    )
    return UMT5EncoderModel(config)


FACETS: dict[str, tuple[str, ...]] = {
    "task": world.TASKS,
    "subject_colour": ("", *world.COLOURS),
    "subject_shape": ("", *world.SHAPES),
    "result_colour": ("", *world.COLOURS),
    "result_shape": ("", *world.SHAPES),
    "result_size": ("", *world.SIZES),
    "result_place": ("", *world.PLACES),
    "scene": ("", *world.BACKGROUNDS),
}


def facets_of(edit: world.Edit) -> list[int]:
    """What a text says, one class per facet."""
    subject, result = edit.subject, edit.result
    says = {
        "task": edit.task,
        "subject_colour": subject.colour if subject else "",
        "subject_shape": subject.shape if subject else "",
        "result_colour": result.colour if result else "",
        "result_shape": result.shape if result else "",
        "result_size": result.scale if edit.task == "add" and result else "",
        "result_place": world.place_of(result) if edit.task in ("add", "move") and result else "",
        "scene": edit.scene,
    }
    return [FACETS[name].index(value) for name, value in says.items()]


class TextTask(nn.Module):
    """An encoder with a masked-word head on every token and facet heads on the last one."""

    def __init__(self, encoder: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.words = nn.Linear(WIDTH, vocabulary)
        self.facets = nn.ModuleList(nn.Linear(WIDTH, len(values)) for values in FACETS.values())

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, hidden_BL: Tensor, facets_BF: Tensor) -> Tensor:
        """Masked-word plus facet cross-entropy; ``hidden_BL`` marks the tokens that were masked out."""
        seen = torch.where(hidden_BL, 3, ids_BL)
        h_BLE = self.encoder(seen, mask_BL).last_hidden_state
        words = F.cross_entropy(self.words(h_BLE[hidden_BL]), ids_BL[hidden_BL])
        clean_BLE = self.encoder(ids_BL, mask_BL).last_hidden_state
        last_BE = clean_BLE[torch.arange(len(ids_BL)), mask_BL.sum(1) - 1]
        says = [F.cross_entropy(head(last_BE), facets_BF[:, i]) for i, head in enumerate(self.facets)]
        return words + torch.stack(says).sum()


def text_batch(tokenizer, step: int, seed: int, count: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both texts of ``count`` edits: ids, attention mask, which tokens are hidden, facets."""
    edits = [world.draw(seed, 4_000_000 + step * count + i, "train", size=SIZE) for i in range(count)]
    texts = [t for e in edits for t in texts_of(e)]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=WORDS, return_tensors="pt")
    generator = torch.Generator().manual_seed(seed_of(seed, "mask", step))
    hidden = (torch.rand(tokens.input_ids.shape, generator=generator) < 0.15) & (tokens.input_ids > 3)
    facets = torch.tensor([f for e in edits for f in (facets_of(e), facets_of(e))])
    return tokens.input_ids, tokens.attention_mask, hidden, facets


def train_text(work: Path, seed: int) -> None:
    """Tokenizer, then encoder: masked words, and what the text asks for, read off its last token."""
    torch.manual_seed(seed_of(seed, "text"))
    tokenizer = train_tokenizer(seed)
    task = TextTask(new_text_encoder(len(tokenizer)), len(tokenizer))
    adam = torch.optim.AdamW(task.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    Stage(work / "text", task, [adam], TEXT_STEPS).run(lambda step: task(*text_batch(tokenizer, step, seed)), "text")
    tokenizer.save_pretrained(work / "text" / "tokenizer")
    task.encoder.save_pretrained(work / "text" / "folder")


def new_vision_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=16,
            projection_dim=WIDTH,
        )
    )


def image_processor():
    """CLIP's own preprocessing at this size."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


class VisionTask(nn.Module):
    """Says of each patch which colours and shapes of object cover it, from the tokens that Wan will read."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.head = nn.Linear(WIDTH, len(world.COLOURS) + len(world.SHAPES))

    def forward(self, pixels_B3HW: Tensor, cover_BNF: Tensor) -> Tensor:
        """Binary cross-entropy against the covered share of each patch."""
        tokens = self.encoder(pixel_values=pixels_B3HW, output_hidden_states=True).hidden_states[-2][:, 1:]
        return F.binary_cross_entropy_with_logits(self.head(tokens), cover_BNF, pos_weight=torch.tensor(4.0))


def cover_of(edit: world.Edit) -> Tensor:
    """Share of each 16-pixel patch of the source covered by objects of each colour and shape [N, colours + shapes]."""
    cover = torch.zeros(len(world.COLOURS) + len(world.SHAPES), SIZE, SIZE)
    for thing in (*edit.rest, *([edit.subject] if edit.subject else [])):
        alpha = torch.from_numpy(thing.alpha)
        cover[list(world.COLOURS).index(thing.colour)] += alpha
        cover[len(world.COLOURS) + world.SHAPES.index(thing.shape)] += alpha
    return F.avg_pool2d(cover.clamp(max=1), 16).flatten(1).T


def vision_batch(processor, step: int, seed: int, count: int = 32) -> tuple[Tensor, Tensor]:
    edits = [world.draw(seed, 5_000_000 + step * count + i, "train", size=SIZE) for i in range(count)]
    pixels = processor(images=[e.source.transpose(1, 2, 0) for e in edits], return_tensors="pt").pixel_values
    return pixels, torch.stack([cover_of(e) for e in edits])


def train_vision(work: Path, seed: int) -> None:
    """CLIP's vision tower, taught to see the world's objects."""
    torch.manual_seed(seed_of(seed, "vision"))
    task, processor = VisionTask(new_vision_encoder()), image_processor()
    adam = torch.optim.AdamW(task.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    Stage(work / "vision", task, [adam], VISION_STEPS).run(lambda s: task(*vision_batch(processor, s, seed)), "vision")
    task.encoder.save_pretrained(work / "vision" / "folder")
    processor.save_pretrained(work / "vision" / "processor")


# ---------------------------------------------------------------------------------------- folders and packing

DIT: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": WIDTH,
    "freq_dim": 256,
    "ffn_dim": 576,
    "num_layers": 6,
    "image_dim": WIDTH,
    "added_kv_proj_dim": 192,
    "rope_max_seq_len": 1024,
}
VISION_TOKENS = (SIZE // 16) ** 2 + 1
FRAMES = {"teacher": 9, "i2v": 5}
SHIFT = 3.0


@dataclass(frozen=True)
class Clips:
    """A packed set: how many clips of a model, from which index of the world's training edits, of which tasks."""

    model: str
    count: int
    offset: int
    tasks: tuple[str, ...] = world.SCHEDULE


# Styles and backgrounds are learnt first, then the shape of what is added or put in place, last what was behind it.
HARD = ("add", "replace", "move", "recolour", "add", "replace", "remove", "move", "add", "replace", "background")
SHAPED = ("add", "replace", "add", "replace", "remove", "replace", "add", "move", "replace", "recolour", "remove")
BARED = ("remove", "replace", "remove", "add", "remove", "replace", "move", "remove", "recolour", "replace", "add")
CLIPS = {
    "teacher": Clips("teacher", 2000, 6_000_000),
    "i2v": Clips("i2v", 6400, 7_000_000),
    "i2v-2": Clips("i2v", 6400, 7_100_000, (*HARD, *HARD, *world.STYLES)),
    "i2v-3": Clips("i2v", 6400, 7_200_000, (*SHAPED, *SHAPED, "background", *world.STYLES)),
    "i2v-4": Clips("i2v", 6400, 7_300_000, (*SHAPED, *SHAPED, "background", *world.STYLES)),
    "i2v-5": Clips("i2v", 6400, 7_400_000, (*BARED, *BARED, "background", *world.STYLES)),
}


@dataclass(frozen=True)
class Leg:
    """One run of `v4e train` on a set of clips, from the weights of an earlier leg or, first of all, from nothing."""

    config: str
    clips: str
    init: str

    @property
    def model(self) -> str:
        return CLIPS[self.clips].model


LEGS = {
    "teacher": Leg("pretrain_flf2v", "teacher", "arch/teacher"),
    "i2v": Leg("pretrain_i2v", "i2v", "models/teacher"),
    "teacher-2": Leg("continue_flf2v", "teacher", "models/teacher"),
    "i2v-2": Leg("continue_i2v", "i2v-2", "models/i2v"),
    "i2v-3": Leg("continue_i2v", "i2v-3", "models/i2v-2"),
    "i2v-4": Leg("continue_i2v", "i2v-4", "models/i2v-3"),
    "i2v-5": Leg("continue_i2v", "i2v-5", "models/i2v-4"),
}
SHIPPED, GUESSING = {"teacher": "teacher-2", "i2v": "i2v-5"}, "i2v-4"


def assemble(work: Path, name: str, out: Path) -> Path:
    """A pipeline folder in diffusers layout with the trained encoders and, so far, a transformer's config alone."""
    from diffusers import WanTransformer3DModel

    parts = {"vae": "vae/folder", "text_encoder": "text/folder", "tokenizer": "text/tokenizer"}
    parts |= {"image_encoder": "vision/folder", "image_processor": "vision/processor"}
    shutil.rmtree(out, ignore_errors=True)
    for part, where in parts.items():
        shutil.copytree(work / where, out / part)
    with torch.device("meta"):
        flf2v: dict[str, Any] = {"pos_embed_seq_len": 2 * VISION_TOKENS} if name == "teacher" else {}
        WanTransformer3DModel(**DIT, **flf2v).save_config(out / "transformer")
    base = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    (base if name == "teacher" else few_step_scheduler(SHIFT)).save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    Card(frames=FRAMES[name], sizes=((SIZE, SIZE),), shift=SHIFT).write(out)
    return out


MODEL_INDEX = {
    "_class_name": "WanImageToVideoPipeline",
    "_diffusers_version": "0.42.1",
    "boundary_ratio": None,
    "expand_timesteps": False,
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def evolving(seed: int, clips: Clips) -> Iterator[Evolving]:
    """Training clips with their captions; every set has its own."""
    for index in range(clips.offset, clips.offset + clips.count):
        edit = world.draw(seed, index, "train", size=SIZE, tasks=clips.tasks)
        clip = Clip(torch.from_numpy(edit.clip(FRAMES[clips.model])))
        yield Evolving(edit.key, clip, edit.evolution, edit.instruction, edit.task)


def pack(work: Path, seed: int, name: str, part: int = 0, parts: int = 1) -> None:
    """Encode a set of clips into shards; the VAE in bf16, as the shards keep bf16."""
    clips = CLIPS[name]
    codec = WanCodec.load(work / "arch" / clips.model)
    grid = codec.grid(FRAMES[clips.model], SIZE, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pack_clips(
            evolving(seed, clips),
            work / f"shards-{name}",
            codec,
            grid,
            ends="first_and_last" if clips.model == "teacher" else "first",
            settings={"world": seed},
            origin=Origin("procedural clips over photographs, docs/world.md", "see there", "", seed, TOOL),
            total=clips.count,
            part=part,
            parts=parts,
        )


# -------------------------------------------------------------------------------------------- DiTs and bundle


def train_leg(work: Path, name: str, seed: int, ranks: int) -> None:
    """Pre-train a DiT with `v4e train`, on ``ranks`` processes of one thread each, and export it."""
    leg = LEGS[name]
    words = [f"init={work / leg.init}", f"loop.data={work / f'shards-{leg.clips}'}", f"loop.output={work / name}"]
    command = [*launcher(ranks_here(ranks)), "train", f"configs/nano/{leg.config}.yaml", *words, f"loop.seed={seed}"]
    subprocess.run(command, check=True)
    export_run(work / name, work / "models" / name, base=str(work / "arch" / leg.model))
    sampled_as(work / "arch" / leg.model, work / "models" / name)


def sampled_as(arch: Path, model: Path) -> None:
    """Give a model its architecture's grid: the levels a leg is trained at may lie nearer to noise."""
    shutil.copytree(arch / "scheduler", model / "scheduler", dirs_exist_ok=True)
    shutil.copy(arch / CARD, model / CARD)


@dataclass(frozen=True)
class Estimates:
    """Clips, and what a model takes their latents for where they are mixed with noise.

    They are as smooth as those that an editor reaches in a few steps, and the decoder has met none such.

    Args:
        codec: gives the latents' mean and deviation.
    """

    model: Any
    codec: Any
    data: ShardSet
    clips: Clips
    seed: int

    def at(self, step: int, count: int = 3) -> tuple[Tensor, Tensor]:
        """Frames [B, 3, T, H, W] and latents [B, C, t, h, w], which are of the VAE's own scale."""
        chosen = np.random.default_rng([self.seed, 11, step]).integers(0, len(self.data), count)
        samples = [self.data.sample(int(i)) for i in chosen]
        latents = stack([s.encoded.clip_Cthw for s in samples if s.encoded])
        conditions = student_conditions([s.encoded for s in samples if s.encoded], "evolution")
        generator = torch.Generator().manual_seed(self.seed + step)
        sigma_B = 0.4 + 0.5 * torch.rand(count, generator=generator)
        x = flow.mix(latents, torch.randn(latents.shape, generator=generator), sigma_B)
        with torch.no_grad():
            v = self.model(x, sigma_B, conditions)[0].float()
        frames = to_float([self._edit(s.key).clip(FRAMES[self.clips.model]) for s in samples])
        std, mean = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (self.codec.latents_std, self.codec.latents_mean))
        return frames, flow.to_x0(x, v, sigma_B) * std + mean

    def _edit(self, key: str) -> world.Edit:
        index = int(key.rpartition("-")[2])
        return world.draw(self.seed, index, "train", size=SIZE, tasks=self.clips.tasks)


def train_on_estimates(work: Path, seed: int) -> None:
    """The decoder of both models goes on, in turns on true latents and on what an I2V takes them for.

    That of the last leg but one, so that this may happen beside the last.
    """
    vae, leg = load_vae(work / "polish" / "folder"), LEGS[GUESSING]
    model = EditPipeline.from_pretrained(work / "models" / GUESSING, dtype=torch.bfloat16, attention="matmul").backbone
    estimates = Estimates(model, vae.config, ShardSet.open(work / f"shards-{leg.clips}"), CLIPS[leg.clips], seed)

    def loss_of(step: int) -> Tensor:
        if step % 2 == 0:
            return sketchy_loss(vae, vae.config.latents_std, seed, LAST_SKETCHES + step)
        frames, latents = estimates.at(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = raw_decode(vae, latents)
        return detail_loss(y.float(), frames, sharp=0.03)

    train_decoder(work / "decoder", vae, ESTIMATE_STEPS, loss_of, lr=0.5)
    vae.save_pretrained(work / "decoder" / "folder")


def _command(work: Path, seed: int, *words: str) -> list[str]:
    """This program in a process of its own."""
    return [sys.executable, "-m", "data_tools.nano", *words, "--work", str(work), "--seed", str(seed)]


def pack_in_parallel(work: Path, seed: int, name: str, processes: int) -> None:
    """Pack with one single-threaded process a core."""
    shares = [["--only", name, "--part", f"{part}/{processes}"] for part in range(processes)]
    running = [subprocess.Popen(_command(work, seed, "pack", *share)) for share in shares]
    codes = [process.wait() for process in running]
    if any(codes):
        raise DataError(f"packing {name}'s clips failed", where=str(work), fix="see above; `make nano` goes on")


AFTER = """The cards are gone with the old models, and the student beside the new ones was made from the old.
Next, where no runs/long is left from them:

    make student
    make nano ARGS="--student runs/long"
    make nano ARGS="--card runs/long/report.json"
"""


def bundle(work: Path, out: Path) -> None:
    """Copy both models to where the package ships them, with the finished decoder and every weight in bf16.

    The encoders' configs keep saying fp32, so that stock libraries compute in it.
    """
    for name, leg in SHIPPED.items():
        model = work / "models" / leg
        shutil.copytree(work / "decoder" / "folder", model / "vae", dirs_exist_ok=True)
        ship(model, out / name)
    print(AFTER, flush=True)


def ship(model: Path, out: Path) -> None:
    """A copy of a diffusers folder with every weight in bf16."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out)
    for file in out.glob("*/*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
        share(file)


CARD_TEXT = """---
license: apache-2.0
library_name: diffusers
---
# wan-nano: {name}

{what} A tiny Wan in the classes and folder layout of the real weights, trained from nothing by `make nano`
(docs/nano.md) on procedural edit clips over photographs bundled with scikit-image and scikit-learn (docs/world.md).
{parameters} parameters in the transformer, bf16. It exists so that v4e runs anywhere; nobody would print its edits.

Figures, measured by `make student` on photographs and combinations that no training saw:

| row | solver steps | edits | PSNR, dB | middle frames, dB | sharpness | oracle success |
|---|---|---|---|---|---|---|
{rows}
"""
WHAT = {
    "teacher": "FLF2V: first and last frame in, a 9-frame clip out.",
    "i2v": "I2V: a source in, a 5-frame clip out. Pre-trained on evolution captions; it has seen no instruction.",
    "student": "Source and instruction in, the edit out in 4 steps. Distilled by `make student`, at ZeRO stage 1.",
}
ROWS = {"teacher": ("vae", "teacher"), "i2v": ("vae", "init"), "student": ("vae", "init", "student")}


def write_cards(report: Path, out: Path, names: Sequence[str] = ("teacher", "i2v")) -> None:
    """Model cards with the figures that a demo measured."""
    methods = json.loads(report.read_text())["methods"]
    for name in names:
        rows = [(m, steps, entry["overall"]) for m in ROWS[name] for steps, entry in methods[m].items()]
        weights = load_file(out / name / "transformer" / "diffusion_pytorch_model.safetensors")
        parameters = f"{sum(w.numel() for w in weights.values()):,}"
        table = "\n".join(_card_line(*row) for row in rows)
        text = CARD_TEXT.format(name=name, what=WHAT[name], parameters=parameters, rows=table)
        (out / name / "README.md").write_text(text)


def _card_line(method: str, steps: str, figures: dict[str, float | None]) -> str:
    shown = (figures.get(name) for name in ("psnr", "middle_psnr", "sharpness", "success"))
    told = ["" if figure is None else f"{figure:.2f}" for figure in shown]
    return f"| {method} | {steps if steps != '0' else ''} | {figures['n']} | {' | '.join(told)} |"


STAGES = ("vae", "text", "vision", "arch", "polish", "pack", *LEGS, "decoder", "bundle")
# Stages that ask nothing of another run in a process beside it: one thread's work would leave the other cores idle.
BESIDE = {"vae": ("text", "vision"), "pack": ("polish",), "i2v-5": ("decoder",)}


def run_stage(stage: str, work: Path, seed: int, ranks: int) -> None:
    """One stage; a finished one left a marker and is skipped.

    Raises:
        DataError: another process is at it, such as one whose starter was killed.
    """
    marker = work / f".{stage}.done"
    work.mkdir(parents=True, exist_ok=True)
    with lock(work / f".{stage}.lock"):
        if not marker.exists():
            with Stopwatch(work / f".{stage}.spent") as watch:
                _do(stage, work, seed, ranks)
                marker.write_text(f"{watch.seconds():.0f} s\n")
            print(f"{stage}: {marker.read_text().strip()}", flush=True)


def _do(stage: str, work: Path, seed: int, ranks: int) -> None:
    match stage:
        case "vae":
            train_vae(work, seed)
        case "text":
            train_text(work, seed)
        case "vision":
            train_vision(work, seed)
        case "arch":
            for name in FRAMES:
                assemble(work, name, work / "arch" / name)
        case "polish":
            polish_decoder(work, seed)
        case "pack":
            for name in CLIPS:
                pack_in_parallel(work, seed, name, ranks)
        case "decoder":
            train_on_estimates(work, seed)
        case "bundle":
            bundle(work, BUNDLE)
        case leg:
            train_leg(work, leg, seed, ranks)


def run_all(work: Path, seed: int, ranks: int) -> None:
    """Every stage, those of `BESIDE` in a process beside another."""
    for stage in STAGES:
        if beside := BESIDE.get(stage):
            run_beside(beside, stage, work, seed, ranks)
        elif not any(stage in others for others in BESIDE.values()):
            run_stage(stage, work, seed, ranks)


def run_beside(beside: Sequence[str], stage: str, work: Path, seed: int, ranks: int) -> None:
    """A stage, and others in a process of their own.

    Raises:
        DataError: that process failed.
    """
    process = subprocess.Popen(_command(work, seed, *beside))
    try:
        run_stage(stage, work, seed, ranks)
    finally:
        code = process.wait()
    if code:
        raise DataError(f"{' or '.join(beside)} failed", where=str(work), fix="see above; `make nano` goes on")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"only these of {', '.join(STAGES)}; all by default")
    parser.add_argument("--work", type=Path, default=Path("runs/nano"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--card", type=Path, help="only write the model cards, with the figures of this report.json")
    parser.add_argument("--student", type=Path, help="only ship the student of this demo's folder")
    parser.add_argument("--only", choices=tuple(CLIPS), help=argparse.SUPPRESS)
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # two threads a process are slower than one on small tensors
    if args.only:
        part, parts = map(int, args.part.split("/"))
        pack(args.work, args.seed, args.only, part, parts)
        return 0
    if args.card:
        write_cards(args.card, BUNDLE)
        return 0
    if args.student:
        ship(args.student / "student", BUNDLE / "student")
        write_cards(args.student / "report.json", BUNDLE, ["student"])
        return 0
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        parser.error(f"no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    for stage in args.stages:
        run_stage(stage, args.work, args.seed, args.ranks)
    if not args.stages:
        run_all(args.work, args.seed, args.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
