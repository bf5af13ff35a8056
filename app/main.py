"""The application: load -> warm up -> start -> serve -> drain -> stop."""

import asyncio
import gc
import logging
import platform
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from app import __version__, languages, metrics
from app.api import (
    admin,
    classify,
    dispatch,
    fill_mask,
    generate,
    libretranslate,
    next_sentence,
    openai,
    pages,
    system,
    tokenize,
    translate,
)
from app.api.deps import Services, gather
from app.api.dispatch import ENDPOINTS
from app.bodies import BodyLimits
from app.cors import Cors
from app.dialects import add_handlers
from app.engine.errors import NoRoom
from app.engine.memory import RowSizing
from app.engine.registry import Registry, tell_of
from app.engine.worker import DeviceWorker
from app.engine.workshop import ModelWorkshop, QuantizationChoice
from app.errors import ErrorBody
from app.guard import DOCS, METRICS, PROBES, GuardMiddleware, Rules
from app.keys import load_keys
from app.lifecycle import Lifecycle, Phase, begin_drain
from app.metrics import LANES
from app.middleware import ModelPathMiddleware, RecordMiddleware
from app.quotas import Quotas
from app.settings import Settings, is_given, named_folders
from model.checkpoint import CheckpointError
from model.examples import Examples, ExamplesError, load_examples
from model.kernels import Kernels, compiled
from model.quantize import is_supported

log = logging.getLogger("app")

_MAX_THREADS = 8

_ABOUT = """Translation, masked words, generation and classification.

Each path that runs models also stands behind `/models/NAME`, which chooses one, as does `model` in the body;
`POST /models/NAME` alone does that model's task.
"""

Load = Callable[[Settings, Lifecycle], Services]


# What the guard may answer on any path, and what the routes that run models may.
_DOOR_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (401, 408, 413, 415, 422, 429, 503)
}
_ERRORS: dict[int | str, dict[str, Any]] = _DOOR_ERRORS | {
    status: {"model": ErrorBody} for status in (403, 404, 500, 504)
}


# The setting that names the models of an endpoint.
_SETTINGS = {
    "translate": "translate_model",
    "fill-mask": "fill_mask_model",
    "generate": "generate_model",
    "classify": "classify_model",
}


# And its rows, where it has some.
_SLOTS = {"translate": "translate_slots", "generate": "generate_slots"}
# So few where nobody said how many, and a big model leaves no room for more.
_FEWEST = {"translate": 32, "generate": 16}


# What one turn may read: of prompts while others generate (about as long as a step of many rows), of prompts
# else, of a batch. Everybody waits for a turn, so it is no more than keeps a device busy.
_CHUNK_TOKENS = {"cpu": 64, "cuda": 512}
_PREFILL_TOKENS = {"cpu": 512, "cuda": 2048}
_BATCH_TOKENS = {"cpu": 512, "cuda": 8192}


# None: as suits the device.
_LAUNCH_AHEAD = {"auto": None, "on": True, "off": False}


class StartError(Exception):
    """Settings that this machine cannot serve; the message names them."""


def load_services(settings: Settings, lifecycle: Lifecycle) -> Services:
    """Load every model that is there and build the engine around them. Raises CheckpointError."""
    # Threads of one step wait for each other at every operation: with all cores taken, the event loop's work
    # on one of them holds up every step.
    torch.set_num_threads(settings.n_threads or max(1, torch.get_num_threads() - 1))
    device, dtype = resolve_device(settings)
    wanted = list(wanted_models(settings))
    with ThreadPoolExecutor(1) as pool:  # a second of a compiler's time, beside a second of Python's
        compiling = pool.submit(wanted_kernels, settings, device)
        languages.load()
        examples = wanted_examples(settings, wanted)
    workshop = ModelWorkshop(
        device,
        dtype,
        n_slots={endpoint: getattr(settings, setting) for endpoint, setting in _SLOTS.items()},
        prefill_tokens=settings.prefill_tokens or _PREFILL_TOKENS[device.type],
        max_batch_tokens=settings.max_batch_tokens or _BATCH_TOKENS[device.type],
        max_queue_items=settings.max_queue_items,
        max_queue_tokens=settings.max_queue_tokens,
        max_wait_seconds=settings.max_wait_seconds,
        max_bytes=settings.max_model_bytes,
        max_context=settings.max_context,
        quantization=resolve_quantization(settings, device, dtype),
        kernels=compiling.result(),
        use_shortlist=settings.use_shortlist,
        examples=examples,
        chunk_tokens=settings.chunk_tokens or _CHUNK_TOKENS[device.type],
        n_prefix_tokens=settings.prefix_tokens,
        launch_ahead=_LAUNCH_AHEAD[settings.launch_ahead],
        sizing=row_sizing(settings, wanted) if device.type == "cuda" else None,
        fewest=fewest_rows(settings),
    )
    tasks: dict[str, list[Any]] = {endpoint: [] for endpoint in LANES}
    for endpoint, name, folder in wanted:
        loaded = [task for each in tasks.values() for task in each]
        tasks[endpoint].append(workshop.build(endpoint, name, folder, loaded))
    lanes = [task.lane for each in tasks.values() for task in each]
    worker = DeviceWorker(lanes, settings.stall_seconds)
    registry = Registry(tasks, worker, workshop, max_models=settings.max_models)
    dtype_name = str(dtype).removeprefix("torch.")
    return Services(registry, settings, lifecycle, device=str(device), dtype=dtype_name)


