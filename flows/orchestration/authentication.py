"""Passwords of Prefect servers: create one for ours, check whether another server has one."""

import base64
import http.client
import json
import os
import secrets
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from sera_core.errors import InputError

SERVER_SECRET = "PREFECT_SERVER_API_AUTH_STRING"
"""Variable with the password that a Prefect server requires."""
CLIENT_SECRET = "PREFECT_API_AUTH_STRING"
"""Variable with the password that Prefect's client sends."""
NO_PASSWORD = (
    "the Prefect server at PREFECT_API_URL has no password: anyone who can reach it can run code on its "
    f"workers; start it with {SERVER_SECRET}=user:password and set {CLIENT_SECRET} for its clients"
)
_SECONDS = 10


def new_secret() -> str:
    """A random password, in the form `user:password` that Prefect's clients expect."""
    return f"sera:{secrets.token_urlsafe(24)}"


def load_secret(home: Path) -> tuple[str, Path | None]:
    """The password of the `sera up` server: from the environment, else created once in `home`.

    Returns:
        The password, and the file (mode 0600) that holds it; None if it is from the environment.

    Raises:
        InputError: the file is empty.
    """
    if given := os.environ.get(SERVER_SECRET):
        return given, None
    file = home / "auth"
    with suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(new_secret())
    file.chmod(0o600)
    secret = file.read_text().strip()
    if not secret:
        raise InputError(f"{file}: the server's password is empty; delete the file to get a new one")
    return secret, file


def has_no_password(api: str) -> bool:
    """Whether a Prefect server answers without a password; False if it cannot be reached.

    Args:
        api: URL of its API.
    """
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/admin/version", timeout=_SECONDS) as answer:
            return answer.status == 200
    except (OSError, ValueError, http.client.HTTPException):
        return False


def request(api: str, path: str, body: dict[str, Any] | None = None, secret: str | None = None) -> Any:
    """Send a request to a Prefect server without Prefect's client: POST with a body, else GET.

    Args:
        api: URL of its API.
        path: Path below that URL.
        body: Sent as JSON.
        secret: The server's password.

    Raises:
        OSError: the server does not answer, or refuses the request (urllib.error.HTTPError).
    """
    headers = {"content-type": "application/json"}
    if secret:
        headers["authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
    if body is not None:
        client = str(uuid.uuid4())
        token = _send(f"{api}/csrf-token?client={client}", None, headers)["token"]
        headers |= {"prefect-csrf-token": token, "prefect-csrf-client": client}
    return _send(f"{api}{path}", body, headers)


def _send(url: str, body: dict[str, Any] | None, headers: dict[str, str]) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=_SECONDS) as answer:
        return json.load(answer)
