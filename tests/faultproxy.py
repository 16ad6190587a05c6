"""A proxy in front of an object store that misbehaves on request.

with FaultProxy(server.endpoint) as proxy:
    proxy.plan("answer lost", times=2, methods=("PUT",))     # the next two PUTs are stored, but not answered
    …                                                        # the client reaches the store at proxy.endpoint
"""

import asyncio
import threading
from contextlib import suppress
from urllib.parse import urlsplit

FAULTS = ("503", "500", "dropped", "cut", "stalled", "answer lost")
FOR_EVER = 10**9
_ERRORS = {"503": ("Slow Down", "SlowDown"), "500": ("Internal Server Error", "InternalError")}


class FaultProxy:
    """Passes one request a connection, whole, unless a fault is planned for it."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._fault, self._left, self._passing = "", 0, 0
        self._methods: tuple[str, ...] = ()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.requests: list[str] = []
        """Method of every request that came, faulted or not."""

    def plan(self, fault: str, times: int, methods: tuple[str, ...] = (), after: int = 0) -> None:
        """Let the next `times` requests with one of the methods (none named: any) meet a fault.

        Args:
            fault: one of FAULTS.
            times: how many requests; FOR_EVER for all.
            methods: of HTTP.
            after: so many of these requests pass first.
        """
        assert fault in FAULTS
        self._fault, self._methods, self._left, self._passing = fault, methods, times, after

    def heal(self) -> None:
        """No more faults."""
        self._left = 0

    @property
    def endpoint(self) -> str:
        """Where the client sends its requests."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    def _serve(self) -> None:
        self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        self._over = asyncio.Event()
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0, limit=2**24)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._one(reader, writer)
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method = head.split(b" ", 1)[0].decode()
        self.requests.append(method)
        fault = self._take(method)
        if fault == "dropped":
            return
        fields = _fields(head)
        if fields.get(b"expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        if fault == "stalled":
            await reader.read()  # until the client has had enough
        elif fault in _ERRORS:
            writer.write(_refusal(fault))
        elif fault == "cut" and body:
            await self._forward(head, body[: len(body) // 2])
            return
        else:
            answer = await self._forward(head, body)
            if fault == "cut":
                writer.write(answer[: answer.index(b"\r\n\r\n") + 4 + len(answer) // 3])
            elif fault != "answer lost":
                writer.write(answer)
        await writer.drain()

    def _take(self, method: str) -> str:
        if self._left <= 0 or (self._methods and method not in self._methods):
            return ""
        if self._passing > 0:
            self._passing -= 1
            return ""
        self._left -= 1
        return self._fault

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        """The server's whole answer; with half a body it gets none, and the connection is closed under it."""
        reader, writer = await asyncio.open_connection(*self._target, limit=2**24)
        try:
            writer.write(_for_one_request(head) + body)
            await writer.drain()
            if len(body) < int(_fields(head).get(b"content-length", b"0")):
                return b""
            return await reader.read()
        finally:
            writer.close()


def _fields(head: bytes) -> dict[bytes, bytes]:
    lines = [line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line]
    return {name.strip().lower(): value.strip() for name, value in lines}


def _for_one_request(head: bytes) -> bytes:
    """The request's head, with the connection to be closed after it and nothing to be waited for."""
    first, *lines = head.rstrip(b"\r\n").split(b"\r\n")
    kept = [line for line in lines if line.split(b":", 1)[0].lower() not in (b"connection", b"expect")]
    return b"\r\n".join([first, *kept, b"Connection: close"]) + b"\r\n\r\n"


def _refusal(fault: str) -> bytes:
    reason, code = _ERRORS[fault]
    body = f"<Error><Code>{code}</Code><Message>planned by the test</Message></Error>".encode()
    head = f"HTTP/1.1 {fault} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
