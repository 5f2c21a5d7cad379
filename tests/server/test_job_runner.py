"""Which jobs run and in which order, and what is said when none can run any more."""

import logging
import random
import re
import threading
import time

import httpx
import pytest

from agent_lightning import Client
from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import server, training
from lightning_jax.metric_names import METRICS
from lightning_jax.metrics import read_metrics
from lightning_jax.policies import Policies
from lightning_jax.server.control import JobRunner
from lightning_jax.store import CallRecord, Store, StoreError, UnknownError
from lightning_jax.store.trajectories import Filter

from .conftest import settings

TASKS = [b'{"question": "1+1?", "source": "sums"}\n{"question": "2+2?"}\n']
EVALUATE = {"kind": "evaluate", "data_id": "d"}
SMALL = {
    "algorithm.group_size": 2,
    "runtime.batch_size": 4,
    "runtime.gradient_accumulation": 1,
    "runtime.remat": "none",
    "runtime.checkpoint_interval": 1,
}


@pytest.fixture
def config(random_model, tmp_path):
    return settings(random_model, tmp_path / "work", **SMALL)


@pytest.fixture
def store(config):
    store = Store(f"{config.workdir}/store.sqlite3")
    for split in ("train", "test"):
        store.put_dataset("d", split, TASKS)
    yield store
    store.close()


@pytest.fixture
def runner(serving, store, config):
    """A runner that has no work yet."""
    runner = JobRunner(serving.policies, store, config)
    yield runner
    runner.close()


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def closing(runner) -> threading.Thread:
    """Ends the runner from beside its job, which waits for that."""
    thread = threading.Thread(target=runner.close)
    thread.start()
    return thread


def unexplained(row):
    """Metrics that the documentation does not know."""
    meant = [re.sub("NAME|CAUSE", "[a-z0-9_.-]+", name) for name in METRICS]
    return {name for name in row if not any(re.fullmatch(pattern, name) for pattern in meant)}


def status(store, job_id):
    return store.job(job_id)["status"]


class Pool:
    """Ends a job's rollouts, with chance rewards unless told how, for as long as the block lasts."""

    def __init__(self, store, job_id, reward=lambda lease: random.random(), *, calls=True):
        self._store, self._job_id, self._reward, self._calls = store, job_id, reward, calls
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _work(self):
        results = []
        while not self._over.is_set():
            leases = self._store.exchange(self._job_id, "pool", results, [], 4, 0.1)["leases"]
            for lease in leases:
                attempt = self._store.attempt_by_token(lease["token"])
                if self._calls:
                    self._store.record_call(attempt, CallRecord([1, 2, 3], [4, 5], [-5.5, -5.5]))
            results = [{"lease_id": lease["lease_id"]} | _result(self._reward(lease)) for lease in leases]


def _result(ending):
    return ending if isinstance(ending, dict) else {"reward": ending}


# ---- which jobs run ----


def test_an_unfinished_job_waits_for_its_turn_and_then_goes_on(config, store):
    """A killed training run's folder is evaluated in between: the evaluation runs at once, the run loses nothing."""
    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    runner.submit({"kind": "train", "data_id": "d", "epochs": 100, "batch_size": 2}, "train")
    with Pool(store, "train"):
        wait_for(lambda: store.job("train")["step"] >= 2)
        runner.close()
    policies.close()
    assert status(store, "train") == "running", "it was in the middle"

    policies = Policies(config)
    before, events = policies.step, store.events("train")
    assert before >= 2, "from the checkpoint"
    runner = JobRunner(policies, store, config, resume=lambda job_id: job_id != "train")
    runner.submit(EVALUATE, "evaluate")
    with Pool(store, "evaluate"):
        wait_for(lambda: status(store, "evaluate") == "succeeded")
    assert status(store, "train") == "running" and policies.step == before, "nobody asked for it"
    assert store.events("train") == events

    spec = {"kind": "train", "data_id": "d", "total_steps": before + 2, "batch_size": 2}
    assert runner.submit(spec, "train") == "train"
    with Pool(store, "train"):
        wait_for(lambda: status(store, "train") == "succeeded")
    runner.close()
    policies.close()
    job = store.job("train")
    assert job["spec"] == spec and job["result"]["total_steps"] == before + 2
    assert len(job["result"]["train_rewards"]) == before + 2, "with what it had done before"
    steps = [event["step"] for event in store.events("train") if event["kind"] == "step"]
    assert steps == list(range(1, before + 3)), "each once"


