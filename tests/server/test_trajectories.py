"""Trajectories over HTTP and in files: the reference's JSON, of calls that were really made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from agent_lightning import Client, EvalResult
from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config as config_lib
from lightning_jax.model import weights
from lightning_jax.server import trajectories as endpoint
from lightning_jax.store import RolloutEntry, Store
from lightning_jax.store.export import export_trajectories
from lightning_jax.store.trajectories import Filter

from .conftest import full_logprobs

ROOT = Path(__file__).resolve().parents[2]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
METADATA = ("num_steps", "status", "job_id", "rollout_id", "step", "mode", "group", "sample", "attempt")


def say(running, lease, text, **options):
    with openai.OpenAI(base_url=running.model_api(lease), api_key="x", max_retries=0) as client:
        messages = [{"role": "user", "content": text}]
        options = {"model": "m", "max_tokens": 6} | options
        return client.chat.completions.create(messages=messages, **options).choices[0].message


def report(running, job, *results):
    body = {"pool_id": "test", "results": results, "running": [], "want": 0, "wait_s": 0}
    running.http.post(f"/api/jobs/{job}/exchange", json=body).raise_for_status()


def reward_call(running, record, index, reward):
    """What an intermediate reward does to a recorded call."""
    sql = (
        "UPDATE calls SET reward = ? WHERE call_index = ? AND attempt_id = (SELECT attempt_id FROM rollouts "
        "WHERE rollout_id = ?)"
    )
    running.store._database.execute((sql, [(reward, index, record.rollout_id)]))


def mix_call(running, record, index, version):
    """What it does to a recorded call that weights are published while it is sampled."""
    sql = (
        "UPDATE calls SET content = json_set(content, '$.last_policy_version', ?) WHERE call_index = ? AND "
        "attempt_id = (SELECT attempt_id FROM rollouts WHERE rollout_id = ?)"
    )
    running.store._database.execute((sql, [(version, index, record.rollout_id)]))


@pytest.fixture(scope="module")
def serving(start, random_model):
    """A server of its own: other files train the one that they share, and here the calls are the initial model's."""
    return start(random_model)


@pytest.fixture(scope="module")
def job(serving):
    """A job of one rollout with two calls, one that failed, one without a call, and an evaluation in a later step."""
    job, leases, ids = serving.open(samples=3)
    say(serving, leases[0], "Generate query for: Capital of France?")
    say(serving, leases[0], "Question: Capital of France?\nDocs: Paris is...")
    say(serving, leases[1], "What now?")
    error = {"type": "ValueError", "message": "no idea", "traceback": "T"}
    outcomes = ({"reward": 1.0}, {"error": error}, {"reward": 0.25})
    results = [{"lease_id": lease["lease_id"]} | outcome for lease, outcome in zip(leases, outcomes, strict=True)]
    report(serving, job, *results)
    serving.store.wait(job, ids)
    reward_call(serving, serving.store.finished(ids)[0], 0, 0.5)
    mix_call(serving, serving.store.finished(ids)[0], 1, 3)
    _, leases, ids = serving.open(job=job, mode="evaluate", step=2)
    say(serving, leases[0], "2+2?")
    serving.finish(job, leases, ids, reward=0.0)
    return job


