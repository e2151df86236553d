"""One door to any vision-language model: a folder of weights, or a server that speaks OpenAI's protocol.

A `Question` is words and pictures in the order in which the model shall read them. Every question gets one `Reply`;
trouble with one of them is told in its reply, and only what would befall all of them is an error.
"""

import base64
import email.utils
import io
import json
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import numpy as np
import torch
from PIL import Image

from v4e.errors import CheckpointError, ConfigError
from v4e.models.folder import locate
from v4e.nouns import Clip

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
JPEG_QUALITY = 92
BUSY = (408, 409, 425, 429)  # and all of 5xx: asking again may help
LOCKED = (401, 403, 404)  # wrong key, address or model: no question will ever be answered


@dataclass(frozen=True)
class Question:
    """Words and pictures (clips of one frame), in order."""

    parts: tuple[str | Clip, ...]

    @property
    def words(self) -> str:
        return "\n".join(p for p in self.parts if isinstance(p, str))


@dataclass(frozen=True)
class Reply:
    """An answer, or why there is none.

    Args:
        text: what the model said; empty where it failed.
        failure: a short reason to count; ``detail`` is a sentence about it.
        passing: whether the failure is of the moment, so that asking another time may help.
        read, wrote: tokens of question and answer.
    """

    text: str = ""
    failure: str = ""
    detail: str = ""
    passing: bool = False
    read: int = 0
    wrote: int = 0


class Vlm(Protocol):
    """Anything that looks at pictures and answers."""

    @property
    def identity(self) -> Mapping[str, object]:
        """All that determines an answer beside the question."""
        ...

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """A reply to each question."""
        ...


def picture_of(clip: Clip, side: int) -> Image.Image:
    """A clip's only frame, scaled down until no side is longer than ``side``."""
    (frame_3HW,) = clip.frames_T3HW
    picture = Image.fromarray(np.ascontiguousarray(frame_3HW.permute(1, 2, 0).numpy()))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


# ----------------------------------------------------------------------------------------------- weights here


