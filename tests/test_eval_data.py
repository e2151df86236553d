"""Evaluation on one's own data: the mask, what networks see, damage, going on after a kill, the same report twice."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import WORDS, shared_wan_folder, tokenizer
from PIL import Image
from test_export import a_run
from test_look import Reader
from test_shards import META, flip, make_sample
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from v4e import cli
from v4e.data.shards import Index, ShardWriter, index_path
from v4e.errors import CheckpointError, ConfigError, DataError
from v4e.eval import metrics, own, page, summary
from v4e.eval.measures import Eyes, score
from v4e.eval.own import Known, Scored, Subject
from v4e.eval.run import Case
from v4e.eval.triplets import open_edits
from v4e.models.features import Clipper, Dino, Layers
from v4e.nouns import Clip

SIZE = 32


def noise(seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def smooth(seed: int) -> torch.Tensor:
    """A picture without detail, so that it survives being compared window by window."""
    ramp = torch.linspace(40, 200, SIZE).expand(3, SIZE, SIZE)
    return (ramp + 10 * seed).to(torch.uint8)


def with_square(picture_3HW: torch.Tensor, value: int = 250) -> torch.Tensor:
    changed = picture_3HW.clone()
    changed[:, 10:14, 10:14] = value
    return changed


def save(path: Path, picture_3HW: torch.Tensor) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_3HW.permute(1, 2, 0).numpy()).save(path)
    return path.name


# ----------------------------------------------------------------------------------------------------- the mask


def test_the_mask_of_a_square_by_hand():
    """200 grey levels on 4 x 4 pixels: the box mean is 67 beside it and 22 at its corners; then one pixel more."""
    black = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    mask = metrics.edit_mask(black, with_square(black, 200))
    wanted = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    wanted[8:16, 8:16] = True
    wanted[[8, 8, 15, 15], [8, 15, 8, 15]] = False
    assert torch.equal(mask, wanted)


def test_the_channel_that_changes_most_decides():
    black = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    blue = with_square(black, 200)
    blue[:2] = 0
    assert torch.equal(metrics.edit_mask(black, blue), metrics.edit_mask(black, with_square(black, 200)))


def test_the_mask_reaches_further_in_a_larger_picture():
    black = torch.zeros(3, 512, 512, dtype=torch.uint8)
    mask = metrics.edit_mask(black, with_square(black, 200))
    assert mask.any(1).nonzero().flatten().tolist() == [*range(9 - 4, 15 + 4)]


@pytest.mark.parametrize("levels", [1, 25])
def test_a_slight_change_has_no_place(levels):
    grey = torch.full((3, SIZE, SIZE), 100, dtype=torch.uint8)
    assert metrics.edit_mask(grey, grey + levels).all()


def test_one_pixel_is_no_edit():
    black = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    speck = black.clone()
    speck[:, 5, 5] = 200  # a box mean of 22
    assert metrics.edit_mask(black, speck).all()


def test_an_edit_of_nearly_everything_is_of_everything():
    black = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    style = torch.full_like(black, 200)
    style[:, :5, :5] = 0
    assert metrics.edit_mask(black, style).all()
    style[:, :16] = 0
    assert metrics.edit_mask(black, style).sum() == SIZE * (16 + 2)  # half, and two rows more


def test_the_mask_finds_what_the_world_knows_to_be_edited(monkeypatch):
    """In pictures that were stored as JPEG, as most are; a finer threshold would mark the artefacts too."""
    covered, besides = found_in_the_world()
    assert covered > 0.95 and besides < 0.05
    monkeypatch.setattr(metrics, "CHANGED", 12)
    assert found_in_the_world()[1] > 0.15


def found_in_the_world() -> tuple[float, float]:
    """Mean share of the true region that the mask holds, and of the picture that it holds besides."""
    from data_tools import world

    shares = list[tuple[float, float]]()
    for task in ("add", "remove", "replace", "recolour", "move"):
        for number in range(4):
            edit = world.draw(5, number, "heldout", size=128, tasks=(task,))
            truth = torch.from_numpy(edit.mask)
            mask = metrics.edit_mask(torch.from_numpy(edit.source), torch.from_numpy(as_jpeg(edit.target)))
            shares.append((((mask & truth).sum() / truth.sum()).item(), (mask & ~truth).double().mean().item()))
    covered, besides = np.mean(shares, axis=0)
    return covered, besides


def as_jpeg(picture_3HW: np.ndarray, quality: int = 75) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(picture_3HW, 0, -1)).save(buffer, "JPEG", quality=quality)
    return np.moveaxis(np.array(Image.open(buffer)), -1, 0)


def test_ssim_of_a_region():
    a = noise(1)
    b = a.clone()
    b[:, :, 16:] = 255 - a[:, :, 16:]
    left = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    left[:, :11] = True  # windows with these middles end before column 16
    everything = torch.ones_like(left)
    assert metrics.masked_ssim(a, b, left) == pytest.approx(1)
    assert metrics.masked_ssim(a, b, ~left) < 0.5
    assert metrics.masked_ssim(a, b, everything) == pytest.approx(metrics.ssim(a, b))
    assert metrics.masked_ssim(a, b, ~everything) is None


# -------------------------------------------------------------------------------------------------- the networks


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    """CLIP, DINOv2 and a ResNet of a few weights each, at random."""
    home = tmp_path_factory.mktemp("networks")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": len(WORDS) + 3, "max_position_embeddings": 12, "eos_token_id": 1, "pad_token_id": 0}
    eyes = {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    models = {
        "clip": CLIPModel(CLIPConfig(text_config=small | words, vision_config=small | eyes, projection_dim=8)),
        "dino": Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **eyes)),
        "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    }
    for name, model in models.items():
        model.save_pretrained(home / name)
        CLIPImageProcessor(size=28, crop_size=28).save_pretrained(home / name)
    tokenizer().save_pretrained(home / "clip")
    return {name: home / name for name in models}


@pytest.fixture(scope="module")
def eyes(networks) -> Eyes:
    return Eyes.open(str(networks["clip"]), str(networks["dino"]), str(networks["resnet"]))


def a_case(captions: tuple[str, str] | None = None) -> Case:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:, :8] = True
    return Case("a", "add", "add a red car", Clip(noise(1)[None]), Clip(noise(2)[None]), mask, captions=captions)


def test_what_the_networks_say_of_the_target_itself(eyes):
    found = score(a_case(), [a_case().target], eyes)[0]
    for name in ("clip", "dino"):
        assert all(found[f"{region}{name}"] == pytest.approx(1, abs=1e-6) for region in ("", "edit_", "keep_"))
    assert [found[f"{region}perceptual"] for region in ("", "edit_", "keep_")] == pytest.approx([0, 0, 0], abs=1e-9)


def test_each_region_is_blind_to_the_other(eyes):
    case = a_case()
    outside = Clip(torch.where(case.mask_HW, case.target.frames_T3HW, noise(3)))
    found = score(case, [outside], eyes)[0]
    assert found["edit_psnr"] == 100 and found["keep_psnr"] < 20
    for name in ("clip", "dino"):
        assert found[f"edit_{name}"] == pytest.approx(1, abs=1e-6)
        assert found[f"keep_{name}"] == pytest.approx(found[name]) != pytest.approx(1, abs=1e-6)


def test_an_edit_of_everything_keeps_nothing(eyes):
    case = Case("a", "snow", "make it snow", Clip(noise(1)[None]), Clip(noise(2)[None]), torch.ones(SIZE, SIZE) > 0)
    found = score(case, [case.source], eyes)[0]
    assert {name for name, value in found.items() if value is None} == {n for n in found if n.startswith("keep_")}


def test_the_direction_by_hand(eyes):
    captions = ("a house", "a house with snow")
    case, output = a_case(captions), noise(5)
    assert eyes.clip is not None
    before, after = eyes.clip.texts(captions).double().numpy()
    seen = eyes.clip.images(torch.stack([case.source.frames_T3HW[0], output])).double().numpy()
    way, words = seen[1] - seen[0], after - before
    wanted = way @ words / np.linalg.norm(way) / np.linalg.norm(words)
    found = score(case, [Clip(output[None]), case.source], eyes)
    assert found[0]["clip_direction"] == pytest.approx(wanted, abs=1e-5)
    assert found[1]["clip_direction"] == 0  # a copy goes nowhere
    assert score(a_case(), [Clip(output[None])], eyes)[0]["clip_direction"] != pytest.approx(wanted, abs=1e-3)


def test_the_distance_of_layers_by_hand(networks):
    """A place of one layer: the squared distance of unit vectors is 2 - 2 cos."""
    layers = Layers(networks["dino"])
    a, b = layers.maps(torch.stack([noise(1), noise(2)]))[-1]
    assert a.shape == (16, 2, 2)
    cos = torch.nn.functional.cosine_similarity(a, b, dim=0)
    assert (a - b).square().sum(0) == pytest.approx(2 - 2 * cos, abs=1e-5)
    assert [tuple(x.shape[1:]) for x in Layers(networks["resnet"]).maps(noise(1)[None])] == [(8, 7, 7), (16, 4, 4)]
    assert len(Layers(networks["clip"]).maps(noise(1)[None])) == 2


def test_without_weights_the_columns_are_absent_and_a_sentence_says_so(networks, tmp_path):
    eyes = Eyes.open(dino=str(tmp_path / "nowhere"), perceptual=str(networks["resnet"]))
    assert set(eyes.absent) == {"clip", "dino"}
    assert "--clip" in eyes.absent["clip"] and "nowhere" in eyes.absent["dino"]
    columns = score(a_case(), [a_case().source], eyes)[0].keys()
    assert "perceptual" in columns and not any("clip" in c or "dino" in c for c in columns)


def test_networks_that_cannot_be_used_are_refused(networks, tmp_path):
    with pytest.raises(CheckpointError, match="type 'dinov2', not 'clip'"):
        Clipper(networks["dino"])
    bare = tmp_path / "bare"
    Dinov2Model.from_pretrained(networks["dino"]).save_pretrained(bare)
    with pytest.raises(CheckpointError, match="preprocessor_config.json"):
        Dino(bare)
    CLIPImageProcessor(size=28, crop_size=28).save_pretrained(bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="weights are missing"):  # which transformers would draw at random
        Dino(bare)
    (bare / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Dino(bare)


# ------------------------------------------------------------------------------------------------------ the data


def listed(folder: Path, rows: int = 5) -> Path:
    """A list of good edits: two tasks, of which the data names no family; the first brings mask and captions."""
    lines = []
    for n in range(rows):
        source = smooth(n)
        row = {"id": f"e{n}", "instruction": f"add a car {n}", "task": ("add", "snow")[n % 2], "size": [SIZE, SIZE]}
        row |= {"source": save(folder / f"{n}.png", source), "edited": save(folder / f"{n}e.png", with_square(source))}
        if n == 0:
            mask = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
            mask[:, :16] = 255
            row |= {"mask": save(folder / "mask.png", mask), "source_caption": "a house", "edited_caption": "a car"}
        lines.append(row)
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def opened(path: Path | str):
    return open_edits(str(path), lambda height, width: (SIZE, SIZE), {"add": "spatial", "snow": "temporal"}.get)


def test_a_list_says_what_it_says(tmp_path):
    edits = opened(listed(tmp_path))
    first, second = edits.case(0), edits.case(1)
    assert first.mask_HW.sum() == 16 * SIZE and first.captions == ("a house", "a car")
    assert torch.equal(first.source.frames_T3HW[0], smooth(0))
    assert (second.task, second.groups, second.captions) == ("snow", ("temporal",), None)
    assert torch.equal(second.mask_HW, metrics.edit_mask(smooth(1), with_square(smooth(1))))


def test_pictures_are_brought_to_the_models_size_with_their_mask(tmp_path):
    wide = noise(1)[:, :16].repeat_interleave(4, 1).repeat_interleave(4, 2)  # 64 high, 128 wide
    mask = torch.zeros(3, 64, 128, dtype=torch.uint8)
    mask[:, :, 64:96] = 255  # of the middle square the third quarter
    row = {"id": "a", "instruction": "add", "source": save(tmp_path / "s.png", wide), "size": [16, 16]}
    row |= {"edited": save(tmp_path / "e.png", 255 - wide), "mask": save(tmp_path / "m.png", mask), "family": "spatial"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(row))
    case = opened(tmp_path / "edits.jsonl").case(0)
    assert case.source.size == case.target.size == (16, 16)
    assert case.mask_HW.any(0).nonzero().flatten().tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert case.groups == ("spatial",)


DAMAGE = {
    "no json": ("{", "no JSON"),
    "deep json": ("[" * 100_000, "no JSON"),
    "no object": ("[]", "no JSON object"),
    "no id": ({"id": None}, "id is missing"),
    "an id that is a path": ({"id": "../x"}, "no legal name"),
    "an id met before": ({"id": "e0"}, "earlier edit"),
    "no instruction": ({"instruction": " "}, "instruction is empty"),
    "no file": ({"edited": "nowhere.png"}, "no such picture"),
    "a torn picture": ({"source": "torn.png"}, "torn.png: not a readable picture"),
    "no edit": ({"edited": "1.png"}, "are the same"),
    "another shape": ({"edited": "long.png"}, "unequal shapes"),
    "an empty mask": ({"mask": "black.png"}, "mask is empty"),
    "changed since": ({"hashes": {"source": "0"}}, "changed since it was ingested"),
    "no text": ({"task": 3}, "3 and no text"),
    "no size": ({"size": [32]}, "not enough values"),
    "a size that no model edits": ({"size": [32, 33]}, "does not divide"),
    "a size that no memory holds": ({"size": [10**6, 10**6]}, "no size of a picture"),
}


def test_what_is_damaged_is_quarantined_and_counted(tmp_path):
    path = listed(tmp_path, rows=2)
    good = path.read_text().splitlines()
    (tmp_path / "torn.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    save(tmp_path / "long.png", noise(3)[:, :16])
    save(tmp_path / "black.png", torch.zeros(3, SIZE, SIZE, dtype=torch.uint8))
    other = json.loads(good[1])
    bad = [
        w if isinstance(w, str) else json.dumps(other | {"id": f"x{n}"} | w) for n, (w, _) in enumerate(DAMAGE.values())
    ]
    path.write_text("\n".join([good[0], *bad, good[1]]))
    made = own.evaluate(opened(path), [Subject("copy")], Eyes(), tmp_path / "out")
    assert [known.id for known in made.cases] == ["e0", "e1"]
    lines = [json.loads(line) for line in (tmp_path / "out" / own.QUARANTINE).read_text().splitlines()]
    assert len(lines) == len(DAMAGE)
    for line, (name, (_, words)), number in zip(lines, DAMAGE.items(), range(2, 99), strict=False):
        assert words in line["error"] and line["name"] == f"edit {number} of the list", name


def test_a_shard_set_with_a_flipped_byte(tmp_path):
    with ShardWriter(tmp_path / "set", META, samples_per_shard=3) as writer:
        for n in range(5):
            writer.add(make_sample(n))
    row = Index(index_path(tmp_path / "set/000-000001.tar")).member(0, "target.png")
    flip(tmp_path / "set/000-000001.tar", row.offset + 60)
    made = own.evaluate(opened(tmp_path / "set"), [Subject("copy")], Eyes(), tmp_path / "out")
    assert [known.id for known in made.cases] == ["s0000", "s0001", "s0002", "s0004"]
    assert [r.name for r in made.refused] == ["s0003"] and made.cases[0].task == "add"
    assert made.cases[0].families == ("spatial",)


def test_nothing_that_can_be_used_is_an_error(tmp_path):
    (tmp_path / "edits.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="no edit that can be used"):
        own.evaluate(opened(tmp_path / "edits.jsonl"), [Subject("copy")], Eyes(), tmp_path / "out")
    with pytest.raises(DataError, match="no such shard folder"):
        opened(tmp_path / "nowhere")


def test_the_most_are_evenly_spread():
    assert own.spread(10, 3) == [0, 3, 6] and own.spread(3, 5) == own.spread(3, 0) == [0, 1, 2]


# -------------------------------------------------------------------------------------------- making and keeping


class Painter:
    """Stands for a model: the source with noise of its seed, less of it at more steps. Counts what it is asked."""

    def __init__(self, after: int = 10**9) -> None:
        self.asked, self.opened, self.after = list[str](), 0, after

    def open(self):
        self.opened += 1
        return self

    def __call__(self, images, instructions, seeds, steps):
        if len(self.asked) >= self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked += [f"{text} @{steps}" for text in instructions]
        together = sum(clip.frames_T3HW.double().mean().item() for clip in images)  # as a batch's last bits may depend
        return [self._paint(clip, seed, steps, together) for clip, seed in zip(images, seeds, strict=True)]

    def _paint(self, clip: Clip, seed: int, steps: int, together: float) -> Clip:
        dots = torch.randn(3, *clip.size, generator=torch.Generator().manual_seed(seed)) * 40 / steps
        painted = with_square(clip.frames_T3HW[0]).float() + dots + together % 1
        return Clip(painted.clamp(0, 255).to(torch.uint8)[None])


def rows_of(painter: Painter, weights: str = "w1", seeds: int = 2) -> list[Subject]:
    made_by = {"model": weights, "guidance": 1.0}
    return [Subject("copy"), Subject("student", painter.open, made_by, (4, 1), tuple(range(seeds)))]


def report(edits, subjects, folder: Path, eyes: Eyes = Eyes(), **options) -> summary.Summary:  # noqa: B008  frozen
    made = own.evaluate(edits, subjects, eyes, folder, **options)
    rows, about = tuple(summary.summarise(made.scored)), {"model": "m", "data": "d"}
    found = summary.Summary(made, rows, tuple(eyes.columns), 4, about, {"clip": "clip is <not> measured"})
    summary.write(found, folder)
    page.write_page(found, edits, folder, "student")
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_files(tmp_path, eyes):
    edits = opened(listed(tmp_path))
    for name in "ab":
        report(edits, rows_of(Painter()), tmp_path / name, eyes, batch=2)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b and len([name for name in a if name.startswith("edits/")]) == 5 * 2 * 2


def test_a_killed_evaluation_goes_on_to_the_same_bytes(tmp_path):
    edits = opened(listed(tmp_path))
    report(edits, rows_of(whole := Painter()), tmp_path / "whole", batch=2)

    child = multiprocessing.get_context("fork").Process(
        target=own.evaluate, args=(edits, rows_of(Painter(after=8)), Eyes(), tmp_path / "out", 2)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    kept = list((tmp_path / "out/edits").rglob("*.png"))
    assert len(kept) == 8

    kept[0].write_bytes(kept[0].read_bytes()[:-20])  # torn: its batch of two is made again
    report(edits, rows_of(rest := Painter()), tmp_path / "out", batch=2)
    assert (len(whole.asked), len(rest.asked)) == (20, 14)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    report(edits, rows_of(again := Painter()), tmp_path / "out", batch=2)
    assert (again.asked, again.opened) == ([], 0)  # not even its model is loaded


def test_everything_that_determines_an_edit_makes_it_anew(tmp_path):
    path = listed(tmp_path, rows=3)
    own.evaluate(opened(path), rows_of(Painter()), Eyes(), tmp_path / "out", batch=1)

    def asked(weights: str = "w1", batch: int = 1) -> int:
        own.evaluate(opened(path), rows_of(painter := Painter(), weights), Eyes(), tmp_path / "out", batch=batch)
        return len(painter.asked)

    assert asked() == 0
    save(tmp_path / "1.png", smooth(9))
    assert asked() == 4  # one picture, two step counts, two seeds
    path.write_text(path.read_text().replace("add a car 2", "add a tree"))
    assert asked() == 4
    assert asked(weights="w2") == 12
    assert asked(weights="w2", batch=3) == 12
    assert asked(weights="w2", batch=3) == 0


def test_twins_and_odd_names_are_refused(tmp_path):
    edits = opened(listed(tmp_path, rows=1))
    with pytest.raises(ConfigError, match="two rows are called 'copy'"):
        own.evaluate(edits, [Subject("copy"), Subject("copy")], Eyes(), tmp_path / "out")
    with pytest.raises(ConfigError, match="no name of a row"):
        Subject("../up")


def test_a_fingerprint_changes_with_the_weights_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/w.safetensors").write_bytes(bytes(3 << 20))
    before = own.fingerprint(tmp_path / "a")
    (tmp_path / "a/README.md").write_text("words")
    assert own.fingerprint(tmp_path / "a") == before
    flip(tmp_path / "a/w.safetensors", (3 << 20) - 5)
    assert own.fingerprint(tmp_path / "a") != before


# --------------------------------------------------------------------------------------------------- the report


def scored(id: str, task: str, seed: int, edit: float, keep: float | None, sharpness: float = 1.0) -> Scored:
    scores = {"edit_psnr": edit, "keep_psnr": keep, "sharpness": sharpness}
    return Scored(id, task, ("spatial",) if task == "add" else (), "student", 4, seed, scores)


def test_means_and_spread_by_hand():
    lines = [
        scored("a", "add", 0, 10, 30, 4.0),
        scored("b", "snow", 0, 20, None, 1.0),
        scored("a", "add", 1, 12, 34, 1.0),
        scored("b", "snow", 1, 22, None, 0.25),
    ]
    table = {(r.kind, r.group, r.seed): r for r in summary.summarise(lines)}
    overall = table["overall", "overall", None]
    assert overall.means == {"edit_psnr": 16, "keep_psnr": 32, "sharpness": pytest.approx(1)}
    assert overall.spread["edit_psnr"] == pytest.approx(2**0.5)  # of 15 and 17
    assert (overall.n, overall.n_keep) == (4, 2)
    assert table["tasks", "snow", 1].means == {"edit_psnr": 22, "keep_psnr": None, "sharpness": pytest.approx(0.25)}
    assert table["families", "spatial", None].means["edit_psnr"] == 11
    assert ("families", "", None) not in table and table["tasks", "add", 0].spread == {}


def test_the_report_says_what_was_measured(tmp_path):
    found = report(opened(listed(tmp_path)), rows_of(Painter()), tmp_path / "out")
    saved = json.loads((tmp_path / "out/report.json").read_text())
    student = saved["methods"]["student"]["4"]
    assert student["overall"]["edit_psnr"] == found.row("student").means["edit_psnr"]
    assert student["seeds"]["1"]["tasks"]["snow"]["n"] == 2 and set(student["families"]) == {"spatial", "temporal"}
    assert student["overall"]["spread"]["psnr"] > 0 and saved["absent"] == {"clip": "clip is <not> measured"}
    assert set(saved["methods"]["copy"]) == {"0"} and saved["cases"] == 5
    lines = (tmp_path / "out" / own.SCORES).read_text().splitlines()
    assert len(lines) == 5 * (1 + 2 * 2)  # a copy has neither steps nor seeds to differ by
    text = (tmp_path / "out/report.md").read_text()
    assert f"| student |     4 | {student['overall']['edit_psnr']:.1f} ±" in text and "clip is <not> measured" in text


def test_the_page_stands_alone_and_shows_the_worst_first(tmp_path):
    found = report(opened(listed(tmp_path)), rows_of(Painter()), tmp_path / "out")
    text = (tmp_path / "out" / page.PAGE).read_text()
    reader = Reader(text)
    pictures = [a for a in reader.addresses if not a.startswith("width:")]
    assert len(pictures) == 5 * 4 and all(a.startswith("data:image/png;base64,") for a in pictures)
    assert not any(word in text for word in ("<script", "<link", "http", "url(", "@import", "<not>"))
    quality = {s.id: 0.0 for s in found.evaluation.scored}
    for s in found.evaluation.scored:
        quality[s.id] += (s.method, s.steps) == ("student", 4) and s.scores["edit_psnr"]
    shown = [line.split("</code>")[0] for line in text.split("<code>")[1:]]
    assert shown == sorted(quality, key=quality.get)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLICK = """<script>
