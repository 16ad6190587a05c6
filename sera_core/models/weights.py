"""Check that a folder's safetensors match its configuration; remove wrapper prefixes from tensor names.

transformers initialises missing tensors randomly and ignores extra ones, both without an error, so values
computed with such a model would be wrong.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sera_core.data.file_checks import placeholder_problem, refuse_special
from sera_core.errors import InputError
from sera_core.guards.shown import one_line

WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
"""Prefixes that torch.compile, DataParallel and peft add to tensor names."""
_SHOWN = 5
_LAYERS = re.compile(r"(num|n)(_hidden)?_layers?")
_SIZE = re.compile(r"(size|dim|embd|inner|heads?|experts?|channels|rank)$")


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header.

    Raises:
        InputError: the file is a Git LFS pointer, a web page, or not a safetensors file.
    """
    return [name for name in _header(file) if name != "__metadata__"]


def wrapper_of(folder: Path) -> str:
    """The wrapper prefix shared by all tensor names in a folder's safetensors; "" if there is none.

    Raises:
        InputError: a file is not a safetensors file.
    """
    names = [name for file in sorted(folder.glob("*.safetensors")) for name in tensor_names(file)]
    found = ""
    while names and (prefix := next((p for p in WRAPPERS if all(n.startswith(p) for n in names)), "")):
        found += prefix
        names = [name.removeprefix(prefix) for name in names]
    return found


def strip_wrapper(folder: Path) -> str:
    """Remove the wrapper prefix from tensor names in a folder's safetensors and index; returns it, or ""."""
    prefix = wrapper_of(folder)
    if not prefix:
        return ""
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        metadata = _header(file).get("__metadata__")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata=metadata)
    for file in folder.glob("*.safetensors.index.json"):
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = {n.removeprefix(prefix): f for n, f in index["weight_map"].items()}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return prefix


def refuse_mismatched_weights(folder: Path, loading: dict[str, Any]) -> None:
    """Refuse weights that do not match the configuration.

    Args:
        folder: the policy folder, for the message.
        loading: transformers' loading info: `missing_keys`, `unexpected_keys`, `mismatched_keys`.

    Raises:
        InputError: a tensor is missing, unexpected or has the wrong shape; the message names them.
    """
    problems = []
    shapes = [f"{name} ({_shape(held)}, expected {_shape(asked)})" for name, held, asked in
              sorted(loading.get("mismatched_keys") or [])]  # fmt: skip
    for what, names in (
        ("missing", loading.get("missing_keys") or ()),
        ("unexpected", loading.get("unexpected_keys") or ()),
        ("with the wrong shape", shapes),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {_some(names)}")
    if problems:
        raise InputError(
            f"policy folder {folder}: its weights do not match its config.json ({'; '.join(problems)}): use "
            "config.json and weights of the same model, as written by save_pretrained"
        )


def refuse_oversized(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a configuration that asks for more than all weights together hold, before it is built.

    Memory and time for it could be without end. Settings of the parts (`text_config`) count too.

    Raises:
        InputError: a size is larger than the count of all weights, or there are more layers than tensors.
    """
    shapes = [
        entry["shape"]
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in _header(file).items()
        if name != "__metadata__"
    ]
    if not shapes:
        return
    numbers = sum(math.prod(shape) for shape in shapes)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in part.items():
            most = len(shapes) if _LAYERS.fullmatch(name) else numbers if _SIZE.search(name) else math.inf
            if isinstance(value, int) and value > most:
                raise InputError(
                    f"{folder / 'config.json'}: {name} is {value!s:.30}, and all weights together hold "
                    f"{len(shapes):,} tensors of {numbers:,} numbers: give their own config.json"
                )


def refuse_not_finite(folder: Path, model: Any) -> None:
    """Refuse weights that contain NaN or infinity.

    Raises:
        InputError: names the first tensor.
    """
    for name, parameter in model.named_parameters():
        four_bits = getattr(parameter, "quant_state", None)  # its scales are the largest weights of blocks
        tensor = parameter if four_bits is None else four_bits.absmax
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise InputError(
                f"policy folder {folder}: the tensor {name} holds NaN or infinity: copy its *.safetensors "
                "again, or give a model whose training did not diverge"
            )


def _is_finite(tensor: Any) -> bool:
    low, high = tensor.detach().aminmax()  # NaN if any is
    return bool(low.isfinite() and high.isfinite())


def refuse_mismatched_tensors(file: Path, expected: Collection[str]) -> None:
    """Refuse an adapter file whose tensors do not match its configuration.

    Raises:
        InputError: names differ; the message lists them.
    """
    held = set(tensor_names(file))
    loading = {"missing_keys": set(expected) - held, "unexpected_keys": held - set(expected)}
    refuse_mismatched_weights(file.parent, loading)


def _header(file: Path) -> dict[str, Any]:
    with refuse_special(file).open("rb") as stream:
        start = stream.read(8)
        rest = stream.read(56)
        if what := placeholder_problem(start + rest):
            raise InputError(f"{file}: {what}")
        try:
            (length,) = struct.unpack("<Q", start)
            if length > file.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            stream.seek(8)
            header = json.loads(stream.read(length))
            with safe_open(file, framework="numpy"):  # checks dtypes, offsets and file size
                return header
        except (struct.error, ValueError, RecursionError, SafetensorError) as error:
            raise InputError(f"{file}: not a safetensors file ({one_line(error)}): copy it again") from error


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
