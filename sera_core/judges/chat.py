"""A chat model behind an OpenAI-compatible endpoint, as a judge or a rater (the extra `judge`).

The key is in the client alone: no record, message or log has it, and what a server says in an error is never
repeated, because some servers repeat the key.
"""

import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from sera_core.errors import SeraError
from sera_core.judges.asked import Answer
from sera_core.judges.prompts import Form

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first retry, doubled each time, up to the longest."""
LONGEST_ASKED_WAIT = 120.0
"""Seconds of a server's Retry-After that are waited at most."""
REJECTED = (400, 422)
HOPELESS = {
    401: "it does not accept the key; set OPENAI_API_KEY",
    403: "the key may not use it",
    404: "it has no such model or path; check the model's name and --judge-url",
}
"""Answers after which no comparison can be judged."""
WAITS = {408: "timeout", 409: "server_error", 429: "rate_limited"}
"""Failures that a later attempt may not have; so are all answers of 500 and above."""


@dataclass(frozen=True)
class Endpoint:
    """Where a chat model is, and how it is asked."""

    url: str
    key: str
    concurrency: int = 8
    retries: int = 5
    timeout: float = 60.0

    def __repr__(self) -> str:
        """Without the key."""
        return f"Endpoint({self.url!r})"


class _Trouble(Exception):
    """An attempt without a verdict: a failure, and the seconds that the server asks to wait."""

    def __init__(self, failure: str, again: bool = True, wait: float | None = None) -> None:
        super().__init__(failure)
        self.failure, self.again, self.wait = failure, again, wait


class ChatModel:
    """Asks a chat model one form of question, several at once, with retries."""

    def __init__(self, model: str, form: Form, endpoint: Endpoint) -> None:
        from openai import OpenAI

        self.model, self.form, self.endpoint = model, form, endpoint
        self.batch = max(16, 4 * endpoint.concurrency)
        self._client = OpenAI(
            base_url=endpoint.url, api_key=endpoint.key, max_retries=0, timeout=endpoint.timeout
        )
        self._ways: tuple[dict[str, Any], ...] = (
            {"response_format": form.response_format, "temperature": 0.0},
            {"response_format": {"type": "json_object"}, "temperature": 0.0},
            {"temperature": 0.0},
            {},
        )
        """Ways to ask, in order: a server that rejects one is asked in the next."""
        self._way = 0
        self._stopped = threading.Event()

    def answers(self, texts: Sequence[str]) -> list[Answer]:
        """One answer for each question.

        Raises:
            SeraError: the server accepts no request: a wrong key, model or address.
        """
        pool = ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            return list(pool.map(self._answer, texts))
        finally:  # also after Ctrl-C: no further request is sent
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._stopped = threading.Event()

    def _answer(self, text: str) -> Answer:
        """Ask until there is a usable answer or no attempt is left."""
        stopped, spent = self._stopped, _Spent()
        failure = "nonsense"
        for attempt in range(self.endpoint.retries + 1):
            try:
                content = self._content(text, spent)
            except _Trouble as trouble:
                failure = trouble.failure
                if not trouble.again or attempt == self.endpoint.retries:
                    break
                if stopped.wait(_pause(attempt) if trouble.wait is None else trouble.wait):
                    break
                continue
            failure = "nonsense"
            if (value := self.form.read(content)) is not None:
                return Answer(value, None, spent.prompt, spent.answer)
        return Answer(None, failure, spent.prompt, spent.answer)

    def _content(self, text: str, spent: "_Spent") -> str:
        """What the model answers; the way of asking that worked is kept for later requests."""
        for way in range(self._way, len(self._ways)):
            try:
                body = self._ask(text, self._ways[way])
            except _Trouble as trouble:
                if trouble.failure == "refused" and way + 1 < len(self._ways):
                    continue
                raise
            self._way = way
            spent.add(body)
            return _text_of(body)
        raise _Trouble("refused", again=False)

    def _ask(self, text: str, way: Mapping[str, Any]) -> Any:
        """One request; the JSON of the server's answer.

        Raises:
            _Trouble: no answer.
            SeraError: the server will answer no request.
        """
        import openai

        messages = [{"role": "user", "content": text}]
        create: Any = self._client.chat.completions.with_raw_response.create
        try:
            return json.loads(create(model=self.model, messages=messages, **way).text)
        except openai.APITimeoutError:
            trouble = _Trouble("timeout")
        except openai.APIConnectionError:
            trouble = _Trouble("connection")
        except openai.APIStatusError as error:
            trouble = self._trouble(error.status_code, error.response.headers)
        except openai.OpenAIError:
            trouble = _Trouble("server_error")
        except (ValueError, RecursionError):
            trouble = _Trouble("nonsense")
        raise trouble

    def _trouble(self, status: int, headers: Mapping[str, str]) -> _Trouble:
        if status in HOPELESS:
            raise SeraError(
                f"the judge openai:{self.model} at {self.endpoint.url} answers {status}: {HOPELESS[status]}"
            ) from None
        if status in WAITS or status >= 500:
            return _Trouble(WAITS.get(status, "server_error"), wait=asked_wait(headers.get("retry-after")))
        return _Trouble("refused" if status in REJECTED else "server_error", again=False)


class _Spent:
    """Tokens of all attempts at one comparison; None until the server says how many."""

    def __init__(self) -> None:
        self.prompt: int | None = None
        self.answer: int | None = None

    def add(self, body: Any) -> None:
        """Add the usage in a server's answer."""
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            self.prompt = _sum(self.prompt, usage.get("prompt_tokens"))
            self.answer = _sum(self.answer, usage.get("completion_tokens"))


def _sum(before: int | None, more: Any) -> int | None:
    if type(more) is not int or not 0 <= more < 2**30:
        return before
    return more + (before or 0)


def _text_of(body: Any) -> str:
    """The text of the first choice; empty if the answer has none."""
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def _pause(attempt: int) -> float:
    """Seconds before the next attempt: doubled each time, with jitter."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.75, 1.25)


def asked_wait(value: str | None) -> float | None:
    """Seconds in a Retry-After header, as a number or a date; None without a usable one."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_ASKED_WAIT) if seconds == seconds else None
