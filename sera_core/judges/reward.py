"""A reward model as a rater: a classifier with one label, its score.

torch and transformers are imported only in the functions that need them.
"""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from sera_core.artifacts.canonical import files_digest, sha256_file
from sera_core.data.rendering import Renderer
from sera_core.errors import InputError
from sera_core.guards.shown import one_line
from sera_core.judges.rating import Question, Rating
from sera_core.models.devices import device_of
from sera_core.models.policies import load_tokenizer, policy_files, read_settings, refuse_other_weights
from sera_core.models.weights import refuse_mismatched_weights, refuse_not_finite


def reward_digest(folder: Path) -> str:
    """Digest of a reward model's files: weights, configuration, tokenizer and template.

    Raises:
        InputError: no folder with a configuration and safetensors, more than one label, or weights elsewhere.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"reward:{folder}: no folder with a config.json; give a local model folder")
    settings = read_settings(folder / "config.json")
    labels = len(settings.get("id2label") or "01")  # transformers' default is two
    if labels != 1:
        raise InputError(f"reward:{folder}: has {labels} labels; a reward model has one, its score")
    if "auto_map" in settings:
        raise InputError(f"reward:{folder}: needs code from its own repository, which is never run here")
    return _digest(folder, "reward")


def chat_digest(folder: Path) -> str:
    """Digest of a local chat model's files: weights, configuration, tokenizer and template.

    Raises:
        InputError: no folder with a configuration and safetensors, or weights elsewhere.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"local:{folder}: no folder with a config.json; give a local model folder")
    if "auto_map" in read_settings(folder / "config.json"):
        raise InputError(f"local:{folder}: needs code from its own repository, which is never run here")
    return _digest(folder, "local")


class RewardRater:
    """Scores each answer by itself; larger is better, in the model's own unit."""

    batch = 256

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self.folder, self.device = folder, device_of(device)
        self.renderer = Renderer(folder)
        load_tokenizer(folder)
        self.model = _load(folder).to(self.device)

    def rate(self, questions: Sequence[Question]) -> list[Rating]:
        """One rating for each answer."""
        return [self._rating(question) for question in questions]

    def _rating(self, question: Question) -> Rating:
        import torch

        if not question.answer.strip():
            return Rating(float("-inf"))  # the model would score the prompt alone
        messages = [dict(message) for message in question.prompt]
        try:
            prompt_ids = self.renderer.prompt_ids(messages)
            ids = [*prompt_ids, *self.renderer.response_ids(messages, question.answer)]
        except InputError:
            return Rating(None, "template")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            return Rating(None, "too_long")
        with torch.inference_mode():
            given = torch.tensor([ids], device=self.device)
            score = float(self.model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, 0])
        return Rating(score) if isfinite(score) else Rating(None, "non_finite")


def _digest(folder: Path, kind: str) -> str:
    names = policy_files(folder)
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{kind}:{folder}: has no *.safetensors; weights are never read from a pickle")
    refuse_other_weights(folder)
    return files_digest({name: sha256_file(folder / name) for name in names})


def _load(folder: Path) -> Any:
    """The model in float32 and eval mode.

    Raises:
        InputError: transformers cannot open it as a classifier, or its weights do not fit.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # the libraries raise classes of their own
        raise InputError(f"reward:{folder}: cannot be opened as a classifier ({one_line(error)})") from error
    refuse_mismatched_weights(folder, loading)
    refuse_not_finite(folder, model)
    return model.eval()
