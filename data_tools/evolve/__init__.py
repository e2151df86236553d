"""`v4e-shards evolve`: evolution prompts, each an instruction rewritten as how the picture changes over time.

Three writers: `template` (rules, the default), `local` (a vision-language model here), `server` (one elsewhere). An
answer that is unfit is replaced by the template's, and counted. Run again, it asks only for what is missing.
"""

from data_tools.evolve.template import FAMILY, STYLE_LOOKS, TASKS, Evolution, caption, family_of, write
from data_tools.evolve.verb import Report, add_arguments, add_evolutions, run

__all__ = [
    "FAMILY",
    "STYLE_LOOKS",
    "TASKS",
    "Evolution",
    "Report",
    "add_arguments",
    "add_evolutions",
    "caption",
    "family_of",
    "run",
    "write",
]
