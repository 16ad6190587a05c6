"""The laboratory, simulated histories and the alarm's sweep, in one file: `make lab`. Writes latest.json.

    python -m tests.laboratory [FILES [COPIES [DRAWS]]]    flip,noise,corr, 1,000 copies, 20 draws

`arms`: what `sera lab --json` says of each train file, arm and seed. `verdicts`: shares of noisy copies of a
history of true levels, with 1,000 held-out pairs; `verdicts_demo`: with as many as the demo has. `alarm`:
shares of draws of a linear stand-in. All in [0, 1].
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
DEMO, LARGE = list(SIZES)[:2]
HISTORIES = {
    "improving by 0.03 a round": "improving",
    "plateau after round 2": "plateau",
    "plateau, then drop of 0.10": "drop_of_0.10",
    "plateau, then drop of 0.05": "drop_of_0.05",
    "one bad round, then recovery": "one_bad_round",
    "decline of 0.03 a round": "slow_decline",
}
"""Names in latest.json."""


def arms(files: str) -> dict[str, Any]:
    """The comparisons, run or from the store."""
    command = [sys.executable, "-P", "-m", "flows.cli", "lab", "--files", files, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)["arms"]
    for run in (run for by_arm in found.values() for by_seed in by_arm.values() for run in by_seed.values()):
        if run["alarm"] is not None:
            del run["alarm"]["features"]  # its state and the features it was raised for say enough here
    return found


def verdicts(copies: int, size: Any) -> dict[str, Any]:
    """What the decision makes of each history."""
    rows = table(copies, replace(Rule(), resamples=1000), [size])
    names = ("stopped_early", "found", "false_falls", "converged", "last")
    return {HISTORIES[history]: {name: getattr(row, name) for name in names} for _, history, row in rows}


def alarm(draws: int) -> dict[str, Any]:
    """False alarms without a spurious feature, and power by correlation and label noise."""
    power = {
        str(correlation): {str(noise): cell(correlation, noise, draws).clean for noise in NOISES}
        for correlation in CORRELATIONS
    }
    return {"false_alarms": float(np.mean([null(noise, draws)[0] for noise in NOISES])), "power": power}


def main(files: str = "flip,noise,corr", copies: str = "1000", draws: str = "20") -> None:
    """Measure all, and write latest.json."""
    found = {
        "arms": arms(files),
        "verdicts": verdicts(int(copies), LARGE),
        "verdicts_demo": verdicts(int(copies), DEMO),
        "alarm": alarm(int(draws)),
    }
    LATEST.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
