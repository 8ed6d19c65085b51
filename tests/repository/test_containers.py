"""Dockerfile, docker-compose.yml and what is under deploy/, read as text: they agree with each other and with the
service's options.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.repository.image import DOCKERFILE, check_settings, context_names, environment, instructions
from tests.repository.source import ROOT
from vflow_server.settings import ENVIRONMENT_PREFIX, options

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
REPLICAS = ("vflow", "vflow-gpu")


def test_the_service_does_not_run_as_root() -> None:
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER vflow$", last_stage, re.M)
    assert last_stage.index("USER vflow") < last_stage.index("ENTRYPOINT")


def test_only_the_first_stage_installs() -> None:
    assert len(instructions("FROM")) == 2
    assert "pip install" not in DOCKERFILE.rpartition("\nFROM ")[2]


def test_the_service_is_installed_beside_the_client_that_it_asks_for() -> None:
    """In one step: pip then takes the client from the folder, and looks for none in an index."""
    (step,) = (line for line in instructions("RUN") if "./client" in line)
    assert step == "pip install --constraint constraints.txt ./client '.[otel]'"


def test_its_settings_are_options_of_the_service_with_valid_values() -> None:
    assert environment()[f"{ENVIRONMENT_PREFIX}HOST"] == environment()[f"{ENVIRONMENT_PREFIX}METRICS_HOST"] == "0.0.0.0"
    for device in ("cpu", "cuda"):  # what ${DEVICE} stands for
        check_settings({**environment(), f"{ENVIRONMENT_PREFIX}DEVICE": device})
    for name in REPLICAS:
        check_settings(SERVICES[name]["environment"])


def test_both_variants_are_built_by_one_argument() -> None:
    assert instructions("ARG").count("DEVICE=cpu") == 2  # one for each stage
    assert environment()[f"{ENVIRONMENT_PREFIX}DEVICE"] == "${DEVICE}"
    assert "DEVICE" not in SERVICES["vflow"]["build"]["args"]
    assert SERVICES["vflow-gpu"]["build"]["args"]["DEVICE"] == "cuda"
    assert SERVICES["vflow-gpu"]["profiles"] == ["gpu"] and "profiles" not in SERVICES["vflow"]


@pytest.mark.parametrize("name", REPLICAS)
def test_image_and_compose_check_health_alike(name: str) -> None:
    checked = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2])
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", *checked] == ["CMD", "vflow", "health"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined_and_looked_after(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"] and service["restart"] == "unless-stopped" and service["healthcheck"]["test"]
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:"), f"{port} can be reached from other machines"
    for volume in service["volumes"]:
        source, _, rest = volume.partition(":")
        assert source in COMPOSE["volumes"] or (rest.endswith(":ro") and (ROOT / source).is_dir())


@pytest.mark.parametrize("name", REPLICAS)
def test_the_port_is_the_exposed_one(name: str) -> None:
    _, outside, inside = SERVICES[name]["ports"][0].split(":")
    exposed = instructions("EXPOSE")[0].split()
    assert inside == outside == exposed[0] == environment()[f"{ENVIRONMENT_PREFIX}PORT"]
    assert exposed[1] == environment()[f"{ENVIRONMENT_PREFIX}METRICS_PORT"]


def test_data_is_on_a_volume() -> None:
    assert SERVICES["vflow"]["volumes"] == ["data:/data"]
    assert instructions("VOLUME") == ["/data"]
    assert environment()[f"{ENVIRONMENT_PREFIX}DATA"] == "/data"


def test_prometheus_looks_where_the_image_tells() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    (target,) = scraped[0]["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert port == environment()[f"{ENVIRONMENT_PREFIX}METRICS_PORT"]
    assert host in SERVICES and host in SERVICES["vflow-gpu"]["networks"]["default"]["aliases"]


def test_grafana_finds_its_dashboard_and_its_data() -> None:
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    places = {inside: ROOT / outside for outside, inside in mounts.items() if outside.startswith(".")}
    provisioning = places["/etc/grafana/provisioning"]
    provider = yaml.safe_load((provisioning / "dashboards/vflow.yml").read_text())["providers"][0]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    dashboard = json.loads((places[provider["options"]["path"]] / "vflow.json").read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"}
    assert used == {source["uid"]}
    assert source["url"] == "http://prometheus:9090" and "prometheus" in SERVICES


@pytest.mark.parametrize("name", REPLICAS)
def test_compose_waits_longer_than_the_service(name: str) -> None:
    grace = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert grace > options()["grace"].parse(options()["grace"].shown)


def test_the_unit_sets_options_of_the_service_and_waits_longer_than_it() -> None:
    unit = (ROOT / "deploy/systemd/vflow.service").read_text()
    set_ = [pair for line in re.findall(r"^Environment=(.*)$", unit, re.M) for pair in line.split()]
    check_settings(dict(pair.split("=", 1) for pair in set_))
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    assert float(patience) > options()["grace"].parse(options()["grace"].shown)


def test_the_build_context_holds_what_the_build_copies() -> None:
    assert context_names() == {
        "client",
        "proto",
        "server",
        "vflowopt",
        "constraints.txt",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    }
    assert all((ROOT / name).exists() for name in context_names())


def checked(*command: str | Path) -> None:
    """Have the tool that reads a file for real look at it, where it is installed."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("profile", ["", "gpu"])
def test_docker_compose_takes_the_file(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSE_PROFILES", profile)
    checked("docker-compose", "config", "--quiet")


def test_prometheus_takes_its_configuration_and_alerts() -> None:
    checked("promtool", "check", "config", "deploy/prometheus/prometheus.yml")


def test_alarms_are_raised_when_they_should_be() -> None:
    checked("promtool", "test", "rules", "tests/repository/alerts.test.yml")


def test_every_alarm_is_tested() -> None:
    raised = re.findall(r"alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text())
    tried = yaml.safe_load((ROOT / "tests/repository/alerts.test.yml").read_text())["tests"]
    expected = {each["alertname"] for test in tried for each in test["alert_rule_test"] if each.get("exp_alerts")}
    assert raised and expected == set(raised)


def test_envoy_takes_its_configuration() -> None:
    checked("envoy", "--mode", "validate", "--log-level", "warning", "-c", "deploy/envoy/envoy.yaml")


def test_the_shell_takes_the_scripts() -> None:
    checked("bash", "-n", "deploy/image-check.sh")
