"""The application: load -> warm up -> start -> serve -> drain -> stop."""

import asyncio
import logging
import platform
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from app import __version__, metrics
from app.api import (
    dispatch,
    fill_mask,
    generate,
    libretranslate,
    next_sentence,
    openai,
    system,
    tokenize,
    translate,
)
from app.api.deps import GeneratingLane, OneShotLane, Services, Task, gather
from app.api.dispatch import ENDPOINTS
from app.bodies import BodyLimits
from app.dialects import add_handlers
from app.engine.batch import BatchItem, BatchLane
from app.engine.decode import make_decode_lane
from app.engine.lane import Lane
from app.engine.sequence import Sequence
from app.engine.worker import DeviceWorker
from app.errors import ErrorBody
from app.guard import DOCS, METRICS, PROBES, GuardMiddleware, Rules
from app.keys import load_keys
from app.lifecycle import Lifecycle, Phase, begin_drain
from app.middleware import RecordMiddleware
from app.quotas import Quotas
from app.settings import Settings, is_given
from model.checkpoint import Checkpoint, CheckpointError, load, load_config
from model.sampling import BeamParams, SamplingParams

log = logging.getLogger("app")

_WARM_UP_SECONDS = 600.0  # a device that does not answer ends the start, not the patience of whoever waits

Load = Callable[[Settings, Lifecycle], Services]


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (401, 403, 404, 408, 413, 422, 429, 500, 503, 504)
}


_ARCHITECTURES = {
    "translate_model": "translator",
    "fill_mask_model": "masked_lm",
    "generate_model": "causal_lm",
}


class StartError(Exception):
    """Settings that this machine cannot serve; the message names them."""


def load_services(settings: Settings, lifecycle: Lifecycle) -> Services:
    """Load every model that is there and build the engine around them. Raises CheckpointError."""
    # Threads of one step wait for each other at every operation: with all cores taken, the event loop's work
    # on one of them holds up every step.
    torch.set_num_threads(settings.n_threads or max(1, torch.get_num_threads() - 1))
    device, dtype = resolve_device(settings)
    queue = {"max_queue_items": settings.max_queue_items, "max_queue_tokens": settings.max_queue_tokens}

    lanes: list[Lane] = []

    def decoding(name: str, checkpoint: Checkpoint | None, n_slots: int) -> Task[GeneratingLane] | None:
        if checkpoint is None:
            return None
        lane = make_decode_lane(
            name, checkpoint, n_slots=n_slots, prefill_tokens=settings.prefill_tokens, **queue
        )
        lanes.append(lane)
        return Task(lane, checkpoint.tokenizer, checkpoint.config, checkpoint.name, checkpoint.sha256)

    def one_shot(name: str, checkpoint: Checkpoint | None) -> Task[OneShotLane] | None:
        if checkpoint is None:
            return None
        lane = BatchLane(name, checkpoint, max_batch_tokens=settings.max_batch_tokens, **queue)
        lanes.append(lane)
        return Task(lane, checkpoint.tokenizer, checkpoint.config, checkpoint.name, checkpoint.sha256)

    def checkpoint(setting: str) -> Checkpoint | None:
        return load_checkpoint(settings, setting, device, dtype)

    found = (
        decoding("translate", checkpoint("translate_model"), settings.translate_slots),
        one_shot("fill-mask", checkpoint("fill_mask_model")),
        decoding("generate", checkpoint("generate_model"), settings.generate_slots),
    )
    dtype_name = str(dtype).removeprefix("torch.")
    return Services(*found, DeviceWorker(lanes), settings, lifecycle, device=str(device), dtype=dtype_name)


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


