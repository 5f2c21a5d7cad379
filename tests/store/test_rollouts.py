"""Rollouts under leases: nothing is lost, nothing counts twice, and a killed process leaves a store that opens."""

import contextlib
import gc
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from lightning_jax.store import CallRecord, RolloutEntry, Store, StoreError, UnknownError, rollouts
from lightning_jax.store.trajectories import Filter, ended_rollouts


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store.sqlite3")
    yield store
    store.close()


@pytest.fixture
def job(store):
    return store.create_job({"kind": "train"})


def open_some(store, job, count=1, step=1, timeout_s=60.0, max_attempts=3, **options):
    entries = [RolloutEntry(f"task-{i}", i, i, 0, {"question": str(i)}) for i in range(count)]
    options = {"mode": "train", "metadata": {"use_cot": True}, "seed": 7} | options
    return store.open_rollouts(
        job, step=step, entries=entries, timeout_s=timeout_s, max_attempts=max_attempts, **options
    )


def lease(store, job, pool="pool", running=(), want=1):
    return store.exchange(job, pool, [], list(running), want)["leases"]


def end(store, job, lease_id, pool="pool", running=(), **result):
    return store.exchange(job, pool, [{"lease_id": lease_id, **result}], list(running), 0)


def call(index=0, parent=None, prompt=(1, 2, 3), sampled=(4, 5)):
    return CallRecord(
        list(prompt), list(sampled), [-0.5] * len(sampled), parent, 0.7, 3, index=index, reply={"role": "assistant"}
    )


def ended(store, job, ids):
    store.wait(job, ids)
    return store.finished(ids)


def test_a_rollouts_way(store, job):
    ids = open_some(store, job, 2)
    (first,) = lease(store, job)
    assert first["task"] == {"question": "0"} and first["task_id"] == "task-0" and first["timeout_s"] == 60
    assert first["metadata"] == {"use_cot": True, "mode": "train", "rollout_id": ids[0], "attempt": 1, "step": 1}
    attempt = store.attempt_by_token(first["token"])
    assert store.next_call_index(attempt) == 0 and store.next_call_index(attempt) == 1
    assert store.record_call(attempt, call(1, parent=0, prompt=range(70000, 70006)))  # ended before the one it follows
    assert store.record_call(attempt, call(0))
    (second,) = lease(store, job, running=[first["lease_id"]])
    end(store, job, first["lease_id"], running=[second["lease_id"]], reward=0.25, duration_s=1.5)
    end(store, job, second["lease_id"], reward=1)
    assert store.attempt_by_token(first["token"]) is None and attempt.ended
    assert not store.record_call(attempt, call(2))

    record, other = ended(store, job, ids)
    assert (record.status, record.reward, record.cause, record.attempt) == ("succeeded", 0.25, None, 1)
    assert (record.rollout_id, record.task_id, record.step, record.mode) == (ids[0], "task-0", 1, "train")
    assert record.duration_s == 1.5 and other.reward == 1.0 and other.calls == []
    assert [c.index for c in record.calls] == [0, 1] and [c.parent for c in record.calls] == [None, 0]
    stored = record.calls[1]
    np.testing.assert_array_equal(stored.prompt_ids, np.arange(70000, 70006))
    assert stored.logprobs.dtype == np.float32 and stored.prompt_ids.dtype == np.int32
    assert (stored.temperature, stored.policy_version, stored.finish_reason) == (0.7, 3, "stop")


@pytest.mark.parametrize(
    "result, cause, text",
    [
        ({"reward": None}, "invalid_reward", "None"),
        ({"reward": float("nan")}, "invalid_reward", "nan"),
        ({"reward": float("-inf")}, "invalid_reward", "inf"),
        ({"reward": -1e300}, "invalid_reward", "-1e+300"),  # infinite in float32, which is what is learned from
        ({"reward": 10**400}, "invalid_reward", "1000"),
        ({"reward": "1"}, "invalid_reward", "'1'"),
        ({"error": {"type": "KeyError", "message": "x", "traceback": "T"}}, "exception", "KeyError: x"),
    ],
)
def test_what_the_agent_did_wrong_fails_at_once(store, job, result, cause, text):
    ids = open_some(store, job)
    end(store, job, lease(store, job)[0]["lease_id"], **result)
    (record,) = ended(store, job, ids)
    assert (record.status, record.cause, record.reward, record.attempt) == ("failed", cause, None, 1)
    assert text in record.error
    assert record.traceback == (result.get("error") or {}).get("traceback")


