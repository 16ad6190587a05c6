"""The two sides of `sera diff`."""

from flows.display.run_view import run_records
from sera_core.artifacts.differing import Side
from sera_core.artifacts.store import Store
from sera_core.errors import InputError


def side_of(store: Store, text: str) -> Side:
    """Parse `RUN:N`, or `RUN` for its last finished round.

    Raises:
        InputError: no such run or round.
    """
    run, colon, number = text.partition(":")
    records = run_records(store, run)
    rounds = records.rounds()
    if not colon:
        return Side(records, rounds[-1] if rounds else None)
    if not number.isascii() or not number.isdigit() or int(number) >= len(rounds):
        have = f"rounds 0 to {len(rounds) - 1}" if rounds else "no finished round"
        raise InputError(f"{text!r}: run {run!r} has {have}; give RUN:N with one of these, or RUN")
    return Side(records, rounds[int(number)])
