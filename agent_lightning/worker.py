"""A worker process: runs one rollout at a time for the pool that started it (`python -m agent_lightning.worker`).

Its stdin is a socket to the pool: in comes the agent, then one lease after another; out goes one result per lease.
What the agent prints never touches that socket. The process leaves when the pool does, even in mid-rollout.
"""

import atexit
import concurrent.futures
import contextlib
import contextvars
import faulthandler
import inspect
import math
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
import traceback
import types

from agent_lightning import agent_source
from agent_lightning.agent_source import unpack_agent
from agent_lightning.framing import FrameReader, pack
from agent_lightning.runtime import worker_side
from agent_lightning.runtime.air import LARGEST_FLOAT32
from agent_lightning.types import Resource, Task
from agent_lightning.worker_process import descendants, kill_group

MAX_TRACEBACK_CHARS = 8000
PARENT_CHECK_S = 2.0
EXIT_GRACE_S = 5.0
THREADS_GRACE_S = 5.0  # for what an async agent has left running in threads


class Worker:
    """One agent, loaded once, and the socket to the pool."""

    def __init__(self, pool: socket.socket):
        self._pool = pool
        self._reader = FrameReader()
        self._pid = os.getpid()
        self._parent_pid = os.getppid()
        self._running = False
        self._loop_runner = None

    def serve(self) -> int:
        """Loads the agent, then runs leases until the pool closes the socket. Returns the exit status."""
        hello = self._receive()
        if hello is None:
            return 0
        _restore_environment(hello["pythonpath"])
        source, settings = hello["agent"], hello["agent"]["settings"]
        self._worker_id, self._verify_ssl = hello["worker_id"], hello["verify_ssl"]
        try:
            worker_side.enter(settings, self._worker_id)
            self._agent, handlers = unpack_agent(source)
            worker_side.settle(settings, handlers)
        except BaseException as error:
            self._send({"kind": "load_failed", "error": describe_error(error)})
            return 1
        threading.Thread(target=self._leave_with_pool, daemon=True, name="leave-with-pool").start()
        self._send({"kind": "ready"})
        while (lease := self._receive()) is not None:
            self._running = True
            result = self._rollout(lease)
            self._running = False
            self._send(result)
        return 0

    def _rollout(self, lease: dict) -> dict:
        start = time.monotonic()
        result = {"kind": "result", "lease_id": lease["lease_id"], "reward": None, "error": None, "cause": None}
        with worker_side.rollout(lease, verify_ssl=self._verify_ssl) as recording:
            try:
                value = self._agent(*self._arguments(lease))
                if inspect.isawaitable(value):
                    value = self._await(value)
            except BaseException as error:  # SystemExit and KeyboardInterrupt of an agent are its failures too
                result |= {"error": describe_error(error), "cause": "exception"}
            else:
                try:
                    result["reward"] = finite_reward(value)
                except ValueError as error:
                    result |= {"error": {"type": "InvalidReward", "message": str(error), "traceback": ""}}
                    result["cause"] = "invalid_reward"
        result["events"] = recording.finish(succeeded=result["cause"] is None)
        return result | {"duration_s": time.monotonic() - start}

    def _arguments(self, lease: dict) -> tuple[Resource, Task]:
        resource = Resource(
            lease["model_api"], lease["model_name"], str(lease["task_id"]), self._worker_id, dict(lease["metadata"])
        )
        resource.model_names = lease.get("model_names") or [lease["model_name"]]
        return resource, Task(lease["task"])

    def _await(self, awaitable):
        # One event loop for the worker's life, because agents keep async clients in globals and those are bound to
        # the loop that they first ran on. Imported here: it takes 30 ms that most agents have no use for.
        import asyncio

        if self._loop_runner is None:
            self._loop_runner = asyncio.Runner()
            self._new_threads()
        is_tidy = False

        async def run():
            nonlocal is_tidy
            try:
                return await awaitable
            finally:
                await asyncio.sleep(0)  # the closing of async generators that were broken off last becomes tasks
                left = asyncio.all_tasks() - {asyncio.current_task()}
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
                until = time.monotonic() + THREADS_GRACE_S
                while self._threads.running and time.monotonic() < until:
                    await asyncio.sleep(0.01)
                if self._threads.running:
                    self._new_threads()
                is_tidy = True

        try:
            # In a context as of now: the runner's own would keep the first rollout's trace as every later one's parent.
            return self._loop_runner.run(run(), context=contextvars.copy_context())
        except (SystemExit, KeyboardInterrupt):
            if not is_tidy:  # it came from a task of the agent's, and left `run` behind
                runner, self._loop_runner = self._loop_runner, None
                with contextlib.suppress(SystemExit, KeyboardInterrupt):  # it goes on to whatever waits for that task
                    runner.close()
            raise

    def _new_threads(self) -> None:
        self._threads = _Threads(thread_name_prefix="asyncio")
        self._loop_runner.get_loop().set_default_executor(self._threads)

    def _receive(self) -> dict | None:
        while True:
            data = self._pool.recv(1 << 16)
            if not data:
                return None
            messages = self._reader.feed(data)
            if messages:  # never more than one: the pool waits for the answer
                return messages[0]

    def _send(self, message: dict) -> None:
        if os.getpid() != self._pid:  # an agent forked, and this is the child coming back
            os._exit(0)
        self._pool.sendall(pack(message))

    def _leave_with_pool(self) -> None:
        poll = select.poll()
        poll.register(self._pool, 0)  # 0: report only hang-ups
        while not poll.poll(PARENT_CHECK_S * 1000) and os.getppid() == self._parent_pid:
            pass
        if not self._running:
            time.sleep(EXIT_GRACE_S)  # the main thread is leaving in good order
        os.killpg(0, signal.SIGKILL)