def test_unfinished_jobs_come_first_unless_told_otherwise(serving, store, config):
    for job_id in ("one", "two"):
        store.create_job(EVALUATE, job_id)
    runner = JobRunner(serving.policies, store, config)
    runner.submit(EVALUATE, "three")
    wait_for(lambda: status(store, "one") == "running")
    assert [status(store, job_id) for job_id in ("two", "three")] == ["queued", "queued"]
    runner.close()
    runner = JobRunner(serving.policies, store, config, resume=lambda job_id: job_id == "two")
    wait_for(lambda: status(store, "two") == "running")
    runner.stop("two", now=True)
    wait_for(lambda: status(store, "two") == "stopped")
    runner.submit(EVALUATE, "four")
    wait_for(lambda: status(store, "four") == "running")  # so nothing was queued before it
    assert store.exchange("one", "pool", [], [], 1)["leases"] == []
    runner.close()


def test_a_job_that_was_to_stop_at_once_is_not_begun_again(serving, store, config):
    """The server was killed while it ended the job, for which it may have needed all its memory."""
    store.create_job(EVALUATE | {"stop": "now"}, "killed")
    store.update_job("killed", status="running")
    runner = JobRunner(serving.policies, store, config)
    wait_for(lambda: status(store, "killed") == "stopped")
    runner.close()
    assert [event["kind"] for event in store.events("killed")] == ["ended"]


def test_a_job_that_has_ended_leaves_nothing_to_stop(runner, store):
    spec = EVALUATE | {"key": "once"}
    job_id, queued = runner.submit(spec), runner.submit(EVALUATE)
    wait_for(lambda: status(store, job_id) == "running")
    runner.stop(queued)
    assert runner._stops.keys() == {job_id}
    with Pool(store, job_id, calls=False):
        wait_for(lambda: status(store, job_id) == "succeeded")
        wait_for(lambda: not runner._stops)
    runner.stop(job_id, now=True, keep=True)
    assert runner.submit(spec) == job_id and not runner._stops
    assert [status(store, each) for each in (job_id, queued)] == ["succeeded", "stopped"]


# ---- what a job keeps ----


def test_the_best_checkpoint_is_the_one_with_the_highest_held_out_reward(config, store):
    held_out = [0.25, 0.5, 0.75, 0.375, 0.75, 0.5]  # by step

    def reward(lease):
        metadata = lease["metadata"]
        return held_out[metadata["step"]] if metadata["mode"] == "evaluate" else random.random()

    config.runtime.max_to_keep = 2
    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    spec = {"kind": "train", "data_id": "d", "total_steps": 5, "batch_size": 2, "eval_interval": 1}
    job = runner.submit(spec)
    with Pool(store, job, reward):
        wait_for(lambda: status(store, job) == "succeeded")
    result = store.job(job)["result"]
    assert result["test_rewards"] == held_out and result["test_steps"] == [0, 1, 2, 3, 4, 5]
    rows = read_metrics(config.workdir)
    assert not set().union(*map(unexplained, rows)), "say in lightning_jax/metric_names.py what they mean"
    assert {"policy/kl", "sampler/cache_hit_fraction", "eval/reward"} <= rows[-1].keys()
    (samples,) = [event for event in store.events(job) if event["kind"] == "samples"]
    shown = samples["data"]["samples"]
    assert samples["step"] == 1 and len(shown) == 4 and all(sample["completion"] for sample in shown)
    assert [sample["reward"] for sample in shown] == sorted(sample["reward"] for sample in shown)
    assert len(result["train_rewards"]) == 5
    folder = policies.checkpoint_dir.absolute()
    assert result["checkpoints"] == [str(folder / f"step-{n}") for n in (2, 4, 5)]
    assert result["best_checkpoint"] == str(folder / "step-2"), "of equals the first"
    assert policies.find_checkpoint("best") == folder / "step-2"

    held_out[5:] = [0.1, 0.2, 0.3]  # another job's rewards are not compared with the first one's
    job = runner.submit(spec | {"total_steps": 2})
    with Pool(store, job, reward):
        wait_for(lambda: status(store, job) == "succeeded")
    result = store.job(job)["result"]
    assert result["checkpoints"] == [str(folder / f"step-{n}") for n in (6, 7)], "its own"
    assert result["best_checkpoint"] == str(folder / "step-7") and result["test_steps"] == [5, 6, 7]
    runner.close()
    policies.close()


