"""The password of a Prefect server we start, and whether somebody else's server asks for one."""

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
"""What a Prefect server asks for."""
CLIENT_SECRET = "PREFECT_API_AUTH_STRING"
"""What Prefect's client shows a server that asks for it."""
NO_PASSWORD = (
    "the Prefect server of PREFECT_API_URL asks for no password: whoever reaches it can run code on its "
    f"workers; start it with {SERVER_SECRET}=user:password, and give its clients {CLIENT_SECRET}"
)
_SECONDS = 10


def new_secret() -> str:
    """A password nobody can guess, in the form `user:password` that Prefect's clients expect."""
    return f"sera:{secrets.token_urlsafe(24)}"


def secret_of(home: Path) -> tuple[str, Path | None]:
    """The password of the server of `sera up`: the user's own, else one made once and kept in the home.

    Returns:
        The password, and the file (0600) that holds it; None where the user's environment has it.

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
        raise InputError(f"{file}: the server's password is empty; delete the file, and a new one is made")
    return secret, file


def asks_for_no_password(api: str) -> bool:
    """Whether a Prefect server answers somebody who shows nothing; False where that cannot be told.

    Args:
        api: URL of its API.
    """
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/admin/version", timeout=_SECONDS) as answer:
            return answer.status == 200
    except (OSError, ValueError, http.client.HTTPException):
        return False


def ask(api: str, path: str, body: dict[str, Any] | None = None, secret: str | None = None) -> Any:
    """Send a request to a Prefect server without Prefect's client: POST with a body, else GET.

    Args:
        api: URL of its API.
        path: What comes after it.
        body: Sent as JSON.
        secret: The server's password.

    Raises:
        OSError: the server does not answer, or refuses (urllib.error.HTTPError).
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
