"""Rewards on the way: real workers, a real server, real SDKs, and a model that answers everything with a tool call."""

import asyncio
import contextlib
import contextvars
import functools
import inspect
import json
import math
import re
import textwrap
import threading
import time

import pytest

from agent_lightning.exceptions import InvalidConfigError
from agent_lightning.runtime import recorder

FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
USER = {"role": "user", "content": "2+2?"}


def converse(answer, turns, messages=None):
    """Asks with OpenAI's SDK `turns` times and answers every tool call with `answer(name)`; returns the messages."""
    import openai

    messages = [*(messages or []), USER]
    client = openai.OpenAI()
    for _ in range(turns):
        tools = [{"type": "function", "function": FUNCTION}]
        message = client.chat.completions.create(model="m", messages=messages, tools=tools).choices[0].message
        (call,) = message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": answer(call.function.name)}
        messages += [message.model_dump(exclude_none=True), result]
    return messages


def rewards_of(record):
    return [pytest.approx(call.reward) for call in record.calls]


def agent_without_instruments(resource, task):
    answers = iter(task.answers)
    converse(lambda name: next(answers), len(task.answers))
    return 1.0


ANSWERS = {"answers": ["4", "Error: no such number", "never sent"]}


def test_tool_results_in_requests_are_rewarded_by_the_references_values(serving_tools, runtime):
    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent_without_instruments, [ANSWERS], nworkers=1)
    assert record.reward == 1.0 and rewards_of(record) == [0.3, -0.2, 0.0]
    events = serving_tools.store.rollout_events(record.rollout_id)
    assert [(e["kind"], e["call_index"], e["reward"], e["tool_name"]) for e in events] == [
        ("reward", 0, 0.3, "add"),
        ("reward", 1, -0.2, "add"),
    ]


def test_evaluations_are_not_rewarded_and_nothing_is_unless_air_is_on(serving_tools, runtime):
    (record,) = serving_tools.run(agent_without_instruments, [ANSWERS], nworkers=1)
    assert rewards_of(record) == [0, 0, 0]
    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent_without_instruments, [ANSWERS], nworkers=1, mode="evaluate")
    assert rewards_of(record) == [0, 0, 0]


