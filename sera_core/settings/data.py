"""The start policy and the preference pairs."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from sera_core.data.formats import FormatName, Reading
from sera_core.settings.kinds import CHOSEN, NO_SFT, Fraction, Part, Positive, Precision, SourceName


class ModelConfig(Part):
    """The start policy, which is also the initial reference model."""

    source: SourceName
    """Hub id, local folder, fsspec URL, or `package:<distribution>/<file>.gguf`."""
    revision: str | None = None
    """Commit or tag of a hub model. The resolved commit is recorded."""
    chat_template: str | None = None
    """Chat template that replaces the model's own: `chatml`, `deepseek-r1` (for DeepSeek-R1 and its distills,
    whose own templates cut the reasoning out of answers), a Jinja file, or Jinja text."""
    template_kwargs: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it
    """Arguments for the chat template, for example `{enable_thinking = false}` for Qwen3. Prompts and answers
    get the same ones. An argument that the template does not use is refused."""
    dtype: Precision = "float32"
    """Precision of scoring and training, for policy and reference alike. bfloat16 halves the memory and is
    fast on hardware that supports it, but adds about half a nat of rounding noise per response: the margins
    of a policy that has moved little are then meaningless. nf4 keeps the base of an adapter in four bits
    (QLoRA, arXiv 2305.14314): it is trained, scored and sampled through the same rounded base. It needs the
    extra `qlora` and train.method = "lora"."""


class StartConfig(Part):
    """Supervised fine-tuning of the model before round 0 (off by default). Its result is the start policy and
    the initial reference. It trains all weights or an adapter as `train.method` says, with the adapter,
    optimizer, warmup and max_grad_norm of [train]; an adapter is merged afterwards."""

    sft: SourceName = NO_SFT
    """none: the model is the start policy. chosen: fine-tune it on the chosen answers of the train pairs. A
    file, URL or `hub:<id>` (as in `data.train`): on its conversations, rows with `messages`, or `prompt` and
    `completion`. Only the tokens of the assistant's turns are in the loss."""
    sft_split: str = "train"
    """Split of a hub data set; ignored for files."""
    sft_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; empty: 2e-5 for full, 2e-4 for lora (both ours)."""
    sft_epochs: Positive = 1
    """Epochs over the conversations."""
    sft_batch: Positive = 16
    """Conversations per optimizer step."""

    @property
    def tunes(self) -> bool:
        """Whether there is supervised fine-tuning."""
        return self.sft != NO_SFT

    @property
    def file(self) -> str | None:
        """The source of conversations; None without, and for the chosen answers."""
        return None if self.sft in (NO_SFT, CHOSEN) else self.sft


class Source(Part):
    """One source of preference pairs or prompts: a file, a URL or a hub data set."""

    path: SourceName
    """Path or URL of a jsonl, json, csv or parquet file, `bundled:<name>` for a file shipped with the
    package, or `hub:<id>` for a Hugging Face data set."""
    split: str = "train"
    """Split of a hub data set; ignored for files."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of this source's rows to use, a seeded subset (0 to 1]."""


class DataConfig(Part):
    """Where pairs come from and how they are split into train, held-out and test."""

    train: tuple[Source, ...] = Field(min_length=1)
    """Preference pairs. Held-out and test pairs are split off from them unless given separately."""
    heldout: tuple[Source, ...] = ()
    """Held-out pairs, used for decisions, convergence and the alarm. Empty: split off train."""
    test: tuple[Source, ...] = ()
    """Test pairs, reported once at the end and never used for a decision. Put clean labels here."""
    prompts: tuple[Source, ...] = ()
    """Additional prompts without answers to sample from."""
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of prompts held out when `heldout` is empty [0, 1)."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of prompts kept for test when `test` is empty [0, 1)."""
    train_pairs: Positive | None = None
    """Maximum number of train pairs (a seeded subset); empty: all."""
    heldout_pairs: Positive | None = None
    """Maximum number of held-out pairs (a seeded subset); empty: all."""
    format: Literal["auto"] | FormatName = "auto"
    """Format of the rows: preference (TRL's), hh (Anthropic HH-RLHF transcripts), orca (question), alpaca
    (instruction, input), sharegpt (conversations), ultrafeedback (completions with ratings). auto: detected
    for each row from its fields; `sera plan` counts the rows of each format."""
    columns: dict[Literal["prompt", "system", "chosen", "rejected"], str] = {}  # noqa: RUF012 - pydantic copies it
    """Column names in the sources where they differ from ours: `{ prompt = "query" }`. A source without the
    given name is read by our name."""
    completions: Literal["worst", "random"] = "worst"
    """How UltraFeedback's rated completions become a pair: the best is chosen, and the worst or a random
    lower-rated one is rejected. A row in which none is rated lower is dropped (`tied_ratings`)."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """What to do with invalid rows: an empty answer or turn, no user turn, roles out of order, a system
    message that is not first, or conversations that diverge; in the conversations of `start.sft` also no turn
    of an assistant, and what the chat template rejects or exceeds the model's positions. Refuse the file and
    name the rows, or drop and count them."""
    split_seed: int = 0
    """Seed of the split, of subsets, of flipped labels, and of the held-out halves that choose and report the
    best round; independent of the run's seed."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are dropped (`prompt_too_long`)."""
    max_response_tokens: Positive = 1024
    """Longer answers are dropped or cut, see `on_long`."""
    on_long: Literal["drop", "cut"] = "drop"
    """What to do with an answer over the limit: drop the pair (`too_long`) or cut the answer."""
    on_equal: Literal["drop", "refuse"] = "drop"
    """What to do with a pair whose answers have the same text or token ids: drop it (`equal`) or refuse the
    file."""
    on_diverge: Literal["refuse", "split"] = "refuse"
    """What to do when chosen and rejected differ before the last turn: refuse the file, or split the
    conversations at the first difference."""
    on_overlap: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do when a held-out, test or prompt-only source shares prompts with train: refuse, drop them
    from train, or keep them (they are counted; for synthetic data whose prompts are templates). The same for
    conversations of `start.sft` that share prompts with held-out or test pairs."""
    flip_fraction: Fraction = 0.0
    """For experiments only: flip this fraction of the train labels. The ledger reports how many of them were
    dropped."""

    @property
    def reading(self) -> Reading:
        """How to read the sources' rows."""
        return Reading(
            format=self.format,
            columns={str(ours): theirs for ours, theirs in self.columns.items()},
            completions=self.completions,
            seed=self.split_seed,
            on_diverge=self.on_diverge,
            on_bad_row=self.on_bad_row,
        )
