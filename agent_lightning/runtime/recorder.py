"""What a rollout's tools, code and spans leave behind: the events that go to the server with the rollout's result.

A tool may be heard of in three ways: by `@tool`, by an instrumentor's span, and by its result in a later request, which
the server has seen. The first two are observed as they happen; at the end of the rollout the server's list of tool
calls names the calls that they belong to, and tells of the tools that nobody observed.
"""

import contextlib
import contextvars
import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from agent_lightning.runtime import air

MAX_SPANS = 500
MAX_SPAN_CHARS = 16_000
MAX_SPANS_CHARS = 1_000_000
MAX_TEXT_CHARS = 20_000  # where the server cuts the results that it tells of
_TRIES = 3

_log = logging.getLogger(__name__)
_inside_tool = contextvars.ContextVar("agent_lightning_inside_tool", default=False)
_current: "Recorder | None" = None
_of_context = contextvars.ContextVar("agent_lightning_recorder", default=None)


@dataclasses.dataclass(eq=False)
class Observation:
    """A tool or a piece of code, from its beginning on.

    Attributes:
        call_index: the model call that had ended last when it began; None if there was none.
        nested: whether it ran inside another tool.
        tool_call_id: if the model's own id for it is known.
        texts: how its output may look in a request, cut at MAX_TEXT_CHARS.
        rewards: (rule, reward) that it earned.
        ended: whether `rewards` is complete.
    """

    name: str
    call_index: int | None
    nested: bool
    tool_call_id: str | None = None
    texts: tuple[str, ...] = ()
    rewards: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    ended: bool = False


class Recorder:
    """One rollout's. Its methods may be called from any thread.

    Args:
        ask: `ask(path)` is the server's answer to a GET of that path under the rollout's URL.
        rewarding: whether AIR rewards in this rollout.
    """

    def __init__(self, ask: Callable[[str], dict], *, rewarding: bool):
        self.rewarding = rewarding
        self._ask = ask
        self._lock = threading.Lock()
        self._observations: list[Observation] = []
        self._code: list[Observation] = []
        self._spans: list[dict] = []
        self._spans_chars = 0
        self._dropped_spans = 0

    # ---- tools and code ----

    def begin(self, name: str, *, nested: bool | None = None) -> Observation | None:
        """A tool or code begins; None where AIR is off."""
        if not self.rewarding:
            return None
        call_index = self._get("/calls", {}).get("last_call_index")
        return Observation(name, call_index, _inside_tool.get() if nested is None else nested)

    def succeeded(self, observation: Observation | None, output: Any) -> None:
        """A tool that began has returned."""
        if observation is not None:
            rewards = air.rewards("tool_success", observation.name, output)
            self._end(self._observations, observation, rewards, _texts(output))

    def failed(self, observation: Observation | None, error: str) -> None:
        """A tool that began has failed."""
        if observation is not None:
            self._end(self._observations, observation, air.rewards("tool_failure", observation.name, error))

    def executed(self, observation: Observation | None, code: str, result: str, exit_code: int) -> None:
        """Code that began has ended."""
        if observation is not None:
            self._end(self._code, observation, air.rewards("code_execution", code, result, exit_code))

    def _end(self, done: list, observation: Observation, rewards: list, texts: tuple[str, ...] = ()) -> None:
        with self._lock:
            observation.rewards, observation.texts, observation.ended = rewards, texts, True
            done.append(observation)

    # ---- spans ----

    def add_span(self, span: dict) -> None:
        """Keeps a span, JSON-ready, as an event; beyond the bounds it is only counted."""
        try:
            size = len(json.dumps(span, allow_nan=False))
        except (TypeError, ValueError):
            size = MAX_SPANS_CHARS
        with self._lock:
            if len(self._spans) >= MAX_SPANS or self._spans_chars + size > MAX_SPANS_CHARS:
                self._dropped_spans += 1
                return
            self._spans_chars += size
            self._spans.append({"kind": "span", **span})

    # ---- the end ----

    def finish(self, *, succeeded: bool) -> list[dict]:
        """The rollout's events: {"kind": "reward", "call_index", "reward", "rule", "tool_name"} and spans.

        Args:
            succeeded: whether the agent has returned a reward; otherwise AIR gives none either.
        """
        rewards = self._reward_events() if self.rewarding and succeeded else []
        with self._lock:
            dropped = [{"kind": "spans_dropped", "count": self._dropped_spans}] if self._dropped_spans else []
            return rewards + self._spans + dropped

    def _reward_events(self) -> list[dict]:
        with self._lock:
            observations, code = list(self._observations), list(self._code)
        seen = self._get("/tool_calls", {})
        call_of = {call["id"]: call["call_index"] for call in seen.get("tool_calls", ())}
        events = []

        def give(call_index: int | None, name: str, rewards: list[tuple[str, float]]) -> None:
            if call_index is None:
                return
            for rule, reward in rewards:
                event = {"call_index": call_index, "reward": reward, "rule": rule, "tool_name": name}
                events.append({"kind": "reward", **event})

        results = seen.get("results", [])
        pairs = match(observations, results)
        for observation in observations:
            result = pairs.get(observation)
            index = result["call_index"] if result else observation.call_index
            give(call_of.get(observation.tool_call_id, index), observation.name, observation.rewards)
        known = {observation.tool_call_id for observation in observations}
        paired = {id(result) for result in pairs.values()}
        for result in results:
            if id(result) in paired or result["tool_call_id"] in known:
                continue
            name, content = result["name"], result["content"]
            kind = "tool_failure" if air.is_failure(content) else "tool_success"
            give(result["call_index"], name, air.rewards(kind, name, content))
        for observation in code:
            give(observation.call_index, observation.name, observation.rewards)
        return events

    def _get(self, path: str, otherwise: dict) -> dict:
        for attempt in range(_TRIES):
            try:
                with _of_nobody():
                    return self._ask(path)
            except Exception as error:
                _log.debug("GET %s failed", path, exc_info=True)
                failure = error
                time.sleep(0.1 * attempt)
        _log.warning("AIR could not ask the server for %s: %s; some rewards are lost", path, failure)
        return otherwise


