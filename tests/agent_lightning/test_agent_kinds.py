"""Callables of every kind are agents, also those that a script or a notebook defines itself."""

import asyncio
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent_lightning import Pool, TrainingError

ROOT = Path(__file__).resolve().parents[2]


class Agent:
    def __init__(self, bonus):
        self.bonus = bonus

    def run(self, resource, task):
        return len(task.question) + self.bonus

    async def run_async(self, resource, task):
        await asyncio.sleep(0)
        return self.run(resource, task)

    __call__ = run

    @classmethod
    def of_class(cls, resource, task):
        return cls(0.5).run(resource, task)


def with_options(resource, task, *, bonus=0.0):
    return len(task.question) + bonus


AGENTS = {
    "async method": Agent(0.5).run_async,
    "object": Agent(0.5),
    "class method": Agent.of_class,
    "partial": functools.partial(with_options, bonus=0.5),
}


@pytest.mark.parametrize("kind", AGENTS)
def test_an_agent_may_be_a(served, kind):
    (record,) = served.run(AGENTS[kind], [{"question": "four"}], nworkers=1)
    assert (record.status, record.reward) == ("succeeded", 4.5), record.error


FROM_MAIN = """
import sys
from agent_lightning import Pool

FACTOR = 0.5

class Helper:
    def bonus(self):
        return FACTOR

def agent(resource, task):
    return len(task.question) + Helper().bonus()

if __name__ == "__main__":
    print(Pool(sys.argv[1], sys.argv[2], agent, 1).run())
"""

# As a notebook's kernel runs cells: __main__ has no file, and a cell's source is known to `linecache` alone.
FROM_NOTEBOOK = """
import sys
sys.path.insert(0, sys.argv[3])
import code, __main__
del __main__.__file__
shell = code.InteractiveConsole(vars(__main__))
for cell in (
    "from agent_lightning import Pool",
    "def helper(text):\\n    return len(text) + 0.5\\n",
    "async def agent(resource, task):\\n    return helper(task.question)\\n",
    "print(Pool(sys.argv[1], sys.argv[2], agent, 1).run())",
):
    assert not shell.runsource(cell, "<cell>", "exec")
"""


@pytest.mark.parametrize("source", [FROM_MAIN, FROM_NOTEBOOK], ids=["script", "notebook"])
def test_an_agent_may_be_defined_in_main(served, source, tmp_path):
    (record,) = run_as_main(served, source, [{"question": "four"}], tmp_path)
    assert (record.status, record.reward) == ("succeeded", 4.5), record.error


