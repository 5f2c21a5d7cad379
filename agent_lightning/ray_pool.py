"""The worker pool over a Ray cluster: an ordinary `Pool` on each node, all of them for the same job.

    server  <-- results out, leases in -->  Pool on node A  <-->  its worker processes
            <-- results out, leases in -->  Pool on node B  <-->  its worker processes

Ray starts the pools, watches them, and does nothing else: leases and results go over HTTP from each node to the server,
as they do from one machine. A node that dies takes its attempts with it, which the server gives out anew once the
node's pool has been silent for a while; its workers are started again on the nodes that are left.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import fields

from agent_lightning.agent_source import pack_agent
from agent_lightning.exceptions import InvalidConfigError, TrainingError
from agent_lightning.leases import ENDED_JOB
from agent_lightning.loopback import loopback_host
from agent_lightning.pool import FAILED_STARTS, Pool, PoolStatus
from agent_lightning.runtime import config as runtime_config
from agent_lightning.settings import MAX_RETRIES

CHECK_S = 0.5  # how often the pools are asked how they are
EXIT_S = 10.0  # how long they may take to end their workers
_VARIABLES = ("PYTHONPATH", runtime_config.ENABLE_AIR, MAX_RETRIES)  # which workers have from whoever starts them


class RayPool:
    """Runs an agent for one job on the nodes of a Ray cluster. To be used as `Pool`.

    What agents print goes to Ray's own log, which shows it here.

    Args:
        ray_address: of the cluster, as `ray.init` takes it; "auto" for the one that this machine belongs to.
        nworkers: worker processes over all nodes, divided by their CPUs.
        server_url, job_id, agent: as `Pool`'s. The URL must lead to the server from every node, and a script lie at the
            same path on each.
        options: further arguments of each node's `Pool`.

    Raises:
        InvalidConfigError: Ray is not installed, no cluster is there, or the URL is this machine's own name for itself
            and there are others.
    """

    def __init__(self, ray_address: str, server_url: str, job_id: str, agent, nworkers: int, **options):
        self._ray = connect(ray_address)
        nodes = _nodes(self._ray)
        if loopback_host(server_url) and {node["NodeManagerHostname"] for node in nodes} != {socket.gethostname()}:
            raise InvalidConfigError(
                f"workers on other machines cannot reach the server at {server_url}",
                hint="start the server with --host 0.0.0.0, and give the client the server's address in your network",
            )
        agent = agent if isinstance(agent, dict) else pack_agent(agent)
        options.pop("on_output", None)  # a function of this process
        self._arguments = (server_url, job_id, agent)
        self._options = options
        self._nworkers = nworkers
        self._members: dict = {}  # what a pool's run will return -> its actor and worker ids
        self._counts = dict.fromkeys(("succeeded", "failed", "crashed", "timed_out"), 0)  # of nodes that are gone
        self._failed_starts = 0  # in a row, of pools that ended before they said how they are
        self._status = PoolStatus("unknown", nworkers, 0, 0, 0, 0, 0, 0)
        self._stopped = threading.Event()

    def run(self, on_status: Callable[[PoolStatus], None] | None = None) -> str:
        """As `Pool.run`; a node's pool that fails of the agent or of the server, or cannot be made, fails the whole."""
        ray = self._ray
        try:
            self._start(list(range(self._nworkers)))
            while self._members and not self._stopped.is_set():
                ended, _ = ray.wait(list(self._members), timeout=CHECK_S)
                for reference in ended:
                    self._on_end(reference)
                self._look(on_status)
            self._stop_members()
        finally:
            for member in self._members.values():
                ray.kill(member["actor"])
        return self._status.job_status

    def stop(self) -> None:
        """As `Pool.stop`."""
        self._stopped.set()

    def status(self) -> PoolStatus:
        """Where all pools together stood when they were last asked."""
        return self._status

    def _start(self, worker_ids: list[int]) -> None:
        """Starts workers, divided over the nodes that live by their CPUs."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = _nodes(self._ray)
        if not nodes:
            raise TrainingError("no node of the Ray cluster is left to run workers on")
        for node, share in zip(nodes, divide(worker_ids, [cpus_of(node) for node in nodes]), strict=True):
            if not share:
                continue
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            made = self._ray.remote(_NodePool).options(num_cpus=0, max_concurrency=3, scheduling_strategy=where)
            environ = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
            actor = made.remote(*self._arguments, share, environ, self._options)
            self._members[actor.run.remote()] = {"actor": actor, "worker_ids": share, "status": None}

    def _on_end(self, reference) -> None:
        """A pool has ended with its job, has failed, or is gone with its node: then others take over."""
        member = self._members.pop(reference)
        try:
            job_status = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from None
        except self._ray.exceptions.RayActorError as error:
            self._failed_starts += member["status"] is None
            if self._failed_starts >= FAILED_STARTS:
                raise TrainingError(f"a pool could not be started on a node: {error}") from None
            self._count(member["status"])
            time.sleep(CHECK_S)  # until Ray knows the node for dead
            self._start(member["worker_ids"])
        else:
            self._count(member["status"])
            self._status = self._status_with(job_status, [])

    def _count(self, status: PoolStatus | None) -> None:
        for name in self._counts:
            self._counts[name] += getattr(status, name) if status is not None else 0

    def _look(self, on_status: Callable[[PoolStatus], None] | None) -> None:
        asked = {member["actor"].status.remote(): member for member in self._members.values()}
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=CHECK_S) if asked else ([], [])
        for reference in answered:
            member = asked[reference]
            try:
                status = self._ray.get(reference)
            except self._ray.exceptions.RayError:  # its end will be seen in `run`
                continue
            if member["status"] is None:
                self._failed_starts = 0
            member["status"] = status
        seen = [member["status"] for member in self._members.values() if member["status"] is not None]
        states = [status.job_status for status in seen]
        before = self._status
        self._status = self._status_with(max(states, key=_ORDER.index, default=before.job_status), seen)
        if on_status and self._status != before:
            on_status(self._status)

    def _status_with(self, job_status: str, seen: list[PoolStatus]) -> PoolStatus:
        if self._status.job_status in ENDED_JOB:
            job_status = self._status.job_status
        names = [field.name for field in fields(PoolStatus) if field.name not in ("job_status", "starting")]
        totals = {name: sum(getattr(s, name) for s in seen) + self._counts.get(name, 0) for name in names}
        return PoolStatus(job_status, self._nworkers - totals["idle"] - totals["busy"], **totals)

    def _stop_members(self) -> None:
        for member in self._members.values():
            member["actor"].stop.remote()
        if self._members:
            self._ray.wait(list(self._members), num_returns=len(self._members), timeout=EXIT_S)


_ORDER = ["unknown", "queued", "running", "stopped", "failed", "succeeded"]


class _NodePool:
    """A `Pool` in a Ray actor: one node's share of the workers."""

    def __init__(self, server_url, job_id, agent, worker_ids, environ, options):
        os.environ.update(environ)
        self._pool = Pool(server_url, job_id, agent, len(worker_ids), worker_ids=worker_ids, **options)

    def run(self) -> str:
        return self._pool.run()

    def status(self) -> PoolStatus:
        return self._pool.status()

    def stop(self) -> None:
        self._pool.stop()


