"""The way of what was set in the parent process into a worker, and the frame around each of its rollouts."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from agent_lightning.loopback import loopback_host
from agent_lightning.runtime import air, config, recorder, sdk_defaults, tracing

_ASK_TIMEOUT_S = 10.0


def settings() -> dict:
    """What holds in this process beside AIR's handlers, JSON-ready, for `enter` and `settle` in a worker.

    Raises:
        InvalidConfigError: LIGHTNING_ENABLE_AIR says neither yes nor no.
    """
    config.air_enabled()
    trace = tracing.settings()
    return {"config": config.explicit(), "trace": dataclasses.asdict(trace) if trace else None}


def enter(settings: dict, worker_id: int) -> None:
    """Makes this process a worker, before the agent is loaded."""
    config.air_enabled()
    if worker_id or settings["trace"]:
        tracing.load_quietly()
    sdk_defaults.install()
    config.set_config(settings["config"])


def settle(settings: dict, handlers: dict[str, list[Callable]]) -> None:
    """After the agent was loaded: what the parent process has set holds, whatever importing the agent has set."""
    config.set_config(settings["config"])
    air.merge(handlers)
    trace = settings["trace"]
    tracing.settle(tracing.TraceSettings(**trace) if trace else None)


@contextlib.contextmanager
def rollout(lease: dict, *, verify_ssl: bool = True) -> Iterator[recorder.Recorder]:
    """Around one rollout: its tools, code and spans go to the recorder, which is to be finished after the block.

    Args:
        lease: as the pool hands it out.
        verify_ssl: whether the server's certificate is checked.
    """
    metadata = lease["metadata"]
    sdk_defaults.enter_rollout(lease["model_api"], lease["token"], lease["model_name"])
    attributes = {"task_id": str(lease["task_id"])}
    attributes |= {name: metadata[name] for name in ("mode", "rollout_id", "attempt", "step", "policy_version")}
    recording = recorder.Recorder(
        _asker(lease["model_api"], verify_ssl), rewarding=metadata["mode"] == "train" and config.air_enabled()
    )
    with (
        recorder.recording(recording),
        tracing.rollout_span({f"agent_lightning.{name}": value for name, value in attributes.items()}),
    ):
        yield recording


def _asker(model_api: str, verify_ssl: bool) -> Callable[[str], dict]:
    """GETs under a rollout's URL. With urllib: no SDK's instrumentation sees it, and no package is needed."""

    def ask(path: str) -> dict:
        import json
        import ssl
        import urllib.request

        handlers: list = [urllib.request.ProxyHandler({})] if loopback_host(model_api) else []
        if not verify_ssl:
            handlers.append(urllib.request.HTTPSHandler(context=ssl._create_unverified_context()))
        with urllib.request.build_opener(*handlers).open(model_api + path, timeout=_ASK_TIMEOUT_S) as response:
            return json.load(response)

    return ask
