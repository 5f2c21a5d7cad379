"""What becomes of a rollout, whatever the agent does: real worker processes, the real store and HTTP app."""

import asyncio
import atexit
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import types

import pytest

from tests.agent_lightning.conftest import ask, is_alive, wait_until, written_pids


class Multiplier:
    def __init__(self, factor):
        self.factor = factor

    def solve(self, resource, task):
        return task.x * self.factor


async def asynchronous(resource, task):
    await asyncio.sleep(0.01)
    return task.x * 3


def closure(factor):
    def agent(resource, task):
        return task.x * factor

    return agent


@pytest.mark.parametrize(
    "agent",
    [closure(3), lambda resource, task: task["x"] * 3, Multiplier(3).solve, asynchronous],
    ids=["closure", "lambda", "method", "async"],
)
def test_rewards_come_back(served, agent):
    records = served.run(agent, [{"x": x} for x in range(9)])
    assert [record.reward for record in records] == [3.0 * x for x in range(9)]
    assert {record.status for record in records} == {"succeeded"}


def test_what_the_agent_is_given(served, policies):
    def agent(resource, task):
        assert task == {"question": "", "x": 1}
        assert resource.model_name == "builtin:tiny"
        assert resource.task_id == "task-0"
        assert resource.worker_id == 0
        assert resource.metadata["colour"] == "red"
        ours = {"mode": "train", "rollout_id": resource.metadata["rollout_id"], "attempt": 1, "step": 1}
        assert resource.metadata == {"colour": "red", "policy_version": version} | ours
        assert isinstance(resource.metadata["rollout_id"], int)
        base, _, token = resource.model_api.rpartition("/rollout/")
        assert base == url and token
        assert os.environ["OPENAI_BASE_URL"] == resource.model_api + "/v1"
        assert os.environ["ANTHROPIC_BASE_URL"] == resource.model_api
        assert os.environ["OPENAI_API_KEY"] == os.environ["ANTHROPIC_API_KEY"] == token
        assert os.environ.get("PYTHONPATH") == pythonpath
        return 1

    url, pythonpath, version = served.url, os.environ.get("PYTHONPATH"), policies.first.version
    (record,) = served.run(agent, [{"x": 1}], nworkers=1)
    assert record.reward == 1.0, record.traceback


def test_an_exception_fails_the_rollout_at_once_with_its_traceback(served):
    def agent(resource, task):
        raise LookupError("not in the book")

    (record,) = served.run(agent, [{}], max_attempts=3)
    assert (record.status, record.cause, record.attempt) == ("failed", "exception", 1)
    assert record.error == "LookupError: not in the book"
    assert 'raise LookupError("not in the book")' in record.traceback
    assert "agent_lightning/worker.py" not in record.traceback


def test_an_error_with_half_a_surrogate_pair_is_one_rollouts(served):
    def agent(resource, task):
        if task.x:
            raise OSError("no file " + b"caf\xe9".decode("utf-8", "surrogateescape"))
        return 1

    records = served.run(agent, [{"x": 0}, {"x": 1}, {"x": 0}])
    assert [record.reward for record in records] == [1.0, None, 1.0]
    assert records[1].error == "OSError: no file caf?"


def test_leaving_the_process_politely_is_an_exception_too(served):
    record, after = served.run(
        lambda resource, task: sys.exit("bye") if task.x else 1, [{"x": 1}, {"x": 0}], nworkers=1
    )
    assert (record.cause, record.error) == ("exception", "SystemExit: bye")
    assert after.reward == 1.0


@pytest.mark.parametrize("leave", [SystemExit, KeyboardInterrupt])
def test_leaving_in_a_task_of_an_async_agent_is_its_rollouts_alone(served, leave):
    async def agent(resource, task):
        async def step():
            await asyncio.sleep(0)
            raise leave("bye")

        others = len(asyncio.all_tasks()) - 1
        if task.x:
            await asyncio.wait_for(step(), 60)
        await asyncio.sleep(0.05)
        return others

    record, *after = served.run(agent, [{"x": 1}, {"x": 0}, {"x": 0}], nworkers=1, timeout_s=10.0)
    assert (record.cause, record.error) == ("exception", f"{leave.__name__}: bye")
    assert [(record.reward, record.error) for record in after] == [(0.0, None)] * 2


