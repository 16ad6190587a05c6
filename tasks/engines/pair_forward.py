"""Forward pass over a batch of pairs: each prompt is computed once, and only response tokens are projected.

A pair's row is `prompt[:-1] | prompt[-1] chosen[:-1] | prompt[-1] rejected[:-1]`: each response begins
with the prompt's last token, whose hidden state predicts the response's first. A segment mask separates the
responses, and positions restart for the second one.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from sera_core.models.architecture import keeps_state, rope_boundary, text_config, unsupported, window
from sera_core.models.logprobs import UNSUPPORTED_ERRORS, plain_sequence_logps, probe_items, scoring_mode

Row = dict[str, Any]
UNNEEDED = ("entropy", "mean_logits", "is_top1")
"""Outputs that TRL only logs; skipped, because each costs a pass over the vocabulary."""


def packed_length(row: Row) -> int:
    """Positions of a pair's row; each response starts with the prompt's last token and omits its own last."""
    return len(row["prompt_ids"]) - 1 + len(row["chosen_ids"]) + len(row["rejected_ids"])


@dataclass(frozen=True)
class PairCollator:
    """A global batch -> micro-batches of at most `micro_batch` pairs, longest first, ties in the given order.

    With `share` a pair is one row, whose responses `segments` separates; otherwise each response is a row.
    """

    micro_batch: int
    share: bool
    processes: int = 1
    """Processes that share a batch: none gets more than its part in one micro-batch."""

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        ordered = sorted(rows, key=packed_length, reverse=True)
        size = min(self.micro_batch, math.ceil(len(ordered) / self.processes))
        starts = range(0, len(ordered), size)
        return [self.micro(ordered[start : start + size]) for start in starts]

    def micro(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Inputs of TRL's loss (responses after their prompt's last token) and of the model."""
        for row in rows:
            empty = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if not row[name]]
            assert not empty, f"pair in row {row['row']} has no {empty}"
        answers = [(row, row["chosen_ids"]) for row in rows] + [(row, row["rejected_ids"]) for row in rows]
        visible = _pad([[row["prompt_ids"][-1], *ids] for row, ids in answers])
        mask = _pad([[0] + [1] * len(ids) for _, ids in answers])
        return {
            "row": torch.tensor([row["row"] for row in rows]),
            "label_smoothing": torch.tensor([row["label_smoothing"] for row in rows], dtype=torch.float64),
            "input_ids": visible,
            "completion_mask": mask,
            "attention_mask": _pad([[1] * (1 + len(ids)) for _, ids in answers]),
            "ref_chosen_logps": torch.tensor([row["ref_chosen_logps"] for row in rows], dtype=torch.float64),
            "ref_rejected_logps": torch.tensor(
                [row["ref_rejected_logps"] for row in rows], dtype=torch.float64
            ),
            **(self._shared(rows) if self.share else self._apart(answers)),
        }

    def _shared(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        prompts = [row["prompt_ids"] for row in rows]
        ids, segments, positions, take = [], [], [], {"chosen_ids": [], "rejected_ids": []}
        width = max(map(packed_length, rows))
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            ids.append(prompt[:-1])
            segments.append([0] * (len(prompt) - 1))
            positions.append(list(range(len(prompt) - 1)))
            for segment, (side, taken) in enumerate(take.items(), start=1):
                length, start = len(row[side]), number * width + len(ids[-1])
                taken += range(start, start + length)
                ids[-1] = ids[-1] + [prompt[-1], *row[side][:-1]]
                segments[-1] += [segment] * length
                positions[-1] += range(len(prompt) - 1, len(prompt) - 1 + length)
        return {
            "packed_ids": _pad(ids),
            "segments": _pad(segments, -1),
            "positions": _pad(positions),
            "take": torch.tensor(take["chosen_ids"] + take["rejected_ids"]),
        }

    def _apart(self, answers: Sequence[tuple[Row, list[int]]]) -> dict[str, Tensor]:
        # Complete sequences, so that length-dependent rotary settings are the same as in scoring.
        ids = [row["prompt_ids"] + answer for row, answer in answers]
        width = max(map(len, ids))
        take = [
            number * width + len(row["prompt_ids"]) - 1 + token
            for number, (row, answer) in enumerate(answers)
            for token in range(len(answer))
        ]
        return {
            "packed_ids": _pad(ids),
            "segments": _pad([[1] * len(entry) for entry in ids], -1),
            "take": torch.tensor(take),
        }


def _pad(rows: Sequence[list[int]], value: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def pair_mask(segments: Tensor) -> Tensor:
    """[row, 1, query, key], True where attended: earlier positions of the prompt (0) and the same segment."""
    query, key = segments[:, :, None], segments[:, None, :]
    earlier = torch.ones(
        segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device
    ).tril()
    return (((key == 0) | (key == query)) & earlier)[:, None]


class Forward(NamedTuple):
    """Result of a forward pass: log-probabilities in nats [response token], the MoE balancing loss, and for
    WPO log Σ_v p_v² of each token's distribution."""

    log_probs: Tensor
    aux_loss: Tensor | None
    log_sum_sq_probs: Tensor | None = None


Compute = Callable[..., Forward]
"""compute(ids [row, token], take [response token], targets [response token], **mask and positions)."""


def add_pair_forward(model: PreTrainedModel, weighted: bool = False) -> None:
    """Make `model(labels=…, fused_lm_head=True)` compute a micro-batch of `PairCollator`.

    TRL's fused head (chunked vocabulary, soft-capping, scales) does the projection; a hook passes it only the
    hidden states that predict a response token. If that does not give the model's log-probabilities, the
    model's own logits at all positions are used.

    Args:
        model: a causal language model with dropout disabled (`disable_dropout`).
        weighted: also compute log Σ_v p_v² of each token's distribution, for WPO's weights.

    Raises:
        InputError: in training mode neither agrees with the plain loop.
    """
    expected, boundary = _plain_pairs(model), rope_boundary(model)
    compute = next(
        (way for way in _ways(model, weighted) if _trains_alike(model, way, boundary, expected)), None
    )
    if compute is None:
        raise unsupported(
            model,
            "its log-probabilities in training mode differ from those in eval mode (router jitter or "
            "other noise, or rows that are not independent); set such noise to 0 in its config.json",
        )

    def pair_forward(
        self: PreTrainedModel,
        labels: Tensor,
        packed_ids: Tensor,
        segments: Tensor,
        take: Tensor,
        positions: Tensor | None = None,
        **_: Any,
    ) -> FusedCausalLMOutput:
        found = _micro_logps(compute, boundary, labels, packed_ids, segments, take, positions)
        zeros = {name: torch.zeros_like(labels[:, 1:]) for name in UNNEEDED}
        return FusedCausalLMOutput(**found._asdict(), **zeros)

    model.forward = MethodType(pair_forward, model)


def _micro_logps(
    compute: Compute,
    boundary: int | None,
    labels: Tensor,
    packed_ids: Tensor,
    segments: Tensor,
    take: Tensor,
    positions: Tensor | None = None,
    **_: Any,
) -> Forward:
    """The same of a micro-batch as float64 [response, token], zero at padding."""
    targets, answered = labels[:, 1:], labels[:, 1:] != -100
    if positions is not None:
        seen = {"attention_mask": pair_mask(segments), "position_ids": positions}
        every = torch.arange(len(answered), device=answered.device)
        return _merged(answered, [(every, compute(packed_ids, take, targets[answered], **seen))])
    parts = []
    for rows in _alike(segments, boundary):
        width = int((segments[rows] >= 0).sum(1).max())
        visible, ours = (segments[rows, :width] >= 0).long(), answered[rows]
        places = _places(take, rows, packed_ids.shape[1], width)
        found = compute(packed_ids[rows, :width], places, targets[rows][ours], attention_mask=visible)
        parts.append((rows, found))
    return _merged(answered, parts)


def _merged(answered: Tensor, parts: Sequence[tuple[Tensor, Forward]]) -> Forward:
    """One result of the passes over groups of rows; a balancing loss counts by the number of its rows."""

    def by_row(found: Sequence[Tensor]) -> Tensor:
        # Summed in float64: over a thousand tokens float32 would lose 1e-4 nats.
        values = torch.zeros(answered.shape, dtype=torch.float64, device=answered.device)
        for (rows, _), some in zip(parts, found, strict=True):
            ours = answered[rows]
            part = torch.zeros(ours.shape, dtype=torch.float64, device=ours.device)
            values = values.index_copy(0, rows, part.masked_scatter(ours, some.double()))
        return values

    total = sum(len(rows) for rows, _ in parts)
    losses = [found.aux_loss * (len(rows) / total) for rows, found in parts if found.aux_loss is not None]
    squares = [found.log_sum_sq_probs for _, found in parts if found.log_sum_sq_probs is not None]
    return Forward(
        by_row([found.log_probs for _, found in parts]),
        torch.stack(losses).sum() if losses else None,
        by_row(squares) if squares else None,
    )


def _alike(segments: Tensor, boundary: int | None) -> list[Tensor]:
    """Groups of rows that may share a forward pass: all, or one group per side of a rotary boundary."""
    every = torch.arange(len(segments), device=segments.device)
    if boundary is None:
        return [every]
    beyond = (segments >= 0).sum(1) > boundary
    return [side for side in (every[~beyond], every[beyond]) if len(side)]


def _places(take: Tensor, rows: Tensor, width: int, narrower: int) -> Tensor:
    """The part of `take` (flat indices in rows of `width`) in these rows, for their narrower width."""
    row, column = take // width, take % width
    number = torch.full((int(row.max()) + 1,), -1, device=take.device)
    number[rows] = torch.arange(len(rows), device=take.device)
    ours = number[row] >= 0
    return number[row[ours]] * narrower + column[ours]


# -------------------------------------------------------------------------------------------- projections


def _ways(model: PreTrainedModel, weighted: bool) -> Iterator[Compute]:
    """TRL's fused head, then the model's own logits; the changes of the first are undone."""
    plain, backbone = model.forward, model.base_model
    if backbone is not model:
        state: dict[str, Tensor] = {}

        def keep_predicting(module: Any, args: Any, output: Any) -> Any:
            if "take" in state:
                output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[state["take"]][None]
            return output

        outputs = ("log_probs", "log_sum_sq_probs") if weighted else ("log_probs",)
        add_fused_lm_head(model, outputs=outputs)  # over TRL's, which computes what it only logs too
        hook = backbone.register_forward_hook(keep_predicting)
        yield _by_fused_head(model.forward, state)
        hook.remove()
        model.forward = plain
    yield _by_own_logits(plain, weighted)


def _by_fused_head(fused: Callable[..., Any], state: dict[str, Tensor]) -> Compute:
    def compute(ids: Tensor, take: Tensor, targets: Tensor, **seen: Any) -> Forward:
        state["take"] = take
        try:
            output = fused(input_ids=ids, shift_labels=targets[None], fused_lm_head=True, **seen)
        finally:
            state.clear()
        squares = output.log_sum_sq_probs
        return Forward(output.log_probs[0], output.aux_loss, None if squares is None else squares[0])

    return compute


def _by_own_logits(forward: Callable[..., Any], weighted: bool = False) -> Compute:
    def compute(ids: Tensor, take: Tensor, targets: Tensor, **seen: Any) -> Forward:
        output = forward(input_ids=ids, use_cache=False, **seen)
        logits = output.logits.flatten(0, 1)[take].float()
        chosen, norm = logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(-1)
        squares = (2 * logits.detach()).logsumexp(-1) - 2 * norm.detach() if weighted else None
        return Forward(chosen - norm, getattr(output, "aux_loss", None), squares)

    return compute


# -------------------------------------------------------------------------------------------------- probe


def _probe_rows(model: PreTrainedModel) -> list[Row]:
    """Two pairs of a few tokens."""
    items = probe_items(model)
    return [
        {
            "row": number,
            "prompt_ids": list(chosen.prompt_ids),
            "chosen_ids": list(chosen.response_ids),
            "rejected_ids": list(rejected.response_ids),
            "ref_chosen_logps": 0.0,
            "ref_rejected_logps": 0.0,
            "label_smoothing": 0.0,
        }
        for number, (chosen, rejected) in enumerate([items[:2], items[2:]])
    ]


def _plain_pairs(model: PreTrainedModel) -> Tensor:
    """log π of the probe's responses by the plain loop, chosen ones first, float64 [response]."""
    items = probe_items(model)
    training = model.training
    model.eval()
    try:
        scoring_mode(model)  # raises if the model cannot be scored at all
        return torch.from_numpy(plain_sequence_logps(model, [items[0], items[2], items[1], items[3]]))
    finally:
        model.train(training)


def _probe_micro(model: PreTrainedModel, share: bool) -> dict[str, Tensor]:
    micro = PairCollator(2, share).micro(_probe_rows(model))
    labels = torch.where(micro["completion_mask"].bool(), micro["input_ids"], -100)
    return {name: value.to(model.device) for name, value in {**micro, "labels": labels}.items()}


def _trains_alike(
    model: PreTrainedModel, compute: Compute, boundary: int | None, expected: Tensor, share: bool = False
) -> bool:
    """Whether a pass in training mode gives the plain loop's values within the tolerance of the dtype."""
    micro, training = _probe_micro(model, share), model.training
    model.train()
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            log_probs = _micro_logps(compute, boundary, **micro).log_probs
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED_ERRORS:
        return False
    finally:
        model.train(training)
    tolerance = 1e-5 if model.dtype == torch.float32 else 1e-2
    return torch.allclose(log_probs.sum(1).cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def can_share_prompt(model: PreTrainedModel, longest: int) -> bool:
    """Whether the prompt can be computed once for both responses: needs full sdpa attention with positions.

    Windows and rotary boundaries shorter than the longest pair, recurrent layers and other attention code do
    not support the segment mask; then each response is computed with its own prompt. If the configuration
    allows it, a probe decides.

    Args:
        model: a causal language model with dropout disabled (`disable_dropout`).
        longest: tokens of the longest pair.

    Raises:
        InputError: the model cannot be scored at all.
    """
    bounds = [bound for bound in (window(model), rope_boundary(model)) if bound is not None]
    return (
        text_config(model)._attn_implementation == "sdpa"
        and not keeps_state(model)
        and longest <= min(bounds, default=longest)
        and "position_ids" in inspect.signature(model.base_model.forward).parameters
        and _trains_alike(model, _by_own_logits(model.forward), None, _plain_pairs(model), share=True)
    )
