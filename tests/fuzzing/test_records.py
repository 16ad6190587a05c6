"""A damaged record of the store: refused in one line that names a file, or the answers are as before.

Every command that reads a store is run on it. What a record alone knows (its times, what it ran on) may be
read as it stands; a changed result may be shown only where `sera verify` refuses the run.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzzing.cases import (
    CASES,
    DEEP,
    Damage,
    Told,
    at_most,
    changed,
    check_told,
    damaged_bytes,
    damaged_json,
    fuzzed,
    replaced,
    sera,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.running.rounds import run_round
from flows.running.session import Session
from sera_core.errors import SeraError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "store-format-1"
COMMANDS = (
    ("verify", "first", "--json"),
    ("show", "first", "--json"),
    ("show", "first"),
    ("show", "first", "--round", "1"),
    ("show", "asked", "--json"),
    ("review", "asked"),
    ("show", "answered"),
    ("show", "second", "--json"),
    ("review", "answered", "--json"),
    ("show", "spent"),
    ("watch", "first", "--json"),
    ("watch", "asked", "--once"),
    ("list", "--json"),
    ("diff", "first:0", "first:1", "--json"),
    ("diff", "first", "second"),
    ("lineage", "first", "--json"),
    ("verify", "second", "--json"),
    ("verify", "asked", "--json"),
    ("gc", "--json"),
    ("export", "first", "--to", "{out}"),
    ("report", "first", "--out", "{out}"),
)


FREE = (
    (r"run-\d+\.json", r"created|config\.(execution|limits|model\.(source|revision)|review\.show_text)\b.*"),
    (r"run-\d+\.json", r"config\.data\.\w+\.\d+\.path"),
    (r"(round|final)-\d+\.json", r"created|epoch"),
    (r"done\.json", r"(environment|started|seconds|parts|counts)\b.*|files\..*\.rows"),
    (r"review-\d+\.json", r"(evidence|until|default)\b.*"),
    (r"review-\d+-answer\.json", r"decision|note|who|when"),
    (r"stop-\d+\.json", r"after|created"),
    (r"collected\.json|part-\d+\.json|\d+(-beat|-doing)?\.json|[0-9a-f]{64}\.json", r".*"),
)
"""What nothing but the record itself says: read as it stands. Leases, claims and notes decide no result."""


def is_free(path: Path, before: bytes, after: bytes) -> bool:
    """Whether a record differs only in what it alone says."""
    places = [".".join(map(str, place)) for place in changed(json.loads(before), json.loads(after))]
    free = [place for name, place in FREE if re.fullmatch(name, path.name)]
    return all(any(re.fullmatch(one, place) for one in free) for place in places)


def rewrite(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def further_run(store: Path, name: str) -> Path:
    """The first round of `first` under another name, as a run that may go on."""
    folder = store / "runs" / name
    folder.mkdir()
    for record in ("run-000.json", "round-000.json"):
        shutil.copy(store / "runs" / "first" / record, folder / record)
        rewrite(folder / record, run=name)
    return folder


@dataclass(repr=False)
class Kept:
    """The kept store, with runs that wait for a person, were answered, and reached their budget."""

    store: Path
    records: list[Path]
    before: dict[tuple[str, ...], Told]
    """What every command answers while no record is damaged."""

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(f"Kept({self.store})")

    def ask(self, command: tuple[str, ...]) -> Told:
        """Run a command on the store."""
        out = self.store.parent / "out"
        told = sera(*(part.format(out=out) for part in command), "--store", self.store)
        shutil.rmtree(out, ignore_errors=True)
        return told

    def is_as_before(self, command: tuple[str, ...], told: Told) -> bool:
        """Whether the answer is the one that the undamaged store gave."""
        sized = command[0] == "gc"  # which counts the bytes of the records too
        out, before = (re.sub(r'"bytes\w*": \d+', "", t.out) if sized else t.out
                       for t in (told, self.before[command]))  # fmt: skip
        return out == before

    def check_results(self, path: Path, whole: bytes, command: tuple[str, ...], told: Told) -> None:
        """No command answers with other results while `sera verify` says that all holds."""
        if told.code or self.is_as_before(command, told) or is_free(path, whole, path.read_bytes()):
            return
        runs = [path.parts[path.parts.index("runs") + 1]] if "runs" in path.parts else ["first", "second"]
        assert any(self.ask(("verify", run)).code for run in runs), (
            f"{path}: {command} has another answer, and verify accepts it"
        )


def full_store(folder: Path) -> Path:
    store = Path(shutil.copytree(FIXTURE, folder / "store"))
    question = {
        "format": 1,
        "round": 1,
        "evidence": {"decision": "promote", "reason": "for once", "verdict": "improving", "alarm": None},
        "until": "9999-01-01T00:00:00+00:00",
        "default": "promote",
    }
    for name in ("asked", "answered"):
        (further_run(store, name) / "review-001.json").write_text(json.dumps(question))
    answer = {"format": 1, "decision": "promote", "note": "fine", "who": "ada", "when": "2026-01-01T00:00:00"}
    (store / "runs" / "answered" / "review-001-answer.json").write_text(json.dumps(answer))
    stop = {"format": 1, "reason": "budget", "after": "10 tokens", "created": "2026-01-01T00:00:00"}
    (further_run(store, "spent") / "stop-000.json").write_text(json.dumps(stop))
    done = next(store.glob("steps/report/*/done.json"))
    held = {"format": 1, "record": json.loads(done.read_text())}
    (done.parent / "collected.json").write_text(json.dumps(held))
    (store / "finished").mkdir()
    note = {"format": 1, "run": "gone", "created": "2026-01-01T00:00:00"}
    (store / "finished" / f"{'0' * 64}.json").write_text(json.dumps(note))
    return store


def commands_of(path: Path) -> list[tuple[str, ...]]:
    """Commands that read a record."""
    run = path.parts[path.parts.index("runs") + 1] if "runs" in path.parts else "first"
    return [
        command
        for command in COMMANDS
        if run in [part.split(":")[0] for part in command] or len(command) == 2
    ]


def records_of(store: Path) -> list[Path]:
    """Every record, those of runs about as often as those of steps together."""
    steps = [*store.glob("steps/*/*/*.json"), *store.glob("steps/*/*/claim/*.json")]
    runs = [*store.glob("runs/**/*.json"), *store.glob("finished/*.json")]
    return sorted(steps) + sorted(runs) * max(1, len(steps) // len(runs))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    found = full_store(tmp_path_factory.mktemp("fuzzed"))
    kept = Kept(found, records_of(found), {})
    kept.before = {command: kept.ask(command) for command in COMMANDS}
    assert kept.ask(("verify", "spent")).code == kept.ask(("verify", "answered")).code == 0
    assert {told.code for told in kept.before.values()} == {0}
    return kept


@fuzzed
@given(data=st.data())
def test_a_damaged_record_is_refused_by_name_or_changes_no_result(kept, data):
    path = data.draw(st.sampled_from(kept.records))
    whole = path.read_bytes()
    damage: Damage = data.draw(damaged_json(json.loads(whole)) | damaged_bytes(whole))
    command = data.draw(st.sampled_from(commands_of(path)))
    path.write_bytes(damage.data)
    try:
        told = kept.ask(command)
        check_told(told)
        assert not told.code or str(kept.store) in told.err or "run '" in told.err, told.err
        kept.check_results(path, whole, command, told)
    finally:
        path.write_bytes(whole)


# ------------------------------------------------------------------------------------------------- going on


class Again(Exception):
    """A step whose record does not serve would be done again: no result comes of the damaged one."""


def do_again(spec):
    raise Again(spec.step)


def goes_on(store: Path) -> dict | None:
    """The last round committed once more from the records of its steps; None if a limit came before it."""
    for name in ("round-001.json", "stop-000.json", "final-000.json", "final-001.json"):
        (store / "runs" / "first" / name).unlink(missing_ok=True)
    if run_round(Session(str(store), "first", do_again), 1) == "budget":
        return None
    found = json.loads((store / "runs" / "first" / "round-001.json").read_text())
    return {name: value for name, value in found.items() if name not in ("created", "epoch", "parent_sha256")}


@pytest.fixture(scope="module")
def finished(_present_store, tmp_path_factory):
    """A store of this version, its records, and its last round."""
    store = Path(shutil.copytree(_present_store, tmp_path_factory.mktemp("going") / "store"))
    last = goes_on(store)
    assert last is not None
    used = {ref["key"] for ref in last["used"]}
    steps = sorted(path for path in store.glob("steps/*/*/done.json") if path.parent.name in used)
    first = [store / "runs" / "first" / name for name in ("run-000.json", "round-000.json")]
    kept = Kept(store, steps + first * (len(steps) // 4), {})
    return kept, last


OWN = re.compile(r"done\.json (metrics|seconds|counts|environment|started|parts|files\..*\.rows)\b.*")
"""What a resumed run takes from a step's record alone: its metrics become the round's as they stand."""


@settings(fuzzed, max_examples=max(100, CASES // 5))
@given(data=st.data())
def test_a_run_goes_on_from_damaged_records_to_the_same_round_or_not_at_all(finished, data):
    kept, last = finished
    path = data.draw(st.sampled_from(kept.records))
    whole = path.read_bytes()
    damage: Damage = data.draw(damaged_json(json.loads(whole)) | damaged_bytes(whole))
    path.write_bytes(damage.data)
    try:
        with at_most():
            found = goes_on(kept.store)
        if found != last and not is_free(path, whole, damage.data):
            places = changed(json.loads(whole), json.loads(damage.data))
            own = all(OWN.fullmatch(f"{path.name} {'.'.join(map(str, place))}") for place in places)
            assert own or kept.ask(("verify", "first")).code == 1
    except SeraError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
    except Again:
        pass
    finally:
        path.write_bytes(whole)


# --------------------------------------------------------------------------------------------- what was found

ROUND, RATE = "runs/first/round-001.json", "heldout/rewards/accuracies"


def spelt(path: Path, place: tuple, text: str) -> None:
    """Put text in the place of a value, as no `json.dumps` would write it."""
    mark = "here a value is put in"
    whole = json.dumps(replaced(json.loads(path.read_text()), place, mark))
    path.write_text(whole.replace(json.dumps(mark), text))


@pytest.mark.parametrize(
    ("record", "place", "text", "command"),
    [
        (ROUND, ("metrics",), "[" * DEEP + "]" * DEEP, "show first"),
        (ROUND, ("metrics", "new"), "[" * 900 + "]" * 900, "show first --json"),
        (ROUND, (), "null", "verify first"),
        (ROUND, ("metrics", RATE), '"0.9"', "show first"),
        (ROUND, ("metrics", RATE), "Infinity", "show first"),
        (ROUND, ("metrics", RATE), "[0.9]", "show first --json"),
        (ROUND, ("metrics", RATE), "null", "report first --out {out}"),
        (ROUND, ("metrics", RATE, "low"), "1e400", "show first"),
        (ROUND, ("metrics", RATE, "n"), "[8]", "diff first second"),
        (ROUND, ("metrics", "tokens"), "1" + "0" * 400, "show first"),
        (ROUND, ("metrics", "seconds"), '"long"', "show first"),
        (ROUND, ("metrics", "human/kept"), "{}", "show first --round 1"),
        (ROUND, ("accuracy",), "true", "show first"),
        (ROUND, ("pairs",), '{"human": 3}', "show first"),
        (ROUND, ("stop_reason",), '"tired"', "show first"),
        (ROUND, ("steps", "evidence"), "null", "show first"),
        (ROUND, ("artifacts", "policy", "path"), "{}", "show first"),
        (ROUND, ("artifacts", "policy", "path"), '"poli/"', "show first"),
        (ROUND, ("artifacts", "policy"), '{"step": "train"}', "export first --to {out}"),
        (ROUND, ("reason",), '"\\ud800"', "verify first"),
        (ROUND, ("reason",), '"one", "reason": "another"', "show first"),
        ("runs/first/run-000.json", ("config_sha256",), '"00"', "show first"),
        ("runs/first/run-000.json", ("resolved", "digests"), "[]", "export first --to {out}"),
        ("runs/first/final-000.json", ("step",), "null", "gc"),
        ("runs/first/final-000.json", ("metrics", "test/rewards/accuracies"), "0.5", "gc"),
        ("runs/asked/review-001.json", ("until",), '"9999-01-01T00:00:00"', "show asked"),
        ("runs/asked/review-001.json", ("until",), '"soon"', "review asked"),
        ("runs/asked/review-001.json", ("evidence",), "7", "review asked"),
        ("runs/answered/review-001-answer.json", ("decision",), '"maybe"', "show answered"),
        ("runs/spent/stop-000.json", ("reason",), "[]", "show spent"),
    ],
)
def test_what_a_record_cannot_say_is_refused_in_one_line_with_its_name(
    tmp_path, record, place, text, command
):
    kept = Kept(full_store(tmp_path), [], {})
    spelt(kept.store / record, place, text)
    told = kept.ask(tuple(command.split()))
    check_told(told)
    assert told.code == 1 and any(name in told.err for name in (record, "/done.json"))


def test_a_configuration_that_is_not_what_its_hash_covers_is_not_gone_on_with(tmp_path):
    """`config` is what the next round would be trained with, `resolved` what config_sha256 covers."""
    kept = Kept(full_store(tmp_path), [], {})
    spelt(kept.store / "runs" / "first" / "run-000.json", ("config", "train", "beta"), "0.5")
    for command in ("verify first", "show first", "export first --to {out}"):
        told = kept.ask(tuple(command.split()))
        check_told(told)
        assert told.code == 1 and "train.beta" in told.err


@pytest.mark.parametrize(
    ("record", "place", "text"),
    [
        (ROUND, ("metrics", "train_loss"), "0.1"),
        (ROUND, ("metrics", RATE, "low"), "0.9"),
        (ROUND, ("reason",), '"it is better"'),
        (ROUND, ("decision",), '"hold"'),
        (ROUND, ("pairs", "human"), "900"),
        (ROUND, ("generated_share",), "0.5"),
        (ROUND, ("used",), "[]"),
        (ROUND, ("used", 4, "step"), '"report"'),
        ("runs/first/final-000.json", ("metrics", "test/rewards/accuracies", "value"), "0.75"),
        ("runs/first/final-000.json", ("metrics",), "{}"),
    ],
)
def test_the_last_rounds_own_words_are_held_against_its_steps(tmp_path, record, place, text):
    """No later manifest holds the hash of the last one, nor of the test side's evidence."""
    kept = Kept(full_store(tmp_path), [], {})
    spelt(kept.store / record, place, text)
    told = kept.ask(("verify", "first"))
    check_told(told)
    assert told.code == 1 and record in told.err


