"""The arrows of the layout, read from the imports.

app/api -> app/engine -> model and model/training -> model; nothing runs the other way.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"app.metrics", "app.errors", "app.engine.errors"}
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client"}
CONCURRENCY = {"asyncio", "threading", "multiprocessing", "concurrent"}
SAYS_NOTHING = {"utils", "util", "helpers", "common", "base", "misc"}

Imports = dict[str, set[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that the code names in an import, those inside functions and TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def read_imports() -> Imports:
    found: Imports = {}
    for path in (path for room in ("app", "model") for path in sorted((ROOT / room).rglob("*.py"))):
        name = module_name(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set(imported(ast.parse(path.read_text(encoding="utf-8")), package))
    return found


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports()


def forbidden(imports: Imports, room: str, *targets: str) -> list[str]:
    return [
        f"{module} imports {target}"
        for module, targets_of in imports.items()
        if within(module, room)
        for target in sorted(targets_of)
        if within(target, *targets)
    ]


def test_every_room_is_read(imports: Imports) -> None:
    for module in ("app.main", "app.api.deps", "app.engine.worker", "model.attention", *LEAVES):
        assert module in imports
    assert within("model.training.loop", "model.training")
    assert any(within(target, "model") for target in imports["app.main"])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import a.b as c", {"a.b"}),
        ("from a import b", {"a", "a.b"}),
        ("from . import b", {"app.api", "app.api.b"}),
        ("from ..engine.errors import E", {"app.engine.errors", "app.engine.errors.E"}),
        ("def f():\n    import a", {"a"}),
    ],
)
def test_imports_are_understood(code: str, expected: set[str]) -> None:
    assert set(imported(ast.parse(code), "app.api")) == expected


def test_the_model_does_not_know_the_service(imports: Imports) -> None:
    assert forbidden(imports, "model", "app") == []


def test_the_model_is_mathematics(imports: Imports) -> None:
    assert forbidden(imports, "model", *WEB, *CONCURRENCY) == []


def test_training_is_imported_by_training_alone(imports: Imports) -> None:
    outside = {module: names for module, names in imports.items() if not within(module, "model.training")}
    assert forbidden(outside, "model", "model.training") == []
    assert forbidden(outside, "app", "model.training") == []


def test_the_engine_knows_no_http(imports: Imports) -> None:
    upward = ("app.api", "app.main", "app.settings", "app.errors", "app.middleware")
    assert forbidden(imports, "app.engine", *upward, "fastapi", "starlette", "uvicorn") == []


def test_the_scheduler_has_no_tensors_clock_or_thread(imports: Imports) -> None:
    assert forbidden(imports, "app.engine.scheduler", "torch", "time", "threading", "asyncio") == []


def test_routes_do_not_know_the_application(imports: Imports) -> None:
    assert forbidden(imports, "app.api", "app.main") == []


def test_nothing_that_is_loaded_can_run_code(imports: Imports) -> None:
    """Weights are safetensors, all else is JSON, TOML or text."""
    runs_code = ("pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle", "torch.load")
    assert forbidden(imports, "app", *runs_code) == forbidden(imports, "model", *runs_code) == []
    for path in (path for room in ("app", "model") for path in (ROOT / room).rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {ast.unparse(call) for call in calls} & {"torch.load", "eval", "exec"}


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_only_leaves(imports: Imports, leaf: str) -> None:
    ours = {module for module in imports if any(within(target, module) for target in imports[leaf])}
    assert {module for module in ours if "." in module and not within(module, *LEAVES)} <= {"app.engine"}


def test_names_say_something(imports: Imports) -> None:
    assert [module for module in imports if module.rpartition(".")[2] in SAYS_NOTHING] == []