def test_the_references_trajectory(serving, job, random_model):
    with Client(serving.url) as client:
        two, failed, none, evaluated = client.trajectories(job)
    printed = two.to_dict()
    assert list(printed) == ["task_id", "transitions", "total_reward", "metadata"]
    assert (two.task_id, two.total_reward, two.metadata["num_steps"]) == ("task-0", 1.5, 2)
    assert [t.reward for t in two.transitions] == [0.5, 1.0]
    for transition, question in zip(two.transitions, ("Generate query for", "Docs: Paris is..."), strict=True):
        found = transition.to_dict()
        assert list(found)[:4] == ["input", "output", "reward", "metadata"]
        assert list(found["metadata"])[:3] == ["model", "temperature", "tool_calls"]
        assert found["metadata"] | {"model": "random", "temperature": 1.0, "tool_calls": []} == found["metadata"]
        assert question in transition.input and transition.input.endswith("<|assistant|>")
        assert (transition.attempt, transition.policy_version, transition.finish_reason) == (1, 0, "length")
        assert serving.policy.tokenizer.encode(transition.input) == transition.prompt_ids
        assert serving.policy.tokenizer.decode(transition.sampled_ids) == transition.output
        whole = [*transition.prompt_ids, *transition.sampled_ids]
        logprob_tv = full_logprobs(*weights.load_model(random_model), whole)
        at = np.arange(len(transition.prompt_ids) - 1, len(whole) - 1)
        np.testing.assert_allclose(transition.logprobs, logprob_tv[at, transition.sampled_ids], atol=1e-4)
    assert [t.metadata["last_policy_version"] for t in two.transitions] == [None, 3]
    assert two.metadata["agent_reward"] == 1.0 and two.metadata["status"] == "succeeded"

    assert failed.total_reward is None and failed.metadata["status"] == "failed"
    assert failed.metadata["cause"] == "exception" and failed.metadata["error"] == "ValueError: no idea"
    assert [t.reward for t in failed.transitions] == [0.0]
    assert (none.transitions, none.total_reward, none.metadata["num_steps"]) == ([], 0.25, 0)
    assert evaluated.metadata["mode"] == "evaluate" and evaluated.transitions[0].metadata["temperature"] == 0.0
    assert all(list(t.metadata)[: len(METADATA)] == list(METADATA) for t in (two, failed, none, evaluated))


def test_a_training_jobs_trajectories_are_its_rewards(trained):
    with Client(trained.url) as client:
        trajectories = list(client.trajectories(trained.result, mode="train"))
    rewards = trained.result.train_rewards
    for step, reward in enumerate(rewards, 1):
        of_step = [t for t in trajectories if t.metadata["step"] == step]
        assert len(of_step) == 4 and all(t.transitions[0].policy_version == step - 1 for t in of_step)
        assert np.mean([t.total_reward for t in of_step]) == pytest.approx(reward)


def test_filters_and_pages(serving, job, monkeypatch):
    with Client(serving.url) as client:
        everything = list(client.trajectories(job))
        for page_bytes in (1, 5000):  # a page per trajectory, and some with several
            monkeypatch.setattr(endpoint, "_PAGE_BYTES", page_bytes)
            assert list(client.trajectories(job)) == everything
            assert list(client.trajectories(job, limit=2)) == everything[:2]
        assert list(client.trajectories(job, step=2)) == list(client.trajectories(job, mode="evaluate"))
        assert list(client.trajectories(job, step=1, mode="train")) == everything[:3]
        assert list(client.trajectories(EvalResult(0.0, 0.0, job_id=job), step=2)) == everything[3:]
        assert list(client.trajectories(job, step=7)) == []
        with pytest.raises(InvalidConfigError, match="no job 'nope'"):
            next(client.trajectories("nope"))
        with pytest.raises(InvalidConfigError, match="mode"):
            next(client.trajectories(job, mode="dance"))


def test_numbers_beyond_those_of_the_store_are_refused(serving, job):
    for path, name in [("trajectories", "step"), ("trajectories", "after"), ("events", "after")]:
        for number in (2**63, -(2**63) - 1):
            reply = serving.http.get(f"/api/jobs/{job}/{path}", params={name: number})
            assert reply.status_code == 422 and reply.json()["error"]["message"].startswith(f"{name}: ")
        assert serving.http.get(f"/api/jobs/{job}/{path}", params={name: 2**63 - 1}).status_code == 200


def test_tool_calls_are_told_apart_from_the_text(serving_tools):
    job, leases, ids = serving_tools.open()
    message = say(serving_tools, leases[0], "2+2?", tools=TOOLS, max_tokens=20)
    serving_tools.finish(job, leases, ids)
    with Client(serving_tools.url) as client:
        (trajectory,) = client.trajectories(job)
    (transition,) = trajectory.transitions
    (call,) = transition.metadata["tool_calls"]
    assert call == message.tool_calls[0].model_dump() and call["function"]["name"] == "add"
    assert transition.output.startswith("<tool_call>") and transition.output.endswith("</tool_call>")
    assert transition.sampled_ids[-1] in serving_tools.policy.tokenizer.eos_ids and transition.finish_reason == "stop"


