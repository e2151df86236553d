"""The house stands: floors, one home per worldly thing, short functions, and documents that tell the truth."""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from v4e import config
from v4e.recipes import TABLE, pick

ROOT = Path(__file__).parents[1]
ROOMS = sorted(p for top in ("v4e", "data_tools") for p in (ROOT / top).rglob("*.py"))
SOURCES = [*ROOMS, *sorted((ROOT / "tests").glob("*.py"))]
DOCS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LONGEST, MEDIAN = 60, 10

FLOOR = {  # a module may import modules of its own floor and below (docs/architecture.md, section 2)
    "errors": 0, "nouns": 0, "verbs": 0, "config": 0,
    "flow": 1, "losses": 1, "straightness": 1, "dist": 1, "journal": 1,
    "models": 2, "data": 2,
    "pipelines": 3, "provenance": 3, "photos": 3, "jobs": 3,
    "recipes": 4, "train": 4, "eval": 4, "export": 4, "plan": 4, "doctor": 4, "studio": 4,
    "cli": 5, "app": 5,
}  # fmt: skip
STRANGERS = [
    ("models", "data"),
    *(("recipes", room) for room in ("train", "eval", "export", "plan", "doctor")),
]
ONLY_IN = {  # third parties with one home
    "wandb": ("v4e/journal.py",),
    "gradio": ("v4e/app.py",),
    "rich": ("v4e/journal.py",),
    "tqdm": ("v4e/journal.py",),
    "deepspeed": ("v4e/train/",),
    "omegaconf": ("v4e/config.py",),
    "webdataset": ("v4e/data/",),
    "httpx": ("v4e/models/vlm.py",),
    "peft": ("v4e/models/",),
    "xformers": ("v4e/models/",),
    "transformers": ("v4e/models/", "data_tools/"),
    "diffusers": ("v4e/models/", "v4e/pipelines.py", "v4e/export.py", "data_tools/"),
    "skimage": ("data_tools/",),
    "sklearn": ("data_tools/",),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in the file; ``from a import b`` gives a.b."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Dotted names of what a file calls."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def room_of(dotted: str) -> str | None:
    """``v4e.models.wan.x`` -> ``models``; None for what is no room of v4e."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "v4e" and len(parts) > 1 and parts[1] in FLOOR else None


def inner(path: Path) -> list[tuple[str, str]]:
    """(own room, imported room) pairs of a module of v4e."""
    own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return [(own, other) for dotted in imports(path) if own and (other := room_of(dotted)) and other != own]


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_floors(path):
    pairs = inner(path)
    assert [p for p in pairs if FLOOR[p[1]] > FLOOR[p[0]]] == []
    assert [p for p in pairs if p in STRANGERS or p[::-1] in STRANGERS] == []


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_every_room_is_on_the_plan(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert parts[0] == "data_tools" or parts[1] in {*FLOOR, "__init__", "assets"}


def test_the_yard_and_the_house():
    """No room but the door may know the yard, and the yard does not come in by the door."""
    inside = [p for p in ROOMS if p.is_relative_to(ROOT / "v4e") and name_of(p) != "v4e/cli.py"]
    assert [name_of(p) for p in inside if any(n.split(".")[0] == "data_tools" for n in imports(p))] == []


def test_recipes_do_not_read_each_other():
    pages = [p for p in ROOMS if p.parent.name == "recipes" and p.name != "__init__.py"]
    assert [name_of(p) for p in pages if any(n.startswith("v4e.recipes") for n in imports(p))] == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_third_parties_stay_at_home(package):
    users = [name_of(p) for p in ROOMS if any(n.split(".")[0] == package for n in imports(p))]
    assert [u for u in users if not u.startswith(ONLY_IN[package])] == []


def test_only_dist_reads_the_environment():
    named = re.compile(r"\bos\.(environ|getenv|putenv)\b|from os import .*(environ|getenv)")
    assert [name_of(p) for p in ROOMS if named.search(p.read_text())] in ([], ["v4e/dist.py"])


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_untrusted_is_executed(path):
    """No pickle, no yaml tags, no eval: a shard, a config or a checkpoint is data."""
    forbidden = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}
    assert [n for n in imports(path) if n.split(".")[0] in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}] == []
    for name, call in calls(path):
        words = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in forbidden, f"{name} in line {call.lineno}"
        assert name != "torch.load" or words.get("weights_only") == "True", f"torch.load in line {call.lineno}"
        assert "allow_pickle" not in words and words.get("shell") != "True", f"line {call.lineno}"
        assert words.get("trust_remote_code") != "True", f"line {call.lineno}"


@pytest.mark.parametrize("path", [p for p in ROOMS if "recipes" in p.parts or "train" in p.parts], ids=name_of)
def test_no_capability_is_probed(path):
    """Recipes and the loop know what they are given; nobody asks an object what it can do."""
    probes = [c.lineno for name, c in calls(path) if name == "hasattr" or (name == "getattr" and len(c.args) == 3)]
    assert probes == []


def functions() -> Iterator[tuple[int, str]]:
    """Lines of every function's body without its docstring, and where it stands."""
    for path in ROOMS:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None and len(node.body) > 1
                first = node.body[1 if documented else 0].lineno
                yield node.end_lineno - first + 1, f"{name_of(path)}:{node.lineno} {node.name}"


def test_functions_are_short():
    lengths = [*functions()]
    assert [where for length, where in lengths if length > LONGEST] == []
    assert median(length for length, _ in lengths) <= MEDIAN


@pytest.mark.parametrize("path", [p for p in ROOMS if p.name != "__init__.py" or p.stat().st_size], ids=name_of)
def test_every_room_says_what_it_is_for(path):
    assert ast.get_docstring(tree_of(path))


def test_no_script_shadows_the_standard_library():
    assert not {p.stem for p in (ROOT / "data_tools").glob("*.py")} & {"inspect", "types", "json", "io", "random"}


# ---------------------------------------------------------------------------------------- what we say is true


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_loads(path):
    made = config.load(path, [], pick)
    assert config.config_hash(made)
    assert path.read_text().startswith("# COMMAND: ")


@pytest.mark.parametrize("recipe", TABLE)
def test_every_recipe_has_configs_and_a_page(recipe):
    for place in (f"configs/{recipe}.yaml", f"configs/nano/{recipe}.yaml", f"docs/recipes/{recipe}.md"):
        assert (ROOT / place).is_file(), place


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_path_named_in_the_docs_exists(path):
    text = path.read_text()
    named = set(re.findall(r"(?<![\w./-])(?:v4e|configs|data_tools|docs|tests|launch)/[\w./-]*\w", text))
    linked = {t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert [name for name in sorted(linked - {""}) if not (path.parent / name).exists()] == []


def commands(text: str) -> list[str]:
    """Lines of fenced blocks and COMMAND comments that call v4e; continued lines are joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    fenced = "\n".join(body for language, body in blocks if language in ("", "bash", "sh", "console"))
    announced = "\n".join(re.findall(r"^# COMMAND: (.*)", text, re.M))
    lines = f"{fenced}\n{announced}".replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines]


@pytest.mark.parametrize("path", [*DOCS, *CONFIGS], ids=name_of)
def test_every_command_in_the_docs_parses(path):
    from v4e import cli

    for line in commands(path.read_text()):
        if words := cli_words(line):
            cli.parser().parse_args(words)


def cli_words(line: str) -> list[str]:
    """The arguments behind ``v4e``, ``python -m v4e.cli`` or a deepspeed launch of it; none for other programs."""
    words = shlex.split(line, comments=True)
    for marker in ("v4e", "v4e.cli"):
        if marker in words and (marker == "v4e.cli" or words[0] == marker):
            return words[words.index(marker) + 1 :]
    return []


def test_what_is_pinned_is_in_the_tested_ranges():
    files = [(ROOT / name).read_text() for name in ("constraints.txt", "constraints-app.txt")]
    pins = {
        canonicalize_name(k): v
        for text in files
        for k, v in re.findall(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)", text, re.M)
    }
    asked = [
        Requirement(each) for each in re.findall(r'"([a-z][\w-]*(?:\[\w+\])?>=[^"]+)"', (ROOT / "setup.py").read_text())
    ]
    held = [each for each in asked if each.name in pins]
    assert [each.name for each in asked if each not in held] == ["xformers"]  # which wants a GPU's torch
    assert [str(each) for each in held if not each.specifier.contains(pins[each.name], prereleases=True)] == []


def test_console_scripts_find_their_packages():
    """Without an __init__ a folder is importable from the repository's root, and missing once installed."""
    from setuptools import find_packages

    assert {"v4e", "v4e.recipes", "data_tools"} <= set(find_packages(str(ROOT), include=["v4e", "v4e.*", "data_tools"]))
