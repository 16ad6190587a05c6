"""Open a run: digest its sources, check the configuration, create or find its records. No Prefect."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.display.logs import run_log
from flows.planning.estimates import refuse_what_cannot_fit, shape_of_source
from flows.round import Ref
from flows.running.session import Session
from sera_core import steps
from sera_core.artifacts.manifest import Artifact, StepRecord
from sera_core.artifacts.probing import check_shared
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.run_records import now
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import Store, create_json, open_store
from sera_core.config import AUTO, SeraConfig
from sera_core.data.candidates import read_candidates
from sera_core.data.chat_templates import default_template, refuse_unused, template_text
from sera_core.data.folds import refuse_empty_folds
from sera_core.data.harness_tasks import read_tasks
from sera_core.data.sources import source_digest
from sera_core.effects import samples
from sera_core.errors import InputError
from sera_core.judges.named import Asking, find_judge, find_rater
from sera_core.judges.names import FILE, IMPLICIT
from sera_core.models.four_bits import refuse_missing_bitsandbytes
from sera_core.models.model_sources import resolve_source
from sera_core.models.model_sources import source_digest as model_digest
from sera_core.models.policies import read_settings
from tasks.engines.choose import engine_here
from tasks.engines.harness import refuse_missing_harness
from tasks.engines.replica_actors import refuse_unusable_cluster
from tasks.engines.tracking import refuse_missing

Digests = dict[str, Any]


def source_digests(config: SeraConfig) -> Digests:
    """Content digests of the model and of every data source, by side; of rater, judge, capability tasks
    and conversations to fine-tune on.

    Raises:
        InputError: a source is missing or cannot be read, or the rater, the judge or a capability task cannot
            be used.
    """
    data = {
        side: [source_digest(source.path, source.split) for source in getattr(config.data, side)]
        for side in steps.SIDES
    }
    model = model_digest(resolve_source(config.model.source, config.model.revision))
    named = {
        "rater": rater_of(config),
        "judge": judge_of(config),
        "harness": harness_of(config),
        "sft": config.start.file and source_digest(config.start.file, config.start.sft_split),
    }
    return {"data": data, "model": model, **{what: found for what, found in named.items() if found}}


def rater_of(config: SeraConfig) -> dict[str, Any] | None:
    """What identifies whatever orders the responses; None for the implicit reward.

    Raises:
        InputError: a rater that cannot be used, or a malformed row of candidates.
    """
    if config.pairing.by == IMPLICIT:
        return None
    if config.candidates is None:
        return find_rater(config.pairing.by, Asking()).identity
    read_candidates(config.candidates)
    return {"rater": FILE, "sha256": source_digest(config.candidates)}


def judge_of(config: SeraConfig) -> dict[str, Any] | None:
    """What identifies the judge that rounds are decided by; None without one.

    Raises:
        InputError: a judge that cannot be used.
    """
    return None if config.decide.judge is None else find_judge(config.decide.judge, Asking()).identity


def harness_of(config: SeraConfig) -> list[dict[str, str]]:
    """Name and digest of each capability task.

    Raises:
        InputError: a task file that cannot be used, or the extra is not installed.
    """
    if config.evaluate.harness:
        refuse_missing_harness()
    return [{"task": task.name, "digest": task.digest} for task in read_tasks(config.evaluate.harness)]


def resolved(config: SeraConfig, digests: Digests) -> dict[str, Any]:
    """The input of config_sha256: settings that change results, with content digests for paths."""
    fields = config.result_fields()
    fields["model"].pop("source")
    fields["model"].pop("revision")
    if "rater" in digests:
        fields["pairing"].pop("by")
    if "judge" in digests:
        fields["decide"].pop("judge")
    if "harness" in digests:
        fields["evaluate"].pop("harness")
    if "sft" in digests:
        fields["start"].pop("sft")
    for side in steps.SIDES:
        for source in fields["data"][side]:
            source.pop("path")
    return {**fields, "digests": digests}


def open_run(config: SeraConfig, run: str, store_url: str) -> RunStore:
    """Check the input, then create or find the run. Bad data is refused before any model is loaded.

    Raises:
        InputError: a bad name, source or row, a tracker or a Ray cluster that is missing, a model
            that cannot be trained in the memory there is, or a configuration other than the run's.
    """
    store = open_store(store_url, remember=True)
    if (warning := check_shared(store, config.execution.accept_racy_store)) is not None:
        run_log()(warning)
    records = RunStore(store, run)
    config = with_engine(config, records)
    if records.state() == "open":  # a stopped run does not train
        refuse_missing(config.execution.tracking)
        refuse_unusable_cluster(config.execution)
        refuse_missing_bitsandbytes(config.model.dtype, config.train.optimizer)
        refuse_what_cannot_fit(config, shape_of_source(config))
    digests = source_digests(config)
    check_template(config)
    load_data(store, config, digests)
    records.open(config, resolved(config, digests))
    return records


def with_engine(config: SeraConfig, records: RunStore | None = None) -> SeraConfig:
    """The configuration with the engine that `auto` stands for: the run's, or a new run's on this machine.

    A new run that samples nothing keeps `auto`.
    """
    if config.sampling.engine != AUTO:
        return config
    begun = [] if records is None else records.configs()
    if begun:
        return config.with_engine(begun[-1].settings.sampling.engine)
    if not samples(config):
        return config
    return config.with_engine(engine_here(config.execution.device, config.model.dtype)[0])


def check_template(config: SeraConfig) -> None:
    """Check that there is a chat template.

    Raises:
        InputError: the model folder has no chat template (or several without a default), and
            model.chat_template is not set.
    """
    if config.model.chat_template is not None:
        refuse_unused(template_text(config.model.chat_template), config.model.template_kwargs)
        return
    source = resolve_source(config.model.source, config.model.revision)
    if source.kind != "folder":
        return
    folder = Path(source.location)
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    else:
        held = read_settings(folder / "tokenizer_config.json").get("chat_template")
        text = default_template(config.model.source, held)
    if text is not None:
        refuse_unused(text, config.model.template_kwargs)
    elif not any((folder / f"chat_template.{kind}").is_file() for kind in ("jinja", "json")):
        raise InputError(
            f"model {config.model.source}: has no chat template, so pairs cannot be rendered; "
            'set model.chat_template to "chatml", a Jinja file or Jinja text'
        )


def load_data(store: Store, config: SeraConfig, digests: Mapping[str, Any]) -> StepRecord:
    """Do the data step, which checks every row, and the one that reads conversations to fine-tune on.

    Raises:
        InputError: a bad row, an overlap between sides, an empty side, or an empty fold.
    """
    from tasks.step_functions import work_of

    record = run_step(store, steps.data(config, digests["data"]), work_of("data"), config.execution)
    if not record.counts.get("train"):
        raise InputError(
            f"no train pair is left: {dict(record.counts)}; check data.train and the split fractions"
        )
    if not record.counts.get("heldout"):
        raise InputError(
            f"no held-out pair: {dict(record.counts)}; give data.heldout, or a data.heldout_fraction above 0 "
            "(decisions need pairs the policy was not trained on)"
        )
    check_folds(store, config, record.ref, "of the data")
    load_messages(store, config, digests, record.ref)
    return record


def load_messages(
    store: Store, config: SeraConfig, digests: Mapping[str, Any], data: Ref
) -> StepRecord | None:
    """Do the step that reads the conversations of `start.sft`; None without a source of them.

    Raises:
        InputError: a bad row, or a prompt that the held-out or the test side has too.
    """
    from tasks.step_functions import work_of

    if config.start.file is None:
        return None
    spec = steps.messages(config, data, digests["sft"])
    return run_step(store, spec, work_of("messages"), config.execution)


def check_folds(store: Store, config: SeraConfig, pairs: Ref, left: str) -> None:
    """Check that every fold of `review.crossfit` has train pairs.

    Args:
        pairs: the step with the pairs.
        left: what they are left of, for the message.

    Raises:
        InputError: fewer prompts than folds, or a fold without pairs.
    """
    if config.folds and pairs is not None:
        path = Artifact(store, pairs).path("train.parquet")
        refuse_empty_folds(path, len(config.folds), config.seed, left)


def request_review(session: Session, round: int, decision: Ref) -> dict[str, Any] | None:
    """Request a review of the round. Returns the answer if there is one."""
    found = session.record_of(decision).metrics
    evidence = {name: found[name] for name in ("decision", "reason", "verdict", "alarm")}
    decide = session.config.decide
    session.records.ask(round, evidence, decide.review_hours, decide.review_default)
    return session.records.answer_of(round)


def record_test_evidence(session: Session, round: int, ref: Ref) -> None:
    """Record the test evidence in the run's folder."""
    record = session.record_of(ref)
    final = {
        "format": FORMAT,
        "round": round,
        "step": record.ref.model_dump(),
        "metrics": {
            name: None if isinstance(v, float) and math.isnan(v) else v for name, v in record.metrics.items()
        },
        "created": now(),
    }
    create_json(session.store, f"{session.records.path}/final-{round:03d}.json", final)


def test_record(records: RunStore) -> dict[str, Any] | None:
    """The test evidence of the best round's policy; None if there is none yet."""
    best = records.history().best
    return None if best is None else records.test_evidence(best.round)
