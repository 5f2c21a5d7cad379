"""What `Client` and worker pools speak, over a real socket."""

import hashlib
import json
import os
import signal
import socket
import threading
import time

import httpx
import openai
import pytest

from agent_lightning.client import Client
from agent_lightning.exceptions import DataUploadError, InvalidConfigError, ServerConnectionError, TrainingError
from lightning_jax import server
from lightning_jax.policies import Policies
from lightning_jax.server.control import JobRunner
from lightning_jax.store import Store

from .conftest import settings

KEY = "sésame-123"
SMALL = {
    "algorithm.group_size": 2,
    "runtime.batch_size": 4,
    "runtime.gradient_accumulation": 1,
    "runtime.remat": "none",
}


@pytest.fixture(scope="module")
def jobs(start, random_model):
    return start(random_model, jobs=True, **SMALL)


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1?", "ground_truth": str(i + 1)}) + "\n" for i in range(4)))
    return str(path)


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+2?"}) + "\n" for i in range(4)))
    return str(path)


def fills(resource, task):
    """Rewards replies with many letters, which random weights vary in."""
    import httpx

    body = {"messages": [{"role": "user", "content": task.question}], "max_tokens": 8}
    reply = httpx.post(f"{resource.model_api}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    return sum(c.isascii() for c in reply["choices"][0]["message"]["content"]) / 8


def raises(resource, task):
    raise ValueError("no idea")


# ---- keys and health ----


def test_the_key_is_asked_for_everywhere_but_where_it_is_not(start, random_model):
    running = start(random_model, **{"server.api_key": KEY})
    assert running.http.get("/health").json()["status"] == "ok"
    closed = [
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/messages"),
        ("PUT", "/api/datasets/d"),
        ("POST", "/api/jobs"),
        ("GET", "/api/jobs/x"),
        ("GET", "/openapi.json"),
    ]
    for method, path in closed:
        for headers in (
            {},
            {"x-api-key": "wrong"},
            {"authorization": b"Bearer wrong"},
            {"authorization": KEY.encode()},
        ):
            assert running.http.request(method, path, headers=headers).status_code == 401, (method, path, headers)
        for headers in ({"x-api-key": KEY.encode()}, {"authorization": f"Bearer {KEY}".encode()}):
            assert running.http.request(method, path, headers=headers).status_code != 401
    with openai.OpenAI(base_url=running.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client.models.list()
    with Client(running.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(ServerConnectionError, match="API key"):
            client._transport.request("GET", "/api/jobs/x")
    assert httpx.post(f"{running.url}/rollout/nope/v1/messages", json={}).status_code == 401
    store_job = running.store.create_job({"kind": "train"})
    ids = running.store.open_rollouts(store_job, step=1, mode="train", entries=[_entry()], timeout_s=60, seed=0)
    token = running.store.exchange(store_job, "p", [], [], 1)["leases"][0]["token"]
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert httpx.post(f"{running.url}/rollout/{token}/chat/completions", json=body, timeout=60).status_code == 200
    assert ids


def _entry():
    from lightning_jax.store import RolloutEntry

    return RolloutEntry("t", 0, 0, 0, {"question": "?"})


def test_nothing_is_leased_to_a_pool_that_has_hung_up(serving):
    job = serving.store.create_job({"kind": "train"})
    body = {"pool_id": "p", "results": [], "running": [], "want": 1, "wait_s": 20}
    with pytest.raises(httpx.ReadTimeout):
        serving.http.post(f"/api/jobs/{job}/exchange", json=body, timeout=0.3)
    serving.store.open_rollouts(job, step=1, mode="train", entries=[_entry()], timeout_s=60)
    reply = serving.http.post(f"/api/jobs/{job}/exchange", json=body).json()
    assert [lease["attempt"] for lease in reply["leases"]] == [1]
    serving.store.cancel_open(job)


def test_a_port_in_use_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(InvalidConfigError, match="in use"):
            server.bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InvalidConfigError, match="cannot serve on"):
        server.bind("203.0.113.7", 0)
    sock = server.bind("127.0.0.1", 0)
    with pytest.raises(InvalidConfigError, match="in use"):
        server.bind("127.0.0.1", sock.getsockname()[1])
    sock.close()


# ---- datasets ----


def put(serving, data_id, train=None, test=None, **params):
    """Uploads a dataset as it goes over the wire: the test tasks, then the training tasks."""
    params |= {"test": len(test)} if test is not None else {}
    params |= {"train": len(train)} if train is not None else {}
    body = (test or b"") + (train or b"")
    pieces = (body[i : i + 100_000] for i in range(0, len(body), 100_000))
    return serving.http.put(f"/api/datasets/{data_id}", params=params, content=pieces)


def test_upload_streams_and_names_the_bad_line(serving):
    task = json.dumps({"question": "x" * 1000}).encode() + b"\n"
    big = put(serving, "big.1", task * 20_000, task * 3, sha256=hashlib.sha256(task * 20_003).hexdigest())
    assert big.json() == {"data_id": "big.1", "splits": {"train": 20_000, "test": 3}}
    assert serving.http.get("/api/datasets/big.1").json() == big.json()
    for train, test, split, line in (
        (task * 5000 + b'{"ground_truth": 1}\n' + task, task, "train", 5001),
        (task, task * 4 + b"[]", "test", 5),
    ):
        bad = put(serving, "big.1", train, test)
        assert bad.status_code == 422
        error = bad.json()["error"]
        assert error["type"] == "DataUploadError" and error["line"] == line
        assert f"{split} tasks, line {line}: " in error["message"]
    for wrong in ({"sha256": "0" * 64}, {"train": 999}, {"train": 1003}):
        refused = (
            put(serving, "big.1", **{"train": task} | wrong)
            if "sha256" in wrong
            else serving.http.put("/api/datasets/big.1", params=wrong, content=task)
        )
        assert refused.status_code == 422 and "than was announced" in refused.json()["error"]["message"]
    assert serving.http.get("/api/datasets/big.1").json()["splits"] == {"train": 20_000, "test": 3}
    assert put(serving, "new", test=b"[]").status_code == 422
    assert serving.http.put("/api/datasets/new", content=task).status_code == 422
    assert serving.http.get("/api/datasets/new").status_code == 404
    assert put(serving, "..%2Fx", task).status_code == 404
    assert put(serving, ".x", task).json()["error"]["type"] == "DataUploadError"


def test_a_dataset_is_replaced_as_a_whole(serving):
    """A test file that cannot be stored leaves the old training file too; one that is not sent is gone afterwards."""
    old, new = b'{"question": "old"}\n', b'{"question": "new"}\n'
    put(serving, "whole", old, old)
    assert put(serving, "whole", new, b'{"question"').status_code == 422
    assert [serving.store.task("whole", split, 0)["question"] for split in ("train", "test")] == ["old", "old"]
    seen, over = set(), threading.Event()

    def look():
        while not over.is_set():
            seen.add(json.dumps(serving.http.get("/api/datasets/whole").json()["splits"]))

    reader = threading.Thread(target=look)
    reader.start()
    for count in (2000, 3, 2000):
        put(serving, "whole", new * count, old * count)
    put(serving, "whole", new)
    over.set()
    reader.join()
    both = [{"test": n, "train": n} for n in (1, 2000, 3)]
    assert seen <= {json.dumps(splits, separators=(", ", ": ")) for splits in [*both, {"train": 1}]}
    assert serving.http.get("/api/datasets/whole").json()["splits"] == {"train": 1}


def test_an_upload_that_breaks_off_leaves_nothing(serving):
    with socket.create_connection(("127.0.0.1", httpx.URL(serving.url).port)) as raw:
        raw.sendall(b"PUT /api/datasets/broken?train=1000000 HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        raw.sendall(b'{"question": 1}\n' * 1000)
    time.sleep(0.3)
    assert serving.http.get("/api/datasets/broken").status_code == 404


def test_client_uploads(serving, dataset, held_out, tmp_path):
    with Client(serving.url) as client:
        data_id = client.upload_data(dataset, test_file=held_out)
        assert client.upload_data(dataset, data_id="mine") == "mine"
    assert serving.store.num_tasks(data_id, "test") == 4 and serving.store.num_tasks("mine", "train") == 4
    assert serving.store.task("mine", "train", 2) == {"question": "2+1?", "ground_truth": "3"}
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"answer": "b"}\n')
    with Client(serving.url) as client, pytest.raises(DataUploadError, match="2.*question"):
        client.upload_data(str(tmp_path / "bad.jsonl"))


# ---- jobs ----


def test_a_job_from_upload_to_result(jobs, dataset, held_out):
    """The real client, worker processes, training loop and learner."""
    version = jobs.policy.version
    with Client(jobs.url) as client:
        client.upload_data(dataset, test_file=held_out)
        result = client.train(fills, nworkers=2, batch_size=2, epochs=1, metadata={"use_cot": True})
    assert result.total_steps == 2 and len(result.train_rewards) == 2 and len(result.test_rewards) == 2
    assert jobs.policy.version == version + 2
    (job,) = [job for job in jobs.store.jobs() if job["status"] == "succeeded"]
    assert (job["step"], job["total_steps"]) == (2, 2) and job["spec"]["batch_size"] == 2
    reply = jobs.http.get(f"/api/jobs/{job['job_id']}").json()
    assert reply["status"] == "succeeded" and reply["result"]["total_steps"] == 2
    events = jobs.http.get(f"/api/jobs/{job['job_id']}/events").json()
    kinds = [event["kind"] for event in events["events"]]
    assert kinds.count("step") == 2 and kinds.count("evaluation") == 2 and kinds[-1] == "ended"
    after = events["events"][-1]["seq"]
    start = time.monotonic()
    more = jobs.http.get(f"/api/jobs/{job['job_id']}/events", params={"after": after, "wait_s": 20}).json()
    assert more == {"job_status": "succeeded", "events": []} and time.monotonic() - start < 5


def test_a_failing_agent_fails_the_job_with_its_traceback(jobs, dataset):
    with Client(jobs.url) as client:
        client.upload_data(dataset)
        with pytest.raises(TrainingError, match="(?s)ValueError: no idea.*in raises"):
            client.train(raises, nworkers=1, batch_size=2)


def wait_for(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stopping_and_queueing(jobs, dataset):
    with Client(jobs.url) as client:
        data_id = client.upload_data(dataset)
    body = {"kind": "train", "data_id": data_id, "key": "one"}
    first = jobs.http.post("/api/jobs", json=body).json()["job_id"]
    assert jobs.http.post("/api/jobs", json=body).json()["job_id"] == first, "a retried request makes no second job"
    second = jobs.http.post("/api/jobs", json=body | {"key": "two"}).json()["job_id"]
    status = lambda job: jobs.http.get(f"/api/jobs/{job}").json()["status"]  # noqa: E731
    wait_for(lambda: status(first) == "running")
    assert status(second) == "queued"
    assert jobs.http.post(f"/api/jobs/{second}/stop", json={}).json()["job_status"] == "stopped"

    replies = []
    exchange = {"pool_id": "p", "results": [], "running": [], "want": 1, "wait_s": 0}
    leases = []
    wait_for(
        lambda: leases.extend(jobs.http.post(f"/api/jobs/{first}/exchange", json=exchange).json()["leases"]) or leases
    )
    held = [lease["lease_id"] for lease in leases]
    exchange |= {"running": held, "want": 100}
    jobs.http.post(f"/api/jobs/{first}/exchange", json=exchange)
    poll = threading.Thread(
        target=lambda: replies.append(
            jobs.http.post(f"/api/jobs/{first}/exchange", json=exchange | {"wait_s": 20}).json()
        )
    )
    poll.start()
    time.sleep(0.2)
    assert not replies, "nothing to lease: the request waits"
    jobs.http.post(f"/api/jobs/{first}/stop", json={"now": True})
    poll.join(10)
    assert replies[0]["cancelled"] == held and replies[0]["leases"] == []
    wait_for(lambda: status(first) == "stopped")


def test_a_job_says_how_many_workers_it_can_use(jobs, dataset, held_out):
    with Client(jobs.url) as client:
        data_id = client.upload_data(dataset, held_out)
    slots, group = jobs.config.sampler.max_slots, jobs.config.algorithm.group_size
    for body, expected in (
        ({"batch_size": 1}, group),
        ({"batch_size": 1000}, slots),
        ({}, jobs.config.runtime.batch_size),
        ({"kind": "evaluate"}, 4),
        ({"kind": "evaluate", "num_samples": 1000}, slots),
    ):
        reply = jobs.http.post("/api/jobs", json={"data_id": data_id} | body).json()
        jobs.http.post(f"/api/jobs/{reply['job_id']}/stop", json={"now": True})
        assert reply["rollouts_at_once"] == expected, body


def test_what_a_job_cannot_be(jobs, serving, dataset):
    def refused(body, status):
        reply = jobs.http.post("/api/jobs", json=body)
        assert reply.status_code == status, reply.text
        return reply.json()["error"]["message"]

    with Client(jobs.url) as client:
        data_id = client.upload_data(dataset)
    assert "no dataset 'nope'" in refused({"data_id": "nope"}, 404)
    assert "test tasks" in refused({"kind": "evaluate", "data_id": data_id}, 404)
    assert "epochs" in refused({"data_id": data_id, "epochs": 0}, 422)
    for name in ("epochs", "total_steps"):  # of what the record has no room for nothing at all would be recorded
        assert name in refused({"data_id": data_id, name: 2**63}, 422)
    assert "batchsize" in refused({"data_id": data_id, "batchsize": 3}, 422)
    assert "kind" in refused({"data_id": data_id, "kind": "dance"}, 422)
    assert "no dataset 'nope' with test tasks" in refused({"data_id": data_id, "test_data_id": "nope"}, 404)
    assert "for evaluations" in refused({"data_id": data_id, "checkpoint": "latest"}, 400)
    assert "for evaluations" in refused({"data_id": data_id, "num_samples": 2}, 400)
    with Client(jobs.url) as client:
        many = {"data_id": client.upload_data(dataset, dataset), "kind": "evaluate", "num_samples": 10**12}
    assert "an evaluation may have 1048576" in refused(many, 400)
    assert jobs.http.get("/api/jobs/nope").status_code == 404
    assert jobs.http.get("/api/jobs/nope/events").status_code == 404
    assert jobs.http.post("/api/jobs/nope/stop", json={}).status_code == 404
    empty = {"pool_id": "p"}
    assert jobs.http.post("/api/jobs/nope/exchange", json=empty).status_code == 404
    assert jobs.http.post("/api/jobs/nope/exchange", json={"want": 1}).status_code == 422
    endless = '{"pool_id": "p", "results": [{"lease_id": "x", "duration_s": NaN}]}'
    assert (
        jobs.http.post(
            "/api/jobs/nope/exchange", content=endless, headers={"content-type": "application/json"}
        ).status_code
        == 422
    )
    other = serving.http.post("/api/jobs", json={"data_id": data_id})
    assert other.status_code == 400 and "takes no others" in other.json()["error"]["message"]


class Restartable:
    """A server that runs jobs, in one work directory and on one port however often it is started."""

    def __init__(self, random_model, path):
        self.config = settings(random_model, path / "work", **SMALL, **{"runtime.checkpoint_interval": 1})
        self._port = 0
        self.start()

    def start(self):
        self.policies = Policies(self.config)
        self.store = Store(f"{self.config.workdir}/store.sqlite3")
        self.runner = JobRunner(self.policies, self.store, self.config)
        app = server.create_app(config=self.config, policies=self.policies, store=self.store, jobs=self.runner)
        self.running = server.RunningServer(app, server.bind("127.0.0.1", self._port))
        self.url = self.running.url
        self._port = int(self.url.rpartition(":")[2])

    def stop(self):
        """The first job's status at the end."""
        self.running.stop()
        self.runner.close()
        status = self.store.jobs()[0]["status"]
        self.store.close()
        self.policies.close()
        return status


@pytest.fixture
def restartable(random_model, tmp_path):
    restartable = Restartable(random_model, tmp_path)
    yield restartable
    restartable.stop()


def test_an_unfinished_job_goes_on_after_a_restart(restartable, dataset):
    """A server ends in the middle of a job; the next one, in the same work directory, runs it to its end."""
    client = Client(restartable.url, max_retries=10)
    client.upload_data(dataset)
    results = []
    trainer = threading.Thread(target=lambda: results.append(client.train(fills, nworkers=1, batch_size=1, epochs=4)))
    trainer.start()
    wait_for(lambda: any(job["step"] >= 2 for job in restartable.store.jobs()), 120)
    assert restartable.stop() == "running", "it was in the middle"
    restartable.start()
    assert restartable.policies.step >= 2, "from the checkpoint"
    trainer.join(120)
    assert results and results[0].total_steps == 16
    assert [job["status"] for job in restartable.store.jobs()] == ["succeeded"]
    client.close()


def fills_slowly(resource, task):
    time.sleep(1.0)
    return fills(resource, task)


@pytest.mark.parametrize("asked", ["before", "after"])
def test_one_ctrl_c_outlives_a_restart(restartable, dataset, asked):
    """It comes in the middle of a step that the server does not end, or while there is no server."""
    status = []

    def restart():
        wait_for(lambda: any(lease.step == 3 for lease in restartable.store._rollouts._leases.values()), 120)
        if asked == "before":
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: all(stop.after_step for stop in restartable.runner._stops.values()))
        status.append(restartable.stop())
        if asked == "after":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2.0)  # the client's own retries are over
        restartable.start()

    restarter = threading.Thread(target=restart)
    restarter.start()
    with Client(restartable.url, max_retries=1) as client:
        client.upload_data(dataset)
        result = client.train(fills_slowly, nworkers=2, batch_size=1, epochs=2)
    restarter.join()
    assert status == ["running"] and restartable.store.jobs()[0]["status"] == "stopped"
    assert result.total_steps == 2 if asked == "before" else 2 <= result.total_steps <= 4
    assert result.checkpoints[-1].endswith(f"step-{result.total_steps}")
