"""The progress artifact of a step: seldom, never in the way of the work."""

import time
from itertools import pairwise

from flows.display import progress


class Clock:
    """Prefect's two functions, keeping when they were called, and failing if told to."""

    def __init__(self, monkeypatch, fails=False):
        self.calls, self.fails = [], fails
        monkeypatch.setattr("prefect.artifacts.create_progress_artifact", self.create)
        monkeypatch.setattr("prefect.artifacts.update_progress_artifact", self.update)
        monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.2)
        monkeypatch.setattr(progress, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(progress, "_key", lambda title: title)

    def create(self, percent, key, description):
        self.calls.append((time.monotonic(), percent))
        if self.fails:
            raise OSError("no server")
        return 7

    def update(self, id, percent, description):
        self.calls.append((time.monotonic(), percent))


def test_a_busy_step_asks_the_server_no_oftener_than_the_throttle(monkeypatch):
    clock, begun = Clock(monkeypatch), time.monotonic()
    with progress._artifact("train") as report:
        while time.monotonic() - begun < 1.1:
            report(int(1000 * (time.monotonic() - begun)), 1100, "pairs")
    *throttled, last = clock.calls
    times = [begun, *(at for at, _ in throttled)]
    assert 3 <= len(throttled) <= 5 and last[1] == 100.0
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(times))


def test_a_server_that_fails_does_not_fail_the_step_and_is_named_once(monkeypatch, capsys):
    clock = Clock(monkeypatch, fails=True)
    with progress._artifact("train") as report:
        for done in range(8):
            report(done, 8, "pairs")
            time.sleep(0.1)
    assert len(clock.calls) >= 2
    assert capsys.readouterr().err == "train: cannot show progress (no server)\n"


def test_a_step_that_is_short_or_says_nothing_makes_no_artifact(monkeypatch):
    clock = Clock(monkeypatch)
    with progress._artifact("train") as report:
        report(1, 2, "pairs")
    with progress._artifact("decide"):
        time.sleep(0.4)
    assert clock.calls == []
