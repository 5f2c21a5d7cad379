"""Spans of real frameworks under installed instrumentors: stored, exported over OTLP, and heard of by AIR."""

import http.server
import logging
import subprocess
import sys
import threading
import time

import pytest

from tests.agent_lightning.test_air import converse, rewards_of


def spans_of(serving, record):
    """(by name, the rollout's spans; the rest of its events)."""
    events = serving.store.rollout_events(record.rollout_id)
    spans = [event for event in events if event["kind"] == "span"]
    return spans, [event for event in events if event["kind"] != "span"]


def named(spans, name):
    return [span for span in spans if span["name"] == name]


def plain_agent(resource, task):
    from agent_lightning.runtime import tool

    @tool
    def add(a, b):
        return a + b

    converse(lambda name: str(add(2, b=task.b)), 2)
    return 1.0


def langchain_agent(resource, task):
    """LangGraph's loop, which ends when a tool has said so; tools are LangChain's, one of them over ours."""
    from langchain.agents import create_agent
    from langchain_anthropic import ChatAnthropic
    from langchain_core.tools import tool as langchain_tool

    from agent_lightning.runtime import tool

    calls = []

    def add(a: int, b: list) -> str:
        """Adds."""
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no such number")
        return "4"

    if task.decorated:
        add = tool(add)
    agent = create_agent(ChatAnthropic(base_url=resource.model_api), [langchain_tool(add)])
    try:
        agent.invoke({"messages": [("user", "2+2?")]}, {"recursion_limit": 5})
    except Exception as error:
        if type(error).__name__ not in ("GraphRecursionError", "ValueError"):
            raise
    return float(len(calls))


def test_openai_and_plain_python(serving_tools, runtime):
    runtime.auto_instrument()
    runtime.set_config({"air_enabled": True})
    one, two = serving_tools.run(plain_agent, [{"b": 1}, {"b": float("1e300")}], nworkers=1)
    assert rewards_of(one) == rewards_of(two) == [0.3, 0.3], one.traceback
    spans, rewards = spans_of(serving_tools, one)
    assert [event["kind"] for event in rewards] == ["reward", "reward"]
    (root,) = [span for span in spans if span["parent_id"] is None]
    assert root["name"] == "rollout" and {span["trace_id"] for span in spans} == {root["trace_id"]}
    llm = [span for span in spans if span["span_kind"] == "LLM"]
    assert len(llm) == 2 and all("2+2?" in span["attributes"]["input.value"] for span in llm)
    tools = named(spans, "add")
    assert [span["attributes"]["output.value"] for span in tools] == ["3", "3"]
    assert all(span["status"] == "ok" and span["duration_s"] >= 0 for span in tools)
    assert {span["attributes"]["agent_lightning.rollout_id"] for span in spans} == {one.rollout_id}
    other, _ = spans_of(serving_tools, two)
    assert not {span["trace_id"] for span in other} & {root["trace_id"]}


@pytest.mark.parametrize("instrumented", [True, False])
def test_langchain(serving_tools, runtime, instrumented):
    """The same rewards with instrumentation and without; a tool that is seen in both ways, or thrice, counts once."""
    if instrumented:
        runtime.auto_instrument()
    runtime.set_config({"air_enabled": True})
    records = serving_tools.run(langchain_agent, [{"decorated": False}, {"decorated": True}], nworkers=1)
    for record in records:
        assert record.reward == 2.0, record.traceback
        if instrumented:  # the second call's tool raised, which ended the loop: no request told of it
            assert rewards_of(record) == [0.3, -0.2], spans_of(serving_tools, record)
    if not instrumented:
        plain, decorated = records
        assert rewards_of(plain) == [0.3, 0.0] and rewards_of(decorated) == [0.3, -0.2]
        return
    spans, _ = spans_of(serving_tools, records[0])
    first, second = named(spans, "add")
    assert (first["span_kind"], first["status"], second["status"]) == ("TOOL", "ok", "error")
    assert "no such number" in second["error"]
    assert {"LLM", "CHAIN", "TOOL", "AGENT"} <= {span["span_kind"] for span in spans}