# ---- files ----


@pytest.fixture(scope="module")
def workdir(serving_tools, serving, job):
    """The work directory of the server, which is still running."""
    path = Path(serving.config.workdir)
    config_lib.save_json(serving.config, path / "config.json")
    serving.store.flush()
    return path


def test_files_hold_what_the_client_gets(serving, job, workdir, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    with Client(serving.url) as client:
        expected = [trajectory.to_dict() for trajectory in client.trajectories(job)]
    which = Filter(job_id=job)
    assert export_trajectories(workdir, tmp_path / "t.jsonl", which) == 4
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert json.dumps(lines) == json.dumps(expected)
    assert export_trajectories(workdir, tmp_path / "t.parquet", which) == 4
    table = parquet.read_table(tmp_path / "t.parquet")
    assert json.dumps(table.to_pylist()) == json.dumps(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl", "t.parquet"]


def test_the_command(job, workdir, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "lightning_jax.store.export", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(workdir, tmp_path / "t.jsonl", "--job", job, "--mode", "train")
    assert done.returncode == 0 and "3 trajectories" in done.stdout, done.stderr
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 3
    for arguments, text in [((workdir, tmp_path / "t.csv"), ".parquet"), ((tmp_path, tmp_path / "x.jsonl"), "no run")]:
        done = run(*arguments)
        assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr
    done = run(workdir, tmp_path / "x.jsonl", "--step", 2**63)
    assert done.returncode == 2 and "--step: 9223372036854775808" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_run_on_a_read_only_file_system(tmp_path):
    config = config_lib.merge({"model": {"path": "builtin:tiny"}}, environ={})
    for folder in ("run", "linked"):
        (tmp_path / folder).mkdir()
        config_lib.save_json(config, tmp_path / folder / "config.json")
    store = Store(tmp_path / "run" / "store.sqlite3")
    (tmp_path / "linked" / "store.sqlite3").symlink_to("../run/store.sqlite3")
    mount = " && ".join(f"mount --bind {f} {f} && mount -o remount,ro,bind {f}" for f in ("run", "linked"))
    unshared = ["unshare", "--user", "--map-root-user", "--mount"]
    if os.getuid() == 0:
        unshared = ["unshare", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshared, "sh", "-c", mount], cwd=tmp_path).returncode:
        pytest.skip("this machine lets no test mount anything")
    done = []
    for is_open, folder in (
        (True, "run"),
        (True, "linked"),
        (False, "run"),
    ):  # what its writer has not yet put into the file itself is read as well
        export = [sys.executable, "-m", "lightning_jax.store.export", tmp_path / folder, tmp_path / "t.jsonl"]
        if is_open and folder == "run":
            job = store.create_job({"kind": "train"})
            entry = RolloutEntry("task-0", 0, group=0, sample=0, task={"question": "?"})
            store.open_rollouts(job, step=1, mode="train", entries=[entry], timeout_s=60)
            (lease,) = store.exchange(job, "pool", [], [], 1)["leases"]
            store.exchange(job, "pool", [{"lease_id": lease["lease_id"], "reward": 1.0}], [], 0)
            store.flush()
        if not is_open:
            store.close()
        command = [*unshared, "sh", "-c", f'{mount} && cd {ROOT} && exec "$@"', "sh", *export]
        done.append(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True))
    assert [run.stdout for run in done] == [f"1 trajectories in {tmp_path / 't.jsonl'}\n"] * 3, done


def test_parquet_without_its_package(workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidConfigError, match=r"lightning-jax\[parquet\]"):
        export_trajectories(workdir, tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())


def test_a_page_is_bounded(serving, job, monkeypatch):
    """The server ends a page behind the trajectory that fills it, whatever was asked for."""
    monkeypatch.setattr(endpoint, "_PAGE_BYTES", 100)
    reply = httpx.get(f"{serving.url}/api/jobs/{job}/trajectories", params={"limit": 1000}).json()
    assert len(reply["trajectories"]) == 1 and reply["next"] == reply["trajectories"][0]["metadata"]["rollout_id"]
