"""What Prefect costs a round: a deployed run's time outside the steps' own work, on a real server and worker.

    python -m tests.benchmarks.orchestration

The run is the tests' tiny one, so that hardly anything but orchestration is left. The share of a ten-minute
run follows from it: rounds × seconds a round / 600.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules

import places
import servers
import tinyrun

ROUNDS = 6


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as scratch, places.place(Path(scratch) / "prefect") as place:
        folder = Path(scratch)
        store = folder / "store"
        form = tinyrun.form(folder, limits={"rounds": ROUNDS})
        parameters = {"config": form, "run": "timed", "store": str(store)}
        flow_run = servers.trigger(place.environment, "sera/sera", parameters)
        found = servers.wait_for_state(place.environment, flow_run, seconds=900)
        assert found["state"]["type"] == "COMPLETED", found["state"]
        work = sum(json.loads(path.read_text())["seconds"] for path in store.glob("steps/*/*/done.json"))
    total = found["total_run_time"]
    each = (total - work) / ROUNDS
    print(f"{ROUNDS} rounds: {total:.1f} s in the flow run, {work:.1f} s of them in steps")
    share = 100 * 3 * each / 600
    print(f"orchestration: {each:.2f} s a round; {share:.1f} % of a ten-minute run of 3 rounds")


if __name__ == "__main__":
    main()