def test_the_environment_switches_it_on_and_set_config_wins(serving_tools, runtime, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ENABLE_AIR", "true")
    (record,) = serving_tools.run(agent_without_instruments, [ANSWERS], nworkers=1)
    assert rewards_of(record) == [0.3, -0.2, 0.0]
    runtime.set_config({"air_enabled": False})
    (record,) = serving_tools.run(agent_without_instruments, [ANSWERS], nworkers=1)
    assert rewards_of(record) == [0, 0, 0]
    runtime.set_config({"air_enabled": None})
    monkeypatch.setenv("LIGHTNING_ENABLE_AIR", "maybe")
    with pytest.raises(InvalidConfigError, match="LIGHTNING_ENABLE_AIR='maybe'"):
        serving_tools.run(agent_without_instruments, [ANSWERS], nworkers=1)


def test_handlers_as_printed_and_what_else_handlers_do(serving_tools, runtime):
    """They add up; None, exceptions, NaN and text are 0 and end nothing, and the fault is logged."""
    air, factor = runtime.air, 2.0
    runtime.set_config({"air_enabled": True})

    @air.on_tool_success
    def reward_tool_success(tool_name, output):
        assert tool_name == "add"
        return 0.3

    @air.on_tool_success
    def longer_is_better(tool_name, output):
        return factor * len(output)

    @air.on_tool_failure
    def nothing(tool_name, error):
        return None

    air.on_tool_success(lambda tool_name, output: 1 / 0)
    air.on_tool_success(lambda tool_name, output: math.nan)
    air.on_tool_success(lambda tool_name, output: "a lot")
    printed = []
    (record,) = serving_tools.run(
        agent_without_instruments, [ANSWERS], nworkers=1, pool={"on_output": lambda _, text: printed.append(text)}
    )
    assert rewards_of(record) == [2.3, 0.0, 0.0]
    text = "".join(printed)
    assert "raised ZeroDivisionError" in text and "returned nan" in text and "returned a str" in text
    rules = [event["rule"] for event in serving_tools.store.rollout_events(record.rollout_id)]
    assert rules == ["reward_tool_success", "longer_is_better"]


def test_a_handlers_fault_is_logged_once_whatever_its_words(runtime, caplog):
    results = iter([KeyError("a"), KeyError("b"), ValueError("c"), math.inf, 1e39, "much", "more", [1]])

    @runtime.air.on_tool_success
    def ever_another(tool_name, output):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    for _ in range(8):
        assert runtime.air.rewards("tool_success", "add", "2") == []
    said = [record.getMessage().partition(" (on_tool_success) ")[2].partition("\n")[0] for record in caplog.records]
    assert [text.removesuffix("; it gives no reward") for text in said] == [
        "raised KeyError: 'a'",
        "raised ValueError: c",
        "returned inf, not a finite number",
        "returned a str, not a number",
        "returned a list, not a number",
    ]


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.agent_lightning.test_air import converse
from agent_lightning.runtime import air, set_config

set_config({{"air_enabled": True}})

@air.on_tool_success
def reward_tool_success(tool_name, output):
    return 0.25

def run(resource, task):
    converse(lambda name: "4", 2)
    return 1.0
"""


def test_a_script_sets_its_own_and_its_handlers_are_not_taken_for_the_agent(serving_tools, runtime, tmp_path):
    """Also where the parent has imported the same script: its handler does not come twice."""
    from importlib import util

    path = tmp_path / "scripted_agent.py"
    path.write_text(SCRIPT.format(root=str(recorder.__file__).rpartition("/agent_lightning/runtime")[0]))
    (record,) = serving_tools.run(str(path), [{}], nworkers=1)
    assert rewards_of(record) == [0.25, 0.0]
    spec = util.spec_from_file_location("scripted_agent", path)
    spec.loader.exec_module(util.module_from_spec(spec))
    assert len(runtime.air.registered()["tool_success"]) == 1
    (record,) = serving_tools.run(str(path), [{}], nworkers=1)
    assert rewards_of(record) == [0.25, 0.0]


def test_anthropics_is_error(serving_tools, runtime):
    def agent(resource, task):
        import anthropic

        client, messages = anthropic.Anthropic(), [USER]
        tools = [{"name": "add", "input_schema": {"type": "object"}}]
        for is_error in (False, True, False):
            reply = client.messages.create(model="m", max_tokens=8, messages=messages, tools=tools)
            (use,) = [block for block in reply.content if block.type == "tool_use"]
            result = {"type": "tool_result", "tool_use_id": use.id, "content": "4", "is_error": is_error}
            blocks = [block.model_dump(exclude_none=True) for block in reply.content]
            messages += [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
        return 0.0

    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert rewards_of(record) == [0.3, -0.2, 0.0], record.traceback


def test_a_decorated_tool_is_rewarded_once_and_where_it_was_called(serving_tools, runtime):
    """Whether its result is sent (turns 1 and 2) or not (3); inside it another tool and code are rewarded as well."""
    from agent_lightning.runtime import run_code, tool

    @tool
    def fetch():
        return run_code("print('x')")

    @tool
    def add(a, b):
        if fetch().exit_code:
            raise AssertionError
        return a + b

    @tool(name="add")
    async def asynchronous(a, b):
        await asyncio.sleep(0)
        raise ValueError("cannot add")

    def answer(name):
        return str(add(1, b=2))

    def answer_badly(name):
        try:
            return asyncio.run(asynchronous(1, 2))
        except ValueError:
            return "sorry"  # that it failed shows in the exception, not in the text

    def agent(resource, task):
        converse(answer_badly if task.badly else answer, 3)
        return 1.0

    runtime.set_config({"air_enabled": True})
    good, bad = serving_tools.run(agent, [{"badly": False}, {"badly": True}], nworkers=1)
    assert rewards_of(good) == [0.3 + 0.3 + 0.5] * 3, good.traceback
    assert rewards_of(bad) == [-0.2] * 3
    names = [event["tool_name"] for event in serving_tools.store.rollout_events(good.rollout_id)]
    assert sorted(names) == ["add"] * 3 + ["fetch"] * 3 + ["run_code"] * 3


def test_the_tool_calls_id_says_which_call_made_it(serving_tools, runtime):
    """Two calls are made before either's tool runs: the first one's result is the first one's reward."""

    def agent(resource, task):
        import openai

        client, tools = openai.OpenAI(), [{"type": "function", "function": FUNCTION}]

        def ask(messages):
            return client.chat.completions.create(model="m", messages=messages, tools=tools).choices[0].message

        first = ask([USER])
        ask([{"role": "user", "content": "3+3?"}])
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "4"}
        ask([USER, first.model_dump(exclude_none=True), result])
        return 1.0

    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert rewards_of(record) == [0.3, 0.0, 0.0]


