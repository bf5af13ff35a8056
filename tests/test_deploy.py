"""What is built and watched around the service agrees with the service."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from prometheus_client import REGISTRY

from app import metrics
from app.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/transformer.json"
METRIC = re.compile(rf"\b{metrics.PREFIX}[a-z0-9_]+")
SELECTOR = re.compile(rf"\b({metrics.PREFIX}[a-z0-9_]+)\{{([^}}]*)\}}")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\bby \(([^)]*)\)")
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "info": ("_info",),
    "histogram": ("_bucket", "_sum", "_count"),
}
# Put there by Prometheus itself.
OTHER_LABELS = {"le", "instance", "job"}

Labels = dict[str, set[str]]


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As from a fresh shell: what an outer `make test` passes down through MAKEFLAGS does not count."""
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def make_lines(*words: str) -> list[str]:
    result = run_make("--dry-run", "--always-make", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def series() -> dict[str, Labels]:
    """Every name that a scrape shows, with the values of its labels that are there from the start."""
    metrics.add_model("generate", "some", "0" * 64)
    found: dict[str, Labels] = {}
    for family in REGISTRY.collect():
        if not family.name.startswith(metrics.PREFIX):
            continue
        labels: Labels = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
        found |= {family.name + suffix: labels for suffix in SUFFIXES[family.type]}
    return found


def panels() -> list[dict[str, Any]]:
    return [
        panel
        for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
        if panel["type"] != "row"
    ]


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["definition"] for variable in dashboard["templating"]["list"])


def alert_rules() -> list[dict[str, Any]]:
    return [
        rule for group in load_yaml(DEPLOY / "prometheus/alerts.yml")["groups"] for rule in group["rules"]
    ]


def expressions() -> list[str]:
    return [*dashboard_expressions(), *(rule["expr"] for rule in alert_rules())]


# --- dashboard and alerts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", expressions())
def test_watched_metrics_exist(expression: str, series: dict[str, Labels]) -> None:
    names = METRIC.findall(expression)
    assert set(names) <= set(series)
    known = {label for name in names for label in series[name]} | OTHER_LABELS
    groups = {label.strip() for labels in GROUPING.findall(expression) for label in labels.split(",")}
    assert not names or groups <= known


@pytest.mark.parametrize("expression", expressions())
def test_watched_label_values_exist(expression: str, series: dict[str, Labels]) -> None:
    for name, selector in SELECTOR.findall(expression):
        for label, operator, value in MATCHER.findall(selector):
            values = series[name][label]
            wanted = value.split("|") if operator in {"=~", "!~"} else [value]
            assert value.startswith("$") or set(wanted) <= values


def test_every_metric_is_on_the_dashboard(series: dict[str, Labels]) -> None:
    shown = {name for expression in dashboard_expressions() for name in METRIC.findall(expression)}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in series} <= families


def test_panels_are_whole() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert {target["refId"] for target in panel["targets"]}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in panels()]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))


def test_the_datasource_is_the_one_that_panels_ask() -> None:
    (source,) = load_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


