"""One real server for all client packages, and rollouts whose every call is held against its ids and the learner."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import httpx
import pydantic
import pytest

from lightning_jax import server
from lightning_jax.model import weights
from lightning_jax.policies import Policies
from lightning_jax.rl.trajectory import Row
from lightning_jax.store import CallRecord, Store
from tests.server.conftest import Running, settings

from . import checks, obedient


class Sum(pydantic.BaseModel):
    """A structured reply with few values, so that a model that knows no JSON comes to its end."""

    sign: Literal["plus", "minus"]
    is_large: bool


@dataclasses.dataclass
class Rollout:
    """One rollout under way.

    Attributes:
        url: what an agent gets as `resource.model_api`.
        calls: the calls that were recorded, once it is finished.
    """

    running: Running
    tap: checks.Tap
    learner: checks.Learner
    url: str
    calls: list[CallRecord] | None = None
    _lease: tuple = ()
    _rows: list[Row] | None = None

    @property
    def token(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def num_calls(self) -> int:
        """How many calls are recorded so far."""
        return len(self.running.store.attempt_by_token(self.token).calls)

    def finish(self) -> list[Row]:
        """Ends the rollout, checks everything about its calls, and returns what would be trained on."""
        if self._rows is None:
            (record,) = self.running.finish(*self._lease)
            self.calls = record.calls
            assert self.calls, "no call was recorded"
            for exchange in self.tap.exchanges[self.token]:
                checks.assert_strict(exchange)
            for call in self.calls:
                checks.assert_decodes(self.running.policy.tokenizer, call)
            self._rows = self.learner.assert_agrees(record)
        return self._rows

    def assert_saw(self, *replies: checks.Reply) -> None:
        """These are what the agent saw of the calls, in their order, but for white space around the text."""
        self.finish()
        recorded = [checks.decoded(self.running.policy.tokenizer, call) for call in self.calls]
        assert [(text.strip(), calls) for text, calls in replies] == [(text.strip(), calls) for text, calls in recorded]

    def wait_for_calls(self, count: int) -> None:
        """Until so many calls are recorded and nothing runs, whatever became of the client."""
        attempt = self.running.store.attempt_by_token(self.token)
        deadline = time.monotonic() + 20
        while len(attempt.calls) < count or attempt.on_end:
            assert time.monotonic() < deadline, f"{len(attempt.calls)} calls, {len(attempt.on_end)} in flight"
            time.sleep(0.005)

    def tools(self, num_calls: int) -> tuple[Callable, Callable]:
        """`add` and `look_up`, whose results have the model go on calling until so many calls of it were made."""

        def result(text) -> str:
            return f"{text} {'(call)' if self.num_calls < num_calls - 1 else '(say)'}"

        def add(a: int, b: int) -> str:
            """Adds two numbers."""
            return result(a + b)

        def look_up(key: str) -> str:
            """Finds what is kept under a key."""
            return result(f"<{key}>")

        return add, look_up


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients") / "obedient"
    obedient.write(folder)
    return folder


@pytest.fixture(scope="session")
def tap():
    return checks.Tap()


@pytest.fixture(scope="session")
def running(model, tap):
    sizes = {
        "runtime.max_seq_len": obedient.MAX_SEQ_LEN,
        "sampler.max_slots": 32,
        "sampler.kv_cache_tokens": 32768,
        "sampler.prefill_chunk": 256,
        "sampler.max_queue": 64,
        "sampler.max_tokens": 1000,
    }
    config = settings(model, model.parent, **sizes)
    policies, store = Policies(config), Store(model.parent / "store.sqlite3")
    app = server.create_app(config=config, policies=policies, store=store)
    app.add_middleware(tap.middleware)
    started = server.RunningServer(app, server.bind("127.0.0.1", 0))
    yield Running(started.url, store, policies, config, httpx.Client(base_url=started.url, timeout=60))
    started.stop()
    store.close()
    policies.close()


@pytest.fixture(scope="session")
def learner(model):
    return checks.Learner(*weights.load_model(model))


@pytest.fixture
def new_rollout(running, tap, learner):
    """new_rollout(mode=...) -> Rollout; all are finished, and so checked, when the test is over."""
    made = []

    def new(**options) -> Rollout:
        job, leases, ids = running.open(**options)
        made.append(Rollout(running, tap, learner, running.model_api(leases[0]), _lease=(job, leases, ids)))
        return made[-1]

    yield new
    for rollout in made:
        rollout.finish()


@pytest.fixture
def rollout(new_rollout) -> Rollout:
    return new_rollout()
