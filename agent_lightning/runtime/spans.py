"""The worker's OpenTelemetry: what becomes of the spans that instrumentors make. Imported when tracing is on."""

import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import Status, StatusCode

from agent_lightning.runtime import recorder
from agent_lightning.runtime.recorder import MAX_SPAN_CHARS, Observation, Recorder
from agent_lightning.runtime.tracing import TraceSettings

MAX_VALUE_CHARS = 4_000

_log = logging.getLogger(__name__)

_DECORATED = "agent_lightning.decorated"  # on the spans of `@tool` and `run_code`, which tell the recorder themselves
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_GEN_AI_KINDS = {
    "chat": "LLM",
    "execute_tool": "TOOL",
    "generate_content": "LLM",
    "invoke_agent": "AGENT",
    "text_completion": "LLM",
}

# What is kept of a span without its context: nothing that holds what was said.
_NO_CONTENT = (
    "agent.name",
    "agent_lightning.",
    "error.type",
    "gen_ai.agent.name",
    "gen_ai.operation.name",
    "gen_ai.provider.name",
    "gen_ai.request.",
    "gen_ai.response.",
    "gen_ai.system",
    "gen_ai.tool.call.id",
    "gen_ai.tool.name",
    "gen_ai.usage.",
    "graph.node.",
    "llm.model_name",
    "llm.provider",
    "llm.system",
    "llm.token_count.",
    "openinference.span.kind",
    "tool.name",
    "tool_call.id",
)
_CONTENT = ("gen_ai.system_instructions",)  # begins like one of the above and is content


def listen(settings: TraceSettings) -> tuple[TracerProvider, "RolloutSpans"]:
    """The tracer provider, the agent's own if it has set one, with a listener for what becomes of its spans.

    Spans are exported over OTLP if the environment names an endpoint, and the provider is not the agent's own, which
    exports as the agent has it.
    """
    provider = trace.get_tracer_provider()
    export = None
    if not isinstance(provider, TracerProvider):
        attributes = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "agent-lightning"}
        provider = TracerProvider(resource=Resource.create(attributes))
        trace.set_tracer_provider(provider)
        export = _otlp_export()
    spans = RolloutSpans(settings, export)
    provider.add_span_processor(spans)
    return provider, spans


def _otlp_export() -> SpanProcessor | None:
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = "grpc" if protocol == "grpc" else "http"
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        package = f"opentelemetry-exporter-otlp-proto-{protocol}"
        _log.warning("an OTLP endpoint is set, but nothing is exported: pip install %s", package)
        return None
    return BatchSpanProcessor(OTLPSpanExporter())


class RolloutSpans(SpanProcessor):
    """Hands every span that ended within its rollout to the recorder, and all on to the exporter if there is one.

    Attributes:
        settings: which spans, and how much of them.
    """

    def __init__(self, settings: TraceSettings, export: SpanProcessor | None):
        self.settings = settings
        self._attributes: dict[str, Any] = {}  # of the rollout in hand
        self._export = export
        self._lock = threading.Lock()
        # By span id; weak because some spans never end.
        self._rollouts: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()
        self._begun: dict[int, tuple[str, Observation]] = {}  # spans that may be tools, by their id
        self._claimed: dict[int, list[Observation]] = {}

    def begin_rollout(self, attributes: dict[str, Any]) -> None:
        """Puts these attributes on all spans from here on, and forgets those of the last rollout that never ended."""
        self._attributes = attributes
        with self._lock:
            self._begun.clear()
            self._claimed.clear()

    def claim(self, observation: Observation) -> None:
        """Says that the tool of this name is observed already: by the open span so named, or the one that is current.

        LangChain's spans are never current, and smolagents' have their tool's name only when they end.
        """
        current = trace.get_current_span().get_span_context().span_id
        with self._lock:
            named = [
                span_id
                for span_id, (name, _) in self._begun.items()
                if name == observation.name and not self._claimed.get(span_id)
            ]
            for span_id in {*named[-1:], current} & self._begun.keys():
                self._claimed.setdefault(span_id, []).append(observation)

    def on_start(self, span, parent_context=None) -> None:
        span.set_attributes(self._attributes)
        rollout = recorder.current()
        if rollout is None:
            return
        with self._lock:
            self._rollouts[span.context.span_id] = rollout
        # Some instrumentors say only at the end which kind of span it was.
        if _DECORATED in span.attributes or _kind(span.attributes) not in ("TOOL", None):
            return
        if not self.settings.trace_tool_calls:
            return
        # Frameworks call tools by the model's names, so there is no need to guess by the call alone: hence nested.
        observation = rollout.begin(span.name, nested=True)
        if observation is not None:
            with self._lock:
                self._begun[span.context.span_id] = (span.name, observation)

    def on_end(self, span: ReadableSpan) -> None:
        kind = _kind(span.attributes)
        with self._lock:
            rollout = self._rollouts.pop(span.context.span_id, None)
            begun = self._begun.pop(span.context.span_id, None)
            claimed = self._claimed.pop(span.context.span_id, [])
        running = rollout is not None and rollout is recorder.current()
        if running and begun is not None and kind == "TOOL":
            _observe(span, rollout, begun[1], claimed)
        if (kind == "LLM" and not self.settings.trace_llm_calls) or (
            kind == "TOOL" and not self.settings.trace_tool_calls
        ):
            return
        if not self.settings.trace_context:
            span = _without_content(span)
        if running:
            rollout.add_span(_event(span, kind))
        if self._export is not None:
            self._export.on_end(span)

    def shutdown(self) -> None:
        if self._export is not None:
            self._export.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._export is None or self._export.force_flush(timeout_millis)