def test_groups_without_a_difference_are_replaced_by_other_tasks(config, store):
    config.algorithm.filter_groups, config.algorithm.max_gen_batches = True, 2
    first, ended = [], []

    def reward(lease):  # the task that comes first is always solved
        first.append(first[0] if first else lease["task_id"])
        ended.append(lease["task_id"])
        return 1.0 if lease["task_id"] == first[0] else float(len(ended) % 2)

    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    job = runner.submit({"kind": "train", "data_id": "d", "total_steps": 1, "batch_size": 1, "eval_interval": 0})
    with Pool(store, job, lambda lease: 0.0 if lease["metadata"]["mode"] == "evaluate" else reward(lease)):
        wait_for(lambda: status(store, job) in ("succeeded", "failed"))
    assert status(store, job) == "succeeded", store.job(job)
    assert [ended.count(task) for task in dict.fromkeys(ended)] == [2, 2]
    (row,) = (row for row in read_metrics(config.workdir) if row["step"] == 1)
    assert row["reward/mean"] == 0.75 and row["train/sampled_tokens"] == 4, "one of the two groups is trained on"
    runner.close()
    policies.close()


def test_a_stopped_job_has_a_checkpoint_and_an_evaluation_of_its_last_step(config, store):
    config.runtime.checkpoint_interval = 0
    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    job = runner.submit({"kind": "train", "data_id": "d", "epochs": 1000, "batch_size": 2, "eval_interval": 1000})
    with Pool(store, job):
        wait_for(lambda: store.job(job)["step"] >= 2)
        runner.stop(job)
        wait_for(lambda: status(store, job) == "stopped")
    result = store.job(job)["result"]
    assert result["test_steps"] == [0, policies.step] and result["total_steps"] == policies.step
    assert result["checkpoints"] == [str(policies.checkpoint_dir.absolute() / f"step-{policies.step}")]
    runner.close()
    policies.close()


def test_replacements_are_of_tasks_that_the_step_lacks_and_no_task_is_passed_over(config, store):
    """Eight tasks; a batch of four lacks one group, whose place another takes. No rollout of that one succeeds."""
    config.algorithm.filter_groups, config.algorithm.max_gen_batches = True, 4
    store.put_dataset("eight", "train", [b"".join(b'{"question": "%d"}\n' % i for i in range(8))])
    flat, begun = {}, []

    def reward(lease):
        step, task = lease["metadata"]["step"], lease["task_id"]
        begun.append((step, task))
        if len(set(begun)) > 4 and step == 1:
            return {"cause": "exception", "error": {"type": "ValueError", "message": "a bad task", "traceback": ""}}
        return 1.0 if task == flat.setdefault(step, task) else float(len(begun) % 2)

    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    job = runner.submit({"kind": "train", "data_id": "eight", "total_steps": 2, "batch_size": 4, "eval_interval": 0})
    with Pool(store, job, reward):
        wait_for(lambda: status(store, job) in ("succeeded", "failed"))
    assert status(store, job) == "succeeded", "8 of 14 rollouts of the step have a reward: " + str(store.job(job))
    groups = {(record.step, record.group): record.task_id for _, record in store.ended_rollouts(Filter(job_id=job))}
    for step in (1, 2):
        tasks = [task for (of, _), task in groups.items() if of == step]
        assert len(tasks) == len(set(tasks)) > 4, "the same task again would give the same rollouts"
    assert len(set(groups.values())) == 8
    runner.close()
    policies.close()


