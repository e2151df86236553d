"""Evolution prompts: an instruction rewritten as how the picture changes over time.

The `template` writer is pure rules, so the same instruction always gives the same prompt. It says the start, the
process and its pace, the end, what stays untouched, and that the camera does not move.
"""

import argparse
import re
from dataclasses import dataclass

from v4e.errors import DataError

FAMILY = {
    "add": "spatial",
    "remove": "spatial",
    "replace": "spatial",
    "move": "spatial",
    "recolour": "temporal",
    "background": "temporal",
    "style": "temporal",
    "other": "temporal",
}
STYLE_LOOKS = {
    "grayscale": "a grayscale picture without colour",
    "sepia": "a sepia picture in brown tones",
    "sketch": "a pencil sketch on white paper",
    "night": "a dark blue night scene",
    "snow": "a snowy winter scene",
}
STYLE_WORDS = {
    "grayscale": r"gr[ae]y ?scale|black[- ]and[- ]white|monochrome|remove all colou?r",
    "sepia": r"sepia",
    "sketch": r"sketch|pencil|drawing",
    "night": r"night",
    "snow": r"snow|winter",
}
# Each pattern names its parts as `caption` does; the first that matches decides.
PATTERNS = (
    ("background", r"(?:change|replace|set|swap) (?:the )?background (?:to|with|for|by) (?P<result>.+)"),
    ("background", r"put .*in front of (?P<result>.+)"),
    ("move", r"(?:move|shift|slide|drag) (?P<subject>.+?) (?:in)?to (?P<place>.+)"),
    ("replace", r"(?:replace|swap|substitute|exchange) (?P<subject>.+?) (?:with|for|by) (?P<result>.+)"),
    ("recolour", r"change the colou?r of (?P<subject>.+?) to (?P<result>\w+)"),
    ("recolour", r"(?:recolou?r|paint|colou?r|dye) (?P<subject>.+) (?:to |in )(?P<result>\w+)"),
    ("recolour", r"(?:turn|make|change|paint|colou?r|dye) (?P<subject>.+) (?:to |into )?(?P<result>{colour})"),
    ("replace", r"(?:turn|change|transform) (?P<subject>.+?) into (?P<result>.+)"),
    ("remove", r"(?:remove|erase|delete|take away|get rid of) (?P<subject>.+)"),
    ("add", r"(?:add|put|place|insert|draw) (?P<subject>.+?) (?:at|in|on|to|into|near) (?P<place>.+)"),
    ("add", r"(?:add|put|place|insert|draw) (?P<subject>.+)"),
)
WHOLE_PICTURE = r"\b(?:it|this|day|everything|picture|photo|image|scene|all colou?r)\b"
COLOUR_WORDS = r"(?:\w+[- ])?(?:red|orange|yellow|green|blue|purple|white|black|pink|brown|gr[ae]y|gold|silver)"


@dataclass(frozen=True)
class Evolution:
    """An evolution prompt and how it was made."""

    prompt: str
    task: str
    family: str
    writer: str = "template"
    version: int = 1


def caption(task: str, *, subject: str = "", result: str = "", place: str = "", pace: str = "steadily") -> str:
    """The evolution prompt of one edit; ``subject`` and ``result`` carry their articles."""
    if task in STYLE_LOOKS:
        process = f"The whole picture {pace} becomes {STYLE_LOOKS[task]}; every shape stays where it is."
        return f"Static camera. {process}"
    process = {
        "add": f"{subject} {pace} fades in{f' at the {place}' if place else ''} until it is fully there",
        "remove": f"{subject} {pace} fades out until it is gone and what lies behind it shows",
        "replace": f"{subject} {pace} dissolves into {result}",
        "recolour": f"{subject} {pace} changes its colour until it is fully {result}",
        "move": f"{subject} {pace} slides across the picture until it rests at the {place}",
        "background": f"the scenery behind {pace} dissolves into {result} while the foreground stays",
        "other": f"starting from this picture, the scene {pace} evolves until it fits the words: {subject}",
    }[task]
    return f"Static camera. {process[0].upper()}{process[1:]}; everything else stays unchanged."


def write(instruction: str) -> Evolution:
    """Rewrite an instruction.

    Raises:
        DataError: the instruction is empty.
    """
    text = re.sub(r"\s+", " ", instruction).strip().rstrip(".!")
    if not text:
        raise DataError("the instruction is empty", fix="say what should change, such as `make it snow`")
    if style := _style_of(text, WHOLE_PICTURE):
        return Evolution(caption(style), style, FAMILY["style"])
    for task, pattern in PATTERNS:
        if found := re.fullmatch(pattern.format(colour=COLOUR_WORDS), text, re.IGNORECASE):
            return _from_parts(task, **_clean(found.groupdict()))
    if style := _style_of(text):
        return Evolution(caption(style), style, FAMILY["style"])
    return Evolution(caption("other", subject=text), "other", FAMILY["other"])


def _style_of(text: str, about: str = "") -> str:
    """The style a text names, if it also matches ``about``; else ""."""
    if not re.search(about, text, re.IGNORECASE):
        return ""
    return next((s for s, words in STYLE_WORDS.items() if re.search(rf"\b(?:{words})", text, re.IGNORECASE)), "")


def _from_parts(task: str, **parts: str) -> Evolution:
    return Evolution(caption(task, **parts), task, FAMILY[task])


def _clean(parts: dict[str, str | None]) -> dict[str, str]:
    """Places without article and corner, so that all wordings of one place read the same."""
    clean = {k: v.strip() for k, v in parts.items() if v}
    if "place" in clean:
        place = re.sub(r"^(?:the|its|his|her)\s+", "", clean["place"], flags=re.IGNORECASE)
        place = re.sub(r"\s+(?:corner|side|edge|of the (?:picture|image|photo))\b.*$", "", place, flags=re.IGNORECASE)
        clean["place"] = re.sub(r"\b(?:center|middle)\b", "centre", place, flags=re.IGNORECASE)
    return clean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `v4e-shards evolve`."""
    parser.add_argument("folder", help="folder written by ingest")
    parser.add_argument("--again", action="store_true", help="also rewrite prompts that evolve wrote before")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from data_tools.ingest import add_evolutions  # ingest itself writes prompts with this module
    from v4e.journal import progress

    counts = add_evolutions(args.folder, again=args.again, watch=lambda rows: progress(rows, "evolve"))
    print(", ".join(f"{n} {task}" for task, n in counts.most_common()) or "every prompt was there already")
    return 0