def load_checkpoint(
    settings: Settings, setting: str, device: torch.device, dtype: torch.dtype
) -> Checkpoint | None:
    """None when the default folder is not there; a folder that was asked for must be."""
    folder: Path = getattr(settings, setting)
    if not folder.is_dir():
        if is_given(settings, setting):
            raise CheckpointError(f"{folder}: no such folder ({setting})")
        log.warning("no model at %s: its task is off", folder)
        return None
    wanted, found = _ARCHITECTURES[setting], load_config(folder).architecture
    if found != wanted:
        raise CheckpointError(f"{folder}: holds a {found}, {setting} takes a {wanted}")
    return load(folder, device=device, dtype=dtype)


async def warm_up(services: Services) -> None:
    """Send a small job through every lane, so that the first client finds it warm."""
    jobs: list[Coroutine[Any, Any, Any]] = []
    if services.translate is not None:
        task = services.translate
        ids = task.tokenizer.source_ids(task.tokenizer.encode("Hello."), next(iter(task.tokenizer.languages)))
        sequence = Sequence(ids, BeamParams(num_beams=1, max_new_tokens=4))
        task.lane.submit([sequence])
        jobs.append(sequence.result())
    if services.generate is not None:
        sequence = Sequence([services.generate.tokenizer.bos_id], SamplingParams(max_new_tokens=4))
        services.generate.lane.submit([sequence])
        jobs.append(sequence.result())
    if services.fill_mask is not None:
        tokenizer = services.fill_mask.tokenizer
        ids = [tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id]
        item = BatchItem(
            token_ids=ids, segment_ids=[0] * 3, task="fill-mask", top_k=1, targets=[None], allowed=[None]
        )
        services.fill_mask.lane.submit([item])
        jobs.append(item.result())
    await gather(jobs)


def announce(services: Services) -> None:
    """Put what runs here into the metrics."""
    metrics.build_info.labels(
        __version__, platform.python_version(), torch.__version__, services.device, services.dtype
    ).set(1)
    for name, task in services.tasks.items():
        metrics.model_info.labels(name, task.name, task.sha256).set(1)
    if services.device == "cuda":
        metrics.device_memory_bytes.labels("allocated").set_function(torch.cuda.memory_allocated)
        metrics.device_memory_bytes.labels("reserved").set_function(torch.cuda.memory_reserved)


async def open_services(app: FastAPI) -> None:
    """Load the models, start their thread, warm it up; then the service is ready."""
    settings, lifecycle = app.state.settings, app.state.lifecycle
    services: Services = await asyncio.to_thread(app.state.load, settings, lifecycle)
    app.state.services = services
    services.worker.start(asyncio.get_running_loop())
    async with asyncio.timeout(_WARM_UP_SECONDS):
        await warm_up(services)
    metrics.forget_warm_up()
    announce(services)
    lifecycle.phase = Phase.SERVING
    log.info("ready", extra={"fields": {"tasks": list(services.tasks), "device": services.device}})


async def open_or_fail(app: FastAPI) -> None:
    """`open_services`; what goes wrong is logged and kept for the server, which ends with it."""
    try:
        await open_services(app)
    except Exception as error:
        # A broken checkpoint explains itself in one line; anything else wants its traceback.
        log.critical("cannot start: %s", error, exc_info=not isinstance(error, (CheckpointError, StartError)))
        app.state.failure = error


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load -> warm up -> serve -> drain -> stop; with `listen_early` the port is open while loading."""
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
            await asyncio.to_thread(app.state.services.worker.stop)


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
    app = FastAPI(title="Transformer", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.settings, app.state.load, app.state.lifecycle = settings, load, Lifecycle()
    app.state.services, app.state.failure, app.state.listen_early = None, None, listen_early
    for module in (translate, fill_mask, generate, next_sentence, tokenize, dispatch):
        app.include_router(module.router, responses=_ERRORS)
    app.include_router(openai.router)
    app.include_router(libretranslate.router)
    app.include_router(system.router)
    add_handlers(app)
    app.add_middleware(GuardMiddleware, rules=make_rules(settings))
    # Added last, so outermost: it sees every request and every answer.
    app.add_middleware(RecordMiddleware, endpoints=ENDPOINTS, lifecycle=app.state.lifecycle)
    return app
