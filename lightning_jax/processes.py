"""Several processes, on one machine or many, that run one job: each has some of the devices.

A program over devices of several processes runs once all of them have called it, with the same inputs from the host. So
process 0 alone decides: it has the HTTP server, the store, the schedulers and the training loop, and before it calls a
device program it tells the others to call it too (`Leader`). They do nothing else (`Follower`).

What is told are functions of this package and their arguments, pickled, over TCP connections to process 0, whose key
goes round by JAX's own collectives. A process that ends, for whatever reason, is seen at once by its connection, and
the others end as well: nobody waits for somebody who is gone.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from agent_lightning.exceptions import AgentLightningError, InvalidConfigError

_PATIENCE_S = 60.0  # after one process failed, for the others to come to an end of what they do together
_NEWS_S = 1.0  # after one process ended, for process 0 to say why where all have the same reason
_LEAVING_S = 5.0  # after process 0 failed, for the others to end in order, which JAX's own end waits for
_APPEARS_S = 10.0  # until a file that one process wrote is seen by others, over a network
_FAILED = "failed"  # what `Leader` sends instead of a call
_HINT = "set distributed.coordinator (HOST:PORT of process 0), num_processes and process_id"


class Leader:
    """Process 0's side. All but `close` belongs to the device thread, so that everybody's order is the same."""

    def __init__(self, connections: dict[int, Connection]):
        """Takes a connection to each of the other processes, by number."""
        self._connections = connections
        self._closed = False
        self._words: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._last_waits: dict[int, threading.Timer] = {}  # by the process that failed
        for number, connection in connections.items():
            threading.Thread(target=self._listen, args=(number, connection), daemon=True).start()

    def tell(self, function: Callable, *args: Any) -> None:
        """Has the others call `function(target, *args)`, and does not wait for it; a failure there ends everybody."""
        self._send((function, args, False))

    def run(self, function: Callable, target: Any, *args: Any) -> Any:
        """Calls `function(target, *args)`, here and in all others with their own target, and waits for all.

        What it raises here is raised; if it does not fare alike everywhere, all processes end. An error of this package
        (a full disk, a checkpoint that is gone) leaves things as they were, and may be one process's alone.
        """
        self._send((function, args, True))
        failure = None
        try:
            return function(target, *args)
        except Exception as error:
            failure = error
            raise
        finally:
            self._hear_all(function.__name__, failure)

    def close(self, failed: bool = False) -> None:
        """Lets the others end: well, or with status 1."""
        self._closed = True
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(_FAILED if failed else None)
            connection.close()

    def _send(self, message: Any) -> None:
        for number, connection in self._connections.items():
            try:
                connection.send(message)
            except OSError as error:
                _end(f"process {number} cannot be reached: {error}")

    def _hear_all(self, name: str, failure: Exception | None) -> None:
        try:
            words = [self._words.get(timeout=None if failure is None else _PATIENCE_S) for _ in self._connections]
        except queue.Empty:
            _end(f"{name} failed in process 0 while others wait in it: {failure!r}")
        for wait in self._last_waits.values():
            wait.cancel()
        for number, word in words:
            if (word is None) != (failure is None) and not isinstance(failure, AgentLightningError):
                _end(f"{name} failed in process {number if word else 0} alone: {word or repr(failure)}")

    def _listen(self, number: int, connection: Connection) -> None:
        """One process's words, each about a call of `run`."""
        try:
            while True:
                word = connection.recv()
                if word is not None:  # the device thread may wait in a collective of which that process has no part now
                    wait = threading.Timer(_PATIENCE_S, _end, [f"process {number} failed: {word}"])
                    wait.daemon = True
                    wait.start()
                    self._last_waits[number] = wait
                self._words.put((number, word))
        except (EOFError, OSError):
            time.sleep(_NEWS_S)
            if not self._closed:
                _end(f"process {number} has ended")


