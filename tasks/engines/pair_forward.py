"""A batch of pairs: each prompt computed once, hidden states projected only where a response is predicted.

A pair's row is `prompt[:-1] | prompt[-1] chosen[:-1] | prompt[-1] rejected[:-1]`: each response begins
with the prompt's last token, whose hidden state predicts the response's first. A mask by segment keeps the
responses apart, and positions start again for the second one.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

Row = dict[str, Any]
UNNEEDED = ("entropy", "mean_logits", "is_top1")
"""Outputs TRL logs averages of and no loss here reads: each costs a pass over the vocabulary."""


def packed_length(row: Row) -> int:
    """Positions of a pair's row; each response begins with the prompt's last token and lacks its own."""
    return len(row["prompt_ids"]) - 1 + len(row["chosen_ids"]) + len(row["rejected_ids"])


@dataclass(frozen=True)
class PairCollator:
    """A global batch -> micro-batches of at most `micro_batch` pairs, longest first, ties in the given order.

    With `share` a pair is one row, and `segments` keeps its responses apart; without, a response is a row.
    """

    micro_batch: int
    share: bool

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        ordered = sorted(rows, key=packed_length, reverse=True)
        starts = range(0, len(ordered), self.micro_batch)
        return [self.micro(ordered[start : start + self.micro_batch]) for start in starts]

    def micro(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What TRL's loss reads (responses behind their prompt's last token), and what the model computes."""
        for row in rows:
            empty = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if not row[name]]
            assert not empty, f"pair in row {row['row']} has no {empty}"
        answers = [(row, row["chosen_ids"]) for row in rows] + [(row, row["rejected_ids"]) for row in rows]
        visible = _pad([[row["prompt_ids"][-1], *ids] for row, ids in answers])
        mask = _pad([[0] + [1] * len(ids) for _, ids in answers])
        return {
            "row": torch.tensor([row["row"] for row in rows]),
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
        ids = [row["prompt_ids"] + answer[:-1] for row, answer in answers]
        width = max(map(len, ids))
        take = [
            number * width + len(row["prompt_ids"]) - 1 + token
            for number, (row, answer) in enumerate(answers)
            for token in range(len(answer))
        ]
        return {
            "packed_ids": _pad(ids),
            "segments": _pad([[1] * len(entry) for entry in ids]),
            "take": torch.tensor(take),
        }


def _pad(rows: Sequence[list[int]], value: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def pair_mask(segments: Tensor) -> Tensor:
    """[row, 1, query, key], True where seen: earlier positions of the prompt (0) and of one's own segment."""
    query, key = segments[:, :, None], segments[:, None, :]
    earlier = torch.ones(
        segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device
    ).tril()
    return (((key == 0) | (key == query)) & earlier)[:, None]


def add_pair_forward(model: PreTrainedModel) -> None:
    """Let `model(labels=…, fused_lm_head=True)` compute a micro-batch of `PairCollator`.

    TRL's own fused head (chunked vocabulary, soft-capping, scales) does the projection; a hook hands it only
    the hidden states that predict a response token.
    """
    add_fused_lm_head(model)  # over TRL's: log-probabilities only
    fused, state = model.forward, {}

    def keep_predicting(module: Any, args: Any, output: Any) -> Any:
        if "take" in state:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[state["take"]][None]
        return output

    def pair_forward(
        self: PreTrainedModel,
        labels: Tensor,
        packed_ids: Tensor,
        segments: Tensor,
        take: Tensor,
        positions: Tensor | None = None,
        **_: Any,
    ) -> FusedCausalLMOutput:
        seen = {"attention_mask": segments}
        if positions is not None:
            seen = {"attention_mask": pair_mask(segments), "position_ids": positions}
        answered = labels[:, 1:] != -100
        state["take"] = take
        try:
            output = fused(
                input_ids=packed_ids, shift_labels=labels[:, 1:][answered][None], fused_lm_head=True, **seen
            )
        finally:
            state.clear()
        # Summed in float64: over a thousand tokens float32 would lose 1e-4 nats.
        empty = output.log_probs.new_zeros(answered.shape, dtype=torch.float64)
        log_probs = empty.masked_scatter(answered, output.log_probs.double())
        zeros = {name: torch.zeros_like(answered) for name in UNNEEDED}
        return FusedCausalLMOutput(log_probs=log_probs, aux_loss=output.aux_loss, **zeros)

    model.base_model.register_forward_hook(keep_predicting)
    model.forward = MethodType(pair_forward, model)


def can_share_prompt(model: PreTrainedModel, longest: int) -> bool:
    """Whether the prompt may be computed once for both responses: full attention by sdpa, with positions.

    Sliding windows that the longest pair outgrows, recurrent layers and other attention code are not masked
    by segment, so there every response is computed behind a prompt of its own.

    Args:
        model: a causal language model.
        longest: tokens of the longest pair.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config._attn_implementation == "sdpa"
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or longest <= window)
        and not getattr(model, "_is_stateful", False)
        and "position_ids" in inspect.signature(model.base_model.forward).parameters
    )
