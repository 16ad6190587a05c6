"""Peak memory of the steps that read every row (score, pair, mix) on synthetic files, each in a process.

    python tests/benchmarks/memory.py                      all steps at 4,000 and 16,000 rows
    python tests/benchmarks/memory.py pair 64000 --at DIR  one step; DIR holds the store between calls

Rows are pairs for mix, and responses for logps and pair. A line of JSON each: peak in MiB (VmHWM), seconds,
digest of what the step wrote. Linux only, for it reads /proc.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import StepRef, StepSpec
from sera_core.artifacts.step import Attempt, run_step
from sera_core.artifacts.store import Store, open_store
from sera_core.config import ExecutionConfig
from tasks.step_functions import work_of

STEPS = ("logps", "pair", "mix")
RESPONSES = 8
TOKENS = 160
ROWS = (4000, 16000)


def measure(step: str, rows: int, folder: Path) -> dict[str, Any]:
    """Peak memory of one step at so many rows: inputs made in one process, the step done in another."""
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))
    command = ["env", f"PYTHONPATH={paths}", sys.executable, __file__, step, str(rows), "--at", str(folder)]
    subprocess.run([*command, "--make"], check=True, capture_output=True)
    return json.loads(subprocess.run([*command, "--do"], check=True, capture_output=True).stdout)


# ----------------------------------------------------------------------------------------------- made inputs


def made_id(*parts: object) -> str:
    """16 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def prompts(count: int) -> list[str]:
    """Ids of the prompts, ascending, as the steps write them."""
    return sorted(made_id("prompt", number) for number in range(count))


def message(role: str, text: str) -> list[dict[str, str]]:
    """One turn."""
    return [{"role": role, "content": text}]


@cache
def made_text(number: int) -> tuple[np.ndarray, str]:
    """Token ids, and words in place of them, about as long as text is."""
    ids = np.random.default_rng(number).integers(3, 500, TOKENS)
    return ids, " ".join(map(str, ids))


def token_ids(key: str, count: int = TOKENS) -> np.ndarray:
    """One of 4,096 rows of ids, always the same for a key."""
    return made_text(int(key[:3], 16))[0][:count]


def text_of(key: str) -> str:
    """Text of the same row."""
    return made_text(int(key[:3], 16))[1]