class Follower:
    """Every other process's side."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._closed = False
        self._calls: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def follow(self, target: Any) -> None:
        """Calls what process 0 calls, with `target` in the place of its own, until that process closes."""
        while (call := self._calls.get()) is not None:
            if call == _FAILED:
                sys.exit(1)
            function, args, answers = call
            word = None
            try:
                function(target, *args)
            except Exception as error:
                if not answers:
                    raise
                word = f"{type(error).__name__}: {error}"
            if answers:
                self._connection.send(word)

    def close(self, failed: bool = False) -> None:
        self._closed = True  # what `_listen` sees from now on is this end of it
        self._connection.close()

    def _listen(self) -> None:
        try:
            while True:
                call = self._connection.recv()
                self._calls.put(call)
                if call is None:
                    return
                if call == _FAILED:
                    time.sleep(_LEAVING_S)
                    break
        except (EOFError, OSError):  # the main thread may be waiting for process 0 in a collective
            pass
        if not self._closed:
            _end("process 0 has ended")


def join(settings: ml_collections.ConfigDict) -> Leader | Follower | None:
    """Makes this process one of several, if the settings (`distributed` of `config.py`) say so; else None.

    From here on `jax.devices()` are those of all processes.

    Raises:
        InvalidConfigError: the others cannot be found.
    """
    _check(settings)
    if not settings.coordinator:
        return None
    # On CPU: programs one after the other, for what they exchange is matched up by order alone.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it catches SIGTERM, and leaves it to programs to ask
    given = {}
    if settings.coordinator != "auto":
        given["coordinator_address"] = settings.coordinator
        given["num_processes"] = settings.num_processes or None
        given["process_id"] = None if settings.process_id < 0 else settings.process_id
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=30, shutdown_timeout_seconds=10)
    except (ValueError, RuntimeError) as error:
        raise InvalidConfigError(f"this process cannot join the others: {error}", hint=_HINT) from error
    if jax.process_count() == 1:
        return None
    host = settings.coordinator.rpartition(":")[0] if given else _own_address()
    return _lead(host) if jax.process_index() == 0 else _connect()


def _check(settings: ml_collections.ConfigDict) -> None:
    """Raises InvalidConfigError for settings that JAX ignores, or that end the process inside of it."""
    if not settings.coordinator and (settings.num_processes > 1 or settings.process_id > 0):
        raise InvalidConfigError("distributed.num_processes and process_id need a distributed.coordinator", hint=_HINT)
    if settings.coordinator in ("", "auto"):
        return
    host, _, port = settings.coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        problem = f"distributed.coordinator must be HOST:PORT, not {settings.coordinator!r}"
        raise InvalidConfigError(problem, hint=_HINT)
    if settings.process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            problem = f"process 0 cannot listen on port {port}: {error.strerror}"
            raise InvalidConfigError(problem, hint=_HINT) from error
        print(f"waiting for the other processes at {settings.coordinator}", file=sys.stderr, flush=True)


def _lead(host: str) -> Leader:
    key = secrets.token_bytes(32)
    bound = host if host in ("localhost", "127.0.0.1") else "0.0.0.0"
    with Listener((bound, 0), backlog=jax.process_count(), authkey=key) as listener:
        _gather(f"{key.hex()} {host}:{listener.address[1]}")
        return Leader(_accept(listener, jax.process_count() - 1))


def _accept(listener: Listener, count: int) -> dict[int, Connection]:
    """`Leader`'s connections to so many processes; somebody else's, who has not the key, are closed."""
    connections = {}
    while len(connections) < count:
        with contextlib.suppress(multiprocessing.AuthenticationError, EOFError, OSError):
            connection = listener.accept()
            connections[connection.recv()] = connection
    return connections


def _connect() -> Follower:
    key, _, address = _gather("")[0].partition(" ")
    host, _, port = address.rpartition(":")
    connection = Client((host, int(port)), authkey=bytes.fromhex(key))
    connection.send(jax.process_index())
    return Follower(connection)


def _own_address() -> str:
    """This machine's, as others may reach it."""
    address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):  # as Debian's /etc/hosts has it
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # any address that is not here; nothing is sent
            address = probe.getsockname()[0]
    return address


def check_alike(facts: Mapping[str, Any]) -> None:
    """Compares what each process was started with.

    Args:
        facts: by name, JSON-ready.

    Raises:
        InvalidConfigError: a process has others than process 0. All raise it.
    """
    first, *others = (json.loads(text) for text in _gather(json.dumps(facts)))
    differences = [
        f"{name}: {first.get(name)!r} in process 0, {theirs.get(name)!r} in process {number}"
        for number, theirs in enumerate(others, 1)
        for name in sorted(first.keys() | theirs.keys())
        if first.get(name) != theirs.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        raise InvalidConfigError(f"the processes differ: {shown}", hint="start all of them with the same settings")


def check_shared(folder: pathlib.Path) -> None:
    """Looks whether all processes see the same folder, which is made where missing.

    Raises:
        InvalidConfigError: they do not, or process 0 cannot write there. All raise it.
    """
    own = folder / f"shared.{secrets.token_hex(8)}"
    is_first, problem = jax.process_index() == 0, ""
    if is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
        except OSError as error:
            problem = f"process 0 cannot write there: {error.strerror}"
    mark, until = folder / _gather(own.name)[0], time.monotonic() + _APPEARS_S
    while not problem and not mark.exists():
        if time.monotonic() > until:
            problem = f"process {jax.process_index()} does not see what process 0 writes there"
        time.sleep(0.05)
    problems = [problem for problem in _gather(problem) if problem]
    if is_first:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
    if problems:
        hint = "give a folder that all machines share, and the same one on each"
        raise InvalidConfigError(f"workdir {folder} is not one folder for all processes: {problems[0]}", hint=hint)


def _gather(text: str) -> list[str]:
    """Each process's text, by number, in every process."""
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32)).tolist()
    padded = np.frombuffer(data.ljust(max(*sizes, 1)), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _end(reason: str) -> NoReturn:
    """Ends this process from any thread, also while another waits for a collective that will never end."""
    print(f"{reason}; process {jax.process_index()} ends with it", file=sys.stderr, flush=True)
    os._exit(1)