def test_a_step_that_lost_a_metric_is_named(tmp_path):
    kept = Kept(full_store(tmp_path), [], {})
    key = json.loads((kept.store / ROUND).read_text())["steps"]["policy"]["key"]
    path = kept.store / "steps" / "train" / key / "done.json"
    rewrite(path, metrics={})
    told = kept.ask(("lineage", "first"))
    check_told(told)
    assert told.code == 1 and f"{key}/done.json" in told.err and "weights/result" in told.err


@pytest.mark.parametrize("version", ["null", "7", '["0.1.0"]', '{"name": "1"}'])
def test_a_step_whose_environment_names_no_version_is_named(tmp_path, version):
    kept = Kept(full_store(tmp_path), [], {})
    key = json.loads((kept.store / ROUND).read_text())["steps"]["policy"]["key"]
    record = f"steps/train/{key}/done.json"
    spelt(kept.store / record, ("environment", "sera-flow"), version)
    told = kept.ask(("lineage", "first", "--json"))
    check_told(told)
    assert told.code == 1 and record in told.err


def test_a_step_that_lost_its_file_ends_no_round(finished):
    kept, last = finished
    path = kept.store / "steps" / "report" / last["steps"]["report"]["key"] / "done.json"
    whole = path.read_bytes()
    rewrite(path, files={})
    try:
        with pytest.raises(SeraError, match=r"done\.json: names no file 'report\.html'"):
            goes_on(kept.store)
    finally:
        path.write_bytes(whole)
