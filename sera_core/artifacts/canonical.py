"""Content hashes: canonical JSON, digests, the ids of pairs and prompts. Standard library only."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def finite(value: Any) -> Any:
    """The value as JSON can hold it: infinities become strings (`"-inf"`), NaN becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes."""
    text = json.dumps(
        finite(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def sha256_json(value: Any) -> str:
    """sha256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_digest(files: Mapping[str, str]) -> str:
    """A step's digest: sha256 of the canonical JSON of its sorted (relative path, sha256)."""
    return sha256_json(sorted([path, sha] for path, sha in files.items()))


def _messages(messages: Messages) -> list[dict[str, str]]:
    names = ("role", "content", "reasoning_content")
    return [{name: m[name] for name in names if name != "reasoning_content" or m.get(name)} for m in messages]


def prompt_id(prompt: Messages) -> str:
    """First 16 hex digits of the sha256 of the prompt's canonical JSON (role, content, reasoning)."""
    return sha256_json(_messages(prompt))[:16]


def pair_id(prompt: Messages, chosen: Messages, rejected: Messages) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of prompt, chosen and rejected."""
    pair = {"prompt": _messages(prompt), "chosen": _messages(chosen), "rejected": _messages(rejected)}
    return sha256_json(pair)[:16]


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed derived from all parts, e.g. (run seed, round, prompt_id, sample) for a response."""
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts))).digest()[:8], "big") >> 1
