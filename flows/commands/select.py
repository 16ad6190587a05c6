"""`sera select`: select which scored pairs to train on. Needs neither torch nor a model."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.commands.output import check_output, print_result, write_output
from sera_core.artifacts.canonical import derived_seed
from sera_core.errors import InputError
from sera_core.method.selection import select as select_pairs
from sera_core.reporting import words
from sera_core.reviewers import selection_table


def select(args: argparse.Namespace) -> int:
    """Write the ledger of a scored file."""
    check_output(args.out, args.force)
    scored = _read_scored(args.scored)
    ids = scored["pair_id"].to_pylist()
    margins = scored["ensemble_margin"].to_numpy().astype(np.float64)
    try:
        selection = select_pairs(
            margins,
            ids,
            rule=args.rule,
            fraction=args.fraction,
            k=args.k,
            threshold=args.threshold,
            min_margin=args.min_margin,
            direction=args.direction,
            seed=derived_seed(args.seed, 0, "human", "random"),
        )
    except ValueError as error:
        raise InputError(f"{args.scored}: {error}") from error
    named = "prompt_id" in scored.column_names
    prompts = scored["prompt_id"].to_pylist() if named else [None] * scored.num_rows
    ledger = selection_table(ids, prompts, margins, selection, "human", 0)
    write_output(ledger, args.out)
    value = {
        "pairs": scored.num_rows,
        "kept": int(selection.kept.sum()),
        "by_reason": dict(sorted(Counter(ledger["reason"].to_pylist()).items())),
        "out": str(args.out),
    }
    head = f"{args.out}: {value['kept']:,} of {value['pairs']:,} pairs kept ({args.rule})"
    print_result(args, value, [head, *words.count_lines(value["by_reason"])])
    return 0


def _read_scored(path: Path) -> pa.Table:
    """Columns pair_id and ensemble_margin of a scored file, and prompt_id if it has one."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a scored.parquet from `sera score`")
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow.names
        missing = [name for name in ("pair_id", "ensemble_margin") if name not in found]
        if missing:
            raise InputError(
                f"{path}: no column {' and no column '.join(missing)} (found: {', '.join(found)}); give a "
                "scored.parquet from `sera score`"
            )
        table = file.read(
            columns=[name for name in ("pair_id", "prompt_id", "ensemble_margin") if name in found]
        )
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable parquet file ({error}); write it again with `sera score`"
        ) from error
    if table["pair_id"].null_count or not pa.types.is_floating(table["ensemble_margin"].type):
        raise InputError(
            f"{path}: {table['pair_id'].null_count} rows have no pair_id, and ensemble_margin is "
            f"{table['ensemble_margin'].type}; every row needs an id and a margin in nats"
        )
    return table