def test_a_reward_for_a_call_that_cannot_be_changes_nothing(store, job):
    ids = open_some(store, job)
    (leased,) = lease(store, job)
    store.record_call(store.attempt_by_token(leased["token"]), call())
    events = [{"kind": "reward", "call_index": index, "reward": 0.5} for index in (-1, 0, 1, 2**63)]
    end(store, job, leased["lease_id"], reward=1.0, events=events)
    (record,) = ended(store, job, ids)
    assert record.reward == 1.0 and [c.reward for c in record.calls] == [0.5]


@pytest.mark.parametrize("cause", ["crash", "timeout"])
def test_a_dead_worker_is_tried_again_without_its_calls(store, job, cause):
    ids = open_some(store, job, max_attempts=2)
    error = {"type": "WorkerCrash", "message": "killed", "traceback": ""}
    (first,) = lease(store, job)
    store.record_call(store.attempt_by_token(first["token"]), call(prompt=[9]))
    end(store, job, first["lease_id"], cause=cause, error=error)
    assert store.attempt_by_token(first["token"]) is None
    (second,) = lease(store, job)
    assert second["attempt"] == 2 and second["rollout_id"] == ids[0] and second["token"] != first["token"]
    store.record_call(store.attempt_by_token(second["token"]), call(prompt=[8]))
    end(store, job, second["lease_id"], reward=1.0)
    (record,) = ended(store, job, ids)
    assert record.attempt == 2 and [list(c.prompt_ids) for c in record.calls] == [[8]]

    ids = open_some(store, job, max_attempts=2)
    for _ in range(2):
        end(store, job, lease(store, job)[0]["lease_id"], cause=cause, error=error)
    (record,) = ended(store, job, ids)
    assert (record.status, record.cause, record.attempt) == ("failed", cause, 2)
    assert lease(store, job) == []


def test_results_count_once(store, job):
    """A request whose reply was lost is sent again."""
    ids = open_some(store, job)
    (one,) = lease(store, job)
    for reward in (0.5, 0.9):
        end(store, job, one["lease_id"], reward=reward)
    assert ended(store, job, ids)[0].reward == 0.5
    end(store, job, "no such lease", reward=1.0)


def test_a_lease_whose_reply_was_lost_is_given_out_again(store, job, monkeypatch):
    monkeypatch.setattr(rollouts, "GRANT_GRACE_S", 0.2)
    ids = open_some(store, job)
    lease(store, job)
    assert lease(store, job) == []  # it may still be on its way
    time.sleep(0.3)
    (again,) = lease(store, job)
    assert again["attempt"] == 2
    time.sleep(0.3)
    assert lease(store, job, running=[again["lease_id"]]) == []
    end(store, job, again["lease_id"], reward=1.0)
    assert ended(store, job, ids)[0].attempt == 2


def test_a_lease_whose_reply_was_lost_is_no_attempt_at_its_rollout(store, job, monkeypatch):
    """But one that its pool has named and then runs no longer is, and so are replies that are lost again and again."""
    monkeypatch.setattr(rollouts, "GRANT_GRACE_S", 0.0)
    ids = open_some(store, job, max_attempts=1)
    lease(store, job)
    (again,) = lease(store, job)
    end(store, job, again["lease_id"], reward=1.0)
    assert ended(store, job, ids)[0].reward == 1.0

    ids = open_some(store, job, max_attempts=1)
    (named,) = lease(store, job)
    assert lease(store, job, running=[named["lease_id"]]) == lease(store, job) == []
    assert ended(store, job, ids)[0].cause == "lost"

    ids = open_some(store, job, max_attempts=2)
    leases = list(iter(lambda: lease(store, job), []))
    assert len(leases) == rollouts.MAX_LOST_REPLIES + 2
    assert ended(store, job, ids)[0].cause == "lost"