def test_an_error_after_very_many_others_keeps_its_message(served):
    def agent(resource, task):
        last = None
        for i in range(1500):
            try:
                raise ValueError(f"try {i}") from last
            except ValueError as error:
                last = error
        raise RuntimeError("the real cause") from last

    (record,) = served.run(agent, [{}], nworkers=1)
    assert record.error == "RuntimeError: the real cause"
    assert record.traceback.endswith("RuntimeError: the real cause\n")


@pytest.mark.parametrize(
    "value, says",
    [
        (None, "returned None"),
        (math.nan, "returned nan"),
        (-math.inf, "returned -inf"),
        (1e39, "returned 1e+39; return a finite number of at most 3.4e+38"),
        (10**400, "returned inf"),
        ("0.5", "text '0.5'"),
        ([1.0], "returned a list"),
    ],
)
def test_no_finite_number_is_a_failed_rollout_not_a_zero(served, value, says):
    (record,) = served.run(lambda resource, task: value, [{}], nworkers=1, max_attempts=3)
    assert (record.status, record.cause, record.reward, record.attempt) == ("failed", "invalid_reward", None, 1)
    assert says in record.error


def test_numbers_of_other_kinds_are_rewards(served):
    def agent(resource, task):
        import fractions

        import numpy as np

        return [True, 2, np.float32(0.5), np.array([4.0])[0], fractions.Fraction(1, 4)][task.x]

    records = served.run(agent, [{"x": x} for x in range(5)])
    assert [record.reward for record in records] == [1.0, 2.0, 0.5, 4.0, 0.25]