def test_without_an_id_it_is_the_last_call_that_had_ended_when_the_tool_began(serving_tools, runtime):
    """The tool itself asks the model, as a sub-agent does; what runs before any call earns nothing."""
    from agent_lightning.runtime import tool

    @tool
    def helper():
        import openai

        openai.OpenAI().chat.completions.create(model="m", messages=[USER])
        return "done"

    @tool
    def prepare():
        return "ready"

    def agent(resource, task):
        prepare()
        for _ in range(2):
            import openai

            openai.OpenAI().chat.completions.create(model="m", messages=[USER])
            helper()
        return 1.0

    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert rewards_of(record) == [0.3, 0.0, 0.3, 0.0], record.traceback


def test_examples_in_the_prompt_are_not_the_models_own_tool_calls(serving_tools, runtime):
    def agent(resource, task):
        call = {"id": "example", "type": "function", "function": {"name": "add", "arguments": "{}"}}
        example = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "example", "content": "4"},
        ]
        converse(lambda name: "4", 2, [USER, *example])
        return 1.0

    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert rewards_of(record) == [0.3, 0.0], record.traceback


def test_a_failed_rollout_has_no_rewards(serving_tools, runtime):
    def agent(resource, task):
        converse(lambda name: "4", 2)
        raise RuntimeError("lost")

    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent, [{}], nworkers=1)
    assert record.status == "failed" and rewards_of(record) == [0, 0]


# ---- without a server ----


def test_a_thread_with_its_rollouts_context_earns_nothing_in_the_next_one(serving_tools, runtime, tmp_path):
    def agent(resource, task):
        from agent_lightning.runtime import run_code, tool

        @tool
        def add():
            return 4

        def late():
            while not (tmp_path / "next rollout").exists():
                time.sleep(0.01)
            add()
            run_code("print(4)")

        if task.first:
            threading.Thread(target=contextvars.copy_context().run, args=(late,), name="late").start()
            return 1.0
        converse(lambda name: "4", 1)
        (tmp_path / "next rollout").touch()
        for thread in threading.enumerate():
            if thread.name == "late":
                thread.join()
        own = threading.Thread(target=add)  # without a context it is the rollout's in hand
        own.start()
        own.join()
        return 1.0

    runtime.set_config({"air_enabled": True})
    _, record = serving_tools.run(agent, [{"first": True}, {"first": False}], nworkers=1)
    assert rewards_of(record) == [0.3], serving_tools.store.rollout_events(record.rollout_id)


def test_a_task_in_a_loop_of_the_agents_own_serves_all_rollouts(serving_tools, runtime):
    """As a tool server in the background does, which has the context of the rollout that started it."""

    def agent(resource, task):
        import builtins

        from agent_lightning.runtime import tool

        @tool
        def add():
            return 4

        async def serve(asked, answered):
            while True:
                await asyncio.to_thread(asked.acquire)
                add()
                answered.release()

        if not hasattr(builtins, "background"):
            loop, semaphores = asyncio.new_event_loop(), (threading.Semaphore(0), threading.Semaphore(0))
            builtins.background = semaphores
            threading.Thread(target=loop.run_forever, daemon=True).start()
            asyncio.run_coroutine_threadsafe(serve(*semaphores), loop)
        asked, answered = builtins.background
        converse(lambda name: "4", 1)
        asked.release()
        answered.acquire(timeout=10)
        return 1.0

    runtime.set_config({"air_enabled": True})
    records = serving_tools.run(agent, [{}, {}], nworkers=1)
    assert [rewards_of(record) for record in records] == [[0.3]] * 2


def test_a_function_defined_again_takes_the_place_of_the_earlier_one(runtime):
    """A notebook's cell that runs twice; but functions made in a loop are different ones."""
    air = runtime.air
    for reward in (0.1, 0.2):
        exec(f"def rule(tool_name, output): return {reward}", namespace := {"__name__": "__main__"})
        air.on_tool_success(namespace["rule"])
    assert air.rewards("tool_success", "t", "") == [("rule", 0.2)]

    def make(reward):
        return lambda tool_name, output: reward

    for reward in (1.0, 2.0):
        air.on_tool_success(make(reward))
    assert [reward for _, reward in air.rewards("tool_success", "t", "")] == [0.2, 1.0, 2.0]
    assert air.rewards("tool_failure", "t", "") == []  # with any rule of one's own the default ones are gone


