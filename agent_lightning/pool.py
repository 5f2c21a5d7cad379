"""The worker pool: leases rollouts from the server and runs each in one of N warm worker processes.

    server  <-- exchange: results out, leases in -->  Pool  <-- socket -->  worker 0 .. N-1

One thread owns the workers (`run`). Two more talk to the server: the reporter sends results the moment there are any
and takes new leases in the same request; the asker long-polls for leases while workers are idle. A rollout that
overstays its time, or whose process dies, is reported with its cause; the process group is killed and replaced.
"""

import argparse
import collections
import os
import selectors
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from agent_lightning import settings
from agent_lightning.agent_source import pack_agent
from agent_lightning.exceptions import (
    AgentLightningError,
    InvalidConfigError,
    ServerConnectionError,
    TrainingError,
)
from agent_lightning.framing import pack
from agent_lightning.transport import Transport
from agent_lightning.worker_process import State, WorkerProcess

LIVE_JOB = frozenset({"queued", "pending", "running", "stopping"})
POLL_S = 10.0  # how long the server may hold a request for leases
HEARTBEAT_S = 5.0  # how often a pool with nothing to report says that it is there
CHECK_S = 1.0  # how often workers are checked for a death that their sockets did not show
EXIT_GRACE_S = 2.0
FAILED_STARTS = 3  # in a row, before the agent is taken to be at fault


@dataclass(frozen=True)
class PoolStatus:
    """A moment of a pool: the job's status, workers by state, rollouts since the start by how they ended."""

    job_status: str
    starting: int
    idle: int
    busy: int
    succeeded: int
    failed: int
    crashed: int
    timed_out: int