def test_an_agent_that_never_returns_is_killed_with_all_it_started(served, tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()

    def agent(resource, task):
        if task.x == 0:
            for apart in (False, True):  # one child in the worker's group, one that left it
                child = subprocess.Popen(["sleep", "1000"], start_new_session=apart)
                (folder / str(child.pid)).touch()
            (folder / str(os.getpid())).touch()
            time.sleep(1000)
        return 1

    stuck, fine = served.run(agent, [{"x": 0}, {"x": 1}], nworkers=1, timeout_s=1.0)
    assert (stuck.status, stuck.cause) == ("failed", "timeout")
    assert "did not return within 1 s" in stuck.error
    assert "time.sleep(1000)" in stuck.traceback or "in agent" in stuck.traceback  # where it hung
    assert fine.reward == 1.0
    assert len(written_pids(folder)) == 3
    wait_until(lambda: not any(map(is_alive, written_pids(folder))))


def test_a_worker_that_leaves_takes_with_it_what_the_agent_left_running(served, tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()

    def agent(resource, task):
        for apart in (False, True):
            child = subprocess.Popen(["sleep", "1000"], start_new_session=apart)
            (folder / str(child.pid)).touch()
        return 1

    (record,) = served.run(agent, [{}], nworkers=1)
    assert record.reward == 1.0 and len(written_pids(folder)) == 2
    wait_until(lambda: not any(map(is_alive, written_pids(folder))))


@pytest.mark.parametrize("hang", [False, True], ids=["segfault", "time-out"])
def test_the_first_failure_names_the_agents_line_that_hung_or_crashed(served, hang):
    from lightning_jax.outcomes import first_failure

    def agent(resource, task):
        try:
            raise LookupError
        except LookupError:
            traceback.print_exc()

        def inner():
            if hang:
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGSEGV)

        inner()

    line = agent.__code__.co_firstlineno + (8 if hang else 9)
    (record,) = served.run(agent, [{}], nworkers=1, timeout_s=1.0)
    assert record.cause == ("timeout" if hang else "crash")
    assert first_failure([record]).endswith(f"({__file__}, line {line}, in inner)"), record.traceback


def test_the_first_failure_names_the_innermost_line_of_a_deep_stack(served):
    from lightning_jax.outcomes import first_failure

    def agent(resource, task):
        def dive(depth):
            if depth:
                dive(depth - 1)
            os.kill(os.getpid(), signal.SIGSEGV)

        dive(90)

    (record,) = served.run(agent, [{}], nworkers=1)
    line = agent.__code__.co_firstlineno + 4
    assert first_failure([record]).endswith(f"({__file__}, line {line}, in dive)"), record.traceback


def test_a_timeout_is_tried_again(served):
    def agent(resource, task):
        if resource.metadata["attempt"] == 1:
            while True:
                pass
        return 1

    (record,) = served.run(agent, [{}], nworkers=1, timeout_s=1.0, max_attempts=2)
    assert (record.status, record.reward, record.attempt) == ("succeeded", 1.0, 2)


@pytest.mark.parametrize(
    "die, says",
    [
        (lambda: os._exit(3), "exited with status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
        (lambda: os.closerange(3, 1024) or time.sleep(1000), "killed by SIGKILL"),
    ],
    ids=["exit", "segfault", "closes-all-files"],
)
def test_a_crash_is_reported_and_tried_again(served, die, says):
    def agent(resource, task):
        if task.x or resource.metadata["attempt"] == 1:
            print("the last words")
            die()
        return 1

    again, never = served.run(agent, [{"x": 0}, {"x": 1}], max_attempts=2)
    assert (again.status, again.reward, again.attempt) == ("succeeded", 1.0, 2)
    assert (never.status, never.cause, never.attempt) == ("failed", "crash", 2)
    assert says in never.error
    assert "the last words" in never.traceback


def test_what_agents_print_and_read_leaves_the_protocol_alone(served):
    printed = []

    def agent(resource, task):
        print("to stdout", task.x)
        print("to stderr", file=sys.stderr)
        os.write(1, b"to descriptor 1\n")
        subprocess.run(["echo", "from a child"], check=True)
        print("x" * 300_000)
        print("half a pair \ud83d")
        return len(sys.stdin.read())

    records = served.run(agent, [{"x": x} for x in range(4)], pool={"on_output": lambda *line: printed.append(line)})
    assert [record.reward for record in records] == [0.0] * 4
    text = "".join(text for _, text in printed)
    for line in ["to stdout 0", "to stdout 3", "to stderr", "to descriptor 1", "from a child", r"half a pair \ud83d"]:
        assert line in text
    assert text.count("x" * 300_000) == 4
    assert {worker_id for worker_id, _ in printed} <= {0, 1}


def test_what_is_printed_without_a_line_break_is_shown_and_stays_with_its_rollout(served):
    printed = []

    def agent(resource, task):
        if task.x == 0:
            atexit.register(lambda: print("at exit", "the end", sep="\n", end=""))
        print(f"<{task.x}>", end="", flush=True)
        return 1 if task.x < 2 else time.sleep(1000)

    options = {"nworkers": 1, "pool": {"on_output": lambda _, text: printed.append(text)}}
    assert [record.reward for record in served.run(agent, [{"x": 0}, {"x": 1}], **options)] == [1.0, 1.0]
    assert printed[:2] == ["<0>", "<1>"] and "".join(printed[2:]) == "at exit\nthe end"
    _, late = served.run(agent, [{"x": 1}, {"x": 2}], timeout_s=1.0, **options)
    assert late.traceback.startswith("<2>")


def test_a_line_without_an_end_comes_in_pieces(served):
    printed = []

    def agent(resource, task):
        print("y" * 5_000_000, end="", flush=True)
        return 1

    served.run(agent, [{}], nworkers=1, pool={"on_output": lambda _, text: printed.append(text)})
    assert sum(map(len, printed)) == 5_000_000 and max(map(len, printed)) < 2_500_000


def test_large_tasks_arrive_whole(served):
    records = served.run(lambda resource, task: len(task.text), [{"text": "ü" * 2_000_000}] * 3)
    assert [record.reward for record in records] == [2e6] * 3


def test_a_forked_child_that_comes_back_reports_nothing(served):
    def agent(resource, task):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return 1
        return 2

    records = served.run(agent, [{}] * 4)
    assert [record.reward for record in records] == [1.0] * 4


def test_workers_stay_warm_and_run_side_by_side(served, tmp_path):
    """Twelve rollouts in three processes: each waits until the other two are at work as well."""
    folder = tmp_path / "pids"
    folder.mkdir()

    def agent(resource, task):
        (folder / str(os.getpid())).touch()
        while len(os.listdir(folder)) < 3:
            time.sleep(0.01)
        return resource.worker_id

    records = served.run(agent, [{}] * 12, nworkers=3)
    assert {record.reward for record in records} <= {0.0, 1.0, 2.0}
    assert len(written_pids(folder)) == 3


def test_async_agents_keep_their_event_loop_but_not_their_leftover_tasks(served):
    async def agent(resource, task):
        import builtins

        loop = asyncio.get_running_loop()
        earlier = getattr(builtins, "loop_of_the_agent", loop)
        builtins.loop_of_the_agent = loop
        running = len(asyncio.all_tasks())
        loop.create_task(asyncio.sleep(1000))
        return 1 if earlier is loop and running == 1 else 0

    records = served.run(agent, [{}] * 3, nworkers=1)
    assert [record.reward for record in records] == [1.0] * 3


def test_threads_of_an_async_agent_end_before_its_rollout_does(served, tmp_path):
    """As `asyncio.run` has it, with a loop that still serves them. What they ask the model is not the next one's."""

    async def agent(resource, task):
        loop = asyncio.get_running_loop()

        def late():
            time.sleep(0.3)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)
            ask(types.SimpleNamespace(model_api=os.environ["ANTHROPIC_BASE_URL"]), task)
            (tmp_path / "asked").touch()

        if task.x == 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(late), 0.1)
        else:
            await asyncio.to_thread(wait_until, (tmp_path / "asked").exists)
        return 1

    records = served.run(agent, [{"x": 0, "ground_truth": ""}, {"x": 1}], nworkers=1)
    assert [(record.reward, len(record.calls)) for record in records] == [(1.0, 1), (1.0, 0)]


