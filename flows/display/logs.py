"""Lines for the log of the Prefect run where a person reads it there, else for stderr."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from flows.display.deployed import in_deployed_run
from sera_core.guards.shown import shown
from sera_core.guards.urls import without_secrets_in
from tasks.engines.child import to_stderr
from tasks.engines.library_logs import forward_library_logs


def run_log() -> Callable[[str], None]:
    """A function that logs a line: to the run this is called in, if it is a deployed flow's, else to stderr.

    It may be called from any thread.
    """
    if not in_deployed_run():
        return to_stderr
    from prefect.logging import get_run_logger
    from prefect.logging.loggers import PrefectLogAdapter

    logger = cast(PrefectLogAdapter, get_run_logger()).getChild("sera")

    def log(line: str) -> None:
        if line.strip():
            logger.info("%s", shown(line.rstrip()))

    return log


class _Shown(logging.Filter):
    """Lets every line through with nothing in it that acts on a terminal or hides, and no credentials."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(without_secrets_in(record.getMessage())), ()
        if record.exc_info:  # what a formatter finds here it takes as it is
            told = logging.Formatter().formatException(record.exc_info)
            record.exc_text = shown(without_secrets_in(told))
        return True


_SHOWN = _Shown()


def show_prefects_lines() -> None:
    """What Prefect itself logs of runs and tasks, an error's message among it, is shown as text."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_SHOWN)


@contextmanager
def library_logs() -> Iterator[None]:
    """Log lines of TRL, transformers, vLLM and our own steps go to the deployed run while the block runs.

    PREFECT_LOGGING_EXTRA_LOGGERS alone does not do it: it sets no level, so only warnings pass, it knows no
    run in a library's own threads, and vLLM drops the handler when it is imported.
    """
    if not in_deployed_run():
        yield
        return
    from prefect.logging import get_run_logger
    from prefect.logging.handlers import APILogHandler
    from prefect.logging.loggers import PrefectLogAdapter

    run = cast(PrefectLogAdapter, get_run_logger()).extra or {}

    class ToRun(APILogHandler):
        """To this run, from any thread."""

        def emit(self, record: logging.LogRecord) -> None:
            record.__dict__.update(run)
            super().emit(record)

        def format(self, record: logging.LogRecord) -> str:
            return shown(super().format(record))

    with forward_library_logs(ToRun()):
        yield
