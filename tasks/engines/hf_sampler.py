"""Sampling with a transformers model and continuous batching.

`model.generate` runs a batch until its slowest row ends, copies the key/value cache at every step, and
computes a prompt again for each of its responses. Here a prompt is computed once, its keys and values are
copied into a *slot* for each response, and the slot of a finished response is given to the next one, so that
the batch stays full. Slots are left-aligned, each with its own mask and positions.

A response draws one uniform number per token from its own counter-based generator and applies the inverse
distribution function, so it does not depend on the other responses in the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from sera_core.config import Precision
from sera_core.errors import InputError
from sera_core.models.shared_policies import shared_policy
from tasks.engines.sampler import Finished, Request, Sampled, Settings, check_requests, no_progress

_GROWTH = 64
"""Columns by which the slots grow: a compromise between wasted memory and copying."""
_NUCLEUS = 1024
"""Number of top tokens considered first for the nucleus; if a row needs more, all are sorted."""
_BLOCK = 256
"""Tokens per block on the first level of the inversion."""


class HFSampler:
    """A policy in transformers, on CPU or an accelerator."""

    def __init__(
        self,
        policy: Path,
        *,
        base: Path | None = None,
        dtype: Precision = "float32",
        device: str = "cpu",
        batch: int = 32,
    ) -> None:
        """Load a policy.

        Args:
            policy: policy or adapter folder.
            base: the adapter's base policy folder.
            dtype: dtype of the computation.
            device: device of the model.
            batch: maximum responses in a batch.
        """
        self.model: PreTrainedModel | None = shared_policy(policy, dtype, device, base)
        self.batch = batch
        self.windows = _windows(self.model)

    def sample(
        self, requests: Sequence[Request], settings: Settings, finished: Finished = no_progress
    ) -> list[Sampled]:
        """See `Sampler.sample`. Longest prompts first, so that the slots rarely grow."""
        if self.model is None:
            raise RuntimeError("the sampler was closed")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        check_requests(requests, settings, positions)
        with torch.inference_mode():
            return _Run(self.model, requests, settings, finished, self.batch, self.windows).run()

    def close(self) -> None:
        """Let go of the model, which `shared_policy` keeps for the next step."""
        self.model = None


def _windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Attention window of each layer type, None without a limit.

    Raises:
        InputError: the model has state other than keys and values, or needs positions from a padding mask.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    stateful = kinds - {"full_attention", "sliding_attention"} or getattr(model, "_is_stateful", False)
    if stateful or config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        raise InputError(
            f"the transformers sampler does not support {config.model_type} models (layers: "
            f'{", ".join(sorted(kinds))}); set sampling.engine = "vllm"'
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


# ------------------------------------------------------------------------------------------------- drawing


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) from a seed, by Philox's raw stream, which no numpy version changes."""
    raw = np.random.Philox(key=seed).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token per row by inversion, and its log-probability under the model itself.

        token = min {i : Σ_{j ≤ i} p_j > u},   p = softmax(logits / temperature), cut to the nucleus

    Args:
        logits: [row, vocabulary], float32.
        uniform: [row], float64 in [0, 1).
        temperature: > 0.
        top_p: the nucleus is the smallest set of most likely tokens with at least this mass.

    Returns:
        tokens [row], and log softmax(logits) at them [row], float64, in nats.
    """
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = shifted.exp() if temperature == 1 else (shifted / temperature).exp_()
    tokens = _invert(weights, uniform) if top_p >= 1 else _invert_nucleus(weights, uniform, top_p)
    total = (weights if temperature == 1 else shifted.exp()).sum(-1, dtype=torch.float64)
    return tokens, shifted.gather(-1, tokens[:, None])[:, 0] - total.log()


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index at which the cumulative sum of a row's weights exceeds `uniform` times their total.

    In two levels, first over blocks, then inside one block, because a sum over the vocabulary is slow.
    """
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1).double()
    running = sums.cumsum(-1)
    target = uniform[:, None] * running[:, -1:]
    block = torch.searchsorted(running, target, right=True)
    target = target - (running - sums).gather(-1, block)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(-1)
    # A block's float32 sum may exceed the float64 one by rounding: then take its last token with weight.
    target = target.clamp_min(0).minimum(torch.nextafter(inner[:, -1:], inner.new_zeros(())))
    return (block * _BLOCK + torch.searchsorted(inner, target, right=True))[:, 0]