class ToolSpan:
    """The span of a tool that `@tool` decorates, or of code; see `tracing.tool_span`."""

    def __init__(self, tracer: trace.Tracer, name: str, arguments: Any):
        attributes = {
            "openinference.span.kind": "TOOL",
            "tool.name": name,
            "input.value": _json(arguments),
            "input.mime_type": "application/json",
            _DECORATED: True,
        }
        self._span = tracer.start_span(name, attributes=attributes)

    def __enter__(self) -> "ToolSpan":
        self._open = trace.use_span(self._span, record_exception=False, set_status_on_exception=False)
        self._open.__enter__()
        return self

    def end(self, output: Any, error: BaseException | None) -> None:
        if error is None:
            self._span.set_attribute("output.value", output if isinstance(output, str) else _json(output))
            self._span.set_status(Status(StatusCode.OK))
        else:
            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        self._span.end()

    def __exit__(self, kind, error, traceback) -> None:
        self._open.__exit__(None, None, None)
        if error is not None:  # nobody has said how it ended
            self._span.end()


# ---- reading spans ----


def _kind(attributes: Mapping[str, Any] | None) -> str | None:
    """OpenInference's kind of span ("LLM", "TOOL", "CHAIN" ...), also by OpenTelemetry's names; None if unknown."""
    attributes = attributes or {}
    return attributes.get("openinference.span.kind") or _GEN_AI_KINDS.get(attributes.get("gen_ai.operation.name", ""))


def _observe(span: ReadableSpan, rollout: Recorder, observation: Observation, claimed: list[Observation]) -> None:
    """Tells the recorder how a tool's span has ended, unless the function of that name inside it has told already."""
    attributes = span.attributes
    observation.name = attributes.get("tool.name") or attributes.get("gen_ai.tool.name") or span.name
    output = attributes.get("output.value", attributes.get("gen_ai.tool.call.result", ""))
    call_id = attributes.get("tool_call.id") or attributes.get("gen_ai.tool.call.id")
    failed = span.status.status_code is StatusCode.ERROR
    message = _tool_message(output)
    if message:  # LangChain's, which knows the id, and failures that the framework has made a reply of
        call_id, failed = call_id or message["tool_call_id"], failed or message.get("status") == "error"
        output = message.get("content", output)
    for told in claimed:
        if told.name == observation.name:
            told.tool_call_id = told.tool_call_id or call_id
            return
    observation.tool_call_id = call_id
    if failed:
        rollout.failed(observation, _error(span) or str(output))
    else:
        rollout.succeeded(observation, output)


def _tool_message(output: Any) -> dict | None:
    if not isinstance(output, str) or '"tool_call_id"' not in output:
        return None
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):
        return None
    value = value.get("data", value) if isinstance(value, dict) else None
    return value if isinstance(value, dict) and isinstance(value.get("tool_call_id"), str) else None


def _error(span: ReadableSpan) -> str:
    """What a failed span says went wrong, in a line or so."""
    for event in span.events:
        if "exception.message" in (event.attributes or {}):
            kind = str(event.attributes.get("exception.type", "")).rpartition(".")[2]
            return f"{kind or 'Exception'}: {event.attributes['exception.message']}"
    return span.status.description or ""


def _without_content(span: ReadableSpan) -> ReadableSpan:
    """A copy with no attribute that holds what was said, and of an error no more than that it was one."""
    kept = {
        name: value
        for name, value in span.attributes.items()
        if name.startswith(_NO_CONTENT) and not name.startswith(_CONTENT)
    }
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=kept,
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _event(span: ReadableSpan, kind: str | None) -> dict:
    """A span as it is stored: JSON-ready, long values cut."""
    attributes, left = {}, MAX_SPAN_CHARS
    for name, value in span.attributes.items():
        value = _plain(value)
        left -= len(name) + len(value if isinstance(value, str) else json.dumps(value))
        if left < 0:
            attributes["agent_lightning.cut"] = True
            break
        attributes[name] = value
    event = {
        "name": span.name,
        "span_kind": kind,
        "trace_id": f"{span.context.trace_id:032x}",
        "span_id": f"{span.context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
        "start_time": span.start_time / 1e9,
        "duration_s": (span.end_time - span.start_time) / 1e9,
        "status": span.status.status_code.name.lower(),
        "attributes": attributes,
    }
    if error := _error(span):
        event["error"] = error[:MAX_VALUE_CHARS]
    return event


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_VALUE_CHARS else value[:MAX_VALUE_CHARS] + "..."
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_repr)
    except Exception:  # a key that is no text, a circle, too deep
        return _repr(value)


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # the tool's own class may be broken
        return type(value).__name__
