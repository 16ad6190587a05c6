"""Copy the start policy into the store as a policy folder."""

from pathlib import Path

from sera_core.artifacts.step import Attempt
from sera_core.data.chat_templates import template_text
from sera_core.errors import InputError
from sera_core.models.model_sources import materialise, resolve_source, source_digest
from sera_core.models.policies import load_policy, load_tokenizer, read_settings, write_settings


def import_model(attempt: Attempt) -> list[str]:
    """Write policy/ (config, safetensors, tokenizer, chat template) from the model source.

    Raises:
        InputError: the source cannot be used, its weights do not match its configuration, or it changed since
            the run was planned.
    """
    where, folder = attempt.spec.where, attempt.write("policy/config.json").parent
    source = resolve_source(where["source"], where["revision"])
    if source_digest(source) != attempt.fields["source_digest"]:
        raise InputError(f"model {where['source']}: changed while the run started; run it again")
    materialise(source, folder)
    if (template := attempt.fields["chat_template"]) is not None:
        _set_template(folder, template)
    files = [f"policy/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()]
    load_tokenizer(folder)
    load_policy(folder, device="meta")  # checks names and shapes of all tensors without reading weights
    attempt.counts["files"] = len(files)
    return files


def _set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template_text(template), encoding="utf-8", newline="")
    path = folder / "tokenizer_config.json"
    config = read_settings(path)
    config.pop("chat_template", None)
    write_settings(path, config)
