"""What a round's forward passes were spent on, from the records of its steps."""

from collections.abc import Mapping

from sera_core.artifacts.manifest import StepRecord, StepRef, find_record
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.store import Store

SPENT: tuple[str, ...] = (
    "tokens/policy_human",
    "tokens/past_human",
    "tokens/reference_human",
    "tokens/policy_generated",
    "tokens/past_generated",
    "tokens/reference_generated",
    "tokens/evidence",
)
"""Tokens scored for the first time in the run: of human and of generated pairs, under the head, past heads
and references; and for the evidence. Together they are `tokens/scored`."""
SAVED = "tokens/reused"
"""Tokens of scores that the round read and an earlier round of the run had computed."""
CONSUMERS = ("scored", "responses", "mixture", "evidence")
"""Roles of the steps that read log-probabilities, in the order of the round."""


def token_use(store: Store, manifest: RoundManifest, earlier: set[str]) -> dict[str, int]:
    """Tokens of each kind in `SPENT` (0 where there were none) and `SAVED`; empty if a record is gone.

    Args:
        store: the run's store.
        manifest: the round.
        earlier: keys of the steps that earlier rounds of the run used.
    """
    records = {role: find_record(store, ref.step, ref.key) for role, ref in manifest.steps.items()}
    spent: dict[str, int] = dict.fromkeys(SPENT, 0)
    saved = 0
    for ref, readers in _scores(records).items():
        if (scored := find_record(store, ref.step, ref.key)) is None:
            return {}
        tokens = int(scored.metrics.get("tokens/scored", 0))
        if ref.key in earlier:
            saved += tokens
        else:
            kinds = [_kind(role, name, scored, records) for role, name in readers]
            # the start policy is head and reference at once in round 0
            spent[next((kind for kind in kinds if "reference" in kind), kinds[0])] += tokens
    return {**spent, SAVED: saved}


def _scores(records: Mapping[str, StepRecord | None]) -> dict[StepRef, list[tuple[str, str]]]:
    """The steps with log-probabilities that the round reads, each with its readers' roles and input names."""
    found: dict[StepRef, list[tuple[str, str]]] = {}
    for role in CONSUMERS:
        record = records.get(role)
        for name, ref in {} if record is None else record.inputs.items():
            if ref.step == "logps":
                found.setdefault(ref, []).append((role, name))
    return found


def _kind(role: str, name: str, scored: StepRecord, records: Mapping[str, StepRecord | None]) -> str:
    if role == "evidence":
        return "tokens/evidence"
    pairs = "generated" if role == "responses" or name == "generated_reference" else "human"
    if "reference" in name or name.startswith("exact-ref"):
        return f"tokens/reference_{pairs}"
    samples = records.get("samples")
    if role == "responses" and samples is not None:
        is_head = scored.inputs["policy"] == samples.inputs.get("policy")
    else:
        is_head = name.startswith(("policy-000", "exact-policy-000", "head_policy"))
    return f"tokens/{'policy' if is_head else 'past'}_{pairs}"
