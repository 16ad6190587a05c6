import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.config import Loss
from sera_core.models import losses

light = settings(max_examples=40, deadline=None, derandomize=True)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# s_w = −8 − (−12) = 4 and s_l = −9 − (−11) = 2, so D = 2; lengths 2 and 4.
LOGPS = (tensor(-8), tensor(-9), tensor(-12), tensor(-11))
TOKENS = (torch.tensor([2]), torch.tensor([4]))


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        # βD = 0.5 · 2 = 1
        (losses.dpo_loss(*LOGPS, beta=0.5), -log_sigmoid(1)),
        (
            losses.cdpo_loss(*LOGPS, beta=0.5, label_smoothing=0.25),
            -0.75 * log_sigmoid(1) - 0.25 * log_sigmoid(-1),
        ),
        # the same with + and divided by 1 − 2 · 0.25
        (
            losses.robust_dpo_loss(*LOGPS, beta=0.5, label_smoothing=0.25),
            (-0.75 * log_sigmoid(1) + 0.25 * log_sigmoid(-1)) / 0.5,
        ),
        # 4/2 − 2/4 = 1.5; 1/(2 · 0.5) = 1; 0.5² = 0.25
        (losses.ipo_loss(*LOGPS, *TOKENS, beta=0.5), 0.25),
        # max(0, 1 − 0.25 · 2) = 0.5; max(0, 1 − 1 · 2) = 0
        (losses.slic_hinge_loss(*LOGPS, beta=0.25), 0.5),
        (losses.slic_hinge_loss(*LOGPS, beta=1.0), 0.0),
        # 0.5 · 1.5 = 0.75
        (losses.sigmoid_norm_loss(*LOGPS, *TOKENS, beta=0.5), -log_sigmoid(0.75)),
        # 2 · (−8/2 − (−9/4)) − 0.5 = −4
        (losses.simpo_loss(*LOGPS[:2], *TOKENS, beta=2.0, target_margin=0.5), -log_sigmoid(-4)),
        # (4 − 1)² + (2 + 1)² = 18
        (losses.sppo_hard_loss(*LOGPS, beta=0.5), 18.0),
        # 8/2
        (losses.sft_loss(LOGPS[0], TOKENS[0]), 4.0),
    ],
)
def test_each_loss_has_the_value_of_its_formula(got, expected):
    assert got.tolist() == pytest.approx([expected])


nats = st.floats(-30, 0)


@light
@given(st.lists(st.tuples(nats, nats, nats, nats), min_size=1, max_size=5), st.floats(0.05, 1))
def test_the_variants_reduce_to_dpo_where_their_extra_term_is_nought(rows, beta):
    logps = tuple(torch.tensor(rows, dtype=torch.float64).T)
    ones = torch.ones(len(rows), dtype=torch.int64)
    dpo = losses.dpo_loss(*logps, beta=beta)
    for other in (
        losses.cdpo_loss(*logps, beta=beta, label_smoothing=0.0),
        losses.robust_dpo_loss(*logps, beta=beta, label_smoothing=0.0),
        losses.sigmoid_norm_loss(*logps, ones, ones, beta=beta),
    ):
        torch.testing.assert_close(other, dpo)


@light
@given(st.floats(-20, 20), st.floats(0.05, 1))
def test_robust_dpo_is_unbiased_for_flipped_labels(d, beta):
    """(1 − ε) L(D) + ε L(−D) is the DPO loss of D, for ε = 0.2."""
    zero = tensor(0.0)
    clean = losses.robust_dpo_loss(tensor(d), zero, zero, zero, beta=beta, label_smoothing=0.2)
    flipped = losses.robust_dpo_loss(tensor(-d), zero, zero, zero, beta=beta, label_smoothing=0.2)
    torch.testing.assert_close(
        0.8 * clean + 0.2 * flipped, losses.dpo_loss(tensor(d), zero, zero, zero, beta=beta)
    )


def test_every_loss_can_be_chosen_and_every_choice_has_its_reference_form():
    """`cdpo` is chosen as the loss sigmoid with label smoothing."""
    assert set(get_args(get_args(Loss)[0])) | {"cdpo"} == set(losses.LOSSES)


def test_labels_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        losses.robust_dpo_loss(*LOGPS, beta=0.5, label_smoothing=0.5)


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """TRL's own DPOTrainer on a tiny policy, another as reference, three pairs of different lengths."""
    from datasets import Dataset
    from tiny import tiny_policy
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    policy, reference = (tiny_policy(folder / str(seed), seed) for seed in (0, 1))
    rows = [
        {"prompt": "Two and two?", "chosen": " Four.", "rejected": " It is five, I would think."},
        {"prompt": "Capital of France?", "chosen": " It is Paris, on the Seine.", "rejected": " Lyon."},
        {"prompt": "Say a word.", "chosen": " Boat.", "rejected": " Lake and boat."},
    ]
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=DPOConfig(
            str(folder / "out"), per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, label_smoothing=0.1, beta=0.1,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )  # fmt: skip


def summed_logps(model, batch):
    """log π(y|x) by the textbook: log-softmax, shift by one, sum over the response."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (token_logps * batch["completion_mask"][:, 1:]).sum(1).chunk(2)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "sppo_hard"])
def test_trls_trainer_computes_the_reference_form(trl_trainer, loss_type):
    batch = next(iter(trl_trainer.get_train_dataloader()))
    trl_trainer.loss_types, trl_trainer.loss_weights = [loss_type], [1.0]
    with torch.no_grad():
        theirs = trl_trainer.compute_loss(trl_trainer.model, dict(batch))
        logps = (*summed_logps(trl_trainer.model, batch), *summed_logps(trl_trainer.ref_model, batch))
    extra = {"label_smoothing": 0.1} if loss_type == "robust" else {}
    if loss_type in ("ipo", "sigmoid_norm"):
        extra = dict(
            zip(("chosen_tokens", "rejected_tokens"), batch["completion_mask"].sum(1).chunk(2), strict=True)
        )
    ours = losses.LOSSES[loss_type](*logps, beta=0.1, **extra)
    assert ours.shape == (3,)
    assert ours.std() > 1e-3  # the pairs differ, so the mean is not trivially right
    assert theirs.item() == pytest.approx(ours.mean().item(), rel=1e-4)