@pytest.mark.parametrize(
    "content, failed",
    [
        ("Error: ValueError('no')\n Please fix your mistakes.", True),  # LangGraph's ToolNode
        ("Error invoking tool 'add' with kwargs {} with error:\n x", True),
        ("An error occurred while running the tool. Please try again. Error: x", True),  # OpenAI Agents
        ("Traceback (most recent call last):\n  File", True),
        ('{"error": "not found"}', True),
        ('{"isError": true, "content": []}', True),
        ('{"error": null, "value": 4}', False),
        ("Errors are human", False),
        ("ERROR", True),
        ("Error - no such number", True),
        ("error_rate: 0.02", False),
        ("Error-free run, all 12 tests pass", False),
        ("4", False),
        ("", False),
        ("{broken", False),
        ('[{"error": 1}]', False),
    ],
)
def test_what_counts_as_a_failure(runtime, content, failed):
    assert runtime.air.is_failure(content) is failed


def test_matching_prefers_the_surest_pairs():
    def observed(name, call_index, text, nested=False):
        return recorder.Observation(name, call_index, nested, texts=(text,))

    def result(tool_call_id, name, content, call_index):
        return {"tool_call_id": tool_call_id, "name": name, "content": content, "call_index": call_index}

    first, second, other, inner = (
        observed("add", 1, "4"),
        observed("add", 1, "5"),
        observed("python_name", 1, "x"),
        observed("inner", 1, "y", nested=True),
    )
    results = [result("a", "add", "5", 0), result("b", "add", "4", 1), result("c", "wire_name", "z", 1)]
    pairs = recorder.match([inner, first, second, other], results)
    assert {o.name + o.texts[0]: r["tool_call_id"] for o, r in pairs.items()} == {
        "add4": "b",
        "add5": "a",
        "python_namex": "c",
    }


def test_matching_goes_by_the_name_before_it_goes_by_the_call_alone():
    def result(tool_call_id, name, call_index):
        return {"tool_call_id": tool_call_id, "name": name, "content": "wrapped", "call_index": call_index}

    search, python_name = (recorder.Observation(name, 1, False, texts=("x",)) for name in ("search", "python_name"))
    first, second = result("a", "wire_name", 1), result("b", "search", 0)
    assert recorder.match([search, python_name], [first, second]) == {search: second, python_name: first}


@pytest.mark.parametrize(
    "length, sent", [(1, "{}"), (30_000, "{}"), (1, "Result: {}")], ids=["short", "long", "wrapped"]
)
def test_a_tool_is_rewarded_once_where_another_call_ended_before_it_began(runtime, length, sent):
    """Two calls make a tool call each, a third one ends, and only then do the tools run; one of them twice."""
    from lightning_jax.server.rollout_calls import tool_results
    from lightning_jax.store import CallRecord

    ended = []

    def end_call(*messages, makes=()):
        made = [{"id": id, "type": "function", "function": {"name": "search", "arguments": "{}"}} for id in makes]
        reply = {"role": "assistant", "content": "", "tool_calls": made}
        ended.append(CallRecord([1], [2], [0.0], index=len(ended), messages=(USER, *messages), reply=reply))

    def ask(path):
        return tool_results(ended) if path == "/tool_calls" else {"last_call_index": ended[-1].index}

    @runtime.tool
    def search(what):
        return what * length

    with recorder.recording(recorder.Recorder(ask, rewarding=True)) as recording:
        end_call(makes=["a", "b"])
        end_call(makes=["c"])
        end_call()
        contents = {id: sent.format(search(id)) for id in ("c", "b", "a")}
        end_call(*({"role": "tool", "tool_call_id": id, "content": contents[id]} for id in ("a", "b", "c")))
        rewards = recording.finish(succeeded=True)
    assert sorted((event["call_index"], event["reward"]) for event in rewards) == [(0, 0.3), (0, 0.3), (1, 0.3)]


