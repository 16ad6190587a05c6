"""Errors a user can act on. Each message says what was found, where, and what to do."""

from sera_core.guards.shown import shown


class SeraError(Exception):
    """Base of every error this project raises on purpose; the command line shows only its message."""

    exit_code = 1

    def __str__(self) -> str:
        """The message as it may be shown: Prefect logs it, and keeps it as the message of a state."""
        return shown(super().__str__())


class InputError(SeraError, ValueError):
    """Bad arguments, configuration or data (exit code 2)."""

    exit_code = 2


class StoreError(SeraError, OSError):
    """The store broke a promise: a wrong hash, a missing file, a refused write."""


class BusyError(SeraError, RuntimeError):
    """Someone else holds the run (exit code 3)."""

    exit_code = 3


class BudgetReached(SeraError):
    """A step crossed a limit; the run ends after it with the stop reason ``budget``."""

    exit_code = 0
