"""Bounds: every value over a limit is refused with its name, its size and the limit; none is clamped."""

import sys
from collections.abc import Callable, Sized
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, model_validator
from typing_extensions import TypeAliasType

from app.errors import InvalidRequest, brief
from app.settings import Settings

# A million elements of the wrong kind, or unknown names, would be a million faults, and the event loop would
# stand still while they are written down. Of a list or a mapping the first fault is enough.
_MAX_NAMES = 100
Texts = TypeAliasType("Texts", Annotated[list[str], FailFast()])


def _first_fault(parameter: str, is_right: Callable[[Any], bool], wanted: str) -> BeforeValidator:
    """FailFast for a mapping, which pydantic has not got."""

    def check(values: Any) -> Any:
        names = values if isinstance(values, dict) else ()
        wrong = next((name for name in names if not is_right(values[name])), None)
        if wrong is not None:
            raise ValueError(f"{parameter}: the value of {brief(wrong)!r} must be {wanted}")
        return values

    return BeforeValidator(check)


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max  # neither NaN nor infinite


GlossaryTerms = Annotated[
    dict[str, str], _first_fault("glossary", lambda value: isinstance(value, str), "a string")
]
LogitBias = Annotated[dict[str, float], _first_fault("logit_bias", _is_number, "a number")]


class Strict(BaseModel):
    """Base of all request schemas: no unknown names, no guessing between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bound_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_NAMES:
            raise ValueError(f"an object has {len(value)} names, the limit is {_MAX_NAMES}")
        return value


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InvalidRequest unless low <= value <= high."""
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value:.15g}, the limit is {low:g} to {high:g}")


def check_count(name: str, value: int, low: int, high: int) -> None:
    """`check_range` for whole numbers, however long."""
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {brief(value)}, the limit is {low} to {high}")


def check_length(name: str, value: Sized, limit: int, unit: str) -> None:
    """Raises InvalidRequest unless value has 1 to limit units."""
    if not 1 <= len(value) <= limit:
        raise InvalidRequest(f"{name} has {len(value)} {unit}, the limit is 1 to {limit}")


def check_text(name: str, text: str, max_chars: int) -> None:
    """Raises InvalidRequest when the text is too long or is no Unicode text."""
    if len(text) > max_chars:
        raise InvalidRequest(f"{name} has {len(text)} characters, the limit is {max_chars}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} has a lone surrogate at character {error.start}") from None


def input_names(inputs: object, name: str = "inputs") -> list[str]:
    """How messages name the inputs: "inputs" alone, or "inputs[0]" and so on."""
    return [f"{name}[{i}]" for i in range(len(inputs))] if isinstance(inputs, list) else [name]


def check_texts(inputs: str | list[str], settings: Settings, name: str = "inputs") -> list[str]:
    """`inputs` as a list of bounded texts."""
    if isinstance(inputs, str):
        check_text(name, inputs, settings.max_text_chars)
        return [inputs]
    check_length(name, inputs, settings.max_texts, "texts")
    for each, text in zip(input_names(inputs, name), inputs, strict=True):
        check_text(each, text, settings.max_text_chars)
    return inputs


def check_probability(name: str, value: float) -> None:
    """Raises InvalidRequest unless 0 < value <= 1."""
    if not 0.0 < value <= 1.0:
        raise InvalidRequest(f"{name} is {value:.15g}, it must be above 0 and at most 1")


def check_temperature(value: float, settings: Settings) -> None:
    """0, or within the limits."""
    if value:
        check_range("temperature", value, settings.min_temperature, settings.max_temperature)


def check_frequency_penalty(name: str, value: float, settings: Settings) -> None:
    """Of the frequency or the presence: as strong in one direction as in the other."""
    limit = settings.max_frequency_penalty
    check_range(name, value, -limit, limit)


def check_penalty(name: str, value: float, settings: Settings) -> None:
    """A repetition penalty: as strong in one direction as in the other."""
    check_range(name, value, 1.0 / settings.max_repetition_penalty, settings.max_repetition_penalty)