def test_openai_agents(serving_tools, runtime):
    """An async framework, whose worker keeps one event loop: every rollout's spans are in its own trace."""

    async def agent(resource, task):
        from agents import Agent, MaxTurnsExceeded, OpenAIChatCompletionsModel, Runner, function_tool
        from openai import AsyncOpenAI

        @function_tool(strict_mode=False)
        def add(a: int, b: list) -> str:
            """Adds."""
            if task.fails:
                raise ValueError("no such number")
            return "4"

        model = OpenAIChatCompletionsModel("m", AsyncOpenAI())
        try:
            await Runner.run(Agent(name="adder", model=model, tools=[add]), "2+2?", max_turns=2)
        except MaxTurnsExceeded:
            return 1.0
        return 0.0

    runtime.auto_instrument()
    runtime.set_config({"air_enabled": True})
    good, bad = serving_tools.run(agent, [{"fails": False}, {"fails": True}], nworkers=1)
    assert good.reward == bad.reward == 1.0, good.traceback
    assert rewards_of(good) == [0.3, 0.3], spans_of(serving_tools, good)
    assert rewards_of(bad) == [-0.2, -0.2], spans_of(serving_tools, bad)
    traces = [{span["trace_id"] for span in spans_of(serving_tools, record)[0]} for record in (good, bad)]
    assert len(traces[0]) == len(traces[1]) == 1 and traces[0] != traces[1]


def test_what_is_left_out(serving_tools, runtime):
    runtime.auto_instrument(trace_llm_calls=False, trace_context=False)
    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(plain_agent, [{"b": 1}], nworkers=1)
    spans, _ = spans_of(serving_tools, record)
    assert {span["span_kind"] for span in spans} == {"AGENT", "TOOL"} and rewards_of(record) == [0.3, 0.3]
    assert not any("value" in name for span in spans for name in span["attributes"])
    assert named(spans, "add")[0]["attributes"]["tool.name"] == "add"


def test_without_air_and_in_a_failed_rollout_there_are_spans(serving_tools, runtime):
    def agent(resource, task):
        from agent_lightning.runtime import tool

        @tool
        def search(text):
            raise LookupError(text * 10_000)

        search("x")

    runtime.auto_instrument()
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.status == "failed"
    (span,) = named(spans_of(serving_tools, record)[0], "search")
    assert span["status"] == "error" and span["error"].startswith("LookupError: xxx")
    assert len(str(span)) < 20_000


def test_what_cannot_be_printed_fails_no_tool(serving_tools, runtime):
    def agent(resource, task):
        from agent_lightning.runtime import tool

        class Broken:
            def __repr__(self):
                return self.missing

        @tool
        def search(what, where):
            return what

        deep = []
        for _ in range(100_000):
            deep = [deep]
        search(Broken(), "here")
        search(deep, "there")
        return 1.0

    runtime.auto_instrument()
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.reward == 1.0, record.traceback
    broken, deep = [span["attributes"] for span in named(spans_of(serving_tools, record)[0], "search")]
    assert broken["input.value"] == '{"args": ["Broken", "here"], "kwargs": {}}'
    assert broken["output.value"] == '"Broken"' and deep["output.value"] == "list"


def test_a_span_that_ends_late_is_not_another_rollouts(serving_tools, runtime, tmp_path):
    def agent(resource, task):
        from agent_lightning.runtime import tool

        def wait_for(path):
            while not path.exists():
                time.sleep(0.01)

        @tool
        def search():
            (tmp_path / "begun").touch()
            wait_for(tmp_path / "next rollout")

        if task.first:
            threading.Thread(target=search, name="search", daemon=True).start()
            wait_for(tmp_path / "begun")
        else:
            (tmp_path / "next rollout").touch()
            for thread in threading.enumerate():
                if thread.name == "search":
                    thread.join()
        return 1.0

    runtime.auto_instrument()
    records = serving_tools.run(agent, [{"first": True}, {"first": False}], nworkers=1)
    assert [record.reward for record in records] == [1.0, 1.0]
    for record in records:
        assert [span["name"] for span in spans_of(serving_tools, record)[0]] == ["rollout"]


