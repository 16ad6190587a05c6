"""Map each step to its function, and run it here or in a child process group."""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

from sera_core.artifacts.lease import claim, held
from sera_core.artifacts.manifest import StepRecord, StepSpec
from sera_core.artifacts.step import Progress, Work, make_step, no_progress
from sera_core.artifacts.store import Store, open_store
from sera_core.config import ExecutionConfig
from sera_core.models.devices import device_of, training_processes
from tasks.engines.child import Log, run_in_child, to_stderr

WORK = {
    "data": "tasks.data:load_pairs",
    "model": "tasks.model_import:import_model",
    "render": "tasks.data:render_pairs",
    "messages": "tasks.conversations:read_messages",
    "examples": "tasks.conversations:render_examples",
    "sft": "tasks.fine_tuning:fine_tune",
    "features": "tasks.measuring:measure_features",
    "logps": "tasks.scoring:score_texts",
    "review": "tasks.reviewing:review_pairs",
    "select": "tasks.reviewing:select_pairs",
    "sample": "tasks.sampling:sample_responses",
    "candidates": "tasks.candidates:load_candidates",
    "rate": "tasks.rating:rate_samples",
    "pair": "tasks.pairing:pair_samples",
    "mix": "tasks.mixing:mix_pairs",
    "train": "tasks.training:train_policy",
    "capabilities": "tasks.capabilities:score_capabilities",
    "calibrate": "tasks.judging:calibrate_on_heldout",
    "judge": "tasks.judging:judge_samples",
    "evaluate": "tasks.evaluating:evaluate_policy",
    "test": "tasks.evaluating:test_policy",
    "decide": "tasks.deciding:decide_on_round",
    "report": "tasks.reporting:report_round",
}
"""Imported on first use, because trl and torch take seconds."""

DEVICE_STEPS = frozenset({"sft", "logps", "sample", "rate", "train", "capabilities", "calibrate", "judge"})
"""Steps that may load a model onto the device."""
CHILD_STEPS = DEVICE_STEPS | {"evaluate", "test"}
"""Steps that may run in a child process group."""
READING_STEPS = frozenset({"logps", "sample", "capabilities", "evaluate", "test"})
"""Steps that at most read a policy: the next of them may run in the same process."""
DISTRIBUTED_STEPS = frozenset({"logps", "sample"})
"""Steps whose shards several workers can do (`execution.distribute`)."""
CLAIMED_STEPS = DEVICE_STEPS
"""Long steps: a process that needs one waits if another process is computing it."""
NOTHING = nullcontext()


def work_of(step: str) -> Work:
    """The step function of a step: (attempt) -> relative paths of the files it wrote."""
    module, name = WORK[step].split(":")
    return getattr(import_module(module), name)


def do_work(
    store_url: str,
    spec: StepSpec,
    execution: ExecutionConfig,
    progress: Progress = no_progress,
    log: Log = to_stderr,
    device: AbstractContextManager[None] = NOTHING,
) -> StepRecord:
    """Run a step that has no record yet, in this process or a child; returns its record.

    Args:
        store_url: folder or URL of the store.
        spec: the step. The caller has already looked for its record (`Session.do`).
        execution: execution settings; `child` and `device` say where it runs.
        progress: called with the step's progress.
        log: called with every line that a child prints, and with what this process waits for.
        device: context entered only for the step function, not while waiting for another process.

    Raises:
        SeraError: the step function raised it (same class), or a child died; the message says how.
    """
    store = open_store(store_url, remember=True)
    progress = _told(store, spec, progress)
    with claim(store, spec, log) if spec.step in CLAIMED_STEPS else NOTHING as record:
        if record is not None:
            return record
        with device:
            if spec.step in CHILD_STEPS and in_child(execution) and not _starts_its_own(spec, execution):
                may_stay = device is NOTHING and _only_reads(spec)  # whoever gets a slot needs its memory
                return run_in_child(WORK[spec.step], store_url, spec, execution, progress, log, may_stay)
            return make_step(store, spec, work_of(spec.step), execution, progress)


def _told(store: Store, spec: StepSpec, progress: Progress) -> Progress:
    """The same progress, also noted for whoever watches the run that this process holds."""
    run = held(store, spec.where["run"]) if "run" in spec.where else None
    if run is None:
        return progress

    def report(done: int, total: int, unit: str) -> None:
        run.report(done, total, unit)
        progress(done, total, unit)

    return report


def _only_reads(spec: StepSpec) -> bool:
    """Whether a step's process can do the next step: vLLM's gives its memory back only when it ends."""
    return spec.step in READING_STEPS and spec.fields.get("engine") != "vllm"


def _starts_its_own(spec: StepSpec, execution: ExecutionConfig) -> bool:
    """Whether a step starts its own processes or workers, which a child process would only wait for."""
    if spec.step in DISTRIBUTED_STEPS and "probe" not in spec.fields:
        return execution.distribute != "none"
    if spec.step != "train" or execution.processes == 1:
        return False
    return training_processes(execution, spec.fields["train"]["batch"]) > 1


def in_child(execution: ExecutionConfig) -> bool:
    """Whether device steps run in a child process group."""
    if execution.child == "auto":
        return device_of(execution.device) != "cpu"
    return execution.child == "always"
