"""What goes wrong before a job runs, and what an upload leaves on the server."""

import os
import re

import pytest

from agent_lightning import Client, DataUploadError, InvalidConfigError, ServerConnectionError
from agent_lightning.client import choose_nworkers

GOOD = b'{"question": "What is 2+2?", "ground_truth": "4", "schema": {"a": [1]}}\n\n{"question": "Capital of France?"}'


@pytest.fixture
def files(tmp_path):
    def write(content: bytes, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write


def test_upload(served, files):
    client = Client(served.url)
    data_id = client.upload_data(files(GOOD), files(b'\xef\xbb\xbf{"question": "T"}', "test.jsonl"))
    assert served.store.num_tasks(data_id, "train") == 2
    assert served.store.task(data_id, "train", 0)["schema"] == {"a": [1]}
    assert served.store.task(data_id, "train", 1) == {"question": "Capital of France?"}
    assert served.store.task(data_id, "test", 0) == {"question": "T"}


def test_the_id_follows_from_the_contents_unless_it_is_given(served, files):
    client = Client(served.url)
    first = client.upload_data(files(GOOD))
    assert client.upload_data(files(GOOD, "copy.jsonl")) == first
    assert client.upload_data(files(GOOD + b"\n" + GOOD)) != first
    assert client.upload_data(files(GOOD), files(GOOD, "test.jsonl")) != first
    assert client.upload_data(files(GOOD), data_id="mine") == "mine"
    assert client.upload_data(files(b'{"question": "new"}'), data_id="mine") == "mine"
    assert served.store.num_tasks("mine", "train") == 1


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"question": "x"', "not valid JSON"),
        (b"[1]", "an array, not an object"),
        (b"3", "a number, not an object"),
        (b'{"prompt": "x"}', "'question' is missing (fields found: 'prompt')"),
        (b'{"question": "\xff"}', "not valid JSON"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_line_is_named_and_nothing_is_kept(served, files, line, says, split):
    bad = files(GOOD + b"\n" + line + b"\n", "bad.jsonl")
    arguments = (bad, None) if split == "train" else (files(GOOD), bad)
    with pytest.raises(DataUploadError, match=rf"bad\.jsonl, line 4: .*{re.escape(says)}"):
        Client(served.url).upload_data(*arguments, data_id="kept")
    assert served.store.dataset("kept") == []


def test_files_that_hold_nothing_or_are_not_there(served, files, tmp_path):
    client = Client(served.url)
    with pytest.raises(DataUploadError, match="holds no task"):
        client.upload_data(files(b"\n\n"))
    with pytest.raises(DataUploadError, match="cannot read .*gone.jsonl: No such file"):
        client.upload_data(str(tmp_path / "gone.jsonl"))


def test_the_servers_own_refusal_arrives(served, files):
    with pytest.raises(DataUploadError, match="'not/a name'|Not Found|not a name"):
        Client(served.url).upload_data(files(GOOD), data_id="not a name")


def test_nobody_there(files):
    client = Client("http://127.0.0.1:9", max_retries=0)
    with pytest.raises(ServerConnectionError, match="cannot reach the server"):
        client.upload_data(files(GOOD))


def test_bad_arguments_start_nothing(served, files):
    client = Client(served.url)
    with pytest.raises(InvalidConfigError, match="no dataset"):
        client.train(lambda resource, task: 1)
    client.upload_data(files(GOOD))
    for arguments in [{"nworkers": 0}, {"nworkers": -2}, {"epochs": 0}, {"batch_size": 1.5}, {"eval_interval": 0}]:
        with pytest.raises(InvalidConfigError, match=next(iter(arguments))):
            client.train(lambda resource, task: 1, **arguments)
    with pytest.raises(InvalidConfigError, match="agent script not found"):
        client.train("nowhere.py")
    assert served.store.jobs() == []


def test_url_and_key_come_from_the_environment(served, files, monkeypatch):
    monkeypatch.setenv("AGENT_LIGHTNING_SERVER_URL", served.url + "/")
    assert Client().upload_data(files(GOOD), data_id="d") == "d"
    monkeypatch.delenv("AGENT_LIGHTNING_SERVER_URL")
    with pytest.raises(InvalidConfigError, match="AGENT_LIGHTNING_SERVER_URL"):
        Client()


def test_choose_nworkers():
    assert choose_nworkers(5) == 5
    assert choose_nworkers(5, most=2) == 5


@pytest.mark.parametrize("cores, most, chosen", [(2, None, 8), (2, 3, 3), (2, 100, 8), (96, None, 64), (96, 100, 64)])
def test_choose_nworkers_by_cores_and_rollouts(monkeypatch, cores, most, chosen):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert choose_nworkers(-1, most=most) == chosen