def fewest_rows(settings: Settings) -> dict[str, int]:
    """The least rows of endpoints whose number was not given; a request's beams must fit."""
    least = {"translate": settings.max_beams}
    return {
        endpoint: max(n, least.get(endpoint, 0))
        for endpoint, n in _FEWEST.items()
        if not is_given(settings, _SLOTS[endpoint])
    }


def row_sizing(settings: Settings, wanted: Iterable[tuple[str, str, Path]]) -> RowSizing:
    """Rows as memory allows for endpoints whose number of rows was not given."""
    free = [endpoint for endpoint, setting in _SLOTS.items() if not is_given(settings, setting)]
    n_sharing = sum(endpoint in _SLOTS for endpoint, _, _ in wanted)
    return RowSizing(frozenset(free), settings.gpu_memory_utilization, settings.max_slots, n_sharing)


def wanted_models(settings: Settings) -> Iterator[tuple[str, str, Path]]:
    """Endpoint, name and folder of every model to load, without default folders that are not there.

    A folder that was asked for must be. Raises StartError where there are more than may be.
    """
    for endpoint, setting in _SETTINGS.items():
        pairs = named_folders(getattr(settings, setting))
        if not pairs:
            log.info("%s is empty: its task is off", setting)
        if len(pairs) > settings.max_models:
            raise StartError(f"{setting} names {len(pairs)} models, max_models is {settings.max_models}")
        for name, folder in pairs:
            if is_given(settings, setting) or folder.is_dir():
                yield endpoint, name or folder.resolve().name, folder
            else:
                log.warning("no model at %s: its task is off", folder)


