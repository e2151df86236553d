"""A wheel is all that v4e needs: installed where the repository has never been, its commands edit and make shards.

Third parties are those of this environment, linked one by one into an empty one: v4e comes from the wheel alone.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
INGREDIENTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "v4e", "data_tools")
NOT_FOREIGN = re.compile(r"v4e|data_tools|__editable__|__pycache__|.*\.(pth|egg-link)$")
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")

pytestmark = pytest.mark.slow


def run(*command: object, where: Path, code: int = 0) -> str:
    """Output of a command in a folder, in an environment of nothing but a home."""
    environment = {"HOME": str(where), "PATH": os.defpath, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [str(c) for c in command], cwd=where, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == code, done.stdout + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, as a build leaves folders behind."""
    home = tmp_path_factory.mktemp("wheel")
    (home / "tree").mkdir()
    for name in INGREDIENTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, home / "tree" / name)
    run(sys.executable, *PIP, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", home, where=home / "tree")
    (built,) = home.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The ``bin`` of an environment with the wheel."""
    home = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", where=home)
    (packages,) = (home / "venv/lib").glob("python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not NOT_FOREIGN.match(entry.name):
            (packages / entry.name).symlink_to(entry)
    run(home / "venv/bin/python", *PIP, "install", "--no-deps", "--no-index", wheel, where=home)
    return home / "venv/bin"


def test_the_wheel_holds_every_file_and_the_licence(wheel):
    """Not only modules: models, style sheets, whatever lies in a package."""
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [p for top in ("v4e", "data_tools") for p in (ROOT / top).rglob("*") if p.is_file()]
    ours = {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}
    assert len(ours) > 100 and sorted(ours - held) == []
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {"v4e", "data_tools"}
    (licence,) = [name for name in held if name.endswith("LICENSE")]
    assert zipfile.ZipFile(wheel).read(licence) == (ROOT / "LICENSE").read_bytes()
    (metadata,) = [name for name in held if name.endswith(".dist-info/METADATA")]
    told = HeaderParser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode())
    assert (told["Name"], told["License-Expression"] or told["License"]) == ("v4e", "Apache-2.0")
    (scripts,) = [name for name in held if name.endswith("entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(scripts).decode()
    assert "v4e = v4e.cli:main" in text and "v4e-shards = data_tools.cli:main" in text


def test_v4e_comes_from_the_wheel(installed):
    home = installed.parents[1]
    said = run(
        installed / "python", "-c", "import v4e, data_tools; print(v4e.__file__, data_tools.__file__)", where=home
    )
    assert all(Path(place).is_relative_to(installed.parent) for place in said.split())
    assert not Path(said.split()[0]).is_symlink()


def test_v4e_edit(installed, tmp_path):
    """With the embedded model; any size of photograph."""
    Image.effect_noise((50, 40), 80).convert("RGB").save(tmp_path / "photo.png")
    run(installed / "v4e", "edit", "photo.png", "make it snow", "-o", "out.png", "--steps", "2", where=tmp_path)
    before, after = (Image.open(tmp_path / name) for name in ("photo.png", "out.png"))
    assert after.size == before.size and after.tobytes() != before.tobytes()
    refused = run(installed / "v4e", "edit", "none.png", "make it snow", where=tmp_path, code=4)
    assert "none.png: no such photograph" in refused


def test_v4e_shards(installed, tmp_path):
    """From pictures to a page about shards, with the embedded teacher."""
    for name in ("a", "b"):
        Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / f"{name}.png")
    (tmp_path / "list.jsonl").write_text(
        '{"id": "x", "source": "a.png", "edited": "b.png", "instruction": "make it snow"}\n'
    )
    tool, size = installed / "v4e-shards", ("--height", 64, "--width", 64)
    teacher = next(installed.parent.glob("lib/python*/site-packages/v4e/assets/wan-nano/teacher"))
    run(tool, "ingest", "list.jsonl", "triplets", *size, where=tmp_path)
    run(tool, "evolve", "triplets", where=tmp_path)
    words = ("height=64", "width=64", "teacher_frames=9", "guidance=1.0", "batch=1", "step_counts=[1,2]")
    run(tool, "rollout", "triplets", "shards", "--teacher", teacher, *words, where=tmp_path)
    assert "1 sample" in run(tool, "verify", "shards", where=tmp_path)
    run(tool, "look", "shards", "--page", "page.html", where=tmp_path)
    assert "make it snow" in (tmp_path / "page.html").read_text()
