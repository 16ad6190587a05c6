"""`sera-compare`: `sera compare` as a Prefect flow. Triggering it again resumes."""

from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.compare import check_comparison, in_order, run_arms, run_of
from flows.display import cards
from flows.display.compared import as_json, compared
from flows.display.judged_arms import judged_json
from flows.display.logs import run_log
from flows.judged_arms import check_judged, judge_arms
from flows.orchestration.form import FormConfig, StoreName
from flows.orchestration.limits import run_slot
from flows.running import open_run
from flows.sera import check_restarts, is_finished, run_until_stopped
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import default_store, open_store
from sera_core.config import SeraConfig
from sera_core.judges.named import Asking, find_judge
from sera_core.reporting import words

ARMS, SEEDS = ["sera", "dpo", "random"], [0, 1, 2]


@flow(name="sera-compare", flow_run_name="{name}", persist_result=False)
def sera_compare(
    config: FormConfig,
    name: str = "compare",
    arms: list[str] = ARMS,
    seeds: list[int] = SEEDS,
    judge: str | None = None,
    mode: Literal["pairwise", "single"] = "pairwise",
    store: StoreName = "",
) -> State[dict[str, Any]]:
    """Run arms of one experiment with equal training tokens, and publish how they compare.

    Every arm and seed is an ordinary run `NAME-ARM-SEED`. Triggering the same comparison again resumes it.

    Args:
        config: Model, data and settings of the experiment.
        name: Beginning of the runs' names.
        arms: Arms, as in `sera compare --help`; the first one sets rounds and training tokens of the others.
        seeds: Seeds, in place of the experiment's.
        judge: Also compare the arms' held-out answers by a judge: word-count, constant, openai:MODEL (at the
            worker's OPENAI_BASE_URL), local:FOLDER or reward:FOLDER (on the worker), or module:function.
            Empty: none.
        mode: Whether a chat model compares two answers or rates each by itself.
        store: Folder or s3://bucket/prefix for the artifacts. Empty: the worker's SERA_STORE.
    """
    store = store or default_store()
    check_comparison(config, arms, seeds, name)
    named = None
    if judge is not None:
        check_judged(config)
        named = find_judge(judge, Asking(single=mode == "single"))
    opened = open_store(store)
    runs = [RunStore(opened, run_of(name, arm, seed)) for arm in arms for seed in seeds]
    check_restarts(f"comparison {name!r}", sum(records.history().next_round for records in runs))

    def finish(chosen: SeraConfig, run: str) -> bool:
        with run_slot(run):
            records = open_run.open_run(chosen, run, store)
        if is_finished(records):
            return False
        get_run_logger().info("run %s", run)
        cards.publish_missing(records)
        run_until_stopped(records, store)
        return True

    done = run_arms(config, arms, seeds, name, store, in_order(finish))
    found = compared(done)
    judged = None if named is None else judge_arms(done, named, None, run_log())
    cards.publish_comparison(name, found, opened.url, judged)
    message = f"comparison {name}: {words.plural(len(arms), 'arm')}, {words.plural(len(seeds), 'seed')}"
    said = {} if judged is None else {"judged": judged_json(judged)}
    return Completed(message=message, data=as_json(found) | said)
