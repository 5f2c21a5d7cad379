"""The pool's own life: agents that cannot be loaded, a server that goes away, work taken back, and how it all ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent_lightning import InvalidConfigError, Pool, TrainingError
from tests.agent_lightning.conftest import is_alive, wait_until, written_pids

ROOT = Path(__file__).resolve().parents[2]


def test_nworkers_is_at_least_one():
    with pytest.raises(InvalidConfigError, match="nworkers=0"):
        Pool("http://localhost:1", "job", lambda resource, task: 1, 0)


@pytest.mark.parametrize(
    "text, error, says",
    [
        ("import no_such_package_at_all\n", TrainingError, "No module named 'no_such_package_at_all'"),
        ("import os\nprint('last words', flush=True)\nos._exit(4)\n", TrainingError, "status 4.*\n.*last words"),
        ("def one(a, b): pass\ndef two(a, b): pass\n", InvalidConfigError, "found: one"),
    ],
)
def test_an_agent_that_cannot_be_loaded_ends_the_pool_with_the_reason(served, tmp_path, text, error, says):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(error, match=says):
        served.run(str(path), [{}])


def test_an_agent_that_takes_too_long_to_load(served, tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(1000)\n")
    with pytest.raises(TrainingError, match="loading the agent took over 0.5 s"):
        served.run(str(path), [{}], nworkers=1, pool={"start_timeout_s": 0.5})


SOMETIMES = """
import os, pathlib, time
folder = pathlib.Path({folder!r})
load = len(os.listdir(folder))
(folder / str(load)).touch()
if load in {failing}:
    raise ConnectionError("the hub was away")
def agent(resource, task):
    if resource.metadata["attempt"] == 1:
        os._exit(1)
    return 1
