"""The one thread that owns the device.

It runs one round of every engine that has work, and between rounds the commands (an update, a checkpoint), first come
first served.
"""

import collections
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable

from lightning_jax.sampler import engine as engine_lib

_log = logging.getLogger(__name__)


class DeviceThread:
    """Runs everything that touches the device, in one thread.

    Attributes:
        error: the exception that ended the thread, if one did; every later call fails with it.
    """

    def __init__(self):
        self.error: BaseException | None = None
        self._engines: list[engine_lib.Engine] = []
        self._commands: collections.deque = collections.deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()  # nothing is queued behind the last command that the thread looks at
        self._closed = self._ended = False
        self._broken: BaseException | None = None
        self._idle_s, self._idle_since = 0.0, None
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)
        self._thread.start()

    def run(self, function: Callable, *args, **kwargs) -> concurrent.futures.Future:
        """Queues a call behind the commands already given; the future has its result or exception."""
        future = concurrent.futures.Future()
        with self._lock:
            if self._ended:
                future.set_exception(RuntimeError(f"the device thread has ended: {self.error}"))
            else:
                self._commands.append((future, function, args, kwargs))
        self._wake.set()
        return future

    @property
    def idle_s(self) -> float:
        """Seconds so far in which there was nothing to do."""
        since = self._idle_since
        return self._idle_s + (time.monotonic() - since if since is not None else 0.0)

    def add_engine(self, engine: engine_lib.Engine) -> None:
        self._engines.append(engine)

    def wake(self) -> None:
        """Tells the thread that an engine has a new request."""
        self._wake.set()

    def rounds(self) -> None:
        """One round of every engine, for a command that takes long to call in between; nobody else may."""
        try:
            for engine in self._engines:
                engine.step()
        except BaseException as error:
            self._broken = error
            raise

    def close(self) -> None:
        """Ends the thread after the command in hand."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._wake.clear()
                while self._commands:
                    self._run_command(*self._commands.popleft())
                    if self._broken is not None:
                        raise self._broken
                busy = [engine.step() for engine in self._engines]
                if not any(busy) and not self._commands:
                    self._idle_since = time.monotonic()
                    self._wake.wait()
                    self._idle_s, self._idle_since = self.idle_s, None
        except BaseException as error:  # an engine round failed: nothing that follows can be trusted
            _log.exception("the device thread ended")
            self.error = error
        for engine in self._engines:
            engine.fail_all(str(self.error or "closed"))
        with self._lock:
            self._ended = True
        for future, *_ in self._commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError(f"the device thread has ended: {self.error}"))

    def _run_command(self, future, function, args, kwargs) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