@pytest.mark.parametrize("eval_interval", [2, 0], ids=["due", "not due"])
def test_a_stopped_and_continued_job_is_as_an_undisturbed_one(config, store, eval_interval):
    """Stopped by one Ctrl-C, after which there is an evaluation in any case, then given the same command again."""
    config.runtime.checkpoint_interval = 0
    held_out = {0: 0.1, 2: 0.9, 4: 0.3}
    spec = {"kind": "train", "data_id": "d", "total_steps": 4, "batch_size": 2, "eval_interval": eval_interval}

    def reward(lease):
        metadata = lease["metadata"]
        if metadata["step"] == 2 and end == "stopped":
            runner.stop("train")
        return held_out[metadata["step"]] if metadata["mode"] == "evaluate" else random.random()

    for end in ("stopped", "succeeded"):
        policies = Policies(config)
        runner = JobRunner(policies, store, config, resume=lambda job_id: False)
        runner.submit(spec, "train")
        with Pool(store, "train", reward):
            wait_for(lambda end=end: status(store, "train") == end)
        runner.close()
        policies.close()
    result = store.job("train")["result"]
    assert result["test_steps"] == [0, 2, 4] and result["test_rewards"] == [0.1, 0.9, 0.3]
    assert result["best_checkpoint"].endswith("step-2")
    assert [row["step"] for row in read_metrics(config.workdir)] == [0, 1, 2, 3, 4]


def test_a_step_that_is_in_a_checkpoint_is_in_the_metrics(config, store, monkeypatch):
    """Whenever the process may be killed behind it: after one Ctrl-C too, before the last evaluation and in it."""
    config.runtime.checkpoint_interval, held_out = 0, []
    checkpoint = training._Run._checkpoint

    def steps():
        return [row["step"] for row in read_metrics(config.workdir)]

    def saved(run, step, tasks):
        assert step in steps()
        checkpoint(run, step, tasks)

    def reward(lease):
        metadata = lease["metadata"]
        if metadata["mode"] == "evaluate":
            held_out.append((metadata["step"], steps()))
        elif metadata["step"] == 2:
            runner.stop(job)
        return random.random()

    monkeypatch.setattr(training._Run, "_checkpoint", saved)
    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    job = runner.submit({"kind": "train", "data_id": "d", "total_steps": 4, "batch_size": 2, "eval_interval": 0})
    with Pool(store, job, reward):
        wait_for(lambda: status(store, job) in ("stopped", "failed"))
    assert status(store, job) == "stopped", store.job(job)
    assert held_out == [(0, [])] * 2 + [(2, [0, 1, 2])] * 2
    assert steps() == [0, 1, 2] and "eval/reward" in read_metrics(config.workdir)[2]
    runner.close()
    policies.close()


def test_a_job_that_is_stopped_while_it_saves_keeps_its_last_evaluation(config, store, monkeypatch):
    config.runtime.checkpoint_interval, checkpoint = 2, training._Run._checkpoint
    spec = {"kind": "train", "data_id": "d", "total_steps": 4, "batch_size": 2, "eval_interval": 0}

    def saved(run, step, tasks):
        checkpoint(run, step, tasks)
        if step == 2:
            runner.stop("train")

    monkeypatch.setattr(training._Run, "_checkpoint", saved)
    for end in ("stopped", "succeeded"):
        policies = Policies(config)
        runner = JobRunner(policies, store, config, resume=lambda job_id: False)
        runner.submit(spec, "train")
        with Pool(store, "train"):
            wait_for(lambda end=end: status(store, "train") == end)
        runner.close()
        policies.close()
        assert store.job("train")["result"]["test_steps"] == [0, 2, 4][: 2 + (end == "succeeded")]
        tested = [row["step"] for row in read_metrics(config.workdir) if "eval/reward" in row]
        assert tested == store.job("train")["result"]["test_steps"]