def test_a_silent_pools_leases_are_given_up(store, job, monkeypatch):
    monkeypatch.setattr(rollouts, "POOL_SILENCE_S", 0.6)
    ids = open_some(store, job)
    (lost,) = lease(store, job, pool="dies")
    waiter = threading.Thread(target=store.wait, args=(job, ids))
    waiter.start()
    deadline = time.monotonic() + 10
    while not (leases := lease(store, job, pool="lives")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert leases[0]["attempt"] == 2
    reply = end(store, job, lost["lease_id"], pool="dies", running=[lost["lease_id"]], reward=0.1)
    assert reply["cancelled"] == [lost["lease_id"]]
    end(store, job, leases[0]["lease_id"], pool="lives", reward=0.2)
    waiter.join(5)
    assert store.finished(ids)[0].reward == 0.2


def test_how_long_no_pool_has_spoken_for_a_job(store, job):
    """A report and a question for leases begin the silence anew; another job's pools and more rollouts do not."""
    assert store.silent_s(job) == 0.0
    open_some(store, job)
    other = store.create_job({"kind": "train"})
    for speak in (lambda: store.report(job, "pool", [], []), lambda: store.grant(job, "pool", [], 0)):
        time.sleep(0.2)
        store.exchange(other, "pool", [], [], 0)
        open_some(store, job)
        assert 0.2 <= store.silent_s(job) < 5.0
        speak()
        assert store.silent_s(job) < 0.2


def test_a_wait_can_end_when_no_pool_comes(store, job):
    ids = open_some(store, job)
    store.wait(job, ids, stop=lambda: store.silent_s(job) > 0.3)
    assert store.silent_s(job) > 0.3 and store.finished(ids) == []


def test_the_time_this_process_stood_still_is_not_silence(store, job):
    open_some(store, job)
    store._rollouts.reclaim()
    store._rollouts._heard[job] -= 700.0  # as after a stop signal: the last tick and the last word are as old
    store._rollouts._ticked -= 700.0
    assert store.silent_s(job) < 5.0


def test_a_rollout_far_past_its_time_is_given_up(store, job, monkeypatch):
    monkeypatch.setattr(rollouts, "TIMEOUT_GRACE_S", 0.0)
    ids = open_some(store, job, timeout_s=0.2, max_attempts=1)
    lease(store, job)
    (record,) = ended(store, job, ids)
    assert (record.status, record.cause) == ("failed", "timeout")


def test_ending_an_attempt_stops_its_model_calls(store, job):
    open_some(store, job)
    (one,) = lease(store, job)
    stopped = []
    store.attempt_by_token(one["token"]).on_end["request"] = lambda: stopped.append("request")
    end(store, job, one["lease_id"], reward=1.0)
    assert stopped == ["request"]


CRASH = {"cause": "crash", "error": {"type": "WorkerCrash", "message": "killed", "traceback": ""}}


@pytest.mark.parametrize("result, calls", [({"reward": 1.0}, 1), ({"reward": None}, 1), (CRASH, 0)])
def test_a_result_has_open_streams_recorded(store, job, result, calls):
    """An attempt that is given up has its calls as they were."""
    ids = open_some(store, job, max_attempts=1)
    (one,) = lease(store, job)
    attempt = store.attempt_by_token(one["token"])
    attempt.on_result.append(lambda: store.record_call(attempt, call()))
    end(store, job, one["lease_id"], **result)
    assert len(ended(store, job, ids)[0].calls) == calls


def test_cancelled_rollouts_are_taken_back(store, job):
    ids = open_some(store, job, 3)
    (one,) = lease(store, job)
    waiter = threading.Thread(target=store.wait, args=(job, ids))
    waiter.start()
    assert store.cancel_open(job) == 3
    waiter.join(5)
    assert not waiter.is_alive() and store.finished(ids) == []
    reply = store.exchange(job, "pool", [], [one["lease_id"]], 5)
    assert reply["cancelled"] == [one["lease_id"]] and reply["leases"] == []


def test_wait_reports_progress_and_stops(store, job):
    ids = open_some(store, job, 2)
    end(store, job, lease(store, job)[0]["lease_id"], reward=1.0)
    seen = []
    store.wait(job, ids, stop=lambda: True, progress=seen.append)
    assert seen == [1]


def test_wait_looks_at_each_rollout_once_however_many_there_are(store, job, comparisons):
    ids = open_some(store, job, 100)
    leases = lease(store, job, want=100)

    def end_next(ended):
        if leases:
            one = leases.pop()
            end(store, job, one["lease_id"], running=[other["lease_id"] for other in leases], reward=1.0)

    store.wait(job, list(map(comparisons.of(int), ids)), progress=end_next)
    assert len(store.finished(ids)) == 100 and 100 <= comparisons.count <= 300


def test_an_exchange_waits_for_leases(store, job):
    timer = threading.Timer(0.3, open_some, (store, job))
    timer.start()
    start = time.monotonic()
    assert len(store.exchange(job, "pool", [], [], 4, 20.0)["leases"]) == 1
    assert 0.2 < time.monotonic() - start < 10
    assert store.exchange(job, "pool", [], [], 4, 0.0)["leases"] == []
    threading.Timer(0.3, store.update_job, (job,), {"status": "succeeded"}).start()
    assert store.exchange(job, "pool", [], [], 4, 20.0)["job_status"] == "succeeded"
    with pytest.raises(UnknownError):
        store.exchange("nope", "pool", [], [], 1, 0.0)


def test_jobs_and_events(store, tmp_path):
    job = store.create_job({"kind": "train", "key": "k"})
    assert store.create_job({"kind": "train", "key": "k"}) == job != store.create_job({"kind": "train"})
    assert store.create_job({"kind": "x"}, "main") == "main" == store.create_job({"kind": "y"}, "main")
    store.update_job(job, status="running", step=2, total_steps=9, result={"a": [1]})
    first = store.add_event(job, "step", 1, {"reward/mean": 0.5})
    threading.Timer(0.2, store.add_event, (job, "step", 2, {"n": 2})).start()
    assert [event["step"] for event in store.events(job)] == [1]
    (event,) = store.events(job, after=first, wait_s=20)
    assert event["data"] == {"n": 2} and event["kind"] == "step" and event["seq"] > first
    with pytest.raises(TypeError, match="no field"):
        store.update_job(job, colour="red")
    store.close()

    store = Store(tmp_path / "store.sqlite3")
    found = store.job(job)
    assert (found["status"], found["step"], found["total_steps"], found["result"]) == ("running", 2, 9, {"a": [1]})
    assert found["spec"] == {"kind": "train", "key": "k"}
    store.discard_after(job, 1)
    assert [e["step"] for e in store.events(job)] == [1] and not store.has_events(job, first)
    store.close()
    store = Store(tmp_path / "store.sqlite3")
    assert store.add_event(job, "step", 2, {}) > event["seq"], "a follower that saw the old event would miss this one"
    assert store.events(job, after=event["seq"])
    store.restart_job(job, {"kind": "evaluate"})
    assert store.job(job)["status"] == "queued" and store.job(job)["result"] is None
    store.close()


def test_what_an_ended_job_has_left_is_in_memory_only_until_it_is_on_disk(store, job, tmp_path):
    class Result(dict):
        """A dictionary whose end can be seen."""

    result = Result(samples={"test-0": [0.5]})
    store.update_job(job, status="running", result=result, traceback="line 1")
    seen = weakref.ref(result)
    del result
    assert store.job(job)["result"] is seen()
    store.update_job(job, status="succeeded")
    gc.collect()
    assert seen() is None and store.job_status(job) == "succeeded"
    for opened_again in (False, True):
        if opened_again:
            store.close()
            store = Store(tmp_path / "store.sqlite3")
        assert not {"result", "traceback"} & store._jobs._jobs[job].keys()
        found = store.job(job)
        assert found["status"] == "succeeded" and found["traceback"] == "line 1"
        assert found["result"] == {"samples": {"test-0": [0.5]}}
    store.close()


def test_the_result_of_a_job_whose_end_cannot_be_written_is_told(store, job):
    fill_disk(store, job)
    with pytest.raises(StoreError, match="full"):
        store.update_job(job, status="succeeded", result={"total_steps": 2})
    assert store.job_status(job) == "succeeded" and store.job(job)["result"] == {"total_steps": 2}


def test_discarding_steps_forgets_their_rollouts(store, job):
    kept, gone = open_some(store, job, 1, step=1), open_some(store, job, 1, step=2)
    for ids in (kept, gone):
        (one,) = lease(store, job)
        store.record_call(store.attempt_by_token(one["token"]), call())
        end(store, job, one["lease_id"], reward=1.0)
        store.wait(job, ids)
    still_open = open_some(store, job, 1, step=3)
    store.discard_after(job, 1)
    assert len(store.finished(kept)[0].calls) == 1
    assert store.finished(gone) == [] and store.finished(still_open) == [] and lease(store, job) == []
    assert store._database.read("SELECT count(*) FROM calls") == [(1,)]


def test_an_evaluation_that_was_broken_off_is_forgotten(store, job):
    trained, tested = open_some(store, job, 1, step=1), open_some(store, job, 2, step=1, mode="evaluate")
    for one in lease(store, job, want=2):
        end(store, job, one["lease_id"], reward=1.0)
    store.wait(job, [trained[0], tested[0]])
    store.discard_after(job, 1)
    assert len(store.finished([*trained, *tested])) == 2
    store.discard_after(job, 1, tested=False)
    assert len(store.finished(trained)) == 1 and store.finished(tested) == []


def test_pools_that_compete_get_every_rollout_once(store, job):
    ids = open_some(store, job, 300)
    taken: dict[int, int] = {}

    def work(pool):
        results = []
        while True:
            reply = store.exchange(job, pool, results, [], 7, 0.2)
            if not results and not reply["leases"]:
                return
            results = []
            for one in reply["leases"]:
                taken[one["rollout_id"]] = taken.get(one["rollout_id"], 0) + 1
                store.record_call(store.attempt_by_token(one["token"]), call(prompt=[one["rollout_id"]]))
                results.append({"lease_id": one["lease_id"], "reward": float(one["rollout_id"])})

    pools = [threading.Thread(target=work, args=(f"pool-{i}",)) for i in range(4)]
    for pool in pools:
        pool.start()
    records = ended(store, job, ids)
    for pool in pools:
        pool.join()
    assert taken == dict.fromkeys(ids, 1)
    assert [record.reward for record in records] == [float(i) for i in ids]
    assert [list(record.calls[0].prompt_ids) for record in records] == [[i] for i in ids]


def test_one_process_at_a_time(tmp_path, store):
    with pytest.raises(StoreError, match="open in another process"):
        Store(store._database.path)


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "s").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(StoreError, match="cannot open"):
        Store(tmp_path / "s")


