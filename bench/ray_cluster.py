"""A Ray cluster of several nodes on this machine, for `kill_workers.py`: collections on it, and what is killed."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from functools import partial
from writesae import cli
from writesae.collect import collect_on_ray
from writesae.collect.command import prepare
arguments, out, settings = json.loads(sys.argv[1])
command = cli.parser("collect").parse_args(arguments)
sys.exit(0 if collect_on_ray(partial(prepare, command), out, **settings)["complete"] else 3)
"""


def children(pid: int) -> dict[int, str]:
    """{process: its title} of a process's children."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdecimal() and int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found[int(path.name)] = (path / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            pass
    return found


class Cluster:
    """A head without CPUs, and nodes of one CPU each."""

    def __init__(self, nodes: int):
        from ray.cluster_utils import Cluster as RayCluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self.ray = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(nodes):
            self.ray.add_node(num_cpus=1)

    def begin(self, arguments: argparse.Namespace, out: Path, settings: dict) -> Collection:
        """Begins a collection, as `writesae collect --engine ray` of these arguments does."""
        return Collection(self.ray, arguments, out, settings)

    def end(self) -> None:
        self.ray.shutdown()


class Collection:
    """A driver on the cluster, and what it uses."""

    def __init__(self, cluster, arguments: argparse.Namespace, out: Path, settings: dict):
        given = ["collect", arguments.corpus, *(x for sae in arguments.sae or [] for x in ("--sae", sae)), "--out", "-"]
        self.command = [sys.executable, "-c", SCRIPT, json.dumps([given, str(out), settings])]
        self.cluster = cluster
        self.driver = self._start()

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(self.command, env={**os.environ, "RAY_ADDRESS": self.cluster.address})

    def running(self) -> bool:
        return self.driver.poll() is None

    def kill(self, rng: random.Random) -> str | None:
        """Kills a worker at a unit, a node or the driver, and starts the latter two anew; says which."""
        if not self.running():
            return None
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.cluster.worker_nodes]
        busy = [pid for raylet in raylets for pid, title in children(raylet).items() if "do_unit" in title]
        if not busy:
            return None  # all are loading
        what = rng.choice(("worker", "node", "driver"))
        if what == "worker":
            os.kill(rng.choice(busy), signal.SIGKILL)
            return what
        if what == "node":
            node = rng.choice(list(self.cluster.worker_nodes))
            self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(num_cpus=1)
            return what
        self.driver.kill()
        self.driver.wait()
        self.driver = self._start()
        return what

    def end(self) -> list[int]:
        return [self.driver.wait()]
