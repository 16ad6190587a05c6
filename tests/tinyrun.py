"""A whole run on a tiny random policy, in seconds: by command line, or the same wiring without Prefect."""

import json
from pathlib import Path

import tiny

from flows.display.progress import reporter
from flows.experiments import without_idle
from flows.running import open_run
from flows.running.rounds import PAUSED, report_test_side, run_round
from flows.running.session import Session
from sera_core.artifacts.lease import hold
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from tasks.step_functions import do_work

WORDS = [
    "capital", "river", "answer", "short", "clear", "vague", "story", "boat",
    "lake", "water", "tea", "film", "ending", "digits", "person", "response",
]  # fmt: skip


def pairs(count: int, seed: int = 0) -> list[dict]:
    """Preference pairs of a few words; the chosen answer is the longer one in most."""
    rows = []
    for n in range(count):
        at = [(seed + n * step) % len(WORDS) for step in (3, 5, 7)]
        chosen = " ".join(WORDS[(at[0] + i) % len(WORDS)] for i in range(4 + n % 5))
        rejected = " ".join(WORDS[(at[1] + 2 * i) % len(WORDS)] for i in range(2 + n % 4))
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Question {n}: {WORDS[at[2]]}?"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": f"not {rejected}"}],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, **sections: dict) -> dict:
    """An experiment on the tiny policy: 24 train and 8 held-out pairs, three rounds, a second or so each."""
    if not (folder / "policy" / "config.json").exists():
        tiny.tiny_policy(folder / "policy")
    if not (folder / "pairs.jsonl").exists():
        write_rows(folder / "pairs.jsonl", pairs(32))
    base: dict[str, dict] = {
        "model": {"source": str(folder / "policy")},
        "data": {"train": [{"path": str(folder / "pairs.jsonl")}], "heldout_fraction": 0.25},
        "sampling": {"responses": 3, "max_tokens": 8, "prompts": 10},
        "pairing": {"allow_cut": True},
        "mix": {"shares": [0.25, 0.5]},
        "train": {"learning_rate": 1e-3, "batch": 8},
        "evaluate": {"prompts": 4, "responses": 2, "max_tokens": 8, "resamples": 200},
        "decide": {"min_pairs": 4},
        "limits": {"rounds": 3},
        "execution": {"checkpoint_steps": 1, "device": "cpu"},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return without_idle(base, sections)


def config(folder: Path, **sections: dict) -> SeraConfig:
    """The same as a checked configuration."""
    return SeraConfig.model_validate(settings(folder, **sections))


def form(folder: Path, **sections: dict) -> dict:
    """The same as Prefect's form takes it: three fields, the rest as overrides."""
    given = settings(folder, **sections)
    three = {
        "model": given["model"].pop("source"),
        "data": given["data"].pop("train")[0]["path"],
        "rounds": given["limits"].pop("rounds"),
    }
    return {**three, "preset": "full", "overrides": given}


def experiment(folder: Path, **sections: dict) -> Path:
    """The same as a TOML file for the command line."""
    path = folder / "tiny.toml"
    lines = []
    for section, values in settings(folder, **sections).items():
        if not isinstance(values, dict):
            lines.insert(0, f"{section} = {_toml(values)}")
            continue
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if value in (float("inf"), float("-inf")):
        return str(value)
    return json.dumps(value)


def work(config: SeraConfig, store: Path | str, run: str = "tiny") -> RunStore:
    """All rounds, with the wiring of flows/sera.py and no Prefect."""
    records = open_run.open_run(config, run, str(open_store(str(store)).url))

    def runner(spec):
        with reporter(spec.step) as progress:
            return do_work(records.store.url, spec, config.execution, progress)

    with hold(records.store, run, print):
        while (state := records.state()) == "open":
            state = run_round(Session(str(store), run, runner), records.history().next_round)
            if state in PAUSED:
                return records
        if state not in PAUSED:
            report_test_side(Session(str(store), run, runner))
    return records


def policy_shas(records: RunStore) -> list[str]:
    """The policy of every round."""
    return [r.artifacts["policy"]["sha256"] for r in records.rounds() if "policy" in r.artifacts]


def attempts(store: Path, step: str = "*") -> list[int]:
    """How many attempts left files, for every step of a local store, or of one kind."""
    return [
        sum(1 for folder in key.iterdir() if folder.is_dir() and len(folder.name) == 16)
        for key in store.glob(f"steps/{step}/*")
    ]
