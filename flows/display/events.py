"""Events for Prefect's automations; they never contain texts of pairs."""

from typing import Any

from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore

ROUND, STOPPED, ALARM = "sera.round.completed", "sera.run.stopped", "sera.alarm.amplification"


def round_completed(manifest: RoundManifest, store_url: str) -> None:
    """`sera.round.completed`, and `sera.alarm.amplification` if the round raised its alarm."""
    payload = {
        "round": manifest.round,
        "decision": manifest.decision,
        "reason": manifest.reason,
        "stop_reason": manifest.stop_reason,
        "heldout_accuracy": manifest.accuracy,
        "generated_share": manifest.generated_share,
        "alarm": manifest.metrics.get("alarm"),
        "alarm_reason": manifest.metrics.get("alarm_reason"),
    }
    _emit(ROUND, manifest.run, store_url, payload)
    if payload["alarm"] == "amplified":
        _emit(ALARM, manifest.run, store_url, payload)


def run_stopped(records: RunStore) -> None:
    """`sera.run.stopped`, with the reason, the head and the best round."""
    history = records.history()
    payload = {
        "reason": records.stop_reason(),
        "rounds": history.next_round,
        "head": history.head.round if history.head else None,
        "best_round": history.best.round if history.best else None,
        "heldout_accuracy": history.best.accuracy if history.best else None,
    }
    _emit(STOPPED, records.run, records.store.url, payload)


def _emit(event: str, run: str, store_url: str, payload: dict[str, Any]) -> None:
    if PREFECT_API_URL.value() is None:
        return  # without a server, Prefect would start one
    resource = {
        "prefect.resource.id": f"sera.run.{run}",
        "prefect.resource.name": run,
        "sera.store": store_url,
    }
    emit_event(event, resource=resource, payload=payload)
