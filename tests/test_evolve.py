"""The template writer: captions that models were trained on, tasks of any instruction; and which answers are taken."""

import json
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import world
from data_tools.evolve import FAMILY, STYLE_LOOKS, TASKS, answers, caption, family_of, write
from data_tools.evolve.template import is_chinese
from v4e.errors import DataError

TEDBENCH = Path(__file__).parents[2] / "shared" / "data" / "tedbench" / "triplets.jsonl"
STAYS = "everything else stays unchanged."
SHAPES = "every shape stays where it is."
STAYS_ZH = "其余部分保持不变。"

LABELS = {  # a person's tasks
    "add": (
        "Add a red scarf to the dog",
        "put a hat on the cat",
        "Insert a lighthouse on the cliff",
        "Give the boy a balloon",
        "place two cups on the table",
        "add a rainbow over the hills",
        "A photo of a cat wearing a hat",
        "在桌子上放一个苹果",
        "给小狗戴上一顶帽子",
        "在天空中添加一只鸟",
    ),
    "remove": (
        "Remove the people in the background",
        "get rid of the power lines",
        "Take the cup off the table",
        "Could you erase the watermark, please?",
        "Remove the snow from the picture",
        "delete the man's glasses",
        "去掉图中的路人",
        "把桌上的杯子移除",
        "删除左边的汽车",
    ),
    "replace": (
        "Replace the apple with a pear",
        "Swap the bicycle for a motorbike",
        "Turn the cat into a tiger",
        "change the dog to a wolf",
        "The car should be a truck",
        "把狗换成一只猫",
        "将汽车替换为自行车",
        "把苹果变成橙子",
    ),
    "background": (
        "Change the background to a forest",
        "Put the woman on a sandy beach",
        "make the background blurry",
        "A photo of a dog in the snow",
        "A cat in a grass field",
        "把背景换成海边",
        "将背景替换为雪山",
        "Place the car in a desert",
        "一只狗在雪地里",
    ),
    "colour": (
        "Make the car red",
        "change the colour of the door to green",
        "Paint the walls light blue",
        "Turn the roses from red to white",
        "change the blue shirt to yellow",
        "把汽车变成红色",
        "将衣服的颜色改成蓝色",
        "The bus should be pink",
    ),
    "material": (
        "Make the bench out of glass",
        "change the material of the cup to ceramic",
        "Turn the horse into a bronze sculpture",
        "make the table wooden",
        "Give the sofa a leather texture",
        "把杯子变成玻璃材质",
        "将雕像的材质改为大理石",
    ),
    "motion": (
        "Make the dog sit down",
        "Have the man raise his arms",
        "Let the bird spread its wings",
        "Close the door",
        "A photo of a jumping cat",
        "Two dogs growling at each other",
        "Open the book",
        "make the woman wave at the camera",
        "turn the horse's head to the left",
        "让狗坐下",
        "让男人举起右手",
    ),
    "style": (
        "Turn it into an oil painting",
        "Make the photo look like a pencil drawing",
        "Convert to anime style",
        "In the style of Van Gogh",
        "Redraw this as a watercolor",
        "transform the image into pixel art",
        "把图片变成水彩画",
        "转换为动漫风格",
        "改成梵高风格",
    ),
    "text": (
        "Replace the text 'TRAIN' with 'PLANE'",
        "change the sign to say OPEN",
        "Add the words 'Happy Birthday' at the top",
        "remove the text on the wall",
        "Change 'SALE' to 'SOLD'",
        "把文字“你好”改成“再见”",
        "在左上角添加文字“春天”",
    ),
    "tone": (
        "make it night",
        "Make it snow",
        "Make the picture black and white",
        "apply a sepia tone",
        "change the season to autumn",
        "Make the lighting warmer",
        "increase the contrast",
        "turn day into dusk",
        "把白天变成夜晚",
        "让天空下雪",
        "将照片变成黑白",
        "增加画面亮度",
    ),
    "portrait": (
        "Make her smile",
        "make the man look older",
        "Give her long blonde hair",
        "remove the wrinkles from his face",
        "Add a beard to the man",
        "Make the woman's skin smoother",
        "Remove his beard.",
        "让她微笑",
        "给男人加上胡子",
        "让她看起来更年轻",
        "把头发染成金色",
    ),
    "move": (
        "Move the lamp to the top left corner",
        "slide the vase to the right",
        "把椅子移到左边",
    ),
    "other": (
        "What would it look like if the house were older?",
        "A photo of a birthday cake",
        "make it better",
    ),
}
SECOND = {  # a second list, written after the rules
    "add": (
        "Have there be a dragon in the sky",
        "add some flowers to the vase",
        "There should be a boat on the lake",
        "Put sunglasses on the man",
        "Draw a crown on the king's head",
        "在湖面上加一艘小船",
        "给女孩戴上一副墨镜",
    ),
    "remove": (
        "Take away the chair on the left",
        "remove the bird",
        "Get rid of her necklace",
        "Please wipe off the stains from the shirt",
        "请把背景中的人去掉",
        "消除照片上的水印",
    ),
    "replace": (
        "Exchange the cake for a pizza",
        "Change the horse into a zebra",
        "Let the tower be replaced by a castle",
        "Substitute the candle with a lamp",
        "用玫瑰代替郁金香",
        "把天鹅变成鸭子",
    ),
    "background": (
        "swap the background for a snowy mountain",
        "Set the scene in a library",
        "Change the setting to outer space",
        "Make it look like he is on the beach",
        "换一个森林背景",
        "把人物放到沙滩上",
    ),
    "colour": (
        "Color the umbrella yellow",
        "Could you turn the sofa dark green?",
        "change the hat's colour to purple",
        "Make the flowers blue",
        "把帽子的颜色换成红色",
        "将沙发改为绿色",
    ),
    "material": (
        "make the jacket leather",
        "transform the house to be made of chocolate",
        "Change the bottle's material to metal",
        "把桌子做成木头的",
    ),
    "motion": (
        "make the cat jump",
        "have him ride the bicycle",
        "The dog should be running",
        "Raise her left hand",
        "A man riding a horse",
        "let the two people shake hands",
        "让小猫跳起来",
        "使老人挥手",
    ),
    "style": (
        "Make it a Picasso painting",
        "Render the photo in cyberpunk style",
        "turn this into a comic book",
        "as a watercolor painting",
        "将图像转换为油画",
        "把照片变成宫崎骏风格的动画",
    ),
    "text": (
        "write 'OPEN' on the door",
        "Change the word 'LOVE' to 'HOPE'",
        'Replace the title with "Winter Sale"',
        "delete the caption",
        "把招牌上的字改成“茶馆”",
    ),
    "tone": (
        "Make it look like a rainy day",
        "Change the time of day to sunset",
        "add a warm filter",
        "It should be foggy",
        "Make the image brighter",
        "turn the scene into winter at dusk",
        "把画面调成冷色调",
        "把季节换成秋天",
    ),
    "portrait": (
        "give the woman red lipstick",
        "make him bald",
        "Change her hairstyle to a ponytail",
        "make the girl look sad",
        "whiten his teeth",
        "让男人变老",
        "去除脸上的皱纹",
    ),
    "move": (
        "Shift the dog to the left side of the picture",
        "把杯子移动到桌子右边",
    ),
}

