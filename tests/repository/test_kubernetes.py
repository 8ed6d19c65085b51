"""The manifests are what Kubernetes takes, and say the same as the image and the service."""

import copy
import tomllib
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.repository.help import told_by
from tests.repository.image import check_settings, environment, instructions, user_id
from tests.repository.source import ROOT
from vflow_server.settings import ENVIRONMENT_PREFIX, options

MANIFESTS: dict[str, dict[str, Any]] = {
    manifest["kind"]: manifest
    for file in sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
}
POD: dict[str, Any] = MANIFESTS["StatefulSet"]["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
VARIABLES = {each["name"]: each["value"] for each in CONTAINER["env"] if "value" in each}
MOUNTS = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}


@pytest.mark.parametrize("release", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_schemas_of_kubernetes_take_every_manifest(kind: str, release: str) -> None:
    kubernetes_validate.validate(MANIFESTS[kind], release, strict=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pod: pod["containers"][0].update(redinessProbe={}),
        lambda pod: pod["containers"][0]["securityContext"].update(readOnlyRootFileSystem=True),
        lambda pod: pod["containers"][0]["env"].append({"value": "nameless"}),
        lambda pod: pod.update(terminationGracePeriodSeconds="45s"),
    ],
)
def test_those_schemas_refuse_what_is_wrong(spoil: Callable[[dict[str, Any]], None]) -> None:
    spoiled = copy.deepcopy(MANIFESTS["StatefulSet"])
    spoil(spoiled["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(spoiled, "1.30", strict=True)


def test_all_speak_of_the_same_pods() -> None:
    pods = MANIFESTS["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert MANIFESTS["StatefulSet"]["spec"]["selector"] == {"matchLabels": pods}
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"] == {"matchLabels": pods}
    assert MANIFESTS["NetworkPolicy"]["spec"]["podSelector"] == {"matchLabels": pods}
    assert POD["topologySpreadConstraints"][0]["labelSelector"] == {"matchLabels": pods}
    assert MANIFESTS["Service"]["spec"]["selector"] == pods
    assert MANIFESTS["Service"]["metadata"]["name"] == MANIFESTS["StatefulSet"]["spec"]["serviceName"]


def test_its_variables_are_settings_of_the_service_or_of_its_health_check() -> None:
    asks = {name: value for name, value in VARIABLES.items() if name in told_by("health")}
    assert asks.keys() == {f"{ENVIRONMENT_PREFIX}CA", f"{ENVIRONMENT_PREFIX}SERVER_NAME"}
    check_settings({name: value for name, value in VARIABLES.items() if name not in asks})
    (computed,) = (each for each in CONTAINER["env"] if "value" not in each)
    check_settings({computed["name"]: CONTAINER["resources"]["requests"]["cpu"]})


def test_the_files_that_they_name_are_mounted() -> None:
    secrets = {volume["name"] for volume in POD["volumes"] if "secret" in volume}
    files = [value for value in VARIABLES.values() if value.startswith("/")]
    assert {name for name in secrets for file in files if file.startswith(f"{MOUNTS[name]}/")} == secrets
    assert all(any(file.startswith(f"{MOUNTS[name]}/") for name in secrets) for file in files)
    (claim,) = MANIFESTS["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert MOUNTS[claim["metadata"]["name"]] == environment()[f"{ENVIRONMENT_PREFIX}DATA"]


def test_ports_version_and_health_check_are_the_image_s() -> None:
    ports = {port["name"]: str(port["containerPort"]) for port in CONTAINER["ports"]}
    assert list(ports.values()) == instructions("EXPOSE")[0].split()
    annotations = MANIFESTS["StatefulSet"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == ports["metrics"]
    (service,) = MANIFESTS["Service"]["spec"]["ports"]
    assert ports[service["targetPort"]] == str(service["port"])
    allowed = [port["port"] for rule in MANIFESTS["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert allowed == list(ports)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert CONTAINER["image"].endswith(f":{project['version']}")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["exec"]["command"] == ["vflow", "health"]


def test_the_service_is_confined() -> None:
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] == user_id()
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsGroup"] == user_id()
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    confined = CONTAINER["securityContext"]
    assert confined["readOnlyRootFilesystem"] and confined["allowPrivilegeEscalation"] is False
    assert confined["capabilities"] == {"drop": ["ALL"]} and CONTAINER["resources"]["limits"]["memory"]
    assert POD["automountServiceAccountToken"] is False


def test_kubernetes_adds_no_variables_that_look_like_settings() -> None:
    """For a service named vflow it would set VFLOW_PORT=tcp://..."""
    assert MANIFESTS["Service"]["metadata"]["name"].upper() + "_" == ENVIRONMENT_PREFIX
    assert POD["enableServiceLinks"] is False


def test_kubernetes_waits_longer_than_the_service() -> None:
    assert POD["terminationGracePeriodSeconds"] > options()["grace"].parse(VARIABLES[f"{ENVIRONMENT_PREFIX}GRACE"])
