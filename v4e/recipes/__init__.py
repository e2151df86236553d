"""The table of recipes, imported on demand."""

import difflib
from importlib import import_module

from v4e.errors import ConfigError

TABLE = {
    "video4edit": ("v4e.recipes.video4edit", "Video4Edit"),
    "flow_matching": ("v4e.recipes.flow_matching", "FlowMatching"),
}


def pick(name: str) -> type:
    """The dataclass of a recipe.

    Raises:
        ConfigError: no recipe has this name; the nearest one is named.
    """
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, n=1, cutoff=0.0)
        raise ConfigError(f"unknown recipe {name!r}", fix=f"did you mean {near[0]}? known: {', '.join(TABLE)}")
    module, cls = TABLE[name]
    return getattr(import_module(module), cls)