PROMPTS = {
    "Replace the text 'TRAIN' with 'PLANE'.": (
        f"Static camera. The text 'TRAIN' steadily dissolves into 'PLANE'; {STAYS}"
    ),
    "Remove his beard.": (
        f"Static camera. His beard steadily fades out until it is gone and what lies behind it shows; {STAYS}"
    ),
    "A photo of a dog in the snow.": (
        "Static camera. Starting from this picture, the scene steadily evolves until it fits the words: "
        f"A photo of a dog in the snow; {STAYS}"
    ),
    "Transform to sketch style.": (
        "Static camera. The whole picture steadily becomes a pencil sketch on white paper; "
        "every shape stays where it is."
    ),
    "Replace background with snowy mountain.": (
        f"Static camera. The scenery behind steadily dissolves into snowy mountain while the foreground stays; {STAYS}"
    ),
    "Change the color of the car to red": (
        f"Static camera. The car steadily changes its colour until it is fully red; {STAYS}"
    ),
    "Please paint the walls light blue!": (
        f"Static camera. The walls steadily changes its colour until it is fully light blue; {STAYS}"
    ),
    "Turn the man into a zombie": f"Static camera. The man steadily dissolves into a zombie; {STAYS}",
    "Move the lamp to the top left corner": (
        f"Static camera. The lamp steadily slides across the picture until it rests at the top left; {STAYS}"
    ),
    "add a bird in the middle of the picture": (
        f"Static camera. A bird steadily fades in at the centre until it is fully there; {STAYS}"
    ),
    "put a hat on the dog": f"Static camera. A hat steadily fades in on the dog until it is fully there; {STAYS}",
    "Insert a cat": f"Static camera. A cat steadily fades in until it is fully there; {STAYS}",
    "make the bench out of glass": (
        f"Static camera. The bench steadily changes from what it is now until it is fully glass; {STAYS}"
    ),
    "make her smile": f"Static camera. From the present pose, she steadily moves until this is done: smile; {STAYS}",
    "turn day into dusk": (
        "Static camera. The whole picture steadily becomes a picture in other light and tones, "
        "until it fits the words: dusk; every shape stays where it is."
    ),
    "Convert to anime style": (
        "Static camera. The whole picture steadily becomes a picture of this style: anime style; "
        "every shape stays where it is."
    ),
    "把狗换成一只猫": f"固定镜头。狗逐渐化为一只猫；{STAYS_ZH}",
    "给小狗戴上一顶帽子": f"固定镜头。在小狗身上，一顶帽子逐渐浮现，直到完全出现；{STAYS_ZH}",
    "请把汽车变成红色。": f"固定镜头。汽车的颜色逐渐变化，直到完全成为红色；{STAYS_ZH}",
    "去掉图中的路人": f"固定镜头。图中的路人逐渐淡出，直到完全消失，露出后面的景物；{STAYS_ZH}",
    "让天空下雪": "固定镜头。整个画面逐渐变成冬日的雪景；所有形状都留在原处。",
    "让狗坐下": f"固定镜头。狗从现在的姿态开始逐渐动作，直到做到：坐下；{STAYS_ZH}",
}

