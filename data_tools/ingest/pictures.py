"""Pictures as they come: what is torn or dangerous is refused, the rest becomes upright 8-bit RGB of a wanted size."""

import io
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from v4e.photos import check_png, upright

Size = tuple[int, int]  # height, width
STEP = 16  # sizes divide into whole latent patches: 8 pixels a latent, 2 latents a patch
MAX_PIXELS = 80_000_000
TRUSTED = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")  # EPS would start a program
Image.init()
FORMATS = [name for name in TRUSTED if name in Image.OPEN]  # pillow may be built without some
SAME = 2  # levels by which two glances at one picture may differ, as pixels are rounded when they are scaled


class Rejected(Exception):  # noqa: N818  (not an error: a verdict)
    """Why a triplet is not taken: a short reason to count, a sentence, and the file it is about."""

    def __init__(self, reason: str, detail: str, file: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.file = reason, detail, file


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """Bytes as upright RGB, and their file suffix.

    EXIF orientation is applied, transparency laid on white, 16 bits become 8, CMYK goes through its own profile.

    Raises:
        Rejected: empty, too many pixels (judged by the header, before anything is decoded) or undecodable.
    """
    if not content:
        raise Rejected("undecodable", "the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            _refuse_bomb(file.width * file.height, max_pixels)
            if file.format == "PNG":
                check_png(content)
            file.load()
            return _to_rgb(upright(file)), (file.format or "").lower().replace("mpo", "jpeg")
    except Image.DecompressionBombError as error:
        raise Rejected("too many pixels", str(error)) from error
    except Rejected:
        raise
    except Exception as error:  # decoders of broken files raise whatever they meet
        raise Rejected("undecodable", f"{type(error).__name__}: {error}") from error


def fit_to(picture: Image.Image, size: Size) -> Image.Image:
    """Scale to cover ``size`` and crop the centre."""
    wanted = size[1], size[0]
    if picture.size == wanted:
        return picture
    return picture.resize(wanted, Image.Resampling.LANCZOS, box=_box(picture, size))


@dataclass(frozen=True)
class Glance:
    """What a few pixels of a picture tell.

    Args:
        cells: the mean colours of 32 x 36 cells.
        dhash: is each of 8 x 8 cells brighter than its left? 16 hex digits that outlast scaling and compression.
    """

    cells: np.ndarray
    dhash: str

    @staticmethod
    def at(picture: Image.Image, size: Size) -> "Glance":
        """At what ``size`` will show of it."""
        cells = picture.resize((144, 128), Image.Resampling.NEAREST, box=_box(picture, size)).reduce(4)
        grey = np.asarray(cells.convert("L").reduce(4))
        bits = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()
        return Glance(np.asarray(cells).astype(np.int16), bits)

    def like(self, other: "Glance") -> bool:
        """Whether the pictures may be the same; if not, they differ once scaled too."""
        return bool(np.abs(self.cells - other.cells).max() <= SAME)


def buckets(area: int, longest: float = 2.0) -> tuple[Size, ...]:
    """Sizes of at most ``area`` pixels and of every aspect ratio up to ``longest``, both ways, from tall to wide."""
    wide = [(h, area // h // STEP * STEP) for h in range(STEP, math.isqrt(area) + 1, STEP)]
    wide = [(h, w) for h, w in wide if h <= w <= longest * h]
    square = math.isqrt(area) // STEP * STEP
    both = {*wide, *((w, h) for h, w in wide), *([(square, square)] if square else [])}
    return tuple(sorted(both, key=lambda s: (s[1] / s[0], s)))


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of ``sizes`` with the most similar aspect ratio; of several, the largest."""
    return min(sizes, key=lambda s: (round(abs(math.log(s[1] * size[0] / (s[0] * size[1]))), 9), -s[0] * s[1], s))


def size_of(picture: Image.Image) -> Size:
    return picture.height, picture.width


def _refuse_bomb(pixels: int, most: int) -> None:
    if pixels > most:
        raise Rejected("too many pixels", f"{pixels} pixels by its header, of at most {most} (--max-pixels)")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if picture.mode.startswith("I"):  # pillow's own conversion clips at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode == "CMYK":
        picture = _from_cmyk(picture)
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_cmyk(picture: Image.Image) -> Image.Image:
    """By the file's own profile; without one, or with a broken one, by pillow's plain formula."""
    if profile := picture.info.get("icc_profile"):
        with suppress(ImageCms.PyCMSError, OSError):
            inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            made = ImageCms.profileToProfile(picture, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if made:
                return made
    return picture.convert("RGB")


def _box(picture: Image.Image, size: Size) -> tuple[float, float, float, float]:
    """The centred part of a picture that has the shape of ``size``."""
    ratio = size[1] / size[0]
    if picture.width / picture.height >= ratio:
        width, height = ratio * picture.height, float(picture.height)
    else:
        width, height = float(picture.width), picture.width / ratio
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return left, top, left + width, top + height