@pytest.mark.parametrize(
    "config, says",
    [
        ({"air_enable": True}, "did you mean 'air_enabled'"),
        ({"retries": 3}, "did you mean 'max_retries'"),
        ({"air_enabled": "yes"}, "air_enabled must be True or False"),
        ({"max_retries": True}, "max_retries must be a whole number"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0"),
        ({"timeout": math.inf}, "timeout must be"),
    ],
)
def test_set_config_says_what_is_wrong_and_sets_nothing(runtime, config, says):
    from agent_lightning.runtime.config import explicit

    with pytest.raises(InvalidConfigError, match=re.escape(says)):
        runtime.set_config({"timeout": 5} | {k: v for k, v in config.items()} if "timeout" not in config else config)
    assert explicit() == {}


def test_set_config_takes_a_dictionary(runtime):
    with pytest.raises(InvalidConfigError, match="set_config takes a dictionary, not None"):
        runtime.set_config(None)


def test_set_config_as_printed(runtime):
    from agent_lightning.runtime.config import explicit

    runtime.set_config({"air_enabled": True, "max_retries": 3, "timeout": 60})
    assert explicit() == {"air_enabled": True, "max_retries": 3, "timeout": 60}


# ---- run_code and @tool outside of a worker ----


def test_run_code(runtime, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    run_code = runtime.run_code
    assert run_code("import sys; print('ä'); print('e', file=sys.stderr)") == ("ä\ne\n", 0)
    result, exit_code = run_code("1/0")
    assert exit_code == 1 and "ZeroDivisionError" in result
    assert run_code("import sys; sys.exit(7)").exit_code == 7
    assert run_code("import os; print(os.environ.get('OPENAI_API_KEY'), os.listdir())").result == "None ['main.py']\n"
    assert run_code("import os; os.kill(os.getpid(), 9)").exit_code == -9
    assert run_code("print(input())").exit_code == 1  # no input to wait for
    flood = run_code("print('x' * 300_000 + 'end')")
    assert len(flood.result) == 100_000 and flood.result.endswith("xend\n")


def test_run_code_keeps_what_was_printed_before_the_end(runtime, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert runtime.run_code("print('begun')\nwhile True: pass", timeout=1.0) == ("begun\n", 124)
    assert runtime.run_code("import os; print('begun'); os.kill(os.getpid(), 9)") == ("begun\n", -9)


def test_run_code_ends_what_has_left_its_session_too(runtime):
    from tests.agent_lightning.conftest import is_alive, wait_until  # not for the workers, which import this file

    code = """
        import subprocess, time
        print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
        time.sleep(60)
    """
    result, exit_code = runtime.run_code(textwrap.dedent(code), timeout=2.0)
    assert exit_code == 124
    wait_until(lambda: not is_alive(int(result)))


def test_run_code_ends_what_does_not_end(runtime):
    code = "import subprocess\nprint('begun', flush=True)\nsubprocess.run(['sleep', '1000'])"
    assert runtime.run_code(code, timeout=1.0) == ("begun\n", 124)


def test_a_tool_stays_the_function_it_is(runtime):
    @runtime.tool
    def add(a: int, b: int = 2) -> int:
        """Adds."""
        return a + b

    assert add(1) == 3 and add.__name__ == "add" and add.__doc__ == "Adds."
    assert list(inspect.signature(add).parameters) == ["a", "b"]
    assert json.dumps(add(1, b=1)) == "2"


@contextlib.contextmanager
def rewards_by_tool():
    """(tool, reward) of what is used in the block, in a rollout whose model has been called once; full at its end."""
    rewards = []
    with recorder.recording(recorder.Recorder(lambda path: {"last_call_index": 0}, rewarding=True)) as recording:
        yield rewards
        rewards += [(event["tool_name"], event["reward"]) for event in recording.finish(succeeded=True)]


def test_a_generator_is_judged_by_how_it_ends(runtime):
    """Whether one by one or all at once; what its caller breaks off has given what was wanted."""

    @runtime.tool
    def count(last):
        for i in range(5):
            if i == last:
                raise ValueError("late")
            yield i

    @runtime.tool(name="acount")
    async def count_async(last):
        for i in range(5):
            if i == last:
                raise ValueError("late")
            await asyncio.sleep(0)
            yield i

    outputs = []
    runtime.air.on_tool_success(lambda tool_name, output: outputs.append(output) or 0.3)
    runtime.air.on_tool_failure(lambda tool_name, error: -0.2)

    async def use_async():
        assert [i async for i in count_async(9)] == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="late"):
            async for _ in count_async(2):
                pass
        async for _ in count_async(2):
            break
        await asyncio.sleep(0.01)  # the loop closes it, in a task of its own

    with rewards_by_tool() as rewards:
        assert list(count(9)) == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="late"):
            list(count(2))
        assert next(count(2)) == 0
        asyncio.run(use_async())
    assert rewards == [(name, reward) for name in ("count", "acount") for reward in (0.3, -0.2, 0.3)]
    assert outputs == [[0, 1, 2, 3, 4], [0]] * 2
    assert inspect.isgeneratorfunction(count) and inspect.isasyncgenfunction(count_async)


def test_an_async_generator_that_is_broken_off_last_is_a_success_too(runtime):
    """The loop closes it in a task of its own, which is cancelled when the agent has returned."""

    @runtime.tool
    async def count():
        for i in range(5):
            await asyncio.sleep(0)
            yield i

    @runtime.tool
    async def give_up():
        yield 0
        raise asyncio.CancelledError

    async def returns():
        async for _ in count():
            return

    async def takes_one():
        await anext(count())

    async def is_cancelled():
        async for _ in give_up():
            pass

    with rewards_by_tool() as rewards:
        asyncio.run(returns())
        asyncio.run(takes_one())
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(is_cancelled())
    assert rewards == [("count", 0.3), ("count", 0.3)]


async def agent_that_breaks_off_its_tool(resource, task):
    from agent_lightning.runtime import tool

    @tool
    async def add():
        yield 4
        yield 5

    converse(lambda name: "4", 1)
    async for _ in add():
        return 1.0


def test_a_worker_hears_of_an_async_generator_that_is_broken_off_last(serving_tools, runtime):
    runtime.set_config({"air_enabled": True})
    (record,) = serving_tools.run(agent_that_breaks_off_its_tool, [{"question": "2+2?"}], nworkers=1)
    assert rewards_of(record) == [0.3]


def test_a_generator_can_be_sent_to_and_thrown_into_and_returns(runtime):
    def echo():
        """Gives what it gets, an error too, until it gets nothing."""
        got = yield "begun"
        while got:
            try:
                got = yield got
            except ValueError as error:
                got = str(error)
        return "returned"

    async def echo_async():
        got = yield "begun"
        while got:
            try:
                got = yield got
            except ValueError as error:
                got = str(error)

    def use(generator):
        assert (next(generator), generator.send("a"), generator.throw(ValueError("b"))) == ("begun", "a", "b")
        return (yield from generator)

    async def use_async(generator):
        assert (await anext(generator), await generator.asend("a")) == ("begun", "a")
        assert await generator.athrow(ValueError("b")) == "b"
        with pytest.raises(StopAsyncIteration):
            await anext(generator)

    outputs = []
    runtime.air.on_tool_success(lambda tool_name, output: outputs.append(output) or 0.3)
    runtime.air.on_tool_failure(lambda tool_name, error: -0.2)
    with rewards_by_tool() as rewards:
        with pytest.raises(StopIteration) as end:
            next(use(runtime.tool(echo)()))
        asyncio.run(use_async(runtime.tool(echo_async)()))
        thrown_into = runtime.tool(echo)()
        next(thrown_into)
        with pytest.raises(KeyError):
            thrown_into.throw(KeyError("c"))
    assert end.value.value == "returned"
    assert rewards == [("echo", 0.3), ("echo_async", 0.3), ("echo", -0.2)]
    assert outputs == [["begun", "a", "b"]] * 2


def test_between_a_generators_items_its_caller_is_not_inside_of_it(runtime):
    @runtime.tool
    def count():
        yield inside_tool()
        yield inside_tool()

    def inside_tool():
        return recorder.Recorder(lambda path: {}, rewarding=True).begin("other").nested

    first, second = count(), count()
    assert [(next(first), inside_tool(), next(second), inside_tool()) for _ in range(2)] == [(True, False) * 2] * 2
    first.close()
    second.close()
    assert not inside_tool()


def test_a_partial_and_a_callable_object_are_tools_too(runtime):
    def add(a, b):
        return a + b

    class Search:
        async def __call__(self, what):
            raise ValueError(what)

    class Double:
        def __call__(self, a):
            return 2 * a

    search, add_one = runtime.tool(Search()), runtime.tool(functools.partial(functools.partial(add), 1))
    with rewards_by_tool() as rewards:
        assert add_one(2) == 3 and runtime.tool(Double())(2) == 4
        with pytest.raises(ValueError, match="x"):
            asyncio.run(search("x"))
    assert rewards == [("add", 0.3), ("Double", 0.3), ("Search", -0.2)]
    assert (add_one.__name__, search.__name__) == ("add", "Search") and inspect.iscoroutinefunction(search)
    assert list(inspect.signature(add_one).parameters) == ["b"]
