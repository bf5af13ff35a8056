"""What routes share: the services, the request with what it holds, waiting while the client is there."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive

from app.bodies import is_json
from app.engine.errors import Draining, NoSuchModel
from app.engine.lane import DRAIN_RETRY_SECONDS
from app.engine.registry import (
    AnyTask,
    Desk,
    GeneratingLane,
    LaneT,
    OneShotLane,
    Registry,
    Shelf,
    Task,
    Worker,
)
from app.errors import ClientGone, InvalidRequest, NotLoaded, NotReady, TimedOut, brief
from app.lifecycle import Lifecycle
from app.middleware import RequestRecord
from app.settings import Settings
from model.languages import find_language
from model.tokenizer import Tokenizer

T = TypeVar("T")
Item = TypeVar("Item")

# What clients of the OpenAI form send for a model when their URL has named it already.
_PLACEHOLDERS = ("dummy", "tgi")


@dataclass(frozen=True)
class Services:
    """Everything that routes work with."""

    registry: Registry
    settings: Settings
    lifecycle: Lifecycle
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def worker(self) -> Worker:
        return self.registry.worker

    @property
    def shelves(self) -> dict[str, Shelf[Any]]:
        """By endpoint, those with a model on them."""
        return {endpoint: shelf for endpoint, shelf in self.registry.shelves.items() if len(shelf)}

    @property
    def tasks(self) -> dict[str, AnyTask]:
        """The default model of each endpoint that has one."""
        return {endpoint: next(iter(shelf)) for endpoint, shelf in self.shelves.items()}


class Models:
    """The models of one request: named by its body or its path, else the default.

    What it takes stays loaded until the request has ended, whatever takes its place meanwhile.
    """

    def __init__(
        self, services: Services, record: RequestRecord, path_name: str | None, held: ExitStack
    ) -> None:
        self._services, self._record, self._path_name, self._held = services, record, path_name, held

    def translate(
        self, name: str | None, src: str | None = None, tgt: str | None = None
    ) -> Task[GeneratingLane]:
        """Without a name the first that knows the languages; where none does, the default will say so."""
        shelf = self._services.registry.translate
        if self.named(name) is None:
            found = next((task for task in shelf if _translates(task.tokenizer, src, tgt)), None)
            if found is not None:
                return self._hold(found)
        return self._take(shelf, name)

    def fill_mask(self, name: str | None) -> Task[OneShotLane]:
        return self._take(self._services.registry.fill_mask, name)

    def generate(self, name: str | None) -> Task[GeneratingLane]:
        return self._take(self._services.registry.generate, name)

    def classify(self, name: str | None) -> Task[OneShotLane]:
        return self._take(self._services.registry.classify, name)

    def of(self, endpoint: str, name: str | None) -> AnyTask:
        task: AnyTask = self._take(self._services.registry.shelves[endpoint], name)
        return task

    def named(self, name: str | None) -> str | None:
        """The name that counts; raises InvalidRequest where the body and the path have two."""
        if self._path_name is None or name is None or name in _PLACEHOLDERS:
            return self._path_name or name
        if name != self._path_name:
            raise InvalidRequest(f"model is {brief(name)!r}, the path says {brief(self._path_name)!r}")
        return name

    def endpoints(self, name: str | None) -> list[str]:
        """Where the name that counts means a model; every endpoint with a model where there is no name.

        Raises NoSuchModel for a name that means none.
        """
        wanted, shelves = self.named(name), self._services.shelves
        if wanted is None:
            return list(shelves)
        found = [endpoint for endpoint, shelf in shelves.items() if shelf.get(wanted) is not None]
        if not found:
            names = dict.fromkeys(name for shelf in shelves.values() for name in shelf.names)
            raise NoSuchModel("any task", wanted, names)
        return found

    def _take(self, shelf: Shelf[LaneT], name: str | None) -> Task[LaneT]:
        if not len(shelf):
            others = ", ".join(self._services.tasks) or "none"
            raise NotLoaded(f"the {shelf.endpoint} model is not loaded; loaded models: {others}")
        wanted = self.named(name)
        task = shelf.default if wanted is None else shelf.get(wanted)
        if task is None:
            raise NoSuchModel(shelf.endpoint, str(wanted), shelf.names)
        return self._hold(task)

    def _hold(self, task: Task[LaneT]) -> Task[LaneT]:
        task.n_users += 1
        self._held.callback(_let_go, task)
        self._record.model = task.name
        return task


def _let_go(task: AnyTask) -> None:
    task.n_users -= 1


def _translates(tokenizer: Tokenizer, src: str | None, tgt: str | None) -> bool:
    named = ((src, tokenizer.sources), (tgt, tokenizer.targets))
    return all(code is None or find_language(code, known) is not None for code, known in named)


class Attendance:
    """Waits for work as long as the client is there and the request's time is not over.

    One timer and one listener for all that a request waits for: a stream waits for each of its tokens.
    """

    def __init__(self, receive: Receive, record: RequestRecord, timeout_seconds: float) -> None:
        self._receive, self._record, self._timeout_seconds = receive, record, timeout_seconds
        self._over: Exception | None = None  # why nothing is waited for any more
        self._waiting: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work; cancels it and raises ClientGone or TimedOut when that comes first."""
        if self._leaving is None:
            self._begin()
        over = self._over
        if over is not None:
            work.close()
            raise over
        task = self._waiting = asyncio.current_task()
        assert task is not None
        n_cancelled = task.cancelling()
        try:
            return await work
        except asyncio.CancelledError:
            # As in asyncio.timeout: somebody else may have cancelled the task as well.
            if self._over is None or task.cancelling() > n_cancelled + 1:
                raise
            raise self._over from None
        finally:
            self._waiting = None
            if self._over is not None:  # whatever work made of it: a failure of its own, too
                task.uncancel()

    def end(self) -> None:
        """Nothing will be waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._leaving is not None:
            self._leaving.cancel()

    def _begin(self) -> None:
        seconds = max(self._timeout_seconds - self._record.total_seconds, 0.0)
        expired = TimedOut(f"the request took longer than {self._timeout_seconds:g} seconds")
        self._timer = asyncio.get_running_loop().call_later(seconds, self._stop, expired)
        self._leaving = asyncio.create_task(self._client_leaves())

    async def _client_leaves(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._stop(ClientGone("the client left"))

    def _stop(self, reason: Exception) -> None:
        if self._over is None:
            self._over = reason
            if self._waiting is not None:
                self._waiting.cancel()


class Call:
    """One request as a route sees it, and what it holds until its answer is sent."""

    def __init__(self, request: Request, services: Services) -> None:
        state = request.scope["state"]
        self.request, self.services = request, services
        self.record: RequestRecord = state["record"]
        self._held: ExitStack = state["held"]
        self.models = Models(services, self.record, state.get("model"), self._held)

    @cached_property
    def attendance(self) -> Attendance:
        seconds = self.services.settings.timeout_seconds
        attendance = Attendance(self.request.receive, self.record, seconds)
        self._held.callback(attendance.end)
        return attendance

    def submit(self, lane: Desk[Item], items: list[Item]) -> None:
        """Put work into a lane; what is left of it when the request has ended is aborted."""
        if self.services.lifecycle.draining:
            raise Draining(DRAIN_RETRY_SECONDS)
        lane.submit(items)
        self._held.callback(lane.abort, items)


async def get_call(request: Request) -> Call:
    """Raises NotReady while the models are being loaded.

    A coroutine, and the only dependency of most routes: FastAPI calls a plain function in a thread, where
    each hand-over waits for the interpreter lock, and takes its time to resolve what depends on others.
    """
    services: Services | None = request.app.state.services
    if services is None:
        raise NotReady("the models are being loaded; /ready tells when they are")
    return Call(request, services)


CallDep = Annotated[Call, Depends(get_call)]


class BodyRoute(APIRoute):
    """A route of the form `(body, call) -> Response`, with a short way to it.

    What FastAPI resolves for any endpoint takes longer than such a one itself. Only a sound JSON object goes
    the short way: all others, and so all faults in a body, go FastAPI's.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual, field = super().get_route_handler(), self.body_field
        if field is None:
            return usual

        async def handle(request: Request) -> Response:
            call = await get_call(request)
            content = await request.body()
            if not is_json(request.headers.get("content-type", "")):
                return await usual(request)
            try:
                given = json.loads(content)
            except (ValueError, RecursionError):
                return await usual(request)
            body, faults = field.validate(given, {}, loc=("body",))
            if faults or not isinstance(given, dict):
                return await usual(request)
            answer: Response = await self.endpoint(body=body, call=call)
            return answer

        return handle


async def gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first failure cancels the rest and is raised as itself."""
    works = list(work)
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.create_task(each) for each in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        # No TaskGroup: where one of its tasks fails it cancels its parent as well, and leaves that counted.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


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
