"""Is this work of a deployed flow? Then a person looks at it in Prefect's UI, not on a terminal."""

import sys
from functools import cache
from uuid import UUID


def in_deployed_run() -> bool:
    """Whether this code runs in a flow run, or a task run of one, that a deployment began."""
    if "prefect" not in sys.modules:  # importing it takes seconds; who is in a run has done it
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    task, flow = TaskRunContext.get(), FlowRunContext.get()
    if task is not None and task.task_run.flow_run_id is not None:
        return _is_deployed(task.task_run.flow_run_id)
    return flow is not None and flow.flow_run is not None and _is_deployed(flow.flow_run.id)


@cache
def _is_deployed(flow_run_id: UUID) -> bool:
    """Of the run this is called in. Where the answer is no, Prefect asks its server for it each time."""
    from prefect.runtime import deployment

    return deployment.id is not None