def test_an_evaluation_that_was_broken_off_is_made_up_for(config, store):
    """Ctrl-C in the last step, and the server ends during the evaluation that follows."""
    config.runtime.checkpoint_interval, ending = 0, []

    def reward(lease):
        metadata = lease["metadata"]
        if metadata["step"] == 2 and metadata["mode"] == "train":
            runner.stop("train")
        elif metadata["step"] == 2:
            ending.append(closing(runner))
            wait_for(lambda: runner._stops["train"].now)
        return random.random() if metadata["mode"] == "train" else 0.5

    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    runner.submit({"kind": "train", "data_id": "d", "total_steps": 2, "batch_size": 2, "eval_interval": 0}, "train")
    with Pool(store, "train", reward):
        wait_for(lambda: ending)
        ending[0].join()
    policies.close()
    assert status(store, "train") == "running" and [row["step"] for row in read_metrics(config.workdir)] == [0, 1, 2]

    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    with Pool(store, "train", lambda lease: 0.75):
        wait_for(lambda: status(store, "train") == "succeeded")
    result = store.job("train")["result"]
    assert (result["eval_reward_before"], result["eval_reward_after"], result["test_steps"]) == (0.5, 0.75, [0, 2])
    rows = read_metrics(config.workdir)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["eval/reward"] == 0.75 and "policy/loss" in rows[2]
    recorded = store._database.read("SELECT reward FROM rollouts WHERE mode = 'evaluate' AND step = 2")
    assert recorded == [(0.75,), (0.75,)], "those of the evaluation that was broken off are not in the record"
    runner.close()
    policies.close()


def test_best_outlives_a_kill_behind_its_checkpoint_and_ends_with_its_job(config, store, monkeypatch):
    """The server ends between its save and its mark; later come jobs without held-out tasks, of which one fails."""
    config.runtime.max_to_keep, ending = 1, []
    held_out, mark_best = {0: 0.1, 2: 0.9, 4: 0.3}, training._Run._mark_best

    def reward(lease):
        metadata = lease["metadata"]
        return held_out[metadata["step"]] if metadata["mode"] == "evaluate" else random.random()

    def killed_at_two(run):
        if run._has_checkpoint(2) and not ending:
            ending.append(closing(runner))
            wait_for(lambda: runner._stops["train"].now)
            raise training.Stopped
        mark_best(run)

    monkeypatch.setattr(training._Run, "_mark_best", killed_at_two)
    spec = {"kind": "train", "data_id": "d", "total_steps": 4, "batch_size": 2, "eval_interval": 2}
    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    runner.submit(spec, "train")
    with Pool(store, "train", reward):
        wait_for(lambda: ending)
        ending[0].join()
    policies.close()

    policies = Policies(config)
    assert policies.step == 2
    runner = JobRunner(policies, store, config)
    with Pool(store, "train", reward):
        wait_for(lambda: status(store, "train") == "succeeded")
    best = policies.find_checkpoint("best")
    assert best.name == "step-2" and store.job("train")["result"]["best_checkpoint"] == str(best)

    store.put_dataset("untested", "train", TASKS)
    spec = {"kind": "train", "data_id": "untested", "total_steps": 1, "batch_size": 2}
    job = runner.submit(spec)
    with Pool(store, job, lambda lease: None):
        wait_for(lambda: status(store, job) == "failed")
    assert policies.find_checkpoint("best") == best
    job = runner.submit(spec)
    with Pool(store, job):
        wait_for(lambda: status(store, job) == "succeeded")
    with pytest.raises(InvalidConfigError, match="the best is known once held-out tasks"):
        policies.find_checkpoint("best")
    runner.close()
    policies.close()


