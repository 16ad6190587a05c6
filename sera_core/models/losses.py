"""Reference implementations of the direct-alignment losses: tensors in, one loss per pair out.

Training uses TRL's losses; tests compare them with these.

Notation: s = log π_θ(y|x) − log π_ref(y|x), in nats, summed over the response; D = s_w − s_l; |y| in tokens.
Arguments have the field's names: `policy_chosen_logps` is log π_θ(y_w|x), and so on. Losses are minimised.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def log_ratio_margin(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """D = [log π_θ(y_w|x) − log π_ref(y_w|x)] − [log π_θ(y_l|x) − log π_ref(y_l|x)], in nats."""
    return (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)


def dpo_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """−log σ(βD)          DPO, arXiv 2305.18290, eq. 7."""
    d = log_ratio_margin(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return -F.logsigmoid(beta * d)


def cdpo_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
    beta: float,
    label_smoothing: float | Float[Tensor, " pair"],
) -> Float[Tensor, " pair"]:
    """−(1−ε) log σ(βD) − ε log σ(−βD)          conservative DPO (Mitchell 2023), label noise ε.

    With ε = 1 − C a pair it is CREAM's loss (arXiv 2410.12735), C the consistency of two rankings.
    """
    d = log_ratio_margin(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return -(1 - label_smoothing) * F.logsigmoid(beta * d) - label_smoothing * F.logsigmoid(-beta * d)


def robust_dpo_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, " pair"]:
    """[−(1−ε) log σ(βD) + ε log σ(−βD)] / (1 − 2ε)          robust DPO, arXiv 2403.00409, label noise ε.

    Unbiased for the DPO loss on clean labels; may be negative.

    Raises:
        ValueError: ε is not in [0, 0.5); at 0.5 labels carry no information.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is a share of flipped labels in [0, 0.5), but is {label_smoothing}."
        )
    d = log_ratio_margin(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    clean, flipped = -F.logsigmoid(beta * d), -F.logsigmoid(-beta * d)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
    chosen_tokens: Int[Tensor, " pair"],
    rejected_tokens: Int[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """(s_w/|y_w| − s_l/|y_l| − 1/(2β))²          IPO, arXiv 2310.12036, eq. 17 with τ = β.

    The division by length is TRL's, agreed there with the authors; the paper uses sums.
    """
    s_w = (policy_chosen_logps - reference_chosen_logps) / chosen_tokens
    s_l = (policy_rejected_logps - reference_rejected_logps) / rejected_tokens
    return (s_w - s_l - 1 / (2 * beta)) ** 2


def slic_hinge_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """max(0, 1 − βD)          SLiC-HF's hinge, arXiv 2305.10425, on D as in RSO, arXiv 2309.06657."""
    d = log_ratio_margin(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return torch.relu(1 - beta * d)


def sigmoid_norm_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
    chosen_tokens: Int[Tensor, " pair"],
    rejected_tokens: Int[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """−log σ(β (s_w/|y_w| − s_l/|y_l|))          length-normalised DPO (Tülu 3, arXiv 2411.15124, eq. 6)."""
    s_w = (policy_chosen_logps - reference_chosen_logps) / chosen_tokens
    s_l = (policy_rejected_logps - reference_rejected_logps) / rejected_tokens
    return -F.logsigmoid(beta * (s_w - s_l))


def simpo_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    chosen_tokens: Int[Tensor, " pair"],
    rejected_tokens: Int[Tensor, " pair"],
    beta: float,
    target_margin: float,
) -> Float[Tensor, " pair"]:
    """−log σ(β (log π_θ(y_w|x)/|y_w| − log π_θ(y_l|x)/|y_l|) − target_margin)  SimPO, arXiv 2405.14734 eq. 6

    `target_margin` is the paper's γ; γ in this project is the weight of past rounds. There is no reference.
    """
    chosen, rejected = policy_chosen_logps / chosen_tokens, policy_rejected_logps / rejected_tokens
    return -F.logsigmoid(beta * (chosen - rejected) - target_margin)


def sppo_hard_loss(
    policy_chosen_logps: Float[Tensor, " pair"],
    policy_rejected_logps: Float[Tensor, " pair"],
    reference_chosen_logps: Float[Tensor, " pair"],
    reference_rejected_logps: Float[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """(s_w − 1/(2β))² + (s_l + 1/(2β))²          SPPO, arXiv 2405.00675, eq. 4.7, P = 1 for y_w."""
    s_w = policy_chosen_logps - reference_chosen_logps
    s_l = policy_rejected_logps - reference_rejected_logps
    return (s_w - 1 / (2 * beta)) ** 2 + (s_l + 1 / (2 * beta)) ** 2


def sft_loss(
    policy_chosen_logps: Float[Tensor, " pair"], chosen_tokens: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """−log π_θ(y_w|x) / |y_w|          the likelihood term of RPO, arXiv 2404.19733, eq. 1.

    A mean over pairs, not over the tokens of a batch as TRL's `sft`, so that it does not depend on how a
    batch is divided.
    """
    return -policy_chosen_logps / chosen_tokens


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": dpo_loss,
    "ipo": ipo_loss,
    "hinge": slic_hinge_loss,
    "robust": robust_dpo_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "sppo_hard": sppo_hard_loss,
    "simpo": simpo_loss,
    "cdpo": cdpo_loss,
    "sft": sft_loss,
}
"""By TRL's `loss_type`; `simpo` and `cdpo`, which TRL's DPOTrainer lacks, by their usual names."""
