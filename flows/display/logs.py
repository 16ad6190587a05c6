"""Logging: to the Prefect run in a deployed flow, else to stderr."""

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
    """A function that logs a line to the current deployed flow run, else to stderr; from any thread."""
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
    """Escapes control characters and removes credentials."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(without_secrets_in(record.getMessage())), ()
        if record.exc_info:  # formatters use exc_text if it is set
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text = shown(without_secrets_in(text))
        return True


_SHOWN = _Shown()


def escape_prefect_logs() -> None:
    """Escape Prefect's own log lines about flow and task runs, such as error messages."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_SHOWN)


@contextmanager
def library_logs() -> Iterator[None]:
    """Send logs of TRL, transformers, vLLM and our steps to the deployed run while the block runs.

    PREFECT_LOGGING_EXTRA_LOGGERS is not enough: it sets no level, so only warnings pass; it has no run in a
    library's threads; and vLLM drops the handler on import.
    """
    if not in_deployed_run():
        yield
        return
    from prefect.logging import get_run_logger
    from prefect.logging.handlers import APILogHandler
    from prefect.logging.loggers import PrefectLogAdapter

    run = cast(PrefectLogAdapter, get_run_logger()).extra or {}

    class ToRun(APILogHandler):
        """Logs to this run, from any thread."""

        def emit(self, record: logging.LogRecord) -> None:
            record.__dict__.update(run)
            super().emit(record)

        def format(self, record: logging.LogRecord) -> str:
            return shown(super().format(record))

    with forward_library_logs(ToRun()):
        yield
