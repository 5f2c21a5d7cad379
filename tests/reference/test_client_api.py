"""Client API: the class and its four methods."""

import inspect

import pytest

from agent_lightning import Client, EvalResult, Resource, Task, TrainingResult


def printed(function, **expected) -> None:
    """The parameters of the reference, in its order and with its defaults; more may follow them."""
    found = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    given = {p.name: p.default for p in found[: len(expected)]}
    assert given == expected
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in found[: len(expected)])


def agent_func(resource: Resource, task: Task) -> float:
    from openai import OpenAI

    client = OpenAI(base_url=resource.model_api, api_key="any")
    messages = [{"role": "user", "content": task.question}]
    reply = client.chat.completions.create(model=resource.model_name, messages=messages, max_tokens=8)
    reward = float(reply.choices[0].message.content.strip() == task.ground_truth)
    return reward


@pytest.fixture
def client(project):
    with Client() as client:
        yield client


def test_client_class(server_url, monkeypatch):
    # The URL may come from the environment, and so may the number of retries, which is 3 where nothing says otherwise.
    printed(Client.__init__, server_url=None, timeout=300, max_retries=None, verify_ssl=True)
    client = Client(server_url, 300, 3, True)
    assert client.server_url == server_url
    from agent_lightning import settings

    assert settings.max_retries(None) == 3


def test_upload_data(client):
    printed(Client.upload_data, train_file=inspect.Parameter.empty, test_file=None, data_id=None)
    data_id = client.upload_data("train.jsonl")
    assert isinstance(data_id, str) and data_id == client.upload_data("train.jsonl")
    assert client.upload_data("train.jsonl", "test.jsonl", "my-dataset") == "my-dataset"


def test_data_format(client, project):
    (project / "data.jsonl").write_text(
        '{"question": "What is 2+2?", "ground_truth": "4", "context": "..."}\n'
        '{"question": "Capital of France?", "ground_truth": "Paris"}\n'
    )
    assert client.upload_data("data.jsonl")


def test_train(client):
    empty = inspect.Parameter.empty
    printed(
        Client.train,
        agent_func=empty,
        nworkers=-1,
        epochs=1,
        batch_size=32,
        data_id=None,
        checkpoint_dir=None,
        eval_interval=50,
    )
    data_id = client.upload_data("train.jsonl", "test.jsonl")
    result = client.train(
        agent_func,
        nworkers=2,
        epochs=1,
        batch_size=4,
        data_id=data_id,
        checkpoint_dir="checkpoints",
        eval_interval=50,
    )
    assert isinstance(result, TrainingResult)
    assert result.total_steps == 2 and len(result.train_rewards) == 2 and len(result.test_rewards) == 2


def test_evaluate(client):
    printed(Client.evaluate, agent_func=inspect.Parameter.empty, test_file=None, checkpoint=None, nworkers=4)
    result = client.evaluate(agent_func, test_file="test.jsonl", checkpoint=None, nworkers=2)
    assert isinstance(result, EvalResult) and len(result.rewards) == 4 and 0 <= result.mean <= 1


@pytest.mark.parametrize(
    "format, holds", [("huggingface", "tokenizer.json"), ("safetensors", "model.safetensors"), ("onnx", "model.onnx")]
)
def test_download_model(client, project, format, holds):
    printed(Client.download_model, output_dir=inspect.Parameter.empty, checkpoint="latest", format="huggingface")
    client.download_model("model", checkpoint="latest", format=format)
    assert (project / "model" / holds).stat().st_size > 0
