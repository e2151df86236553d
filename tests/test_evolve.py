"""Evolution prompts: pure rules that cope with anybody's instructions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.evolve import FAMILY, STYLE_LOOKS, caption, write
from v4e.errors import DataError

STAYS = "everything else stays unchanged."

PROMPTS = {
    "Replace the text 'TRAIN' with 'PLANE'.": (
        "replace",
        f"Static camera. The text 'TRAIN' steadily dissolves into 'PLANE'; {STAYS}",
    ),
    "Remove his beard.": (
        "remove",
        f"Static camera. His beard steadily fades out until it is gone and what lies behind it shows; {STAYS}",
    ),
    "A photo of a sitting dog.": (
        "other",
        "Static camera. Starting from this picture, the scene steadily evolves until it fits the words: "
        f"A photo of a sitting dog; {STAYS}",
    ),
    "Transform to sketch style.": (
        "sketch",
        "Static camera. The whole picture steadily becomes a pencil sketch on white paper; "
        "every shape stays where it is.",
    ),
    "Replace background with snowy mountain.": (
        "background",
        "Static camera. The scenery behind steadily dissolves into snowy mountain while the foreground stays; " + STAYS,
    ),
    "Change the color of the car to red": (
        "recolour",
        f"Static camera. The car steadily changes its colour until it is fully red; {STAYS}",
    ),
    "Turn the man into a zombie": ("replace", f"Static camera. The man steadily dissolves into a zombie; {STAYS}"),
    "Move the lamp to the top left corner": (
        "move",
        f"Static camera. The lamp steadily slides across the picture until it rests at the top left; {STAYS}",
    ),
    "add a bird in the middle of the picture": (
        "add",
        f"Static camera. A bird steadily fades in at the centre until it is fully there; {STAYS}",
    ),
    "Insert a cat": ("add", f"Static camera. A cat steadily fades in until it is fully there; {STAYS}"),
}


@pytest.mark.parametrize("instruction", PROMPTS)
def test_instructions_from_the_wild(instruction):
    task, prompt = PROMPTS[instruction]
    evolution = write(instruction)
    assert (evolution.task, evolution.prompt) == (task, prompt)
    assert evolution.family == FAMILY["style" if task in STYLE_LOOKS else task]
    assert (evolution.writer, evolution.version) == ("template", 1)


@pytest.mark.parametrize(
    ("instruction", "task"),
    [
        ("make it snow", "snow"),
        ("Turn day into night!", "night"),
        ("turn the picture black and white", "grayscale"),
        ("make the photo look like a pencil drawing", "sketch"),
        ("apply a sepia tone", "sepia"),
        ("Put the cat in front of the Eiffel tower", "background"),
        ("get rid of the car", "remove"),
        ("take away the two people on the left", "remove"),
        ("Make the cat orange", "recolour"),
        ("paint the door in turquoise", "recolour"),
        ("dye her hair dark red", "recolour"),
        ("swap the apple for a pear", "replace"),
        ("drag the boat to the right", "move"),
        ("put a hat on the dog", "add"),
        ("把猫变成橙色", "other"),
        ("What would it look like if the house were older?", "other"),
    ],
)
def test_tasks_of_other_wordings(instruction, task):
    assert write(instruction).task == task


@pytest.mark.parametrize("blank", ["", " ", "\n\t", ".", " . ", "!!!"])
def test_an_empty_instruction_is_an_error(blank):
    with pytest.raises(DataError, match="the instruction is empty"):
        write(blank)


def test_spaces_lines_and_full_stops_do_not_matter():
    plain = write("remove the red circle")
    assert write("  remove\n the   red circle. ") == plain
    assert write("REMOVE the red circle!").prompt == plain.prompt


def test_a_caption_has_the_pace_it_is_told():
    told = caption("remove", subject="the red circle", pace="slowly at first")
    assert told.startswith("Static camera. The red circle slowly at first fades out")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_prompt_or_empty(text):
    try:
        evolution = write(text)
    except DataError:
        return
    assert evolution.prompt.startswith("Static camera. ") and evolution.prompt.endswith(".")
    assert "\n" not in evolution.prompt and evolution == write(text)
    assert evolution.family in ("spatial", "temporal")
