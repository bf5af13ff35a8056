"""What routes share: the services, admission to a lane, waiting for work while the client is there."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Protocol, TypeVar

from fastapi import Depends, Request
from starlette.types import Receive

from app.engine.batch import BatchItem, BatchLimits
from app.engine.decode import DecodeLimits
from app.engine.errors import Draining
from app.engine.lane import DRAIN_RETRY_SECONDS
from app.engine.sequence import Sequence
from app.errors import ClientGone, NotLoaded, NotReady, TimedOut
from app.lifecycle import Lifecycle
from app.middleware import RequestRecord
from app.settings import Settings
from model.config import TransformerConfig
from model.tokenizer import Tokenizer

T = TypeVar("T")
Item = TypeVar("Item")


class Lane(Protocol[Item]):
    """Where work is handed to the engine; all methods are called on the event loop."""

    def submit(self, items: list[Item], /) -> None:
        """All or nothing; raises Overloaded, PromptTooLong, Draining."""

    def abort(self, items: list[Item], /) -> None:
        """Give up what has not ended; idempotent."""


class GeneratingLane(Lane[Sequence], Protocol):
    """The decode lane, as routes see it."""

    @property
    def limits(self) -> DecodeLimits: ...


class OneShotLane(Lane[BatchItem], Protocol):
    """The batch lane, as routes see it."""

    @property
    def limits(self) -> BatchLimits: ...


LaneT = TypeVar("LaneT", GeneratingLane, OneShotLane)


@dataclass(frozen=True)
class Task(Generic[LaneT]):
    """A loaded model and the lane that runs it."""

    lane: LaneT
    tokenizer: Tokenizer
    config: TransformerConfig
    name: str
    sha256: str


class Worker(Protocol):
    """The device thread, as the service sees it."""

    @property
    def alive(self) -> bool: ...
    def start(self, loop: asyncio.AbstractEventLoop, /) -> None: ...
    def begin_drain(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Services:
    """Everything that routes work with."""

    translate: Task[GeneratingLane] | None
    fill_mask: Task[OneShotLane] | None
    generate: Task[GeneratingLane] | None
    worker: Worker
    settings: Settings
    lifecycle: Lifecycle
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def tasks(self) -> dict[str, Task[GeneratingLane] | Task[OneShotLane]]:
        """The loaded models by the name of their task."""
        named = {"translate": self.translate, "fill-mask": self.fill_mask, "generate": self.generate}
        return {name: task for name, task in named.items() if task is not None}

    def loaded(self, task: Task[LaneT] | None, name: str) -> Task[LaneT]:
        """The task, if this server runs it; raises NotLoaded."""
        if task is None:
            others = ", ".join(self.tasks) or "none"
            raise NotLoaded(f"the {name} model is not loaded; loaded models: {others}")
        return task


def get_services(request: Request) -> Services:
    """Raises NotReady while the models are being loaded."""
    services: Services | None = request.app.state.services
    if services is None:
        raise NotReady("the models are being loaded; /ready tells when they are")
    return services


def get_record(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


ServicesDep = Annotated[Services, Depends(get_services)]
RecordDep = Annotated[RequestRecord, Depends(get_record)]


@asynccontextmanager
async def admitted(services: Services, lane: Lane[Item], items: list[Item]) -> AsyncIterator[None]:
    """Submit on enter, abort on exit. Enter it in a `yield` dependency: its exit runs in every case."""
    if services.lifecycle.draining:
        raise Draining(DRAIN_RETRY_SECONDS)
    lane.submit(items)
    try:
        yield
    finally:
        lane.abort(items)


class Attendance:
    """Waits for work as long as the client is there and the request's time is not over."""

    def __init__(self, receive: Receive, record: RequestRecord, timeout_seconds: float) -> None:
        self._receive = receive
        self._record = record
        self._timeout_seconds = timeout_seconds

    def expired(self) -> TimedOut:
        return TimedOut(f"the request took longer than {self._timeout_seconds:g} seconds")

    @property
    def remaining_seconds(self) -> float:
        return max(self._timeout_seconds - self._record.total_seconds, 0.0)

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work; cancels it and raises ClientGone or TimedOut when that comes first."""
        working = asyncio.create_task(work)
        leaving = asyncio.create_task(self._client_leaves())
        try:
            done, _ = await asyncio.wait(
                (working, leaving), timeout=self.remaining_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if working in done:
                return working.result()
            raise ClientGone("the client left") if leaving in done else self.expired()
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Raises TimedOut when the block outlasts the request's time."""
        try:
            async with asyncio.timeout(self.remaining_seconds):
                yield
        except TimeoutError:
            raise self.expired() from None

    async def _client_leaves(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def get_attendance(request: Request, services: ServicesDep, record: RecordDep) -> Attendance:
    return Attendance(request.receive, record, services.settings.timeout_seconds)


AttendanceDep = Annotated[Attendance, Depends(get_attendance)]


async def gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first failure cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


# Above this many characters tokenising would hold up the event loop for more than a step.
_INLINE_CHARS = 4096


async def prepare(n_chars: int, work: Callable[..., T], *args: Any) -> T:
    """Run text work at once when it is small, else in a thread, so that other requests keep flowing."""
    if n_chars <= _INLINE_CHARS:
        return work(*args)
    return await asyncio.to_thread(work, *args)


class Timed(Protocol):
    """A piece of work in the engine."""

    @property
    def queue_seconds(self) -> float: ...
    @property
    def inference_seconds(self) -> float: ...


def note_times(record: RequestRecord, items: Iterable[Timed]) -> None:
    """The times of a request are those of its slowest item."""
    for item in items:
        record.queue_seconds = max(record.queue_seconds or 0.0, item.queue_seconds)
        record.inference_seconds = max(record.inference_seconds or 0.0, item.inference_seconds)
