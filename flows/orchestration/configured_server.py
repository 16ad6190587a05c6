"""The Prefect server of PREFECT_API_URL: whether it is there, in one line and before anything is begun."""

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from sera_core.errors import InputError

ANSWER_SECONDS = 10
REMEDY = "`sera up` starts one; `sera run` brings a server of its own when PREFECT_API_URL is not set"


@contextmanager
def named_server(url: str) -> Iterator[str]:
    """Use a server while the block runs.

    Raises:
        InputError: the URL is none, nobody answers, or what answers is no Prefect server.
    """
    check_server(url)
    try:
        yield url
    except RuntimeError as error:
        if not str(error).startswith("Failed to reach API at"):
            raise
        raise InputError(
            f"{_variable(url)}: what answers there is not Prefect's API (--debug shows its answer); give its "
            f"whole address, which mostly ends in /api. {REMEDY}"
        ) from error


def check_server(url: str) -> None:
    """Whether somebody answers; who it is, Prefect's client finds out: it knows about certificates and keys.

    Raises:
        InputError: the URL is none, or nobody answers.
    """
    address = _health(url)
    if address is None:
        raise InputError(f"{_variable(url)}: this is not an address like http://127.0.0.1:4200/api; {REMEDY}")
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # somebody answered
    except ssl.SSLError:
        pass  # likewise
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise _nobody(url, error.reason) from error
    except OSError as error:  # it took too long to answer, or hung up
        raise _nobody(url, error) from error
    except (http.client.HTTPException, ValueError):
        pass  # somebody answered, and not in HTTP: let Prefect's client say so


def _health(url: str) -> str | None:
    """Where to ask, without user and password, which urllib cannot read; None for no address."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number, a bracket that is not closed
        return None
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health" if known else None


def _nobody(url: str, why: object) -> InputError:
    return InputError(f"{_variable(url)}: no Prefect server answers there ({why}); {REMEDY}")


def _variable(url: str) -> str:
    """The variable with its value, a password left out."""
    start, _, rest = url.rpartition("@")
    return f"PREFECT_API_URL={start.partition('://')[0] + '://…@' if start else ''}{rest}"
