"""What can go wrong in the engine. HTTP statuses are given to these in app/errors.py."""

from collections.abc import Iterable

_MAX_NAME_CHARS = 80


class EngineError(Exception):
    """Root of everything that the engine raises on purpose."""


class Overloaded(EngineError):
    """The bounded queue has no room; nothing was taken in."""

    def __init__(self, retry_after_seconds: float, detail: str = "the queue is full") -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{detail}; try again in {retry_after_seconds:.1f} seconds")


class PromptTooLong(EngineError):
    """One item holds more tokens than its model can take; nothing was taken in."""

    def __init__(self, n_tokens: int, limit: int) -> None:
        self.n_tokens = n_tokens
        self.limit = limit
        super().__init__(f"the input has {n_tokens} tokens, the limit is {limit}")


class RequestTooLarge(EngineError):
    """One request holds more than the whole queue may; it would never fit. Nothing was taken in."""

    def __init__(self, n_items: int, n_tokens: int, max_items: int, max_tokens: int) -> None:
        super().__init__(
            f"the request holds {n_items} items (texts or sentences) of {n_tokens} tokens in all, "
            f"the limit is {max_items} items and {max_tokens} tokens"
        )


class Draining(EngineError):
    """The service is shutting down: accepted work goes on, new work is refused."""

    def __init__(self, retry_after_seconds: float) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__("the service is shutting down and takes no new work")


class StepFailed(EngineError):
    """The model step that held this row raised."""

    def __init__(self, message: str = "the model step failed") -> None:
        super().__init__(message)


class Aborted(EngineError):
    """The work was given up before its end, by its own client or at shutdown."""

    def __init__(self, message: str = "the request was aborted") -> None:
        super().__init__(message)


class NoSuchModel(EngineError):
    """A model's name that nothing of an endpoint has."""

    code, parameter = "model_not_found", "model"

    def __init__(self, endpoint: str, name: str, others: Iterable[str]) -> None:
        named = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}..."
        there = ", ".join(map(repr, others))
        super().__init__(
            f"no model {named!r} for {endpoint}; {f'there is {there}' if there else 'there is none'}"
        )


class ModelConflict(EngineError):
    """A load that what is loaded, or being loaded, does not allow."""


class NoRoom(EngineError):
    """A model that does not fit into the memory that is left."""

    def __init__(self, model: str, n_bytes: int, n_free: int, what: str) -> None:
        super().__init__(f"{model} needs {n_bytes} bytes with its caches, {what} {n_free}")


class UnfitModel(EngineError):
    """A model that was loaded, and then could not do its first work."""
