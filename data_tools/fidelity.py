"""Whether v4e runs a Wan as diffusers does: ``python -m data_tools.fidelity MODEL``, a diffusers folder or Hub id.

Three looks, each at the weights that are at hand: every tensor comes back the same through the authors' own names; the
block loop makes of a random state what diffusers' forward makes; a whole run of the pipeline ends at the latents of the
stock pipeline with the same seed. What is not equal to the bit is told with its largest difference, and code 1 ends it
where that is above `--tolerance`, a share of the largest value. One thread of a CPU makes all equal; several may add in
another order, and so may a GPU's kernels. A tensor that differs is never tolerated.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from torch import Tensor

from v4e import flow
from v4e.data.disk import hash_of
from v4e.data.members import as_image
from v4e.errors import V4EError
from v4e.models.codec import WanCodec
from v4e.models.folder import locate
from v4e.models.original import save_original
from v4e.models.wan import WanBackbone, declare, load_backbone
from v4e.nouns import TEXT_TOKENS, Clip, Conditions, Grid, known_mask_4thw, pad_words
from v4e.pipelines import Guidance, TeacherPipeline, denoise, noise_of

SEED, SIGMA, SCALE = 7, 0.7, 3.0
PROMPT = "the sky turns red"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRANSFORMER = ["transformer/*"]


@dataclass(frozen=True)
class Trial:
    """A model and how it is asked.

    Args:
        original: the same model as its authors published it; empty to write one to a temporary folder.
        steps: of the pipeline's run.
        tolerance: the largest difference that is taken for rounding, over the largest value.
    """

    model: str
    original: str
    grid: Grid
    steps: int
    dtype: torch.dtype
    device: torch.device
    tolerance: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What one look found."""

    name: str
    fits: bool
    told: str

    def __str__(self) -> str:
        return f"{'ok' if self.fits else 'DIFFERS':<8}{self.name}: {self.told}"


# ------------------------------------------------------------------------------------------------------- names


def original_keys(trial: Trial) -> Finding:
    """diffusers -> the authors' names -> v4e, bitwise, for every tensor; one of them in memory at a time."""
    wanted = _digests(declare(trial.model).weights())
    with tempfile.TemporaryDirectory() as made:
        found = _digests(declare(trial.original or _as_original(trial.model, Path(made))).weights())
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    told = f"{len(wrong)} of {len(wanted)} tensors, such as {wrong[0]}" if wrong else f"{len(wanted)} tensors"
    return Finding("original keys and back", not wrong, told)


def _as_original(model: str, folder: Path) -> Path:
    stock = WanTransformer3DModel.from_pretrained(locate(model, TRANSFORMER) / "transformer")
    save_original(folder, dict(stock.config), stock.state_dict())
    return folder


def _digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    return {name: f"{list(x.shape)} {_digest(x)}" for name, x in weights if not name.startswith("rope.")}


def _digest(x: Tensor) -> str:
    """Of its numbers in fp32, which holds those of every stored type."""
    return hash_of(x.detach().float().contiguous().view(torch.uint8).numpy().tobytes())


# ------------------------------------------------------------------------------------------------- block loop


@torch.no_grad()
def block_loop(trial: Trial) -> Finding:
    """One forward of a random state under random conditions; the models are loaded one after the other."""
    ours = load_backbone(trial.model, dtype=trial.dtype, device=trial.device, attention="native")
    x, told = _state(trial, ours), _conditions(trial, ours)
    v = ours(x, torch.full((1,), SIGMA, device=trial.device), told)[0].cpu()
    del ours
    _tidy()
    home = locate(trial.model, TRANSFORMER) / "transformer"
    stock: Any = WanTransformer3DModel.from_pretrained(home, dtype=trial.dtype)
    stock.to(trial.device)
    return _compared("block loop against diffusers' forward", v, _stock_forward(stock, x, told).cpu(), trial.tolerance)


def _state(trial: Trial, model: WanBackbone) -> Tensor:
    shape = (model.config["out_channels"], trial.grid.t, trial.grid.h, trial.grid.w)
    return noise_of([SEED], *shape).to(trial.device)


def _conditions(trial: Trial, model: WanBackbone) -> Conditions:
    """Five words, the tokens of as many pictures as the model sees, and known frames."""
    config, normal = model.config, torch.Generator().manual_seed(SEED)
    both = bool(config["pos_embed_seq_len"])
    tokens = config["pos_embed_seq_len"] // 2 if both else 257
    text = torch.randn(1, 5, config["text_dim"], generator=normal)
    vision = torch.randn(1 + both, tokens, config["image_dim"], generator=normal)
    known = torch.randn(_state(trial, model).shape, generator=normal)
    told = Conditions(text, torch.tensor([5]), vision, known, known_mask_4thw(trial.grid, both)[None])
    return told.to(trial.device)


