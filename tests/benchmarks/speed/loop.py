"""The whole loop beside a plain hand-written one: TRL's trainer, transformers' generate, a scoring loop.

Same data, model, LoRA, rounds, selection, number of responses and held-out accuracy after each round. Ours
also writes and checks every artifact, measures noise, evidence and features, and decides.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from sera_core.config import SeraConfig
from sera_core.data.rendering import Renderer
from sera_core.models.policies import load_tokenizer
from tests.benchmarks.speed.data import MODEL, PAIRS, Bench, Item
from tests.benchmarks.speed.peers import Stock, arguments

PAIR_COUNT, HELDOUT, PROMPTS, RESPONSES, TOKENS, BATCH = 16, 8, 8, 4, 32, 4
FRACTION, SHARE = 0.7, 0.25


def loop(bench: Bench, small: bool) -> dict[str, Any]:
    """Seconds of both; with `small` on a quarter of the data."""
    scale = 4 if small else 1
    sizes = {"pairs": PAIR_COUNT // scale, "heldout": HELDOUT // scale, "prompts": PROMPTS // scale}
    start = time.perf_counter()
    ours(sizes)
    between = time.perf_counter()
    handwritten(Bench(bench.folder, sizes["pairs"] + sizes["heldout"]), sizes)
    end = time.perf_counter()
    return {
        "ratio_handwritten": round((end - between) / (between - start), 3),
        "seconds": round(between - start, 1),
        "handwritten_seconds": round(end - between, 1),
        **sizes,
    }


def ours(sizes: dict[str, int]) -> None:
    """A run of two rounds, its steps in this process."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests' own modules
    import tinyrun

    config = SeraConfig.model_validate(
        {
            "model": {"source": MODEL},
            "data": {
                "train": [{"path": PAIRS}],
                "heldout_fraction": 0.35,
                "train_pairs": sizes["pairs"],
                "heldout_pairs": sizes["heldout"],
            },
            "select": {"fraction": FRACTION},
            "sampling": {"responses": RESPONSES, "max_tokens": TOKENS, "prompts": sizes["prompts"]},
            "pairing": {"allow_cut": True},
            "mix": {"shares": [SHARE]},
            "train": {"method": "lora", "learning_rate": 2e-5, "batch": BATCH},
            "evaluate": {"prompts": 0},
            "limits": {"rounds": 2},
            "execution": {"child": "never", "checkpoint_steps": 0},
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        assert len(tinyrun.work(config, Path(scratch) / "store").rounds()) == 2


def handwritten(bench: Bench, sizes: dict[str, int]) -> None:
    """Two rounds: train on all pairs, then review, sample, pair, mix and train again."""
    torch.manual_seed(0)
    train, heldout = bench.rows[: sizes["pairs"]], bench.rows[sizes["pairs"] :]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model, tokenizer = get_peft_model(bench.policy("float32"), lora), load_tokenizer(bench.folder)
    reference = bench.policy("float32")
    ref_train, ref_heldout = _scored(reference, _items(train)), _scored(reference, _items(heldout))
    _train(model, tokenizer, train, ref_train)
    _accuracy(_scored(model, _items(heldout)), ref_heldout)
    margins = _margins(_scored(model, _items(train)), ref_train)
    kept = [row for row in np.argsort(-margins)[: int(FRACTION * len(train))] if margins[row] > 0]
    made, ref_made = _generated(model, reference, train[: sizes["prompts"]], Renderer(bench.folder))
    count = min(len(made), round(len(kept) * SHARE / (1 - SHARE)))
    mixture = [train[row] for row in kept] + made[:count]
    values = np.concatenate([ref_train.reshape(-1, 2)[kept], ref_made[:count]])
    _train(model, tokenizer, mixture, values.flatten())
    _accuracy(_scored(model, _items(heldout)), ref_heldout)


@torch.inference_mode()
def _scored(model: Any, items: Sequence[Item], size: int = 8) -> np.ndarray:
    """log π(y|x) from the logits of padded batches."""
    values = []
    for start in range(0, len(items), size):
        rows = [prompt + response for prompt, response in items[start : start + size]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        logps = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for row, (prompt, response) in enumerate(items[start : start + size]):
            at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
            values.append(float(logps[row, at, torch.tensor(response)].double().sum()))
    return np.array(values)


def _items(rows: Sequence[dict[str, Any]]) -> list[Item]:
    return [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]


def _margins(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    ratios = (policy - reference).reshape(-1, 2)
    return ratios[:, 0] - ratios[:, 1]


def _accuracy(policy: np.ndarray, reference: np.ndarray) -> float:
    return float((_margins(policy, reference) > 0).mean())


def _train(model: PeftModel, tokenizer: Any, rows: Sequence[dict[str, Any]], reference: np.ndarray) -> None:
    data = [
        {**row, "ref_chosen_logps": float(chosen), "ref_rejected_logps": float(rejected)}
        for row, (chosen, rejected) in zip(rows, reference.reshape(-1, 2), strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(scratch, per_device_train_batch_size=BATCH)
        Stock(
            model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        ).train()
    if "ref" in model.peft_config:
        model.delete_adapter("ref")  # TRL's copy of the adapter
    model.eval()


def _generated(
    model: PeftModel, reference: Any, rows: Sequence[dict[str, Any]], renderer: Renderer
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Best and worst of each prompt's samples by implicit reward, and their reference values [pair, 2]."""
    pairs, values = [], []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]] * RESPONSES)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=0.8,
                max_new_tokens=TOKENS,
                eos_token_id=list(renderer.stop_ids),
                pad_token_id=renderer.stop_ids[0],
            )
        answers = [_until_stop(line, renderer.stop_ids) for line in out[:, ids.shape[1] :].tolist()]
        items = [(row["prompt_ids"], answer) for answer in answers]
        known = _scored(reference, items)
        rewards = _scored(model, items) - known
        best, worst = int(rewards.argmax()), int(rewards.argmin())
        if rewards[best] > rewards[worst]:
            pairs.append(
                {"prompt_ids": row["prompt_ids"], "chosen_ids": answers[best], "rejected_ids": answers[worst]}
            )
            values.append((known[best], known[worst]))
    return pairs, np.array(values).reshape(-1, 2)


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, id in enumerate(ids) if id in stops), len(ids) - 1)
    return ids[: end + 1]
