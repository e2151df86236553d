"""The door: a photograph in, an edit out; a mistake is one sentence that names the place."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as torch_dist
from PIL import Image

from tests.builders import wan_folder
from v4e import cli
from v4e.pipelines import Card


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = wan_folder(tmp_path_factory.mktemp("student"))
    Card(frames=5, sizes=((32, 48), (48, 32)), steps=2).write(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.effect_noise((130, 97), 80).convert("RGB").save(path)
    return path


def told(capsys, *words) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    code = cli.main([str(w) for w in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


def test_edit_keeps_the_photographs_size(model, photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert cli.main(["edit", str(photo), "make it snow", "--model", str(model), "-o", str(out), "--steps", "1"]) == 0
    assert Image.open(out).size == (130, 97)
    assert str(out) in capsys.readouterr().out


def test_edit_is_a_function_of_the_seed(model, photo, tmp_path):
    def edited(name, seed):
        words = ["edit", photo, "make it snow", "--model", model, "-o", tmp_path / name, "--seed", seed]
        assert cli.main([str(w) for w in words]) == 0
        return (tmp_path / name).read_bytes()

    assert edited("a.png", 1) == edited("b.png", 1) != edited("c.png", 2)


def test_edit_writes_the_evolution_and_says_how_it_was_made(model, photo, tmp_path, capsys):
    out = tmp_path / "out.jpg"
    words = ["edit", photo, "make it snow", "--model", model, "-o", out, "--steps", "1", "--seed", "5", "--frames"]
    assert cli.main([str(w) for w in words]) == 0
    assert capsys.readouterr().out.split() == ["wrote", str(tmp_path / "out.frames.png"), "wrote", str(out)]
    assert cli.main(["edit", "--recipe", str(out)]) == 0
    recipe = json.loads(capsys.readouterr().out)
    assert (recipe["instruction"], recipe["seed"], recipe["steps"]) == ("make it snow", 5, 1)


def test_a_batch_with_refused_lines_says_so_by_its_exit_code(model, photo, tmp_path, capsys):
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "edited"
    good = {"photo": photo.name, "instruction": "make it snow"}
    jobs.write_text("".join(json.dumps(job) + "\n" for job in (good, good | {"photo": "none.jpg"})))
    words = ["edit", "--batch", jobs, "--model", model, "-o", out, "--steps", "1"]
    assert cli.main([str(w) for w in words]) == 4
    assert "1 edited, 1 refused" in capsys.readouterr().out
    assert "no such photograph" in (out / "quarantine.jsonl").read_text()
    jobs.write_text(json.dumps(good))
    assert cli.main([str(w) for w in words]) == 0
    assert "1 edited (1 of them before), 0 refused" in capsys.readouterr().out


def test_nothing_to_edit(tmp_path, capsys):
    assert told(capsys, "edit", tmp_path / "a.jpg")[0] == 3
    assert told(capsys, "edit", "a.jpg", "snow", "--batch", tmp_path / "jobs.jsonl")[0] == 3
    code, line = told(capsys, "edit", "--batch", tmp_path / "jobs.jsonl")
    assert code == 4 and "no such jobs file" in line
    code, line = told(capsys, "edit", "--batch", "https://h/jobs.jsonl?key=s3cret")
    assert code == 3 and "https://h/jobs.jsonl?...: a jobs file lies on this machine" in line


def test_missing_photograph(tmp_path, capsys):
    code, line = told(capsys, "edit", tmp_path / "none.jpg", "make it snow", "--model", tmp_path)
    assert code == 4 and "none.jpg" in line and "no such photograph" in line


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n\0\0"], ids=["empty", "text", "cut"])
def test_undecodable_photograph(content, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(content)
    code, line = told(capsys, "edit", tmp_path / "bad.png", "make it snow", "--model", tmp_path)
    assert code == 4 and "bad.png" in line


def test_truncated_photograph(photo, tmp_path, capsys):
    photo.write_bytes(photo.read_bytes()[:-500])
    code, line = told(capsys, "edit", photo, "make it snow", "--model", tmp_path)
    assert code == 4 and "photo.jpg" in line and "truncated" in line


@pytest.mark.parametrize("instruction", ["", "  ", "make it \udcff snow"])
def test_unusable_instruction(instruction, photo, tmp_path, capsys):
    code, line = told(capsys, "edit", photo, instruction, "--model", tmp_path)
    assert code == 4 and "instruction" in line


def test_missing_model(photo, tmp_path, capsys):
    code, line = told(capsys, "edit", photo, "make it snow", "--model", tmp_path / "none", "-o", tmp_path / "o.png")
    assert code == 5 and "none" in line


def test_empty_model_folder(photo, tmp_path, capsys):
    code, line = told(capsys, "edit", photo, "make it snow", "--model", tmp_path, "-o", tmp_path / "o.png")
    assert code == 5 and str(tmp_path) in line


@pytest.mark.parametrize("output", ["out.tiles", "nowhere/out.png"])
def test_unwritable_output(output, photo, tmp_path, capsys):
    code, line = told(capsys, "edit", photo, "make it snow", "--model", tmp_path, "-o", tmp_path / output)
    assert code == 3 and output in line


def test_steps_are_at_least_one(photo, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["edit", str(photo), "make it snow", "--model", str(tmp_path), "--steps", "0"])


@pytest.mark.parametrize("option", ["--tflops", "--utilisation", "--bandwidth", "--gpu-memory"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_plan_divides_by_nothing(option, value, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "configs/video4edit.yaml", f"{option}={value}"])
    assert "is not above 0" in capsys.readouterr().err


def test_unknown_key_names_its_neighbour(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("recipe: flow_matching\nloop: {stepz: 3}\n")
    code, line = told(capsys, "train", tmp_path / "c.yaml")
    assert code == 3 and "loop.stepz" in line and "loop.steps" in line and "c.yaml" in line


def test_unknown_recipe_and_missing_config(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("recipe: video5edit\n")
    assert "video4edit" in told(capsys, "train", tmp_path / "c.yaml")[1]
    assert told(capsys, "train", tmp_path / "none.yaml")[0] == 3


def test_the_launchers_argument_comes_first():
    args = cli.parser().parse_args(["--local_rank=1", "train", "c.yaml", "loop.steps=3", "optim.lr=1"])
    assert (args.config, args.overrides, args.resume) == ("c.yaml", ["loop.steps=3", "optim.lr=1"], "auto")


def test_a_training_leaves_its_process_group_to_the_next(tmp_path, monkeypatch):
    """DeepSpeed hands the groups it made to the next engine of this process: they must live as long as it does."""
    monkeypatch.setattr("v4e.train.run.train_recipe", lambda *_, **__: None)
    monkeypatch.setattr("v4e.data.mixture.Mixture.of", lambda *_, **__: SimpleNamespace(identity=""))
    (tmp_path / "c.yaml").write_text("recipe: flow_matching\nloop: {threads: 1}\n")
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 0
    assert torch_dist.is_initialized()


def test_as_a_module_it_answers_without_loading_torch():
    code = "import sys, v4e.cli\ntry: v4e.cli.main(['--help'])\nfinally: print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "VERB" in shown.stdout and shown.stdout.endswith("False\n")
