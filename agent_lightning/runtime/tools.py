"""For agents in plain Python: `@tool` and `run_code`. Outside a worker both do what they say and no more."""

import contextlib
import functools
import inspect
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from agent_lightning.runtime import recorder, sdk_defaults, tracing
from agent_lightning.worker_process import descendants, kill_group

MAX_OUTPUT_CHARS = 100_000
TIMEOUT_EXIT_CODE = 124  # as timeout(1) has it
_SECRETS = {*sdk_defaults.environment("", ""), "AGENT_LIGHTNING_API_KEY"}


def tool(function: Callable | None = None, *, name: str | None = None) -> Callable:
    """Makes a function a tool: AIR rewards its calls, and a trace shows them. Works as `@tool` and `@tool(name=...)`.

    The function stays what it is, async or not; an exception that it raises is a failure, and is passed on. What a
    generator has given is a list to AIR, also where its caller breaks it off.

    Args:
        function: whatever the model's tool call is answered with.
        name: what the model calls it; by default the function's own name.
    """
    if function is None:
        return functools.partial(tool, name=name)
    inner = function  # which says its name and kind where that is a partial or a callable object
    while isinstance(inner, functools.partial):
        inner = inner.func
    own_name = getattr(inner, "__name__", type(inner).__name__)
    tool_name = name or own_name
    if not inspect.isroutine(inner):
        inner = type(inner).__call__

    if inspect.isasyncgenfunction(inner):

        @functools.wraps(function)
        async def wrapper(*args, **kwargs):
            with _Use(tool_name, args, kwargs, output=[]) as use:
                items = function(*args, **kwargs)
                try:
                    item = await anext(items)
                    while True:
                        try:
                            with use.giving(item):
                                sent = yield item
                        except BaseException as error:
                            item = await items.athrow(error)
                        else:
                            item = await items.asend(sent)
                except StopAsyncIteration:
                    return

    elif inspect.isgeneratorfunction(inner):

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            with _Use(tool_name, args, kwargs, output=[]) as use:
                items = function(*args, **kwargs)
                try:
                    item = next(items)
                    while True:
                        try:
                            with use.giving(item):
                                sent = yield item
                        except BaseException as error:
                            item = items.throw(error)
                        else:
                            item = items.send(sent)
                except StopIteration as end:
                    return end.value

    elif inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args, **kwargs):
            with _Use(tool_name, args, kwargs) as use:
                use.output = await function(*args, **kwargs)
            return use.output

    else:

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            with _Use(tool_name, args, kwargs) as use:
                use.output = function(*args, **kwargs)
            return use.output

    wrapper.__name__ = own_name
    return wrapper


class _Use:
    """One call of a tool, told to the rollout's recorder and to the trace."""

    def __init__(self, name: str, args: tuple, kwargs: dict, output: Any = None):
        self._name, self._arguments = name, {"args": args, "kwargs": kwargs}
        self._broken_off = False
        self.output = output

    def __enter__(self) -> "_Use":
        self._recorder = recorder.current()
        self._observation = self._recorder and tracing.begin_decorated(self._recorder, self._name)
        self._span = tracing.tool_span(self._name, self._arguments)
        self._go_on()
        return self

    def _go_on(self) -> None:
        self._inside = contextlib.ExitStack()
        self._inside.enter_context(self._span)
        self._inside.enter_context(recorder.inside_tool())

    @contextlib.contextmanager
    def giving(self, item: Any):
        """A generator's caller has its turn inside the block, and may go on, or end it, in another context."""
        self.output.append(item)
        self._broken_off = False
        self._inside.close()
        try:
            yield
        except BaseException as error:  # an event loop closes it in a task, which may be cancelled: no GeneratorExit
            self._broken_off = not isinstance(error, Exception)
            raise
        finally:
            self._go_on()

    def __exit__(self, kind, error, traceback) -> None:
        if self._broken_off and not isinstance(error, Exception):  # what it gave was enough
            error = None
        self._inside.close()
        self._span.end(self.output, error)
        if self._recorder is None:
            return
        if error is None:
            self._recorder.succeeded(self._observation, self.output)
        elif isinstance(error, Exception):  # not a rollout that is being ended
            self._recorder.failed(self._observation, f"{type(error).__name__}: {error}")


class CodeResult(NamedTuple):
    """What `run_code` returns: all that the code printed, and its exit code."""

    result: str
    exit_code: int


def run_code(code: str, timeout: float = 10.0) -> CodeResult:
    """Runs Python code in a process of its own and a new, empty folder; AIR's `on_code_execution` hears of it.

    The process is no sandbox: it may do what this user may. It does not get the rollout's URL and key, and it, with all
    that it started, is killed when `timeout` seconds are over. An async agent calls `await asyncio.to_thread(run_code,
    code)`.

    Returns:
        `result`, what it printed to stdout and stderr, the end of it if that is more than 100,000 characters; and
        `exit_code`: 0, or 1 after an exception, minus the number of the signal that killed it, or 124 if its time ran
        out.
    """
    rollout = recorder.current()
    observation = rollout and rollout.begin("run_code")
    span = tracing.tool_span("run_code", {"code": code})
    with span, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = _run(code, timeout, folder)
        span.end(done._asdict(), None)
    if rollout:
        rollout.executed(observation, code, *done)
    return done


def _run(code: str, timeout_s: float, folder: str) -> CodeResult:
    path = os.path.join(folder, "main.py")
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(code)
    process = subprocess.Popen(
        [sys.executable, "-u", "-X", "utf8", path],  # -u: what it printed is not lost when it is killed
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in _SECRETS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    tail = bytearray()

    def read() -> None:
        while data := process.stdout.read1(1 << 16):
            tail.extend(data)
            del tail[: -4 * MAX_OUTPUT_CHARS]

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        exit_code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        exit_code = TIMEOUT_EXIT_CODE
    finally:
        others = descendants(process.pid) if process.returncode is None else []
        kill_group(process.pid, others)  # what it left running holds the pipe open
        process.wait()
    reader.join(1.0)
    if not reader.is_alive():
        process.stdout.close()
    return CodeResult(tail.decode(errors="replace")[-MAX_OUTPUT_CHARS:], exit_code)