def test_a_result_says_of_the_newest_update_whether_it_could_compare(config, store):
    """The second update's tokens are of other distributions than the learner's."""

    def reward(lease):
        attempt = store.attempt_by_token(lease["token"])
        is_constrained = lease["metadata"]["step"] == 2
        store.record_call(attempt, CallRecord([1, 2, 3], [4, 5], [-5.5, -5.5], constrained=is_constrained))
        return random.random()

    store.put_dataset("untested", "train", TASKS)
    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    for is_known in (True, False):
        spec = {"kind": "train", "data_id": "untested", "total_steps": 1, "batch_size": 2}
        job = runner.submit(spec)
        with Pool(store, job, reward, calls=False):
            wait_for(lambda job=job: status(store, job) in ("succeeded", "failed"))
        assert (store.job(job)["result"]["sampler_learner_logprob_diff"] is not None) == is_known
    runner.close()
    policies.close()


def test_fewer_steps_than_were_made_change_nothing(config, store):
    for total_steps in (3, 2):
        policies = Policies(config)
        runner = JobRunner(policies, store, config, resume=lambda job_id: False)
        runner.submit({"kind": "train", "data_id": "d", "total_steps": total_steps, "batch_size": 2}, "train")
        with Pool(store, "train"):
            wait_for(lambda: status(store, "train") in ("succeeded", "failed"))
        runner.close()
        policies.close()
        assert status(store, "train") == "succeeded" and store.job("train")["result"]["total_steps"] == 3


def test_what_a_restart_does_again_is_not_there_twice(serving, store, config):
    """An evaluation of two tasks whose server ended when one of them had."""
    runner = JobRunner(serving.policies, store, config)
    runner.submit(EVALUATE, "job")
    (lease,) = store.exchange("job", "pool", [], [], 1, 20.0)["leases"]
    store.exchange("job", "pool", [{"lease_id": lease["lease_id"], "reward": 1.0}], [], 0, 0.0)
    runner.close()
    runner = JobRunner(serving.policies, store, config)
    with Pool(store, "job"):
        wait_for(lambda: status(store, "job") == "succeeded")
    runner.close()
    ended = [record.task_id for _, record in store.ended_rollouts(Filter(job_id="job"))]
    assert sorted(ended) == ["test-0", "test-1"]


def test_a_job_keeps_the_tasks_that_it_was_made_for(config, store):
    """Its dataset is replaced by a smaller one while it runs, and its test tasks are another dataset's."""
    seen = {"train": set(), "evaluate": set()}
    store.put_dataset("held-out", "test", [b'{"question": "5+5?"}'])
    policies = Policies(config)
    runner = JobRunner(policies, store, config)
    spec = {"kind": "train", "data_id": "d", "test_data_id": "held-out", "epochs": 3, "batch_size": 1}
    jobs = [runner.submit(spec | {"key": key}) for key in ("one", "two")]
    for data_id in ("d", "held-out"):
        upload = store.upload(data_id, "train")
        upload.feed(b'{"question": "new"}')
        store.replace_dataset(data_id, [upload])

    def note(lease):
        seen[lease["metadata"]["mode"]].add(lease["task"]["question"])
        return random.random()

    for job in jobs:
        with Pool(store, job, note):
            wait_for(lambda job=job: status(store, job) == "succeeded")
    assert seen == {"train": {"1+1?", "2+2?"}, "evaluate": {"5+5?"}}
    wait_for(lambda: store._database.read("SELECT count(*) FROM tasks") == [(2,)])  # nobody needs the old ones now
    runner.close()
    policies.close()


# ---- what goes wrong ----


