"""`sera export --push-to`, against a small server that answers as the hub does."""

import base64
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from commandline import process

pytestmark = pytest.mark.slow

TOKEN = "hf_secretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """Repositories, their visibility, and the files of the last commit."""

    repositories: ClassVar[dict[str, bool]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    tokens: ClassVar[set[str]] = set()
    failing = False

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        self.tokens.add(self.headers["Authorization"])
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").split("?")[0].removesuffix("/revision/main")
        self.tokens.add(self.headers["Authorization"])
        if name not in self.repositories:
            self.answer({"error": "Repository not found"}, 404)
            return
        self.answer({"id": name, "private": self.repositories[name], "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.body()
        if self.failing:
            self.answer({"error": f"not with {self.headers['Authorization']}"}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                self.answer({"error": "exists", "url": self.url(name)}, 409)
            else:
                self.repositories[name] = asked.get("visibility") == "private"
                self.answer({"url": self.url(name), "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            name = self.path.removeprefix("/api/models/").split("/commit/")[0]
            commit = {"commitUrl": f"{self.url(name)}/commit/{'0' * 40}", "commitOid": "0" * 40}
            self.answer({**commit, "success": True})
        else:
            self.answer({"error": self.path}, 500)

    def url(self, name: str) -> str:
        return f"http://{self.headers['Host']}/{name}"

    def log_message(self, *_) -> None:
        """Quiet."""


@pytest.fixture
def hub():
    """The server, empty; its class holds what was done."""
    Hub.repositories, Hub.files, Hub.tokens, Hub.failing = {}, {}, set(), False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.address = f"http://127.0.0.1:{server.server_port}"
    yield Hub
    server.shutdown()
    server.server_close()


def export(hub, store, *args: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    return process("export", "first", "--store", store, *args, env=environment, timeout=120)


def test_a_pushed_policy_is_private_and_whole(hub, kept_store, tmp_path):
    done = export(hub, kept_store, "--push-to", "team/policy", "--to", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pushed_to"] == f"{hub.address}/team/policy" and found["to"] == str(tmp_path / "out")
    assert hub.repositories == {"team/policy": True}
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "README.md", "lineage.json", "config.json"} <= hub.files.keys()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr


def test_it_is_public_only_when_that_is_asked_for(hub, kept_store):
    done = export(hub, kept_store, "--push-to", "team/policy", "--public")
    assert done.returncode == 0, done.stderr
    assert hub.repositories == {"team/policy": False} and "lineage.json" in hub.files


def test_nothing_is_sent_to_a_public_repository_that_was_not_named_public(hub, kept_store):
    hub.repositories["team/policy"] = False
    refused = export(hub, kept_store, "--push-to", "team/policy")
    assert refused.returncode == 2 and "exists and is public" in refused.stderr
    assert hub.files == {}
    assert export(hub, kept_store, "--push-to", "team/policy", "--public").returncode == 0


def test_a_private_repository_that_exists_is_pushed_to_again(hub, kept_store):
    hub.repositories["team/policy"] = True
    assert export(hub, kept_store, "--push-to", "team/policy").returncode == 0
    assert hub.repositories == {"team/policy": True} and hub.files


def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub, kept_store):
    hub.failing = True
    refused = export(hub, kept_store, "--push-to", "team/policy")
    assert refused.returncode == 1 and "team/policy: the push failed" in refused.stderr
    assert TOKEN not in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["policy", "a/b/c", "../x", "team/..", "https://x/y", "tеam/policy", ""])
def test_what_is_no_repository_is_refused_before_anything_is_written(kept_store, sera, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "give ORG/NAME" in sera("export", "first", "--store", kept_store, f"--push-to={name}", code=2).err


def test_without_a_token_in_the_environment_nothing_begins(kept_store, tmp_path, sera, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    command = [
        "export",
        "first",
        "--store",
        str(kept_store),
        "--push-to",
        "a/b",
        "--to",
        str(tmp_path / "out"),
    ]
    assert "HF_TOKEN" in sera(*command, code=2).err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--public", "--to", "x"]])
def test_an_export_to_nowhere_and_a_public_folder_are_refused(kept_store, sera, flags):
    assert "--push-to" in sera("export", "first", "--store", kept_store, *flags, code=2).err
