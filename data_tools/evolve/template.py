"""The `template` writer: pure rules, so that the same instruction always gives the same prompt.

A prompt says the start, the process and its pace, the end, what stays untouched, and that the camera does not move; in
the instruction's own language, which the teacher's text encoder reads both of.
"""

import re
from dataclasses import dataclass

from data_tools.evolve.chinese import CHINESE
from data_tools.evolve.english import ENGLISH
from data_tools.evolve.language import Parts
from v4e.errors import DataError

NAME, VERSION = "template", 2
# Spatial: something comes, goes, or gives its place to another. Temporal: what is there changes its state.
TASKS = {
    "add": "spatial",
    "remove": "spatial",
    "replace": "spatial",
    "move": "spatial",
    "text": "spatial",
    "background": "temporal",
    "colour": "temporal",
    "material": "temporal",
    "motion": "temporal",
    "style": "temporal",
    "tone": "temporal",
    "portrait": "temporal",
    "other": "temporal",
}
FAMILY = {**TASKS, "recolour": "temporal"}  # with the world's word for colour
STYLE_LOOKS = {
    "grayscale": "a grayscale picture without colour",
    "sepia": "a sepia picture in brown tones",
    "sketch": "a pencil sketch on white paper",
    "night": "a dark blue night scene",
    "snow": "a snowy winter scene",
}
LOOKS_ZH = {
    "grayscale": "没有色彩的黑白照片",
    "sepia": "棕褐色调的旧照片",
    "sketch": "白纸上的铅笔素描",
    "night": "深蓝色的夜景",
    "snow": "冬日的雪景",
}
TASK_OF = {  # of a change; the topics of a language may know better
    **{task: task for task in TASKS},
    **dict.fromkeys(STYLE_LOOKS, "tone"),
    "sketch": "style",
    "recolour": "colour",
    "become": "other",
    "pose": "motion",
    "restyle": "style",
    "retone": "tone",
}


@dataclass(frozen=True)
class Evolution:
    """An evolution prompt and what kind of edit it tells."""

    prompt: str
    task: str

    @property
    def family(self) -> str:
        return FAMILY[self.task]


def family_of(task: str) -> str:
    """The family of any task, those of the data's own naming included; "" where nothing is known of it."""
    return FAMILY.get(task) or FAMILY.get(TASK_OF.get(task, ""), "")


def write(instruction: str) -> Evolution:
    """Rewrite an instruction.

    Raises:
        DataError: the instruction is empty.
    """
    text = re.sub(r"\s+", " ", instruction).strip().rstrip(".!。！ ")
    if not text:
        raise DataError("the instruction is empty", fix="say what should change, such as `make it snow`")
    if is_chinese(text):
        found = CHINESE.understand(text)
        prompt = caption_zh(found.change, **_told(found.parts, ("place", "{}身上")))
    else:
        found = ENGLISH.understand(text)
        prompt = caption(found.change, **_told(found.parts, ("where", "on {}")))
    return Evolution(prompt, found.task or TASK_OF[found.change])


def is_chinese(text: str) -> bool:
    """Whether a text is to be read as Chinese: a name or a quotation in Latin letters does not make it English."""
    return len(re.findall(r"[\u4e00-\u9fff]", text)) > len(re.findall(r"[A-Za-z]+", text))


def caption(
    change: str,
    *,
    subject: str = "",
    result: str = "",
    place: str = "",
    where: str = "",
    action: str = "",
    pace: str = "steadily",
) -> str:
    """The evolution prompt of one change.

    Args:
        subject, result: with their articles.
        place: a corner or side, without its article; ``where`` any other place, with its preposition.
        action: what a pose shall become, as it was asked for.
    """
    whole = {
        **STYLE_LOOKS,
        "restyle": f"a picture of this style: {result}",
        "retone": f"a picture in other light and tones, until it fits the words: {result}",
    }
    if change in whole:
        return f"Static camera. The whole picture {pace} becomes {whole[change]}; every shape stays where it is."
    at = f" at the {place}" if place else where and f" {where}"
    process = {
        "add": f"{subject} {pace} fades in{at} until it is fully there",
        "remove": f"{subject} {pace} fades out until it is gone and what lies behind it shows",
        "replace": f"{subject} {pace} dissolves into {result}",
        "recolour": f"{subject} {pace} changes its colour until it is fully {result}",
        "become": f"{subject} {pace} changes from what it is now until it is fully {result}",
        "pose": f"from the present pose, {subject or 'the subject'} {pace} moves until this is done: {action}",
        "move": f"{subject} {pace} slides across the picture until it rests at the {place}",
        "background": f"the scenery behind {pace} dissolves into {result} while the foreground stays",
        "other": f"starting from this picture, the scene {pace} evolves until it fits the words: {subject}",
    }[change]
    return f"Static camera. {process[0].upper()}{process[1:]}; everything else stays unchanged."


def caption_zh(change: str, *, subject: str = "", result: str = "", place: str = "", action: str = "") -> str:
    """:func:`caption` in Chinese."""
    whole = {
        **LOOKS_ZH,
        "restyle": f"这种风格的画面：{result}",
        "retone": f"另一种光线与色调，直到符合这句话：{result}",
    }
    if change in whole:
        return f"固定镜头。整个画面逐渐变成{whole[change]}；所有形状都留在原处。"
    process = {
        "add": f"{place and f'在{place}，'}{subject}逐渐浮现，直到完全出现",
        "remove": f"{subject}逐渐淡出，直到完全消失，露出后面的景物",
        "replace": f"{subject}逐渐化为{result}",
        "recolour": f"{subject}的颜色逐渐变化，直到完全成为{result}",
        "become": f"{subject}从现在的样子逐渐变化，直到完全成为：{result}",
        "pose": f"{subject or '主体'}从现在的姿态开始逐渐动作，直到做到：{action}",
        "move": f"{subject}逐渐在画面中滑动，直到停在{place}",
        "background": f"背后的景物逐渐化为{result}，前景保持不动",
        "other": f"从这幅画面开始，场景逐渐演变，直到符合这句话：{subject}",
    }[change]
    return f"固定镜头。{process}；其余部分保持不变。"


def _told(parts: Parts, owner_at: tuple[str, str]) -> Parts:
    """The parts as a caption takes them: a material is a result, and an owner is where a new thing appears."""
    told = dict(parts)
    if material := told.pop("material", ""):
        told["result"] = material
    if owner := told.pop("owner", ""):
        name, words = owner_at
        told[name] = words.format(owner)
    return told
