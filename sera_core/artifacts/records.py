"""Read and validate records. Each names its format version: older formats are read, newer ones refused."""

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sera_core.artifacts.store import Store, numbered, read_json
from sera_core.errors import StoreError
from sera_core.guards.shown import shown_line

FORMAT = 1
"""Version of every record's layout."""


class StrictModel(BaseModel):
    """A frozen pydantic model that rejects unknown keys and does not convert types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="strings"
    )


AnyModel = TypeVar("AnyModel", bound=StrictModel)


def read_record(store: Store, path: str) -> dict[str, Any] | None:
    """A record as a dictionary, or None when it does not exist.

    Raises:
        StoreError: it is not a record, or a newer sera-flow wrote it.
    """
    data = read_json(store, path)
    return None if data is None else checked(data, f"{store.url}/{path}")


def read_series(store: Store, pattern: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a numbered series without gaps (`runs/demo/round-{:03d}.json`), in order."""
    for number, data in numbered(store, pattern):
        yield number, checked(data, f"{store.url}/{pattern.format(number)}")


def checked(data: Any, where: str) -> dict[str, Any]:
    """The record, after a check that this version knows its format."""
    if not isinstance(data, dict) or type(data.get("format")) is not int or data["format"] < 1:
        raise StoreError(f"{where}: not a sera-flow record; restore it from a copy of the store")
    if data["format"] > FORMAT:
        raise StoreError(
            f"{where}: written by a newer sera-flow (format {data['format']!s:.20}, this version reads up to "
            f"{FORMAT}). Upgrade: pip install --upgrade sera-flow"
        )
    return data


def typed(kind: type[AnyModel], data: Any, where: str) -> AnyModel:
    """Validate a record as an instance of `kind`.

    Raises:
        StoreError: a field is missing, unknown or invalid; the message names the first one.
    """
    try:
        return kind.model_validate(checked(data, where))
    except ValidationError as error:
        raise StoreError(
            f"{where}: invalid {kind.__name__} ({first_wrong(error)}); restore it from a copy of the store"
        ) from error


def first_wrong(error: ValidationError) -> str:
    """The first invalid field and its error, on one line."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{shown_line(f'{field}: {message}' if field else message):.300}"


def read_typed(store: Store, path: str, kind: type[AnyModel]) -> AnyModel | None:
    """Read a record and validate it as `kind`; None when it does not exist.

    Raises:
        StoreError: it is not a valid `kind`.
    """
    data = read_json(store, path)
    return None if data is None else typed(kind, data, f"{store.url}/{path}")
