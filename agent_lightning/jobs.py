"""One job from the client's side: its agents run here, its progress is shown here, and Ctrl-C ends it."""

import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager

from agent_lightning.checkpoint_copies import CheckpointCopies
from agent_lightning.exceptions import AgentLightningError, KeyRefusedError, ServerConnectionError, TrainingError
from agent_lightning.pool import Pool
from agent_lightning.progress import JobProgress
from agent_lightning.results import job_error
from agent_lightning.transport import Transport

EVENTS_WAIT_S = 10.0
OUTAGE_S = 300.0  # how long a running job outlives its server
RETRY_S = 0.5


class Job:
    """A job that this process has asked for.

    Args:
        transport: to the server.
        title: what the progress bar says.
        spec: what the server is to run; None stands for the server's own setting.

    Attributes:
        job_id: the server's.
        rollouts_at_once: how many workers the server can keep busy.
    """

    def __init__(self, transport: Transport, title: str, spec: dict):
        self._transport, self._title = transport, title
        self._evaluates = spec["kind"] == "evaluate"
        spec = {name: value for name, value in spec.items() if value is not None} | {"key": uuid.uuid4().hex}
        reply = transport.request("POST", "/api/jobs", json=spec)
        self.job_id: str = reply["job_id"]
        self.rollouts_at_once: int = reply["rollouts_at_once"]
        self._path = f"/api/jobs/{self.job_id}"
        self._ended = threading.Event()

    def run(self, make_pool: Callable[[Callable[[int, str], None]], Pool], copies: CheckpointCopies | None) -> dict:
        """Runs the job's agents and shows its progress until it has ended; returns the job, which has a result.

        Args:
            make_pool: makes the worker pool, given what takes the agents' output.
            copies: is told of every checkpoint.

        Raises:
            TrainingError: the job failed, or was stopped before it had a result.
            ServerConnectionError: the server stayed away for OUTAGE_S.
            KeyboardInterrupt: Ctrl-C twice, or once in an evaluation.
        """
        with JobProgress(self._title) as progress:
            follower = threading.Thread(target=self._follow, args=(progress, copies), daemon=True)
            try:
                pool = make_pool(progress.on_output)
                follower.start()
                with self._interruptible(progress):
                    pool.run(progress.on_status)
            except BaseException:
                self._stop(now=True)
                raise
            finally:
                self._ended.set()
            follower.join(EVENTS_WAIT_S)
            job = self._job()
            if job["status"] == "failed":
                raise job_error(job)
            if not job.get("result"):
                raise TrainingError(f"job {self.job_id} was stopped before it had a result")
            if copies is not None:
                progress.say("waiting for the copies of the checkpoints")
                copies.finish(job["result"]["checkpoints"])
        return job

    def _job(self) -> dict:
        """The job, also from a server that is just being started again: hours of work are not given up for that."""
        since = time.monotonic()
        while True:
            try:
                return self._transport.request("GET", self._path)
            except KeyRefusedError:
                raise
            except ServerConnectionError:
                if time.monotonic() - since > OUTAGE_S:
                    raise
                time.sleep(RETRY_S)

    def _follow(self, progress: JobProgress, copies: CheckpointCopies | None) -> None:
        """Shows the job's events until it has ended and all of them have been shown."""
        after = 0
        while True:
            last_round = self._ended.is_set()
            params = {"after": after, "wait_s": 0.0 if last_round else self._transport.poll_s(EVENTS_WAIT_S)}
            try:
                events = self._transport.request("GET", f"{self._path}/events", params=params)["events"]
                job = self._transport.request("GET", self._path) if events else {}
            except ServerConnectionError:  # the pool decides when that has lasted too long
                if self._ended.wait(1.0):
                    return
                continue
            except (AgentLightningError, RuntimeError):  # the latter where the client has been closed
                return
            for event in events:
                progress.on_event(event, job)
                if copies is not None and event["kind"] == "checkpoint":
                    copies.add(event["data"]["path"])
                after = event["seq"]
            if not events and (last_round or self._ended.wait(0.05)):
                return

    @contextmanager
    def _interruptible(self, progress: JobProgress):
        """Ctrl-C once asks a training to end after its step, twice raises KeyboardInterrupt; SIGTERM raises SystemExit.

        An evaluation has no steps, and ends at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asked = False

        def ask():
            progress.say("stopping after this step; press Ctrl-C again to stop at once")
            while not self._stop(now=False) and not self._ended.wait(RETRY_S):
                pass  # the server goes on with the job when it is there again

        def on_interrupt(*_):
            nonlocal asked
            if asked or self._evaluates:
                raise KeyboardInterrupt
            asked = True
            threading.Thread(target=ask, daemon=True).start()  # the handler itself must not wait for locks

        def on_termination(number, _):  # by default nobody would tell the server
            raise SystemExit(128 + number)

        handlers = {signal.SIGINT: on_interrupt}
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            handlers[signal.SIGTERM] = on_termination
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, *, now: bool) -> bool:
        """Whether the server has answered; errors are not raised, since the caller's own matters more."""
        try:
            self._transport.request("POST", f"{self._path}/stop", json={"now": now})
        except ServerConnectionError:
            return False
        except AgentLightningError:
            pass
        return True
