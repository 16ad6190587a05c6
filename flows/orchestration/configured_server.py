"""The Prefect server at PREFECT_API_URL: check it before a run starts, and fail with a one-line error."""

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from sera_core.errors import InputError

ANSWER_SECONDS = 10
REMEDY = "start one with `sera up`, or unset PREFECT_API_URL: `sera run` then starts its own"


@contextmanager
def use_server(url: str) -> Iterator[str]:
    """Use a server while the block runs.

    Raises:
        InputError: the URL is invalid, nothing answers, or it is not a Prefect server.
    """
    check_server(url)
    try:
        yield url
    except RuntimeError as error:
        if not str(error).startswith("Failed to reach API at"):
            raise
        raise InputError(
            f"{_variable(url)}: this is not Prefect's API (--debug shows the response); give the full "
            f"URL, which usually ends in /api; {REMEDY}"
        ) from error


def check_server(url: str) -> None:
    """Check that something answers. Prefect's client checks the rest, such as certificates and keys.

    Raises:
        InputError: the URL is invalid, or nothing answers.
    """
    address = _health_url(url)
    if address is None:
        raise InputError(f"{_variable(url)}: this is not a URL like http://127.0.0.1:4200/api; {REMEDY}")
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # something answered
    except ssl.SSLError:
        pass  # something answered
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise _no_server(url, error.reason) from error
    except OSError as error:  # timeout or closed connection
        raise _no_server(url, error) from error
    except (http.client.HTTPException, ValueError):
        pass  # not an HTTP answer: Prefect's client reports it


def _health_url(url: str) -> str | None:
    """The health URL without user and password, which urllib cannot parse; None if `url` is invalid."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # bad port or bracket
        return None
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health" if known else None


def _no_server(url: str, why: object) -> InputError:
    return InputError(f"{_variable(url)}: no Prefect server answers ({why}); {REMEDY}")


def _variable(url: str) -> str:
    """The variable and its value, without the password."""
    start, _, rest = url.rpartition("@")
    return f"PREFECT_API_URL={start.partition('://')[0] + '://…@' if start else ''}{rest}"