def _invert_nucleus(weights: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """As `_invert`, over the nucleus in descending order of weight."""
    mass = top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
    top, order = weights.topk(min(_NUCLEUS, weights.shape[-1]), dim=-1)
    if bool((top.sum(-1, keepdim=True, dtype=torch.float64) < mass).any()):
        top, order = weights.sort(dim=-1, descending=True)
    running = top.double().cumsum(-1)
    last = torch.searchsorted(running, mass).clamp_max(top.shape[-1] - 1)
    place = torch.searchsorted(running, uniform[:, None] * running.gather(-1, last), right=True)
    return order.gather(-1, place)[:, 0]


# --------------------------------------------------------------------------------------------------- slots


@dataclass
class _Prompt:
    """A computed prompt: its keys and values, and the logits of the next token."""

    ids: tuple[int, ...]
    cache: DynamicCache
    logits: Tensor


@dataclass
class _Answer:
    """An unfinished response, and its uniform numbers."""

    index: int
    uniforms: list[float]
    ids: list[int] = field(default_factory=list)
    logps: float = 0.0


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [slot, head, column, dim]; written in place, grown when needed."""

    def __init__(self, slots: _Slots, like: Any) -> None:
        super().__init__()
        self.slots, self.is_initialized = slots, True
        keys, values = _content(like)
        self.key_slots = keys.new_zeros(slots.size, keys.shape[1], 0, keys.shape[-1])
        self.value_slots = values.new_zeros(slots.size, values.shape[1], 0, values.shape[-1])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the shapes are known from the first prompt."""

    def grow(self, columns: int) -> None:
        """Add empty columns."""
        self.key_slots = torch.nn.functional.pad(self.key_slots, (0, 0, 0, columns))
        self.value_slots = torch.nn.functional.pad(self.value_slots, (0, 0, 0, columns))

    def put(self, slot: int, prompt: Any) -> None:
        """Copy a prompt's keys and values into a slot."""
        keys, values = _content(prompt)
        self.key_slots[slot, :, : keys.shape[-2]] = keys[0]
        self.value_slots[slot, :, : values.shape[-2]] = values[0]

    def move(self, movers: Tensor, holes: Tensor, width: int) -> None:
        """Copy slots over others."""
        self.key_slots[holes, :, :width] = self.key_slots[movers, :, :width]
        self.value_slots[holes, :, :width] = self.value_slots[movers, :, :width]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write each row's newest column, [row, head, 1, dim], at the row's own position."""
        rows, positions, width = self.slots.rows, self.slots.positions, self.slots.width
        self.key_slots[rows, :, positions] = key_states[:, :, 0]
        self.value_slots[rows, :, positions] = value_states[:, :, 0]
        return self.key_slots[: len(rows), :, :width], self.value_slots[: len(rows), :, :width]

    def get_seq_length(self) -> int:
        """Columns before the newest."""
        return self.slots.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns, including the newest, and their offset."""
        return self.slots.width, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def _content(layer: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise InputError(
            f"the transformers sampler does not support the cache layer {type(layer).__name__}; "
            'set sampling.engine = "vllm"'
        )
    return layer.keys, layer.values


class _Slots:
    """The running batch: slot i has the response `answers[i]`; used slots come first, without gaps."""

    def __init__(
        self, size: int, prompt: _Prompt, windows: dict[str, int | None], dtype: torch.dtype
    ) -> None:
        self.size, self.windows, self.device = size, windows, prompt.logits.device
        self.answers: list[_Answer] = []
        self.lengths: list[int] = []
        """Columns filled, by slot."""
        self.layers = [_SlotLayer(self, layer) for layer in prompt.cache.layers]
        self.cache = Cache(layers=list(self.layers))
        self.unseen = torch.finfo(dtype).min
        self.masks = {kind: torch.zeros(size, 1, 1, 0, dtype=dtype, device=self.device) for kind in windows}
        self.columns = self.width = 0
        self.rows = self.positions = torch.zeros(0, dtype=torch.long, device=self.device)

    @property
    def free(self) -> int:
        """Number of unused slots."""
        return self.size - len(self.answers)

    def start(self, prompt: _Prompt, answer: _Answer) -> None:
        """Give the next free slot to a response."""
        slot, length = len(self.answers), len(prompt.ids)
        self._reserve(length)
        for layer, computed in zip(self.layers, prompt.cache.layers, strict=True):
            layer.put(slot, computed)
        for kind, mask in self.masks.items():
            mask[slot] = self.unseen
            mask[slot, ..., self._first_seen(kind, length - 1) : length] = 0
        self.answers.append(answer)
        self.lengths.append(length)

    def keep(self, alive: list[int]) -> None:
        """Free all slots except these; the last ones move into the gaps."""
        gaps = sorted(set(range(len(alive))) - set(alive))
        movers = [slot for slot in alive if slot >= len(alive)]
        if gaps:
            source, target = (torch.tensor(slots, device=self.device) for slots in (movers, gaps))
            for layer in self.layers:
                layer.move(source, target, self.columns)
            for mask in self.masks.values():
                mask[target] = mask[source]
        for gap, mover in zip(gaps, movers, strict=True):
            self.answers[gap], self.lengths[gap] = self.answers[mover], self.lengths[mover]
        del self.answers[len(alive) :], self.lengths[len(alive) :]

    def advance(self) -> None:
        """Add a column to every used slot, for the next token."""
        self.width = max(self.lengths) + 1
        self._reserve(self.width)
        self.rows = torch.arange(len(self.lengths), device=self.device)
        self.positions = torch.tensor(self.lengths, device=self.device)
        for kind, mask in self.masks.items():
            mask[self.rows, 0, 0, self.positions] = 0
            window = self.windows[kind]
            if window is not None:
                left = self.positions - window
                mask[self.rows[left >= 0], 0, 0, left[left >= 0]] = self.unseen
        self.lengths = [length + 1 for length in self.lengths]

    def mask(self) -> Tensor | dict[str, Tensor]:
        """Additive attention mask [row, 1, 1, column]; a dictionary by layer type if there are several."""
        masks = {kind: mask[: len(self.answers), ..., : self.width] for kind, mask in self.masks.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _first_seen(self, kind: str, position: int) -> int:
        window = self.windows[kind]
        return 0 if window is None else max(0, position + 1 - window)

    def _reserve(self, columns: int) -> None:
        if columns <= self.columns:
            return
        more = -(-columns // _GROWTH) * _GROWTH - self.columns
        for layer in self.layers:
            layer.grow(more)
        self.masks = {
            kind: torch.nn.functional.pad(mask, (0, more), value=self.unseen)
            for kind, mask in self.masks.items()
        }
        self.columns += more


# ---------------------------------------------------------------------------------------------------- loop


class _Run:
    """One call of `sample`."""

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        settings: Settings,
        finished: Finished,
        batch: int,
        windows: dict[str, int | None],
    ) -> None:
        self.model, self.requests, self.settings, self.finished = model, requests, settings, finished
        self.batch, self.windows = min(batch, len(requests)), windows
        self.stop = frozenset(settings.stop_ids)
        prompts = [request.prompt_ids for request in requests]
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i], i)))
        self.results: dict[int, Sampled] = {}
        self.prompt: _Prompt | None = None
        self.slots: _Slots | None = None

    def run(self) -> list[Sampled]:
        """Repeat: fill the slots, draw a token in each, free finished slots, compute the rest."""
        logits: Tensor | None = None
        while len(self.results) < len(self.requests):
            logits = self._fill(logits)
            logits = self._compute() if self._draw(logits) else None
        return [self.results[index] for index in range(len(self.requests))]

    def _fill(self, logits: Tensor | None) -> Tensor:
        """Start waiting responses in free slots; returns logits [row, vocabulary] of all used slots."""
        parts = [] if logits is None else [logits]
        while self.waiting and (self.slots is None or self.slots.free):
            request = self.requests[self.waiting[0]]
            prompt = self._prompt(request.prompt_ids)
            if self.slots is None:
                self.slots = _Slots(self.batch, prompt, self.windows, self.model.dtype)
            numbers = uniforms(request.seed, self.settings.max_tokens).tolist()
            self.slots.start(prompt, _Answer(self.waiting.popleft(), numbers))
            parts.append(prompt.logits)
        return torch.cat(parts)

    def _prompt(self, ids: tuple[int, ...]) -> _Prompt:
        """The computed prompt, shared by all its responses (which are consecutive)."""
        if self.prompt is None or self.prompt.ids != ids:
            cache = DynamicCache()
            tokens = torch.tensor([ids], device=self.model.device)
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self.prompt = _Prompt(ids, cache, output.logits[:, -1].float())
        return self.prompt

    def _draw(self, logits: Tensor) -> bool:
        """Draw a token in every slot and store finished responses; returns whether any continue."""
        assert self.slots is not None
        answers = self.slots.answers
        uniform = torch.tensor(
            [a.uniforms[len(a.ids)] for a in answers], dtype=torch.float64, device=logits.device
        )
        tokens, logps = draw(logits, uniform, self.settings.temperature, self.settings.top_p)
        alive = []
        for slot, (answer, token, logp) in enumerate(
            zip(answers, tokens.tolist(), logps.tolist(), strict=True)
        ):
            answer.ids.append(token)
            answer.logps += logp
            if token in self.stop:
                self.results[answer.index] = Sampled(tuple(answer.ids), answer.logps, "stop")
            elif len(answer.ids) == self.settings.max_tokens:
                self.results[answer.index] = Sampled(tuple(answer.ids), answer.logps, "length")
            else:
                alive.append(slot)
        if len(alive) < len(answers):
            self.slots.keep(alive)
            self.finished(len(self.results))
        return bool(alive)

    def _compute(self) -> Tensor:
        """Logits after the newest token of every used slot."""
        assert self.slots is not None
        slots = self.slots
        tokens = [[answer.ids[-1]] for answer in slots.answers]
        slots.advance()
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.model.device),
            position_ids=slots.positions[:, None],
            attention_mask=slots.mask(),
            past_key_values=slots.cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()
