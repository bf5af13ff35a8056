"""GET /health, /ready, /info and /metrics: what machines ask of the service itself."""

from typing import Any, Literal, cast

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from typing_extensions import TypedDict

from app import __version__, metrics
from app.api.deps import CallDep, Services
from app.api.generation import max_new_tokens
from app.dialects import error_response
from app.engine.errors import Draining
from app.engine.lane import DRAIN_RETRY_SECONDS
from app.engine.registry import AnyTask, GeneratingLane, Task
from app.errors import ErrorBody, Json, NotReady
from app.lifecycle import Lifecycle, Phase

router = APIRouter()


class Health(TypedDict):
    """Always ok: what is not answers 503."""

    status: Literal["ok"]


class Ready(TypedDict):
    """The tasks that are loaded."""

    ready: Literal[True]
    tasks: list[str]


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Health, responses={503: {"model": ErrorBody}})
async def health(request: Request) -> Response:
    """The process is alive, its event loop turns and, once it serves, the device thread beats.

    A 503 will not go away by itself: whoever watches may end the process and start another.
    """
    fault = _fault(request.app.state.lifecycle, request.app.state.services)
    if fault is None:
        return Json(Health(status="ok"))
    return Json(ErrorBody(error=fault, error_type="broken"), status_code=503)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=Ready, responses={503: {"model": ErrorBody}})
async def ready(request: Request) -> Response:
    """The models are warm, their loop beats, and new work is welcome."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    services: Services | None = request.app.state.services
    if lifecycle.draining:
        return error_response(Draining(DRAIN_RETRY_SECONDS), request.scope)
    if is_ready(lifecycle, services) and services is not None:
        return Json(Ready(ready=True, tasks=list(services.tasks)))
    is_empty = lifecycle.phase is Phase.SERVING and services is not None and not services.tasks
    reason = _fault(lifecycle, services) or ("no model is loaded" if is_empty else "loading")
    return error_response(NotReady(f"not ready: {reason}"), request.scope)


@router.get("/info")
async def info(call: CallDep) -> Json:
    """What runs here, and its limits: the default model of each task, and all of them by name.

    Behind the path of a model, that model alone.
    """
    services, models = call.services, call.models
    wanted = models.named(None)
    described = {
        endpoint: {
            task.name: _describe(task, endpoint, services)
            for task in services.shelves[endpoint]
            if wanted in (None, task.name)
        }
        for endpoint in models.endpoints(None)
    }
    return Json(
        {
            "version": __version__,
            "device": services.device,
            "dtype": services.dtype,
            "tasks": {endpoint: next(iter(each.values())) for endpoint, each in described.items()},
            "models": described,
            "limits": _limits(services),
        }
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def scrape(request: Request) -> Response:
    """Prometheus' text format."""
    metrics.ready.set(is_ready(request.app.state.lifecycle, request.app.state.services))
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def is_ready(lifecycle: Lifecycle, services: Services | None) -> bool:
    """Serving some model, and the device thread beats."""
    if lifecycle.phase is not Phase.SERVING or services is None:
        return False
    return bool(services.tasks) and services.worker.fault is None


def _fault(lifecycle: Lifecycle, services: Services | None) -> str | None:
    """What is wrong with the device thread; nothing while it warms up, which may take its time."""
    return None if services is None or lifecycle.phase is Phase.LOADING else services.worker.fault


def _describe(task: AnyTask, endpoint: str, services: Services) -> dict[str, Any]:
    limits = task.lane.limits
    names = (
        "max_prompt_tokens",
        "max_new_tokens",
        "n_slots",
        "max_item_tokens",
        "max_queue_items",
        "max_queue_tokens",
    )
    held = {name: getattr(limits, name) for name in names if hasattr(limits, name)}
    if "max_new_tokens" in held:  # what a request may ask for, not what a row has room for
        generating, n_prompt = cast(Task[GeneratingLane], task), 1 if endpoint == "generate" else 0
        held["max_new_tokens"] = max_new_tokens(services.settings, generating, n_prompt)
    return {
        "model": task.name,
        "sha256": task.sha256,
        "config": task.config.to_dict(),
        "languages": sorted(task.tokenizer.languages),
        "mask_token": task.tokenizer.mask_token,
        "labels": task.config.labels,
        "device_bytes": task.n_bytes,
        "quantization": task.quantization,
        "shortlist": list(task.shortlist),
        "examples": len(task.examples or ()),
        "limits": held,
    }


def _limits(services: Services) -> dict[str, Any]:
    settings = services.settings.model_dump()
    return {
        name: settings[name] for name in sorted(settings) if name.startswith(("max_", "min_", "default_"))
    }
