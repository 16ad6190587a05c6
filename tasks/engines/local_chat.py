"""Generate the answers of a local chat model that judges or rates: greedy, with the transformers engine."""

from collections.abc import Sequence
from pathlib import Path

from sera_core.data.rendering import Renderer
from sera_core.judges.local import Generate, Generated
from sera_core.models.devices import device_of
from tasks.engines.choose import open_sampler
from tasks.engines.sampler import Request, Settings, position_limit

MAX_TOKENS = 256
"""Tokens of an answer at most; a model that thinks aloud for longer says nothing usable."""
GREEDY = 1e-9
"""A nucleus that holds the most likely token alone."""


def open_generate(folder: Path, device: str) -> Generate:
    """The model of a folder, in float32.

    Raises:
        InputError: a folder that cannot be loaded, or without a chat template.
    """
    renderer = Renderer(folder)
    sampler = open_sampler("transformers", folder, device=device_of(device))
    settings = Settings(1.0, GREEDY, MAX_TOKENS, renderer.stop_ids)
    positions = position_limit(folder)

    def generate(texts: Sequence[str]) -> list[Generated | None]:
        prompts = [tuple(renderer.prompt_ids([{"role": "user", "content": text}])) for text in texts]
        fits = [positions is None or len(ids) + MAX_TOKENS <= positions for ids in prompts]
        asked = [Request(ids, 0) for ids, fit in zip(prompts, fits, strict=True) if fit]
        found = iter(sampler.sample(asked, settings) if asked else [])
        return [
            Generated(renderer.text((answer := next(found)).ids), len(ids), len(answer.ids)) if fit else None
            for ids, fit in zip(prompts, fits, strict=True)
        ]

    return generate
