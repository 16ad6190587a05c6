"""All pairs of a round in one page: search, filter, sort, and read any of them.

The page opens from disk, without a server: rows.js holds one line a pair, texts-00000.js, … hold the texts of
500 pairs each and are loaded when one of them is opened.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sera_core.artifacts.folders import write_whole
from sera_core.guards.shown import shown
from sera_core.reporting import words
from sera_core.reporting.examples import last_user_turn, said
from sera_core.reporting.files import RoundFiles, Row
from sera_core.reporting.pages import render

PAGE = "pairs.html"
SHARD_PAIRS = 500
"""Pairs whose texts are in one file."""
PROMPT_CHARACTERS = 80
"""Characters of the prompt's last user turn that the list shows and searches."""
NO_TEXT = -1
"""Shard of a pair that was dropped before its text entered the round's files."""
_COLUMNS = ("pair_id", "origin", "stage", "reason", "kept", "ensemble_margin")
_TEXTS = ("pair_id", "prompt", "chosen", "rejected")
_TOKENS = ("pair_id", "chosen_tokens", "rejected_tokens")
_SOURCES = (("pairs", "train.parquet"), ("responses", "pairs.parquet"))


def write_pair_browser(files: RoundFiles, number: int, folder: Path) -> None:
    """Write pairs.html, rows.js and the texts of a round into a folder.

    Args:
        files: the round's files by role: mixture, pairs, scored and, with generated pairs, responses.
        number: the round.
        folder: an existing folder; texts of an earlier report there are removed.
    """
    ledger: dict[str, Row] = {}
    for row in files.rows("mixture", "ledger.parquet", _COLUMNS):
        if row["pair_id"]:
            ledger.setdefault(row["pair_id"], row)  # a later row of the id is a repeated row of the data
    write_whole(
        folder / PAGE, _page(number, len(ledger)).encode()
    )  # first: it marks the folder as a report's
    tokens = dict(_tokens(files))
    rows: list[list[Any]] = []
    shard: list[list[str]] = []
    for pair in _pairs(files):
        row = ledger.pop(pair["pair_id"], None)
        if row is None:
            continue
        rows.append(_row(row, tokens, last_user_turn(pair["prompt"]), len(rows) // SHARD_PAIRS))
        shard.append(_texts(pair, turned=row["reason"] == "relabelled"))
        if len(shard) == SHARD_PAIRS:
            _write_texts(folder, rows[-1][-1], shard)
            shard = []
    if shard:
        _write_texts(folder, rows[-1][-1], shard)
    _remove_texts_from(folder, -(-len(rows) // SHARD_PAIRS))
    rows += [_row(row, tokens, "", NO_TEXT) for row in ledger.values()]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(10)]
    _write_script(folder / "rows.js", "seraRows", [columns, SHARD_PAIRS, words.REASONS])


def _page(number: int, count: int) -> str:
    script = (resources.files("sera_core.reporting") / "templates" / "pairs.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render("pairs.html.j2", number=number, count=count, script=Markup(script), digest=digest)


def _pairs(files: RoundFiles) -> Iterator[Row]:
    for role, file in _SOURCES:
        yield from files.rows(role, file, _TEXTS)


def _tokens(files: RoundFiles) -> Iterator[tuple[str, tuple[int, int]]]:
    for role in ("scored", "responses"):
        for row in files.rows(role, "scored.parquet", _TOKENS):
            yield row["pair_id"], (row["chosen_tokens"], row["rejected_tokens"])


def _row(row: Row, tokens: dict[str, tuple[int, int]], prompt: str, shard: int) -> list[Any]:
    """One line of the list, in the order of `columns` in pairs.js."""
    margin = row["ensemble_margin"] if words.finite(row["ensemble_margin"]) else None
    chosen, rejected = tokens.get(row["pair_id"], (None, None))
    if row["reason"] == "relabelled":
        margin, chosen, rejected = None if margin is None else -margin, rejected, chosen
    short = shown(" ".join(prompt.split())[:PROMPT_CHARACTERS])
    why = (row["origin"], row["stage"], row["reason"], int(row["kept"]))
    return [row["pair_id"], *why, margin, chosen, rejected, short, shard]


def _texts(pair: Row, turned: bool) -> list[str]:
    """Prompt, chosen and rejected answer as people read them; a relabelled pair as it was trained on."""
    sides = ("rejected", "chosen") if turned else ("chosen", "rejected")
    prompt = "\n\n".join(f"{message['role']}: {said(message)}" for message in pair["prompt"])
    return [shown(prompt), *(shown("\n\n".join(map(said, pair[side]))) for side in sides)]


def _write_texts(folder: Path, shard: int, texts: list[list[str]]) -> None:
    _write_script(folder / f"texts-{shard:05d}.js", "seraTexts", [shard, texts])


def _write_script(path: Path, function: str, arguments: list[Any]) -> None:
    """A call with JSON arguments; ASCII, so that no character can end a line or the script."""
    values = ",".join(json.dumps(value, separators=(",", ":")) for value in arguments)
    write_whole(path, f"{function}({values});\n".encode("ascii"))


def _remove_texts_from(folder: Path, first: int) -> None:
    while (path := folder / f"texts-{first:05d}.js").exists():
        path.unlink()
        first += 1
