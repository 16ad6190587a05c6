"""How far two reviewers agree on the ranking of a prompt's responses."""

import numpy as np
from jaxtyping import Float, Int


def ranking_consistency(
    newer: Float[np.ndarray, " response"],
    older: Float[np.ndarray, " response"],
    prompts: Int[np.ndarray, " response"],
) -> float | None:
    """C, the mean agreement of two rankings of each prompt's responses, in [0, 1].

        C = mean over prompts of (τ + 1) / 2,   τ = (concordant − discordant) / pairs of responses

    CREAM, arXiv 2410.12735, read second-hand. Kendall's τ there counts all pairs of a prompt's responses;
    those that both reviewers rate equal, such as one text sampled twice, are left out here.

    Args:
        newer, older: rewards of the same responses by both reviewers.
        prompts: number of each response's prompt; a prompt's responses are consecutive.

    Returns:
        None if no prompt has two responses that a reviewer tells apart. A response without a finite reward
        is left out.
    """
    finite = np.isfinite(newer) & np.isfinite(older)
    newer, older, prompts = newer[finite], older[finite], prompts[finite]
    starts = np.flatnonzero(np.diff(prompts, prepend=-1))
    found = [
        agreement
        for a, b in zip(np.split(newer, starts[1:]), np.split(older, starts[1:]), strict=True)
        if (agreement := _agreement(a, b)) is not None
    ]
    return float(np.mean(found)) if found else None


def _agreement(newer: np.ndarray, older: np.ndarray) -> float | None:
    """(τ + 1) / 2 of one prompt."""
    first, second = np.triu_indices(newer.size, 1)
    signs = np.sign(newer[first] - newer[second]), np.sign(older[first] - older[second])
    told_apart = (signs[0] != 0) | (signs[1] != 0)
    if not told_apart.any():
        return None
    return float((np.mean((signs[0] * signs[1])[told_apart]) + 1) / 2)
