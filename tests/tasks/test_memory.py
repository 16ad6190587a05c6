"""The steps that read every row hold no more memory for many times the rows."""

import sys

import pytest
from benchmarks.memory import measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("step", "rows", "times", "most"),
    [
        ("logps", 400, 4, 1.2),
        ("pair", 4000, 4, 1.2),
        # Threads read ahead and write behind: 4,000 rows end before their buffers are full. With all of
        # 64,000 rows in memory the peak would be 1.6 times that of 16,000.
        ("mix", 16000, 4, 1.35),
    ],
)
def test_many_times_the_rows_take_no_more_memory(tmp_path, step, rows, times, most):
    once, many = (measure(step, rows * factor, tmp_path)["peak_mib"] for factor in (1, times))
    assert many <= most * once
