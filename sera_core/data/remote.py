"""Turn errors of remote file systems into one message that says what to check."""

from collections.abc import Iterator
from contextlib import contextmanager

from sera_core.errors import InputError, SeraError
from sera_core.guards.urls import without_secrets


@contextmanager
def reading_remote(url: str, what: str = "file") -> Iterator[None]:
    """Turn any exception of a remote file system into an InputError.

    Args:
        url: the URL to read; credentials and everything after `?` are not shown.
        what: `file` or `folder`, for the message.
    """
    shown = without_secrets(url).split("?", 1)[0]
    try:
        yield
    except SeraError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{shown}: no such {what}; correct the URL") from error
    except ImportError as error:
        raise InputError(f"{shown}: install the missing package to read it ({error})") from error
    except RecursionError as error:  # s3fs follows redirects to another region without limit
        raise InputError(
            f"{shown}: cannot be read (endless redirects); check region and endpoint in the environment"
        ) from error
    except Exception as error:
        # file systems raise their own classes for refused, unreachable and unknown
        raise InputError(
            f"{shown}: cannot be read ({type(error).__name__}); check the URL, the network, and the endpoint "
            "and credentials in the environment"
        ) from error