def test_a_job_whose_tasks_are_gone_is_not_left_behind(runner, store):
    """The client is told; one that asks again for a job that waits gets it, whatever became of the dataset."""
    runner.submit(EVALUATE, "first")
    waiting = runner.submit(EVALUATE | {"key": "k"}, "waiting")
    upload = store.upload("d", "train")
    upload.feed(b'{"question": "new"}')
    store.replace_dataset("d", [upload])
    with pytest.raises(UnknownError, match="no dataset 'gone'"):
        runner.submit({"kind": "train", "data_id": "d", "test_data_id": "gone"}, "lost")
    assert status(store, "lost") == "failed" and "no dataset 'gone'" in store.job("lost")["error"]
    assert runner.submit(EVALUATE | {"key": "k"}) == waiting and status(store, waiting) == "queued"
    for job_id in ("first", waiting):
        with Pool(store, job_id):
            wait_for(lambda job_id=job_id: status(store, job_id) == "succeeded")


def test_after_a_restart_the_clients_of_all_jobs_are_waited_for_at_once(serving, store, config, monkeypatch):
    monkeypatch.setattr(training, "_SILENCE_S", 2.0)
    for job_id in ("one", "two", "three"):
        store.create_job(EVALUATE, job_id)
    runner = JobRunner(serving.policies, store, config)
    wait_for(lambda: status(store, "one") == "failed")
    start = time.monotonic()
    wait_for(lambda: status(store, "three") == "failed")
    assert time.monotonic() - start < 1.5 and "no worker pool" in store.job("three")["error"]
    runner.close()


def test_a_pool_that_speaks_again_as_it_is_given_up_is_given_up(runner, store, monkeypatch):
    """The step would go on without its open rollouts."""
    seconds = iter([training._SILENCE_S + 1.0])
    monkeypatch.setattr(store, "silent_s", lambda job_id: next(seconds, 0.0))
    job_id = runner.submit(EVALUATE)
    wait_for(lambda: status(store, job_id) == "failed")
    assert "no worker pool" in store.job(job_id)["error"]


def test_a_failed_job_is_logged_with_a_traceback_only_where_that_says_more(runner, store, caplog):
    store.put_dataset("no-test", "train", TASKS)
    with caplog.at_level(logging.ERROR, "lightning_jax"):
        runner.submit({"kind": "evaluate", "data_id": "no-test"}, "ours")
        runner.submit({"kind": "evaluate"}, "unforeseen")
        for job_id in ("ours", "unforeseen"):
            wait_for(lambda job_id=job_id: status(store, job_id) == "failed")
    ours, unforeseen = (record for record in caplog.records if record.name.startswith("lightning_jax.server"))
    assert "job ours failed: TrainingError: the dataset has no test split" in ours.getMessage() and not ours.exc_info
    assert "job unforeseen failed" in unforeseen.getMessage() and unforeseen.exc_info[0] is KeyError


def test_a_store_that_cannot_be_written_ends_the_jobs_and_is_said(serving, runner, store, config, caplog):
    app = server.create_app(config=config, policies=serving.policies, store=store, jobs=runner)
    running = server.RunningServer(app, server.bind("127.0.0.1", 0))
    try:
        runner.submit(EVALUATE, "first")
        runner.submit(EVALUATE, "second")
        wait_for(lambda: store.grant("first", "pool", [], 0) and store._rollouts._waiting["first"])
        assert httpx.get(f"{running.url}/health").json()["status"] == "ok"
        store._database._connection.execute("PRAGMA max_page_count = 1")  # a full disk
        for _ in range(100):
            try:
                store.add_event("first", "note", 0, {"text": "x" * 10_000})
                store.flush()
            except StoreError:
                break
        wait_for(lambda: runner.error is not None)
        reply = httpx.get(f"{running.url}/health")
        assert reply.status_code == 503 and reply.json()["status"] == "failing"
        assert "the store failed: cannot write the store" in reply.json()["error"]
        assert "jobs' thread failed: cannot write the store" in reply.json()["error"]
        for job_id in ("first", "second"):  # nobody waits for them
            job = httpx.get(f"{running.url}/api/jobs/{job_id}").json()
            assert job["status"] == "failed" and "full" in job["error"]
        with pytest.raises(StoreError, match="no job can run any more"):
            runner.submit(EVALUATE, "third")
    finally:
        running.stop()
    assert "job first could not be ended, and no other can run" in caplog.text