class Pool:
    """Runs an agent for one job.

    Args:
        server_url: base URL of the server.
        job_id: the job whose rollouts to run.
        agent: a callable `(resource, task) -> reward`, or a script as `file.py` or `file.py:function`.
        nworkers: number of worker processes, at least 1.
        api_key: the server's API key.
        give_up_s: seconds without any answer from the server before the pool ends with an error; a restart of the
            server within that time goes unnoticed.
        start_timeout_s: seconds that a worker may take to load the agent.
        on_output: called with (worker id, whole lines) for what agents print; by default they go to stderr.
        exit_with_parent: end when the process that started this one does.

    Raises:
        InvalidConfigError: `nworkers`, or an agent that cannot be sent to workers.
    """

    def __init__(
        self,
        server_url: str,
        job_id: str,
        agent: Callable | str,
        nworkers: int,
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        max_retries: int = settings.DEFAULT_MAX_RETRIES,
        verify_ssl: bool = True,
        give_up_s: float = 300.0,
        start_timeout_s: float = 300.0,
        on_output: Callable[[int, str], None] | None = None,
        exit_with_parent: bool = False,
    ):
        if nworkers < 1:
            raise InvalidConfigError(f"nworkers={nworkers} is not a number of processes from 1 on")
        self._server_url, self._nworkers = server_url, nworkers
        self._path = f"/api/jobs/{job_id}/exchange"
        self._pool_id = uuid.uuid4().hex
        self._agent = pack_agent(agent)
        self._give_up_s, self._start_timeout_s = give_up_s, start_timeout_s
        self._on_output = on_output or _print_output
        self._transport = Transport(
            server_url, api_key=api_key, timeout_s=timeout_s, max_retries=max_retries, verify_ssl=verify_ssl
        )
        self._parent_pid = os.getppid() if exit_with_parent else None
        # The pool's own thread alone touches these:
        self._workers: dict[int, WorkerProcess] = {}
        self._counts = collections.Counter()
        self._failed_starts = 0
        # Shared with the reporter and the asker, under the condition:
        self._changed = threading.Condition()
        self._idle: list[WorkerProcess] = []
        self._results: list[dict] = []
        self._inbox: collections.deque[dict] = collections.deque()
        self._cancelled: set[str] = set()
        self._held: set[str] = set()  # leases from their arrival until the server has their result
        self._asked = 0  # idle workers for whom a request for leases is under way
        self._reporting = False
        self._job_status = "running"
        self._failure: BaseException | None = None
        self._stopped = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)

    def run(self, on_status: Callable[[PoolStatus], None] | None = None) -> str:
        """Runs rollouts until the job has ended or `stop` is called. One call per pool.

        Args:
            on_status: called from this thread whenever something has changed.

        Returns:
            The job's last known status.

        Raises:
            TrainingError: the agent cannot be loaded; holds its traceback.
            InvalidConfigError: the agent script does not say which function is the agent.
            ServerConnectionError: the server stayed away for `give_up_s`.
        """
        self._hello = {"agent": self._agent, "pythonpath": os.environ.get("PYTHONPATH")}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_in, selectors.EVENT_READ, lambda events: self._wake_in.recv(4096))
        last, next_check = None, 0.0
        try:
            self._start_workers()
            for lane in (self._report, self._ask):
                threading.Thread(target=self._lane, args=(lane,), daemon=True, name=f"pool-{lane.__name__}").start()
            while self._job_status in LIVE_JOB and not self._stopped:
                for key, events in self._selector.select(self._wait_s(next_check)):
                    key.data(events)
                if self._failure:
                    raise self._failure
                self._hand_out()
                now = time.monotonic()
                self._watch(now, check=now >= next_check)
                if now >= next_check:
                    next_check = now + CHECK_S
                if on_status and (status := self.status()) != last:
                    last = status
                    on_status(status)
        finally:
            self._close()
        if on_status:
            on_status(self.status())
        return self._job_status

    def stop(self) -> None:
        """Makes `run` return now, from any thread or signal handler; rollouts under way are killed."""
        self._stopped = True
        self._wake()

    def status(self) -> PoolStatus:
        """Where the pool stands now."""
        states = collections.Counter(worker.state for worker in self._workers.values())
        counts = self._counts
        return PoolStatus(
            job_status=self._job_status,
            starting=self._nworkers - states[State.IDLE] - states[State.BUSY],
            idle=states[State.IDLE],
            busy=states[State.BUSY],
            succeeded=counts["succeeded"],
            failed=counts["exception"] + counts["invalid_reward"],
            crashed=counts["crash"],
            timed_out=counts["timeout"],
        )

    # ---- workers: only the thread in run() -----------------------------------------------------------------------

    def _start_workers(self) -> None:
        """Starts workers that are missing, a core's worth at a time so that the first are ready early."""
        starting = sum(worker.state is State.STARTING for worker in self._workers.values())
        for worker_id in range(self._nworkers):
            if starting >= (os.cpu_count() or 1):
                return
            if worker_id in self._workers:
                continue
            worker = WorkerProcess(worker_id, pack(self._hello | {"worker_id": worker_id}), self._start_timeout_s)
            self._workers[worker_id] = worker
            self._selector.register(worker.output, selectors.EVENT_READ, lambda _, w=worker: self._on_print(w))
            self._selector.register(worker.socket, selectors.EVENT_READ, lambda e, w=worker: self._on_socket(w, e))
            self._send(worker)
            starting += 1

    def _send(self, worker: WorkerProcess) -> None:
        key = self._selector.get_key(worker.socket)
        wanted = selectors.EVENT_READ if worker.flush() else selectors.EVENT_READ | selectors.EVENT_WRITE
        if key.events != wanted:
            self._selector.modify(worker.socket, wanted, key.data)

    def _on_socket(self, worker: WorkerProcess, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(worker)
        if not events & selectors.EVENT_READ:
            return
        messages = worker.read()
        if messages is None:
            self._selector.unregister(worker.socket)
            if worker.state is not State.DYING:
                self._lose(worker, "crash")
            return
        for message in messages:
            if worker.state is not State.DYING:  # too late otherwise: it has been given up
                self._on_message(worker, message)

    def _on_message(self, worker: WorkerProcess, message: dict) -> None:
        kind = message.pop("kind")
        if kind == "load_failed":
            error = message["error"]
            if error["type"] == InvalidConfigError.__name__:
                raise InvalidConfigError(error["message"])
            raise TrainingError(
                f"the agent cannot be loaded in a worker: {error['type']}: {error['message']}\n{error['traceback']}"
            )
        with self._changed:
            if kind == "ready":
                self._failed_starts = 0
                worker.finished()
            else:
                worker.finished()
                self._counts[message["cause"] or "succeeded"] += 1
                self._results.append(message)
            self._idle.append(worker)
            self._changed.notify_all()
        if kind == "ready":
            self._start_workers()

    def _on_print(self, worker: WorkerProcess) -> None:
        text, ended = worker.read_output()
        if text and worker.state is not State.DYING:  # what is printed in dying goes into the error
            self._on_output(worker.worker_id, text)
        if ended:
            self._selector.unregister(worker.output)

    def _hand_out(self) -> None:
        """Cancels what the server has taken back, and gives waiting leases to idle workers."""
        if not self._inbox and not self._cancelled:
            return
        started = []
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            self._inbox = collections.deque(lease for lease in self._inbox if lease["lease_id"] not in cancelled)
            while self._inbox and self._idle:
                started.append((self._idle.pop(), self._inbox.popleft()))
        for worker, lease in started:
            model_api = f"{self._server_url}/rollout/{lease['token']}"
            worker.run(lease, pack(lease | {"model_api": model_api}))
            self._send(worker)
        for worker in self._workers.values():
            if worker.state is State.BUSY and worker.lease["lease_id"] in cancelled:
                self._lose(worker, "cancelled")

    def _watch(self, now: float, check: bool) -> None:
        """Gives up what is overdue, buries the dead, and now and then looks for unseen deaths."""
        for worker in list(self._workers.values()):
            if worker.state is State.DYING:
                if now >= worker.deadline or worker.has_exited():
                    self._bury(worker)
            elif now >= worker.deadline:
                self._lose(worker, "timeout")
            elif check and worker.has_exited():
                self._lose(worker, "crash")
        if check and self._parent_pid not in (None, os.getppid()):
            self._stopped = True

    def _lose(self, worker: WorkerProcess, cause: str) -> None:
        with self._changed:
            if worker in self._idle:
                self._idle.remove(worker)
        starting = worker.state is State.STARTING
        worker.give_up(cause)
        self._failed_starts += starting

    def _bury(self, worker: WorkerProcess) -> None:
        ending = worker.kill()
        worker.read_output()  # what it printed last, for the error
        for stream in (worker.socket, worker.output):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        worker.close()
        del self._workers[worker.worker_id]
        if worker.lease is None:
            if self._failed_starts >= FAILED_STARTS:
                what = f"took over {self._start_timeout_s:g} s" if worker.cause == "timeout" else ending
                raise TrainingError(f"a worker that was loading the agent {what}; it printed:\n{worker.printed()}")
        else:
            self._report_loss(worker, ending)
        self._start_workers()

    def _report_loss(self, worker: WorkerProcess, ending: str) -> None:
        lease, cause = worker.lease, worker.cause
        with self._changed:
            if cause == "cancelled":
                return
            name, message = {
                "timeout": ("RolloutTimeout", f"the agent did not return within {lease['timeout_s']:g} s; killed"),
                "crash": ("WorkerCrash", f"the worker process {ending} during the rollout"),
            }[cause]
            error = {"type": name, "message": message, "traceback": worker.printed()}
            self._counts[cause] += 1
            self._results.append(
                {
                    "lease_id": lease["lease_id"],
                    "reward": None,
                    "error": error,
                    "cause": cause,
                    "events": [],
                    "duration_s": time.monotonic() - worker.started,
                }
            )
            self._changed.notify_all()

    def _wait_s(self, next_check: float) -> float:
        """Seconds until something is due although nothing happens."""
        now = time.monotonic()
        due = min((worker.deadline for worker in self._workers.values()), default=next_check)
        if any(worker.state is State.DYING for worker in self._workers.values()):
            due = min(due, now + 0.01)
        return max(0.0, min(due, next_check) - now)

    def _close(self) -> None:
        """Idle workers leave on their own; all others, and all that they started, are killed."""
        self._stopped = True
        with self._changed:
            self._changed.notify_all()
        leaving = [worker for worker in self._workers.values() if worker.state is State.IDLE]
        for worker in self._workers.values():
            if worker.state is not State.IDLE:
                worker.kill()
        for worker in leaving:
            worker.socket.close()
        deadline = time.monotonic() + EXIT_GRACE_S
        while (leaving := [worker for worker in leaving if not worker.has_exited()]) and time.monotonic() < deadline:
            for worker in leaving:
                text, _ = worker.read_output()  # or a worker could hang on a full pipe
                if text:
                    self._on_output(worker.worker_id, text)
            time.sleep(0.005)
        for worker in self._workers.values():
            worker.kill()
            worker.close()
        self._workers.clear()
        self._selector.close()

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"!")
        except BlockingIOError:  # it is awake already
            pass

    # ---- the server: the reporter and the asker ------------------------------------------------------------------

    def _lane(self, lane: Callable[[], None]) -> None:
        try:
            while not self._stopped:
                lane()
        except BaseException as error:
            self._failure = error
            self._wake()

    def _free(self) -> int:
        return len(self._idle) - len(self._inbox) - self._asked

    def _report(self) -> None:
        """Sends results, with a request for as many new leases as workers are free."""
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._stopped, timeout=HEARTBEAT_S)
            if self._stopped:
                return
            results, self._results = self._results, []
            self._reporting = True
            want = max(0, self._free())
            self._asked += want
        try:
            self._exchange(results, want, 0.0)
        finally:
            with self._changed:
                self._reporting = False
                self._changed.notify_all()

    def _ask(self) -> None:
        """Waits at the server for leases, for workers that are free although no result is under way."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (self._free() > 0 and not self._results and not self._reporting)
            )
            if self._stopped:
                return
            want = self._free()
            self._asked += want
        self._exchange([], want, POLL_S)

    def _exchange(self, results: list[dict], want: int, wait_s: float) -> None:
        """One exchange, repeated until the server answers, and what its reply means for the pool."""
        sent = {result["lease_id"] for result in results}
        failing_since = None
        while True:
            with self._changed:
                running = list(self._held - sent)
            body = {
                "pool_id": self._pool_id,
                "results": results,
                "running": running,
                "want": want,
                "wait_s": wait_s,
            }
            try:
                reply = self._transport.request("POST", self._path, json=body)
                break
            except ServerConnectionError:
                now = time.monotonic()
                failing_since = failing_since or now
                if self._stopped or now - failing_since > self._give_up_s:
                    raise
        with self._changed:
            self._asked -= want
            self._held -= sent.union(reply["cancelled"])
            leases = [lease for lease in reply["leases"] if lease["lease_id"] not in self._held]
            self._held.update(lease["lease_id"] for lease in leases)
            self._inbox.extend(leases)
            self._cancelled.update(reply["cancelled"])
            self._job_status = reply["job_status"]
            self._changed.notify_all()
        self._wake()


def _print_output(worker_id: int, text: str) -> None:
    sys.stderr.write("".join(f"[worker {worker_id}] {line}\n" for line in text.splitlines()))


def main(argv: list[str] | None = None) -> int:
    """`python -m agent_lightning.pool`: a pool as a process of its own; the API key comes from the environment."""
    parser = argparse.ArgumentParser(prog="python -m agent_lightning.pool", description="Run workers for a job.")
    parser.add_argument("--server-url", default=None, help=f"default: ${settings.SERVER_URL}")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--agent-script", required=True, help="file.py or file.py:function")
    parser.add_argument("--nworkers", type=int, required=True)
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="end when the starting process does, and ignore Ctrl-C"
    )
    options = parser.parse_args(argv)
    try:
        pool = Pool(
            settings.server_url(options.server_url),
            options.job_id,
            options.agent_script,
            options.nworkers,
            api_key=settings.api_key(),
            max_retries=settings.max_retries(),
            exit_with_parent=options.exit_with_parent,
        )
        signal.signal(signal.SIGTERM, lambda *_: pool.stop())
        if options.exit_with_parent:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool.run()
    except AgentLightningError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
