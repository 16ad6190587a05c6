"""The console script: handles closed streams, Ctrl-C and broken pipes around a command.

Importing the commands takes a second. Ctrl-C must exit quietly during that too, so this module imports none.
"""

import os
import signal
import sys
from collections.abc import Callable

INTERRUPTED = 130


def entry() -> None:
    """Run `sera`, and exit without waiting for idle library threads."""
    stdout_open = _open_closed_streams()
    code = _run()
    exit_at_once(code if stdout_open else _flush(code) or 1)


def exit_at_once(code: int) -> None:
    """Exit without waiting for idle library threads."""
    os._exit(_flush(code))


def _open_closed_streams() -> bool:
    """Open closed standard streams on the null device. Returns whether stdout was open.

    Otherwise the next opened file would get descriptor 1, and library output would be written into it.
    """
    stdout_open = sys.stdout is not None
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    return stdout_open


def _run() -> int:
    try:
        return _main()()
    except SystemExit as exit_:  # argparse, or rich after a broken pipe
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:  # during the report of an interrupt
        return INTERRUPTED
    except BrokenPipeError:
        return 1


def _main() -> Callable[[], int]:
    """Import the command line; an interrupt during the import ends the process at once."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not ignored, as it is in a shell's background job
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from flows.cli import main

    signal.signal(signal.SIGINT, before)
    return main


def _flush(code: int) -> int:
    """Flush the output. Returns the exit code, or 1 if flushing failed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # broken pipe or full disk
            code = code or 1
    return code


if __name__ == "__main__":
    entry()
