"""A server that speaks OpenAI's chat completions and judges as a test wants.

    with judge_server(always("A")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)

A mode is a function of a question to a `Reply`. A question holds the two answers it asks about.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ANSWERS = re.compile(r"<answer_a>\n(.*)\n</answer_a>.*<answer_b>\n(.*)\n</answer_b>", re.DOTALL)
_ANSWER = re.compile(r"<answer>\n(.*)\n</answer>()", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A request: its body, the answers in it (a single one: `second` is empty), and how often the same text
    was asked before."""

    body: dict[str, Any]
    first: str
    second: str
    before: int


@dataclass(frozen=True)
class Reply:
    """What the server sends."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None


Mode = Callable[[Question], Reply]


def verdict(better: str) -> Reply:
    """A verdict as asked for."""
    return Reply(json.dumps({"better": better}))


def good(question: Question) -> Reply:
    """The answer with the word `good` is better: the labels of `labelled` below."""
    first, second = ("good" in text for text in (question.first, question.second))
    return verdict("tie" if first == second else "A" if first else "B")


def good_rating(question: Question) -> Reply:
    """The same by ratings of single answers."""
    return Reply(json.dumps({"rating": 8 if "good" in question.first else 3}))


def always(better: str) -> Mode:
    """The same place each time."""
    return lambda _: verdict(better)


def failing(status: int, times: int = 10**6, then: Mode = good, **headers: str) -> Mode:
    """An error for the first attempts at each question, repeating the key as some servers do."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}

    def mode(question: Question) -> Reply:
        return Reply(status=status, headers=sent) if question.before < times else then(question)

    return mode


def slow(seconds: float) -> Mode:
    """An answer that comes late."""

    def mode(question: Question) -> Reply:
        time.sleep(seconds)
        return good(question)

    return mode


class Server:
    """Where it is and what it was asked."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.questions: list[Question] = []
        self.keys: set[str] = set()
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, body: dict[str, Any], key: str) -> Reply:
        """Record a question and answer it."""
        text = body["messages"][0]["content"]
        found = _ANSWERS.search(text) or _ANSWER.search(text)
        with self._lock:
            before = sum(q.body["messages"][0]["content"] == text for q in self.questions)
            question = Question(body, *(found.groups() if found else ("", "")), before)
            self.questions.append(question)
            self.keys.add(key)
        return self.mode(question)


@contextmanager
def judge_server(mode: Mode) -> Iterator[Server]:
    """A server of its own on a free port; its mode may be changed while it runs."""
    server = Server(mode)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            key = self.headers["authorization"].removeprefix("Bearer ")
            reply = server.answer(body, key)
            said = {"error": {"message": f"no, {key}"}} if reply.status != 200 else _completion(reply.text)
            data = json.dumps(said).encode() if reply.raw is None else reply.raw
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *_: None  # a client that went away
    server.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()


def _completion(text: str) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }


def labelled(count: int, longer: float = 0.5) -> list[dict[str, str]]:
    """Pairs whose chosen answer has the word `good`, longer than the other one in a share of them."""
    rows = []
    for n in range(count):
        more = " indeed" * (1 + n % 3)
        is_longer = (n % 10) < round(10 * longer)
        rows.append(
            {
                "prompt": f"Question {n}?",
                "chosen": f"A good answer {n}{more if is_longer else ''}",
                "rejected": f"A bad answer {n}{'' if is_longer else more}",
            }
        )
    return rows