def run_as_main(served, source, tasks, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(source)
    job_id, rollout_ids = served.open_job(tasks)
    command = [sys.executable, str(script), served.url, job_id, str(ROOT)]
    with served.ending(job_id, rollout_ids):
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
    assert done.stdout == "succeeded\n", done.stderr
    return served.store.finished(rollout_ids)


# Each of these works where the script itself calls the agent, as long as names lead where they lead there.
LIKE_RUN_DIRECTLY = """
import multiprocessing, pickle, sys, threading, typing
from dataclasses import dataclass
from agent_lightning import Pool

time = threading.Lock()  # not sent, and named as a module that the worker itself needs
Answers = typing.Optional["Answer"]

@dataclass
class Part:
    x: int

@dataclass
class Answer:
    part: Part

class Base:
    pass

def twice(x):
    return 2 * x

def annotated(resource, task):
    def tool(answer: Answer, more: Answers = None) -> None: ...
    return typing.get_type_hints(tool)["answer"] is Answer

def annotated_class(resource, task):
    return typing.get_type_hints(Answer)["part"] is Part

def class_body(resource, task):
    class Mine(Base):
        kept = Part
    return Mine.kept(1) == Part(1)

def other_process(resource, task):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(twice, [1]) == [2]

def pickled(resource, task):
    return pickle.loads(pickle.dumps(Answer(Part(1)))) == Answer(Part(1))

signal = None  # as above

def file(resource, task):
    global signal
    signal = "mine"
    return __file__.endswith("script.py")

def agent(resource, task):
    return float(AGENTS[task.question](resource, task))

AGENTS = {f.__name__: f for f in (annotated, annotated_class, class_body, other_process, pickled, file)}

if __name__ == "__main__":
    print(Pool(sys.argv[1], sys.argv[2], agent, 1).run())
"""


@pytest.mark.parametrize("first_line", ["", "from __future__ import annotations"], ids=["", "annotations"])
def test_names_of_main_are_found_in_a_worker_as_in_main(served, first_line, tmp_path):
    kinds = ["annotated", "annotated_class", "class_body", "other_process", "pickled", "file"]
    records = run_as_main(served, first_line + LIKE_RUN_DIRECTLY, [{"question": kind} for kind in kinds], tmp_path)
    assert [(kind, record.reward, record.error) for kind, record in zip(kinds, records, strict=True)] == [
        (kind, 1.0, None) for kind in kinds
    ]


CACHED = """
import functools, sys, typing
from agent_lightning import Pool

Length = typing.NewType("Length", int)
P = typing.ParamSpec("P")

@functools.lru_cache(maxsize=None)
def sum_to(n):
    return n and n + sum_to(n - 1)

class Text:
    def __init__(self, text):
        self.text = text

    @functools.cached_property
    def length(self) -> Length:
        return Length(len(self.text))

    @functools.cache
    def longer(self, by):
        return self.length + by

def same(function: typing.Callable[P, int]) -> typing.Callable[P, int]:
    return function

@functools.lru_cache
def bonus():
    return 0.5

def agent(resource, task):
    text = Text(task.question)
    assert text.length is text.length and vars(text)["length"] == 4
    assert text.longer(1) == 5 and sum_to(4) == 10 and same(len)("four") == 4
    assert Length.__supertype__ is int and Length.__module__ == "__main__"
    bonus()
    return Length(4) + bonus() * bonus.cache_info().hits

if __name__ == "__main__":
    print(Pool(sys.argv[1], sys.argv[2], agent, 1).run())
"""


def test_caches_and_new_types_of_main(served, tmp_path):
    (record,) = run_as_main(served, CACHED, [{"question": "four"}], tmp_path)
    assert (record.status, record.reward) == ("succeeded", 4.5), record.traceback


SHARED_WITH_HANDLER = """
import sys
from agent_lightning import Pool
from agent_lightning.runtime import air, set_config, tool

set_config({"air_enabled": True})
gold = None

@air.on_tool_success
def is_gold(tool_name, output):
    return 0.25 if output == gold else 0.0

@tool
def look_up(text):
    return text

def agent(resource, task):
    import urllib.request
    global gold
    gold = task.question
    body = b'{"messages": [{"role": "user", "content": "1+1"}], "max_tokens": 2}'
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(resource.model_api + "/v1/chat/completions", body, headers)).read()
    look_up(task.question)
    return 0.0

if __name__ == "__main__":
    print(Pool(sys.argv[1], sys.argv[2], agent, 1).run())
"""


def test_airs_handlers_share_their_globals_with_the_agent(served, tmp_path):
    records = run_as_main(served, SHARED_WITH_HANDLER, [{"question": "four"}, {"question": "five"}], tmp_path)
    assert [[call.reward for call in record.calls] for record in records] == [[0.25], [0.25]]


def test_a_partial_of_a_function_that_workers_cannot_import(served, tmp_path):
    (tmp_path / "away_from_workers.py").write_text(
        "def helper(x): return x + 0.5\ndef agent(resource, task, k): return helper(k)\n"
    )
    sys.path.insert(0, str(tmp_path))
    import away_from_workers

    sys.path.remove(str(tmp_path))
    (record,) = served.run(functools.partial(away_from_workers.agent, k=4), [{"question": "four"}], nworkers=1)
    assert (record.status, record.reward) == ("succeeded", 4.5), record.error


def test_a_cached_helper_of_a_module_that_workers_cannot_import(served, tmp_path):
    (tmp_path / "cached_away_from_workers.py").write_text(
        "import functools\n"
        "@functools.cache\ndef helper(x): return x + 0.5\n"
        "def solve(resource, task): return helper(4)\n"
    )
    sys.path.insert(0, str(tmp_path))
    import cached_away_from_workers

    sys.path.remove(str(tmp_path))
    (record,) = served.run(cached_away_from_workers.solve, [{"question": "four"}], nworkers=1)
    assert (record.status, record.reward) == ("succeeded", 4.5), record.error


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("import no_such_package_of_mine\n", "ModuleNotFoundError: No module named 'no_such_package_of_mine'"),
        ("def agent(resource, task):\n    return 1 +\n", "SyntaxError: invalid syntax"),
    ],
)
def test_a_script_that_cannot_be_loaded_shows_its_own_lines_alone(tmp_path, text, last):
    script = tmp_path / "broken.py"
    script.write_text(text)
    pool = Pool("http://127.0.0.1:9", "no-job", str(script), 1, max_retries=0)
    with pytest.raises(TrainingError) as caught:
        pool.run()
    shown = str(caught.value)
    assert re.findall(r'File "(.*?)"', shown) == [str(script)]
    assert shown.strip().endswith(last)
