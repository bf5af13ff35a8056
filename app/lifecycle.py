"""The phase of the service and the requests in flight: what readiness and the drain look at."""

from enum import StrEnum

from fastapi import FastAPI


class Phase(StrEnum):
    """Phases in their order."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Lifecycle:
    """Lives on the event loop; nothing else may change it."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.n_in_flight = 0

    @property
    def draining(self) -> bool:
        return self.phase is Phase.DRAINING


def begin_drain(app: FastAPI) -> None:
    """From now on new work is refused, and accepted work goes on. Idempotent."""
    app.state.lifecycle.phase = Phase.DRAINING
    if app.state.services is not None:
        app.state.services.worker.begin_drain()
