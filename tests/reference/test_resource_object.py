"""Resource Object: its fields, and the usage with LangChain that needs neither a model's name nor a key."""

import dataclasses

from agent_lightning import Client, Resource

# As printed but for max_tokens; `evaluate` is the user's own function.
USAGE = """
from langchain_anthropic import ChatAnthropic

def evaluate(response):
    return len(response.text) / 100

def my_agent(resource, task):
    # Use model_api for LLM calls
    llm = ChatAnthropic(base_url=resource.model_api)

    # Access metadata
    if resource.metadata.get("use_cot"):
        prompt = f"Think step by step: {task.question}"
    else:
        prompt = task.question

    response = llm.invoke(prompt)
    return evaluate(response)
"""


def test_resource_fields():
    fields = {field.name: field.type for field in dataclasses.fields(Resource)}
    printed = {"model_api": str, "model_name": str, "task_id": str, "worker_id": int, "metadata": dict}
    assert dict(list(fields.items())[:5]) == printed


def test_usage(project):
    (project / "my_agent.py").write_text(USAGE)
    with Client() as client:
        result = client.evaluate("my_agent.py", "test.jsonl", metadata={"use_cot": True})
        assert result.failures == 0
        (call,) = next(client.trajectories(result)).transitions
        assert "Think step by step: 40+41=" in call.input
        result = client.evaluate("my_agent.py", "test.jsonl")
        (call,) = next(client.trajectories(result)).transitions
        assert "Think" not in call.input and "40+41=" in call.input
