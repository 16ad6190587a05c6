"""Work that behaves badly, for a child process to do: what it finds and starts is written below a folder."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sera_core.artifacts.step import Attempt
from sera_core.errors import BudgetReached, InputError


def place(attempt: Attempt) -> Path:
    """The folder that the test looks into."""
    return Path(attempt.spec.where["place"])


def note(path: Path, text: object) -> None:
    """Write a file that is there as a whole or not at all."""
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def speak(attempt: Attempt) -> list[str]:
    """Tell three times how it goes, print, and finish with what it was given."""
    for done in (1, 2, 3):
        attempt.progress(done, 3, "words")
    os.write(1, b"first line\nbar 1\rbar 2\rbar 3\n")
    sys.stderr.write("no end of line")
    attempt.write("said.txt").write_text(repr(attempt.fields))
    return ["said.txt"]


def count_threads(attempt: Attempt) -> list[str]:
    """How many threads torch would use."""
    import torch

    attempt.metrics["threads"] = torch.get_num_threads()
    return speak(attempt)


def describe_process(attempt: Attempt) -> list[str]:
    """Where this runs, and with what."""
    names = ("SERA_TEST_WORD", "TEST_WORD")
    seen: dict[str, Any] = {name: os.environ.get(name) for name in names}
    seen |= {"parent": os.getppid(), "directory": str(Path.cwd()), "torch": "torch" in sys.modules}
    seen |= {"module": sys.modules["__main__"].__spec__.name, "threads": threading.active_count()}
    attempt.write("said.txt").write_text(json.dumps(seen))
    return ["said.txt"]


def print_pid(attempt: Attempt) -> list[str]:
    """Print the process ID, and end with what its fields say."""
    sys.stdout.write(f"{os.getpid()}\n")
    if attempt.fields.get("fails"):
        raise InputError("told to fail")
    return speak(attempt)


def multiply(attempt: Attempt) -> list[str]:
    """Tell when a product on the device is done, which opens it."""
    import torch

    device = torch.device(attempt.spec.where["device"])
    float((torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum())
    return speak(attempt)


def refuse(attempt: Attempt) -> list[str]:
    """What a user can mend."""
    raise InputError("row 17: chosen and rejected are the same text; drop it")


def reach_a_limit(attempt: Attempt) -> list[str]:
    """An error that is no failure."""
    raise BudgetReached("12 tokens: limits.tokens = 10")


def break_down(attempt: Attempt) -> list[str]:
    """A bug."""
    raise ZeroDivisionError("by nothing")


def die_after_a_part(attempt: Attempt) -> list[str]:
    """Commit a part and be killed; go on from it the next time."""
    parts = attempt.parts()
    if not parts:
        attempt.write("part.txt").write_text("half")
        attempt.commit_part(0, ["part.txt"], {"by": attempt.id})
        os.kill(os.getpid(), signal.SIGKILL)
    attempt.use_parts(parts)
    attempt.write("whole.txt").write_text(attempt.part_path(parts[0], "part.txt").read_text() + " and half")
    return ["whole.txt"]


def die_when_done(attempt: Attempt) -> list[str]:
    """Be killed on the way out, the result in the store."""
    import atexit

    atexit.register(os.kill, os.getpid(), signal.SIGKILL)
    return speak(attempt)


def exit_early(attempt: Attempt) -> list[str]:
    """Leave without a word."""
    os._exit(7)


def hold_the_interpreter(attempt: Attempt) -> list[str]:
    """Sleep in C without letting another thread of this process run."""
    ctypes.PyDLL(None).sleep(3)
    return speak(attempt)


def wait_with_a_grandchild(attempt: Attempt) -> list[str]:
    """Work for ever beside a process of its own, both deaf to a polite end if they are told to be."""
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if attempt.fields["deaf"] else ""
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", f"{deaf} import time; time.sleep(600)"])
    note(place(attempt) / "group", os.getpgrp())
    try:
        if attempt.fields["holds"]:
            ctypes.PyDLL(None).sleep(600)
        time.sleep(600)
    finally:
        note(place(attempt) / "cleaned", "yes")
    return []


def leave_a_grandchild(attempt: Attempt) -> list[str]:
    """Finish, with a process still running that holds the output and goes on printing."""
    chatter = "import time\nwhile True: print('still here', flush=True); time.sleep(0.05)"
    subprocess.Popen([sys.executable, "-c", chatter])
    note(place(attempt) / "group", os.getpgrp())
    return speak(attempt)


def stay(attempt: Attempt) -> list[str]:
    """Finish, with a thread that keeps the process from leaving."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    return speak(attempt)


def train_and_wait(attempt: Attempt) -> list[str]:
    """Train as always, but in round 1 wait after the second step, whose progress is told, to be killed."""
    from tasks.training import train_policy

    tell, told = attempt.progress, []

    def progress(*report: Any) -> None:
        told.append(report)
        tell(*report)
        if attempt.fields["round"] == 1 and len(told) == 2:
            time.sleep(600)

    attempt.progress = progress
    return train_policy(attempt)
