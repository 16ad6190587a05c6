"""Log lines of the libraries, for who keeps a log. Our command line shows none: there an error is enough."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

TALKATIVE = ("sera", "trl", "vllm")
"""Whose lines are wanted from INFO on; transformers describes each file it reads there: its warnings do."""
LIBRARIES = (*TALKATIVE, "transformers")
_VLLM = "VLLM_CONFIGURE_LOGGING"


@contextmanager
def hear_libraries(handler: logging.Handler, names: Sequence[str] = LIBRARIES) -> Iterator[None]:
    """Hand these libraries' log lines to `handler` while the block runs.

    A logger's own handlers of this kind rest meanwhile, so that no line comes twice; others go on.
    """
    resting = [
        (logger, other)
        for logger in map(logging.getLogger, names)
        for other in logger.handlers
        if isinstance(handler, type(other))
    ]
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    set_by_user = os.environ.get(_VLLM)
    os.environ.setdefault(_VLLM, "0")  # at its import vLLM would drop every handler it finds
    for logger, other in resting:
        logger.removeHandler(other)
    for name in names:
        logging.getLogger(name).addHandler(handler)
    for name in TALKATIVE:
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


def is_heard(name: str) -> bool:
    """Whether somebody listens to the library now: its level was set, and below warnings."""
    return 0 < logging.getLogger(name).level <= logging.INFO
