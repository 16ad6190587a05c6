"""Which function does the work of which step, imported when it is needed (trl and torch take seconds)."""

from importlib import import_module

from sera_core.artifacts.step import Work

WORK = {
    "data": "tasks.data:load_pairs",
    "model": "tasks.modelling:import_model",
    "render": "tasks.data:render_pairs",
    "logps": "tasks.scoring:score_texts",
    "review": "tasks.reviewing:review_pairs",
    "select": "tasks.reviewing:select_pairs",
    "sample": "tasks.sampling:sample_responses",
    "pair": "tasks.bootstrapping:pair_samples",
    "mix": "tasks.mixing:mix_pairs",
    "train": "tasks.training:train_policy",
    "evaluate": "tasks.evaluating:evaluate_policy",
    "test": "tasks.evaluating:test_policy",
    "decide": "tasks.deciding:decide_round",
    "report": "tasks.reporting:report_round",
}


def work_of(step: str) -> Work:
    """The function that does a step's work: (attempt) -> relative paths of the files it wrote."""
    module, name = WORK[step].split(":")
    return getattr(import_module(module), name)
