"""Kinds of values that settings have, and their checks."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from sera_core.extensions import is_own
from sera_core.guards.urls import refuse_secrets, without_secrets
from sera_core.judges.names import refuse_unknown_judge, refuse_unknown_rater
from sera_core.method.panel import refuse_unknown


def _or_own(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and is_own(value) else check(value)


OR_OWN = (WrapValidator(_or_own), PlainSerializer(str, return_type=str))
"""Makes a choice of built-in names one of `module:function` too (`sera_core.extensions`)."""
Dtype = Literal["float32", "bfloat16"]
Precision = Literal["float32", "bfloat16", "nf4"]
Loss = Annotated[
    Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "sppo_hard", "simpo", "sft"], *OR_OWN
]
Reference = Literal["initial", "previous"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
AUTO = "auto"
"""`sampling.prompts`: as many as the round's share needs. `sampling.engine`: the one for this machine."""


NO_SFT, CHOSEN = "none", "chosen"
"""`start.sft`: no supervised fine-tuning; or on the chosen answers of the train pairs."""
CONSISTENCY = "consistency"
"""`train.label_smoothing`: as far as two reviewers disagree about the generated pairs."""


def number_or_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f'give a whole number above 0, or "{AUTO}"') from None


Size = Annotated[Positive | Literal["auto"], WrapValidator(number_or_auto)]


def share_or_consistency(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(f'give a number in [0, 0.5), or "{CONSISTENCY}"') from None


def no_single_fold(folds: int) -> int:
    if folds == 1 or folds < 0:
        raise ValueError("give 0 (off), or 2 or more folds: a single fold leaves no pair to train on")
    return folds


def _checked_url(given: str, info: ValidationInfo) -> str:
    """A source without credentials. A record of an older version may hold some; they are removed."""
    return without_secrets(given) if (info.context or {}).get("stored") else refuse_secrets(given)


def _known_feature(name: str, info: ValidationInfo) -> str:
    if not (info.context or {}).get("stored"):
        refuse_unknown(name)
    return name


def known_rater(name: str, info: ValidationInfo) -> str:
    if (info.context or {}).get("stored"):
        return without_secrets(name)
    refuse_unknown_rater(refuse_secrets(name))
    return name


def known_judge(name: str, info: ValidationInfo) -> str:
    if (info.context or {}).get("stored"):
        return without_secrets(name)
    refuse_unknown_judge(refuse_secrets(name))
    return name


SourceName = Annotated[str, AfterValidator(_checked_url)]
"""A path, URL or id. It is recorded and shown, so it must hold no credentials."""
FeatureName = Annotated[str, AfterValidator(_known_feature)]
"""A built-in feature, or `module:function`."""


class Part(BaseModel):
    """A section of the configuration: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )
