"""The result of one check of `sera doctor`."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """Result of one check; remedy is None if there is nothing to do."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None
