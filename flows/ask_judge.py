"""`sera-evaluate`: `sera evaluate RUN` as a Prefect flow. Triggering it again asks only what is missing."""

from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.display import cards
from flows.display.judge_words import compared_lines
from flows.display.logs import run_log
from flows.display.run_view import run_records
from flows.evaluation import evaluate_rounds
from sera_core.artifacts.store import default_store, open_store
from sera_core.errors import InputError
from sera_core.guards.shown import shown
from sera_core.judges.named import Asking, find_judge


@flow(name="sera-evaluate", flow_run_name="{run}-{judge}", persist_result=False)
def sera_evaluate(
    run: str,
    judge: str,
    round: int | None = None,
    against: int | None = 0,
    prompts: str | None = None,
    limit: int | None = None,
    mode: Literal["pairwise", "single"] = "pairwise",
    concurrency: int = 8,
    store: str | None = None,
) -> State[dict[str, Any]]:
    """Compare the held-out answers of two rounds by an independent judge, and publish the win rate.

    A judge behind an endpoint is asked at the worker's OPENAI_BASE_URL with the worker's key: neither can be
    given here. Nothing of it decides about a round.

    Args:
        run: Name of the run.
        judge: word-count, constant, openai:MODEL, local:FOLDER or reward:FOLDER (on the worker), or
            module:function.
        round: Round that is judged. Empty: the head.
        against: Round whose answers it is compared with. Empty: the start policy (only with prompts).
        prompts: File with prompts that both policies answer now. Empty: the run's held-out answers.
        limit: Compare the answers to this many prompts. Empty: all.
        mode: Whether a chat model compares two answers or rates each by itself.
        concurrency: Requests at once.
        store: Folder or s3://bucket/prefix with the run. Empty: the worker's SERA_STORE.
    """
    for name, value in (("concurrency", concurrency), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} = {value}: must be 1 or more")
    records = run_records(open_store(store or default_store()), run)
    named = find_judge(judge, Asking(concurrency=concurrency, single=mode == "single"))
    found = evaluate_rounds(records, round, against, named, limit, run_log(), prompts)
    lines = list(compared_lines(found))
    for line in lines:
        get_run_logger().info("%s", shown(line))
    cards.publish_evaluation(records, judge, lines)
    return Completed(message=lines[0], data=found)
