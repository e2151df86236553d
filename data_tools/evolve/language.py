"""What the template writer must know of a language: how edits are asked for."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Parts = dict[str, str]  # words of the instruction, by the part they play


class Topic(NamedTuple):
    """Words that tell the task, whatever is done: sought in one of an edit's parts, for some changes or for all."""

    task: str
    part: str
    words: str
    changes: tuple[str, ...] = ()


class Understood(NamedTuple):
    """An instruction taken apart; ``task`` is "" where the change says it all."""

    change: str
    task: str
    parts: Parts


@dataclass(frozen=True)
class Language:
    """Tables of one language; case does not matter to its patterns.

    Args:
        polite: what may stand around an instruction and says nothing.
        imperative: how an instruction begins. What begins otherwise describes the picture that is wanted.
        whole: instructions about the whole picture, with what it shall become as ``rest``.
        looks: the looks that have captions of their own, with the words of ``rest`` that mean them.
        moods: the other changes of the whole picture, likewise. Where no word fits, the instruction means a part of it.
        rules: (change, pattern): the first that matches an instruction from end to end decides, and names its parts:
            ``<subject>`` in a pattern stands for any words, the fewest that do.
        topics: the first that is found overrules the task that comes with the change.
        described: topics of a picture that is described.
        tidy: (part, pattern, better): so that all wordings of one thing read the same.
    """

    polite: str
    imperative: str
    whole: tuple[str, ...]
    looks: Mapping[str, str]
    moods: Mapping[str, str]
    rules: tuple[tuple[str, str], ...]
    topics: tuple[Topic, ...]
    described: tuple[Topic, ...]
    tidy: tuple[tuple[str, str, str], ...] = ()

    def understand(self, text: str) -> Understood:
        """Take one line of text apart."""
        plain = re.sub(self.polite, "", text, flags=re.IGNORECASE).strip() or text
        if whole := next(self._of_the_whole(plain), None):
            return whole
        if not re.match(self.imperative, plain, re.IGNORECASE):
            return Understood("other", _task("other", {"subject": plain}, self.described), {"subject": text})
        for change, pattern in self._compiled:
            if found := pattern.fullmatch(plain):
                parts = self._tidied({k: v.strip() for k, v in found.groupdict().items() if v})
                return Understood(change, _task(change, parts, self.topics), parts)
        return Understood("other", _task("other", {"subject": plain}, self.topics), {"subject": text})

    def _of_the_whole(self, text: str) -> Iterator[Understood]:
        """What the whole picture shall become, where that is what is asked for; the plainest reading first."""
        for pattern in self._wholes:
            if found := pattern.fullmatch(text):
                rest = found["rest"].strip()
                yield from (Understood(k, "", {}) for k, words in self.looks.items() if _has(words, rest))
                result = self._tidied({"result": rest})
                yield from (Understood(k, "", result) for k, words in self.moods.items() if _has(words, rest))

    @cached_property
    def _compiled(self) -> tuple[tuple[str, re.Pattern[str]], ...]:
        return tuple((change, _compile(pattern)) for change, pattern in self.rules)

    @cached_property
    def _wholes(self) -> tuple[re.Pattern[str], ...]:
        return tuple(map(_compile, self.whole))

    def _tidied(self, parts: Parts) -> Parts:
        for part, pattern, better in self.tidy:
            if part in parts:
                parts[part] = re.sub(pattern, better, parts[part], flags=re.IGNORECASE).strip() or parts[part]
        return parts


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"(?<!\?P)<(\w+)>", r"(?P<\1>.+?)", pattern), re.IGNORECASE)


def _task(change: str, parts: Parts, topics: tuple[Topic, ...]) -> str:
    fitting = (t for t in topics if change in t.changes or not t.changes)
    return next((t.task for t in fitting if _has(t.words, parts.get(t.part, ""))), "")


def _has(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None
