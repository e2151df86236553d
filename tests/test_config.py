"""One typed tree: defaults <- YAML <- dotlist, strict, frozen, printed; and mistakes are told in the user's words."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from v4e import config
from v4e.config import Loop
from v4e.errors import ConfigError
from v4e.nouns import Optim
from v4e.recipes import pick

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@dataclass(frozen=True)
class Knobs:
    """A recipe's shape with one knob of each kind."""

    name: str = ""
    fresh: bool = False
    shift: float = 3.0
    steps: tuple[int, ...] = (1, 2)
    mode: Literal["first", "last"] = "first"
    optim: Optim = field(default_factory=Optim)
    loop: Loop = field(default_factory=Loop)


def load(text: str, tmp_path: Path, *words: str) -> Knobs:
    path = tmp_path / "knobs.yaml"
    path.write_text(f"recipe: knobs\n{text}")
    return config.load(path, words, lambda name: Knobs)


# ---------------------------------------------------------------------------------------------------- merging


def test_defaults_yaml_and_words_in_that_order(tmp_path):
    made = load(
        "shift: 5.0\nloop: {steps: 10, batch: 4}\noptim: {betas: [0.8, 0.9]}", tmp_path, "loop.steps=20", "name=x"
    )
    assert (made.shift, made.loop.steps, made.loop.batch, made.loop.seed) == (5.0, 20, 4, 0)
    assert (made.name, made.optim.betas, made.mode) == ("x", (0.8, 0.9), "first")


def test_it_is_frozen_and_tuples_stay_tuples(tmp_path):
    made = load("steps: [4, 8]", tmp_path)
    assert made.steps == (4, 8) and isinstance(made.steps, tuple) and isinstance(made.optim.betas, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.loop.steps = 3  # type: ignore[misc]


def test_defaults_alone():
    assert config.load(None, [], lambda name: Knobs, recipe="knobs") == Knobs()


@dataclass(frozen=True)
class Road:
    """Settings that have a `recipe` of their own."""

    recipe: str = "configs/a.yaml"


def test_a_recipe_that_is_a_setting_is_kept(tmp_path):
    path = tmp_path / "road.yaml"
    path.write_text("recipe: configs/b.yaml\n")
    assert config.load(path, [], lambda _: Road, recipe="road") == Road("configs/b.yaml")


def test_words_reach_every_kind_of_knob(tmp_path):
    words = ("fresh=true", "steps=[1,2,4]", "mode=last", "optim.lr=1e-4", "loop.wandb.mode=disabled")
    made = load("", tmp_path, *words)
    assert (made.fresh, made.steps, made.mode) == (True, (1, 2, 4), "last")
    assert (made.optim.lr, made.loop.wandb.mode) == (1e-4, "disabled")


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("shfit", "shift"),
        ("loop.stpes", "loop.steps"),
        ("optim.learning_rate", "optim.lr"),
        ("loop.wandb.modus", "loop.wandb.mode"),
        ("loop.schedule.warm_up", "loop.schedule.warmup"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(key, nearest, tmp_path):
    with pytest.raises(ConfigError) as told:
        load("", tmp_path, f"{key}=1")
    assert told.value.what == f"unknown key {key}" and told.value.where == "command line"
    if key != "optim.learning_rate":  # no neighbour is near: any is named
        assert told.value.fix == f"did you mean {nearest}?"


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"knobs\.yaml: unknown key optim\.lrr \(did you mean optim\.lr\?\)"):
        load("optim: {lrr: 1}", tmp_path)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("loop.steps=many", "loop.steps"),
        ("loop.steps=1.5", "loop.steps"),
        ("fresh=perhaps", "fresh"),
        ("shift=far", "shift"),
        ("mode=middle", "mode"),
        ("steps=[1,two]", "steps"),
        ("loop=3", "loop"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("loop.wandb.mode=loud", "loop.wandb.mode"),
    ],
)
def test_a_wrong_type_names_the_key(word, key, tmp_path):
    with pytest.raises(ConfigError) as told:
        load("", tmp_path, word)
    assert told.value.where == f"command line, key {key}" and "\n" not in str(told.value)


def test_a_wrong_type_in_a_file_names_the_file(tmp_path):
    with pytest.raises(ConfigError) as told:
        load("optim: {betas: [0.9]}", tmp_path, "shift=2")
    assert told.value.where == f"{tmp_path / 'knobs.yaml'}, key optim.betas"


def test_a_word_whose_quotes_the_shell_took(tmp_path):
    word = "optim.betas=[*.to_q,0.9]"  # to YAML a bare star is the name of an alias
    with pytest.raises(ConfigError, match="quote the word as a whole") as told:
        load("", tmp_path, "shift=2", word)
    assert told.value.where == "command line" and repr(word) in str(told.value)


def test_a_word_without_a_value(tmp_path):
    with pytest.raises(ConfigError, match="'loop.steps' is not of the form key=value"):
        load("", tmp_path, "loop.steps")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("shift: [1", "not readable as YAML"),
        ("- a\n- b", "a mapping of keys to values"),
        ("shift: 3.0", "does not say which recipe"),
        ("", "does not say which recipe"),
    ],
)
def test_unusable_files(content, what, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=what) as told:
        config.load(path, [], pick)
    assert told.value.where == str(path)


def test_a_missing_file_and_an_unknown_recipe(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        config.load(tmp_path / "none.yaml", [], pick)
    (tmp_path / "other.yaml").write_text("recipe: flowmatching\n")
    with pytest.raises(ConfigError, match="did you mean flow_matching"):
        config.load(tmp_path / "other.yaml", [], pick)


# ---------------------------------------------------------------------------------------------- print and hash


def test_the_hash_changes_when_any_setting_does(tmp_path):
    made = load("", tmp_path)
    words = ("name=x", "fresh=true", "shift=3.5", "steps=[1]", "mode=last", "optim.eps=1e-6", "loop.wandb.project=p")
    hashes = {config.config_hash(load("", tmp_path, word)) for word in words}
    assert len(hashes | {config.config_hash(made)}) == len(words) + 1
    assert config.config_hash(made) == config.config_hash(load("shift: 3.0", tmp_path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(p.parents[1])))
def test_every_yaml_loads_and_its_printed_tree_loads_to_the_same(path):
    made = config.load(path, [], pick)
    printed = OmegaConf.create(config.to_yaml(made))
    assert config.build(type(made), printed, [], "printed") == made


@pytest.mark.parametrize("path", CONFIGS[0].parent.glob("video4edit*.yaml"), ids=lambda path: path.stem)
def test_what_trains_the_real_weights_names_every_setting_and_whose_it_is(path):
    """Public sources give hardly a number: each one of v4e's own is told, and none hides in a default."""
    made, text = config.load(path, [], pick), path.read_text()
    unused = {"fresh"} | ({"student_blocks", "teacher_blocks", "block_every"} if not made.student_blocks else set())
    named = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
    assert {field.name for field in dataclasses.fields(made)} - unused <= named
    numbers = [line for line in text.splitlines() if re.search(r"^ *\w+: [^#]*(?<=[ \[])\d", line)]
    assert numbers and not [line for line in numbers if "# own" not in line and "Wan's own" not in line]
