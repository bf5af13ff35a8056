"""Whatever is sent: never a 5xx but 503, every error in JSON, every answer documented.

`make test` runs a few examples an operation, `make fuzz` runs FUZZ_EXAMPLES of them.
"""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, product
from typing import Any, TypeVar

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import content_type_conformance
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from app.__main__ import make_config
from app.main import create_app
from tests.app.fakes import load_fakes, make_settings

T = TypeVar("T")

# So many for each operation, with data as described and with data that is not.
N_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "6"))
THOROUGH = N_EXAMPLES >= 100
JSON_TYPE = "application/json"
FORM_TYPE = "application/x-www-form-urlencoded"
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
SETTINGS = make_settings(port=0, max_body_bytes=1_000_000, receive_seconds=5.0)
DESCRIPTION = schemathesis.openapi.from_dict(create_app(SETTINGS, load_fakes).openapi())
OPERATIONS = {
    found.ok().label: found.ok() for found in DESCRIPTION.get_all_operations() if isinstance(found, Ok)
}
assert len(OPERATIONS) > 10


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server on fake lanes, in a thread of its own."""
    server = uvicorn.Server(make_config(create_app(SETTINGS, load_fakes), SETTINGS))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def check_status(status: int, text: str, content_type: str) -> None:
    assert status < 500 or status == 503, text
    if status >= 400:
        assert content_type.startswith(JSON_TYPE)
        assert json.loads(text)["error"]


# Only a body can be other than described: a GET or DELETE here takes any path.
@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label in OPERATIONS
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or label.startswith("POST")
    ],
)
def test_as_described_and_not(url: str, label: str, mode: GenerationMode) -> None:
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=not THOROUGH,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Case[Any]) -> None:
        answer = case.call(base_url=url, timeout=60)
        check_status(answer.status_code, answer.text, answer.headers["content-type"][0])
        case.validate_response(answer, checks=CHECKS)

    check()


NASTY = [
    *("", "\x00", "a\x00b", "\u2028\u2029\u0085", "\ufeff", "\u202eabc\u202c", "\ufffd\ufffe\uffff"),
    *(
        "👩‍👩‍👧‍👦" * 50,
        "🇰🇷" * 100,
        "e" + "\u0301" * 500,
        "שלום עולם",
        "مرحبا بالعالم",
        "가" * 300,
        " " * 3000,
    ),
    *(
        "\n" * 3000,
        "." * 3000,
        "a" * 19_999,
        "[MASK]" * 65,
        "</s><s>[CLS][SEP]",
        "%s%n{0}${7*7}",
        "../../etc",
    ),
]
VALUES = [
    *("null", "true", "0", "-1", "1e400", "-1e400", "NaN", "Infinity", "9" * 400, "1.5", '""', "[]", "{}"),
    *(
        "[[]]",
        "[{}]",
        "[null]",
        '[""]',
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '["\\ud800"]',
        '"\\u0000"',
        '{"": 0}',
    ),
    *('{"\\ud800": 1}', "[" * 40 + "]" * 40, "[" + "0," * 2000 + "0]", '["' + "a" * 30_000 + '"]'),
]
BODIES = [
    *(
        b"",
        b" ",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"{",
        b"}",
        b'"',
        b"[" * 200_000,
        b'{"a":' * 50_000,
    ),
    *(b'{"inputs": "\xed\xa0\x80"}', b'{"inputs": "\xff"}', b'{"inputs": "a",}', b"{'inputs': 'a'}"),
    *(
        b'{"inputs": "a", "inputs": ["b"]}',
        b"null",
        b"true",
        b"12",
        b"NaN",
        b'["inputs"]',
        b"--x\r\n\r\n--x--",
    ),
    *('{"inputs": "가"}'.encode("utf-16"), '{"inputs": "가"}'.encode("euc-kr"), b"a=" * 2000, b"&" * 5000),
    *(b"q=%ff&target=ko", b"q=%00&target=ko", b"q=a&target=ko&target=en", b"q=" + b"%F0%9F%98%80" * 900),
]
TYPES = (
    *(JSON_TYPE, FORM_TYPE, "text/plain", "", "multipart/form-data; boundary=x", "application/x+json"),
    *("application/json; charset=utf-16", "application/octet-stream", "é", "application/json" * 50),
)
PATHS = (
    *("/translate", "/fill-mask", "/generate", "/generate_stream", "/next-sentence", "/tokenize", "/"),
    *("/v1/completions", "/detect", "/classify"),
)
PARAMETERS = ("top_k", "stop", "seed", "src_lang", "max_new_tokens", "temperature", "targets")
FIELDS = ("parameters", "stream", "stop", "logit_bias", "model", "max_tokens", "task", "target", "glossary")
TEXT_NAME = {"/v1/completions": "prompt", "/detect": "q"}


def some(cases: Iterable[T], step: int) -> list[T]:
    """One in `step` of the cases, all of them in the thorough form."""
    return list(islice(cases, 0, None, 1 if THOROUGH else step))


def send(client: httpx.Client, path: str, content: bytes, content_type: str = JSON_TYPE) -> None:
    headers = [(b"content-type", content_type.encode("latin-1"))]
    answer = client.post(path, content=content, headers=headers)
    check_status(answer.status_code, answer.text, answer.headers["content-type"])


@pytest.mark.parametrize("path", PATHS)
def test_nasty_texts(client: httpx.Client, path: str) -> None:
    name = TEXT_NAME.get(path, "inputs")
    shapes: list[Callable[[str], Any]] = [
        lambda t: t,
        lambda t: [t],
        lambda t: [t, ""],
        lambda t: {"first": t, "second": t},
    ]
    for text, shape in some(product(NASTY, shapes), 3):
        send(client, path, json.dumps({name: shape(text)}).encode())
    for text in NASTY:
        send(client, path, json.dumps({"q": text, "target": "ko"}, ensure_ascii=False).encode())


@pytest.mark.parametrize("path", PATHS)
def test_nasty_values(client: httpx.Client, path: str) -> None:
    name = TEXT_NAME.get(path, "inputs")
    for value in VALUES:
        send(client, path, f'{{"{name}": {value}}}'.encode())
    for value, parameter in some(product(VALUES, PARAMETERS), 5):
        body = f'{{"{name}": "a [MASK]", "parameters": {{"{parameter}": {value}}}}}'
        send(client, path, body.encode())
    for value, field in some(product(VALUES, FIELDS), 5):
        send(client, path, f'{{"{name}": "a", "{field}": {value}}}'.encode())


@pytest.mark.parametrize("path", PATHS)
def test_nasty_bodies(client: httpx.Client, path: str) -> None:
    for content_type, body in some(product(TYPES, BODIES), 3):
        send(client, path, body, content_type)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes(client: httpx.Client, path: str, *, chunked: bool) -> None:
    whole = b'{"inputs": "' + b"a" * 10_000_000 + b'"}'
    content = iter([whole[i : i + 65_536] for i in range(0, len(whole), 65_536)]) if chunked else whole
    try:
        answer = client.post(path, content=content, headers={"content-type": JSON_TYPE})
    except httpx.WriteError:  # refused while the client still wrote
        return
    assert answer.status_code == 413
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "target",
    ["/%00", "/%ff%fe", "/..%2f..", "//", "/translate//", "/models/%2e%2e/info", "/v1/models/%ed%a0%80"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_paths_and_methods(client: httpx.Client, method: str, target: str) -> None:
    answer = client.request(method, target)
    check_status(answer.status_code, answer.text, answer.headers["content-type"])
