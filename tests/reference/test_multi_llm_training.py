"""Advanced: Multi-LLM Training. With one model, the second URL is the same weights in another role."""

from agent_lightning import Client

AGENT = """
from langchain_anthropic import ChatAnthropic

def evaluate(answer):
    return 1.0 if answer.text is not None else 0.0

def agent_with_multi_llm(resource, task):
    # LLM 1: Query generator
    query_llm = ChatAnthropic(base_url=resource.model_api_1)
    query = query_llm.invoke(task.question)

    # LLM 2: Answer generator
    answer_llm = ChatAnthropic(base_url=resource.model_api_2)
    answer = answer_llm.invoke(query.text or "?")  # printed as invoke(query): LangChain takes text or a list there

    return evaluate(answer)
"""


def test_agent_with_multi_llm(project):
    (project / "my_agent.py").write_text(AGENT)
    with Client() as client:
        result = client.evaluate("my_agent.py", "test.jsonl", nworkers=2)
        assert result.failures == 0 and result.mean == 1.0
        roles = [[t.metadata["role"] for t in trajectory.transitions] for trajectory in client.trajectories(result)]
    assert roles == [["1", "2"]] * 4
