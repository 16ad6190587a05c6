"""Do steps beside the loop (extra measurements of a finished run): from the store, or now. No Prefect."""

from collections.abc import Callable

from flows.display.progress import reporter
from sera_core.artifacts.manifest import StepRef, StepSpec, find_record
from sera_core.artifacts.store import Store
from sera_core.config import ExecutionConfig


def doing_aside(store: Store, execution: ExecutionConfig, what: str) -> Callable[[StepSpec], StepRef]:
    """A `do` for such steps.

    Args:
        store: the store.
        execution: execution settings.
        what: what the steps are for, shown with their progress.
    """

    def do(spec: StepSpec) -> StepRef:
        if (found := find_record(store, spec.step, spec.key)) is not None:
            return found.ref
        from tasks.step_functions import do_work

        with reporter(f"{what}: {spec.step}") as progress:
            return do_work(store.url, spec, execution, progress).ref

    return do
