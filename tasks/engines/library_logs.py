"""Forward the libraries' log lines to a handler. The command line shows none of them, only errors."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

VERBOSE_LIBRARIES = ("sera", "trl", "vllm")
"""Libraries logged from INFO on; transformers only from WARNING on, because it logs every file it reads."""
LIBRARIES = (*VERBOSE_LIBRARIES, "transformers")
_VLLM = "VLLM_CONFIGURE_LOGGING"


@contextmanager
def forward_library_logs(handler: logging.Handler, names: Sequence[str] = LIBRARIES) -> Iterator[None]:
    """Send these libraries' log lines to `handler` while the block runs.

    A logger's own handlers of the same type are disabled meanwhile, so that no line appears twice.
    """
    resting = [
        (logger, other)
        for logger in map(logging.getLogger, names)
        for other in logger.handlers
        if isinstance(handler, type(other))
    ]
    levels = {name: logging.getLogger(name).level for name in VERBOSE_LIBRARIES}
    set_by_user = os.environ.get(_VLLM)
    os.environ.setdefault(_VLLM, "0")  # otherwise importing vLLM removes all handlers
    for logger, other in resting:
        logger.removeHandler(other)
    for name in names:
        logging.getLogger(name).addHandler(handler)
    for name in VERBOSE_LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in names:
            logging.getLogger(name).removeHandler(handler)
        for logger, other in resting:
            logger.addHandler(other)
        if set_by_user is None:
            del os.environ[_VLLM]


def is_forwarded(name: str) -> bool:
    """Whether the library's log level is set below WARNING, so that its lines are forwarded now."""
    return 0 < logging.getLogger(name).level <= logging.INFO


@contextmanager
def hide_library_notices() -> Iterator[None]:
    """Hide the libraries' notices on the terminal; libraries with an attached log handler keep theirs."""
    names = [n for n in ("transformers", "trl", "accelerate", "peft", "datasets") if not is_forwarded(n)]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
