"""What SDKs assume in a worker where the agent says nothing: the reference's snippet, and what set_config sets."""

import os
import socket
import sys
import threading
import time

import pytest

from agent_lightning import Pool, TrainingError


def evaluate(response):
    return 1.0 if response.tool_calls or isinstance(response.content, str) else 0.0


def verbatim(resource, task):
    from langchain_anthropic import ChatAnthropic

    # Use model_api for LLM calls
    llm = ChatAnthropic(base_url=resource.model_api)

    # Access metadata
    if resource.metadata.get("use_cot"):
        prompt = f"Think step by step: {task.question}"
    else:
        prompt = task.question

    response = llm.invoke(prompt)
    return evaluate(response)


def test_the_references_snippet(serving_tools):
    (record,) = serving_tools.run(verbatim, [{"question": "2+2?"}], nworkers=1)
    assert record.reward == 1.0, record.traceback
    (call,) = record.calls
    assert call.messages == [{"role": "user", "content": "2+2?"}]
    assert call.request["dialect"] == "anthropic_messages"


def test_langchain_with_no_arguments_at_all(serving_tools):
    def agent(resource, task):
        from langchain_anthropic import ChatAnthropic
        from langchain_openai import ChatOpenAI

        class Mine(ChatAnthropic):
            pass

        assert ChatAnthropic().model == Mine().model == resource.model_name
        assert ChatAnthropic(model="other").model == "other"
        return len([llm.invoke("2+2?") for llm in (ChatAnthropic(), Mine(), ChatOpenAI())])

    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.reward == 3.0 and len(record.calls) == 3, record.traceback


def test_variables_of_the_users_own_lead_no_client_elsewhere(serving_tools, monkeypatch):
    for name in ("OPENAI_API_BASE", "ANTHROPIC_API_URL", "ANTHROPIC_API_BASE"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    def agent(resource, task):
        from langchain_anthropic import ChatAnthropic
        from langchain_openai import ChatOpenAI

        assert os.environ["ANTHROPIC_API_BASE"] == resource.model_api  # LiteLLM's
        return len([llm.invoke("2+2?") for llm in (ChatAnthropic(max_retries=0), ChatOpenAI(max_retries=0))])

    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.reward == 2.0 and len(record.calls) == 2, record.traceback


def test_calls_without_a_client_go_to_the_rollout_that_makes_them(serving_tools):
    def agent(resource, task):
        import openai

        openai.chat.completions.create(model="m", messages=[{"role": "user", "content": task.question}])
        return 1.0

    records = serving_tools.run(agent, [{"question": "2+2?"}, {"question": "3+3?"}, {"question": "4+4?"}], nworkers=1)
    asked = [[call.messages[0]["content"] for call in record.calls] for record in records]
    assert asked == [["2+2?"], ["3+3?"], ["4+4?"]], records[-1].traceback


def test_a_client_made_at_import_is_an_error_that_says_where_to_make_it(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    script = tmp_path / "too_early.py"
    script.write_text("import openai\nclient = openai.OpenAI()\ndef agent(resource, task): return 1.0\n")
    pool = Pool("http://127.0.0.1:9", "no-job", str(script), 1, max_retries=0)
    with pytest.raises(TrainingError, match="(?s)client = openai.OpenAI.*hint: create clients inside the agent"):
        pool.run()


def test_retries_and_time_limits_of_set_config(serving_tools, runtime, monkeypatch):
    """Where the SDK is imported before or after set_config; an argument of the agent's wins."""

    def agent(resource, task):
        import anthropic
        import openai
        from langchain_anthropic import ChatAnthropic
        from langchain_openai import ChatOpenAI

        clients = [openai.OpenAI(), openai.AsyncOpenAI(), anthropic.Anthropic(), anthropic.AsyncAnthropic()]
        clients += [ChatOpenAI().root_client, ChatAnthropic()._client]
        for client in clients:
            assert (client.max_retries, client.timeout) == (task.max_retries, 12.5), client
        explicit = openai.OpenAI(max_retries=1, timeout=3.0)
        assert (explicit.max_retries, explicit.timeout) == (1, 3.0)
        return 1.0

    runtime.set_config({"timeout": 12.5})
    monkeypatch.setenv("LIGHTNING_MAX_RETRIES", "5")
    (record,) = serving_tools.run(agent, [{"max_retries": 5}], nworkers=1)
    assert record.reward == 1.0, record.traceback
    runtime.set_config({"max_retries": 7})
    (record,) = serving_tools.run(agent, [{"max_retries": 7}], nworkers=1)
    assert record.reward == 1.0, record.traceback


def test_set_config_in_the_agent_holds_for_what_is_imported_already(serving_tools):
    def agent(resource, task):
        import openai

        from agent_lightning.runtime import set_config

        before = openai.OpenAI().max_retries
        set_config({"max_retries": 9})
        return 10 * before + openai.OpenAI().max_retries

    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.reward == 29.0  # the SDK's own default is 2


def test_none_is_the_sdks_own_default_again(serving_tools):
    def agent(resource, task):
        import anthropic
        import openai
        from langchain_anthropic import ChatAnthropic
        from langchain_openai import ChatOpenAI

        from agent_lightning.runtime import set_config

        def defaults():
            clients = [openai.OpenAI(), openai.AsyncOpenAI(), anthropic.Anthropic(), anthropic.AsyncAnthropic()]
            clients += [ChatOpenAI().root_client, ChatAnthropic()._client]
            return [(client.max_retries, client.timeout) for client in clients], openai.max_retries, openai.timeout

        own = defaults()
        set_config({"max_retries": 9, "timeout": 5.0})
        assert all(held == (9, 5.0) for held in defaults()[0])
        set_config({"max_retries": None, "timeout": None})
        assert defaults() == own
        return 1.0

    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.reward == 1.0, record.traceback


@pytest.fixture
def silent():
    """A server that takes requests and never answers: (its URL, the list of connections)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def take():
            try:
                while True:
                    connections.append(listener.accept()[0])
            except OSError:
                pass

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in connections:
        connection.close()


def test_a_call_without_an_answer_ends_in_time(serving_tools, runtime, silent):
    url, connections = silent

    def agent(resource, task):
        import openai

        start = time.monotonic()
        try:
            openai.OpenAI(base_url=url).models.list()
        except openai.APITimeoutError:
            return time.monotonic() - start
        return None

    runtime.set_config({"timeout": 0.3, "max_retries": 1})
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert 0.6 <= record.reward < 10.0 and len(connections) == 2


def test_workers_import_no_sdk_of_their_own(serving_tools):
    def agent(resource, task):
        heavy = {"openai", "anthropic", "langchain_core", "langchain_anthropic", "opentelemetry", "httpx"}
        return len(heavy & set(sys.modules))

    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.reward == 0.0