def write(attempt: Attempt, name: str, kind: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """A file of a made step."""
    schema.write_table(schema.from_rows(kind, rows), attempt.write(name))


def put(store: Store, step: str, work: Any, *named: object) -> StepRef:
    """A made step."""
    spec = StepSpec(step=step, version=1, fields={"made": list(map(str, named))}, inputs={})
    return run_step(store, spec, work, ExecutionConfig()).ref


def rendered(count: int) -> Any:
    """Prompts alone."""

    def work(attempt: Attempt) -> list[str]:
        rows = [
            {
                "prompt_id": id,
                "prompt": message("user", text_of(id)),
                "prompt_ids": token_ids(id, 40),
            }
            for id in prompts(count)
        ]
        write(attempt, "prompts.parquet", schema.PROMPTS, rows)
        write(attempt, "heldout.parquet", schema.PAIRS, [])
        return ["prompts.parquet", "heldout.parquet"]

    return work


def sampled(count: int) -> Any:
    """Responses of prompts in prompt_id order."""

    def work(attempt: Attempt) -> list[str]:
        rows = []
        for id in prompts(count):
            for sample in range(RESPONSES):
                response = made_id(id, sample)
                ids, text = token_ids(response), text_of(response)
                rows.append(
                    {"prompt_id": id, "sample": sample, "response": text, "response_ids": ids}
                    | {"seed": sample, "finish_reason": "stop", "tokens": TOKENS}
                    | {"policy_logps": -float(ids[0]), "past_logps": [], "past_ref_logps": []}
                )
        write(attempt, "responses.parquet", schema.RESPONSES, rows)
        return ["responses.parquet"]

    return work


def judged(count: int) -> Any:
    """Reference log-probabilities of the same responses."""

    def work(attempt: Attempt) -> list[str]:
        rows = [
            {"id": f"{id}/{sample}", "logps": -float(token_ids(made_id(id, sample))[1]), "tokens": TOKENS}
            for id in prompts(count)
            for sample in range(RESPONSES)
        ]
        write(attempt, "logps.parquet", schema.LOGPS, rows)
        return ["logps.parquet"]

    return work


def pairs(count: int, kind: str) -> Any:
    """Human or generated pairs, and a selection that keeps two in three."""

    def work(attempt: Attempt) -> list[str]:
        rows, ledger, logps, samples = [], [], [], []
        for number, prompt in enumerate(prompts(count)):
            id, answers = made_id(kind, prompt), {}
            for side in ("chosen", "rejected"):
                answer = made_id(kind, prompt, side)
                ids = token_ids(answer)
                answers |= {side: message("assistant", text_of(answer)), f"{side}_ids": ids}
                logps.append({"id": f"{id}/{side}", "logps": -float(ids[0]), "tokens": TOKENS})
            row = {"pair_id": id, "prompt_id": prompt, "origin": kind, "round": 0}
            told = {
                "prompt": message("user", text_of(prompt)),
                "prompt_ids": token_ids(prompt, 40),
            }
            rows.append(row | answers | told | {"format": "conversational"})
            kept = number % 3 > 0
            reason = ("below_cut", "kept", "relabelled" if number % 2 else "kept")[number % 3]
            ledger.append(row | {"kept": kept, "rank": number + 1, "reason": reason, "stage": "select"})
            samples.append({"pair_id": id, "chosen_sample": 0, "rejected_sample": 1})
        name = "train.parquet" if kind == "human" else "pairs.parquet"
        write(attempt, name, schema.PAIRS, rows)
        write(attempt, "logps.parquet", schema.LOGPS, logps)
        write(attempt, "ledger.parquet", schema.LEDGER, ledger)
        write(attempt, "dropped.parquet", schema.LEDGER, [])
        attempt.write("flipped.json").write_text(json.dumps([]))
        return [name, "logps.parquet", "ledger.parquet", "dropped.parquet", "flipped.json"]

    return work


def policy(folder: Path) -> Any:
    """A tiny random policy."""
    import tiny

    def work(attempt: Attempt) -> list[str]:
        made = tiny.tiny_policy(attempt.folder / "policy", layers=1, hidden=32)
        return [f"policy/{file.name}" for file in made.iterdir()]

    return work


# -------------------------------------------------------------------------------------------------- the steps


def spec(store: Store, step: str, rows: int, folder: Path) -> StepSpec:
    """The step to measure; its inputs are made if they are not there yet."""
    count = rows // RESPONSES
    if step == "mix":
        human, generated = (
            put(store, "select", pairs(rows // 2, kind), kind, rows) for kind in ("human", "generated")
        )
        inputs = {
            **dict.fromkeys(("rendered", "human_ledger", "human_reference"), human),
            **dict.fromkeys(("generated_ledger", "generated_reference", "responses"), generated),
        }
        fields = {"round": 1, "seed": 3, "share": 0.4, "size": None, "on_short": "fill"}
        fields |= {"generated_reference": "logps", "by_rank": ["human"]}
        return StepSpec(step=step, version=1, fields=fields, inputs=inputs)
    inputs = {"rendered": put(store, "render", rendered(count), rows)}
    samples = put(store, "sample", sampled(count), rows)
    if step == "logps":
        model = put(store, "model", policy(folder), "tiny")
        inputs |= {"policy": model, "model": model, "texts": samples}
        fields = {"file": "responses.parquet", "dtype": "float32"}
        return StepSpec(step=step, version=1, fields=fields, inputs=inputs)
    inputs |= {"samples": samples, "reference-000": put(store, "logps", judged(count), rows)}
    fields = {"score": "implicit", "beta": 0.1, "weights": [1.0], "length_penalty": "none"}
    fields |= {"rule": "best-worst", "allow_cut": False, "responses": RESPONSES, "round": 1}
    return StepSpec(step=step, version=1, fields=fields, inputs=inputs)


def peak_mib() -> float:
    """Most memory this process ever held; what its parent held does not count, as it does in getrusage."""
    line = next(n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", nargs="?", choices=STEPS)
    parser.add_argument("rows", nargs="*", type=int)
    parser.add_argument("--at", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--do", action="store_true")
    given = parser.parse_args()
    if given.make or given.do:
        store = open_store(str(given.at))
        asked = spec(store, given.step, given.rows[0], given.at)
        if given.do:
            started = time.monotonic()
            record = run_step(store, asked, work_of(given.step), ExecutionConfig(device="cpu"))
            told = {"step": given.step, "rows": given.rows[0], "peak_mib": round(peak_mib(), 1)}
            print(
                json.dumps(told | {"seconds": round(time.monotonic() - started, 1), "digest": record.digest})
            )
        return
    with tempfile.TemporaryDirectory() as scratch:
        for step in [given.step] if given.step else STEPS:
            for rows in given.rows or ROWS:
                print(json.dumps(measure(step, rows, given.at or Path(scratch))), flush=True)


if __name__ == "__main__":
    main()
