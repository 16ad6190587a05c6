"""Prefect as people have it, for tests: Postgres, a server, what `sera deploy` makes, and a worker."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import servers


@dataclass
class Place:
    """A Prefect server with a worker's hands."""

    server: servers.Service
    hands: servers.Service

    @property
    def environment(self) -> dict[str, str]:
        """What reaches the server."""
        return self.server.environment


@contextmanager
def place(home: Path) -> Iterator[Place]:
    """Everything started, deployed and ready."""
    with servers.postgres() as database, servers.prefect_server(home, database.url) as server:
        own_flows = str(Path(__file__).parent / "recovery")
        server.environment["PYTHONPATH"] = os.pathsep.join([own_flows, os.environ.get("PYTHONPATH", "")])
        servers.sera(server.environment, "deploy", "--store", str(home / "store"))
        with servers.worker(server.environment) as hands:
            yield Place(server, hands)
