"""What lies in deploy/ fits the server: its settings, its paths, the names of its metrics."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from dummy_engine import WATCHDOG  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from server_rig import running  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.config import EngineConfig  # noqa: E402
from hybrid.server.config import ServerConfig  # noqa: E402
from hybrid.settings import settings_of  # noqa: E402

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNIT, CONTAINER = (DEPLOY / "hybrid.service").read_text(), (DEPLOY / "Containerfile").read_text()
GRACE = 30  # seconds that the server may take after draining: for requests that end by an error, connections, a step


def unit(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.M)


def test_the_variables_of_settings_are_known() -> None:
    known = {setting.variable for kind in (ServerConfig, EngineConfig) for setting in settings_of(kind)}
    named = set(re.findall(r"HYBRID_[A-Z_]+", UNIT + CONTAINER + (DEPLOY / "prometheus.yml").read_text()))
    assert len(named) > 4 and named <= known


def test_the_unit_leaves_time_to_drain() -> None:
    assert int(unit("TimeoutStopSec")[0]) >= ServerConfig().drain_seconds + GRACE
    assert unit("RestartPreventExitStatus") == ["2"] and not unit("WatchdogSec") and unit("DynamicUser") == ["yes"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_understands_the_unit(tmp_path) -> None:
    """The command is another: nothing is installed at the place that the unit names."""
    file = tmp_path / "hybrid.service"
    file.write_text(UNIT.replace("/opt/hybrid/bin/hybrid", sys.executable))
    result = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=WATCHDOG)
    assert result.returncode == 0 and str(file.name) not in result.stderr, result.stderr


def test_the_container_copies_what_is_there_and_no_root_runs_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", CONTAINER, re.M) for name in line.split()]
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert copied and sorted(copied) == sorted(allowed) and all((ROOT / name).exists() for name in copied)
    for extras in re.findall(r"\[([\w,]+)\]'", CONTAINER):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    users = re.findall(r"^USER (\d+)$", CONTAINER, re.M)
    assert users and int(users[-1]) > 0 and CONTAINER.rindex("USER") < CONTAINER.index("ENTRYPOINT")
    assert f"EXPOSE {ServerConfig().port}" in CONTAINER


def test_the_container_is_healthy_when_requests_are_taken() -> None:
    command = json.loads(re.search(r"HEALTHCHECK[^[]*(\[.*\])", CONTAINER)[1])
    command[0] = sys.executable

    def healthy(port: int) -> bool:
        environment = {**os.environ, "HYBRID_SERVE_PORT": str(port)}
        return not subprocess.run(command, env=environment, capture_output=True, timeout=WATCHDOG).returncode

    with running(LLM(), api_key=("k",)) as server:
        assert healthy(server.port)
    assert not healthy(server.port)
    with running(None) as server:
        assert not healthy(server.port)


def test_every_query_of_the_dashboard_names_metrics_that_there_are() -> None:
    with running(None) as server:
        families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    known = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    known |= {f"{family.name}_bucket" for family in families if family.type == "histogram"}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [
        variable["query"] for variable in dashboard["templating"]["list"] if "label_values" in variable["query"]
    ]
    assert len(queries) > 20
    for query in queries:
        names = re.findall(r"\bhybrid_\w+", query)
        assert names and set(names) <= known, query
        assert set(re.findall(r"\$(?!__)(\w+)", query)) <= variables
        assert query.count("(") == query.count(")")
    labels = {label for query in queries for part in re.findall(r"by \(([^)]*)\)", query) for label in part.split(", ")}
    assert labels == {"le", "reason", "kind", "layer", "came_true"}
    source = (ROOT / "hybrid/server/metrics.py").read_text()
    assert all(f'["{label}"]' in source for label in labels - {"le"})
    places = [tuple(panel["gridPos"][at] for at in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool")
def test_prometheus_understands_its_part_and_the_queries(tmp_path) -> None:
    key = tmp_path / "key"
    key.write_text("k")
    config = tmp_path / "prometheus.yml"
    config.write_text((DEPLOY / "prometheus.yml").read_text().replace("/etc/prometheus/hybrid.key", str(key)))
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    queries = [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]
    rules = {
        "groups": [{"name": "a", "rules": [{"record": f"a:{n}", "expr": query} for n, query in enumerate(queries)]}]
    }
    (tmp_path / "rules.yml").write_text(json.dumps(rules))
    for what, file in (("config", config), ("rules", tmp_path / "rules.yml")):
        result = subprocess.run(["promtool", "check", what, file], capture_output=True, text=True, timeout=WATCHDOG)
        assert result.returncode == 0, shlex.join(map(str, result.args)) + result.stdout + result.stderr
