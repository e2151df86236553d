"""Photographs as people have them: what is torn or dangerous is refused, the rest becomes upright 8-bit RGB.

An edit goes back into a file with the photograph's colour profile and transparency, and with the words it was made by.
"""

import io
import json
import re
import struct
import tempfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from v4e import __version__
from v4e.data.places import NotFoundError, is_remote, place, read_bytes, shown
from v4e.errors import ConfigError, DataError

with suppress(ImportError):  # HEIC is what telephones write; pillow reads it by this plug-in alone
    import pillow_heif

    pillow_heif.register_heif_opener()

TRUSTED = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF", "JPEG2000", "PPM")  # EPS would start a program
Image.init()
FORMATS = [name for name in TRUSTED if name in Image.OPEN]  # pillow may be built without some
MAX_PIXELS = 150_000_000
MAX_BYTES = 1 << 30
USER_COMMENT, ASCII = 0x9286, b"ASCII\0\0\0"  # EXIF 2.3, table 9: the text's encoding stands before it
FAST_FPS, SLOW_FPS, SECONDS = 16, 4, 2  # an evolution is shown in about two seconds, a short one slower


class TooManyPixelsError(DataError):
    """More than is decoded, by the file's header."""


@dataclass(frozen=True)
class Photo:
    """A decoded photograph.

    Args:
        rgb: upright, 8 bits; what is transparent is laid on white.
        alpha: 8 bits; None where everything is opaque.
        profile: the ICC profile of ``rgb``; None for sRGB.
        suffix: of its format's usual file name, such as ``.png``.
        frames: how many the file has; this is the first one.
    """

    rgb: Image.Image
    alpha: Image.Image | None = None
    profile: bytes | None = None
    suffix: str = ".png"
    frames: int = 1


@dataclass(frozen=True)
class Kind:
    """A format that is written: pillow's name of it, whether it has transparency, and its encoder's options."""

    name: str
    alpha: bool
    options: Mapping[str, object] = field(default_factory=dict)


_JPEG, _HEIC = Kind("JPEG", False, {"quality": 95, "subsampling": 0}), Kind("HEIF", True, {"quality": 90})
_KINDS = {".png": Kind("PNG", True), ".jpg": _JPEG, ".jpeg": _JPEG, ".webp": Kind("WEBP", True, {"quality": 95})}
_KINDS |= {".avif": Kind("AVIF", True, {"quality": 90}), ".heic": _HEIC, ".heif": _HEIC}
KINDS = {suffix: kind for suffix, kind in _KINDS.items() if kind.name in Image.SAVE}  # formats that carry a recipe


# ------------------------------------------------------------------------------------------------- reading


def fetch(where: str, noun: str = "photograph") -> bytes:
    """A file's bytes, from a path or a URL.

    Args:
        noun: what it should be.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    at = place(where)
    if not is_remote(at):
        _require_file(at, noun)
    try:
        return read_bytes(at)
    except NotFoundError as error:
        raise DataError(f"no such {noun}", where=shown(where)) from error


def decode(content: bytes, where: str = "", max_pixels: int = MAX_PIXELS) -> Photo:
    """Bytes as a photograph.

    EXIF orientation is applied, 16 bits become 8, CMYK and grey go through their own profile, of an animation the first
    frame is taken.

    Args:
        where: names it in errors.

    Raises:
        TooManyPixelsError: judged by the header, before anything is decoded.
        DataError: empty or undecodable.
    """
    if not content:
        raise DataError("the file is empty", where=where)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of bombs below our limit, of odd EXIF and palettes
            Image.open(io.BytesIO(content), formats=FORMATS) as file,
        ):
            return _photo(file, content, where, max_pixels)
    except Image.DecompressionBombError as error:
        what = f"its header promises more than the {max_pixels} pixels that are decoded"
        raise TooManyPixelsError(what, where=where, fix="shrink it first") from error
    except UnidentifiedImageError as error:
        fix = f"give one of {', '.join(FORMATS)}"
        raise DataError("not a readable picture: no format that is known here", where=where, fix=fix) from error
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they meet
        raise DataError(f"not a readable picture: {error or type(error).__name__}", where=where) from error


def recipe_in(content: bytes, where: str = "") -> dict[str, object]:
    """How an edit was made, as its file says.

    Raises:
        DataError: not a picture, or one without a recipe.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            said = file.getexif().get_ifd(ExifTags.IFD.Exif).get(USER_COMMENT, b"")
        recipe = json.loads(bytes(said).removeprefix(ASCII))
    except Exception as error:  # as above
        raise DataError("holds no recipe of an edit", where=where, fix="give a file that `v4e edit` wrote") from error
    return recipe


