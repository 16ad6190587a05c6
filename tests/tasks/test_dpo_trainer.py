"""The trainer computes what TRL computes, with less work."""

import math
from typing import Any

import pytest
import torch
from tiny import tiny_policy
from trainable import logps, random_pairs

from sera_core.config import TrainConfig
from sera_core.models.policies import load_policy, load_tokenizer

pytestmark = pytest.mark.slow
BETA = 0.3
MIXED = TrainConfig(losses=("sigmoid", "ipo", "hinge"), loss_weights=(1.0, 0.25, 2.0), beta=BETA)
LOSSES = [
    TrainConfig(losses=("sigmoid",), beta=BETA),
    TrainConfig(losses=("ipo",), beta=BETA),
    TrainConfig(losses=("hinge",), beta=BETA),
    TrainConfig(losses=("robust",), beta=BETA, label_smoothing=0.2),
    TrainConfig(losses=("sigmoid_norm",), beta=BETA),
    TrainConfig(losses=("sppo_hard",), beta=BETA),
    MIXED,
    TrainConfig(losses=("sigmoid",), beta=BETA, ld_alpha=0.3),
    TrainConfig(losses=("robust",), beta=BETA, label_smoothing=0.2, ld_alpha=0.0, pair_weights="wpo"),
    TrainConfig(losses=("sigmoid", "sppo_hard"), beta=BETA, pair_weights="wpo"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def rows(folder: Any) -> list[dict[str, Any]]:
    """Six pairs of different lengths, the reference a policy of its own."""
    reference = load_policy(folder)
    with torch.no_grad():
        for number, parameter in enumerate(reference.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.01 * noise)
    pairs = random_pairs(6, seed=3)
    for number, row in enumerate(pairs):
        row |= {"row": number, "label_smoothing": 0.0}
        for side in ("chosen", "rejected"):
            row[f"ref_{side}_logps"] = logps(reference, row["prompt_ids"], row[f"{side}_ids"])
    return pairs


def settings(folder: Any, tmp_path: Any, **changes: Any) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        precompute_ref_log_probs=True,
        beta=BETA,
        **changes,
    )


def variants(train: TrainConfig) -> dict[str, Any]:
    """TRL's own settings for LD-DPO and WPO."""
    alpha = None if train.ld_alpha == 1 else train.ld_alpha
    return {"ld_alpha": alpha, "use_weighting": train.pair_weights == "wpo"}


def ours(
    folder: Any, tmp_path: Any, rows: Any, train: TrainConfig, micro_batch: int = 2, share: bool = True
) -> Any:
    """(loss, gradients by name, trainer) of one global batch."""
    from datasets import Dataset

    from tasks.engines.dpo_trainer import ReviewedDPOTrainer, trl_losses

    losses, weights = trl_losses(train)
    args = settings(
        folder,
        tmp_path,
        per_device_train_batch_size=len(rows),
        remove_unused_columns=False,
        loss_type=losses,
        loss_weights=weights or None,
        label_smoothing=train.label_smoothing,
        **variants(train),
    )
    model = load_policy(folder)
    trainer = ReviewedDPOTrainer(
        model,
        train,
        args,
        Dataset.from_list(rows),
        load_tokenizer(folder),
        (None, None),
        [],
        micro_batch,
        share,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    loss = trainer.training_step(model, trainer.data_collator(rows))
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, trainer


def stock(folder: Any, tmp_path: Any, rows: Any, train: TrainConfig) -> Any:
    """(loss, gradients by name) of TRL's own trainer on the same batch."""
    from datasets import Dataset
    from trl import DPOTrainer

    class Stock(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _send_telemetry(self) -> None: ...

    args = settings(
        folder,
        tmp_path,
        loss_type=list(train.losses),
        loss_weights=list(train.loss_weights) or None,
        label_smoothing=train.label_smoothing,
        **variants(train),
    )
    model = load_policy(folder)
    trainer = Stock(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(folder)
    )
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    largest = max(gradient.abs().max().item() for gradient in other.values())
    assert set(one) == set(other)
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max().item() <= tolerance * max(1.0, largest), name


@pytest.mark.parametrize("train", LOSSES, ids=lambda train: "+".join(train.losses))
def test_loss_and_gradients_are_those_of_the_stock_trainer(
    folder: Any, tmp_path: Any, rows: Any, train: TrainConfig
) -> None:
    loss, gradients, _ = ours(folder, tmp_path, rows, train)
    stock_loss, stock_gradients = stock(folder, tmp_path, rows, train)
    assert loss == pytest.approx(stock_loss, rel=1e-5)
    assert_same_gradients(gradients, stock_gradients)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_micro_batches_change_neither_loss_nor_gradient(
    folder: Any, tmp_path: Any, rows: Any, micro_batch: int
) -> None:
    """4 + 2 and 5 + 1 pairs are uneven: a mean of micro-batch means would differ."""
    loss, gradients, _ = ours(folder, tmp_path, rows, MIXED, micro_batch=len(rows))
    other_loss, other_gradients, _ = ours(folder, tmp_path, rows, MIXED, micro_batch=micro_batch)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert_same_gradients(gradients, other_gradients)


def test_a_prompt_computed_once_gives_what_a_prompt_for_each_response_gives(
    folder: Any, tmp_path: Any, rows: Any
) -> None:
    loss, gradients, _ = ours(folder, tmp_path, rows, MIXED, share=True)
    other_loss, other_gradients, _ = ours(folder, tmp_path, rows, MIXED, share=False)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert_same_gradients(gradients, other_gradients)


def test_each_response_has_the_log_probability_of_a_plain_forward_pass(
    folder: Any, tmp_path: Any, rows: Any
) -> None:
    _, _, trainer = ours(folder, tmp_path, rows, MIXED, micro_batch=4)
    plain = load_policy(folder)
    pairs = trainer.batch_pairs
    for place, number in enumerate(pairs["row"].tolist()):
        row = rows[number]
        for side in ("chosen", "rejected"):
            expected = logps(plain, row["prompt_ids"], row[f"{side}_ids"])
            assert pairs[side][place].item() == pytest.approx(expected, abs=1e-4)
    assert sorted(pairs["row"].tolist()) == list(range(len(rows)))


def by_pair(rows: Any, folder: Any) -> list[dict[str, float]]:
    """log π, log π_ref and |y| of both responses of each pair."""
    plain = load_policy(folder)
    values = []
    for row in rows:
        pair = {}
        for side in ("chosen", "rejected"):
            pair[side] = logps(plain, row["prompt_ids"], row[f"{side}_ids"])
            pair[f"ref_{side}"] = row[f"ref_{side}_logps"]
            pair[f"{side}_tokens"] = len(row[f"{side}_ids"])
        values.append(pair)
    return values


def minus_log_sigmoid(value: float) -> float:
    return math.log1p(math.exp(-value))


def simpo_by_hand(pair: dict[str, float], target: float) -> float:
    """−log σ(β(avg log π_w − avg log π_l) − target margin)."""
    chosen = pair["chosen"] / pair["chosen_tokens"]
    rejected = pair["rejected"] / pair["rejected_tokens"]
    return minus_log_sigmoid(BETA * (chosen - rejected) - target)


def margin(pair: dict[str, float]) -> float:
    return pair["chosen"] - pair["ref_chosen"] - pair["rejected"] + pair["ref_rejected"]


def test_simpo_is_its_formula_and_needs_no_reference(folder: Any, tmp_path: Any, rows: Any) -> None:
    train = TrainConfig(losses=("simpo",), beta=BETA, target_margin=0.4)
    blank = [{**row, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for row in rows]
    loss, _, trainer = ours(folder, tmp_path, blank, train)
    pairs = by_pair(rows, folder)
    assert loss == pytest.approx(sum(simpo_by_hand(pair, 0.4) for pair in pairs) / len(pairs), rel=1e-5)
    rewards = [BETA * pair["chosen"] / pair["chosen_tokens"] for pair in pairs]
    assert trainer.pair_metrics()["rewards/chosen"] == pytest.approx(sum(rewards) / len(pairs), rel=1e-5)


def test_simpo_may_be_summed_with_a_loss_of_trl(folder: Any, tmp_path: Any, rows: Any) -> None:
    train = TrainConfig(losses=("sigmoid", "simpo"), loss_weights=(1.0, 0.5), beta=BETA, target_margin=0.4)
    loss, gradients, trainer = ours(folder, tmp_path, rows, train)
    pairs = by_pair(rows, folder)
    terms = [minus_log_sigmoid(BETA * margin(pair)) + 0.5 * simpo_by_hand(pair, 0.4) for pair in pairs]
    assert loss == pytest.approx(sum(terms) / len(pairs), rel=1e-5)
    margins = [BETA * margin(pair) for pair in pairs]
    assert trainer.pair_metrics()["rewards/margins"] == pytest.approx(sum(margins) / len(pairs), abs=1e-5)
    _, sigmoid, _ = ours(folder, tmp_path, rows, TrainConfig(losses=("sigmoid",), beta=BETA))
    simpo_train = TrainConfig(losses=("simpo",), beta=BETA, target_margin=0.4)
    _, simpo, _ = ours(folder, tmp_path, rows, simpo_train)
    assert_same_gradients(gradients, {name: sigmoid[name] + 0.5 * simpo[name] for name in sigmoid})


def test_sft_adds_the_likelihood_of_the_chosen_answer_per_token(
    folder: Any, tmp_path: Any, rows: Any
) -> None:
    train = TrainConfig(losses=("sigmoid", "sft"), loss_weights=(1.0, 0.5), beta=BETA)
    loss, gradients, _ = ours(folder, tmp_path, rows, train)
    pairs = by_pair(rows, folder)
    terms = [
        minus_log_sigmoid(BETA * margin(pair)) - 0.5 * pair["chosen"] / pair["chosen_tokens"]
        for pair in pairs
    ]
    assert loss == pytest.approx(sum(terms) / len(pairs), rel=1e-5)
    divided, other, _ = ours(folder, tmp_path, rows, train, micro_batch=4)  # 4 + 2 pairs of unequal length
    assert divided == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(gradients, other)


def test_sft_beside_simpo_needs_no_reference_either(folder: Any, tmp_path: Any, rows: Any) -> None:
    train = TrainConfig(losses=("sft", "simpo"), loss_weights=(0.5, 1.0), beta=BETA, target_margin=0.4)
    blank = [{**row, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for row in rows]
    loss, _, trainer = ours(folder, tmp_path, blank, train)
    pairs = by_pair(rows, folder)
    terms = [simpo_by_hand(pair, 0.4) - 0.5 * pair["chosen"] / pair["chosen_tokens"] for pair in pairs]
    assert not train.needs_reference and loss == pytest.approx(sum(terms) / len(pairs), rel=1e-5)
    rewards = [BETA * pair["chosen"] / pair["chosen_tokens"] for pair in pairs]
    assert trainer.pair_metrics()["rewards/chosen"] == pytest.approx(sum(rewards) / len(pairs), rel=1e-5)


def test_label_smoothing_makes_the_sigmoid_loss_conservative(folder: Any, tmp_path: Any, rows: Any) -> None:
    """−(1−ε) log σ(βD) − ε log σ(−βD); TRL 1.16 would ignore ε here."""
    smoothed = [{**row, "label_smoothing": 0.1 * row["row"]} for row in rows]  # each pair its own, as CREAM
    train = TrainConfig(losses=("sigmoid",), beta=BETA, label_smoothing=0.3)
    loss, _, _ = ours(folder, tmp_path, smoothed, train)
    terms = [
        (1 - 0.1 * number) * minus_log_sigmoid(BETA * margin(pair))
        + 0.1 * number * minus_log_sigmoid(-BETA * margin(pair))
        for number, pair in enumerate(by_pair(rows, folder))
    ]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def wpo_by_hand(row: dict[str, Any], folder: Any) -> float:
    """Product over both answers of exp(mean over tokens of log p − log Σ p²)          WPO, eq. 2."""
    plain, weight = load_policy(folder), 1.0
    for side in ("chosen", "rejected"):
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        with torch.no_grad():
            probabilities = plain(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double().softmax(-1)
        taken = probabilities[range(len(row[f"{side}_ids"])), row[f"{side}_ids"]]
        weight *= (taken.log() - probabilities.square().sum(-1).log()).mean().exp().item()
    return weight


def test_the_losses_of_our_own_are_weighted_as_trls_are(folder: Any, tmp_path: Any, rows: Any) -> None:
    """Hinge (which TRL cannot weigh), smoothed sigmoid and sft, all in one sum; sft reads all tokens."""
    given = [{**row, "label_smoothing": 0.2} for row in rows]
    train = TrainConfig(
        losses=("hinge", "sigmoid", "sft"), beta=BETA, label_smoothing=0.2, ld_alpha=0.5, pair_weights="wpo"
    )
    loss, _, trainer = ours(folder, tmp_path, given, train)
    plain, reference = LengthDesensitised(folder, 0.5), by_pair(rows, folder)
    terms, weights = [], [wpo_by_hand(row, folder) for row in rows]
    for row, pair, weight in zip(rows, reference, weights, strict=True):
        d = plain.margin(row)
        smoothed = 0.8 * minus_log_sigmoid(BETA * d) + 0.2 * minus_log_sigmoid(-BETA * d)
        terms.append(weight * (max(0, 1 - BETA * d) + smoothed - pair["chosen"] / pair["chosen_tokens"]))
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert trainer.pair_metrics()["pair_weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    means = [sum(pair["chosen"] for pair in reference) / len(rows)]
    assert trainer.pair_metrics()["logps/chosen"] == pytest.approx(means[0], rel=1e-5)


class LengthDesensitised:
    """LD-DPO's margin against a reference that was given, by two sums a response."""

    def __init__(self, folder: Any, alpha: float) -> None:
        self.plain, self.alpha = load_policy(folder), alpha

    def margin(self, row: dict[str, Any]) -> float:
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))

        def value(side: str) -> float:
            ids = row[f"{side}_ids"]
            whole, part = (logps(self.plain, row["prompt_ids"], some) for some in (ids, ids[:shared]))
            return part + self.alpha * (whole - part) - row[f"ref_{side}_logps"]

        return value("chosen") - value("rejected")


def test_responses_that_see_each_other_would_be_noticed(folder: Any, tmp_path: Any, rows: Any) -> None:
    from tasks.engines import pair_forward

    _, _, trainer = ours(folder, tmp_path, rows, MIXED)
    right = trainer.batch_pairs["rejected"]
    mask = pair_forward.pair_mask
    try:
        pair_forward.pair_mask = lambda segments: mask(torch.zeros_like(segments))
        _, _, trainer = ours(folder, tmp_path, rows, MIXED)
    finally:
        pair_forward.pair_mask = mask
    assert (trainer.batch_pairs["rejected"] - right).abs().max() > 0.1


def test_a_sliding_window_shorter_than_a_pair_is_not_shared(folder: Any) -> None:
    from tasks.engines.pair_forward import can_share_prompt

    model = load_policy(folder)
    assert can_share_prompt(model, longest=100)
    model.config.sliding_window = 99
    assert not can_share_prompt(model, longest=100)
    assert can_share_prompt(model, longest=99)
    model.config.sliding_window = None
    model.config._attn_implementation = "eager"
    assert not can_share_prompt(model, longest=100)
