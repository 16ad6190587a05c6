"""Who may talk to a Prefect server of ours: this machine's own programs and the pages of the server itself.

Prefect answers every origin and every name by default. A web page that somebody opens could then start flow
runs here, either by a request from another origin or by a host name of its own that it points at 127.0.0.1.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of this machine that only it can mean; any port, so that one may be forwarded."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def refusal(host: str, origin: str | None) -> str | None:
    """Why a request is refused, None if it may be answered.

    Args:
        host: its Host header.
        origin: its Origin header, which browsers send with what a page of another origin asks for.
    """
    if _name(host) not in LOOPBACK:
        return f"this server answers under 127.0.0.1 and localhost, not under {host!r}"
    if origin is not None and urlsplit(origin).netloc != host:
        return f"this server answers its own pages, not those of {origin!r}"
    return None


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def guarded(app: App) -> App:
    """The ASGI application, closed to foreign host names and to pages of other origins (status 403)."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        why = refusal(headers.get(b"host", ""), headers.get(b"origin"))
        if why is None:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": why[:120]})
        else:
            kind = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": kind})
            await send({"type": "http.response.body", "body": why.encode()})

    return guard
