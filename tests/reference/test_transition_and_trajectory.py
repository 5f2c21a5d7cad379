"""Transition Data Format and Trajectory Format."""

from agent_lightning import Client, Trajectory, Transition


def test_transition_example():
    example = {
        "input": "Question: What is 2+2?\nAnswer:",
        "output": "4",
        "reward": 1.0,
        "metadata": {"model": "llama-3.2-3b", "temperature": 0.7, "tool_calls": []},
    }
    transition = Transition(**example)
    assert {name: getattr(transition, name) for name in example} == example


def test_trajectory_example():
    example = {
        "task_id": "task-001",
        "transitions": [
            {
                "input": "Generate query for: Capital of France?",
                "output": "France capital city",
                "reward": 0.5,  # Intermediate
            },
            {
                "input": "Question: Capital of France?\nDocs: Paris is...",
                "output": "Paris",
                "reward": 1.0,  # Final
            },
        ],
        "metadata": {"num_steps": 2},
    }
    assert Trajectory(**example).total_reward == 1.5
    trajectory = Trajectory(**example, total_reward=1.5)
    assert [type(transition) for transition in trajectory.transitions] == [Transition, Transition]


def two_steps(resource, task):
    from openai import OpenAI

    client = OpenAI(base_url=resource.model_api, api_key="any")
    for text in (f"Generate query for: {task.question}", f"Question: {task.question}"):
        client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": text}], temperature=0.7, max_tokens=4
        )
    return 1.0


def test_a_servers_trajectories_have_this_form(project):
    with Client() as client:
        result = client.evaluate(two_steps, "test.jsonl", nworkers=2)
        trajectories = list(client.trajectories(result))
    assert len(trajectories) == 4
    for trajectory in trajectories:
        first, second = trajectory.transitions
        assert "Generate query for: " in first.input and first.reward == 0.0 and second.reward == 1.0
        assert trajectory.total_reward == 1.0 and trajectory.metadata["num_steps"] == 2
        assert second.metadata["temperature"] == 0.7 and second.metadata["tool_calls"] == []
        assert isinstance(second.output, str) and "model" in second.metadata
