"""The laboratory, simulated histories and the alarm's sweep, in one file: `make lab`. Writes latest.json.

    python -m tests.laboratory [FILES [COPIES [DRAWS]]]    flip,noise,corr, 1,000 copies, 20 draws

`arms`: what `sera lab --json` says of each train file, arm and seed. `verdicts`: shares of noisy copies of a
history of true levels, at two held-out sizes. `alarm`: shares of draws of a linear stand-in. All in [0, 1].
The runs take an hour and a half on two cores and resume; the rest a quarter of an hour.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sera_core.method.convergence import Rule
from tests.sera_core.method.histories import SIZES, table
from tests.sera_core.method.sweep import CORRELATIONS, NOISES, cell, null

LATEST = Path(__file__).with_name("latest.json")
SIZES_TOLD = {"demo": 0, "1,000 pairs": 1}
"""Held-out sides, by their place in SIZES."""


def arms(files: str) -> dict[str, Any]:
    """The comparisons, run or from the store."""
    command = [sys.executable, "-P", "-m", "flows.cli", "lab", "--files", files, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)["arms"]


def verdicts(copies: int) -> dict[str, Any]:
    """What the decision makes of each history, by held-out size."""
    rule, found = replace(Rule(), resamples=1000), {}
    for name, place in SIZES_TOLD.items():
        rows = table(copies, rule, [list(SIZES)[place]])
        found[name] = {
            history: {
                "stopped_early": row.stopped_early,
                "found": row.found,
                "false_falls": row.false_falls,
                "converged": row.converged,
                "last": row.last,
            }
            for _, history, row in rows
        }
    return found


def alarm(draws: int) -> dict[str, Any]:
    """False alarms without a spurious feature, and power by correlation and label noise."""
    power = {
        str(correlation): {str(noise): cell(correlation, noise, draws).clean for noise in NOISES}
        for correlation in CORRELATIONS
    }
    return {"false_alarms": float(np.mean([null(noise, draws)[0] for noise in NOISES])), "power": power}


def main(files: str = "flip,noise,corr", copies: str = "1000", draws: str = "20") -> None:
    """Measure all, and write latest.json."""
    found = {"arms": arms(files), "verdicts": verdicts(int(copies)), "alarm": alarm(int(draws))}
    LATEST.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