class _Threads(concurrent.futures.ThreadPoolExecutor):
    """What `asyncio.to_thread` runs calls in.

    Attributes:
        running: the calls that have not ended.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.running: set[concurrent.futures.Future] = set()

    def submit(self, function, /, *args, **kwargs) -> concurrent.futures.Future:
        call = super().submit(function, *args, **kwargs)
        self.running.add(call)
        call.add_done_callback(self.running.discard)
        return call


def finite_reward(value) -> float:
    """The agent's return value as a float. ValueError, saying what is wrong, unless it is one finite number."""
    if value is None:
        raise ValueError("the agent returned None; return a number (higher is better)")
    if isinstance(value, (str, bytes)):
        raise ValueError(f"the agent returned the text {value[:80]!r}; return a number")
    try:
        reward = float(value)
    except OverflowError:  # a whole number
        reward = math.inf
    except Exception:
        raise ValueError(f"the agent returned a {type(value).__name__}; return a number") from None
    if not math.isfinite(reward) or abs(reward) > LARGEST_FLOAT32:
        raise ValueError(f"the agent returned {reward}; return a finite number of at most {LARGEST_FLOAT32:.2g}")
    return reward


def describe_error(error: BaseException) -> dict:
    """`{"type", "message", "traceback"}`, without the frames of what loads and calls the agent."""
    try:
        message = str(error)
        text = "".join(_without_our_frames(traceback.TracebackException.from_exception(error)).format())
    except Exception:  # an agent's exception class may be broken itself
        message, text = "(the exception could not be printed)", ""
    return {"type": type(error).__name__, "message": message[:2000], "traceback": text[-MAX_TRACEBACK_CHARS:]}


def _without_our_frames(error: traceback.TracebackException) -> traceback.TracebackException:
    ours = (__file__, agent_source.__file__, "<frozen importlib")
    chain = [error]
    for part in chain:
        kept = [frame for frame in part.stack if not frame.filename.startswith(ours)]
        part.stack = traceback.StackSummary.from_list(kept)
        chain += filter(None, (part.__cause__, part.__context__))
    return error


def _end_group(leader: int) -> None:
    """Ends what the agent started and left running. In a forked child that leaves by itself, nothing."""
    if os.getpid() == leader == os.getpgrp():
        with contextlib.suppress(Exception):  # the agent may have closed it
            sys.stdout.flush()
        kill_group(leader, descendants(leader))


def _restore_environment(pythonpath: str | None) -> None:
    """Undoes the PYTHONPATH that let this process find the package; the agent's own children must not inherit it."""
    if pythonpath is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = pythonpath


def main() -> int:
    """Entry point; the socket to the pool is file descriptor 0."""
    if not stat.S_ISSOCK(os.fstat(0).st_mode):
        print("agent_lightning.worker is started by agent_lightning.Pool, not by hand", file=sys.stderr)
        return 2
    pool = socket.socket(fileno=os.dup(0))
    os.set_inheritable(pool.fileno(), False)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # a model may write anything
    sys.modules["__main__"] = types.ModuleType("__main__")  # for what the agent's own __main__ defines
    sys.modules["__main__"].__spec__ = __spec__  # what `multiprocessing` imports in a process that it spawns
    atexit.register(_end_group, os.getpid())  # registered first, so it runs after all that the agent registers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a pool that ignores Ctrl-C would pass that on
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # the pool asks where a rollout hangs before it kills it
    try:
        return Worker(pool).serve()
    except (BrokenPipeError, ConnectionResetError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