# What the shipped models were trained on; see data_tools/world.py, which calls `caption` with these words.
CAPTIONS = {
    "add": "The red circle smoothly fades in at the top left until it is fully there; " + STAYS,
    "remove": "The red circle smoothly fades out until it is gone and what lies behind it shows; " + STAYS,
    "replace": "The red circle smoothly dissolves into a blue star; " + STAYS,
    "recolour": "The red circle smoothly changes its colour until it is fully a blue star; " + STAYS,
    "move": "The red circle smoothly slides across the picture until it rests at the top left; " + STAYS,
    "background": "The scenery behind smoothly dissolves into a blue star while the foreground stays; " + STAYS,
    "other": (
        "Starting from this picture, the scene smoothly evolves until it fits the words: the red circle; " + STAYS
    ),
    "grayscale": "The whole picture smoothly becomes a grayscale picture without colour; " + SHAPES,
    "sepia": "The whole picture smoothly becomes a sepia picture in brown tones; " + SHAPES,
    "sketch": "The whole picture smoothly becomes a pencil sketch on white paper; " + SHAPES,
    "night": "The whole picture smoothly becomes a dark blue night scene; " + SHAPES,
    "snow": "The whole picture smoothly becomes a snowy winter scene; " + SHAPES,
}


@pytest.mark.parametrize("change", CAPTIONS)
def test_captions_are_those_that_models_were_trained_on(change):
    told = caption(change, subject="the red circle", result="a blue star", place="top left", pace="smoothly")
    assert told == f"Static camera. {CAPTIONS[change]}"


def test_the_world_says_byte_for_byte_what_it_said():
    """132 captions of all tasks, hashed before this writer learnt other languages and tasks."""
    drawn = [world.draw(5, i, split) for split in ("train", "heldout") for i in range(22)]
    said = [c for e in drawn for c in (e.evolution, e.caption("steadily", False), e.caption("smoothly", True))]
    assert blake2b("\n".join(said).encode(), digest_size=16).hexdigest() == "ccf8693b1442438fd975e6124d903fda"


@pytest.mark.parametrize("instruction", PROMPTS)
def test_instructions_from_the_wild(instruction):
    assert write(instruction).prompt == PROMPTS[instruction]


@pytest.mark.parametrize("labels", [LABELS, SECOND], ids=["labels", "second"])
def test_tasks_are_those_that_a_person_gave(labels):
    """The rules were written with the first list at hand; the second was met by 65 of 71, then mended."""
    wrong = [(i, task, write(i).task) for task, listed in labels.items() for i in listed if write(i).task != task]
    assert wrong == [] and set(labels) <= set(TASKS) and sum(map(len, labels.values())) >= 60


def test_families():
    assert {t for t, family in TASKS.items() if family == "spatial"} == {"add", "remove", "replace", "move", "text"}
    assert set(TASKS.values()) == {"spatial", "temporal"} and FAMILY.items() >= TASKS.items()
    assert write("remove the cat").family == "spatial" and write("make it night").family == "temporal"
    assert [family_of(t) for t in ("recolour", "snow", "sketch", "weather")] == ["temporal"] * 3 + [""]


def test_a_description_is_no_style_and_keeps_its_words():
    """A picture that is described may hold snow, night, a drawing: the whole of it is the end, not one word."""
    for text in ("A photo of a dog in the snow", "A city at night", "A child with a pencil", "一只狗在雪地里"):
        prompt = write(text).prompt
        assert text in prompt and not any(look in prompt for look in STYLE_LOOKS.values())


