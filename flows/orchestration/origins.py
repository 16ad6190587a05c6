"""Restrict our Prefect servers to programs on this machine and to the server's own pages.

By default Prefect answers every origin and host name. Any web page the user opens could then start flow runs,
by a cross-origin request or through a host name that resolves to 127.0.0.1 (DNS rebinding).
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Host names of the loopback interface; any port is allowed, for port forwarding."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def refusal(host: str, origin: str | None) -> str | None:
    """Why a request is refused; None if it is allowed.

    Args:
        host: its Host header.
        origin: its Origin header, which browsers send with cross-origin requests.
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


def restrict_origins(app: App) -> App:
    """The ASGI application; foreign host names and origins get status 403."""

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