def test_a_full_disk_is_an_error_and_what_was_there_stays(tmp_path):
    store = Store(tmp_path / "s")
    store.put_dataset("d", "train", [b'{"question": 1}'])
    store._database._connection.execute("PRAGMA max_page_count = 40")
    with pytest.raises(StoreError, match="full"):
        store.put_dataset("big", "train", [b'{"question": "%s"}\n' % (b"x" * 2000)] * 3000)
    store.create_job({"kind": "train"}, "main")
    store.flush()  # an upload that does not fit is nobody else's trouble
    for _ in range(200):
        store.add_event("main", "step", 1, {"text": "x" * 4000})
    with pytest.raises(StoreError, match="full.*\n.*mend the cause"):
        store.flush()
    with pytest.raises(StoreError, match="full"):
        store.update_job("main", step=3)
    store.close()
    store = Store(tmp_path / "s")
    assert store.task("d", "train", 0) == {"question": 1} and store.dataset("big") == []
    assert store.job("main")["step"] == 0
    store.close()


def fill_disk(store, job):
    store._database._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(StoreError, match="full"):
        while True:
            store.add_event(job, "note", 1, {"text": "x" * 10_000})
            store.flush()


@pytest.mark.parametrize("result", [{"reward": 1.0, "events": [{"kind": "span"}]}, {"reward": None}, CRASH])
def test_nobody_waits_for_rollouts_behind_a_full_disk(store, job, result):
    ids = open_some(store, job, 3)
    first, second = lease(store, job, want=2)
    fill_disk(store, job)
    end(store, job, first["lease_id"], running=[second["lease_id"]], **result)
    assert lease(store, job, running=[second["lease_id"]])
    deadline = time.monotonic() + 5
    with pytest.raises(StoreError, match="full"):
        store.wait(job, ids, stop=lambda: time.monotonic() > deadline)
    assert store.cancel_open(job) == (3 if result == CRASH else 2)
    reply = store.exchange(job, "pool", [], [second["lease_id"]], 5)
    assert reply["cancelled"] == [second["lease_id"]] and reply["leases"] == []