document.querySelector("label[for=t-736e6f77]").click();  // snow
const seen = [...document.querySelectorAll("section")].filter(s => s.offsetParent !== null);
document.title = seen.map(s => s.querySelector("code").textContent).join(" ");
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_choosing_a_task_in_a_browser(tmp_path):
    report(opened(listed(tmp_path)), rows_of(Painter()), tmp_path / "out")
    path = tmp_path / "click.html"
    path.write_text((tmp_path / "out" / page.PAGE).read_text().replace("</body>", f"{CLICK}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1240,900", "--dump-dom"]
    said = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = said.stdout.split("<title>")[1].split("</title>")[0]
    assert sorted(title.split()) == ["e1", "e3"]


def known(id: str, task: str) -> Known:
    return Known(0, 0, id, "x", task, (), (SIZE, SIZE), "", 0.1)


def test_every_task_shows_its_worst(tmp_path):
    cases = [known(f"a{n}", "add") for n in range(3)] + [known("s", "snow")]
    lines = [scored(c.id, c.task, 0, dB, 30) for c, dB in zip(cases, (3, 1, 2, 9), strict=True)]
    made = own.Evaluation(tuple(cases), (), (Subject("student", steps=(4,)),), tuple(lines))
    found = summary.Summary(made, tuple(summary.summarise(lines)), ("edit_psnr",), 4)
    assert [k.id for k in page.worst_first(found, "student")] == ["a1", "s", "a2", "a0"]


# ------------------------------------------------------------------------------------------------------ the door


def test_a_run_its_beginning_and_a_baseline(tmp_path, capsys):
    """The student's row is that of its export, `init` that of the model it began with."""
    base, out = shared_wan_folder(), tmp_path / "out"
    data = listed(tmp_path / "data", rows=2)
    words = ["eval", a_run(tmp_path / "run"), "--data", data, "-o", out, "--baseline", f"sft={base}", "--steps", 1]
    words += ["--most", 1, "--device", "cpu"]
    assert cli.main([str(w) for w in words]) == 0
    saved = json.loads((out / "report.json").read_text())
    assert [*saved["methods"]] == ["copy", "init", "sft", "student"]
    assert saved["methods"]["init"] == saved["methods"]["sft"] != saved["methods"]["student"]
    assert set(saved["absent"]) == {"clip", "dino", "perceptual"} and saved["cases"] == 1
    told = capsys.readouterr()
    assert "Everywhere else" in told.out and "clip is not measured" in told.err
    exported = next((out / "models").iterdir())
    words[1] = exported  # the export itself: the same edits, made before
    assert cli.main([str(w) for w in words]) == 0
    again = json.loads((out / "report.json").read_text())
    assert again["methods"]["student"] == saved["methods"]["student"]
    assert "--baseline init=FOLDER" in again["absent"]["init"]


def test_mistakes_are_sentences(tmp_path, capsys):
    def told(*words) -> tuple[int, str]:
        code = cli.main(["eval", *map(str, words)])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    base, data = shared_wan_folder(), listed(tmp_path, rows=1)
    assert told(base, "--data", tmp_path / "nowhere", "-o", tmp_path / "out")[0] == 4
    code, said = told(tmp_path, "--data", data, "-o", tmp_path / "out")
    assert code == 5 and "neither a training run nor a model folder" in said
    code, said = told(base, "--data", data, "-o", tmp_path / "out", "--baseline", "sft")
    assert code == 3 and "write NAME=MODEL" in said
