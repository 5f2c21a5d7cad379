"""`algorithm.credit` from the workers' rewards to the gradient: a job of two rollouts whose totals are the same."""

import contextlib
import json

import pytest

from agent_lightning import Client


@pytest.fixture(scope="module")
def training(tmp_path_factory, settings):
    """A server that runs jobs, whose loss has no term but the advantages': (its URL, store and settings)."""
    from lightning_jax.policies import Policies
    from lightning_jax.server import RunningServer, bind, create_app
    from lightning_jax.server.control import JobRunner
    from lightning_jax.store import Store

    settings = settings.copy_and_resolve_references()
    with settings.unlocked():
        settings.workdir = str(tmp_path_factory.mktemp("workdir"))
        settings.algorithm.kl_coef = settings.algorithm.entropy_coef = 0.0
    with contextlib.ExitStack() as stack:
        policies = stack.enter_context(contextlib.closing(Policies(settings)))
        store = stack.enter_context(contextlib.closing(Store(tmp_path_factory.mktemp("store") / "store.sqlite3")))
        jobs = stack.enter_context(contextlib.closing(JobRunner(policies, store, settings)))
        app = create_app(config=settings, policies=policies, store=store, jobs=jobs)
        server = RunningServer(app, bind("127.0.0.1", 0))
        stack.callback(server.stop)
        yield server.url, store, settings


def agent(resource, task):
    """Two calls, of which the first earns 0 or 1 by a tool; the return makes both rollouts' total 1."""
    import urllib.request

    from agent_lightning.runtime import tool

    def ask(text):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
        request = urllib.request.Request(f"{resource.model_api}/v1/chat/completions", json.dumps(body).encode())
        urllib.request.urlopen(request).close()

    @tool
    def luck():
        return float(resource.metadata["rollout_id"] % 2)

    ask("1+1=?")
    earned = luck()
    ask("2+2=?")
    return 1.0 - earned


def test_steps_are_credited_with_what_came_from_them_on(training, runtime, tmp_path):
    url, store, settings = training
    (tmp_path / "train.jsonl").write_text('{"question": ""}\n')
    runtime.set_config({"air_enabled": True})
    runtime.air.on_tool_success(lambda tool_name, output: output)
    rows = {}
    with Client(url) as client:
        client.upload_data(str(tmp_path / "train.jsonl"))
        for credit in ("trajectory", "step"):
            settings.algorithm.credit = credit
            result = client.train(agent, nworkers=2, batch_size=1)
            assert result.train_rewards == [1.0]
            (event,) = [e for e in store.events(result.job_id) if e["kind"] == "step"]
            rows[credit] = event["data"]
    assert rows["trajectory"]["reward/intermediate_mean"] == 0.5
    assert rows["trajectory"]["policy/grad_norm"] == 0.0 and rows["trajectory"]["reward/zero_variance_groups"] == 1.0
    assert rows["step"]["policy/grad_norm"] > 0.0
