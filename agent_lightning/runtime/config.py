"""What `set_config` sets: the worker's own settings, beside what `train` is told."""

import difflib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from agent_lightning.exceptions import InvalidConfigError

ENABLE_AIR = "LIGHTNING_ENABLE_AIR"
MAX_RETRIES = "LIGHTNING_MAX_RETRIES"

_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "air_enabled": (lambda v: isinstance(v, bool), "True or False"),
    "max_retries": (lambda v: type(v) is int and v >= 0, "a whole number from 0 on"),
    "timeout": (lambda v: type(v) in (int, float) and 0 < v < math.inf, "a number of seconds above 0"),
}

_values: dict[str, Any] = {}
_listeners: list[Callable[[], None]] = []


def set_config(config: Mapping[str, Any]) -> None:
    """Sets how agents are run in the workers. Keys that are not named keep their values; None is the default again.

    Args:
        config: any of

            - `air_enabled`: whether tools and code earn rewards of their own (see `air`); by default
              LIGHTNING_ENABLE_AIR, or False.
            - `max_retries`: how often the agent's SDK sends a model call again that failed; by default
              LIGHTNING_MAX_RETRIES, or the SDK's own default.
            - `timeout`: seconds that the agent's SDK waits for a model call; by default the SDK's own.

            The last two become the defaults of the clients of `openai` and `anthropic` and of LangChain's `ChatOpenAI`
            and `ChatAnthropic`, and so hold for every framework built on them. What the agent gives a client itself
            still wins.

    Raises:
        InvalidConfigError: an unknown key, or a value of the wrong kind; nothing is set then.
    """
    if not isinstance(config, Mapping):
        raise InvalidConfigError(f"set_config takes a dictionary, not {config!r}")
    for key, value in config.items():
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.0)[0]
            raise InvalidConfigError(
                f"set_config does not know {key!r}", hint=f"did you mean {close!r}? It knows {', '.join(_KEYS)}"
            )
        holds, text = _KEYS[key]
        if value is not None and not holds(value):
            raise InvalidConfigError(f"set_config: {key} must be {text}, not {value!r}")
    for key, value in config.items():
        if value is None:
            _values.pop(key, None)
        else:
            _values[key] = value
    for listener in _listeners:
        listener()


def explicit() -> dict[str, Any]:
    """What `set_config` has set, without the environment's part."""
    return dict(_values)


def air_enabled() -> bool:
    """Whether AIR is on. InvalidConfigError if LIGHTNING_ENABLE_AIR says neither."""
    if "air_enabled" in _values:
        return _values["air_enabled"]
    text = os.environ.get(ENABLE_AIR, "").strip().lower()
    if text and text not in _BOOLS:
        raise InvalidConfigError(f"{ENABLE_AIR}={os.environ[ENABLE_AIR]!r} is neither true nor false")
    return _BOOLS.get(text, False)


def max_retries() -> int | None:
    """How often SDKs try again; None leaves it to them."""
    text = os.environ.get(MAX_RETRIES, "").strip()
    return _values.get("max_retries", int(text) if text.isdecimal() else None)


def timeout_s() -> float | None:
    """Seconds that SDKs wait for a model call; None leaves it to them."""
    return _values.get("timeout")


def listen(listener: Callable[[], None]) -> None:
    """Has `listener` called after every `set_config`."""
    _listeners.append(listener)
