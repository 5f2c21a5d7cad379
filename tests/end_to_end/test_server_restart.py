"""A server that is killed in the middle of a training, and started again, costs the client nothing."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from agent_lightning import Client
from tests.agent_lightning.conftest import SMALL
from tests.end_to_end import runs

SETTINGS = SMALL | {
    "algorithm.learning_rate": 1e-4,
    "runtime.checkpoint_interval": 2,
    "sampler.max_tokens": 8,
}


def agent(resource, task):
    import urllib.request

    body = {"messages": [{"role": "user", "content": task.question}], "max_tokens": 4}
    request = urllib.request.Request(f"{resource.model_api}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    return sum(map(ord, answer)) % 7 / 7


class Server:
    """`python -m lightning_jax.main` in mode "serve", always on the same port and work directory."""

    def __init__(self, workdir):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.workdir, self.url = workdir, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        flags = SETTINGS | {"mode": "serve", "workdir": self.workdir, "server.port": self.port}
        command = [sys.executable, "-m", "lightning_jax.main", *(f"--config.{k}={v}" for k, v in flags.items())]
        with open(self.workdir.with_suffix(".log"), "a") as log:
            self.process = subprocess.Popen(command, cwd=runs.ROOT, stdout=log, stderr=log)

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        return self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "run")
    yield server
    server.kill()


def test_a_training_survives_its_server(server, tmp_path):
    for name, first in (("train", 0), ("test", 4)):
        lines = (json.dumps({"question": f"{first + i}+1=?"}) + "\n" for i in range(4))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    codes = []

    def kill_and_start_again():
        """In the middle of the fourth step, behind the checkpoint of the second."""
        deadline = time.monotonic() + 300
        while not any(row["step"] >= 3 for row in runs.metrics(server.workdir)) and time.monotonic() < deadline:
            time.sleep(0.005)
        codes.append(server.kill())
        time.sleep(1.0)
        server.start()

    killer = threading.Thread(target=kill_and_start_again)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(server.url, max_retries=20))  # it is not up yet
        client.upload_data(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))
        killer.start()
        result = client.train(agent, nworkers=2, epochs=6, batch_size=4, eval_interval=2)
        killer.join()
    assert codes == [-signal.SIGKILL]
    assert result.total_steps == 6 and len(result.train_rewards) == 6
    assert result.test_steps == [0, 2, 4, 6] and len(result.test_rewards) == 4
    assert [os.path.basename(path) for path in result.checkpoints] == ["step-2", "step-4", "step-6"]
    rows = [row for row in runs.metrics(server.workdir) if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6], "each once"
    assert [row["reward/mean"] for row in rows] == result.train_rewards
