"""Find a judge by its name, and check all that can be checked before it is asked."""

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sera_core.errors import InputError
from sera_core.extensions import Registry, is_own, source_hash
from sera_core.judges.chat import ChatJudge, Endpoint
from sera_core.judges.comparison import Judge
from sera_core.judges.functions import FunctionJudge, constant, word_count
from sera_core.judges.prompts import read_template
from sera_core.judges.reward import RewardJudge, reward_digest

CHAT, REWARD = "openai", "reward"
WORD_COUNT, CONSTANT = "word-count", "constant"
_FORMS = {f"{CHAT}:<model>": None, f"{REWARD}:<folder>": None}
JUDGES: Registry[Any] = Registry("judge", {WORD_COUNT: word_count, CONSTANT: constant, **_FORMS})
"""Judges by name; openai: and reward: take the model after the colon."""
OPENAI_URL = "https://api.openai.com/v1"
KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"

_HOST = re.compile(r"[A-Za-z0-9._:-]+")


@dataclass(frozen=True)
class Asking:
    """How a judge is asked; only the template and the address change what it answers."""

    url: str | None = None
    template: Path | None = None
    concurrency: int = 8
    retries: int = 5
    timeout: float = 60.0


@dataclass(frozen=True)
class NamedJudge:
    """A judge that can be opened."""

    name: str
    identity: dict[str, Any]
    """What decides its answers; in the key of its steps. No path and no secret."""
    open: Callable[[], Judge]


def find_judge(name: str, asking: Asking) -> NamedJudge:
    """The judge of this name, without loading or asking it.

    Raises:
        InputError: unknown (the nearest name is given), not allowed, without key, extra or model folder, a
            template that cannot be used, or an address with credentials.
    """
    kind, colon, rest = name.partition(":")
    if kind != CHAT and (asking.template is not None or asking.url is not None):
        flag = "--template" if asking.template is not None else "--judge-url"
        raise InputError(f"{flag}: only {CHAT}:<model> takes it, not the judge {name!r}; leave it out")
    if kind == CHAT and rest:
        return _chat(rest, asking)
    if kind == REWARD and rest:
        return _reward(Path(rest))
    if colon and kind not in (CHAT, REWARD) and not _allowed(kind) and (near := _near(kind)):
        raise InputError(
            f"the judge {name!r} is unknown; did you mean {near}:{rest}? A function of your own is named as "
            "module:function, its module in SERA_EXTENSIONS"
        )
    compare = JUDGES.named(name.rstrip(":") if kind in (CHAT, REWARD) else name)
    identity = {"judge": name} | ({"source": source_hash(name, "judge")} if is_own(name) else {})
    return NamedJudge(name, identity, lambda: FunctionJudge(name, compare))


def _near(kind: str) -> str | None:
    return next(iter(difflib.get_close_matches(kind, (CHAT, REWARD), n=1, cutoff=0.6)), None)


def _allowed(module: str) -> bool:
    return module in {name.strip() for name in os.environ.get("SERA_EXTENSIONS", "").split(",")}


def _chat(model: str, asking: Asking) -> NamedJudge:
    name = f"{CHAT}:{model}"
    if find_spec("openai") is None:
        raise InputError(f"the judge {name!r} needs the extra `judge`: pip install 'sera-flow[judge]'")
    url = _address(asking.url or os.environ.get(URL) or OPENAI_URL, "--judge-url" if asking.url else URL)
    if not (key := os.environ.get(KEY, "").strip()):
        raise InputError(
            f"the judge {name!r} needs a key in {KEY}; for a server without keys any word will do, such as "
            f"{KEY}=none"
        )
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{KEY}: holds characters that no key has; set it again")
    template = read_template(asking.template)
    identity = {
        "judge": name,
        "endpoint": url,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    endpoint = Endpoint(url, key, asking.concurrency, asking.retries, asking.timeout)
    return NamedJudge(name, identity, lambda: ChatJudge(model, template, endpoint))


def _address(url: str, given_as: str) -> str:
    """The address of the endpoint, which is recorded.

    Raises:
        InputError: no http(s) URL, or one with user, password, query or fragment, none of which is repeated.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or host is None or not _HOST.fullmatch(host):
        raise InputError(f"{given_as}: not a URL such as http://127.0.0.1:8000/v1; give the endpoint's")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"{given_as}: holds a user, a password or a query; addresses are recorded and shown, so give the "
            f"plain address, and the key in {KEY}"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _reward(folder: Path) -> NamedJudge:
    digest = reward_digest(folder)
    return NamedJudge(f"{REWARD}:{folder}", {"judge": REWARD, "model": digest}, lambda: RewardJudge(folder))
