"""Forty and more odd photographs and instructions, and a table of what becomes of each.

COMMAND: python -m tests.odd_photographs --model v4e/assets/wan-nano/i2v
"""

import argparse
import io
import json
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image, ImageCms, features

from v4e import photos
from v4e.jobs import Settings
from v4e.studio import QUARANTINE, Memory, Studio, run_batch

SNOW = "make it snow"


def picture(mode: str = "RGB", size: tuple[int, int] = (130, 97)) -> Image.Image:
    """A gradient with something in it."""
    return Image.linear_gradient("L").rotate(30).resize(size).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, rows: bytes, depth: int = 8) -> bytes:
    """An RGB PNG by hand, for what pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture(), "JPEG", exif=exif)


def palette_with_alpha() -> Image.Image:
    palette = picture("L").quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    return palette


def half_clear(mode: str = "RGBA") -> Image.Image:
    image = picture(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def animated(kind: str) -> bytes:
    frames = [picture(), picture().rotate(90), picture().rotate(180)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def odd_files() -> dict[str, bytes]:
    """File names and contents."""
    png, jpeg = saved(picture(), "PNG"), saved(picture(), "JPEG")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {
        "1x1.png": saved(picture(size=(1, 1)), "PNG"),
        "7x4000.png": saved(picture(size=(7, 4000)), "PNG"),
        "4000x7.jpg": saved(picture(size=(4000, 7)), "JPEG"),
        "8000x6000.jpg": saved(Image.new("RGB", (8000, 6000), "teal"), "JPEG"),
        "panorama.jpg": saved(picture(size=(400, 130)), "JPEG"),
        "cmyk.jpg": saved(picture("CMYK"), "JPEG"),
        "16-bit grey.png": saved(Image.linear_gradient("L").convert("I;16"), "PNG"),
        "16-bit colour.png": png_of(40, 30, (b"\0" + bytes(range(240))) * 30, depth=16),
        "1-bit.png": saved(picture("1"), "PNG"),
        "grey.jpg": saved(picture("L"), "JPEG"),
        "grey with alpha.png": saved(half_clear("LA"), "PNG"),
        "palette with alpha.png": saved(palette_with_alpha(), "PNG"),
        "alpha.webp": saved(half_clear(), "WEBP"),
        "all clear.png": saved(Image.new("RGBA", (64, 64), (9, 9, 9, 0)), "PNG"),
        "animated.gif": animated("GIF"),
        "animated.webp": animated("WEBP"),
        "animated.png": animated("PNG"),
        "lying on its side.jpg": turned(6),
        "mirrored.jpg": turned(5),
        "torn EXIF.jpg": saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
        "profile.jpg": saved(picture(), "JPEG", icc_profile=srgb),
        "torn profile.jpg": saved(picture(), "JPEG", icc_profile=b"no profile at all"),
        "inks with a profile of lights.jpg": saved(picture("CMYK"), "JPEG", icc_profile=srgb),
        "bitmap.bmp": saved(picture(), "BMP"),
        "scan.tif": saved(picture(), "TIFF"),
        "floating point.tif": saved(picture("F"), "TIFF"),
        "wrong ending.png": jpeg,
        "no ending": png,
        "foto 🐈 'quoted'.jpg": jpeg,
        "truncated.jpg": jpeg[:-500],
        "truncated.png": png[:-30],
        "a bit flipped.png": png[:60] + bytes([png[60] ^ 1]) + png[61:],
        "bomb.png": png_of(100_000, 100_000, b""),
        "text.png": b"this is not an image",
        "page.jpg": b"<!doctype html><title>404</title>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "empty.jpg": b"",
    }
    if features.check("avif"):
        files["photo.avif"] = saved(picture(), "AVIF")
    if ".heic" in photos.KINDS:
        files["telephone.heic"] = saved(picture(), "HEIF")
    return files


def odd_words() -> dict[str, str]:
    """Instructions by what is odd about them."""
    return {
        "empty": "",
        "blank": " \t\n",
        "invisible": "\u200b\u200b",
        "emoji only": "🎉🐈",
        "10,000 characters": "make it snow " * 770,
        "600 words": "a " * 600,
        "half an emoji": "make it snow \ud83d",
        "control characters": "make it\0 snow\x07",
        "in Chinese": "让天下雪 make snow",
    }


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server on this computer that knows the files of a folder."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def write_jobs(folder: Path, url: str) -> list[str]:
    """Write pictures and ``jobs.jsonl``; what each line is about."""
    for name, content in odd_files().items():
        (folder / name).write_bytes(content)
    (folder / "a folder").mkdir()
    pictures = [*odd_files(), "a folder", "missing.jpg", "/dev/zero", f"{url}/grey.jpg", f"{url}/missing.jpg"]
    pictures += ["https://me:secret@example.org/a.jpg", "pipe:cat a.jpg"]
    told = [(shown_name(name, url), {"photo": name, "instruction": SNOW}) for name in pictures]
    told += [(f"instruction: {what}", {"photo": "grey.jpg", "instruction": text}) for what, text in odd_words().items()]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for _, job in told))
    return [what for what, _ in told]


def shown_name(name: str, url: str) -> str:
    return name.replace(url, "http://host").replace("me:secret@", "me:...@")


def table(folder: Path, studio: Studio, url: str) -> Iterator[tuple[str, int, str]]:
    """What each is, its exit code, and what became of it."""
    names = write_jobs(folder, url)
    run_batch(studio, folder / "jobs.jsonl", folder / "edited", Settings(steps=1))
    quarantine = (folder / "edited" / QUARANTINE).read_text()
    refused = {entry["line"]: entry for entry in map(json.loads, quarantine.splitlines())}
    for line, name in enumerate(names, 1):
        if entry := refused.get(line):
            said = shown_name(entry["error"], url).replace(f"{folder}/", "")
            yield name, entry["exit_code"], said
        else:
            (made,) = (folder / "edited").glob(f"{line:06d}-*")
            with Image.open(made) as image:
                yield name, 0, f"edited: {image.format} {image.mode}, {image.width} x {image.height}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What becomes of odd photographs, as Markdown.")
    parser.add_argument("--model", required=True)
    studio = Studio.open(parser.parse_args().model, "cpu", Memory())
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url:
        rows = [*table(Path(folder), studio, url)]
    print("| given | exit code | what happens |\n|---|---|---|")
    print("\n".join(f"| {name} | {code} | {said} |" for name, code, said in rows))
    edited = sum(not code for _, code, _ in rows)
    print(f"\n{len(rows)} in all: {edited} edited, {len(rows) - edited} refused.")


if __name__ == "__main__":
    main()
