"""The page at / and the documentation: whole, and without a word from elsewhere."""

import re

import httpx
import pytest

from app.main import create_app
from tests.app.fakes import load_fakes, make_settings
from tests.app.test_keys import LINES

Client = httpx.AsyncClient

# An address of another host; those of XML namespaces are names, nobody asks there.
ELSEWHERE = re.compile(r"""(?:src|href|url)\s*[=(:]\s*["']?(?:https?:)?//""", re.IGNORECASE)


async def test_the_page(client: Client) -> None:
    answer = await client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not ELSEWHERE.search(answer.text)
    assert (await client.head("/")).status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy
    # Every control has a label, and what the script asks for by its id is there.
    ids = re.findall(r'\bid="([\w-]+)"', answer.text)
    labelled = re.findall(r'<label for="([\w-]+)"', answer.text)
    controls = re.findall(r'<(?:input|textarea|select) id="([\w-]+)"', answer.text)
    assert sorted(labelled) == sorted(controls)
    assert set(re.findall(r'\bat\("([\w-]+)"\)', answer.text)) <= set(ids)
    assert len(ids) == len(set(ids))


async def test_the_documentation_is_whole(client: Client) -> None:
    answer = await client.get("/docs")
    assert not ELSEWHERE.search(answer.text)
    for address in re.findall(r'(?:src|href)="([\w/.-]+)"', answer.text):
        asset = await client.get(f"/{address}")
        assert (asset.status_code, len(asset.content) > 100_000) == (200, True)
    assert "url: 'openapi.json'" in answer.text
    assert (await client.get("/redoc")).status_code == 404


async def test_looking_needs_no_key() -> None:
    app = create_app(make_settings(api_keys=LINES), load_fakes)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with Client(transport=transport, base_url="http://test") as client:
            for path in ("/", "/docs", "/docs/swagger-ui.css", "/openapi.json"):
                assert (await client.get(path)).status_code == 200
            assert (await client.get("/info")).status_code == 401
            assert (await client.post("/", json={"inputs": "a"})).status_code == 401


@pytest.mark.parametrize("path", ["/docs/nothing", "/docs/../pages.py", "/web/index.html"])
async def test_nothing_else_is_there(client: Client, path: str) -> None:
    assert (await client.get(path)).status_code == 404
