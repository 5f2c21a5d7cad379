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
    script = tmp_path / "script.py"
    script.write_text(source)
    job_id, rollout_ids = served.open_job([{"question": "four"}])
    command = [sys.executable, str(script), served.url, job_id, str(ROOT)]
    with served.ending(job_id, rollout_ids):
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
    assert done.stdout == "succeeded\n", done.stderr
    (record,) = served.store.finished(rollout_ids)
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