def _require_file(path: Path, noun: str) -> None:
    if path.is_dir():
        fix = "give one file; --batch jobs.jsonl edits many"
        raise DataError(f"a folder and not a {noun}", where=str(path), fix=fix)
    if path.exists() and not path.is_file():
        raise DataError(f"a device and not a {noun}", where=str(path))
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path.stat().st_size} bytes are more than a {noun} has", where=str(path))


def _photo(file: Image.Image, content: bytes, where: str, max_pixels: int) -> Photo:
    pixels = file.width * file.height
    if pixels > max_pixels:
        what = f"{file.width} x {file.height} pixels, more than the {max_pixels} that are decoded"
        raise TooManyPixelsError(what, where=where, fix="shrink it first")
    if file.format == "PNG":
        check_png(content)
    file.load()
    frames, suffix = int(getattr(file, "n_frames", 1)), _suffix(file)
    picture = _eight_bits(upright(file))
    alpha = _alpha(picture)
    rgb, profile = _to_rgb(picture)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return Photo(rgb, alpha, profile, suffix, frames)


def check_png(content: bytes) -> None:
    """Every chunk against its checksum, which the decoder does not look at; ValueError if torn."""
    at, kind = 8, b""
    while kind != b"IEND":
        size, kind = struct.unpack(">I4s", content[at : at + 8].ljust(8, b"\0"))
        if len(content) < at + 12 + size:
            raise ValueError("PNG file is truncated")
        if zlib.crc32(memoryview(content)[at + 4 : at + 8 + size]) != int.from_bytes(content[at + 8 + size :][:4]):
            raise ValueError(f"PNG chunk {kind.decode('latin-1')} at byte {at} does not agree with its checksum")
        at += 12 + size


def _suffix(file: Image.Image) -> str:
    name = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "HEIF": "heic", "JPEG2000": "jp2"}
    return "." + name.get(file.format or "", (file.format or "png").lower())


def upright(file: Image.Image) -> Image.Image:
    """Turned as EXIF says, or as it is where the EXIF block is torn, which many otherwise good files have."""
    try:
        return ImageOps.exif_transpose(file)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return file.copy()


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if not picture.mode.startswith("I"):
        return picture
    levels = np.asarray(picture).astype(np.uint32) >> 8  # pillow's own conversion clips at 255
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _alpha(picture: Image.Image) -> Image.Image | None:
    if not picture.has_transparency_data:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _to_rgb(picture: Image.Image) -> tuple[Image.Image, bytes | None]:
    """RGB and its profile; inks and greys go through their own profile to sRGB, and without one by pillow's formula."""
    content = picture.info.get("icc_profile")
    profile, space = _profile(content)
    if space == "RGB " and picture.mode not in ("CMYK", "LAB"):
        return _plain_rgb(picture), content
    return _through(profile, space, picture) or _plain_rgb(picture), None


def _plain_rgb(picture: Image.Image) -> Image.Image:
    return (picture.convert("RGBA") if picture.mode in ("P", "PA") else picture).convert("RGB")


