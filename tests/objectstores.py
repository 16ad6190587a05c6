"""Object stores for tests: moto for the many, Ceph's radosgw as the real one. Each on a port of its own.

with radosgw() as server, server.in_environment():
    store = open_store(server.bucket())
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import servers

SCRIPT = Path(__file__).with_name("radosgw.sh")
MOTO = Path(__file__).with_name("moto_server.py")
PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-authtool", "radosgw", "radosgw-admin")
INSTALL = "apt-get install -y --no-install-recommends ceph-mon ceph-osd ceph-common radosgw"
START_SECONDS = 120


@dataclass(frozen=True)
class ObjectStore:
    """A running server."""

    name: str
    endpoint: str
    access: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """What reaches it, as a user would say it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """This process reaches it while the block runs."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

    def bucket(self) -> str:
        """URL of an empty prefix in an empty bucket."""
        name = f"sera-{secrets.token_hex(4)}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}/runs-of-a-team"

    def client(self):
        """botocore's own client: a second opinion on what the server holds."""
        import botocore.config
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )

    def objects(self, url: str, client=None) -> dict[str, str]:
        """Name and ETag of every object below a store's URL."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        pages = (
            (client or self.client()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        found = [entry for page in pages for entry in page.get("Contents", [])]
        return {entry["Key"].removeprefix(f"{prefix}/"): entry["ETag"] for entry in found}

    def unfinished_uploads(self, url: str) -> list[str]:
        """Keys of multipart uploads that nobody ended."""
        bucket = url.removeprefix("s3://").partition("/")[0]
        answer = self.client().list_multipart_uploads(Bucket=bucket)
        return [upload["Key"] for upload in answer.get("Uploads") or []]


@contextmanager
def moto() -> Iterator[ObjectStore]:
    """Moto's server in a process of its own."""
    port = servers.free_port()
    folder = Path(tempfile.mkdtemp(prefix="sera-moto-"))
    endpoint = f"http://127.0.0.1:{port}"
    server = servers.Service(
        [sys.executable, str(MOTO), "-H", "127.0.0.1", "-p", str(port)],
        dict(os.environ),
        folder / "moto.log",
        ready=lambda: servers.answers(endpoint),
    )
    try:
        with server:
            yield ObjectStore("moto", endpoint, "sera-access", "sera-secret")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def absent_programs() -> list[str]:
    """Programs of Ceph's that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def require_radosgw() -> None:
    """Skip the test where a program is missing."""
    if absent := absent_programs():
        pytest.skip(f"radosgw is not installed: {', '.join(absent)} missing; as root: {INSTALL}")


@contextmanager
def radosgw() -> Iterator[ObjectStore]:
    """Ceph's gateway on a cluster in memory; the test is skipped where its packages are missing."""
    require_radosgw()
    folder = Path(tempfile.mkdtemp(prefix="rgw-", dir="/tmp"))  # sockets lie in it: a short name
    ports = [str(servers.free_port()), str(servers.free_port())]
    with (folder / "start.log").open("wb") as log:
        starter = subprocess.Popen(
            ["bash", str(SCRIPT), "start", str(folder / "ceph"), *ports],
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            text=True,
        )
    try:
        line = _first_line(starter)
        if not line.startswith("http"):
            raise AssertionError(f"radosgw did not start:\n{(folder / 'start.log').read_text()[-3000:]}")
        yield ObjectStore("radosgw", *line.split())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)  # the script's daemons stay in its group
        starter.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _first_line(starter: subprocess.Popen) -> str:
    """What the script prints when all is up. Its daemons keep the pipe open, so it is not read to its end."""
    assert starter.stdout is not None
    try:
        starter.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    return starter.stdout.readline().strip()
