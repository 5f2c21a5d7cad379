"""What goes wrong before a job runs, and what an upload leaves on the server."""

import itertools
import json
import os
import re
import sys
import warnings

import pytest

from agent_lightning import Client, DataUploadError, EvalResult, InvalidConfigError, ServerConnectionError, dataset
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
    assert client.upload_data(files(GOOD), files(b'{"question": "held out"}', "test.jsonl")) != first
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
        (b'{"question": null}', "the field 'question' is null"),
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


def test_a_pipe_is_refused_before_anything_is_read(served, files, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for arguments in ((str(tmp_path / "pipe"),), (files(GOOD), str(tmp_path / "pipe"))):
        with pytest.raises(DataUploadError, match="cannot read .*pipe twice: not a regular file"):
            Client(served.url).upload_data(*arguments)


def questions(*texts, **fields) -> bytes:
    return b"".join(json.dumps({"question": text} | fields).encode() + b"\n" for text in texts)


def test_test_tasks_that_are_training_tasks_are_reported(served, files):
    client = Client(served.url)
    train = b"\n" + questions("a", "b", "c") + questions("same words", context="one") + questions("b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.upload_data(files(train), files(questions("d") + questions("same words", context="two"), "test.jsonl"))
    test = questions("d", "c", "b ") + b'{"ground_truth": "1", "question": "a", "x": 2}\n' + questions("b", "b")
    with pytest.warns(UserWarning) as caught:
        client.upload_data(files(train), files(test, "test.jsonl"))
    (warning,) = [warning for warning in caught if warning.category is UserWarning]
    said = str(warning.message)
    assert said.startswith("5 of 6 test tasks are also in the training file")
    assert "test line 2 = training line 4, test line 3 = training line 3, test line 4 = training line 2" in said
    assert warning.filename == __file__, "the caller's line is named"


def test_of_very_many_test_tasks_the_first_are_compared(served, files, monkeypatch):
    monkeypatch.setattr(dataset, "COMPARED_TASKS", 3)
    with pytest.warns(UserWarning, match="^1 of the first 3 test tasks is also in the training file"):
        Client(served.url).upload_data(files(questions("c", "d")), files(questions(*"abcd"), "test.jsonl"))


def test_both_files_arrive_together_or_not_at_all(served, files, monkeypatch):
    client = Client(served.url, max_retries=0)
    client.upload_data(files(questions("old")), files(questions("old test"), "test.jsonl"), "both")
    read_chunks = dataset.read_chunks

    def then_fails(paths, sizes):
        """Stands for a disk that fails, or a connection that breaks, when the test tasks have been sent."""
        yield from itertools.islice(read_chunks(paths, sizes), 1)
        raise OSError("gone")

    monkeypatch.setattr(dataset, "read_chunks", then_fails)
    with pytest.raises(OSError, match="gone"):
        client.upload_data(files(questions("new")), files(questions("new test"), "test.jsonl"), "both")
    assert served.store.task("both", "test", 0) == {"question": "old test"}
    assert served.store.task("both", "train", 0) == {"question": "old"}
    monkeypatch.undo()
    client.upload_data(files(questions("new")), data_id="both")
    assert [info.split for info in served.store.dataset("both")] == ["train"]


def test_a_file_that_changes_during_the_upload_is_refused(served, files, monkeypatch):
    path = files(questions("aa", "bb"))
    read_chunks = dataset.read_chunks

    def changes(paths, sizes):
        files(questions("aa", "xx"))
        yield from read_chunks(paths, sizes)

    monkeypatch.setattr(dataset, "read_chunks", changes)
    with pytest.raises(DataUploadError, match="what arrived is another than was announced.*\n.*written to"):
        Client(served.url).upload_data(path, data_id="changed")
    assert served.store.dataset("changed") == []


def test_files_that_hold_nothing_or_are_not_there(served, files, tmp_path):
    client = Client(served.url)
    with pytest.raises(DataUploadError, match="holds no task"):
        client.upload_data(files(b"\n\n"))
    with pytest.raises(DataUploadError, match="cannot read .*gone.jsonl: No such file"):
        client.upload_data(str(tmp_path / "gone.jsonl"))


def test_names_that_a_dataset_cannot_have(served, files):
    for name in ("not a name", "not/a/name", "x" * 129, ".."):
        with pytest.raises(DataUploadError, match=f"{re.escape(repr(name))} is not a name"):
            Client(served.url).upload_data(files(GOOD), data_id=name)


def test_nobody_there(files):
    client = Client("http://127.0.0.1:9", max_retries=0)
    with pytest.raises(ServerConnectionError, match="cannot reach the server"):
        client.upload_data(files(GOOD))


def test_bad_arguments_start_nothing(served, files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    client = Client(served.url)
    with pytest.raises(InvalidConfigError, match="no dataset"):
        client.train(lambda resource, task: 1)
    client.upload_data(files(GOOD))
    wrong = [{"nworkers": 0}, {"nworkers": -2}, {"epochs": 0}, {"batch_size": 1.5}, {"batch_size": True}]
    wrong += [{"eval_interval": 0}, {"checkpoint_dir": 5}, {"test_file": 5}, {"rollout_timeout": float("inf")}]
    wrong += [{"rollout_timeout": "5"}, {"rollout_timeout": True}, {"max_attempts": "3"}]
    wrong += [{"metadata": {"a": float("nan")}}, {"metadata": {"a": object()}}]
    for arguments in wrong:
        with pytest.raises(InvalidConfigError, match=next(iter(arguments))):
            client.train(lambda resource, task: 1, **arguments)
    with pytest.raises(InvalidConfigError, match="num_samples=0"):
        client.evaluate(lambda resource, task: 1, num_samples=0)
    with pytest.raises(InvalidConfigError, match="success_threshold='x'"):
        client.evaluate(lambda resource, task: 1, num_samples=2, success_threshold="x")
    with pytest.raises(InvalidConfigError, match="success_threshold=nan is not a number"):
        client.evaluate(lambda resource, task: 1, num_samples=2, success_threshold=float("nan"))
    with pytest.raises(InvalidConfigError, match="rollout_timeout='5' is not a positive number of seconds"):
        client.evaluate(lambda resource, task: 1, rollout_timeout="5")
    for checkpoint in (5, ""):
        with pytest.raises(InvalidConfigError, match=f"checkpoint={checkpoint!r} is not a path"):
            client.evaluate(lambda resource, task: 1, checkpoint=checkpoint)
    for arguments in ({"output_dir": ""}, {"output_dir": None}, {"checkpoint": 5}):
        with pytest.raises(InvalidConfigError, match=f"{next(iter(arguments))}=.* is not a path"):
            client.download_model(**{"output_dir": "model"} | arguments)
    for job in (None, 5, "", EvalResult(0.0, 0.0)):
        with pytest.raises(InvalidConfigError, match="job=.* is neither a job's id nor a result of a job"):
            client.trajectories(job)
    with pytest.raises(InvalidConfigError, match="train_file=None is not a path"):
        client.upload_data(None)
    with pytest.raises(InvalidConfigError, match="train_file='' is not a path"):
        client.upload_data("")
    with pytest.raises(DataUploadError, match="data_id 5"):
        client.upload_data(files(GOOD), data_id=5)
    with pytest.raises(InvalidConfigError, match="server_url=5"):
        Client(5)
    for timeout in (0, -1, "300", True):
        with pytest.raises(InvalidConfigError, match="timeout="):
            Client(served.url, timeout=timeout)
    with Client(served.url, timeout=sys.maxsize) as patient:  # longer than sockets can wait
        patient.upload_data(files(GOOD))
    for max_retries in (1.5, True, "3", ""):
        with pytest.raises(InvalidConfigError, match="max_retries="):
            Client(served.url, max_retries=max_retries)
    for verify_ssl in ("no", None, 0):
        with pytest.raises(InvalidConfigError, match="verify_ssl="):
            Client(served.url, verify_ssl=verify_ssl)
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