def _through(profile: ImageCms.ImageCmsProfile | None, space: str, picture: Image.Image) -> Image.Image | None:
    """sRGB, by a profile of the picture's own kind; None where it is of another kind or does not work."""
    bare = picture.convert("L") if picture.mode == "LA" else picture
    if profile is None or (bare.mode, space) not in (("CMYK", "CMYK"), ("L", "GRAY")):
        return None
    with suppress(ImageCms.PyCMSError):
        return ImageCms.profileToProfile(bare, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return None


def _profile(content: bytes | None) -> tuple[ImageCms.ImageCmsProfile | None, str]:
    """A profile and its colour space; neither where there is none or it is broken."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content or b""))
        handle: Any = profile.profile  # which pillow annotates as the file that it came from
        return profile, handle.xcolor_space
    except (ImageCms.PyCMSError, OSError, TypeError):
        return None, ""


# ------------------------------------------------------------------------------------------------- writing


def kind_of(path: Path) -> Kind:
    """The format that a file's ending names.

    Raises:
        ConfigError: none that is written here.
    """
    if kind := KINDS.get(path.suffix.lower()):
        return kind
    raise ConfigError(
        "no picture format that is written has this ending", where=str(path), fix=f"use {', '.join(KINDS)}"
    )


def written(suffix: str) -> str:
    """A file's ending where its format is one that is written, and PNG's for the others."""
    return suffix if suffix in KINDS else ".png"


def encode(rgb: Image.Image, path: Path, recipe: bytes, source: Photo | None = None) -> bytes:
    """An edit as the file that ``path`` names, with the recipe in its EXIF.

    Args:
        source: gives its profile, and its transparency where the format has any.

    Raises:
        ConfigError: the ending is of no format that is written.
        DataError: the format cannot hold this picture.
    """
    kind, profile = kind_of(path), source and source.profile
    if source and source.alpha and kind.alpha:
        rgb = rgb.copy()
        rgb.putalpha(source.alpha)
    options = {**kind.options, "exif": _exif(recipe), **({"icc_profile": profile} if profile else {})}
    return _saved([rgb], kind.name, path, options)


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames side by side, a line of white between them."""
    width, height = frames[0].size
    wide = Image.new("RGB", ((width + 1) * len(frames) - 1, height), "white")
    for i, frame in enumerate(frames):
        wide.paste(frame, (i * (width + 1), 0))
    return wide


def animate(frames: Sequence[Image.Image], path: Path, recipe: bytes) -> bytes:
    """Frames as a looping WebP or GIF that rests on the last one, or as an MP4 (see :func:`require_mp4`)."""
    fps = min(FAST_FPS, max(SLOW_FPS, len(frames) // SECONDS))
    if path.suffix == ".mp4":
        return _mp4(frames, fps)
    durations = [1000 // fps] * (len(frames) - 1) + [1000]
    words = {"comment": recipe} if path.suffix == ".gif" else {"exif": _exif(recipe), "quality": 90}
    return _saved(frames, path.suffix[1:].upper(), path, {"duration": durations, "loop": 0, **words})


def _exif(recipe: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = f"v4e {__version__}"
    exif.get_ifd(ExifTags.IFD.Exif)[USER_COMMENT] = ASCII + recipe
    return exif


def _saved(frames: Sequence[Image.Image], name: str, path: Path, options: Mapping[str, object]) -> bytes:
    several = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
    content = io.BytesIO()
    try:
        frames[0].save(content, name, **several, **options)
    except Exception as error:  # encoders raise what they like
        what = f"{frames[0].width} x {frames[0].height} pixels cannot be written as {name}: {error}"
        raise DataError(what, where=str(path), fix="write a .png") from error
    return content.getvalue()


def require_mp4() -> None:
    """Raises ConfigError where the encoder of MP4 is not installed."""
    if find_spec("imageio_ffmpeg") is None:
        raise ConfigError("MP4 needs imageio-ffmpeg", fix="pip install imageio-ffmpeg, or ask for webp")


def _mp4(frames: Sequence[Image.Image], fps: int) -> bytes:
    from imageio_ffmpeg import write_frames

    even = frames[0].width // 2 * 2, frames[0].height // 2 * 2  # colours have half the resolution
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        writer = write_frames(str(path), even, fps=fps, macro_block_size=2, codec="libx264")
        writer.send(None)
        for frame in frames:
            writer.send(frame.resize(even).tobytes())
        writer.close()
        return path.read_bytes()


def tidy_name(where: str, longest: int = 60) -> str:
    """A photograph's name, without folder and ending, as any disk takes it."""
    stem = Path(re.sub(r"[?#].*", "", where)).stem
    return re.sub(r"[^\w.-]+", "-", stem).strip(".-")[:longest] or "photo"