def _stock_forward(stock: WanTransformer3DModel, x_BCthw: Tensor, told: Conditions) -> Tensor:
    dtype = stock.patch_embedding.weight.dtype
    return stock(
        hidden_states=torch.cat([x_BCthw, told.known_mask_B4thw, told.known_BCthw], dim=1).to(dtype),
        timestep=flow.timestep(torch.full((1,), SIGMA, device=x_BCthw.device)),
        encoder_hidden_states=pad_words(told.text_BLE, TEXT_TOKENS).to(dtype),
        encoder_hidden_states_image=told.vision_BNV.to(dtype),
        return_dict=False,
    )[0]


# --------------------------------------------------------------------------------------------------- pipeline


def pipeline(trial: Trial) -> Finding:
    """The same pictures, words and seed through both pipelines, guided, by the folder's own scheduler."""
    ours = TeacherPipeline.from_pretrained(trial.model, dtype=trial.dtype, attention="native").to(trial.device)
    sees_the_end = bool(ours.backbone.config["pos_embed_seq_len"])
    first, last = (_picture(trial.grid, seed) for seed in (1, 2))
    told = ours.told([first], [PROMPT], trial.grid, [last] if sees_the_end else None)
    ours.scheduler.set_timesteps(trial.steps)
    noise, null = _state(trial, ours.backbone), ours.null_of(told)
    end = denoise(ours.backbone, ours.scheduler, noise, told, null, Guidance(SCALE)).cpu()
    del ours
    _tidy()
    stock = _stock_end(trial, first, last if sees_the_end else None)
    return _compared("pipeline against diffusers'", end, stock, trial.tolerance)


def _picture(grid: Grid, seed: int) -> Clip:
    """Coarse colours."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (grid.H, grid.W), mode="bicubic")
    return Clip((fine.clamp(0, 1) * 255).to(torch.uint8))


def _stock_end(trial: Trial, first: Clip, last: Clip | None) -> Tensor:
    types = {"vae": torch.float32, "image_encoder": torch.float32, "default": trial.dtype}
    stock: Any = WanImageToVideoPipeline.from_pretrained(trial.model, dtype=types).to(trial.device)
    return stock(
        image=as_image(first),
        last_image=None if last is None else as_image(last),
        prompt=PROMPT,
        height=trial.grid.H,
        width=trial.grid.W,
        num_frames=trial.grid.T,
        num_inference_steps=trial.steps,
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames.cpu()


# ------------------------------------------------------------------------------------------------------ small


def _tidy() -> None:
    """Give the memory of a model that was just forgotten back, for there may be room for one only."""
    gc.collect()
    torch.cuda.empty_cache()


def _compared(name: str, ours: Tensor, stock: Tensor, tolerance: float) -> Finding:
    if torch.equal(ours.float(), stock.float()):
        return Finding(name, True, "equal to the bit")
    worst, scale = (ours.float() - stock.float()).abs().max().item(), stock.float().abs().max().item()
    return Finding(name, worst <= tolerance * scale, f"off by up to {worst:.3g}, of values up to {scale:.3g}")


LOOKS: tuple[Callable[[Trial], Finding], ...] = (original_keys, block_loop, pipeline)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.fidelity", description=__doc__)
    parser.add_argument("model", help="diffusers folder or Hub id, of an I2V or FLF2V Wan")
    parser.add_argument("--original", default="", help="the same model in its authors' format; else one is written")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--steps", type=int, default=2, help="of the pipeline")
    parser.add_argument("--dtype", choices=TYPES, default="fp32")
    parser.add_argument("--tolerance", type=float, default=0.0, help="share of the largest value that is rounding (0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    try:
        grid = WanCodec(args.model).grid(args.frames, args.height, args.width)
        device = torch.device(args.device)
        torch.set_num_threads(1)
        trial = Trial(args.model, args.original, grid, args.steps, TYPES[args.dtype], device, args.tolerance)
        fits = [_said(look(trial)) for look in LOOKS]
    except V4EError as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if all(fits) else 1


def _said(finding: Finding) -> bool:
    print(finding, flush=True)
    return finding.fits


if __name__ == "__main__":
    sys.exit(main())
