"""Render the prompts of a file to token ids, for answers that a judge compares."""

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.data.formats import Reading
from sera_core.data.loading import read_prompts
from sera_core.data.preferences import Prompt
from sera_core.data.rendering import Renderer
from sera_core.data.sources import read_rows
from sera_core.data.splitting import group_key
from sera_core.errors import InputError


def load_prompt_set(attempt: Attempt) -> list[str]:
    """Write prompts.parquet: the file's distinct prompts, in prompt_id order.

    Raises:
        InputError: a malformed row, a prompt that a policy of the run was trained on, or none that fits.
    """
    path = attempt.spec.where["file"]
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(path, read_rows(path), Reading()).items}
    _refuse_trained_on(attempt, path, prompts)
    renderer = Renderer(
        attempt.input("model").folder("policy"), arguments=attempt.fields.get("template_kwargs")
    )
    rows = [
        {"prompt_id": id, "prompt": prompt.prompt, "prompt_ids": renderer.prompt_ids(prompt.prompt)}
        for id, prompt in sorted(prompts.items())
    ]
    fitting = [row for row in rows if len(row["prompt_ids"]) <= attempt.fields["max_prompt_tokens"]]
    if not fitting:
        raise InputError(
            f"{path}: none of its {len(rows)} prompts has at most data.max_prompt_tokens = "
            f"{attempt.fields['max_prompt_tokens']} tokens"
        )
    attempt.counts["prompts"] = len(fitting)
    attempt.counts["prompt_too_long"] = len(rows) - len(fitting)
    schema.write_table(schema.from_rows(schema.PROMPTS, fitting), attempt.write("prompts.parquet"))
    return ["prompts.parquet"]


def _refuse_trained_on(attempt: Attempt, path: str, prompts: dict[str, Prompt]) -> None:
    train = schema.iter_rows(attempt.input("rendered").path("prompts.parquet"), ["prompt"])
    known = {group_key(row["prompt"]) for row in train}
    shared = [prompt for prompt in prompts.values() if group_key(prompt.prompt) in known]
    if shared:
        raise InputError(
            f"{path}: {len(shared)} of its {len(prompts)} prompts are train prompts of the run (first: "
            f"{shared[0].where}), so its answers to them say nothing; remove them from the file"
        )
