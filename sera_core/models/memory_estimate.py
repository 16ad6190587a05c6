"""Estimate how much memory a step needs, from the shapes of a model's tensors and its largest batch.

The estimates are upper bounds of what scoring, sampling and training allocate, with their libraries.
"""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sera_core.config import TrainConfig
from sera_core.errors import InputError
from sera_core.models.four_bits import ADAMW_8BIT

LIBRARIES = 700 * 2**20
"""Bytes of torch, transformers and TRL once imported (measured: 0.55 GiB)."""
KEPT = 1.25
"""Values kept for the backward pass, as a share of the inputs and outputs of all matrices (inferred from two
peaks of SmolLM2-135M: 0.7 to 1.2)."""
FLOAT32 = 4
BYTES = {"float32": FLOAT32, "bfloat16": 2, "nf4": 2}
"""Of a value that is computed."""
FOUR_BITS = 0.5 + FLOAT32 / 64
"""Bytes of a weight in nf4, with its share of the scale of 64."""
EIGHT_BITS = 2 * (1 + FLOAT32 / 256)
"""Bytes of the two moments of a weight in 8 bits, with its share of the scales of 256."""
_LAYER = re.compile(r"\.(\d+)\.")
_CACHED = re.compile(r"(k_proj|v_proj|attn_k|attn_v)\.weight$")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, counted in elements."""

    parameters: int
    width: int
    """Inputs and outputs of all matrices but the embeddings, summed: what training keeps of each token."""
    widest: int
    """Inputs and outputs of the widest layer, summed: what scoring holds of each token."""
    cached: int
    """Keys and values of one token."""
    vocabulary: int
    boundaries: int
    """Hidden states between the layers of one token: what training keeps with gradient checkpointing."""

    outside: int
    """Parameters outside the layers: embeddings and the output layer."""

    layer: int = 0
    """Parameters of the largest layer."""

    def weights(self, dtype: str) -> int:
        """Bytes of the weights in memory."""
        if dtype == "nf4":
            return int(FOUR_BITS * (self.parameters - self.outside)) + 2 * self.outside
        return self.parameters * BYTES[dtype]

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all matrices but the embeddings."""
        return self.width * rank


def shape_of(tensors: Mapping[str, Sequence[int]]) -> ModelShape:
    """The shape of a decoder.

    Args:
        tensors: shape of each tensor by its name in safetensors or GGUF.
    """
    matrices = {name: dims for name, dims in tensors.items() if len(dims) == 2}
    layers: dict[str, int] = {}
    inside: dict[str, int] = {}
    cached = 0
    for name, dims in tensors.items():
        if (layer := _LAYER.search(name)) is not None:
            inside[layer.group(1)] = inside.get(layer.group(1), 0) + math.prod(dims)
    for name, dims in matrices.items():
        if (layer := _LAYER.search(name)) is not None:
            layers[layer.group(1)] = layers.get(layer.group(1), 0) + sum(dims)
            cached += min(dims) if _CACHED.search(name) else 0
    if not cached and matrices:  # keys and values in one matrix with the queries: not more than hidden states
        cached = 2 * len(layers) * min(min(dims) for dims in matrices.values())
    count = sum(math.prod(dims) for dims in tensors.values())
    vocabulary = max((max(dims) for name, dims in matrices.items() if not _LAYER.search(name)), default=0)
    hidden = max((min(dims) for name, dims in matrices.items() if not _LAYER.search(name)), default=0)
    widest = max(layers.values(), default=0)
    outside, largest = count - sum(inside.values()), max(inside.values(), default=0)
    kept = len(layers) * hidden
    return ModelShape(count, sum(layers.values()), widest, cached, vocabulary, kept, outside, largest)


def folder_shape(folder: Path) -> ModelShape:
    """The shape of the model in a policy folder, from the headers of its safetensors files.

    Raises:
        InputError: a file is damaged.
    """
    tensors: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= _shapes(file)
        except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: its header cannot be read, so it is damaged or no safetensors file; "
                "copy or download the model again"
            ) from error
    return shape_of(tensors)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Shape of each tensor of a safetensors file."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        if size > file.stat().st_size:
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(opened.read(size))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def scoring_memory(shape: ModelShape, dtype: str, tokens: int, row: int, device: str = "cpu") -> int:
    """Bytes to score a batch.

    Args:
        shape: the model.
        dtype: its dtype.
        tokens: tokens of the largest batch.
        row: tokens of the longest prompt with a response; its mask is square, and a model that changes its
            logits computes all of them at once.
        device: where the model is.
    """
    activations = 2 * tokens * shape.widest * BYTES[dtype]
    return _loaded(shape, dtype, device) + activations + row * row * FLOAT32 + _logits(shape, row)