def test_every_alert_is_tested() -> None:
    tests = load_yaml(DEPLOY / "prometheus/alerts_test.yml")["tests"]
    fired = {
        case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in alert_rules()}
    assert all(rule["labels"]["severity"] in {"warning", "critical"} for rule in alert_rules())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    result = subprocess.run(
        ["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_every_dashboard_expression_parses(tmp_path: Path) -> None:
    queries = [expression for panel in panels() for expression in (t["expr"] for t in panel["targets"])]
    plain = [query.replace("$__rate_interval", "1m").replace("$endpoint", ".*") for query in queries]
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(plain)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    result = subprocess.run(
        ["promtool", "check", "rules", str(tmp_path / "rules.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# --- image and compose --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    compose = load_yaml(ROOT / "docker-compose.yml")
    return dict(compose["services"])


def test_services_are_fenced_in(services: dict[str, Any]) -> None:
    assert set(services) == {"transformer", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert name == "transformer" or service["healthcheck"]["test"][0] == "CMD"


def test_compose_sets_known_settings(services: dict[str, Any]) -> None:
    names = services["transformer"]["environment"]
    assert {name.removeprefix(PREFIX).lower() for name in names} <= set(Settings.model_fields)


def test_mounted_files_exist(services: dict[str, Any]) -> None:
    mounts = [mount.split(":") for service in services.values() for mount in service.get("volumes", [])]
    binds = [mount for mount in mounts if mount[0].startswith("./")]
    assert len(binds) == 4
    for source, _, mode in binds:
        assert (ROOT / source).exists()
        assert mode == "ro"


def test_prometheus_scrapes_the_service(services: dict[str, Any]) -> None:
    config = load_yaml(DEPLOY / "prometheus/prometheus.yml")
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    (port,) = services["transformer"]["ports"]
    assert targets["transformer"] == [f"transformer:{port.rpartition(':')[2]}"]


def test_the_grace_period_outlasts_the_drain(services: dict[str, Any]) -> None:
    grace = float(services["transformer"]["stop_grace_period"].removesuffix("s"))
    assert grace >= Settings.model_fields["shutdown_seconds"].default + 10


def test_the_image_sets_known_settings() -> None:
    names = re.findall(rf"\b{PREFIX}([A-Z_]+)=", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert {"HOST", "PORT", "DEVICE", "CACHE_DIR"} == set(names)
    assert {name.lower() for name in names} <= set(Settings.model_fields)


def test_the_image_copies_only_what_it_is_given() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copies = re.findall(
        r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    sources = {source.removeprefix("./") for line in copies for source in line.split()}
    assert "*" in ignored
    named = {line for line in ignored if line.startswith("!")}
    # Of what is trained with, the translations alone that the service reads by default.
    examples = f"!{Settings.model_fields['examples'].default}/*.en-ko.tsv.xz"
    assert ignored.index("model/training") < ignored.index(examples)
    assert {f"!{source}" for source in sources} == named - {examples}


def test_dependencies_come_before_the_source() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert text.index("pip install --require-hashes") < text.index("COPY app")
    assert text.index("USER ") < text.index("ENTRYPOINT [")


# --- packages, make, continuous integration -----------------------------------------------------------------


def test_every_dependency_is_pinned() -> None:
    project = pyproject()["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonical(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("#")}
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonical(requirement.name)])


def pinned_with_hashes() -> dict[str, tuple[str, int]]:
    """Of requirements.txt: version and number of hashes by name."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z])", re.sub(r"(?m)^#.*\n", "", text), flags=re.MULTILINE)
    found = {}
    for entry in filter(str.strip, entries):
        name, version = re.match(r"([a-z0-9.-]+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        found[name] = (version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}", entry)))
    return found


def test_the_image_installs_what_was_tested_and_checks_its_hashes() -> None:
    pinned = pinned_with_hashes()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {
        canonical(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("#")
    }
    assert all(n_hashes for _, n_hashes in pinned.values())
    assert {canonical(Requirement(line).name) for line in pyproject()["project"]["dependencies"]} <= set(
        pinned
    )
    for name, (version, _) in pinned.items():
        assert tested.get(canonical(name), version) == version, f"make requirements: {name}"
    installs = re.findall(r"pip install (.*)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert len(installs) == 3
    for options in installs:
        assert "--no-deps --only-binary=:all:" in options
        # Another index's torch has another hash, which its builder gives.
        assert ("--require-hashes" in options) != ("--index-url" in options)


def test_every_imported_package_is_a_dependency() -> None:
    project = pyproject()["project"]
    served = {canonical(Requirement(line).name) for line in project["dependencies"]}
    trained = served | {
        canonical(Requirement(line).name) for line in project["optional-dependencies"]["train"]
    }
    for path in [*(ROOT / "app").rglob("*.py"), *(ROOT / "model").rglob("*.py")]:
        allowed = trained if "training" in path.parts else served
        assert third_party(path) <= allowed, path


def third_party(path: Path) -> set[str]:
    """The distributions that a file imports; as a rule each has the name of its module here."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    others = {"dotenv": "python-dotenv"}
    foreign = modules - sys.stdlib_module_names - {"app", "model"}
    return {canonical(others.get(module, module)) for module in foreign}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_ci_calls_make() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make test"]


def test_make_checks_what_is_promised() -> None:
    check = "\n".join(make_lines("check"))
    assert all(
        tool in check
        for tool in ("ruff check app model tests", "ruff format --check", "mypy app model tests")
    )
    assert pyproject()["tool"]["mypy"]["strict"] is True
    assert any("-m pytest" in line for line in make_lines("test"))


def test_make_serve_gives_way_to_the_server() -> None:
    *_, last = make_lines("serve")
    assert re.fullmatch(r"exec \S+ -m app *", last)
    *_, last = make_lines("serve", "HOST=0.0.0.0", "PORT=9000")
    assert re.fullmatch(r'exec \S+ -m app --host "0.0.0.0" --port "9000" ?', last)


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.9.18 && exit 0\nexit 1\n")
    old.chmod(0o755)
    result = run_make("serve", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert "Python 3.11 or later is needed" in result.stderr
    assert "Python 3.9.18" in result.stderr