def test_an_exit_of_an_async_agents_own_keeps_its_loop_and_its_executor(served):
    async def agent(resource, task):
        import builtins
        from concurrent.futures import ThreadPoolExecutor

        loop = asyncio.get_running_loop()
        if not hasattr(builtins, "loop_that_stays"):
            builtins.loop_that_stays = loop
            loop.set_default_executor(ThreadPoolExecutor(1, "own"))
        if task.x:
            sys.exit(1)
        name = await asyncio.to_thread(lambda: threading.current_thread().name)
        return int(builtins.loop_that_stays is loop and name.startswith("own"))

    records = served.run(agent, [{"x": 0}, {"x": 1}, {"x": 0}, {"x": 0}], nworkers=1)
    assert [record.reward for record in records] == [1.0, None, 1.0, 1.0]


def test_a_thread_that_never_ends_is_not_waited_for_long(served):
    """And takes no thread of the next rollout's."""

    async def agent(resource, task):
        from agent_lightning import worker

        worker.THREADS_GRACE_S = 0.2
        if task.x:
            return await asyncio.to_thread(lambda: 1)
        with contextlib.suppress(TimeoutError):
            calls = [asyncio.to_thread(threading.Event().wait) for _ in range(40)]
            await asyncio.wait_for(asyncio.gather(*calls), 0.1)
        return 1

    records = served.run(agent, [{"x": 0}, {"x": 1}], nworkers=1, timeout_s=20.0)
    assert [record.reward for record in records] == [1.0, 1.0]


def test_a_script_is_an_agent(served, tmp_path):
    path = tmp_path / "my_script.py"
    path.write_text("def helper(a): return a\ndef run(resource, task): return task.x\ndef other(r, t): return -1\n")
    records = served.run(f"{path}:run", [{"x": x} for x in range(3)])
    assert [record.reward for record in records] == [0.0, 1.0, 2.0]