KILLED = """
import sys
from lightning_jax.store import CallRecord, RolloutEntry, Store
store = Store(sys.argv[1])
job = store.create_job({"kind": "train"}, "main")
step = 0
while True:
    step += 1
    ids = store.open_rollouts(job, step=step, mode="train", timeout_s=9, seed=0,
                              entries=[RolloutEntry("t", 0, 0, i, {"question": "q"}) for i in range(8)])
    for one in store.exchange(job, "p", [], [], 8)["leases"]:
        attempt = store.attempt_by_token(one["token"])
        store.record_call(attempt, CallRecord([step] * 50, [1], [0.0]))
        store.exchange(job, "p", [{"lease_id": one["lease_id"], "reward": 1.0}], [], 0)
    assert len(store.finished(ids)) == 8
    store.update_job(job, step=step)
    if step > 3:
        print(step, flush=True)
"""


def test_a_killed_process_leaves_a_prefix_of_what_happened(tmp_path):
    for round_number in range(3):
        path = tmp_path / f"s{round_number}"
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(0.05 + 0.11 * round_number)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = Store(path)
        step = store.job("main")["step"]
        assert step >= 3
        done = store._database.read("SELECT rollout_id FROM rollouts WHERE step <= ? ORDER BY rollout_id", (step,))
        records = store.finished([row[0] for row in done])
        assert len(records) == 8 * step
        assert all(list(record.calls[0].prompt_ids) == [record.step] * 50 for record in records)
        assert store._database.read("PRAGMA integrity_check") == [("ok",)]
        assert store._database.read("SELECT count(*) FROM rollouts WHERE status = 'open'") == [(0,)]
        store.close()


