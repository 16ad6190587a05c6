"""The manifests of deployments/kubernetes: Kubernetes' own schemas, compose.yaml's settings, no loose ends.

None was applied to a cluster. KubeRay's schema is not in a package; its fields are written down here, from
ray-operator/apis/ray/v1/raycluster_types.go of ray-project/kuberay.
"""

import json
import re
import stat
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import composefile
import jsonschema
import kubernetes_validate
import pytest
import yaml

FOLDER = composefile.ROOT / "deployments" / "kubernetes"
RAY = FOLDER / "ray"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml")
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
RAY_KUSTOMIZATION = yaml.safe_load((RAY / "kustomization.yaml").read_text())
COMPOSE = composefile.filled(
    composefile.read()["services"],
    dict.fromkeys(("PREFECT_AUTH_STRING", "POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"), "SECRET"),
)
KUBERNETES = "1.32"

COUNT = {"type": "integer", "minimum": 0}
GROUP = {
    "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
    "template": {"type": "object", "required": ["spec"]},
}
WORKER_GROUP = {
    **{name: GROUP[name] for name in ("rayStartParams", "template")},
    **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), COUNT),
    "groupName": {"type": "string", "pattern": "^[a-z0-9-]+$"},
}
RAY_CLUSTER = {
    "type": "object",
    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "headGroupSpec": {
            "required": ["rayStartParams", "template"],
            "properties": GROUP,
            "additionalProperties": False,
        },
        "workerGroupSpecs": {
            "items": {
                "required": list(WORKER_GROUP),
                "properties": WORKER_GROUP,
                "additionalProperties": False,
            },
            "minItems": 1,
        },
    },
}


@cache
def objects() -> tuple[dict[str, Any], ...]:
    """Every object of the manifests."""
    return tuple(one for path in FILES for one in yaml.safe_load_all(path.read_text()))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects() if one["kind"] == kind}


def ray_groups() -> list[dict[str, Any]]:
    """The groups of the Ray cluster, its head first."""
    (cluster,) = of_kind("RayCluster").values()
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def templates() -> list[dict[str, Any]]:
    """Every pod template."""
    made = [
        one["spec"]["template"] for one in objects() if one["kind"] in ("StatefulSet", "Deployment", "Job")
    ]
    return [*made, *(group["template"] for group in ray_groups())]


