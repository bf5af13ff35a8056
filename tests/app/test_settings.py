"""Settings: bounds, sources, and the table of the README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.__main__ import main, warn_of_unknown_variables
from app.engine.memory import RowSizing
from app.main import fewest_rows, row_sizing
from app.settings import PREFIX, Settings, is_given, named_folders, settings_table, unknown_variables
from tests.app.fakes import make_settings

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_table() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    marked = re.search(r"<!-- settings -->\n(.*?)<!-- /settings -->", readme.read_text(), re.DOTALL)
    assert marked is not None
    assert marked.group(1).strip() == settings_table().strip()


def test_every_setting_is_documented_and_every_number_bounded() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            kinds = {type(bound).__name__ for bound in field.metadata}
            assert kinds & {"Ge", "Gt"}, name
            assert "Le" in kinds, name


def test_environment_then_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}MAX_TEXTS", "7")
    monkeypatch.setenv(f"{PREFIX}PORT", "8001")
    settings = Settings(_env_file=None, _cli_parse_args=["--port", "8002", "--log-level", "error"])
    assert (settings.max_texts, settings.port, settings.log_level) == (7, 8002, "error")
    assert is_given(settings, "port")
    assert not is_given(settings, "translate_model")


def test_dotenv(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(f"{PREFIX}MAX_BEAMS=5\nOTHER=1\n")
    assert Settings(_env_file=file).max_beams == 5


@pytest.mark.parametrize(
    "values", [{"port": -1}, {"timeout_seconds": 0}, {"device": "tpu"}, {"max_temperature": float("nan")}]
)
def test_bounds(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        make_settings(**values)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"max_beams": 3}, ("default_beams is 4", "max_beams, which is 3")),
        ({"max_new_tokens": 19}, ("default_new_tokens is 20", "max_new_tokens, which is 19")),
        ({"translate_slots": 7}, ("max_beams is 8", "translate_slots, which is 7")),
    ],
)
def test_contradictions_are_refused(values: dict[str, object], names: tuple[str, str]) -> None:
    with pytest.raises(ValidationError, match=f"{names[0]}, it must not be above {names[1]}"):
        make_settings(**values)


def test_rows_follow_from_memory_where_their_number_was_not_given() -> None:
    settings = make_settings(generate_slots=4, max_slots=9, gpu_memory_utilization=0.5)
    wanted = [(endpoint, "some", Path()) for endpoint in ("translate", "fill-mask", "generate", "generate")]
    assert row_sizing(settings, wanted) == RowSizing(frozenset({"translate"}), 0.5, 9, n_sharing=3)
    assert fewest_rows(settings) == {"translate": 32}
    assert fewest_rows(make_settings(max_beams=50)) == {"translate": 50, "generate": 16}


def test_a_contradiction_ends_with_a_message() -> None:
    with pytest.raises(SystemExit, match="settings: Value error, default_beams is 9, it must not be above"):
        main(["--default-beams", "9"])


def test_the_log_level_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}LOG_LEVEL", "WARNING")
    assert Settings(_env_file=None).log_level == "warning"
    assert Settings(_env_file=None, _cli_parse_args=["--log-level", "Error"]).log_level == "error"


def test_unknown_variables() -> None:
    given = [f"{PREFIX}PORT", f"{PREFIX}max_beams", f"{PREFIX}MAX_BEANS", "TRANSFORMERS_CACHE", "HOME"]
    assert unknown_variables(given) == [f"{PREFIX}MAX_BEANS"]


def test_unknown_variables_are_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"{PREFIX}MAX_BEANS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"{PREFIX}PORT=1\n{PREFIX}TIMEOUT_SECOND=3\n")
    with caplog.at_level("WARNING", "app"):
        warn_of_unknown_variables()
    assert caplog.messages == [f"no such settings, ignored: {PREFIX}MAX_BEANS, {PREFIX}TIMEOUT_SECOND"]


def test_help_tells_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Serve the models over HTTP" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--device", "tpu"]])
def test_a_bad_argument_ends_with_a_message(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=arguments[0].strip("-")):
        main(arguments)


def test_the_table_command() -> None:
    command = [sys.executable, "-m", "app", "--settings-table"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == settings_table()
    assert "| `TRANSFORMER_PORT` | `--port` | `8000` |" in printed.stdout


def test_named_folders() -> None:
    assert named_folders("weights/generate") == [(None, Path("weights/generate"))]
    assert named_folders(" ") == []
    assert named_folders("a=x, b-2.c = y/z=1") == [("a", Path("x")), ("b-2.c", Path("y/z=1"))]
    assert make_settings(generate_model=Path("x")).generate_model == "x"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a=x,y", "'y' is not name=folder"),
        ("a=", "'a=' is not name=folder"),
        ("a=x,a=y", "the name 'a' stands twice"),
        ("=x", "the name '' must be 1 to 64 letters"),
        ("a/b=x", "the name 'a/b' must be"),
    ],
)
def test_folders_that_are_refused(value: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_settings(generate_model=value)
