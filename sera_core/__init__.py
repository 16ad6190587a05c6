"""SeRA's mathematics, data handling and store. Imports no Prefect, no trainer and no sampling engine."""

from typing import Any

__version__ = "0.1.0"


def open_run(store: str, run: str) -> Any:
    """Open a run for reading, without Prefect or torch: ``open_run("./sera-store", "demo").rounds``."""
    from sera_core.artifacts.reading import Run

    return Run(store, run)
