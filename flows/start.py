"""The console script: what may happen before there is a command, and after it.

Importing the commands takes a second, in which Ctrl-C must be quiet too, so this module imports none of them.
"""

import os
import signal
import sys
from collections.abc import Callable

INTERRUPTED = 130


def entry() -> None:
    """Run `sera`. Leaves without waiting for idle threads of libraries."""
    heard = _open_closed_streams()
    code = _flushed(_run())
    os._exit(code if heard else code or 1)


def _open_closed_streams() -> bool:
    """Give closed standard streams the null device; whether stdout was open, so that an answer has a reader.

    Otherwise the next file to be opened would get the number 1, and what libraries print would go into it.
    """
    heard = sys.stdout is not None
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    return heard


def _run() -> int:
    try:
        return _main()()
    except SystemExit as leaving:  # argparse, or rich whose reader has gone
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:  # while an interrupt was being told
        return INTERRUPTED
    except BrokenPipeError:
        return 1


def _main() -> Callable[[], int]:
    """The command line, imported; an interrupt meanwhile ends the process at once."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as in a shell's background job
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from flows.cli import main

    signal.signal(signal.SIGINT, before)
    return main


def _flushed(code: int) -> int:
    """The exit code, once what was written is out; 1 where it got nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone, or the disk is full
            code = code or 1
    return code


if __name__ == "__main__":
    entry()
