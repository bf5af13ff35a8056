"""GET / and GET /docs: what people look at. Nothing on these pages comes from elsewhere."""

import base64
import hashlib
import re
from collections.abc import Collection
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, Response

router = APIRouter(include_in_schema=False)

_PAGE = Path(__file__).parent.parent / "web" / "index.html"
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
# The interface's documentation as fastapi-offline packs it; its version, in constraints.txt, seldom changes.
_ASSETS = Path(str(files("fastapi_offline") / "static"))
_CACHED = {"cache-control": "public, max-age=3600"}
_KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


@router.head("/")
@router.get("/")
async def page() -> Response:
    """Try the models by hand."""
    content, headers = _read_page()
    return HTMLResponse(content, headers=headers)


@cache
def _read_page() -> tuple[str, dict[str, str]]:
    """The page, and a policy under which no script but its own runs and no address but this one is asked."""
    text = _PAGE.read_text(encoding="utf-8")
    digests = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(text)]
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {"content-security-policy": policy, "x-content-type-options": "nosniff", **_CACHED}


@router.get("/docs")
async def docs() -> Response:
    """The whole interface, to be read and tried; addresses are relative, for those behind a prefix."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Transformer: the interface",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


@router.get("/docs/swagger-ui-bundle.js")
async def docs_script() -> Response:
    return FileResponse(_ASSETS / "swagger-ui-bundle.js", media_type="text/javascript", headers=_CACHED)


@router.get("/docs/swagger-ui.css")
async def docs_style() -> Response:
    return FileResponse(_ASSETS / "swagger-ui.css", media_type="text/css", headers=_CACHED)


def document_keys(app: FastAPI, open_paths: Collection[str]) -> None:
    """Say in /openapi.json where a key goes, and which paths need none; /docs then asks for it."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        schema = describe()
        schema["components"]["securitySchemes"] = _KEY_SCHEMES
        schema["security"] = [{name: []} for name in _KEY_SCHEMES]
        for path in schema["paths"].keys() & set(open_paths):
            for operation in schema["paths"][path].values():
                operation["security"] = []
        return schema

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI's manual extends it
