"""Select, mix, order and verify a round of many synthetic pairs: seconds and peak memory of each step.

    python -m tests.scale.big_tables [PAIRS]      default: 10,000,000; prints one line of JSON

The steps are the run's own, each in a fresh process. Making their inputs is not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.round import Steps
from flows.running.manifests import artifacts_of, manifest_fields
from flows.store_tools.verify import verify
from sera_core import steps
from sera_core.artifacts.canonical import files_digest, sha256_file
from sera_core.artifacts.manifest import StepRecord, StepRef, find_record
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.run_records import ACCURACY, RoundManifest, now
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import Attempt, run_step
from sera_core.artifacts.store import Store, open_store
from sera_core.config import ExecutionConfig, SeraConfig
from tasks.step_functions import work_of
from tests.scale.big_inputs import make_inputs, put

RUN = "big"
SHARE = 0.2
ROUND = 1
STEPS = ("review", "select", "pair", "select_generated", "mix", "verify")
SELECTED = ("select", "select_generated", "mix")
"""The steps that select, mix and order."""


def run(pairs: int = 10_000_000, folder: Path | None = None) -> dict[str, Any]:
    """Seconds and peak MiB of selecting, mixing and ordering so many pairs, and of every step.

    Args:
        pairs: human and generated pairs together.
        folder: an empty folder for the store; None for a temporary one.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="sera-big-") as scratch:
            return run(pairs, Path(scratch))
    _in_process("make", pairs, folder)
    told = {step: _in_process(step, pairs, folder) for step in STEPS}
    return {
        "pairs": pairs,
        "seconds": round(sum(told[step]["seconds"] for step in SELECTED), 1),
        "peak_mib": max(told[step]["peak_mib"] for step in SELECTED),
        "mixed": told["mix"]["rows"],
        "steps": told,
    }


