"""Automatic Intermediate Rewarding (AIR): tools and code earn the model call that asked for them a reward.

    from agent_lightning.runtime import air

    @air.on_tool_success
    def reward_tool_success(tool_name, output):
        return 0.3

AIR is off unless `set_config({"air_enabled": True})` or LIGHTNING_ENABLE_AIR says otherwise. On, without any handler,
the four values of `DEFAULT_RULES` hold. Several handlers add up; None counts as 0; a handler that raises, or returns
something other than a finite number, is logged and gives nothing. AIR rewards in training only: an evaluation measures
what the agent returns.

What AIR hears of:

- tools that `@tool` decorates or that an instrumentor reports (`auto_instrument`): `output` is what the tool returned
  (an instrumentor's text), `error` is text: the exception's type and message;
- tool results in the requests that the agent sends to the model, with no instrumentation at all: `output` and `error`
  are the text that the model is shown. Such a result counts as a failure when `is_failure` says so;
- code that `run_code` runs.

A tool is rewarded once, however many of these ways it is heard of. The reward lands on the model call that made the
tool call, known by the tool call's id; without one, on the last call that had ended when the tool began. What a tool
does before the first model call earns nothing.
"""

import json
import logging
import re
import traceback
from collections.abc import Callable
from typing import Any

LARGEST_FLOAT32 = 3.4028235e38
KINDS = ("tool_success", "tool_failure", "code_execution")

_log = logging.getLogger(__name__)
_handlers: dict[str, list[Callable]] = {kind: [] for kind in KINDS}
_complained: set[tuple] = set()


def on_tool_success(handler: Callable[[str, Any], float | None]) -> Callable:
    """Registers `handler(tool_name, output) -> reward` for tools that succeed."""
    return add("tool_success", handler)


def on_tool_failure(handler: Callable[[str, str], float | None]) -> Callable:
    """Registers `handler(tool_name, error) -> reward` for tools that fail."""
    return add("tool_failure", handler)


def on_code_execution(handler: Callable[[str, str, int], float | None]) -> Callable:
    """Registers `handler(code, result, exit_code) -> reward` for code that `run_code` has run."""
    return add("code_execution", handler)


def clear() -> None:
    """Forgets all handlers."""
    for handlers in _handlers.values():
        handlers.clear()


def _default_tool_success(tool_name: str, output: Any) -> float:
    return 0.3


def _default_tool_failure(tool_name: str, error: str) -> float:
    return -0.2


def _default_code_execution(code: str, result: str, exit_code: int) -> float:
    return 0.5 if exit_code == 0 else -0.1


DEFAULT_RULES: dict[str, list[Callable]] = {
    "tool_success": [_default_tool_success],
    "tool_failure": [_default_tool_failure],
    "code_execution": [_default_code_execution],
}


def add(kind: str, handler: Callable) -> Callable:
    """Registers a handler of one of `KINDS` and returns it.

    A function that is defined again under its name, as when a notebook's cell runs twice, takes the earlier one's
    place.
    """
    name = _lasting_name(handler)
    handlers = _handlers[kind]
    for i, known in enumerate(handlers):
        if name is not None and _lasting_name(known) == name:
            handlers[i] = handler
            return handler
    handlers.append(handler)
    return handler


def registered() -> dict[str, list[Callable]]:
    """The handlers of each kind, in the order in which they came."""
    return {kind: list(handlers) for kind, handlers in _handlers.items()}


def merge(handlers: dict[str, list[Callable]]) -> None:
    """Adds the parent process's handlers to those that importing the agent has registered here; none comes twice."""
    for kind, theirs in handlers.items():
        left = [_origin(handler) for handler in _handlers[kind]]
        for handler in theirs:
            origin = _origin(handler)
            if origin in left:
                left.remove(origin)
            else:
                _handlers[kind].append(handler)


def rewards(kind: str, *arguments: Any) -> list[tuple[str, float]]:
    """(rule, reward) of every handler of a kind that gives one; the default rules where no handler is registered."""
    handlers = _handlers if any(_handlers.values()) else DEFAULT_RULES
    given = []
    for handler in list(handlers[kind]):
        name = getattr(handler, "__name__", type(handler).__name__)
        try:
            reward = handler(*arguments)
        except Exception as error:
            _complain(name, kind, type(error), f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}")
            continue
        if reward is None:
            continue
        try:
            reward = float(reward)
        except Exception:
            _complain(name, kind, type(reward), f"returned a {type(reward).__name__}, not a number")
            continue
        if not abs(reward) <= LARGEST_FLOAT32:
            _complain(name, kind, float, f"returned {reward}, not a finite number")
        elif reward:
            given.append((name, reward))
    return given


def is_failure(content: str) -> bool:
    """Whether a tool result's text, as the model is shown it, says that the tool failed.

    The wire has no field for it but Anthropic's `is_error`, which the server turns into the prefix "Error: ". So this
    goes by what frameworks and agents write: a text that begins with "Error" (as a word, so not "error_rate" or
    "Error-free"), with "Traceback (most recent call last)" or with "An error occurred while running the tool", or a
    JSON object whose `error`, `is_error` or `isError` is true or not empty.
    """
    start = content.lstrip()[:64].lower()
    if start.startswith(("traceback (most recent call last)", "an error occurred while running the tool")):
        return True
    if re.match(r"error(?![_-]?[^\W\d_])", start):
        return True
    if start.startswith("{"):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return any(value.get(name) for name in ("error", "is_error", "isError"))
    return False


def _complain(name: str, kind: str, fault: type, problem: str) -> None:
    """Logs what a handler raised or returned; each type of it once, since it may come with every tool call."""
    if (name, kind, fault) not in _complained:
        _complained.add((name, kind, fault))
        _log.warning("AIR handler %s (on_%s) %s; it gives no reward", name, kind, problem)


def _lasting_name(handler: Callable) -> tuple | None:
    """By what name a module knows a function that `def` made at its top level; None for all others and for `_`."""
    name = getattr(handler, "__qualname__", "<")
    if "<" in name or "." in name or name == "_":
        return None
    return handler.__module__, name


def _origin(handler: Callable) -> tuple:
    """Where a handler was written: the same for a copy that came from the parent process."""
    code = getattr(handler, "__code__", None)
    if code is None:
        return type(handler).__module__, type(handler).__qualname__
    return code.co_filename, code.co_qualname