def test_spans_that_never_end_are_kept_no_longer_than_their_rollout(serving_tools, runtime):
    def agent(resource, task):
        from opentelemetry import trace

        from agent_lightning.runtime import tool, tracing

        @tool
        def search():
            return "found"

        kept = len(tracing._spans._begun) + len(tracing._spans._claimed)
        trace.get_tracer("agent").start_span("search")
        search()
        assert len(tracing._spans._begun) == len(tracing._spans._claimed) == 1
        return kept

    runtime.auto_instrument()
    runtime.set_config({"air_enabled": True})
    records = serving_tools.run(agent, [{}] * 3, nworkers=1)
    assert [record.reward for record in records] == [0.0] * 3, [record.error for record in records]


def test_their_number_and_size_are_bounded(serving_tools, runtime):
    def agent(resource, task):
        from agent_lightning.runtime import tool

        @tool
        def search(text):
            return text

        for _ in range(600):
            search("x" * task.size)
        return 1.0

    runtime.auto_instrument()
    small, large = serving_tools.run(agent, [{"size": 1}, {"size": 100_000}], nworkers=1)
    spans, rest = spans_of(serving_tools, small)
    assert len(spans) == 500 and rest == [{"kind": "spans_dropped", "count": 101}]
    spans, rest = spans_of(serving_tools, large)
    assert sum(len(str(span)) for span in spans) < 1_100_000 and len(spans) + rest[0]["count"] == 601


@pytest.fixture
def collector():
    """An OTLP collector: (its URL, the names of the spans it was sent)."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            import gzip

            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for spans in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {a.key: a.value.string_value for a in spans.resource.attributes}["service.name"]
                received.extend((service, span.name) for scope in spans.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


def test_spans_are_exported_where_an_endpoint_is_set(serving_tools, runtime, collector, monkeypatch):
    url, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    runtime.auto_instrument()
    (record,) = serving_tools.run(plain_agent, [{"b": 1}], nworkers=1)
    assert record.reward == 1.0, record.traceback
    names = [name for service, name in received if service == "agent-lightning"]  # all, when the pool has ended
    assert names.count("add") == 2 and names.count("rollout") == 1 and len(names) == 5


def test_a_tracer_of_the_agents_own_is_used(serving_tools, runtime):
    """Its spans are stored as well, and its exporter goes on."""

    def agent(resource, task):
        from opentelemetry import trace

        with trace.get_tracer("mine").start_as_current_span("my step"):
            pass
        return 1.0

    runtime.auto_instrument()
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert len(named(spans_of(serving_tools, record)[0], "my step")) == 1


def test_requests_of_airs_own_are_no_part_of_the_rollout(serving_tools, runtime):
    """Although the agent has urllib's traced, as OpenTelemetry's instrumentor for it does."""

    def agent(resource, task):
        import urllib.request

        from opentelemetry import trace

        plain_open = urllib.request.OpenerDirector.open

        def traced_open(*args, **kwargs):
            with trace.get_tracer("urllib").start_as_current_span("GET"):
                return plain_open(*args, **kwargs)

        urllib.request.OpenerDirector.open = traced_open
        try:
            return plain_agent(resource, task)
        finally:
            urllib.request.OpenerDirector.open = plain_open

    runtime.set_config({"air_enabled": True})
    runtime.auto_instrument()
    (record,) = serving_tools.run(agent, [{"b": 1}], nworkers=1, timeout_s=30.0)
    assert record.reward == 1.0 and rewards_of(record) == [0.3, 0.3], record.error
    assert named(spans_of(serving_tools, record)[0], "GET") == []


def test_what_is_missing_is_said(runtime, caplog):
    """In a Python that has nothing but this package's path."""
    program = (
        "import logging, sys; logging.basicConfig(); import agent_lightning.runtime as r; r.auto_instrument();"
        "assert 'opentelemetry' not in sys.modules"
    )
    root = runtime.__file__.rpartition("/agent_lightning/")[0]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, env={"PYTHONPATH": root}, check=True
    )
    assert "OpenTelemetry is not installed; pip install" in done.stderr
    with caplog.at_level(logging.WARNING):
        runtime.auto_instrument()
    assert not caplog.records
