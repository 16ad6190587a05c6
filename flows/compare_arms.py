"""`sera-compare`: `sera compare` as a Prefect flow. Triggering it again resumes."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.compare import check_comparison, run_arms, run_of
from flows.display import cards
from flows.display.compared import as_json, compared
from flows.orchestration.form import FormConfig
from flows.orchestration.limits import run_slot
from flows.running import open_run
from flows.sera import check_restarts, is_finished, run_until_stopped
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import default_store, open_store
from sera_core.config import SeraConfig
from sera_core.reporting import words

ARMS, SEEDS = ["sera", "dpo", "random"], [0, 1, 2]


@flow(name="sera-compare", flow_run_name="{name}", persist_result=False)
def sera_compare(
    config: FormConfig,
    name: str = "compare",
    arms: list[str] = ARMS,
    seeds: list[int] = SEEDS,
    store: str | None = None,
) -> State[dict[str, Any]]:
    """Run arms of one experiment with equal training tokens, and publish how they compare.

    Every arm and seed is an ordinary run `NAME-ARM-SEED`. Triggering the same comparison again resumes it.

    Args:
        config: Model, data and settings of the experiment.
        name: Beginning of the runs' names.
        arms: Arms, as in `sera compare --help`; the first one sets rounds and training tokens of the others.
        seeds: Seeds, in place of the experiment's.
        store: Folder or s3://bucket/prefix for the artifacts. Empty: the worker's SERA_STORE.
    """
    store = store or default_store()
    check_comparison(config, arms, seeds, name)
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

    found = compared(run_arms(config, arms, seeds, name, store, finish))
    cards.publish_comparison(name, found, opened.url)
    message = f"comparison {name}: {words.plural(len(arms), 'arm')}, {words.plural(len(seeds), 'seed')}"
    return Completed(message=message, data=as_json(found))
