"""Task Object: fields as attributes and as items."""

import json

from agent_lightning import Client, Task

LINE = {"question": "Q", "ground_truth": "A", "schema": {"type": "object"}, "difficulty": 3}


def agent(resource, task):
    print(task.question)  # "Q"
    print(task.ground_truth)  # "A"
    print(task.schema)  # {...}
    print(task.difficulty)  # 3
    return float(task["difficulty"] == task.difficulty == 3 and task["schema"] == {"type": "object"})


def test_example(project, capfd):
    (project / "data.jsonl").write_text(json.dumps(LINE))
    with Client() as client:
        result = client.evaluate(agent, "data.jsonl", nworkers=1)
    assert result.mean == 1.0 and result.failures == 0
    said = capfd.readouterr().err
    assert all(f"[worker 0] {text}\n" in said for text in ("Q", "A", "{'type': 'object'}", "3"))


def test_an_items_name_wins_over_a_methods():
    task = Task({"question": "Q", "items": [1]})
    assert task["items"] == [1] and task.question == "Q"
