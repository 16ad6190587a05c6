"""A Ray cluster of several nodes on this machine, each a process group that can be killed."""

import contextlib
import logging
import os
from collections.abc import Iterator

import psutil


class Nodes:
    """A head that does no work, and nodes of one CPU each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        quiet = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **quiet})
        self.address = self._cluster.address
        self._nodes = [self._cluster.add_node(num_cpus=1, wait=False) for _ in range(count)]
        self._cluster.wait_for_nodes()

    def kill(self, number: int) -> None:
        """SIGKILL for a node and everything that runs on it."""
        from ray._private.ray_constants import PROCESS_TYPE_RAYLET

        (raylet,) = self._nodes[number].all_processes[PROCESS_TYPE_RAYLET]
        node = psutil.Process(raylet.process.pid)
        for process in (node, *node.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self) -> None:
        """End every node."""
        self._cluster.shutdown()


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Nodes]:
    """A cluster that ends with the block."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray").setLevel(logging.ERROR)
    made = Nodes(nodes)
    try:
        yield made
    finally:
        made.end()
