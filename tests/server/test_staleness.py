"""Rollouts that are sampled while the policy learns, and how far its weights are behind then."""

import contextlib
import json
import random
import time

import pytest

from agent_lightning import Client
from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import data
from lightning_jax.config import merge
from lightning_jax.metrics import read_metrics
from lightning_jax.policies import Policies
from lightning_jax.server.control import JobRunner
from lightning_jax.store import ENDED_JOB, Store
from lightning_jax.store.trajectories import Filter

from .conftest import fills, settings
from .test_job_runner import Pool, wait_for

SMALL = {
    "algorithm.group_size": 2,
    "algorithm.learning_rate": 1e-2,
    "algorithm.importance_correction": "token_truncate",
    "runtime.batch_size": 4,
    "runtime.gradient_accumulation": 1,
    "runtime.remat": "none",
}


def slow_on_one_task(resource, task):
    """Holds its step open for a while, in which a free worker gets to the next one, if that is open."""
    reward = fills(resource, task)
    if task.question == "0+1?":
        time.sleep(2)
    return reward


@pytest.mark.parametrize("bound", [0, 1])
def test_nothing_older_than_the_bound_is_trained_on(start, random_model, tmp_path, bound):
    running = start(random_model, jobs=True, **SMALL, **{"runtime.max_staleness": bound})
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"question": f"{i}+1?"}) + "\n" for i in range(4)))
    with Client(running.url) as client:
        client.upload_data(tasks)
        result = client.train(slow_on_one_task, nworkers=3, batch_size=2, epochs=3)  # a group of 2 waits at once
    assert result.total_steps == 6
    ages = {step: set() for step in range(1, 7)}
    for _, record in running.store.ended_rollouts(Filter(mode="train")):
        ages[record.step].update(record.step - 1 - call.policy_version for call in record.calls)
    assert ages[1] == {0}
    assert set().union(*ages.values()) == set(range(bound + 1)), ages
    rows = [row for row in read_metrics(running.config.workdir) if row["step"]]
    assert [row["rollout/staleness_max"] for row in rows] == [max(ages[row["step"]]) for row in rows]
    assert [row["rollout/count"] for row in rows] == [4] * 6


def test_older_weights_need_importance_weights():
    with pytest.raises(InvalidConfigError, match=r"(?s)max_staleness .*\(flag .*'token_truncate'"):
        merge(environ={}, flag_overrides={"runtime.max_staleness": 1})
    with pytest.raises(InvalidConfigError, match="max_staleness must be at least 0, not -1"):
        merge(environ={}, flag_overrides={"runtime.max_staleness": -1})


def test_a_stopped_job_goes_on_with_the_tasks_that_were_open(random_model, tmp_path):
    """Nobody works on rollouts of steps that do not come; a later start opens them again, in their order."""
    config = settings(random_model, tmp_path / "work", **SMALL, **{"runtime.max_staleness": 1})
    with contextlib.closing(Store(tmp_path / "work" / "store.sqlite3")) as store:
        store.put_dataset("d", "train", [b"".join(b'{"question": "%d?"}\n' % i for i in range(12))])
        spec = {"kind": "train", "data_id": "d", "total_steps": 6, "batch_size": 2}
        for stop_in in (3, None):
            policies = Policies(config)
            runner = JobRunner(policies, store, config)

            def reward(lease, stop_in=stop_in, runner=runner):
                if lease["metadata"]["step"] == stop_in:
                    runner.stop("job")
                return random.random()

            runner.submit(spec, "job")
            with Pool(store, "job", reward):
                wait_for(lambda: store.job("job")["status"] in ENDED_JOB)
            runner.close()
            policies.close()
            job = store.job("job")
            if stop_in:
                assert job["status"] == "stopped" and 2 <= job["result"]["total_steps"] < 6
                assert store.cancel_open("job") == 0, "nothing is left open"
        assert job["status"] == "succeeded" and job["result"]["total_steps"] == 6
        order = data.task_batches(store, "d", 2, 1, config.seed)
        trained = {step: set() for step in range(1, 7)}
        for _, record in store.ended_rollouts(Filter(mode="train")):
            trained[record.step].add(record.task_index)
        assert trained == {step: {item.task_index for item in next(order)} for step in range(1, 7)}
