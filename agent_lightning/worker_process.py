"""The pool's end of one worker: its process group, its socket, and what it printed."""

import enum
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable

from agent_lightning.framing import FrameReader

TAIL_CHARS = 16_000  # faulthandler's 100 frames
LINE_BYTES = 1 << 20
ASK_WHERE_S = 0.25  # between asking a hung worker for its stack and killing it


class State(enum.Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    DYING = "dying"


class WorkerProcess:
    """A started worker. All methods are called by the pool's one thread, and none of them waits for the worker.

    Args:
        worker_id: see below.
        hello: the packed message that it starts with: the agent.
        environment: variables that it gets beside those of this process.
        start_timeout_s: seconds that it may take to load the agent.

    Attributes:
        worker_id: its number; a replacement gets the same one.
        state: see `State`.
        lease: the lease it runs, while BUSY or when it died of it.
        deadline: monotonic second at which it is given up (STARTING, BUSY) or killed (DYING).
        started: monotonic second at which it was given its lease.
        cause: why it is DYING: "crash", "timeout" or "cancelled".
    """

    def __init__(self, worker_id: int, hello: bytes, environment: dict[str, str], start_timeout_s: float):
        self.worker_id = worker_id
        self.state = State.STARTING
        self.lease: dict | None = None
        self.started = 0.0
        self.deadline = time.monotonic() + start_timeout_s
        self.cause: str | None = None
        self._reader = FrameReader()
        self._unsent = memoryview(hello)
        self._line_start = bytearray()
        self._tail = ""
        self.socket, child_socket = socket.socketpair()
        self.output, child_output = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent_lightning.worker"],
                stdin=child_socket,
                stdout=child_output,
                stderr=child_output,
                env=os.environ | environment | {"PYTHONPATH": _pythonpath()},
                start_new_session=True,  # its own group, so that its children can be killed with it
            )
        except BaseException:
            self.socket.close()
            os.close(self.output)
            raise
        finally:
            child_socket.close()
            os.close(child_output)
        self.socket.setblocking(False)
        os.set_blocking(self.output, False)

    def run(self, lease: dict, message: bytes) -> None:
        """Starts a lease, already packed as `message`."""
        self.lease, self.state, self._tail = lease, State.BUSY, ""
        self.started = time.monotonic()
        self.deadline = self.started + lease["timeout_s"]
        self._unsent = memoryview(bytes(self._unsent) + message)

    def finished(self) -> dict:
        """Back to IDLE; returns the lease it ran."""
        lease, self.lease, self.state = self.lease, None, State.IDLE
        self.deadline = float("inf")
        return lease

    def flush(self) -> bool:
        """Sends what the socket takes; True when all is sent. A broken socket counts as sent: `read` will tell."""
        while self._unsent:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except BlockingIOError:
                return False
            except OSError:
                self._unsent = memoryview(b"")
        return True

    def read(self) -> list[dict] | None:
        """Messages that have arrived; None when the worker is gone."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._reader.feed(data) if data else None

    def read_output(self, *, unfinished: bool = False) -> tuple[str, bool]:
        """(what was printed since the last call, whether the stream has ended).

        Args:
            unfinished: whether a last line without its end is wanted too. Otherwise it waits for the next call, unless
                the stream has ended or the line exceeds LINE_BYTES.
        """
        before, ended = len(self._line_start), False
        for _ in range(16):  # bounded, because an agent may print faster than this reads
            try:
                piece = os.read(self.output, 1 << 16)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            if not piece:
                ended = True
                break
            self._line_start += piece
        size = self._line_start.rfind(b"\n", before) + 1
        if unfinished or ended or len(self._line_start) - size > LINE_BYTES:
            size = len(self._line_start)
        text = self._line_start[:size].decode(errors="replace")
        del self._line_start[:size]
        self._tail = (self._tail + text)[-TAIL_CHARS:]
        return text, ended

    def printed(self) -> str:
        """The end of what it printed during this lease."""
        return self._tail + self._line_start.decode(errors="replace")

    def give_up(self, cause: str) -> None:
        """Marks it DYING. A worker that hangs is first asked for its stack, which it prints."""
        self.state, self.cause = State.DYING, cause
        self.deadline = time.monotonic() + (0.0 if cause == "cancelled" else ASK_WHERE_S)
        if cause == "timeout":
            self._process.send_signal(signal.SIGUSR1)

    def has_exited(self) -> bool:
        """Whether the process has ended. It stays a zombie where that can be, so that its group id stays its own."""
        if self._process.returncode is not None:
            return True
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def kill(self) -> str:
        """Kills the process, its group and its other descendants; returns how it ended, in words."""
        kill_group(self._process.pid, descendants(self._process.pid))
        status = self._process.wait()
        if status >= 0:
            return f"exited with status {status}"
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"

    def close(self) -> None:
        """Closes the pool's file descriptors; an idle worker then leaves on its own."""
        self.socket.close()
        if self.output >= 0:
            os.close(self.output)
            self.output = -1


def _pythonpath() -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def kill_group(leader: int, others: Iterable[int]) -> None:
    """Kills other processes, and then a process group, which may be the caller's own."""
    for kill, pid in [*((os.kill, pid) for pid in others), (os.killpg, leader)]:
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, also those that left its group. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    try:
        entries = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for name in entries:
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(name))
    found, frontier = [], [pid]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found
