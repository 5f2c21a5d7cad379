"""A real server, started as the reference starts one, and a folder with the files that the reference's blocks name."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLI = (sys.executable, "-m", "agent_lightning.cli")
# The sampler's shapes are the quickstart's, whose programs are compiled already: what is tested is the interface.
SMALL = {
    "algorithm.group_size": 2,
    "runtime.max_seq_len": 128,
    "runtime.gradient_accumulation": 1,
    "runtime.batch_size": 16,
    "runtime.checkpoint_interval": 1,
    "sampler.max_slots": 16,
    "sampler.kv_cache_tokens": 4096,
    "sampler.page_size": 8,
    "sampler.decode_steps": 4,
    "sampler.prefill_chunk": 32,
    "sampler.max_tokens": 8,
    "logging.tensorboard": "false",
}

AGENT = """
from langchain_anthropic import ChatAnthropic

def my_agent(resource, task):
    llm = ChatAnthropic(base_url=resource.model_api, max_tokens=8)
    return float(llm.invoke(task.question).text.strip() == task.ground_truth)
"""


@pytest.fixture(scope="session")
def server_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    command = [*CLI, "server", "start", "--model", "builtin:tiny", "--port", "0", "--algorithm", "grpo"]
    flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--workdir", str(folder / "workdir"), *flags],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
        )
    try:
        yield _url_in(log, process)
    finally:
        process.terminate()
        process.wait(30)


def _url_in(log: Path, process: subprocess.Popen) -> str:
    deadline = time.monotonic() + 300
    while "serving" not in (text := log.read_text()) or "http://" not in text:
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.1)
    url = next(word for word in text.split() if word.startswith("http://"))
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health") as reply:
                assert json.load(reply)["status"] == "ok"
                return url
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def additions(first: int, count: int) -> str:
    tasks = ({"question": f"{n}+{n + 1}=", "ground_truth": str(2 * n + 1)} for n in range(first, first + count))
    return "".join(json.dumps(task) + "\n" for task in tasks)


@pytest.fixture
def project(tmp_path, monkeypatch, server_url):
    """An empty folder but for the tasks and the agent's script; the environment names the server."""
    (tmp_path / "train.jsonl").write_text(additions(10, 8))
    (tmp_path / "test.jsonl").write_text(additions(40, 4))
    (tmp_path / "my_agent.py").write_text(AGENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_LIGHTNING_SERVER_URL", server_url)
    return tmp_path


@pytest.fixture
def command(project):
    """Runs a command as the reference prints it, backslashes and all, and returns what it wrote to stdout."""

    def run(text: str, **environ: str) -> str:
        words = text.replace("\\\n", " ").split()
        assert words[0] == "agent-lightning"
        done = subprocess.run(
            [*CLI, *words[1:]],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
