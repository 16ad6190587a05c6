"""Which function does the work of which step, and where: here, or in a child process group."""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

from sera_core.artifacts.lease import claim
from sera_core.artifacts.manifest import StepRecord, StepSpec
from sera_core.artifacts.step import Progress, Work, make_step, quiet
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.models.devices import device_of
from tasks.engines.child import Log, run_in_child, to_stderr

WORK = {
    "data": "tasks.data:load_pairs",
    "model": "tasks.model_import:import_model",
    "render": "tasks.data:render_pairs",
    "logps": "tasks.scoring:score_texts",
    "review": "tasks.reviewing:review_pairs",
    "select": "tasks.reviewing:select_pairs",
    "sample": "tasks.sampling:sample_responses",
    "pair": "tasks.pairing:pair_samples",
    "mix": "tasks.mixing:mix_pairs",
    "train": "tasks.training:train_policy",
    "evaluate": "tasks.evaluating:evaluate_policy",
    "test": "tasks.evaluating:test_policy",
    "decide": "tasks.deciding:decide_round",
    "report": "tasks.reporting:report_round",
}
"""Imported when it is needed: trl and torch take seconds."""

DEVICE_STEPS = frozenset({"logps", "sample", "train"})
"""Steps that put a policy on the device."""
CHILD_STEPS = DEVICE_STEPS | {"evaluate", "test"}
"""Steps that may run in a child process group."""
CLAIMED_STEPS = DEVICE_STEPS
"""Steps that may take long: whoever needs one that is being done waits for it."""
NOTHING = nullcontext()


def work_of(step: str) -> Work:
    """The function that does a step's work: (attempt) -> relative paths of the files it wrote."""
    module, name = WORK[step].split(":")
    return getattr(import_module(module), name)


def do_work(
    store_url: str,
    spec: StepSpec,
    execution: ExecutionConfig,
    progress: Progress = quiet,
    log: Log = to_stderr,
    device: AbstractContextManager[None] = NOTHING,
) -> StepRecord:
    """The record of a step that has none yet: made now, in this process or in a child.

    Args:
        store_url: folder or URL of the store.
        spec: the step. Whoever asks has looked for its record (`Session.do`).
        execution: how it is done; `child` and `device` say where.
        progress: told how the work goes.
        log: told every line that a child prints, and what is waited for.
        device: entered for the work alone, not while another one's record is waited for.

    Raises:
        SeraError: what the work raised, by the same class wherever it ran; or a child died, and how.
    """
    store = open_store(store_url, remember=True)
    with claim(store, spec, log) if spec.step in CLAIMED_STEPS else NOTHING as record:
        if record is not None:
            return record
        with device:
            if spec.step in CHILD_STEPS and in_child(execution):
                return run_in_child(WORK[spec.step], store_url, spec, execution, progress, log)
            return make_step(store, spec, work_of(spec.step), execution, progress)


def in_child(execution: ExecutionConfig) -> bool:
    """Whether device work runs in a child process group."""
    if execution.child == "auto":
        return device_of(execution.device) != "cpu"
    return execution.child == "always"