class BrokenEngine:
    """Stands for an engine whose device is gone: a CPU's cannot be taken away."""

    def step(self) -> bool:
        raise RuntimeError("device lost")

    def fail_all(self, error: str) -> None:
        pass


def test_health_says_that_the_device_failed(start, random_model):
    running = start(random_model)
    assert running.http.get("/health").status_code == 200
    running.policies._device.add_engine(BrokenEngine())
    running.policies._device.wake()
    wait_for(lambda: running.policies.error is not None)
    reply = running.http.get("/health")
    assert reply.status_code == 503
    assert reply.json() | {"error": ""} == {
        "status": "failing",
        "error": "",
        "model": running.policy.name,
        "policy_version": 0,
    }
    assert reply.json()["error"] == "the device failed: device lost"


def test_failures_and_silence_are_told_while_the_job_runs_and_in_its_result(runner, store, config):
    trace = 'Traceback\n  File "my/agent.py", line 7, in solve\n    1 / 0\nZeroDivisionError: division by zero\n'
    error = {"type": "ZeroDivisionError", "message": "division by zero", "traceback": trace}
    failed = []

    def fail_first(lease):
        if lease["metadata"]["mode"] == "train" and not failed:
            failed.append(lease["task_id"])
            return {"error": error, "cause": "exception", "reward": None}
        return 1.0

    job = runner.submit({"kind": "train", "data_id": "d", "epochs": 1, "batch_size": 2})
    with Pool(store, job, fail_first, calls=False):
        wait_for(lambda: status(store, job) in ("succeeded", "failed"))
    events = store.events(job)
    says = [event["data"]["text"] for event in events if event["kind"] == "warning"]
    first = f"{failed[0]}: exception: ZeroDivisionError: division by zero (my/agent.py, line 7, in solve)"
    assert len(says) == 2 and "no rollout called the model" in says[0]
    assert says[1] == f"1 of 4 rollouts failed; {first}"
    row = read_metrics(config.workdir)[-1]
    assert not unexplained(row), "say in lightning_jax/metric_names.py what they mean"
    assert row["rollout/failed_exception"] == 1 and row["reward/agent_mean"] == 1.0 and row["reward/std"] == 0.0
    assert row["memory/host_peak_bytes"] > 1e7 and row["time/wait_s"] > 0.0 and row["rollout/staleness_max"] == 0
    assert row["reward/source/sums/mean"] == 1.0
    result = store.job(job)["result"]
    assert (result["failed"], result["first_failure"]) == (1, first)
    last = [event["kind"] for event in events if event["kind"] in ("step", "evaluation")]
    assert last == ["evaluation", "step", "evaluation"]
    job = runner.submit(EVALUATE)
    with Pool(store, job, calls=False):
        wait_for(lambda: status(store, job) in ("succeeded", "failed"))
    assert any("no rollout called the model" in e["data"]["text"] for e in store.events(job) if e["kind"] == "warning")
    assert store.job(job)["result"]["first_failure"] is None


def asks_too_much(resource, task):
    """Has more to say than the model can take, and makes the best of the error."""
    url = f"{resource.model_api}/v1/chat/completions"
    reply = httpx.post(url, json={"messages": [{"role": "user", "content": task.question * 400}]})
    return float(reply.is_success)


def test_calls_that_were_all_refused_are_said_with_the_refusal(trained, tmp_path):
    tasks = tmp_path / "test.jsonl"
    tasks.write_text('{"question": "2+2?"}\n')
    with Client(trained.url) as client:
        result = client.evaluate(asks_too_much, str(tasks), nworkers=1)
    job = trained.store.jobs()[-1]["job_id"]
    (said,) = [event["data"]["text"] for event in trained.store.events(job) if event["kind"] == "warning"]
    start = "all calls of the model were refused, so their rewards say nothing of it: prompt is too long: "
    assert result.mean == 0.0 and said.startswith(start)
