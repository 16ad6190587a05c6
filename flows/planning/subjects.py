"""What a step of a plan works on, in words: a round has several steps of one kind."""

from collections.abc import Mapping
from typing import Any

from sera_core.artifacts.manifest import StepRef, StepSpec

START = "start policy"
TEXTS = {
    "train.parquet": "human pairs",
    "heldout.parquet": "held-out pairs",
    "test.parquet": "test pairs",
    "pairs.parquet": "generated pairs",
}
"""The pairs that a `logps` step scores, by file; the other file holds the answers to a side's prompts."""
SIDES = {"train": "", "heldout": "held-out "}


def made_policy(spec: StepSpec) -> str | None:
    """The policy that a step makes; None if it makes none."""
    if spec.step in ("model", "sft"):
        return START
    if spec.step != "train":
        return None
    fold = f" without {_fold(spec.fields)}" if "fold" in spec.fields else ""
    return f"policy {spec.fields['round']}{fold}"


def subject(spec: StepSpec, policies: Mapping[StepRef, str]) -> str | None:
    """What tells a step from others of its kind in a round; None where there is only one.

    Args:
        spec: the step.
        policies: the name of each policy (`made_policy`) that was made before.
    """
    if spec.step == "train":
        return made_policy(spec)
    if spec.step == "select":
        return f"{spec.fields['origin']} pairs"
    if spec.step not in ("logps", "sample", "capabilities"):
        return None
    ref = spec.inputs["policy"]
    policy = "a policy" if ref is None else policies.get(ref, "a policy")
    if spec.step == "sample":
        return f"{policy}, {SIDES[spec.fields['side']]}prompts"
    return policy if spec.step == "capabilities" else f"{policy}, {_scored(spec)}"


def _scored(spec: StepSpec) -> str:
    fields = spec.fields
    texts = TEXTS.get(fields["file"]) or f"{SIDES[spec.where['side']]}answers"
    if "probe" in fields:
        texts = f"a few {texts}"  # to measure the noise of the others
    if "fold" in fields:
        texts += f" of {_fold(fields)}"
    return texts + (f", ld_alpha {fields['ld_alpha']:g}" if "ld_alpha" in fields else "")


def _fold(fields: Mapping[str, Any]) -> str:
    return f"fold {fields['fold']['out'] + 1}"
