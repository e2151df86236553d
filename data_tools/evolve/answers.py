"""What a vision-language model is asked for, and what of its answers is taken.

An answer names both states, what stands before and what stands after, in labelled lines; so whether it did can be seen.
"""

import re

from data_tools.evolve.template import is_chinese
from v4e.models.vlm import Question
from v4e.nouns import Clip

VERSION = 1  # of all of this: the words below, what is taken, and how a prompt is put together
BEFORE, AFTER = "The picture before:", "The picture after:"
ASK = """Somebody asked for this change: {instruction}

Imagine a short film, by a camera that does not move, in which the picture before becomes the picture after.
Answer with these four lines and nothing else. Each is one plain sentence of at most 40 words{language}.
Start: what is seen before, where the change will happen.
Process: how it changes little by little, by a plausible course of things.
End: what is seen there afterwards.
Unchanged: what stays as it is.
Do not speak of pictures, requests or edits."""
LABELS = ("start", "process", "end", "unchanged")
REQUIRED = LABELS[:3]
LEAST, MOST = 3, 600  # characters of a line; umT5 reads 512 tokens in all
REFUSAL = re.compile(
    r"^\W*(?:i['’]?m sorry|i am sorry|sorry\b|i (?:can(?:no|['’])t|am unable|won['’]t|am not able)|as an ai\b|"
    r"unable to|i do(?:n['’]t| not) see|no image|"
    r"很?抱歉|对不起|我(?:无法|不能|没有办法)|无法|作为(?:一个)?(?:ai|人工智能))",
    re.IGNORECASE,
)


class Unfit(Exception):  # noqa: N818  (not an error: one answer's verdict)
    """Why an answer is not taken: a short reason to count."""


def question(instruction: str, source: Clip, edited: Clip) -> Question:
    """Both pictures and what to say of them."""
    language = ", in Chinese after the English label" if is_chinese(instruction) else ", in English"
    return Question((BEFORE, source, AFTER, edited, ASK.format(instruction=instruction, language=language)))


def prompt_of(answer: str, chinese: bool) -> str:
    """The evolution prompt that an answer amounts to.

    Raises:
        Unfit: it refuses, does not name both states and the way between them, or is too short, too long or a stammer.
    """
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    said = _lines(answer)
    if REFUSAL.match(answer) or any(REFUSAL.match(words) for words in said.values()):
        raise Unfit("refusal")
    if missing := [label for label in REQUIRED if len(said.get(label, "")) < LEAST]:
        raise Unfit(f"no {missing[0]}")
    if _plain(said["start"]) == _plain(said["end"]):
        raise Unfit("same states")
    if any(len(words) > MOST for words in said.values()):
        raise Unfit("too long")
    if any(_stammers(words) for words in said.values()):
        raise Unfit("repeats itself")
    return (_told_zh if chinese else _told)(**{label: words for label, words in said.items() if words})


def _lines(answer: str) -> dict[str, str]:
    """What follows each label; labels may be dressed up, as in ``**Start:**``."""
    pieces = re.split(rf"^\W*({'|'.join(LABELS)})\W*?[:：]", answer, flags=re.IGNORECASE | re.MULTILINE)
    return {label.lower(): _sentence(words) for label, words in zip(pieces[1::2], pieces[2::2], strict=True)}


def _sentence(words: str) -> str:
    return re.sub(r"\s+", " ", words.replace("*", " ")).strip(" \"'“”`").rstrip(".。;； ")


def _plain(words: str) -> str:
    return re.sub(r"\W+", " ", words).strip().lower()


def _stammers(words: str) -> bool:
    """Whether the same three words, or characters of Chinese, come back again and again."""
    units = re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", words.lower())
    threes = list(zip(units, units[1:], units[2:], strict=False))
    return len(threes) >= 10 and len(set(threes)) < len(threes) / 2


def _told(start: str, process: str, end: str, unchanged: str = "Everything else stays unchanged") -> str:
    return f"Static camera. At first: {start}. Then: {process}. At last: {end}. {unchanged[0].upper()}{unchanged[1:]}."


def _told_zh(start: str, process: str, end: str, unchanged: str = "其余部分保持不变") -> str:
    return f"固定镜头。起初：{start}。然后：{process}。最后：{end}。{unchanged}。"
