"""What a request may say of examples."""

from app.api.bounds import check_range
from app.engine.registry import AnyTask
from app.errors import InvalidRequest, brief

_MAX_WEIGHT = 0.95


def default_example_weight(task: AnyTask) -> float:
    """The most that examples count where a request does not say."""
    return 0.0 if task.examples is None else task.config.example_weight


def example_weight(asked: float | None, task: AnyTask) -> float:
    """The most that examples count. Raises InvalidRequest."""
    if asked is None:
        return default_example_weight(task)
    check_range("examples", asked, 0.0, _MAX_WEIGHT)
    if asked and task.examples is None:
        raise InvalidRequest(f"examples is {brief(asked)}, but the service was started without any")
    return asked
