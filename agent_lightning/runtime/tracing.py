"""`auto_instrument`: OpenTelemetry spans of tools and model calls, through the OpenInference instrumentors installed.

It takes effect in the workers. An instrumentor is switched on when its framework is imported, so that a worker pays for
what the agent uses. Spans are stored with their rollout, and exported over OTLP where OTEL_EXPORTER_OTLP_ENDPOINT (or
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is set; AIR hears of the tools among them. OpenTelemetry is no requirement of this
package and is not imported before a worker needs it.
"""

import contextlib
import dataclasses
import importlib.util
import logging
from typing import Any

from agent_lightning.runtime.import_hook import after_import
from agent_lightning.runtime.recorder import Observation, Recorder

INSTALL = "pip install opentelemetry-sdk openinference-instrumentation-FRAMEWORK"

# Entry points whose framework's module has another name than theirs.
_MODULE_OF = {
    "agno": "agno.agent",
    "autogen_agentchat": "autogen_agentchat.agents",
    "google_adk": "google.adk",
    "google_genai": "google.genai",
    "langchain": "langchain_core",
    "llama_index": "llama_index.core",
    "openai_agents": "agents",
    "portkey": "portkey_ai",
}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TraceSettings:
    """What `auto_instrument` was called with."""

    trace_llm_calls: bool = True
    trace_tool_calls: bool = True
    trace_context: bool = True


_settings: TraceSettings | None = None
_ready = False  # whether this is a worker whose agent has been loaded
_quiet = False  # whether somebody else says what is missing
_tracer = None  # of the worker's tracer provider, once there is one
_spans = None  # the `spans.RolloutSpans` that listens to it


def auto_instrument(trace_llm_calls: bool = True, trace_tool_calls: bool = True, trace_context: bool = True) -> None:
    """Traces agents in the workers with every OpenInference instrumentor that is installed; none is required.

    Args:
        trace_llm_calls: keep the spans of model calls.
        trace_tool_calls: keep the spans of tools, and let AIR hear of them.
        trace_context: keep inputs, outputs and messages in the spans; otherwise names, times, token counts and status.
    """
    global _settings
    _settings = TraceSettings(trace_llm_calls, trace_tool_calls, trace_context)
    if _ready:
        activate()
    else:
        _say_what_is_missing()


def settings() -> TraceSettings | None:
    """What `auto_instrument` has set; None if it was not called."""
    return _settings


def load_quietly() -> None:
    """What is missing is not said by this process, which is one of many workers."""
    global _quiet
    _quiet = True


def settle(settings: TraceSettings | None) -> None:
    """This worker's agent has been loaded: traces from now on if its parent or the agent called `auto_instrument`.

    Not before, because a tracer provider of the agent's own has to come first; the second one has no effect.
    """
    global _ready, _settings
    _ready = True
    _settings = settings or _settings
    if _settings is not None:
        activate()


def activate() -> None:
    """Makes the tracer, once, and has instrumentors switched on as their frameworks are imported."""
    global _tracer, _spans
    if _spans is not None:
        _spans.settings = _settings
        return
    if not _has_opentelemetry():
        return
    from agent_lightning.runtime import spans

    provider, _spans = spans.listen(_settings)
    _tracer = provider.get_tracer("agent_lightning")
    for entry in _instrumentors():
        module = _MODULE_OF.get(entry.name, entry.name.replace("-", "_"))
        after_import(module, lambda _, entry=entry: _switch_on(entry, provider))
    after_import("pydantic_ai", lambda module: _switch_on_pydantic_ai(module, provider))


def begin_decorated(recorder: Recorder, name: str) -> Observation | None:
    """`Recorder.begin` for a function under `@tool`, which a framework's span around it must not report again."""
    observation = recorder.begin(name)
    if observation is not None and _spans is not None:
        _spans.claim(observation)
    return observation


def tool_span(name: str, arguments: Any) -> "contextlib.AbstractContextManager":
    """A span, to be entered and then ended with `end(output, error)`; without a tracer it does nothing."""
    if _tracer is None:
        return _NO_SPAN
    from agent_lightning.runtime import spans

    return spans.ToolSpan(_tracer, name, arguments)


def rollout_span(attributes: dict[str, Any]) -> "contextlib.AbstractContextManager":
    """The span of a whole rollout, which makes all of its spans one trace."""
    if _tracer is None:
        return contextlib.nullcontext()
    _spans.begin_rollout(attributes)
    return _tracer.start_as_current_span(
        "rollout",
        attributes={"openinference.span.kind": "AGENT"},
        record_exception=False,
        set_status_on_exception=False,
    )


class _NoSpan(contextlib.nullcontext):
    def end(self, output: Any, error: BaseException | None) -> None:
        pass


_NO_SPAN = _NoSpan()


def _has_opentelemetry() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.sdk") is not None
    except ModuleNotFoundError:
        return False


def _instrumentors() -> list:
    from importlib import metadata

    return list(metadata.entry_points(group="openinference_instrumentor"))


def _say_what_is_missing() -> None:
    if _quiet:
        return
    if not _has_opentelemetry():
        _log.warning("auto_instrument does nothing: OpenTelemetry is not installed; %s", INSTALL)
    elif not _instrumentors():
        _log.warning(
            "auto_instrument found no OpenInference instrumentor: only @tool, run_code and the agent's own spans are "
            "traced; %s",
            INSTALL,
        )


def _switch_on(entry, provider) -> None:
    entry.load()().instrument(tracer_provider=provider)


def _switch_on_pydantic_ai(module, provider) -> None:
    """PydanticAI makes spans by itself, under OpenTelemetry's own names for generative AI."""
    from pydantic_ai.models.instrumented import InstrumentationSettings

    module.Agent.instrument_all(InstrumentationSettings(tracer_provider=provider))
