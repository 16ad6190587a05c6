"""The steps that read every row hold no more memory for four times the rows."""

import sys

import pytest
from benchmarks.memory import measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("step", "rows", "most"), [("logps", 400, 1.2), ("pair", 16000, 1.35), ("mix", 16000, 1.35)]
)
def test_four_times_the_rows_take_no_more_memory(tmp_path, step, rows, most):
    """Threads read ahead and write behind, and with fewer rows their buffers are not full.

    With all of 64,000 rows in memory, `pair` would take 1.5 times the memory of 16,000, and `mix` 1.6.
    """
    once, four = (measure(step, rows * times, tmp_path)["peak_mib"] for times in (1, 4))
    assert four <= most * once
