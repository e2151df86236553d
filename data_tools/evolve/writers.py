"""Writers of evolution prompts behind one protocol: `template`, `local`, `server`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol

from data_tools.evolve import answers, template
from data_tools.ingest import Triplet
from v4e import dist
from v4e.data.disk import hash_of, to_json, writable, write_atomically
from v4e.data.places import NotFoundError, PassingError, Place, make_folder, patiently, place, read_bytes
from v4e.errors import ConfigError, DataError, V4EError
from v4e.models.vlm import LocalVlm, Question, Reply, ServerVlm, Vlm
from v4e.nouns import Clip

WINDOW = 256
NO_KEY = "none"


@dataclass(frozen=True)
class Draft:
    """What a writer made of a triplet.

    Args:
        prompt: empty where it could not write one; ``failure`` says why in a word or two, ``detail`` in a sentence.
        passing: whether another run may succeed.
        read, wrote: tokens that were paid for; ``cached`` where the answer was known already and cost nothing.
    """

    triplet: Triplet
    prompt: str = ""
    failure: str = ""
    detail: str = ""
    passing: bool = False
    read: int = 0
    wrote: int = 0
    cached: bool = False


class Writer(Protocol):
    """Turns instructions, with both pictures, into evolution prompts."""

    @property
    def signature(self) -> str:
        """Name, version, and the model and a hash of the settings where there are such; triplets remember it."""
        ...

    def drafts(self, triplets: Iterable[Triplet]) -> Iterator[Sequence[Draft]]:
        """One draft of each triplet, in groups as they are finished, in any order."""
        ...


@dataclass(frozen=True)
class TemplateWriter:
    """Rules alone; see evolve/template.py."""

    @property
    def signature(self) -> str:
        return f"{template.NAME} {template.VERSION}"

    def drafts(self, triplets: Iterable[Triplet]) -> Iterator[Sequence[Draft]]:
        for window in _windows(triplets, WINDOW):
            yield [_by_rules(triplet) for triplet in window]


def _by_rules(triplet: Triplet) -> Draft:
    try:
        return Draft(triplet, template.write(triplet.instruction).prompt)
    except DataError as error:
        return Draft(triplet, failure="empty instruction", detail=error.what)


# ------------------------------------------------------------------------------------------------- local


@dataclass(frozen=True)
class LocalSettings:
    """Settings of `--writer local`.

    Args:
        model: folder or Hub id of a transformers vision-language model.
        batch: edits asked together; a restart asks in the same batches.
        device: cuda where there is one, by default.
        side: longest side of a picture as the model sees it, in pixels.
        tokens: longest answer.
    """

    model: str = ""
    batch: int = 8
    device: str = ""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    side: int = 768
    tokens: int = 400


@dataclass(frozen=True)
class LocalWriter:
    """A model on this machine."""

    vlm: Vlm
    settings: LocalSettings

    @staticmethod
    def load(settings: LocalSettings) -> "LocalWriter":
        s = settings
        return LocalWriter(LocalVlm.load(s.model, device=s.device, dtype=s.dtype, side=s.side, tokens=s.tokens), s)

    @property
    def signature(self) -> str:
        s = self.settings
        return _signature("local", s.model, {**self.vlm.identity, "batch": s.batch, "dtype": s.dtype})

    def drafts(self, triplets: Iterable[Triplet]) -> Iterator[Sequence[Draft]]:
        """Batch by batch. A finished batch is handed over whole, so that what is left falls into the same batches."""
        for batch in _windows(triplets, self.settings.batch):
            asked = [_question(triplet) for triplet in batch]
            replies = iter(self.vlm.ask(good) if (good := [q for q in asked if isinstance(q, Question)]) else [])
            yield [q if isinstance(q, Draft) else _draft(t, next(replies)) for t, q in zip(batch, asked, strict=True)]


# ------------------------------------------------------------------------------------------------- server


@dataclass(frozen=True)
class ServerSettings:
    """Settings of `--writer server`.

    Args:
        url: of an OpenAI-compatible endpoint, up to and with ``/v1``.
        key_variable: environment variable that holds the key; ``none`` for a server that wants none.
        parameters: of every request; one set to null is left out.
        concurrency: questions under way at once.
        side: longest side of a picture as it is sent, in pixels.
        timeout_s, retries, backoff_s, longest_wait_s: see ServerVlm.
        give_up_after: questions in a row that passing trouble kept from an answer, at which the run stops.
        cache: folder or URL of answers; ``answers`` in the triplets' folder by default.
        price_read, price_wrote: of a million tokens of questions and answers.
    """

    url: str = "https://api.openai.com/v1"
    model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 400})
    concurrency: int = 8
    side: int = 768
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    longest_wait_s: float = 60.0
    give_up_after: int = 50
    cache: str = ""
    price_read: float = 0.0
    price_wrote: float = 0.0


class Cache:
    """Answers in a folder, by all that determines them; an entry is there whole or not at all.

    Raises:
        DataError: the folder cannot be read or written; an answer that is paid for must not be lost.
    """

    def __init__(self, folder: Place) -> None:
        self._folder = folder

    def get(self, key: str) -> Reply | None:
        """A known reply; one that is damaged is not known."""
        try:
            entry = json.loads(read_bytes(self._path(key)))
            return Reply(text=str(entry["text"]), failure=str(entry["failure"]), detail=str(entry["detail"]))
        except (NotFoundError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        entry = {"text": reply.text, "failure": reply.failure, "detail": reply.detail}
        with writable(self._folder):
            make_folder(self._path(key).parent)
            write_atomically(self._path(key), to_json({**entry, "read": reply.read, "wrote": reply.wrote}))

    def _path(self, key: str) -> Place:
        return self._folder / key[:2] / f"{key}.json"


@dataclass(frozen=True)
class ServerWriter:
    """A model elsewhere."""

    vlm: ServerVlm
    settings: ServerSettings
    cache: Cache

    @staticmethod
    def load(settings: ServerSettings, folder: Place) -> "ServerWriter":
        """
        Args:
            folder: where answers are kept unless the settings say otherwise.

        Raises:
            ConfigError: no model is named, the key's variable is not set, or the address is none.
        """
        s = settings
        if not s.model:
            raise ConfigError("no model is named", where="key model", fix="such as model=gpt-4o-mini")
        vlm = ServerVlm(
            s.url,
            s.model,
            "" if s.key_variable == NO_KEY else dist.secret(s.key_variable),
            s.parameters,
            s.side,
            s.timeout_s,
            s.retries,
            s.backoff_s,
            s.longest_wait_s,
        )
        return ServerWriter(vlm, s, Cache(place(s.cache) if s.cache else folder / "answers"))

    @property
    def signature(self) -> str:
        return _signature("server", self.settings.model, self.vlm.identity)

    def drafts(self, triplets: Iterable[Triplet]) -> Iterator[Sequence[Draft]]:
        """As many at once as ``concurrency`` says.

        Raises:
            ConfigError: the server refuses the key, the model or the address.
            V4EError: it has answered nothing for a long time.
        """
        in_a_row = 0
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                for done in _as_finished(pool, self._draft, triplets, 2 * self.settings.concurrency):
                    good = [f.result() for f in done if not f.exception()]
                    yield good
                    for future in done:
                        future.result()
                    in_a_row = 0 if any(not d.passing for d in good) else in_a_row + len(good)
                    if in_a_row >= self.settings.give_up_after:
                        self._give_up(good[-1], in_a_row)
            finally:
                self.vlm.close()  # threads that wait for their next try give up
                pool.shutdown(wait=False, cancel_futures=True)

    def _draft(self, triplet: Triplet) -> Draft:
        asked = _question(triplet)
        if isinstance(asked, Draft):
            return asked
        key = self._key(asked)
        if known := self.cache.get(key):
            return replace(_draft(triplet, known), cached=True)
        (reply,) = self.vlm.ask([asked])
        if not reply.passing:
            self.cache.put(key, reply)
        return _draft(triplet, reply)

    def _key(self, question: Question) -> str:
        parts = [p if isinstance(p, str) else _hash_of(p) for p in question.parts]
        return hash_of(to_json([dict(self.vlm.identity), parts]))

    def _give_up(self, last: Draft, in_a_row: int) -> None:
        raise V4EError(
            f"{in_a_row} questions in a row went unanswered, the last one: {last.failure}: {last.detail}",
            where=self.settings.url,
            fix="what is written is safe; run the same command again when the server is well",
        )


# ------------------------------------------------------------------------------------------------- both


def _signature(name: str, model: str, identity: Mapping[str, object]) -> str:
    words = hash_of(to_json([answers.ASK, answers.BEFORE, answers.AFTER, dict(identity)]))[:8]
    return f"{name} {answers.VERSION} {model} {words}"


def _question(triplet: Triplet) -> Question | Draft:
    try:
        source, target = patiently(triplet.read_source), patiently(triplet.read_target)
    except DataError as error:
        passing = isinstance(error, PassingError)
        return Draft(triplet, failure="unreadable picture", detail=str(error), passing=passing)
    return answers.question(triplet.instruction, source, target)


def _draft(triplet: Triplet, reply: Reply) -> Draft:
    """A reply as a prompt, if it is fit to be one."""
    draft = Draft(triplet, read=reply.read, wrote=reply.wrote)
    if reply.failure:
        return replace(draft, failure=reply.failure, detail=reply.detail, passing=reply.passing)
    try:
        return replace(draft, prompt=answers.prompt_of(reply.text, template.is_chinese(triplet.instruction)))
    except answers.Unfit as why:
        return replace(draft, failure=str(why), detail=reply.text[:300])


def _hash_of(clip: Clip) -> str:
    return hash_of(to_json(list(clip.size)) + clip.frames_T3HW.numpy().tobytes())


def _windows(triplets: Iterable[Triplet], size: int) -> Iterator[list[Triplet]]:
    rest = iter(triplets)
    while window := list(islice(rest, size)):
        yield window


def _as_finished(pool: ThreadPoolExecutor, work, items: Iterable[Triplet], ahead: int) -> Iterator[list[Future]]:
    """Results in groups as they are finished, with at most ``ahead`` under way."""
    rest, waiting = iter(items), set()
    while True:
        waiting |= {pool.submit(work, item) for item in islice(rest, ahead - len(waiting))}
        if not waiting:
            return
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield list(done)
