"""Error Handling: each exception where the reference catches it."""

import pytest

from agent_lightning import Client
from agent_lightning.exceptions import DataUploadError, InvalidConfigError, ServerConnectionError, TrainingError


def my_agent(resource, task):
    raise ValueError("the agent's own fault")


def run(server_url) -> None:
    """As printed."""
    try:
        client = Client(server_url)
        client.upload_data("train.jsonl")
        client.train(my_agent)
    except ServerConnectionError:
        print("Cannot connect to Lightning Server")
    except DataUploadError as e:
        print(f"Data upload failed: {e}")
    except TrainingError as e:
        print(f"Training error: {e}")


def test_server_connection_error(project, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_MAX_RETRIES", "0")
    run("http://127.0.0.1:9")
    assert capsys.readouterr().out == "Cannot connect to Lightning Server\n"


def test_data_upload_error(project, server_url, capsys):
    (project / "train.jsonl").write_text('{"question": "1+1="}\n{"answer": 2}\n')
    run(server_url)
    assert capsys.readouterr().out.startswith(
        "Data upload failed: train.jsonl, line 2: the field 'question' is missing"
    )


def test_training_error(project, server_url, capsys):
    run(server_url)
    said = capsys.readouterr().out
    assert said.startswith("Training error: ") and "ValueError: the agent's own fault" in said


def test_invalid_config_error(monkeypatch):
    monkeypatch.delenv("AGENT_LIGHTNING_SERVER_URL", raising=False)
    with pytest.raises(InvalidConfigError, match="AGENT_LIGHTNING_SERVER_URL"):
        Client()
