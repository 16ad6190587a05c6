"""Find a judge or a rater by its name, and check all that can be checked before it is asked."""

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
from sera_core.judges import reviews
from sera_core.judges.asked import AskedJudge, AskedRater, Model
from sera_core.judges.chat import ChatModel, Endpoint
from sera_core.judges.comparison import Judge
from sera_core.judges.functions import FunctionJudge, FunctionRater, constant, word_count
from sera_core.judges.local import LocalModel, OpenGenerate
from sera_core.judges.names import CHAT, CONSTANT, LOCAL, REVIEWS, REWARD, WORD_COUNT
from sera_core.judges.prompts import PAIRWISE, SINGLE, Form, read_template
from sera_core.judges.rating import RatedJudge, Rater
from sera_core.judges.reward import RewardRater, chat_digest, reward_digest
from sera_core.method.features import words

_FORMS = {f"{kind}:<folder>": None for kind in (REWARD, LOCAL)} | {f"{CHAT}:<model>": None}
JUDGES: Registry[Any] = Registry(
    "judge", {WORD_COUNT: word_count, CONSTANT: constant, REVIEWS: None, **_FORMS}
)
"""Judges by name; openai:, local: and reward: take the model after the colon."""
RATERS: Registry[Any] = Registry("rater", {WORD_COUNT: words, REVIEWS: reviews.positive, **_FORMS})
"""Raters by name, likewise."""
OPENAI_URL = "https://api.openai.com/v1"
KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"

_HOST = re.compile(r"[A-Za-z0-9._:-]+")


@dataclass(frozen=True)
class Asking:
    """How a judge is asked; only the template, the form and the address change what it answers."""

    url: str | None = None
    template: Path | None = None
    concurrency: int = 8
    retries: int = 5
    timeout: float = 60.0
    single: bool = False
    """Whether a chat model rates each answer by itself, instead of comparing two."""


@dataclass(frozen=True)
class Opening:
    """What opening a judge or a rater may need; the core has no sampling engine."""

    generate: OpenGenerate
    """Opens a local chat model."""
    device: str = "auto"
    """`execution.device`."""


@dataclass(frozen=True)
class NamedJudge:
    """A judge that can be opened."""

    name: str
    identity: dict[str, Any]
    """What decides its answers; in the key of its steps. No path and no secret."""
    open: Callable[[Opening], Judge]


@dataclass(frozen=True)
class NamedRater:
    """A rater that can be opened."""

    name: str
    identity: dict[str, Any]
    """What decides its ratings; in the key of its steps. No path and no secret."""
    open: Callable[[Opening], Rater]


def find_judge(name: str, asking: Asking) -> NamedJudge:
    """The judge of this name, without loading or asking it.

    Raises:
        InputError: unknown (the nearest name is given), not allowed, without key, extra or model folder, a
            template that cannot be used, or an address with credentials.
    """
    kind, _, rest = name.partition(":")
    if kind != CHAT and asking.url is not None:
        raise InputError(f"--judge-url: only {CHAT}:<model> takes it, not the judge {name!r}; leave it out")
    if kind not in (CHAT, LOCAL) and (asking.template is not None or asking.single):
        flag = "--mode single" if asking.template is None else "--template"
        raise InputError(
            f"{flag}: only {CHAT}:<model> and {LOCAL}:<folder> are asked in words, not the judge {name!r}; "
            "leave it out"
        )
    if kind in (CHAT, LOCAL) and rest and not asking.single:
        identity, template, open_model = _asked("judge", kind, rest, asking, PAIRWISE)
        return NamedJudge(name, identity, lambda opening: AskedJudge(open_model(opening), template))
    if (kind in (CHAT, LOCAL, REWARD) and rest) or name == REVIEWS:
        rater = find_rater(name, asking, "judge")
        mode = {"mode": "single"} if asking.single else {}
        return NamedJudge(name, rater.identity | mode, lambda opening: RatedJudge(rater.open(opening)))
    compare, identity = _function(JUDGES, name)
    return NamedJudge(name, identity, lambda _: FunctionJudge(name, compare))


