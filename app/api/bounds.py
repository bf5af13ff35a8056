"""Bounds: every value over a limit is refused with its name, its size and the limit; none is clamped."""

from collections.abc import Sized

from pydantic import BaseModel, ConfigDict

from app.errors import InvalidRequest
from app.settings import Settings


class Strict(BaseModel):
    """Base of all request schemas: no unknown names, no guessing between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InvalidRequest unless low <= value <= high."""
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value:g}, the limit is {low:g} to {high:g}")


def check_count(name: str, value: int, low: int, high: int) -> None:
    """`check_range` for whole numbers, however long."""
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}, the limit is {low} to {high}")


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


def input_names(inputs: object) -> list[str]:
    """How messages name the inputs: "inputs" alone, or "inputs[0]" and so on."""
    return [f"inputs[{i}]" for i in range(len(inputs))] if isinstance(inputs, list) else ["inputs"]


def check_texts(inputs: str | list[str], settings: Settings) -> list[str]:
    """`inputs` as a list of bounded texts."""
    if isinstance(inputs, str):
        check_text("inputs", inputs, settings.max_text_chars)
        return [inputs]
    check_length("inputs", inputs, settings.max_texts, "texts")
    for name, text in zip(input_names(inputs), inputs, strict=True):
        check_text(name, text, settings.max_text_chars)
    return inputs


def check_penalty(name: str, value: float, settings: Settings) -> None:
    """A repetition penalty: as strong in one direction as in the other."""
    check_range(name, value, 1.0 / settings.max_repetition_penalty, settings.max_repetition_penalty)