def sampling_memory(shape: ModelShape, dtype: str, responses: int, row: int, device: str = "cpu") -> int:
    """Bytes to sample a batch, with transformers.

    Args:
        shape: the model.
        dtype: its dtype.
        responses: responses sampled at once.
        row: tokens of the longest prompt and response.
        device: where the model is.
    """
    cache = 2 * responses * row * shape.cached * BYTES[dtype]  # twice: it grows by copying
    prompts = 2 * responses * row * shape.widest * BYTES[dtype]
    return _loaded(shape, dtype, device) + cache + prompts + _logits(shape, responses)


def trained_parameters(train: TrainConfig, shape: ModelShape) -> int:
    """Parameters that a round trains: all, or an adapter's."""
    return shape.parameters if train.method == "full" else shape.adapter(train.lora_rank)


def training_memory(
    shape: ModelShape,
    dtype: str,
    train: TrainConfig,
    tokens: int,
    row: int,
    recompute: bool = False,
    device: str = "cpu",
    shares: int = 1,
) -> int:
    """Bytes to train: weights, gradients and Adam's moments, and the activations of a micro-batch.

    Args:
        shape: the model.
        dtype: its dtype. In bfloat16 training all weights needs a rounded copy of the float32 ones.
        train: what is trained, with which optimizer.
        tokens: tokens of the largest micro-batch.
        row: tokens of its longest pair.
        recompute: whether activations are computed again (`execution.gradient_checkpointing`).
        device: where it is trained.
        shares: processes that share the weights by rows (`execution.shard_weights`); of one of them.
    """
    kept = shape.boundaries + KEPT * shape.widest if recompute else KEPT * shape.width
    activations = int(tokens * kept) * FLOAT32 + row * row * FLOAT32 + _logits(shape, tokens)
    fixed = LIBRARIES + _pages(shape, device)
    if shares > 1:
        part = _states(shape, dtype, train) // shares
        trained = FLOAT32 * trained_parameters(train, shape) // shares
        loading = shape.weights(dtype) + trained
        return fixed + max(loading, part + _gathered(shape, dtype) + activations)
    rounded = shape.weights(dtype) if train.method == "full" and dtype != "float32" else 0
    return fixed + _states(shape, dtype, train) + rounded + activations


def fine_tuning_memory(
    shape: ModelShape,
    dtype: str,
    train: TrainConfig,
    tokens: int,
    row: int,
    recompute: bool = False,
    device: str = "cpu",
) -> int:
    """Bytes of supervised fine-tuning: training, and of an adapter also merging it in float32 (on the CPU).

    Arguments as in `training_memory`.
    """
    training = training_memory(shape, dtype, train, tokens, row, recompute, device)
    if train.method == "full":
        return training
    return max(training, _loaded(shape, "float32", "cpu") + shape.weights(dtype))


def least_training_memory(shape: ModelShape, dtype: str, train: TrainConfig, shares: int = 1) -> int:
    """Bytes that training cannot do without: weights, and of what is trained gradients and moments.

    What is trained is float32, and an adapter's base has the run's dtype.

    Args:
        shape: the model.
        dtype: its dtype.
        train: what is trained, with which optimizer.
        shares: processes that share all this by rows; of one of them, which loads the model whole before.
    """
    states = _states(shape, dtype, train)
    return states if shares == 1 else max(states // shares, shape.weights(dtype))


def _gathered(shape: ModelShape, dtype: str) -> int:
    """Bytes of what a process has whole for a time, of shared weights and their gradients.

    The embeddings and the output layer, the layer that it computes and the one that it fetches.
    """
    return 2 * (shape.outside + 2 * shape.layer) * BYTES[dtype]


def _states(shape: ModelShape, dtype: str, train: TrainConfig) -> int:
    trained, full = trained_parameters(train, shape), train.method == "full"
    in_8_bits = 0
    if train.optimizer == ADAMW_8BIT:
        in_8_bits = trained - shape.outside if full else trained
    moments = 2 * FLOAT32 * (trained - in_8_bits) + int(EIGHT_BITS * in_8_bits)
    return (0 if full else shape.weights(dtype)) + 2 * FLOAT32 * trained + moments


def _loaded(shape: ModelShape, dtype: str, device: str) -> int:
    return LIBRARIES + shape.weights(dtype) + _pages(shape, device)


def _pages(shape: ModelShape, device: str) -> int:
    """Bytes of the file that the weights are read from, which on a CPU stay mapped beside them."""
    return shape.parameters * FLOAT32 if device == "cpu" else 0


def _logits(shape: ModelShape, rows: int) -> int:
    """Logits, their softmax and a copy in float32."""
    return 3 * rows * shape.vocabulary * FLOAT32