def find_rater(name: str, asking: Asking, what: str = "rater") -> NamedRater:
    """The rater of this name, without loading or asking it.

    Args:
        name: `reward:<folder>`, `local:<folder>`, `openai:<model>`, `word-count` or `module:function`.
        asking: how a chat model is asked.
        what: what messages and the identity call it: a rater, or a judge that compares its ratings.

    Raises:
        InputError: as `find_judge`.
    """
    kind, _, rest = name.partition(":")
    if kind in (CHAT, LOCAL) and rest:
        identity, template, open_model = _asked(what, kind, rest, asking, SINGLE)
        return NamedRater(name, identity, lambda opening: AskedRater(open_model(opening), template))
    if kind == REWARD and rest:
        folder = Path(rest)
        identity = {what: REWARD, "model": reward_digest(folder)}
        return NamedRater(name, identity, lambda opening: RewardRater(folder, opening.device))
    if name == REVIEWS:
        identity = {what: REVIEWS, **reviews.identity()}
        return NamedRater(name, identity, lambda _: FunctionRater(name, reviews.positive))
    function, identity = _function(RATERS, name)
    return NamedRater(name, identity, lambda _: FunctionRater(name, function))


def _asked(
    what: str, kind: str, rest: str, asking: Asking, form: Form
) -> tuple[dict[str, Any], str, Callable[[Opening], Model]]:
    """A language model's identity and template, and how it is opened."""
    if kind == CHAT:
        identity, template, endpoint = _chat(what, rest, asking, form)
        return identity, template, lambda _: ChatModel(rest, form, endpoint)
    folder, template = Path(rest), read_template(asking.template, form)
    digest = hashlib.sha256(template.encode()).hexdigest()
    identity = {what: LOCAL, "model": chat_digest(folder), "template_sha256": digest}
    return identity, template, lambda o: LocalModel(o.generate(folder, o.device), form)


def _function(registry: Registry[Any], name: str) -> tuple[Any, dict[str, Any]]:
    """The built-in or own function of this name, and its identity."""
    kind, colon, rest = name.partition(":")
    what = registry.kind
    if colon and kind not in (CHAT, LOCAL, REWARD) and not _allowed(kind) and (near := _near(kind)):
        raise InputError(
            f"the {what} {name!r} is unknown; did you mean {near}:{rest}? A function of your own is named as "
            "module:function, its module in SERA_EXTENSIONS"
        )
    function = registry.named(name.rstrip(":") if kind in (CHAT, LOCAL, REWARD) else name)
    return function, {what: name} | ({"source": source_hash(name, what)} if is_own(name) else {})


def _near(kind: str) -> str | None:
    return next(iter(difflib.get_close_matches(kind, (CHAT, LOCAL, REWARD), n=1, cutoff=0.6)), None)


def _allowed(module: str) -> bool:
    return module in {name.strip() for name in os.environ.get("SERA_EXTENSIONS", "").split(",")}


def _chat(what: str, model: str, asking: Asking, form: Form) -> tuple[dict[str, Any], str, Endpoint]:
    """A chat model's identity, template and endpoint."""
    name = f"{CHAT}:{model}"
    if find_spec("openai") is None:
        raise InputError(f"the {what} {name!r} needs the extra `judge`: pip install 'sera-flow[judge]'")
    url = _address(asking.url or os.environ.get(URL) or OPENAI_URL, "--judge-url" if asking.url else URL)
    if not (key := os.environ.get(KEY, "").strip()):
        raise InputError(
            f"the {what} {name!r} needs a key in {KEY}; for a server without keys any word will do, such as "
            f"{KEY}=none"
        )
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{KEY}: holds characters that no key has; set it again")
    template = read_template(asking.template, form)
    identity = {
        what: name,
        "endpoint": url,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    return identity, template, Endpoint(url, key, asking.concurrency, asking.retries, asking.timeout)


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