@dataclass
class LocalVlm:
    """A transformers model with its processor. Greedy, so that the same batch always gets the same replies."""

    source: str
    model: Any
    processor: Any
    side: int
    tokens: int

    @staticmethod
    def load(source: str, *, device: str = "", dtype: str = "bf16", side: int = 768, tokens: int = 400) -> "LocalVlm":
        """Load a folder or a Hub id.

        Args:
            device: cuda where there is one, by default.
            side: longest side of a picture as the model sees it, in pixels.
            tokens: longest answer.

        Raises:
            CheckpointError: no such folder, no model that takes pictures, no chat template.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = locate(source, ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"])
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            processor = AutoProcessor.from_pretrained(folder)
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=TYPES[dtype], use_safetensors=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise CheckpointError(
                f"not a vision-language model that transformers can load: {str(error).splitlines()[0]}",
                where=str(folder),
                fix="give a folder with config.json, safetensors and the processor's files",
            ) from error
        if not getattr(processor, "chat_template", None):
            raise CheckpointError("the processor has no chat template", where=str(folder), fix="use an instruct model")
        processor.tokenizer.padding_side = "left"  # the answers of a batch begin at one place
        return LocalVlm(source, model.to(place).eval(), processor, side, tokens)

    @property
    def identity(self) -> Mapping[str, object]:
        config = self.model.config.to_json_string()
        return {"model": self.source, "config": config, "side": self.side, "tokens": self.tokens}

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One forward batch; where a processor refuses a picture, its question alone fails.

        Raises:
            CheckpointError: it refuses every one of several.
        """
        try:
            return self._ask(questions)
        except ValueError as error:
            if len(questions) == 1:
                return [Reply(failure="picture refused", detail=str(error))]
            replies = [self.ask([q])[0] for q in questions]
            if all(reply.failure == "picture refused" for reply in replies):
                fix = "its processor and weights do not belong together, or it takes one picture only"
                raise CheckpointError(f"takes no such questions: {error}", where=self.source, fix=fix) from error
            return replies

    @torch.inference_mode()
    def _ask(self, questions: Sequence[Question]) -> list[Reply]:
        inputs = self.processor(
            text=[self._prompt(q) for q in questions],
            images=[[picture_of(p, self.side) for p in q.parts if isinstance(p, Clip)] for q in questions],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        said = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        new = said[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        read = inputs["attention_mask"].sum(1).tolist()
        return [self._reply(*each) for each in zip(texts, new, read, strict=True)]

    def _prompt(self, question: Question) -> str:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in question.parts]
        message = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    def _reply(self, text: str, new: torch.Tensor, read: int) -> Reply:
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(new, torch.tensor(ends, device=new.device)).nonzero() if ends is not None else new[:0]
        wrote = int(ended[0, 0]) + 1 if len(ended) else len(new)
        if not len(ended) and len(new) >= self.tokens:
            return Reply(failure="cut off", detail=f"no end within {self.tokens} tokens", read=read, wrote=wrote)
        if not (text := text.strip()):
            return Reply(failure="empty", detail="nothing but special tokens", read=read, wrote=wrote)
        return Reply(text, read=read, wrote=wrote)


# ----------------------------------------------------------------------------------------------- a server


class _Trouble(Exception):  # noqa: N818  (not an error: one request's outcome)
    """A request without an answer; ``after`` is how many seconds the server asked to wait."""

    def __init__(self, reason: str, detail: str, *, passing: bool, after: float = 0.0) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.passing, self.after = reason, detail, passing, after


@dataclass
class ServerVlm:
    """An OpenAI-compatible endpoint; any number of threads may ask at once.

    Args:
        url: up to and with ``/v1``.
        key: the secret; it is sent as a header and appears nowhere else.
        parameters: of the request's body, such as temperature and max_tokens.
        side: longest side of a picture as it is sent, in pixels.
        timeout_s: without a word from the server.
        retries: more tries after the first, where the trouble may pass.
        backoff_s: before the second try; doubles with every other, half of it by chance.
        longest_wait_s: bounds every wait, Retry-After included.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    side: int = 768
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    longest_wait_s: float = 60.0

    def __post_init__(self) -> None:
        self._refuse_unsafe()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self._client = httpx.Client(headers=headers, timeout=self.timeout_s, limits=httpx.Limits(max_connections=None))
        self._closed = threading.Event()
        self._open_again = 0.0  # one thread's Retry-After holds for all of them

    @property
    def identity(self) -> Mapping[str, object]:
        parameters = dict(sorted(self.parameters.items()))
        return {"url": self.url, "model": self.model, "parameters": parameters, "side": self.side}

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One after the other; call from several threads for more at a time.

        Raises:
            ConfigError: the server does not know the key, the model or the address.
        """
        return [self._ask(self._body(question)) for question in questions]

    def close(self) -> None:
        """Waiting threads give up, connections end."""
        self._closed.set()
        self._client.close()

    def _ask(self, body: bytes) -> Reply:
        tries = 0
        while True:
            tries += 1
            try:
                self._closed.wait(max(0.0, self._open_again - time.monotonic()))
                return self._answer(self._post(body))
            except _Trouble as trouble:
                if not trouble.passing or tries > self.retries or self._closed.is_set():
                    detail = self._fit_to_keep(trouble.detail)
                    return Reply(failure=trouble.reason, detail=detail, passing=trouble.passing)
                self._wait(tries, trouble.after)

    def _wait(self, tries: int, after: float) -> None:
        """Exponential, with as much again by chance so that threads do not come back together."""
        if after:
            self._open_again = time.monotonic() + min(after, self.longest_wait_s)
        backoff = self.backoff_s * 2 ** (tries - 1) * (0.5 + random.random() / 2)
        self._closed.wait(min(max(backoff, after), self.longest_wait_s))

    def _post(self, body: bytes) -> httpx.Response:
        """An answer with status 200."""
        try:
            got = self._client.post(
                f"{self.url.rstrip('/')}/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
        except httpx.TimeoutException as error:
            raise _Trouble("time-out", f"nothing heard for {self.timeout_s:g} s", passing=True) from error
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise _Trouble("no connection", f"{type(error).__name__}: {error}", passing=True) from error
        except httpx.DecodingError as error:
            raise _Trouble("garbage", str(error), passing=True) from error
        if got.status_code != 200:
            self._refused(got)
        return got

    def _refused(self, got: httpx.Response) -> None:
        said = self._fit_to_keep(f"status {got.status_code}: {got.text[:300]}")
        if got.status_code in LOCKED or got.is_redirect:
            fix = "check url, model and the variable that holds the key"
            raise ConfigError(f"the server refuses every question: {said}", where=self.url, fix=fix)
        if got.status_code == 429:
            raise _Trouble("rate limit", said, passing=True, after=_retry_after(got))
        if got.status_code in BUSY or got.status_code >= 500:
            raise _Trouble("server error", said, passing=True, after=_retry_after(got))
        refusal = re.search(r"content[_ ](?:policy|filter)|safety|moderation", got.text, re.IGNORECASE)
        raise _Trouble("refusal" if refusal else "bad request", said, passing=False)

    def _answer(self, got: httpx.Response) -> Reply:
        try:
            answer = got.json()
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            message, ended = choice["message"], choice.get("finish_reason")
            read, wrote = (int(usage.get(f"{k}_tokens") or 0) for k in ("prompt", "completion"))
            text, refusal = message.get("content") or "", message.get("refusal")
            if not isinstance(text, str):
                raise TypeError("content is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Trouble("garbage", f"no answer in {got.text[:200]!r}", passing=True) from error
        failure = "refusal" if refusal or ended == "content_filter" else "cut off" if ended == "length" else ""
        failure = failure or ("" if text.strip() else "empty")
        text = self._fit_to_keep(text.strip())
        if failure:
            return Reply("", failure, self._fit_to_keep(str(refusal or text)[:300]), False, read, wrote)
        return Reply(text, read=read, wrote=wrote)

    def _body(self, question: Question) -> bytes:
        content = [{"type": "text", "text": p} if isinstance(p, str) else self._image(p) for p in question.parts]
        words = {k: v for k, v in self.parameters.items() if v is not None}
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **words}
        return json.dumps(body, ensure_ascii=False).encode()

    def _image(self, clip: Clip) -> dict[str, object]:
        buffer = io.BytesIO()
        picture_of(clip, self.side).save(buffer, "JPEG", quality=JPEG_QUALITY)
        url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def _fit_to_keep(self, text: str) -> str:
        """Without the key, which servers quote in their errors, and halves of characters, which no file holds."""
        text = text.encode(errors="replace").decode()
        return text.replace(self.key, "[key]") if self.key else text

    def _refuse_unsafe(self) -> None:
        address = httpx.URL(self.url)
        if address.scheme not in ("http", "https") or not address.host:
            raise ConfigError(f"url = {self.url!r} is no address", fix="such as https://api.openai.com/v1")
        if address.userinfo or address.query:
            raise ConfigError("a secret does not belong into url", fix="name its environment variable in key_variable")
        if re.search(r"[^\x21-\x7e]", self.key):
            raise ConfigError("the key holds spaces or other characters that no header takes", fix="export it again")


def _retry_after(got: httpx.Response) -> float:
    """Seconds, said as a number or as a date; 0 where nothing was said."""
    said = got.headers.get("retry-after", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0
