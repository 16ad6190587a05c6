"""The steps that read every row hold no more memory for four times the rows."""

import sys

import pytest
from benchmarks.memory import measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("step", "rows"), [("logps", 400), ("pair", 4000), ("mix", 4000)])
def test_four_times_the_rows_take_no_more_memory(tmp_path, step, rows):
    once, four = (measure(step, rows * times, tmp_path)["peak_mib"] for times in (1, 4))
    assert four <= 1.2 * once
