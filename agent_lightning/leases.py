"""The pool's line to the server: results out, leases in, by the one exchange endpoint.

Two threads, because a request that waits at the server for leases must not hold up a result: the reporter sends
results the moment there are any and takes new leases in the same request; the asker waits at the server while workers
are free although no result is under way.
"""

import collections
import json
import threading
import time
import uuid
from collections.abc import Callable

from agent_lightning.exceptions import KeyRefusedError, ServerConnectionError
from agent_lightning.transport import Transport

ENDED_JOB = frozenset({"succeeded", "failed", "stopped"})
POLL_S = 10.0  # how long the server may hold a request for leases, at most
RETRY_S = 0.5  # between an exchange that failed, after the transport's own retries, and the next
HEARTBEAT_S = 2.0  # how often a pool with nothing to report says so, and hears what is no longer wanted


class Leases:
    """Leases of one job for one pool. The pool's thread calls the methods; the two threads do the HTTP.

    Args:
        transport: to the server.
        job_id: the job.
        give_up_s: seconds without an answer after which `failure` is set.
        wake: called from either thread when there is something to take, or the job has ended, or it has failed.

    Attributes:
        job_status: as of the newest answer; "unknown" before the first.
        failure: the exception that ended a thread, None while all is well.
    """

    def __init__(self, transport: Transport, job_id: str, *, give_up_s: float, wake: Callable[[], None]):
        self.job_status = "unknown"
        self.failure: BaseException | None = None
        self._transport, self._give_up_s, self._wake = transport, give_up_s, wake
        self._path = f"/api/jobs/{job_id}/exchange"
        self._pool_id = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._stopped = False
        self._results: list[dict] = []
        self._arrived: collections.deque[dict] = collections.deque()
        self._cancelled: set[str] = set()
        self._held: set[str] = set()  # leases from their arrival until the server has their result
        self._workers = 0  # free workers
        self._asked = 0  # of these, how many a request under way asks for
        self._reporting = False
        self._lanes = 0  # threads that have not ended

    def start(self) -> None:
        """Starts the two threads; the last one that ends closes the transport."""
        lanes = (self._report, self._ask)
        self._lanes = len(lanes)
        for lane in lanes:
            threading.Thread(target=self._repeat, args=(lane,), daemon=True, name=f"leases{lane.__name__}").start()

    def stop(self) -> None:
        """Ends the threads as soon as their requests return; nothing waits for that."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def add(self, *, workers: int = 0, result: dict | None = None) -> None:
        """Says that workers have become free (or, if negative, have died while they were), and how a rollout ended."""
        with self._changed:
            self._workers += workers
            if result is not None:
                self._results.append(_encodable(result))
            self._changed.notify_all()

    def take(self) -> tuple[list[dict], set[str]]:
        """(leases to start, at most one for each free worker; ids of leases whose work is no longer wanted)."""
        if not self._arrived and not self._cancelled:  # nearly always, and safe to see without the lock
            return [], set()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            if cancelled:
                kept = [lease for lease in self._arrived if lease["lease_id"] not in cancelled]
                self._arrived = collections.deque(kept)
            leases = [self._arrived.popleft() for _ in range(min(self._workers, len(self._arrived)))]
            self._workers -= len(leases)
        return leases, cancelled

    def _repeat(self, lane: Callable[[], None]) -> None:
        try:
            while not self._stopped:
                lane()
        except BaseException as error:
            self.failure = error
            self._wake()
        with self._changed:
            self._lanes -= 1
            is_last = self._lanes == 0
        if is_last:
            self._transport.close()

    def _free(self) -> int:
        return max(0, self._workers - len(self._arrived) - self._asked)

    def _report(self) -> None:
        """Sends results, with a request for as many new leases as workers are free."""
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._stopped, timeout=HEARTBEAT_S)
            if self._stopped:
                return
            results, self._results = self._results, []
            self._reporting = True
            want = self._free()
            self._asked += want
        self._exchange(results, want, 0.0)
        with self._changed:
            self._reporting = False
            self._changed.notify_all()

    def _ask(self) -> None:
        """Waits at the server for leases."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (self._free() and not self._results and not self._reporting)
            )
            if self._stopped:
                return
            want = self._free()
            self._asked += want
        self._exchange([], want, self._transport.poll_s(POLL_S))

    def _exchange(self, results: list[dict], want: int, wait_s: float) -> None:
        """One exchange, repeated until the server answers, and what its reply means.

        Raises:
            KeyRefusedError: at once, since trying again would not help.
            ServerConnectionError: no answer for `give_up_s`.
        """
        sent = {result["lease_id"] for result in results}
        failing_since = None

        def body() -> dict:  # made anew for each try, since the server takes leases that it does not name for lost
            with self._changed:
                running = list(self._held - sent)
            return {
                "pool_id": self._pool_id,
                "results": results,
                "running": running,
                "want": want,
                "wait_s": wait_s,
            }

        while True:
            try:
                reply = self._transport.request("POST", self._path, json=body)
                break
            except KeyRefusedError:
                raise
            except ServerConnectionError:
                now = time.monotonic()
                failing_since = failing_since or now
                if now - failing_since > self._give_up_s:
                    raise
                with self._changed:
                    if self._changed.wait_for(lambda: self._stopped, timeout=RETRY_S):
                        raise
        with self._changed:
            self._asked -= want
            self._held -= sent.union(reply["cancelled"])
            self._held.update(lease["lease_id"] for lease in reply["leases"])
            self._arrived.extend(reply["leases"])
            self._cancelled.update(reply["cancelled"])
            if self.job_status not in ENDED_JOB:  # answers of the two threads may overtake each other
                self.job_status = reply["job_status"]
            self._changed.notify_all()
        self._wake()


def _encodable(result: dict) -> dict:
    """The same with "?" for each half of a surrogate pair: an agent's words may have some, a request can not."""
    return json.loads(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace"))