@pytest.mark.skipif(not TEDBENCH.is_file(), reason="needs ../shared/data/tedbench")
def test_tedbench_describes_and_no_description_becomes_a_style():
    said = [json.loads(line)["instruction"] for line in TEDBENCH.read_text().splitlines()]
    written = [write(text) for text in said]
    assert len(said) == 69 and all(text.strip(".") in e.prompt for text, e in zip(said, written, strict=True))
    assert not {e.task for e in written} & {"style", "replace", "remove", "text", "colour"}
    assert sum(e.task == "motion" for e in written) >= 30 and sum(e.task == "other" for e in written) <= 30


@pytest.mark.parametrize("blank", ["", " ", "\n\t", ".", " . ", "!!!", "。！"])
def test_an_empty_instruction_is_an_error(blank):
    with pytest.raises(DataError, match="the instruction is empty"):
        write(blank)


def test_spaces_lines_and_full_stops_do_not_matter():
    plain = write("remove the red circle")
    assert write("  remove\n the   red circle. ") == plain
    assert write("REMOVE the red circle!").prompt == plain.prompt
    assert write("Could you please remove the red circle?").prompt == plain.prompt


def test_the_language_is_that_of_most_words():
    assert is_chinese("把 OPEN 改成“关门”") and not is_chinese("Replace the text '你好' with 'hello'")
    assert write("把文字 OPEN 改成 CLOSED").prompt.startswith("固定镜头。")


def test_a_caption_has_the_pace_it_is_told():
    told = caption("remove", subject="the red circle", pace="slowly at first")
    assert told.startswith("Static camera. The red circle slowly at first fades out")


@settings(max_examples=100, deadline=None)
@given(
    st.text(max_size=80)
    | st.sampled_from(["make ", "remove ", "把", "让", "add "]).flatmap(lambda w: st.text(max_size=30).map(w.__add__))
)
def test_any_text_is_a_prompt_or_empty(text):
    try:
        evolution = write(text)
    except DataError:
        return
    camera, end = ("固定镜头。", "。") if is_chinese(text) else ("Static camera. ", ".")
    assert evolution.prompt.startswith(camera) and evolution.prompt.endswith(end)
    assert "\n" not in evolution.prompt and evolution == write(text)
    assert evolution.task in TASKS and evolution.family in ("spatial", "temporal")


# ------------------------------------------------------------------------------------------------- answers

GOOD = """Start: a grey cat lies on the sofa
Process: its fur takes on colour from the head to the tail.
End: the cat on the sofa is orange
Unchanged: the sofa and the room stay as they are."""


def test_an_answer_becomes_a_prompt_with_both_states():
    assert answers.prompt_of(GOOD, chinese=False) == (
        "Static camera. At first: a grey cat lies on the sofa. Then: its fur takes on colour from the head to the tail."
        " At last: the cat on the sofa is orange. The sofa and the room stay as they are."
    )


@pytest.mark.parametrize(
    "dressed",
    [
        f"<think>Start: hm\nEnd: hm</think>\n{GOOD}",
        f"Sure! Here it is.\n\n{GOOD}\n",
        GOOD.replace("Start:", "**Start:**").replace("End:", "- End:").replace("Process:", "PROCESS :"),
        GOOD.replace(" lies on", "\nlies on"),
    ],
)
def test_dressed_up_answers_are_the_same(dressed):
    assert answers.prompt_of(dressed, chinese=False) == answers.prompt_of(GOOD, chinese=False)


def test_an_answer_in_chinese():
    said = "Start：沙发上有一只灰猫。\nProcess：毛色从头到尾逐渐变化。\nEnd：沙发上的猫是橙色的。"
    assert answers.prompt_of(said, chinese=True) == (
        "固定镜头。起初：沙发上有一只灰猫。然后：毛色从头到尾逐渐变化。最后：沙发上的猫是橙色的。其余部分保持不变。"
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no start"),
        ("The cat turns orange.", "no start"),
        (GOOD.split("End")[0], "no end"),
        (GOOD.replace("its fur takes on colour from the head to the tail.", "?"), "no process"),
        (GOOD.replace("the cat on the sofa is orange", "A grey cat lies on the sofa!"), "same states"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I cannot assist with this request.", "refusal"),
        ("抱歉，我无法处理这个请求。", "refusal"),
        (GOOD.replace("a grey cat lies on the sofa", "I don't see any images"), "refusal"),
        (GOOD.replace("a grey cat", "a grey " + "very long and longer and " * 40), "too long"),
        (GOOD.replace("a grey cat", "a grey " + "cat and dog " * 12), "repeats itself"),
    ],
)
def test_unfit_answers_say_why(answer, reason):
    with pytest.raises(answers.Unfit, match=f"^{reason}$"):
        answers.prompt_of(answer, chinese=False)
