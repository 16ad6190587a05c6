"""Training of one round."""

from typing import Annotated, Literal

from pydantic import Field, WrapValidator

from sera_core.settings.kinds import (
    CONSISTENCY,
    Fraction,
    Loss,
    Part,
    Positive,
    Reference,
    share_or_consistency,
)


class TrainConfig(Part):
    """Training of one round, with TRL's DPOTrainer."""

    losses: tuple[Loss, ...] = Field(default=("sigmoid",), min_length=1)
    """sigmoid is DPO, hinge is SLiC-HF, sigmoid_norm is length-normalised DPO, sppo_hard is SPPO with hard
    labels. sft is the negative log-likelihood of the chosen answer per token (RPO), added to another loss if
    the likelihood of chosen answers falls. Several losses are summed. `module:function` is your own."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each loss; empty: 1 each."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse strength of the KL constraint (DICE, TRL)."""
    label_smoothing: Annotated[
        Annotated[float, Field(ge=0, lt=0.5)] | Literal["consistency"], WrapValidator(share_or_consistency)
    ] = 0.0
    """Fraction of wrong labels that cDPO (with sigmoid) and robust assume [0, 0.5). consistency, with
    sigmoid: 1 − C for generated pairs, where C is how far the two newest heads rank responses alike (CREAM);
    0 for human pairs, and in round 1, which has one head."""
    ld_alpha: Fraction = 1.0
    """Weight in the loss of a longer answer's tokens beyond the length of the shorter one (LD-DPO, arXiv
    2409.06411); 1: they count as all others. Margins are reviewed with all tokens."""
    pair_weights: Literal["equal", "wpo"] = "equal"
    """Weight of each pair in the loss. wpo: the larger, the more probable the policy finds both answers (WPO,
    arXiv 2406.11827)."""
    target_margin: Annotated[float, Field(ge=0)] = 0.0
    """SimPO's target margin, subtracted inside the sigmoid (its gamma)."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or one low-rank adapter that all rounds continue."""
    lora_rank: Positive = 16
    """Rank of the adapter."""
    lora_alpha: Positive = 32
    """Alpha of the adapter; its scale is alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, as `q_proj`; empty: all but the output layer."""
    use_rslora: bool = False
    """Scale the adapter by alpha / √rank (rsLoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the size of each weight column beside its direction (DoRA, arXiv 2402.09353)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the moments of all but the embeddings in 8 bits, 2 bytes a weight instead of 8 (arXiv
    2110.02861); it needs the extra `qlora`."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; empty: 5e-7 for full (DICE), 5e-6 for lora (ours)."""
    warmup: Fraction = 0.1
    """Fraction of the steps used for warmup; the rate is constant afterwards."""
    epochs: Positive = 1
    """Epochs over the mixture in one round."""
    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Training tokens of round 0, 1, 2, …; later rounds use the last value. A pair has 2 × prompt + chosen +
    rejected tokens. A round ends with the first optimizer step that reaches its number, and until then passes
    over the mixture again and again, shuffled. 0 or empty: `epochs` decides."""
    batch: Positive = 32
    """Pairs per optimizer step, over all devices."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping norm."""
    start: Literal["previous", "reference"] = "previous"
    """The policy a round starts from: the head, or the initial reference."""
    reference: Reference = "initial"
    """Reference model of the loss."""

    @property
    def smooths_by_consistency(self) -> bool:
        """Whether the labels of generated pairs are smoothed by the heads' disagreement (CREAM)."""
        return self.label_smoothing == CONSISTENCY

    @property
    def ranking_losses(self) -> tuple[str, ...]:
        """The losses that compare two answers: all but `sft`. They decide the implicit reward."""
        return tuple(name for name in self.losses if name != "sft")

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference's log-probabilities."""
        return set(self.ranking_losses) != {"simpo"}