def resolve_device(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """What "auto" means on this machine. Raises StartError where it has no such device."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise StartError("device is cuda, but torch finds no CUDA device here")
    cuda = torch.cuda.is_available() if settings.device == "auto" else settings.device == "cuda"
    dtypes = {
        "auto": torch.bfloat16 if cuda else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    return torch.device("cuda" if cuda else "cpu"), dtypes[settings.dtype]


def wanted_kernels(settings: Settings, device: torch.device) -> Kernels | None:
    """Those for the CPU, where they are wanted and can be compiled."""
    return compiled() if device.type == "cpu" and settings.compile_kernels else None


def wanted_examples(settings: Settings, wanted: Iterable[tuple[str, str, Path]]) -> Examples | None:
    """Those that the settings name, for what reads them; without a default folder that is not there.

    Raises StartError.
    """
    places = [Path(place.strip()) for place in settings.examples.split(",") if place.strip()]
    if not any(endpoint in ("translate", "fill-mask") for endpoint, _, _ in wanted):
        return None
    if not is_given(settings, "examples"):
        places = [place for place in places if place.is_dir()]
    try:
        cache = settings.cache_dir.expanduser()
    except RuntimeError:  # a user without a home
        cache = None
    try:
        return load_examples(places, cache) if places else None
    except ExamplesError as error:
        raise StartError(f"examples: {error}") from None


def resolve_quantization(settings: Settings, device: torch.device, dtype: torch.dtype) -> QuantizationChoice:
    """As asked for, if this device and number format have it. Raises StartError where int8 cannot be had."""
    possible = device.type == "cpu" and dtype == torch.float32 and is_supported()
    if settings.quantization == "int8" and not possible:
        raise StartError("quantization is int8, which needs device cpu, dtype float32 and a torch with int8")
    return settings.quantization if possible else "none"


async def warm_up(services: Services) -> None:
    """Small work through every lane, so that the first client finds it warm."""
    registry = services.registry
    await gather(registry.workshop.warm_up(endpoint, task) for endpoint, task in registry)


def announce(services: Services) -> None:
    """Put what runs here into the metrics."""
    metrics.build_info.labels(
        __version__, platform.python_version(), torch.__version__, services.device, services.dtype
    ).set(1)
    for endpoint, task in services.registry:
        tell_of(endpoint, task)
    if services.device == "cuda":
        metrics.device_memory_bytes.labels("allocated").set_function(torch.cuda.memory_allocated)
        metrics.device_memory_bytes.labels("reserved").set_function(torch.cuda.memory_reserved)


async def open_services(app: FastAPI) -> None:
    """Load the models, start their thread, warm it up; then the service is ready."""
    settings, lifecycle = app.state.settings, app.state.lifecycle
    services: Services = await asyncio.to_thread(app.state.load, settings, lifecycle)
    app.state.services = services
    services.worker.start(asyncio.get_running_loop())
    await warm_up(services)
    metrics.forget_warm_up()
    announce(services)
    if app.state.listen_early:  # a process of its own
        # Else the collector looks through all that was loaded, every second or two under load, and nobody is
        # answered for a tenth of a second.
        gc.collect()
        gc.freeze()
    lifecycle.phase = Phase.SERVING
    log.info("ready", extra={"fields": {"tasks": list(services.tasks), "device": services.device}})


async def close_services(services: Services) -> None:
    """End the device thread; the models' series end with them."""
    services.registry.close()
    await asyncio.to_thread(services.worker.stop)
    for endpoint, task in services.registry:
        metrics.remove_model(endpoint, task.name)


async def open_or_fail(app: FastAPI) -> None:
    """`open_services`; what goes wrong is logged and kept for the server, which ends with it."""
    try:
        await open_services(app)
    except Exception as error:
        # A broken checkpoint explains itself in one line; anything else wants its traceback.
        explained = isinstance(error, CheckpointError | StartError | NoRoom)
        log.critical("cannot start: %s", error, exc_info=not explained)
        app.state.failure = error


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load -> warm up -> serve -> drain -> stop; with `listen_early` the port is open while loading."""
    # Text work and model loads; asyncio's own pool may have 32 threads, each with memory of its own.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MAX_THREADS, "work"))
    opening = asyncio.create_task(open_or_fail(app))
    try:
        if not app.state.listen_early:
            await opening
            if app.state.failure is not None:
                raise app.state.failure
        yield
        begin_drain(app)
    finally:
        opening.cancel()
        if app.state.services is not None:
            await close_services(app.state.services)


def make_rules(settings: Settings) -> Rules:
    """What the door goes by. Raises KeyFileError."""
    keys = load_keys(settings.api_keys_file, settings.api_keys)
    return Rules(
        keys=keys,
        quotas=Quotas(keys, settings.key_requests, settings.key_characters),
        open_paths=PROBES
        | (METRICS if settings.open_metrics else frozenset())
        | (DOCS if settings.open_docs else frozenset()),
        body=BodyLimits(
            settings.max_body_bytes,
            settings.max_json_depth,
            settings.max_json_items,
            settings.receive_seconds,
        ),
        dialect_of=dispatch.dialect_of,
    )


def create_app(
    settings: Settings | None = None, load: Load = load_services, *, listen_early: bool = False
) -> FastAPI:
    """The application. `load` builds the services when it starts; tests give their own.

    With `listen_early` start-up does not wait for the models: until they are warm, /health answers, /ready
    and the model routes say 503, and a failure to load stands in `app.state.failure`. Raises KeyFileError.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="Transformer",
        description=_ABOUT,
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # app/api/pages.py has them, without resources from elsewhere
        redoc_url=None,
    )
    app.state.settings, app.state.load, app.state.lifecycle = settings, load, Lifecycle()
    app.state.services, app.state.failure, app.state.listen_early = None, None, listen_early
    for module in (translate, fill_mask, generate, next_sentence, classify, tokenize, dispatch):
        app.include_router(module.router, responses=_ERRORS)
    app.include_router(openai.router)
    app.include_router(libretranslate.router)
    app.include_router(system.router, responses=_DOOR_ERRORS)
    app.include_router(pages.router)
    app.include_router(admin.router, responses=_DOOR_ERRORS)
    add_handlers(app)
    rules = make_rules(settings)
    if rules.keys:
        pages.document_keys(app, rules.open_paths)
    app.add_middleware(GuardMiddleware, rules=rules)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)  # around the guard: pages may read why not
    # Added after what they stand around: the record sees every request and every answer.
    app.add_middleware(RecordMiddleware, endpoints=ENDPOINTS, lifecycle=app.state.lifecycle)
    app.add_middleware(ModelPathMiddleware)
    return app
