"""What is measured of exports in stock diffusers, with wan-nano; docs/export.md quotes it.

    python -m tests.stock_bars FOLDER

trains adapters of wan-nano for a few steps on two ranks, exports them alone and added, and makes the same edit with v4e
and, in processes of their own that may not import v4e, with stock diffusers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools import cli as yard
from data_tools.demo import launcher
from v4e import cli

ROOT = Path(__file__).parents[1]
NANO = ROOT / "v4e/assets/wan-nano"
SCRIPT = ROOT / "tests/stock_edit.py"
FILES = ("pytorch_lora_weights.safetensors", "lora_comfyui.safetensors")
INSTRUCTION, SEED = "make it snow", "3"


def without_v4e(*words: object) -> None:
    """The script in a process of its own, which ends badly if anything in it imported v4e."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
    command = [sys.executable, "-I", "-c", f"{code} sys.exit('v4e' in sys.modules)", SCRIPT, *words, "--seed", SEED]
    finished([str(word) for word in command])


def finished(command: list[str], **variables: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def noise(path: Path) -> Path:
    """A photograph of wan-nano's size."""
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    return path


def pixels_that_differ(model: Path, folder: Path) -> int:
    """Of an edit by ``v4e edit`` and by the script; of colour values, to be exact."""
    photo, ours, stocks = noise(folder / "photo.png"), folder / "ours.png", folder / "stock.png"
    words = ("edit", photo, INSTRUCTION, "--model", model, "-o", ours, "--seed", SEED, "--device", "cpu")
    assert cli.main([str(word) for word in words]) == 0
    without_v4e(model, photo, INSTRUCTION, stocks)
    return int((np.asarray(Image.open(ours)) != np.asarray(Image.open(stocks))).sum())


def frames(folder: Path, model: Path, *words: object) -> np.ndarray:
    """All frames in [0, 1], by the script."""
    without_v4e(model, folder / "photo.png", INSTRUCTION, folder / "frames.npy", *words)
    return np.load(folder / "frames.npy")


def adapters_of_nano(folder: Path) -> dict[str, float]:
    """Largest differences of frames in [0, 1]: adapters beside the base against adapters added to it."""
    run = train(folder)
    for form in ("lora", "diffusers"):
        words = ("export", run, folder / form, "--form", form, "--dtype", "float32")
        assert cli.main([str(word) for word in words]) == 0
    noise(folder / "photo.png")
    whole, lora = frames(folder, folder / "diffusers"), ("--lora", folder / "lora")
    found = {file: frames(folder, NANO / "i2v", *lora, "--lora-file", file) for file in FILES}
    found["no adapters"] = frames(folder, NANO / "i2v", "--solver", folder / "lora")
    return {name: float(np.abs(made - whole).max()) for name, made in found.items()}


def train(folder: Path) -> Path:
    """configs/nano/video4edit.yaml with adapters: ZeRO-3, bf16, averages; six steps on four triplets of noise."""
    rows = [
        {"id": f"x{i}", "source": f"{i}.png", "edited": f"{i + 1}.png", "instruction": INSTRUCTION} for i in range(4)
    ]
    for i in range(5):
        noise(folder / f"{i}.png")
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    triplets, shards, teacher = str(folder / "triplets"), str(folder / "shards"), str(NANO / "teacher")
    assert yard.main(["ingest", str(folder / "list.jsonl"), triplets, "--height", "64", "--width", "64"]) == 0
    assert yard.main(["evolve", triplets]) == 0
    clips = ("height=64", "width=64", "teacher_frames=9", "guidance=1.0", "batch=4", "keep_full=true")
    assert yard.main(["rollout", triplets, shards, "--teacher", teacher, *clips]) == 0
    models = (f"teacher={teacher}", f"student={NANO / 'i2v'}", "optim.name=adamw", "optim.lr=0.01")
    loop = (f"data={shards}", f"output={folder / 'run'}", "steps=6", "batch=4", "micro_batch=2", "ema=0.5")
    lora = ("lora.rank=4", "lora.scale=0.7", "sheet_every=0", "wandb.mode=disabled")
    words = (*models, *(f"loop.{word}" for word in (*loop, *lora)))
    command = [*launcher(2), "train", str(ROOT / "configs/nano/video4edit.yaml"), *words]
    finished(command, DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    return folder / "run"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print(f"colour values that differ, embedded student: {pixels_that_differ(NANO / 'student', folder)}")
    for name, worst in adapters_of_nano(folder).items():
        print(f"largest difference of frames in [0, 1], {name}: {worst:.2e}")
    print(f"colour values that differ, adapters added: {pixels_that_differ(folder / 'diffusers', folder)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
