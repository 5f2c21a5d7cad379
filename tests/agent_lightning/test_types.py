"""Resource, Task, Transition, Trajectory and TrainingResult behave as the API reference prints them."""

import copy
import json
import pickle

import pytest

from agent_lightning import Resource, Task, TrainingResult, Trajectory, Transition

LINE = '{"question": "Q", "ground_truth": "A", "schema": {"a": 1}, "difficulty": 3, "items": ["x"]}'


def test_task_fields_by_attribute_and_item():
    task = Task(json.loads(LINE))
    assert (task.question, task.ground_truth, task.schema, task.difficulty) == ("Q", "A", {"a": 1}, 3)
    assert task["question"] == "Q"


def test_item_access_wins_where_a_field_has_a_methods_name():
    task = Task(json.loads(LINE))
    assert task["items"] == ["x"]
    assert ("difficulty", 3) in task.items()


def test_missing_field_names_the_fields_there_are():
    task = Task(json.loads(LINE))
    with pytest.raises(AttributeError, match="no field 'answer'; it has: question, ground_truth"):
        _ = task.answer
    with pytest.raises(KeyError):
        _ = task["answer"]
    assert getattr(task, "answer", None) is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_task_survives_copying(duplicate):
    task = duplicate(Task(json.loads(LINE)))
    assert isinstance(task, Task)
    assert task.schema == {"a": 1}
    assert json.loads(json.dumps(task)) == json.loads(LINE)


def test_resource_metadata_defaults_to_empty():
    assert Resource("http://x", "m", "t", 0).metadata == {}


def test_several_models_have_urls_by_number_and_by_name():
    resource = Resource("http://x/rollout/t", "query", "t", 0, model_names=["query", "answer"])
    assert resource.model_api_1 == "http://x/rollout/t/model/1"
    assert resource.model_api_2 == "http://x/rollout/t/model/2"
    assert resource.model_apis == {
        "query": "http://x/rollout/t/model/query",
        "answer": "http://x/rollout/t/model/answer",
    }
    with pytest.raises(AttributeError, match="no model_api_3: the server trains 2 models, query, answer"):
        _ = resource.model_api_3
    with pytest.raises(KeyError, match="no model 'judge'; there are query, answer"):
        resource.model_apis["judge"]
    for name in ("model_api_0", "model_api_", "model_api_x", "models"):
        assert not hasattr(resource, name)
    assert pickle.loads(pickle.dumps(resource)) == copy.deepcopy(resource) == resource


def test_a_single_model_has_a_url_for_every_role():
    resource = Resource("http://x/rollout/t", "tiny", "t", 0)
    assert resource.model_names == ["tiny"]
    assert resource.model_apis["tiny"] == resource.model_api
    assert resource.model_api_7 == "http://x/rollout/t/model/7"
    assert resource.model_apis["judge"] == "http://x/rollout/t/model/judge"


def test_the_references_example_trajectory_has_total_1_5():
    trajectory = Trajectory(
        task_id="task-001",
        transitions=[
            {"input": "Generate query for: Capital of France?", "output": "France capital city", "reward": 0.5},
            Transition("Question: Capital of France?\nDocs: Paris is...", "Paris", 1.0),
        ],
        metadata={"num_steps": 2},
    )
    assert trajectory.total_reward == 1.5
    assert trajectory.transitions[0] == Transition(
        "Generate query for: Capital of France?", "France capital city", 0.5, {}
    )


PRINTED = """
{
    "task_id": "task-001",
    "transitions": [
        {
            "input": "Generate query for: Capital of France?",
            "output": "France capital city",
            "reward": 0.5
        },
        {
            "input": "Question: Capital of France?\\nDocs: Paris is...",
            "output": "Paris",
            "reward": 1.0
        }
    ],
    "total_reward": 1.5,
    "metadata": {"num_steps": 2}
}
"""


def test_a_trajectory_is_written_as_the_reference_prints_it():
    trajectory = Trajectory(**json.loads(PRINTED))
    assert json.dumps(trajectory.to_dict()) == json.dumps(json.loads(PRINTED))
    step = {
        "input": "Question: What is 2+2?\nAnswer:",
        "output": "4",
        "reward": 1.0,
        "metadata": {"model": "llama-3.2-3b", "temperature": 0.7, "tool_calls": []},
    }
    assert json.dumps(Transition(**step).to_dict()) == json.dumps(step)


def test_a_failed_trajectory_has_no_total():
    failed = Trajectory("t", [Transition("a", "b", 0.5)], metadata={"num_steps": 1, "status": "failed"})
    assert failed.total_reward is None and Trajectory(**failed.to_dict()) == failed


def test_training_result_reads_well():
    result = TrainingResult(0.875, [0.25, 0.5], [0.125, 0.875], ["a/step-1", "a/step-2"], 2, 12.34)
    text = repr(result)
    assert "final_reward=0.875" in text
    assert "0.125 -> 0.875 (2)" in text
    assert "a/step-2" in text and "a/step-1" not in text