def _in_process(step: str, pairs: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.scale.big_tables", str(pairs), "--at", str(folder), "--do", step]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def config() -> SeraConfig:
    """The settings of the round: the default selection and mix."""
    return SeraConfig.model_validate(
        {"model": {"source": "made"}, "data": {"train": [{"path": "made.jsonl"}]}, "mix": {"shares": [SHARE]}}
    )


def make(store: Store, pairs: int) -> None:
    """Make what the measured steps read; their references are kept beside the store's folders."""
    sides = {side: [{"digest": "made"}] if side == "train" else [] for side in steps.SIDES}
    data = put(store, "data", _nothing, sides)
    model = put(store, "model", lambda a: _policy(a, "start"), {"source_digest": "made"})
    _keep(store, {"data": data, "model": model, **make_inputs(store, pairs, data, model)})


def do(store: Store, step: str) -> StepRecord:
    """Do one measured step."""
    made = _kept(store)
    spec = specs(made)[step]()
    record = run_step(store, spec, work_of(spec.step), ExecutionConfig(device="cpu"))
    _keep(store, made | {step: record.ref})
    return record


def specs(made: Mapping[str, StepRef]) -> dict[str, Any]:
    """The steps as `flows.round` wires them, where the start policy is the reference."""
    settings = config()
    rendered, samples = made["rendered"], made["samples"]
    names = {"policy": "policy", "reference": "reference"}
    names |= {"exact-policy": "exact-policy", "exact-ref": "exact-ref"}
    human = {f"{kind}-000": made[f"human-{name}"] for kind, name in names.items()}
    generated = {f"{n}-000": made[f"samples-{n}"] for n in ("reference", "exact-policy", "exact-ref")}
    return {
        "review": lambda: steps.review(settings, rendered, "train.parquet", [1.0], human),
        "select": lambda: steps.select(settings, settings.select, made["review"], rendered, "human", ROUND),
        "pair": lambda: steps.pair(settings, samples, rendered, [1.0], generated, ROUND),
        "select_generated": lambda: steps.select(
            settings, settings.select_generated, made["pair"], made["pair"], "generated", ROUND
        ),
        "mix": lambda: steps.mix(settings, ROUND, SHARE, "ref_logps", _mixed(made)),
    }


def _mixed(made: Mapping[str, StepRef]) -> dict[str, StepRef]:
    return {
        "rendered": made["rendered"],
        "scored": made["review"],
        "human_ledger": made["select"],
        "samples": made["samples"],
        "responses": made["pair"],
        "generated_ledger": made["select_generated"],
        "human_reference": made["human-reference"],
    }


# ------------------------------------------------------------------------------------------------ the round


def commit_round(store: Store) -> RunStore:
    """The records of a run with one round, whose training, evidence and decision are made."""
    made, records = _kept(store), RunStore(store, RUN)
    digests = {"data": {side: ["made"] if side == "train" else [] for side in steps.SIDES}, "model": "made"}
    opened = records.open(config(), {"digests": digests})
    policy = put(
        store, "train", lambda a: _policy(a, "trained"), {}, {"start": made["model"], "mixture": made["mix"]}
    )
    own: Steps = {
        "data": made["data"],
        "model": made["model"],
        "pairs": made["rendered"],
        "scored": made["review"],
        "human": made["select"],
        "samples": made["samples"],
        "responses": made["pair"],
        "generated": made["select_generated"],
        "mixture": made["mix"],
        "policy": policy,
        "evidence": put(store, "evaluate", _evidence, {}, {"policy": policy}),
    }
    own["decision"] = put(store, "decide", _decision, {"answer": None}, {"evidence": own["evidence"]})
    held = {role: find_record(store, ref.step, ref.key) for role, ref in own.items()}
    found = {role: record for role, record in held.items() if record is not None}
    used = {ref.key: find_record(store, ref.step, ref.key) for ref in [*made.values(), *own.values()]}
    new = [record for record in used.values() if record is not None]
    records.commit_round(
        RoundManifest(
            format=FORMAT,
            run=RUN,
            round=0,
            config_sha256=opened.config_sha256,
            parent_sha256=None,
            steps=own,
            used=[record.ref for record in new],
            artifacts=artifacts_of(found),
            created=now(),
            **manifest_fields(found, new),
        )
    )
    return records


def _nothing(attempt: Attempt) -> list[str]:
    attempt.write("nothing.json").write_text("{}")
    return ["nothing.json"]


def _policy(attempt: Attempt, text: str) -> list[str]:
    file = attempt.write("policy/model.safetensors")
    file.write_text(text)
    attempt.metrics["weights/result"] = files_digest({file.name: sha256_file(file)})
    return ["policy/model.safetensors"]


def _evidence(attempt: Attempt) -> list[str]:
    attempt.metrics[ACCURACY] = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    attempt.write("evidence.json").write_text(json.dumps(attempt.metrics))
    return ["evidence.json"]


def _decision(attempt: Attempt) -> list[str]:
    told = {"decision": "promote", "reason": "made", "stop_reason": None, "alarm": None}
    told |= {"verdict": {"name": "first"}, "signals": dict.fromkeys(("overlap", "ks", "sign_changes"))}
    attempt.write("decision.json").write_text(json.dumps(told))
    attempt.metrics |= {name: told[name] for name in ("decision", "reason", "stop_reason")}
    attempt.metrics |= {"overlap": None, "ks": None, "sign_changes": None, "verdict": "first", "alarm": None}
    return ["decision.json"]


def _kept(store: Store) -> dict[str, StepRef]:
    held = json.loads((Path(store.url) / "made.json").read_text())
    return {name: StepRef.model_validate(ref) for name, ref in held.items()}


def _keep(store: Store, made: Mapping[str, StepRef]) -> None:
    held = {name: ref.model_dump() for name, ref in made.items()}
    (Path(store.url) / "made.json").write_text(json.dumps(held))


# ------------------------------------------------------------------------------------------------ measuring


def peak_mib() -> int:
    """Most memory this process ever held, in MiB; what its parent held does not count."""
    line = next(n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def measured(store: Store, step: str) -> dict[str, Any]:
    """Seconds and peak MiB of one step of the round in this process."""
    records = commit_round(store) if step == "verify" else None
    start, computed = time.perf_counter(), time.process_time()
    if records is not None:
        told = {"bytes": verify(records).bytes}
    else:
        record = do(store, step)
        name = {"review": "scored", "pair": "pairs", "mix": "mixture"}.get(step, "ledger")
        told = {"rows": record.files[f"{name}.parquet"].rows, "digest": record.digest}
    seconds = round(time.perf_counter() - start, 1)
    cpu = round(time.process_time() - computed, 1)
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib(), **told}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale.big_tables")
    parser.add_argument("pairs", nargs="?", type=int, default=10_000_000)
    parser.add_argument("--at", type=Path, help="an empty folder for the store, which then stays")
    parser.add_argument("--do", choices=("make", *STEPS), help="one step of the store at --at")
    given = parser.parse_args()
    if given.do is None:
        told = run(given.pairs, given.at)
    elif given.do == "make":
        told = make(open_store(str(given.at)), given.pairs)
    else:
        told = measured(open_store(str(given.at)), given.do)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
