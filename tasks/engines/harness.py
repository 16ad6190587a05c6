"""Score a policy on tasks of EleutherAI's lm-evaluation-harness, in this process and without a network."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from sera_core.artifacts.step import Progress, no_progress
from sera_core.data.harness_tasks import HarnessTask
from sera_core.errors import InputError, SeraError

BATCH = 8
SEED = 1234
"""Of the examples shown before an item (`num_fewshot`), as in the harness."""
Row = dict[str, Any]
"""`task`, `item` (number in the task's data) and `score`."""


def refuse_missing_harness() -> None:
    """Refuse a run that measures capabilities without the package.

    Raises:
        InputError: names the extra.
    """
    if find_spec("lm_eval") is None:
        raise InputError("evaluate.harness needs the extra `harness`: pip install 'sera-flow[harness]'")


def harness_scores(
    policy: Any,
    tokenizer: Any,
    tasks: Sequence[HarnessTask],
    limit: int | None,
    scratch: Path,
    progress: Progress = no_progress,
) -> list[Row]:
    """The score of every item of every task under a policy.

    An item's score is its value of the task's first metric (`harness_tasks.METRICS`), in [0, 1].

    Args:
        policy, tokenizer: a loaded causal language model.
        tasks: the tasks.
        limit: score the first this many items of each; None: all.
        scratch: folder for the harness's copies of the data.
        progress: called before each task.

    Raises:
        InputError: a task that the harness cannot run.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows: list[Row] = []
    with _quiet(), _sandboxed():
        given: Any = HFLM  # a decorator hides its parameters
        model = given(pretrained=policy, tokenizer=tokenizer, batch_size=BATCH)
        manager = TaskManager(include_defaults=False)
        for number, task in enumerate(tasks):
            progress(number, len(tasks), "tasks")
            kwargs = {**task.config["dataset_kwargs"], "cache_dir": str(scratch)}
            try:
                with redirect_stderr(StringIO()):  # its progress bars; errors are raised
                    loaded = manager.load([{**task.config, "dataset_kwargs": kwargs}])
                    for one in loaded["tasks"].values():
                        one.set_fewshot_seed(seed=SEED)
                    found = evaluate(model, loaded, limit=limit, bootstrap_iters=0)
            except Exception as error:  # the harness raises whatever its templates and data raise
                raise InputError(
                    f"the task {task.name} cannot be run: {type(error).__name__}: {error}; correct its file"
                ) from error
            rows += _rows(task, {} if found is None else found)
    return rows


def _rows(task: HarnessTask, found: Mapping[str, Any]) -> Iterator[Row]:
    samples = found.get("samples", {}).get(task.name) or []
    if not samples:
        raise SeraError(f"the task {task.name}: the harness scored no item of it")
    metric = samples[0]["metrics"][0]
    items: dict[int, float] = {}
    for sample in samples:
        items.setdefault(sample["doc_id"], float(sample[metric]))  # of the first filter
    for item, score in sorted(items.items()):
        yield {"task": task.name, "item": item, "score": score}


@contextmanager
def _sandboxed() -> Iterator[None]:
    """Render the tasks' templates in Jinja's sandbox, as chat templates are: they may come from anybody."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    sandbox = ImmutableSandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=True)
    sandbox.filters |= plain.filters
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = plain


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
