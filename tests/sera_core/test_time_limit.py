"""What runs too long is ended where it runs, and nothing else is."""

import threading
import time

import pytest
from tiny import tiny_policy

from sera_core import rendering
from sera_core.errors import InputError
from sera_core.rendering import Renderer
from sera_core.time_limit import TooLongError, time_limit

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" + (
    "{% endfor %}{% endfor %}{{ messages[0].content }}"
)


def spin(seconds: float) -> float:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


def test_a_loop_without_end_is_ended():
    started = time.monotonic()
    with pytest.raises(TooLongError), time_limit(0.1):
        spin(60)
    assert time.monotonic() - started < 30


def test_nothing_is_raised_after_the_body():
    for _ in range(3):
        with time_limit(0.05):
            pass
    assert spin(0.6) == 0.6


def test_waiting_does_not_count():
    with time_limit(0.1):
        time.sleep(0.6)


def test_each_thread_has_a_limit_of_its_own():
    ended = {}

    def work(name, seconds):
        try:
            with time_limit(seconds):
                spin(1.5)
            ended[name] = "done"
        except TooLongError:
            ended[name] = "ended"

    threads = [threading.Thread(target=work, args=args) for args in (("short", 0.1), ("long", 60))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == {"short": "ended", "long": "done"}


def test_a_chat_template_that_loops_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 0.3)
    renderer = Renderer(tiny_policy(tmp_path / "policy"), LOOPS)
    with pytest.raises(InputError, match=r"policy takes more than 0.3 s .* set model\.chat_template"):
        renderer.prompt_ids([{"role": "user", "content": "question"}])
