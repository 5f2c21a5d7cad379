"""Training Result: its fields and the printed usage."""

import dataclasses
from pathlib import Path

from agent_lightning import Client, TrainingResult


def my_agent(resource, task):
    return 0.5


def test_fields():
    names = [field.name for field in dataclasses.fields(TrainingResult)]
    printed = ["final_reward", "train_rewards", "test_rewards", "checkpoints", "total_steps", "total_time"]
    assert names[: len(printed)] == printed


def test_usage(project, capsys):
    client = Client()
    client.upload_data("train.jsonl", "test.jsonl")
    result = client.train(my_agent, nworkers=8)

    print(f"Final reward: {result.final_reward}")
    print(f"Training time: {result.total_time / 3600:.2f} hours")
    print(f"Best checkpoint: {result.checkpoints[-1]}")

    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Final reward: 0.5" and said[1] == "Training time: 0.00 hours"
    assert Path(said[2].removeprefix("Best checkpoint: ")).name.startswith("step-")
    assert result.test_rewards == [0.5, 0.5] and result.total_steps == len(result.train_rewards) == 1