"""


@pytest.mark.parametrize("failing", [[1, 2], [1, 2, 3]], ids=["for a while", "for good"])
def test_an_agent_that_has_been_loaded_before_is_loaded_again(served, tmp_path, failing):
    folder = tmp_path / "loads"
    folder.mkdir()
    path = tmp_path / "sometimes.py"
    path.write_text(SOMETIMES.format(folder=str(folder), failing=failing))
    if failing == [1, 2]:
        (record,) = served.run(str(path), [{}], nworkers=1, max_attempts=2)
        assert (record.reward, record.attempt) == (1.0, 2)
    else:
        with pytest.raises(TrainingError, match=r"(?s)ConnectionError: the hub was away.*sometimes\.py.*raise"):
            served.run(str(path), [{}], nworkers=1, max_attempts=2)
    assert len(os.listdir(folder)) == 4


def test_an_unknown_job(served):
    with pytest.raises(Exception, match="no job 'nonsense'"):
        Pool(served.url, "nonsense", lambda resource, task: 1, 1).run()


def test_a_server_that_comes_back_is_not_noticed(served):
    def agent(resource, task):
        import time

        time.sleep(0.05)
        return 1

    restart = threading.Timer(0.7, served.restart, [1.0])
    restart.start()
    records = served.run(agent, [{}] * 60)
    restart.join()
    assert [record.reward for record in records] == [1.0] * 60
    assert {record.attempt for record in records} == {1}


def test_a_server_that_stays_away_ends_the_pool(served):
    job_id, _ = served.open_job([{}])
    pool = Pool("http://127.0.0.1:9", job_id, lambda resource, task: 1, 1, give_up_s=0.1, max_retries=1)
    with pytest.raises(Exception, match="cannot reach the server at http://127.0.0.1:9"):
        pool.run()


def test_work_that_is_taken_back_is_killed_and_the_worker_replaced(served, tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()

    def agent(resource, task):
        (folder / str(os.getpid())).touch()
        time.sleep(1000 if task.x else 0)
        return 1

    from lightning_jax.store import RolloutEntry

    job_id, rollout_ids = served.open_job([{"x": 1}])
    pool = Pool(served.url, job_id, agent, 1)
    thread = threading.Thread(target=pool.run)
    thread.start()
    wait_until(lambda: written_pids(folder))
    served.store.cancel_open(job_id)
    (pid,) = written_pids(folder)
    wait_until(lambda: not is_alive(pid))
    options = {"step": 2, "mode": "train", "timeout_s": 60.0, "max_attempts": 1, "metadata": {}, "seed": 0}
    entries = [RolloutEntry("next", 0, 0, 0, {"question": "", "x": 0})]
    later = served.store.open_rollouts(job_id, entries=entries, **options)
    with served.ending(job_id, later):
        thread.join(20)
    assert not thread.is_alive()
    assert served.store.finished(rollout_ids) == []
    assert [record.reward for record in served.store.finished(later)] == [1.0]


def test_status_counts_what_happened(served):
    seen = []
    job_id, rollout_ids = served.open_job([{"x": x} for x in range(6)], max_attempts=1)

    def agent(resource, task):
        if task.x == 0:
            os._exit(1)
        return [None, 1, 1, 1, 1, 1][task.x - 1]

    with served.ending(job_id, rollout_ids):
        Pool(served.url, job_id, agent, 2).run(seen.append)
    last = seen[-1]
    assert (last.job_status, last.succeeded, last.failed, last.crashed, last.timed_out) == ("succeeded", 4, 1, 1, 0)
    assert max(status.busy for status in seen) >= 1


def test_stop_from_another_thread(served, tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()

    def agent(resource, task):
        (folder / str(os.getpid())).touch()
        time.sleep(1000)

    job_id, _ = served.open_job([{}, {}])
    pool = Pool(served.url, job_id, agent, 2)
    thread = threading.Thread(target=pool.run)
    thread.start()
    wait_until(lambda: len(written_pids(folder)) == 2)
    pool.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert not any(map(is_alive, written_pids(folder)))
    pool.stop()  # as a signal handler may do that comes late


def test_a_pool_that_has_ended_keeps_no_connection_open(served):
    job_id, rollout_ids = served.open_job([{}])
    pool = Pool(served.url, job_id, lambda resource, task: 1.0, 1)
    with served.ending(job_id, rollout_ids):
        pool.run()
    wait_until(lambda: pool._transport._http.is_closed)
    assert pool._wake_in.fileno() == pool._wake_out.fileno() == -1
    assert pool._leases.failure is None
    pool.stop()


AGENT = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path({folder!r})
def agent(resource, task):
    child = subprocess.Popen(["sleep", "1000"])
    (folder / str(child.pid)).touch()
    (folder / str(os.getpid())).touch()
    if task.x:
        time.sleep(1000)
    {last}
    return 1
"""


@pytest.fixture
def pool_process(request, served, tmp_path):
    """A pool as a process of its own: one worker deep in a rollout, one idle after a rollout, each with a child."""
    folder = tmp_path / "pids"
    folder.mkdir()
    script = tmp_path / "agent.py"
    script.write_text(AGENT.format(folder=str(folder), last=getattr(request, "param", "")))
    job_id, rollout_ids = served.open_job([{"x": 1}, {"x": 0}])
    command = [sys.executable, "-m", "agent_lightning.pool", "--server-url", served.url, "--job-id", job_id]
    process = subprocess.Popen([*command, "--agent-script", str(script), "--nworkers", "2"], cwd=ROOT)
    wait_until(lambda: len(written_pids(folder)) == 4 and served.store.finished(rollout_ids[1:]))
    assert all(map(is_alive, written_pids(folder)))
    yield process, folder
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_a_pool_that_ends_leaves_nothing_behind(pool_process, how):
    process, folder = pool_process
    process.send_signal(how)
    process.wait(20)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 0, signal.SIGINT: 130}[how]
    wait_until(lambda: not any(map(is_alive, written_pids(folder))))


@pytest.mark.parametrize("pool_process", ["sys.stdout.close()", "sys.stdout = None"], indirect=True)
def test_an_agent_without_stdout_leaves_nothing_behind_either(pool_process):
    process, folder = pool_process
    process.kill()
    wait_until(lambda: not any(map(is_alive, written_pids(folder))))