def containers_of(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def containers() -> dict[str, dict[str, Any]]:
    """Those that compose.yaml starts too, by name."""
    made = [one for template in templates() for one in containers_of(template)]
    return {one["name"]: one for one in made if one["name"] in COMPOSE}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The secrets that secrets.sh and kustomization.yaml make: their keys and values by name."""
    folder = tmp_path_factory.mktemp("kubernetes")
    write_secrets(folder)
    return {
        one["name"]: dict(line.split("=", 1) for line in (folder / one["envs"][0]).read_text().splitlines())
        for one in KUSTOMIZATION["secretGenerator"]
    }


def write_secrets(folder: Path) -> str:
    (folder / "secrets.sh").write_text((FOLDER / "secrets.sh").read_text())
    done = subprocess.run(["sh", folder / "secrets.sh"], cwd="/", capture_output=True, text=True, check=True)
    return done.stdout


def valid(one: dict[str, Any]) -> None:
    kubernetes_validate.validate(one, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_object_keeps_to_kubernetes_schema(path):
    made = list(yaml.safe_load_all(path.read_text()))
    for one in made:
        if one["kind"] != "RayCluster":
            valid(one)
    assert made


def test_the_schema_refuses_a_misspelt_field():
    bad = json.loads(json.dumps(of_kind("Deployment")["worker"]))
    bad["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        valid(bad)


def test_the_ray_cluster_has_the_fields_of_kuberay_and_pods_of_kubernetes():
    (cluster,) = of_kind("RayCluster").values()
    assert cluster["apiVersion"] == "ray.io/v1"
    jsonschema.validate(cluster["spec"], RAY_CLUSTER)
    for group in ray_groups():
        valid({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]})
    for group in ray_groups()[1:]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_ray_cluster_s_gpus_are_on_its_workers_alone():
    head, *workers = ray_groups()
    found = [
        containers_of(group["template"])[0]["resources"]["limits"].get("nvidia.com/gpu") for group in workers
    ]
    assert found == [1]
    assert "nvidia.com/gpu" not in containers_of(head["template"])[0]["resources"]["limits"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_a_ray_node_is_probed_at_a_port_it_has():
    for group in ray_groups():
        (container,) = containers_of(group["template"])
        ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        probed = {container[probe]["tcpSocket"]["port"] for probe in ("readinessProbe", "livenessProbe")}
        assert probed <= set(ports)
        assert group["rayStartParams"].get("node-manager-port") == ports.get("node-manager")


def test_every_file_says_that_it_was_not_run_and_is_part_of_a_kustomization():
    for path in [*FILES, FOLDER / "kustomization.yaml", RAY / "kustomization.yaml"]:
        assert path.read_text().startswith("# Not run: "), path.name
    listed = {FOLDER / name for name in KUSTOMIZATION["resources"]}
    assert {*listed, *(RAY / name for name in RAY_KUSTOMIZATION["resources"])} == set(FILES)
    assert {KUSTOMIZATION["namespace"], RAY_KUSTOMIZATION["namespace"]} == set(of_kind("Namespace"))


def test_images_and_commands_are_those_of_compose():
    assert set(containers()) == set(COMPOSE) - {"worker-gpu"}
    for name, container in containers().items():
        assert container["image"] == COMPOSE[name]["image"], name
        assert "command" not in container  # which would replace the image's entry point, not its arguments
    args = {name: [*containers()[name].get("args", ())] for name in containers()}
    for name in ("prefect-server", "seaweedfs", "bucket", "postgres"):
        assert args[name] == COMPOSE[name].get("command", []), name
    as_there = ["process" if word == "kubernetes" else word for word in args["worker"]]
    assert as_there == COMPOSE["worker"]["command"]
    assert args["setup"][:4] == [*COMPOSE["setup"]["command"], "--pool-type", "kubernetes"]
    ray = {container["image"] for group in ray_groups() for container in containers_of(group["template"])}
    assert ray == {COMPOSE["worker-gpu"]["image"]}


def given(container: dict[str, Any], secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """A container's environment; what comes from a secret is SECRET."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= of_kind("ConfigMap")[source["configMapRef"]["name"]]["data"]
        else:
            found |= {
                key: "SECRET" if key.endswith("KEY_ID") or "SECRET" in key else value
                for key, value in secrets[source["secretRef"]["name"]].items()
            }
    for one in container.get("env", ()):
        if "value" in one:
            found[one["name"]] = one["value"]
        elif "secretKeyRef" in one["valueFrom"]:
            reference = one["valueFrom"]["secretKeyRef"]
            assert reference["key"] in secrets[reference["name"]], reference
            found[one["name"]] = "SECRET"
    return found


@pytest.mark.parametrize("name", sorted(set(COMPOSE) - {"worker-gpu"}))
def test_the_environment_is_that_of_compose(name, secrets):
    wanted = {key: value for key, value in COMPOSE[name]["environment"].items() if value}
    if name == "worker":  # flow runs are not its processes: the pool gives each its keys
        wanted = {key: value for key, value in wanted.items() if not key.startswith("AWS_")}
    if name == "bucket":  # it does not ask the server
        del wanted["PREFECT_API_AUTH_STRING"]
    found = given(containers()[name], secrets)
    assert {key: found.get(key) for key in wanted} == wanted


def test_no_secret_is_in_a_file_and_each_is_random_kept_and_private(tmp_path, secrets):
    assert not of_kind("Secret")
    literal = [one for name in containers() for one in containers()[name].get("env", ()) if "value" in one]
    private = re.compile(r"PASSWORD|ACCESS_KEY|AUTH_STRING(?!_SECRET)")
    assert not [one["name"] for one in literal if private.search(one["name"])]
    assert "kept" not in write_secrets(tmp_path)
    files = {path: path.read_text() for path in sorted((tmp_path / "secrets").iterdir())}
    assert {path.name for path in files} == {
        Path(one["envs"][0]).name for one in KUSTOMIZATION["secretGenerator"]
    }
    assert write_secrets(tmp_path).count("kept") == len(files)
    for path, text in files.items():
        assert path.read_text() == text and stat.S_IMODE(path.stat().st_mode) == 0o600
    one = dict(line.split("=", 1) for text in files.values() for line in text.splitlines())
    other = {key: value for values in secrets.values() for key, value in values.items()}
    for key in ("PREFECT_AUTH_STRING", "POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        assert len(one[key]) >= 48 and one[key] != other[key]
    for ignored in (".gitignore", ".dockerignore"):
        assert "deployments/kubernetes/secrets" in (composefile.ROOT / ignored).read_text()


def test_every_service_finds_pods_and_a_port_of_theirs():
    for name, service in of_kind("Service").items():
        selector = service["spec"]["selector"].items()
        (template,) = [
            one for one in templates() if selector <= one.get("metadata", {}).get("labels", {}).items()
        ]
        ports = {
            port["name"]: port["containerPort"] for one in containers_of(template) for port in one["ports"]
        }
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], name


def test_every_address_is_a_service_with_that_port(secrets):
    ports = {
        name: {port["port"] for port in one["spec"]["ports"]} for name, one in of_kind("Service").items()
    }
    settings = of_kind("ConfigMap")["sera-settings"]["data"]
    for url in (settings["PREFECT_API_URL"], secrets["sera-s3"]["AWS_ENDPOINT_URL"]):
        host, port = re.fullmatch(r"http://([\w-]+):(\d+)(?:/api)?", url).groups()
        assert int(port) in ports[host]
    server = given(containers()["prefect-server"], secrets)
    assert int(server["PREFECT_SERVER_DATABASE_PORT"]) in ports[server["PREFECT_SERVER_DATABASE_HOST"]]


def test_selectors_volumes_and_accounts_lead_somewhere():
    for one in objects():
        if one["kind"] in ("StatefulSet", "Deployment"):
            labels = one["spec"]["template"]["metadata"]["labels"]
            assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        if one["kind"] == "StatefulSet":
            assert one["spec"]["serviceName"] in of_kind("Service")
            claimed = {claim["metadata"]["name"] for claim in one["spec"]["volumeClaimTemplates"]}
            mounted = {mount["name"] for mount in containers_of(one["spec"]["template"])[0]["volumeMounts"]}
            assert claimed == mounted
        elif "template" in one.get("spec", {}):
            for volume in one["spec"]["template"]["spec"].get("volumes", ()):
                assert volume["persistentVolumeClaim"]["claimName"] in of_kind("PersistentVolumeClaim")
    accounts = {template["spec"].get("serviceAccountName") for template in templates()} - {None}
    assert accounts == set(of_kind("ServiceAccount"))
    (binding,) = of_kind("RoleBinding").values()
    assert binding["roleRef"]["name"] in of_kind("Role")
    assert {subject["name"] for subject in binding["subjects"]} == accounts


def test_the_worker_may_make_jobs_and_read_pods_and_nothing_else():
    (role,) = of_kind("Role").values()
    allowed = {resource: set(rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]}
    assert allowed["jobs"] >= {"create", "delete", "watch"}
    reading = {"get", "list", "watch"}
    assert all(verbs == reading for resource, verbs in allowed.items() if resource != "jobs")
    assert "secrets" not in allowed


def test_pods_have_no_privileges_and_no_variables_of_services():
    for template in templates():
        pod = template["spec"]
        assert pod["enableServiceLinks"] is False  # PREFECT_SERVER_PORT of a service would be a setting
        assert ("serviceAccountName" in pod) != (pod.get("automountServiceAccountToken") is False)
        for container in containers_of(template):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, container["name"]
            assert "memory" in container["resources"]["limits"] and "requests" in container["resources"]
            if container["image"].startswith("sera-flow"):
                assert pod["securityContext"]["runAsNonRoot"] is True
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_pool_and_the_worker_name_secrets_that_are_made(secrets):
    assert KUSTOMIZATION["generatorOptions"]["disableNameSuffixHash"] is True
    template = json.loads((FOLDER.parent / "work_pools" / "kubernetes.json").read_text())
    variables = template["variables"]["properties"]
    assert set(variables["secret"]["description"].split(": ")[1].rstrip(".").split(", ")) <= set(
        secrets[variables["secret"]["default"]]
    )
    assert variables["namespace"]["default"] in of_kind("Namespace")
    worker = given(containers()["worker"], secrets)
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert worker[f"{prefix}_KEY"] in secrets[worker[f"{prefix}_NAME"]]


def test_one_image_is_named_everywhere():
    (image,), (ray,) = KUSTOMIZATION["images"], RAY_KUSTOMIZATION["images"]
    of_runs = containers()["setup"]["args"][-1]
    assert f"{ray['newName']}:{ray['newTag']}" == of_runs
    assert image["newName"] == ray["newName"] and image["name"] == ray["name"] == "sera-flow"
    assert f"sera-flow:{image['newTag']}" == COMPOSE["worker"]["image"]
    template = json.loads((FOLDER.parent / "work_pools" / "kubernetes.json").read_text())
    assert template["variables"]["properties"]["image"]["default"] == of_runs