def connect(ray_address: str):
    """The module `ray`, connected to a cluster; one that this process has joined already is used as it is.

    Raises:
        InvalidConfigError: it is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise InvalidConfigError(
            "workers on a Ray cluster need Ray", hint="pip install 'lightning-jax[ray]'"
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address=ray_address, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InvalidConfigError(f"no Ray cluster at {ray_address!r}: {error}") from error
    return ray


def cpus(ray_address: str) -> int:
    """CPUs of a cluster's nodes, as they told Ray. Raises InvalidConfigError as `connect`."""
    return max(1, int(sum(cpus_of(node) for node in _nodes(connect(ray_address)))))


def cpus_of(node: dict) -> float:
    return node["Resources"].get("CPU", 0.0)


def divide(items: list[int], weights: list[float]) -> list[list[int]]:
    """Items to as many lists as there are weights, each next one to the list that has least for its weight.

    Where no weight is above 0 all count the same; else those of weight 0 get nothing.
    """
    weights = weights if any(weights) else [1.0] * len(weights)
    shares: list[list[int]] = [[] for _ in weights]
    able = [i for i, weight in enumerate(weights) if weight > 0]
    for item in items:
        shares[min(able, key=lambda i: (len(shares[i]) + 1) / weights[i])].append(item)
    return shares


def _nodes(ray) -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]
