"""GET, POST /admin/models, DELETE /admin/models/{endpoint}/{name}: models come and go while others serve."""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from fastapi import APIRouter, Depends
from pydantic import Field
from typing_extensions import TypedDict

from app.api.access import AdminDep, require_admin
from app.api.bounds import Strict, check_text
from app.api.deps import CallDep, Services
from app.engine.errors import Draining
from app.engine.lane import DRAIN_RETRY_SECONDS
from app.engine.registry import AnyTask
from app.errors import ErrorBody, InvalidRequest, Json, brief
from app.settings import check_name
from model.checkpoint import CheckpointError, load_adapter

log = logging.getLogger("app")
router = APIRouter(prefix="/admin/models", dependencies=[Depends(require_admin)])

Endpoint = Literal["translate", "fill-mask", "generate", "classify"]

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (401, 403, 404, 409, 422, 503, 507)
}
_MAX_FOLDER_CHARS = 4096
# A load goes on when its client leaves; something must hold it.
_loads: set[asyncio.Task[AnyTask]] = set()


class LoadRequest(Strict):
    """What to load, and where. A model that has the name already gives way when the new one is ready."""

    endpoint: Endpoint
    name: str = Field(description="how requests choose it", examples=["next"])
    folder: str = Field(
        description="under one of the folders of model_roots; a relative one is looked for in each of them",
        examples=["translate"],
    )


class LoadedModel(TypedDict):
    """status: ready; leaving, while requests that chose it are not over; loading."""

    endpoint: str
    name: str
    status: Literal["ready", "leaving", "loading"]
    folder: str | None
    sha256: str | None
    device_bytes: int
    requests: int


@router.get("", response_model=list[LoadedModel], responses=_ERRORS)
async def list_models(call: CallDep) -> Json:
    """Every model that is loaded, being loaded, or about to leave."""
    registry = call.services.registry
    models = [_describe(endpoint, task, "ready") for endpoint, task in registry]
    models += [_describe(endpoint, task, "leaving") for endpoint, task in registry.leaving]
    if registry.loading is not None:
        endpoint, name = registry.loading
        models.append(
            LoadedModel(
                endpoint=endpoint,
                name=name,
                status="loading",
                folder=None,
                sha256=None,
                device_bytes=0,
                requests=0,
            )
        )
    return Json(models)


@router.post("", response_model=LoadedModel, status_code=201, responses=_ERRORS)
async def load_model(body: LoadRequest, call: CallDep, key: AdminDep) -> Json:
    """Load a model beside the others, or in the place of one. Answers when it serves.

    Until then everything goes on as it was, and where the load fails it stays so. It goes on when the client
    leaves; GET tells how far it is.
    """
    services = call.services
    if services.lifecycle.draining:
        raise Draining(DRAIN_RETRY_SECONDS)
    try:
        check_name(body.name)
    except ValueError as error:
        raise InvalidRequest(f"name: {error}") from None
    roots = [Path(root.strip()) for root in services.settings.model_roots.split(",") if root.strip()]
    log.info("load", extra={"fields": {"key": key.name, **body.model_dump()}})
    try:
        folder = await asyncio.to_thread(find_folder, body.folder, roots)
        task = await _load(services, body, folder)
    except CheckpointError as error:
        raise InvalidRequest(f"folder: {error}") from None
    return Json(_describe(body.endpoint, task, "ready"), status_code=201)


@router.delete("/{endpoint}/{name}", response_model=LoadedModel, responses=_ERRORS)
async def unload_model(endpoint: str, name: str, call: CallDep, key: AdminDep) -> Json:
    """No request gets the model any more; those that have it go on, and with the last its memory is free."""
    if endpoint not in get_args(Endpoint):
        raise InvalidRequest(f"endpoint is {brief(endpoint)!r}, it must be {', '.join(get_args(Endpoint))}")
    log.info("unload", extra={"fields": {"key": key.name, "endpoint": endpoint, "name": brief(name)}})
    task = call.services.registry.unload(endpoint, name)
    return Json(_describe(endpoint, task, "leaving"))


async def _load(services: Services, body: LoadRequest, folder: Path) -> AnyTask:
    loading = asyncio.create_task(services.registry.load(body.endpoint, body.name, folder))
    _loads.add(loading)
    loading.add_done_callback(_forget)
    return await asyncio.shield(loading)


def _forget(loading: asyncio.Task[AnyTask]) -> None:
    _loads.discard(loading)
    if not loading.cancelled() and loading.exception() is not None:
        log.warning("a load failed: %s", loading.exception())


def find_folder(given: str, roots: Iterable[Path]) -> Path:
    """The folder, links followed, that lies under a root; the base of an addition must lie so too.

    Raises InvalidRequest, which tells nothing of what there is elsewhere.
    """
    check_text("folder", given, _MAX_FOLDER_CHARS)
    real = [root.resolve() for root in roots]
    for root in real:
        folder = _resolve(root, given)
        if folder is not None and _is_within(folder, real):
            adapter = load_adapter(folder)
            if adapter is not None and not _is_within((folder / adapter.base).resolve(), real):
                raise InvalidRequest("folder: its base does not lie under one of model_roots")
            return folder
    raise InvalidRequest(f"folder: there is no folder {brief(given)!r} under one of model_roots")


def _resolve(root: Path, given: str) -> Path | None:
    try:
        folder = (root / given).resolve()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
        return None


def _is_within(folder: Path, roots: Iterable[Path]) -> bool:
    return any(folder.is_relative_to(root) for root in roots)


def _describe(endpoint: str, task: AnyTask, status: Literal["ready", "leaving"]) -> LoadedModel:
    return LoadedModel(
        endpoint=endpoint,
        name=task.name,
        status=status,
        folder=str(task.folder),
        sha256=task.sha256,
        device_bytes=task.n_bytes,
        requests=task.n_users,
    )
