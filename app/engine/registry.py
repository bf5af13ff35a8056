"""The models that run, by endpoint and name: which one a request gets, and how one takes another's place.

Everything here lives on the event loop; only what `build` does happens in a thread of its own.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from app import metrics
from app.engine.batch import BatchItem, BatchLimits
from app.engine.decode import DecodeLimits
from app.engine.errors import Draining, ModelConflict, NoSuchModel, StepFailed, UnfitModel
from app.engine.lane import DRAIN_RETRY_SECONDS
from app.engine.memory import held_bytes
from app.engine.sequence import Sequence
from model.config import TransformerConfig
from model.examples import Examples
from model.inference import Quantization
from model.tokenizer import Tokenizer

log = logging.getLogger("app.engine")

T = TypeVar("T")
Item = TypeVar("Item")


class Desk(Protocol[Item]):
    """Where work is handed to a lane; all methods are called on the event loop."""

    def submit(self, items: list[Item], /) -> None:
        """All or nothing; raises Overloaded, PromptTooLong, Draining."""

    def abort(self, items: list[Item], /) -> None:
        """Give up what has not ended; idempotent."""


class GeneratingLane(Desk[Sequence], Protocol):
    """The decode lane, as routes see it."""

    @property
    def limits(self) -> DecodeLimits: ...


class OneShotLane(Desk[BatchItem], Protocol):
    """The batch lane, as routes see it."""

    @property
    def limits(self) -> BatchLimits: ...


LaneT = TypeVar("LaneT", GeneratingLane, OneShotLane)


@dataclass(eq=False)
class Task(Generic[LaneT]):
    """A loaded model and the lane that runs it.

    `n_cache_bytes` is what its rows' caches take on the device, `quantization` how its weights are held,
    `shortlist` the languages into which it chooses among a shortlist's tokens, `examples` translations it
    may read beside a text; `n_users` counts the requests that chose it and have not ended.
    """

    lane: LaneT
    tokenizer: Tokenizer
    config: TransformerConfig
    name: str
    sha256: str
    folder: Path = Path()
    model: nn.Module | None = None
    n_cache_bytes: int = 0
    quantization: Quantization = "none"
    shortlist: tuple[str, ...] = ()
    examples: Examples | None = None
    n_users: int = field(default=0, init=False)

    @property
    def n_bytes(self) -> int:
        """What it takes on the device, with the weights that it may share with another model."""
        return held_bytes([self.model]) + self.n_cache_bytes


AnyTask = Task[GeneratingLane] | Task[OneShotLane]


def tell_of(endpoint: str, task: AnyTask) -> None:
    """Put a model into the metrics and the log."""
    fields = {
        "endpoint": endpoint,
        "model": task.name,
        "sha256": task.sha256,
        "quantization": task.quantization,
        "shortlist": list(task.shortlist),
    }
    log.info("loaded", extra={"fields": fields})
    metrics.add_model(endpoint, task.name, task.sha256)
    metrics.set_model_bytes(endpoint, task.name, held_bytes([task.model]), task.n_cache_bytes)


class Shelf(Generic[LaneT]):
    """The models of one endpoint in the order they came; the first is the default."""

    def __init__(self, endpoint: str, tasks: Iterable[Task[LaneT]] = ()) -> None:
        self.endpoint = endpoint
        self._tasks: dict[str, Task[LaneT]] = {task.name: task for task in tasks}

    def __iter__(self) -> Iterator[Task[LaneT]]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    @property
    def default(self) -> Task[LaneT] | None:
        return next(iter(self), None)

    def get(self, name: str) -> Task[LaneT] | None:
        return self._tasks.get(name)

    def put(self, task: Task[LaneT]) -> Task[LaneT] | None:
        """From now on its name means this one; returns the one whose place it takes."""
        replaced = self._tasks.get(task.name)
        self._tasks[task.name] = task
        return replaced

    def take(self, name: str) -> Task[LaneT]:
        """Nobody gets it any more. Raises `NoSuchModel`."""
        try:
            return self._tasks.pop(name)
        except KeyError:
            raise NoSuchModel(self.endpoint, name, self.names) from None


class Worker(Protocol):
    """The device thread, as the registry and the service see it."""

    @property
    def fault(self) -> str | None: ...
    def start(self, loop: asyncio.AbstractEventLoop, /) -> None: ...
    def begin_drain(self) -> None: ...
    def stop(self) -> None: ...
    def add(self, lane: Any, /) -> None: ...
    async def remove(self, lane: Any, /) -> None: ...


class Workshop(Protocol):
    """How a model is made ready."""

    def build(self, endpoint: str, name: str, folder: Path, loaded: list[AnyTask], /) -> AnyTask:
        """Beside what is loaded. Blocks, in a thread that is not the device's.

        Raises what is wrong with the folder, or `NoRoom`.
        """

    async def warm_up(self, endpoint: str, task: AnyTask, /) -> None:
        """Send small work through its lane. Raises what its model cannot do."""


class Registry:
    """Loads and unloads while the service runs; what runs is untouched until its successor has proved itself.

    A model that left its shelf goes on for the requests that chose it; with the last of them its lane leaves
    the device thread, and its memory is free.
    """

    def __init__(
        self,
        tasks: Mapping[str, Iterable[Any]],
        worker: Worker,
        workshop: Workshop,
        *,
        max_models: int,
    ) -> None:
        self.translate: Shelf[GeneratingLane] = Shelf("translate", tasks.get("translate", ()))
        self.fill_mask: Shelf[OneShotLane] = Shelf("fill-mask", tasks.get("fill-mask", ()))
        self.generate: Shelf[GeneratingLane] = Shelf("generate", tasks.get("generate", ()))
        self.classify: Shelf[OneShotLane] = Shelf("classify", tasks.get("classify", ()))
        every: tuple[Shelf[Any], ...] = (self.translate, self.fill_mask, self.generate, self.classify)
        self.shelves = {shelf.endpoint: shelf for shelf in every}
        self.worker, self.workshop, self.max_models = worker, workshop, max_models
        self.loading: tuple[str, str] | None = None  # endpoint and name
        self.leaving: list[tuple[str, AnyTask]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def __iter__(self) -> Iterator[tuple[str, AnyTask]]:
        """Every model that may be chosen, with its endpoint."""
        return ((endpoint, task) for endpoint, shelf in self.shelves.items() for task in shelf)

    async def load(self, endpoint: str, name: str, folder: Path) -> AnyTask:
        """Build, warm up, and only then take the place of what had the name.

        Raises `ModelConflict`, `Draining`, `UnfitModel`, and what the workshop raises; what runs goes on in
        any case.
        """
        shelf = self._check_load(endpoint, name)
        self.loading = endpoint, name
        try:
            loaded = [task for _, task in [*self, *self.leaving]]
            task = await in_thread(lambda: self.workshop.build(endpoint, name, folder, loaded))
            loaded.clear()  # the thread's last frame must not keep alive what leaves meanwhile
            await self._prove(endpoint, task)
        except BaseException:
            self._forget_series(endpoint, name)
            raise
        finally:
            self.loading = None
        self._forget_series(endpoint, name)  # under a new name, what warmed it up was no client's work
        tell_of(endpoint, task)
        replaced = shelf.put(task)
        if replaced is not None:
            self._retire(endpoint, replaced)
        return task

    def unload(self, endpoint: str, name: str) -> AnyTask:
        """Nobody gets it any more; who has it goes on. Raises `NoSuchModel`."""
        shelf = self.shelves.get(endpoint)
        if shelf is None:
            raise NoSuchModel(endpoint, name, [])
        task: AnyTask = shelf.take(name)
        self._retire(endpoint, task)
        log.info("unloaded", extra={"fields": {"endpoint": endpoint, "model": name}})
        return task

    def close(self) -> None:
        """Nothing is loaded any more, and nothing waits for what leaves: the worker ends with it."""
        self._closed = True
        for closing in self._closing:
            closing.cancel()

    def _check_load(self, endpoint: str, name: str) -> Shelf[Any]:
        if self._closed:
            raise Draining(DRAIN_RETRY_SECONDS)
        if self.loading is not None:
            where, other = self.loading
            raise ModelConflict(f"{other!r} is being loaded for {where}; one at a time, try again after it")
        shelf: Shelf[Any] = self.shelves[endpoint]
        if shelf.get(name) is None and len(shelf) >= self.max_models:
            raise ModelConflict(
                f"{endpoint} has {len(shelf)} models, the limit is {self.max_models}; unload one first"
            )
        return shelf

    async def _prove(self, endpoint: str, task: AnyTask) -> None:
        self.worker.add(task.lane)
        try:
            await self.workshop.warm_up(endpoint, task)
        except BaseException as error:
            await self.worker.remove(task.lane)
            if isinstance(error, StepFailed | TimeoutError):
                raise UnfitModel(f"{task.folder}: the model's first work failed; see the log") from None
            raise

    def _retire(self, endpoint: str, task: AnyTask) -> None:
        self.leaving.append((endpoint, task))
        closing = asyncio.create_task(self._close(endpoint, task))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _close(self, endpoint: str, task: AnyTask) -> None:
        while task.n_users:  # noqa: ASYNC110 - rare, and a condition would be one more thing to keep true
            await asyncio.sleep(0.02)
        await self.worker.remove(task.lane)
        self.leaving.remove((endpoint, task))
        gc.unfreeze()  # or circles among what the start left frozen would outlive the model
        if self.loading != (endpoint, task.name):
            self._forget_series(endpoint, task.name)

    def _forget_series(self, endpoint: str, name: str) -> None:
        """Unless a model of that name is there, or on its way out."""
        leaving = any((where, task.name) == (endpoint, name) for where, task in self.leaving)
        if not leaving and self.shelves[endpoint].get(name) is None:
            metrics.remove_model(endpoint, name)


async def in_thread(work: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but the end of the process does not wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as failure:
            error = failure
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop has closed: nobody waits any more
            log.warning("a load ended after the service")

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done
