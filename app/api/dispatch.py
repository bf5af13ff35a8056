"""POST /: for clients that post to the bare root, the body tells which route is meant."""

from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from app.api import classify, fill_mask, generate, next_sentence, openai, translate
from app.api.deps import CallDep, Models, Services
from app.api.libretranslate import is_libretranslate
from app.bodies import is_json
from app.dialects import Dialect, speak
from app.errors import NO_OBJECT, InvalidRequest, UnclearTask

router = APIRouter()

# The routes that run models, and the endpoint that stands for each in the metrics.
ENDPOINTS = {
    "/translate": "translate",
    "/fill-mask": "fill-mask",
    "/generate": "generate",
    "/generate_stream": "generate",
    "/next-sentence": "next-sentence",
    "/classify": "classify",
    "/v1/completions": "generate",
}

_PARAMETERS = {
    "/translate": translate.TranslateParameters.model_fields.keys(),
    "/fill-mask": fill_mask.FillMaskParameters.model_fields.keys(),
    "/generate": generate.GenerateParameters.model_fields.keys(),
    "/classify": classify.ClassifyParameters.model_fields.keys(),
}

_BODY = {
    "requestBody": {
        "description": "What /translate, /fill-mask, /generate, /next-sentence, /classify or /v1/completions "
        "take.",
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.post("/", openapi_extra=_BODY, responses={400: {"description": "The body fits no one task."}})
async def dispatch(request: Request, call: CallDep) -> Response:
    """By the task of the model that is named, the one task that is loaded, or the shape of the body."""
    path = choose_path(await _read(request), call.services, call.models)
    call.record.endpoint = ENDPOINTS[path]
    if path == "/v1/completions":
        speak(request.scope, Dialect.OPENAI)
    return await _handler(path)(request)


@cache
def _handler(path: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    routers = (
        translate.router,
        fill_mask.router,
        generate.router,
        next_sentence.router,
        classify.router,
        openai.router,
    )
    routes = (route for router in routers for route in router.routes)
    return next(r.get_route_handler() for r in routes if isinstance(r, APIRoute) and r.path == path)


async def _read(request: Request) -> Any:
    """The body as the routes will read it: JSON where it says so, else bytes, or the query of a form."""
    body = await request.body()
    if not body and "q" in request.query_params:
        return {"q": request.query_params["q"]}
    if not is_json(request.headers.get("content-type", "")):
        return body
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise HTTPException(400) from None


def choose_path(body: Any, services: Services, models: Models) -> str:
    """The path that a body is meant for; raises UnclearTask where it fits none or several."""
    named = body.get("model") if isinstance(body, dict) else None
    loaded = models.endpoints(named if isinstance(named, str) else None)
    if is_libretranslate(body):
        return "/translate"
    if not isinstance(body, dict):
        raise InvalidRequest(NO_OBJECT)
    if "prompt" in body:
        return "/v1/completions"
    if "inputs" not in body:
        raise UnclearTask(f"the body has no inputs, no prompt and no q; {_advice(services)}")
    if _is_pairs(body["inputs"]):
        return "/next-sentence"
    if body.get("stream") is not None:
        return "/generate"
    if len(loaded) == 1:
        return f"/{loaded[0]}"
    fitting = _fitting(body, loaded, services)
    if len(fitting) == 1:
        return fitting[0]
    reading = f"this body could be for {' or '.join(fitting)}" if fitting else "this body fits no model here"
    raise UnclearTask(f"{reading}; {_advice(services)}")


def dialect_of(path: str, fields: Mapping[str, Any]) -> Dialect | None:
    """Whose form a body at /translate or / is in, by its fields; None for the form of Hugging Face."""
    if is_libretranslate(dict(fields)):
        return Dialect.LIBRETRANSLATE
    return Dialect.OPENAI if path == "/" and "prompt" in fields else None


def _fitting(body: dict[str, Any], loaded: list[str], services: Services) -> list[str]:
    """The loaded tasks that know all of the parameters; a mask in the text is fill-mask's alone."""
    parameters = body.get("parameters")
    given = parameters.items() if isinstance(parameters, dict) else ()
    names = {name for name, value in given if value is not None}
    fitting = [f"/{task}" for task in loaded if names <= _PARAMETERS[f"/{task}"]]
    # What others take too is a generation's: clients put a translation's into its generate_parameters.
    if names and "/generate" in fitting:
        fitting = [path for path in fitting if path not in ("/translate", "/classify")]
    if "/fill-mask" not in fitting:
        return fitting
    if any(_has_mask(body["inputs"], task.tokenizer.mask_token) for task in services.registry.fill_mask):
        return ["/fill-mask"]
    return [path for path in fitting if path != "/fill-mask"]


def _has_mask(inputs: Any, mask_token: str) -> bool:
    texts = inputs if isinstance(inputs, list) else [inputs]
    return any(isinstance(text, str) and mask_token in text for text in texts)


def _is_pairs(inputs: Any) -> bool:
    first = inputs[0] if isinstance(inputs, list) and inputs else inputs
    return isinstance(first, dict)


def _advice(services: Services) -> str:
    paths = ", ".join(f"/{name}" for name in services.tasks) or "none, as no model is loaded"
    return f"post to the path of a task: {paths}"
