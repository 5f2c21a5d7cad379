"""A real store behind the real HTTP app, and a way to run an agent on tasks through it."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from agent_lightning import Client, Pool
from tests.server.conftest import tool_model  # noqa: F401 - a fixture

# A server that is up in seconds: few shapes to compile, and the sampler's are those of configs/two_models.py.
SMALL = {
    "algorithm.group_size": 2,
    "runtime.max_seq_len": 64,
    "runtime.gradient_accumulation": 1,
    "runtime.remat": "none",
    "sampler.max_slots": 16,
    "sampler.kv_cache_tokens": 2048,
    "sampler.page_size": 8,
    "sampler.decode_steps": 4,
    "sampler.prefill_chunk": 32,
    "logging.tensorboard": False,
}
OUR_METADATA = ("mode", "rollout_id", "attempt", "step", "policy_version")  # what nobody can displace


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """The configuration of a small server."""
    from lightning_jax import config

    settings = config.default_config()
    settings.update_from_flattened_dict(SMALL)
    settings.workdir = str(tmp_path_factory.mktemp("workdir"))
    settings.algorithm.learning_rate = 1e-4  # a step is felt in the log-probs
    settings.sampler.max_tokens = 8
    return settings


@pytest.fixture(scope="session")
def policies(settings):
    from lightning_jax.policies import Policies

    policies = Policies(settings)
    yield policies
    policies.close()


class Served:
    """The server's control plane, without a job runner: the tests open rollouts and end jobs themselves."""

    def __init__(self, path: Path, settings, policies):
        from lightning_jax.server import RunningServer, bind, create_app
        from lightning_jax.store import Store

        self.store = Store(path / "store.sqlite3")
        self._start = lambda port: RunningServer(
            create_app(config=settings, policies=policies, store=self.store), bind("127.0.0.1", port)
        )
        self._running = self._start(0)
        self.url = self._running.url

    def restart(self, down_s: float) -> None:
        """Takes the server away for a while; it comes back on the same port."""
        self._running.stop()
        time.sleep(down_s)
        self._running = self._start(int(self.url.rpartition(":")[2]))

    def close(self) -> None:
        self._running.stop()
        self.store.close()

    def open_job(
        self, tasks: list[dict], *, timeout_s: float = 60.0, max_attempts: int = 1, mode: str = "train"
    ) -> tuple[str, list[int]]:
        """A running job with one rollout for each task; (job id, rollout ids)."""
        from lightning_jax.store import RolloutEntry

        job_id = self.store.create_job({"kind": "train", "data_id": "none"})
        self.store.update_job(job_id, status="running")
        entries = [RolloutEntry(f"task-{i}", i, i, 0, {"question": "", **task}) for i, task in enumerate(tasks)]
        rollout_ids = self.store.open_rollouts(
            job_id,
            step=1,
            mode=mode,
            entries=entries,
            timeout_s=timeout_s,
            max_attempts=max_attempts,
            metadata={"colour": "red"} | dict.fromkeys(OUR_METADATA, "the user's"),
            seed=0,
        )
        return job_id, rollout_ids

    def run(self, agent, tasks, *, nworkers=2, pool: dict | None = None, **job) -> list:
        """Runs an agent on every task; the records in the tasks' order."""
        job_id, rollout_ids = self.open_job(tasks, **job)
        workers = Pool(self.url, job_id, agent, nworkers, **pool or {})
        with self.ending(job_id, rollout_ids):
            assert workers.run() == "succeeded"
        return self.store.finished(rollout_ids)

    def ending(self, job_id: str, rollout_ids: list[int]) -> "Ending":
        return Ending(self.store, job_id, rollout_ids)


class Ending:
    """Ends a job when its rollouts have ended, as the training loop does; or when the block is left."""

    def __init__(self, store, job_id, rollout_ids):
        self._left = threading.Event()

        def wait():
            store.wait(job_id, rollout_ids, stop=self._left.is_set)
            store.update_job(job_id, status="succeeded")

        self._thread = threading.Thread(target=wait)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._left.set()
        self._thread.join()


@pytest.fixture
def served(tmp_path, settings, policies):
    served = Served(tmp_path, settings, policies)
    yield served
    served.close()


@pytest.fixture(scope="session")
def tool_policies(settings, tool_model, tmp_path_factory):  # noqa: F811
    """A model whose every reply is a call of the tool `add`; with its settings."""
    from lightning_jax.policies import Policies

    settings = settings.copy_and_resolve_references()
    with settings.unlocked():
        settings.workdir = str(tmp_path_factory.mktemp("workdir"))  # the other model's checkpoints may be in its own
        settings.model.path = str(tool_model)
        settings.runtime.max_seq_len = 512
        settings.sampler.kv_cache_tokens = 4096
    policies = Policies(settings)
    yield settings, policies
    policies.close()


@pytest.fixture(scope="module")
def serving_tools(tmp_path_factory, tool_policies):
    served = Served(tmp_path_factory.mktemp("served"), *tool_policies)
    yield served
    served.close()


@pytest.fixture
def runtime(monkeypatch):
    """`agent_lightning.runtime`, of which nothing stays set."""
    from agent_lightning import runtime
    from agent_lightning.runtime import config, tracing

    monkeypatch.setattr(tracing, "_settings", None)
    yield runtime
    runtime.air.clear()
    runtime.set_config(dict.fromkeys(config.explicit()))


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, timeout_s: float = 20.0) -> None:
    """Waits for something to become true; fails if it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def written_pids(folder: Path) -> list[int]:
    """Process ids that agents left as empty files named by them."""
    return [int(name) for name in os.listdir(folder)]


# ---- a server that trains ----

TASKS = "".join(json.dumps({"question": f"{i}+1=?", "ground_truth": str(i + 1)}) + "\n" for i in range(4))


@pytest.fixture(scope="module")
def training(tmp_path_factory, settings, policies):
    """A server that runs jobs: (its URL, its store)."""
    from lightning_jax.server import RunningServer, bind, create_app
    from lightning_jax.server.control import JobRunner
    from lightning_jax.store import Store

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(Store(tmp_path_factory.mktemp("store") / "store.sqlite3")))
        jobs = stack.enter_context(contextlib.closing(JobRunner(policies, store, settings)))
        app = create_app(config=settings, policies=policies, store=store, jobs=jobs)
        server = RunningServer(app, bind("127.0.0.1", 0))
        stack.callback(server.stop)
        yield server.url, store


@pytest.fixture
def client(training, tmp_path):
    (tmp_path / "train.jsonl").write_text(TASKS)
    (tmp_path / "test.jsonl").write_text('{"question": "7+1=?", "ground_truth": "8"}')
    client = Client(training[0])
    client.upload_data(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"), "sums")
    return client


def ask(resource, task):
    """Asks the model with no SDK at all; half a point for an answer that holds a digit."""
    import urllib.request

    body = {"messages": [{"role": "user", "content": task.question}], "max_tokens": 4}
    request = urllib.request.Request(f"{resource.model_api}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    return 1.0 if answer == task.ground_truth else 0.5 * any(c.isdigit() for c in answer)
