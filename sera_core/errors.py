"""Errors a user can act on. Each message says what was found, where, and what to do."""

from sera_core.guards.shown import shown


class SeraError(Exception):
    """Base class of this project's errors; the command line shows only the message."""

    exit_code = 1

    def __str__(self) -> str:
        """The message with control characters escaped: Prefect logs it and stores it in the run's state."""
        return shown(super().__str__())


class InputError(SeraError, ValueError):
    """Bad arguments, configuration or data (exit code 2)."""

    exit_code = 2


class StoreError(SeraError, OSError):
    """The store failed: a wrong hash, a missing file, a refused write."""


class BusyError(SeraError, RuntimeError):
    """Another process holds the run (exit code 3)."""

    exit_code = 3


class BudgetReached(SeraError):
    """A step crossed a limit; the run ends after it with the stop reason ``budget``."""

    exit_code = 0