def match(observations: list[Observation], results: list[dict]) -> dict[Observation, dict]:
    """Which tool result belongs to which observed tool whose tool call's id is not known.

    Args:
        observations: tools that have ended.
        results: {"tool_call_id", "name", "content", "call_index"}, from the server.

    Returns:
        For each observation at most one result, and none twice; the surest pairs first: the same name and text, then
        the same name after the same call, then the same name alone, as an agent may send an output in other words and
        ask the model in between, then, since it may call a function by another name than the model does, the same call.
    """
    tests = (
        lambda o, r: o.name == r["name"] and o.call_index == r["call_index"] and r["content"] in o.texts,
        lambda o, r: o.name == r["name"] and r["content"] in o.texts,
        lambda o, r: o.name == r["name"] and o.call_index == r["call_index"],
        lambda o, r: o.name == r["name"],
        lambda o, r: o.call_index == r["call_index"] and not o.nested,
    )
    known = {observation.tool_call_id for observation in observations}
    free = [result for result in results if result["tool_call_id"] not in known]
    pairs: dict[Observation, dict] = {}
    for belongs in tests:
        for observation in observations:
            if observation in pairs or observation.tool_call_id is not None:
                continue
            result = next((r for r in free if belongs(observation, r)), None)
            if result is not None:
                pairs[observation] = result
                free.remove(result)
    return pairs


def _texts(output: Any) -> tuple[str, ...]:
    if isinstance(output, str):
        return (output[:MAX_TEXT_CHARS],)
    try:
        texts = str(output), json.dumps(output), json.dumps(output, ensure_ascii=False)
    except Exception:
        return ()
    return tuple(text[:MAX_TEXT_CHARS] for text in texts)


# ---- the rollout in hand ----


def current() -> Recorder | None:
    """The recorder of the rollout that this worker runs; None outside of one, and in what an earlier one left behind.

    A plain thread, which has no context, is taken for a part of the rollout in hand, and so is a task that an earlier
    one has begun: the worker's loop ends those, and one in another loop is a server of the agent's, for all rollouts.
    """
    rollout = _of_context.get()
    return _current if rollout in (None, _current) or (rollout and _in_event_loop()) else None


def _in_event_loop() -> bool:
    try:
        return bool(sys.modules["asyncio"].get_running_loop())
    except (KeyError, RuntimeError):
        return False


@contextlib.contextmanager
def recording(recorder: Recorder):
    """Makes it the current one inside the block."""
    global _current
    _current = recorder
    token = _of_context.set(recorder)
    try:
        yield recorder
    finally:
        _of_context.reset(token)
        _current = None


def _of_nobody():
    """What happens inside the block, in its context, is no part of a rollout: an agent may have our requests traced."""
    return _having(_of_context, False)


def inside_tool():
    """Tools that begin inside the block, in its context, are parts of the one that runs."""
    return _having(_inside_tool, True)


@contextlib.contextmanager
def _having(variable: contextvars.ContextVar, value: Any):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
