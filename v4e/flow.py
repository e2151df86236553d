"""Rectified-flow algebra, as pure functions of tensors.

One convention everywhere: x(sigma) = (1 - sigma) * x0 + sigma * noise, and velocity v = dx/dsigma = noise - x0.
Sigma runs from 1 (noise) to 0 (data). Shapes: sigma is [B] or scalar and broadcasts over [B, ...].
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from v4e.nouns import Draw, Levels

TRAIN_STEPS = 1000  # Wan numbers its timesteps 0..999
FIRST_SIGMA = 1 - 1e-6  # diffusers' UniPC starts here: log(1 - sigma) must be finite


def shift(sigma: Tensor, by: float) -> Tensor:
    """Warp noise levels towards noise: s*sigma / (1 + (s-1)*sigma) (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
    return by * sigma / (1 + (by - 1) * sigma)


def draw_sigma(draw: Draw, levels: Levels, by: float) -> Tensor:
    """Noise levels of a batch [B]: drawn as ``levels`` says, then shifted."""
    if levels.kind == "uniform":
        return shift(draw.uniform("sigma"), by)
    return shift((levels.mean + levels.std * draw.normal("sigma")).sigmoid(), by)


def time_grid(steps: int, by: float) -> Tensor:
    """The solver's noise levels [steps + 1], fp64, from almost 1 to 0, as diffusers' UniPC with flow sigmas has them.

    Grids of 1, 2, 4 and 8 steps nest: each is every second level of the next.
    """
    sigma = shift(torch.linspace(1, 1 / TRAIN_STEPS, steps + 1, dtype=torch.float64)[:-1], by)
    return torch.cat([sigma.clamp(max=FIRST_SIGMA), sigma.new_zeros(1)])


def union_grid(step_counts: Iterable[int], by: float) -> Tensor:
    """All noise levels of several grids [K + 1], fp64, falling, ending in 0; equal levels are merged."""
    levels = torch.cat([time_grid(n, by) for n in step_counts])
    return torch.unique((levels * 1e9).round() / 1e9).flip(0).clamp(max=FIRST_SIGMA)


def refine(levels: Tensor, steps: int, by: float) -> Tensor:
    """A grid [steps + 1] through all of ``levels`` [K + 1]; each further step halves, thirds, ... the longest one.

    Args:
        by: steps are measured in the time of which the noise level is the shift by this.
    """
    time = shift(levels, 1 / by)
    long = time[:-1] - time[1:]
    parts = torch.ones_like(long)
    for _ in range(steps - len(long)):
        parts[(long / parts).argmax()] += 1
    between = [
        shift(torch.linspace(float(a), float(b), int(n) + 1, dtype=torch.float64)[1:-1], by)
        for a, b, n in zip(time[:-1], time[1:], parts, strict=True)
    ]
    pieces = [piece for level, inner in zip(levels[:-1], between, strict=True) for piece in (level[None], inner)]
    return torch.cat([*pieces, levels[-1:]])


def timestep(sigma: Tensor) -> Tensor:
    """Wan's integer timestep of a noise level: 1000 * sigma, truncated (diffusers' UniPC casts to int64).

    A tenth of a thousandth forgives fp32: 0.9f * 1000 is just below 900.
    """
    return (sigma.double() * TRAIN_STEPS + 1e-4).long()


def mix(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x(sigma) on the straight path from data to noise."""
    s = like(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """dx/dsigma on the straight path."""
    return noise - x0


def to_x0(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Clean end the velocity points at: x - sigma * v."""
    return x - like(sigma, x) * v


def to_noise(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Noisy end the velocity comes from: x + (1 - sigma) * v."""
    return x + (1 - like(sigma, x)) * v


def from_x0(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that points from x(sigma) at x0; sigma > 0."""
    return (x - x0) / like(sigma, x)


def guide(v_cond: Tensor, v_null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: null + scale * (cond - null) (arXiv 2207.12598, eq. 6 in Imagen's form)."""
    return v_null + scale * (v_cond - v_null)


def anchor(x: Tensor, v: Tensor, sigma: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Bend a path so that it ends ``offset`` further on: x' = x + (1 - sigma) * d, v' = v - d.

    The noisy end stays, the clean end moves by d, and v' is still dx'/dsigma.
    """
    return x + (1 - like(sigma, x)) * offset, v - offset


def euler(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, grid: Tensor) -> Tensor:
    """Integrate dx/dsigma = model(x, sigma) down ``grid`` [N + 1]; exact where the path is straight."""
    levels = grid.tolist()
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
        v = model(x, torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device))
        x = x + (following - sigma) * v
    return x


def like(sigma: Tensor, x: Tensor) -> Tensor:
    """View sigma [B] or [] so that it broadcasts over x [B, ...]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma.view(-1, *([1] * (x.ndim - 1))) if sigma.ndim else sigma
