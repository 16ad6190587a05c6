"""Whether this code runs in a deployed flow, whose output belongs in Prefect's UI."""

import sys
from functools import cache
from uuid import UUID


def in_deployed_run() -> bool:
    """Whether this code runs in a flow run of a deployment, or in one of its task runs."""
    if "prefect" not in sys.modules:  # importing it takes seconds; a flow run has done so
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    task, flow = TaskRunContext.get(), FlowRunContext.get()
    if task is not None and task.task_run.flow_run_id is not None:
        return _is_deployed(task.task_run.flow_run_id)
    return flow is not None and flow.flow_run is not None and _is_deployed(flow.flow_run.id)


@cache
def _is_deployed(flow_run_id: UUID) -> bool:
    """Cached, because Prefect queries its server each time if the answer is no."""
    from prefect.runtime import deployment

    return deployment.id is not None