@pytest.mark.parametrize("which", [{}, {"step": 1}, {"mode": "train"}, {"step": 1, "mode": "train"}])
def test_a_page_of_a_jobs_rollouts_is_found_without_sorting_them(tmp_path, which):
    Store(tmp_path / "store.sqlite3").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite3")) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'rollouts_by%'").fetchall():
            connection.execute(f"DROP INDEX {name}")  # as in older files
        connection.commit()
    store = Store(tmp_path / "store.sqlite3")
    plans = []

    class Explaining:
        def read(self, sql, parameters=()):
            plans.append([row[-1] for row in store._database.read(f"EXPLAIN QUERY PLAN {sql}", parameters)])
            return store._database.read(sql, parameters)

    assert list(ended_rollouts(Explaining(), Filter("job", **which), after=7)) == []
    store.close()
    assert len(plans) == 1 and len(plans[0]) == 1, "one search, nothing sorted"
    assert "job_id=?" in plans[0][0] and "rowid>?" in plans[0][0]


def test_threads_that_have_read_leave_nothing_open(store, job):
    descriptors = pathlib.Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("the process's open files are seen on Linux alone")
    count = lambda: len(list(descriptors.iterdir()))  # noqa: E731
    store.add_event(job, "step", 1, {})
    assert store.events(job)
    before = count()
    for _ in range(20):
        reader = threading.Thread(target=store.events, args=(job,))
        reader.start()
        reader.join()
    assert count() == before
