"""The worker pool: leases rollouts from the server and runs each in one of N warm worker processes.

    server  <-- results out, leases in -->  Pool  <-- socket -->  worker 0 .. N-1

One thread owns the workers (`Pool.run`); `leases.py` talks to the server. A rollout that overstays its time, or whose
process dies, is reported with its cause, and the worker with all that it started is killed and replaced.
"""

import argparse
import collections
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent_lightning import settings
from agent_lightning.agent_source import pack_agent
from agent_lightning.exceptions import AgentLightningError, InvalidConfigError, TrainingError
from agent_lightning.framing import pack
from agent_lightning.leases import ENDED_JOB, Leases
from agent_lightning.loopback import direct
from agent_lightning.transport import Transport
from agent_lightning.worker_process import State, WorkerProcess

CHECK_S = 1.0  # how often workers are checked for a death that their sockets did not show
EXIT_GRACE_S = 2.0
FAILED_STARTS = 3  # in a row, before the agent is taken to be at fault
_MAKE_CLIENTS_INSIDE = "create clients inside the agent: the model's URL and key are set for each rollout, not before"


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
        agent: a callable `(resource, task) -> reward`, a script as `file.py` or `file.py:function`, or what
            `pack_agent` made of either.
        nworkers: number of worker processes, at least 1.
        api_key: the server's API key.
        give_up_s: seconds without any answer from the server before the pool ends with an error; a restart of the
            server within that time goes unnoticed.
        start_timeout_s: seconds that a worker may take to load the agent.
        on_output: called with (worker id, text) for what agents print; by default it goes to stderr. The text is whole
            lines, but for a rollout's last one that has no end and for pieces of a very long one.
        worker_ids: the workers' numbers, `nworkers` of them; by default from 0 on.

    Raises:
        InvalidConfigError: `nworkers`, or an agent that cannot be sent to workers.
    """

    def __init__(
        self,
        server_url: str,
        job_id: str,
        agent: Callable | str | dict,
        nworkers: int,
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        max_retries: int = settings.DEFAULT_MAX_RETRIES,
        verify_ssl: bool = True,
        give_up_s: float = 300.0,
        start_timeout_s: float = 300.0,
        on_output: Callable[[int, str], None] | None = None,
        worker_ids: Sequence[int] | None = None,
    ):
        if nworkers < 1:
            raise InvalidConfigError(f"nworkers={nworkers} is not a number of processes from 1 on")
        self._server_url, self._nworkers = server_url, nworkers
        self._worker_ids = range(nworkers) if worker_ids is None else worker_ids
        self._agent = agent if isinstance(agent, dict) else pack_agent(agent)
        self._start_timeout_s, self._verify_ssl = start_timeout_s, verify_ssl
        self._on_output = on_output or _print_output
        self._transport = Transport(
            server_url, api_key=api_key, timeout_s=timeout_s, max_retries=max_retries, verify_ssl=verify_ssl
        )
        self._leases = Leases(self._transport, job_id, give_up_s=give_up_s, wake=self._wake)
        self._workers: dict[int, WorkerProcess] = {}
        self._idle: list[WorkerProcess] = []
        self._counts = collections.Counter()
        self._failed_starts = 0
        self._has_loaded = False  # whether any worker has ever loaded the agent
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
            KeyRefusedError: the server does not accept the API key.
        """
        self._hello = {
            "agent": self._agent,
            "pythonpath": os.environ.get("PYTHONPATH"),
            "verify_ssl": self._verify_ssl,
        }
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_in, selectors.EVENT_READ, lambda events: self._wake_in.recv(4096))
        last, next_check = None, 0.0
        try:
            self._start_workers()
            self._leases.start()
            while self._leases.job_status not in ENDED_JOB and not self._stopped:
                for key, events in self._selector.select(self._wait_s(next_check)):
                    key.data(events)
                if self._leases.failure:
                    raise self._leases.failure
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
        return self._leases.job_status

    def stop(self) -> None:
        """Makes `run` return now, from any thread or signal handler; rollouts under way are killed."""
        self._stopped = True
        self._wake()

    def status(self) -> PoolStatus:
        """Where the pool stands now."""
        states = collections.Counter(worker.state for worker in self._workers.values())
        counts = self._counts
        return PoolStatus(
            job_status=self._leases.job_status,
            starting=self._nworkers - states[State.IDLE] - states[State.BUSY],
            idle=states[State.IDLE],
            busy=states[State.BUSY],
            succeeded=counts["succeeded"],
            failed=counts["exception"] + counts["invalid_reward"],
            crashed=counts["crash"],
            timed_out=counts["timeout"],
        )

    def _start_workers(self) -> None:
        """Starts workers that are missing, a core's worth at a time so that the first are ready early."""
        starting = sum(worker.state is State.STARTING for worker in self._workers.values())
        for worker_id in self._worker_ids:
            if starting >= (os.cpu_count() or 1):
                return
            if worker_id in self._workers:
                continue
            hello = pack(self._hello | {"worker_id": worker_id})
            worker = WorkerProcess(worker_id, hello, direct(self._server_url), self._start_timeout_s)
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
            self._on_failed_load(worker, message["error"])
            return
        worker.finished()
        self._idle.append(worker)
        if kind == "ready":
            self._failed_starts, self._has_loaded = 0, True
            self._leases.add(workers=1)
            self._start_workers()
        else:
            self._show_output(worker, unfinished=True)  # or it would begin the next rollout's
            self._counts[message["cause"] or "succeeded"] += 1
            self._leases.add(workers=1, result=message)

    def _on_failed_load(self, worker: WorkerProcess, error: dict) -> None:
        """Ends the pool, but for an agent that has been loaded before: that gets as many tries as one that dies."""
        if error["type"] == InvalidConfigError.__name__:
            raise InvalidConfigError(error["message"])
        self._lose(worker, "crash")
        if self._has_loaded and self._failed_starts < FAILED_STARTS:
            return
        needs_model = any(name in error["message"] for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"))
        raise TrainingError(
            f"the agent cannot be loaded in a worker: {error['type']}: {error['message']}\n{error['traceback']}",
            hint=_MAKE_CLIENTS_INSIDE if needs_model else None,
        )

    def _on_print(self, worker: WorkerProcess) -> None:
        if self._show_output(worker):
            self._selector.unregister(worker.output)

    def _show_output(self, worker: WorkerProcess, *, unfinished: bool = False) -> bool:
        """Hands on what a worker has printed; True when its stream has ended."""
        text, ended = worker.read_output(unfinished=unfinished)
        if text and worker.state is not State.DYING:  # what is printed in dying goes into the error
            self._on_output(worker.worker_id, text)
        return ended

    def _hand_out(self) -> None:
        """Gives leases to idle workers, and ends what the server has taken back."""
        leases, cancelled = self._leases.take()
        for lease in leases:
            worker = self._idle.pop()
            model_api = f"{self._server_url}/rollout/{lease['token']}"
            worker.run(lease, pack(lease | {"model_api": model_api}))
            self._send(worker)
        if cancelled:
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

    def _lose(self, worker: WorkerProcess, cause: str) -> None:
        if worker.state is State.IDLE:
            self._idle.remove(worker)
            self._leases.add(workers=-1)
        self._failed_starts += worker.state is State.STARTING
        worker.give_up(cause)

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
        elif worker.cause != "cancelled":
            self._report_loss(worker, ending)
        self._start_workers()

    def _report_loss(self, worker: WorkerProcess, ending: str) -> None:
        lease, cause = worker.lease, worker.cause
        name, message = {
            "timeout": ("RolloutTimeout", f"the agent did not return within {lease['timeout_s']:g} s; killed"),
            "crash": ("WorkerCrash", f"the worker process {ending} during the rollout"),
        }[cause]
        self._counts[cause] += 1
        result = {
            "lease_id": lease["lease_id"],
            "reward": None,
            "error": {"type": name, "message": message, "traceback": worker.printed()},
            "cause": cause,
            "events": [],
            "duration_s": time.monotonic() - worker.started,
        }
        self._leases.add(result=result)

    def _wait_s(self, next_check: float) -> float:
        """Seconds until something is due although nothing happens."""
        now = time.monotonic()
        due = min((worker.deadline for worker in self._workers.values()), default=next_check)
        if any(worker.state is State.DYING for worker in self._workers.values()):
            due = min(due, now + 0.01)
        return max(0.0, min(due, next_check) - now)

    def _close(self) -> None:
        """Idle workers leave on their own; all others, and all that they started, are killed."""
        self._leases.stop()
        leaving = [worker for worker in self._workers.values() if worker.state is State.IDLE]
        for worker in self._workers.values():
            if worker.state is not State.IDLE:
                worker.kill()
        for worker in leaving:
            worker.socket.close()
        deadline = time.monotonic() + EXIT_GRACE_S
        while (leaving := [worker for worker in leaving if not worker.has_exited()]) and time.monotonic() < deadline:
            for worker in leaving:
                self._show_output(worker)  # or a worker could hang on a full pipe
            time.sleep(0.005)
        for worker in self._workers.values():
            worker.kill()
            self._show_output(worker, unfinished=True)
            worker.close()
        self._workers.clear()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"!")
        except OSError:  # it is awake already, or has ended
            pass


def _print_output(worker_id: int, text: str) -> None:
    sys.stderr.write("".join(f"[worker {worker_id}] {line}\n" for line in text.splitlines()))


def main(argv: list[str] | None = None) -> int:
    """`python -m agent_lightning.pool`: a pool as a process of its own; the API key comes from the environment."""
    parser = argparse.ArgumentParser(prog="python -m agent_lightning.pool", description="Run workers for a job.")
    parser.add_argument("--server-url", default=None, help=f"default: ${settings.SERVER_URL}")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--agent-script", required=True, help="file.py or file.py:function")
    parser.add_argument("--nworkers", type=int, required=True)
    options = parser.parse_args(argv)
    try:
        pool = Pool(
            settings.server_url(options.server_url),
            options.job_id,
            options.agent_script,
            options.nworkers,
            api_key=settings.api_key(),
            max_retries=settings.max_retries(),
        )
        signal.signal(signal.SIGTERM, lambda *_: pool.stop())
        pool.run()
    except AgentLightningError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
