"""A number in a report means what it says."""

import pytest
import torch
from skimage.metrics import structural_similarity

from v4e.errors import ShapeError
from v4e.eval import metrics


def photo(seed: int = 0, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def box(size: int = 24) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[4:12, 4:12] = True
    return mask


def test_psnr_by_hand():
    a = torch.zeros(3, 2, 2, dtype=torch.uint8)
    b = torch.full_like(a, 51)  # a fifth of full scale: 20 log10(5) dB
    assert metrics.psnr(a, b) == pytest.approx(13.9794, abs=1e-4)


def test_psnr_counts_only_the_mask():
    a, mask = photo(), box()
    b = torch.where(mask, a, 255 - a)
    assert metrics.psnr(a, b, mask) == metrics.PSNR_CEILING
    assert metrics.psnr(a, b, ~mask) < 10
    assert metrics.psnr(a, b, torch.zeros_like(mask)) is None


def test_uint8_does_not_wrap_around():
    a, b = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 255, dtype=torch.uint8)
    assert metrics.psnr(a, b) == pytest.approx(0.0)
    assert metrics.psnr(b, a) == pytest.approx(0.0)


@pytest.mark.parametrize("noise", [0, 8, 60])
def test_ssim_is_scikit_images(noise):
    a = photo(1, 40)
    b = (a.int() + torch.randint(-noise, noise + 1, a.shape)).clamp(0, 255).to(torch.uint8)
    settings = {"sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": 0}
    theirs = structural_similarity(a.numpy(), b.numpy(), gaussian_weights=True, **settings)
    assert metrics.ssim(a, b) == pytest.approx(theirs, abs=1e-9)


def test_ssim_needs_a_whole_window():
    with pytest.raises(ShapeError, match="11 pixels"):
        metrics.ssim(photo(size=10), photo(size=10))


def test_detail_energy_by_hand():
    """One bright grey pixel v in 5 x 5: the 3 x 3 Laplacian holds 4v once and -v four times."""
    x = torch.zeros(3, 5, 5, dtype=torch.uint8)
    x[:, 2, 2] = 10
    assert metrics.detail_energy(x) == pytest.approx((40**2 + 4 * 10**2) / 9)


def test_sharpness_falls_with_blur_and_rises_with_noise():
    target = photo(2)
    blurred = torch.nn.functional.avg_pool2d(target.float()[None], 3, 1, 1)[0].round().to(torch.uint8)
    assert metrics.sharpness(target, target) == 1
    assert metrics.sharpness(blurred, target) < 0.2
    assert metrics.sharpness(target, blurred) > 5


def test_flat_images_are_equally_sharp():
    flat = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    assert metrics.sharpness(flat, flat) == 1


def test_rounding_energy_is_what_rounding_leaves():
    smooth = torch.linspace(20, 200, 200, dtype=torch.float64).outer(torch.linspace(0.5, 1, 200, dtype=torch.float64))
    rounded = smooth.round().to(torch.uint8).expand(3, -1, -1)
    assert metrics.detail_energy(rounded) == pytest.approx(metrics.ROUNDING_ENERGY, rel=0.25)


def test_score_of_a_style_keeps_nothing():
    everything = torch.ones(24, 24, dtype=torch.bool)
    scores = metrics.score(photo(1), photo(2), everything)
    assert scores.keep_psnr is None
    assert scores.edit_psnr == pytest.approx(scores.psnr)


def test_score_refuses_what_it_cannot_compare():
    with pytest.raises(ShapeError, match="differ in size"):
        metrics.score(photo(), photo(size=16), box())
    with pytest.raises(ShapeError, match="at least one pixel"):
        metrics.score(photo(), photo(), torch.zeros(24, 24, dtype=torch.bool))
    with pytest.raises(ShapeError, match="uint8"):
        metrics.score(photo().float(), photo(), box())
