"""API keys: what is stored, who comes in, where a key may stand, what a key may ask for."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI

from app.__main__ import main
from app.api.access import require_admin
from app.errors import InvalidRequest, RateLimited
from app.keys import Key, KeyFileError, KeyRing, hash_key, key_line, load_keys, make_key
from app.main import create_app
from app.quotas import Quotas, TokenBucket
from app.settings import Settings
from tests.app.fakes import make_settings

Client = httpx.AsyncClient

ORDINARY, ADMIN = make_key(), make_key()
LINES = f"{key_line('shop', ORDINARY)};{key_line('boss', ADMIN, admin=True)}"
BEARER = {"authorization": f"Bearer {ORDINARY}"}


class TestFile:
    def test_keys_are_long_and_never_the_same(self) -> None:
        keys = {make_key() for _ in range(100)}
        assert len(keys) == 100
        assert min(map(len, keys)) >= 43  # 256 bits in base 64

    def test_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        hashes = [hash_key(str(i)) for i in range(3)]
        file.write_text(f"# clients\n\nweb {hashes[0]}\n ops {hashes[1]} admin requests=5 characters=0\n")
        keys = {key.name: key for key in load_keys(file, f"ci {hashes[2]};")}
        assert [*keys] == ["web", "ops", "ci"]
        assert keys["ops"] == Key("ops", bytes.fromhex(hashes[1]), admin=True, requests=5, characters=0)
        assert (keys["web"].admin, keys["web"].requests) == (False, None)

    def test_the_key_itself_is_not_in_its_line(self) -> None:
        assert ORDINARY not in key_line("a", ORDINARY)
        (key,) = load_keys(None, key_line("a", ORDINARY))
        assert "digest" not in repr(key)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "there is no key in it"),
            ("# only\n", "there is no key in it"),
            ("web", "line 1: not of the form"),
            (f"web {'A' * 64}", "line 1: not of the form"),
            (f"we/b {'a' * 64}", "line 1: not of the form"),
            (f"web {'a' * 64} root", "line 1: 'root' is none of"),
            (f"web {'a' * 64} requests=-1", "'requests=-1' is none of"),
            (f"web {'a' * 64}\nweb {'b' * 64}", "the same name"),
            (f"web {'a' * 64}\nother {'a' * 64}", "the same hash"),
        ],
    )
    def test_faults(self, text: str, message: str) -> None:
        with pytest.raises(KeyFileError, match=message):
            load_keys(None, text)

    def test_a_fault_does_not_quote_a_key_that_was_written_in_plain(self) -> None:
        with pytest.raises(KeyFileError) as raised:
            load_keys(None, f"web {ORDINARY}")
        assert ORDINARY not in str(raised.value)

    def test_a_file_that_is_not_there_ends_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"API keys: .*nothing"):
            main(["--api-keys-file", str(tmp_path / "nothing")])

    def test_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["key", "--name", "web", "--admin"])
        key, line = (printed.split(":")[1].strip() for printed in capsys.readouterr().out.splitlines())
        found = KeyRing(load_keys(None, line)).find(key)
        assert found is not None
        assert (found.name, found.admin) == ("web", True)
        with pytest.raises(SystemExit, match="name"):
            main(["key", "--name", "a b"])

    def test_limits_without_keys_are_refused(self) -> None:
        with pytest.raises(ValueError, match="key_requests is 3, but there are no keys"):
            make_settings(key_requests=3)


@pytest.fixture
def settings_values() -> dict[str, object]:
    return {"api_keys": LINES}


class TestDoor:
    @pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/openapi.json"])
    async def test_open_paths(self, client: Client, path: str) -> None:
        assert (await client.get(path)).status_code == 200

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            *[("POST", path) for path in ("/translate", "/generate", "/v1/completions", "/tokenize", "/")],
            *[("GET", path) for path in ("/metrics", "/info", "/v1/models", "/languages", "/nothing")],
            *[("PUT", path) for path in ("/health/", "/docs/x", "/generate")],
        ],
    )
    async def test_every_other_path_is_shut(self, client: Client, method: str, path: str) -> None:
        answer = await client.request(method, path, content=b"{}")
        assert answer.status_code in (401, 403)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "needs an API key" in answer.text

    async def test_the_documentation_says_where_a_key_goes(self, client: Client) -> None:
        described = (await client.get("/openapi.json")).json()
        assert described["security"] == [{"bearer": []}, {"x-api-key": []}]
        assert described["components"]["securitySchemes"].keys() == {"bearer", "x-api-key"}
        assert described["paths"]["/health"]["get"]["security"] == []
        assert "security" not in described["paths"]["/generate"]["post"]
        without = create_app(make_settings()).openapi()
        assert "security" not in without

    async def test_in_the_dialects(self, client: Client) -> None:
        theirs = await client.post("/generate", json={"inputs": "a"})
        assert (theirs.status_code, theirs.json()["error_type"]) == (401, "unauthorized")
        openai = await client.post("/v1/completions", json={"prompt": "a"})
        assert (openai.status_code, openai.json()["error"]["type"]) == (401, "authentication_error")
        assert openai.headers["x-should-retry"] == "false"
        libre = await client.post("/translate", data={"q": "a", "target": "ko"})
        assert (libre.status_code, list(libre.json())) == (403, ["error"])
        libre = await client.post("/translate?q=a&target=ko")
        assert (libre.status_code, list(libre.json())) == (403, ["error"])
        root = await client.post("/", json={"prompt": "a"})
        assert (root.status_code, root.json()["error"]["type"]) == (401, "authentication_error")

    @pytest.mark.parametrize(
        "headers",
        [
            BEARER,
            {"authorization": f"bearer {ORDINARY}"},
            {"x-api-key": ORDINARY},
            {"x-api-key": ADMIN},
            {"authorization": "Basic abc", "x-api-key": ORDINARY},
        ],
    )
    async def test_headers_that_open(self, client: Client, headers: dict[str, str]) -> None:
        answer = await client.post("/generate", json={"inputs": "a"}, headers=headers)
        assert answer.status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"authorization": f"Bearer {ORDINARY}x"},
            {"authorization": f"Bearer {hash_key(ORDINARY)}"},
            {"authorization": ORDINARY},
            {"authorization": "Bearer"},
            {"x-api-key": ORDINARY.lower()},
            {"x-api-key": ""},
        ],
    )
    async def test_headers_that_do_not(self, client: Client, headers: dict[str, str]) -> None:
        answer = await client.post("/generate", json={"inputs": "a"}, headers=headers)
        assert answer.status_code == 401
        assert ORDINARY not in answer.text

    async def test_libretranslates_own_way(self, client: Client) -> None:
        fields = {"q": "a", "target": "ko", "api_key": ORDINARY}
        assert (await client.post("/translate", json=fields)).status_code == 200
        assert (await client.post("/translate", data=fields)).status_code == 200
        assert (await client.post("/translate", params=fields)).status_code == 200
        assert (await client.post("/detect", data={"q": "a", "api_key": ORDINARY})).status_code == 200
        asked = {"api_key": ORDINARY}
        assert (await client.request("GET", "/languages", data=asked)).status_code == 200
        assert (await client.post("/translate", json=fields | {"api_key": "no"})).status_code == 403
        assert (await client.post("/translate", json=fields | {"api_key": [ORDINARY]})).status_code == 403

    async def test_a_body_key_opens_no_other_path(self, client: Client) -> None:
        answer = await client.post("/generate", json={"inputs": "a", "api_key": ORDINARY})
        assert answer.status_code == 401

    async def test_the_body_of_a_stranger_is_not_read(self, client: Client) -> None:
        n_read = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal n_read
            n_read += 1
            yield b"{}"

        assert (await client.post("/generate", content=chunks())).status_code == 401
        assert n_read == 0

    async def test_admin(self, client: Client, app: FastAPI) -> None:
        @app.get("/admin")
        async def administer(key: Annotated[Key, Depends(require_admin)]) -> str:
            return key.name

        refused = await client.get("/admin", headers=BEARER)
        assert (refused.status_code, refused.json()["error_type"]) == (403, "forbidden")
        assert (await client.get("/admin", headers={"x-api-key": ADMIN})).json() == "boss"
        assert (await client.get("/admin")).status_code == 401

    @pytest.mark.parametrize("name", ["open_metrics", "open_docs"])
    async def test_what_settings_open(self, name: str) -> None:
        path = {"open_metrics": "/metrics", "open_docs": "/openapi.json"}[name]
        for value in (True, False):
            app = create_app(make_settings(api_keys=LINES, **{name: value}))
            async with Client(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                assert (await client.get(path)).status_code == (200 if value else 401)


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMER_API_KEYS", LINES)
    settings = Settings(_env_file=None)
    assert [key.name for key in load_keys(None, settings.api_keys)] == ["shop", "boss"]


async def test_without_keys_nobody_administers(client: Client) -> None:
    app = create_app(make_settings())
    app.add_api_route("/admin", lambda: "in", dependencies=[Depends(require_admin)])
    async with Client(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get("/admin", headers=BEARER)
        assert (answer.status_code, answer.json()["error_type"]) == (403, "forbidden")


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestQuotas:
    def test_a_bucket_fills_evenly_and_not_above_its_minute(self) -> None:
        clock = Clock()
        bucket = TokenBucket(60, clock)
        bucket.take(60)
        assert bucket.wait_seconds(2) == pytest.approx(2.0)
        clock.now += 1.5
        assert bucket.wait_seconds(2) == pytest.approx(0.5)
        clock.now += 1000
        assert bucket.wait_seconds(60) == 0
        assert bucket.wait_seconds(61) == float("inf")

    def test_requests_and_characters_have_their_own_limits(self) -> None:
        clock = Clock()
        key = Key("a", b"", requests=2)
        quotas = Quotas([key], 0, 10, clock)
        quotas.charge(key, "characters", 8)
        with pytest.raises(RateLimited, match="the limit of this key is 10 characters a minute"):
            quotas.charge(key, "characters", 5)
        quotas.charge(key, "characters", 2)  # what was refused was not taken
        quotas.charge(key, "requests", 2)
        with pytest.raises(RateLimited, match=r"2 requests a minute; try again in 30\.0 seconds") as raised:
            quotas.charge(key, "requests", 1)
        assert raised.value.retry_after_seconds == pytest.approx(30.0)
        with pytest.raises(InvalidRequest, match="has 11 characters, the limit of this key is 10"):
            quotas.charge(key, "characters", 11)

    def test_a_key_of_its_own_kind(self) -> None:
        free = Key("free", b"", requests=0)
        quotas = Quotas([free], 1, 0)
        for _ in range(100):
            quotas.charge(free, "requests", 1)
            quotas.charge(free, "characters", 10**9)

    class TestOverHttp:
        @pytest.fixture
        def settings_values(self) -> dict[str, object]:
            return {"api_keys": LINES, "key_requests": 3, "key_characters": 1000}

        async def test_each_key_has_its_own(self, client: Client) -> None:
            for _ in range(3):
                assert (
                    await client.post("/generate", json={"inputs": "a"}, headers=BEARER)
                ).status_code == 200
            refused = await client.post("/v1/completions", json={"prompt": "a"}, headers=BEARER)
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
            assert 0 < int(refused.headers["retry-after-ms"]) <= 20_000
            assert int(refused.headers["retry-after"]) >= 1
            other = await client.post("/generate", json={"inputs": "a"}, headers={"x-api-key": ADMIN})
            assert other.status_code == 200

        async def test_what_is_refused_for_its_body_counts(
            self, client: Client, caplog: pytest.LogCaptureFixture
        ) -> None:
            caplog.set_level("INFO", "app.request")
            headers = BEARER | {"content-type": "application/json"}
            statuses = [
                (await client.post("/generate", content=content, headers=headers)).status_code
                for content in (b"[" * 1000, b"{", b" " * 5_000_000, b"{}")
            ]
            assert statuses == [422, 422, 413, 429]
            logged = [vars(record)["fields"] for record in caplog.records if record.name == "app.request"]
            assert [fields["key"] for fields in logged] == ["shop"] * 4
            assert logged[-1]["error_type"] == "rate_limited"

        async def test_characters(self, client: Client) -> None:
            body = {"inputs": "[MASK]" + "가" * 300}
            first, second = [
                await client.post("/tokenize", json=body, headers=BEARER),
                await client.post("/tokenize", json={"inputs": "a" * 800}, headers=BEARER),
            ]
            assert (first.status_code, second.status_code) == (200, 429)
            assert second.json()["error_type"] == "overloaded"
            large = await client.post("/tokenize", json={"inputs": "a" * 1001}, headers=BEARER)
            assert (large.status_code, large.json()["error_type"]) == (422, "validation")
