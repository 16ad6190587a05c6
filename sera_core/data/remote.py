"""What a remote file system says when it cannot be read, as one message with what to check."""

from collections.abc import Iterator
from contextlib import contextmanager

from sera_core.errors import InputError, SeraError
from sera_core.guards.urls import without_secrets


@contextmanager
def reading_remote(url: str, what: str = "file") -> Iterator[None]:
    """Turn whatever a remote file system raises into an InputError.

    Args:
        url: what is read; credentials and anything from `?` on are not shown.
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
        raise InputError(f"{shown}: reading it needs a package that is not installed ({error})") from error
    except RecursionError as error:  # s3fs follows a redirect to another region for ever
        raise InputError(
            f"{shown}: cannot be read (the server redirects without end); check the region and the endpoint "
            "in the environment"
        ) from error
    except Exception as error:
        # every file system raises classes of its own for refused, unreachable, unknown
        raise InputError(
            f"{shown}: cannot be read ({type(error).__name__}); check the URL, the network, and the endpoint "
            "and credentials in the environment"
        ) from error
