"""How agents are named, found and sent."""

import asyncio
import functools
import inspect
import json
import os
import subprocess
import sys
import textwrap
import threading
import traceback

import pytest

from agent_lightning import InvalidConfigError
from agent_lightning.agent_source import load_script, pack_agent, split_script, unpack_agent


def script(tmp_path, text, name="my_script.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return str(path)


@pytest.fixture(autouse=True)
def imports_of_scripts_are_undone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["agent_func", "my_agent", "agent"])
def test_usual_names_win_over_other_two_parameter_functions(tmp_path, name):
    path = script(tmp_path, f"def helper(a, b): return 1\ndef {name}(resource, task): return 2\n")
    assert load_script(path, None)(None, None) == 2


def test_the_usual_names_have_an_order(tmp_path):
    path = script(tmp_path, "def agent(r, t): return 3\ndef my_agent(r, t): return 2\ndef agent_func(r, t): return 1\n")
    assert load_script(path, None)(None, None) == 1


def test_else_the_only_function_with_two_parameters(tmp_path):
    path = script(
        tmp_path,
        """
        from os.path import join, commonprefix
        from shutil import copyfileobj
        def helper(a): return 0
        def three(a, b, c): return 0
        async def solve(resource, task): return 1
        """,
    )
    assert load_script(path, None).__name__ == "solve"


def test_else_an_error_lists_what_was_found(tmp_path):
    path = script(tmp_path, "def one(a, b): pass\ndef two(a, b): pass\n")
    with pytest.raises(InvalidConfigError, match=r"found: one\(a, b\), two\(a, b\)"):
        load_script(path, None)
    with pytest.raises(InvalidConfigError, match=r"no function 'three'; found: one"):
        load_script(path, "three")
    assert load_script(path, "two").__name__ == "two"


@pytest.mark.parametrize(
    "text",
    [
        "async def solve(resource, task): return 1",
        "solve = lambda resource, task: 1",
        """
        import functools
        def logged(function):
            @functools.wraps(function)
            def call(*args, **kwargs): return function(*args, **kwargs)
            return call
        @logged
        def solve(resource, task): return 1
        """,
        """
        import functools
        @functools.lru_cache
        def solve(resource, task): return 1
        """,
        """
        class Solver:
            def __call__(self, resource, task): return 1
        """,
        """
        class Solver:
            def __init__(self, model): self.model = model
            def __call__(self, resource, task): return 1
        solve = Solver("x")
        """,
        """
        from dataclasses import dataclass
        from shutil import copyfileobj, copymode
        @dataclass
        class Settings:
            top: int = 3
        settings = Settings()
        def with_default(a, b, c=1): return 0
        def three(a, b, c): return 0
        def solve(resource, task): return 1
        """,
    ],
    ids=["async", "lambda", "wraps", "lru_cache", "class", "object", "among others"],
)
def test_what_is_found_without_a_name(tmp_path, text):
    value = load_script(script(tmp_path, text), None)(None, None)
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    assert value == 1


def test_a_usual_name_that_takes_no_two_arguments_is_passed_over(tmp_path):
    path = script(tmp_path, "agent = 'a name'\ndef my_agent(question): return 0\ndef solve(r, t): return 1\n")
    assert load_script(path, None)(None, None) == 1
    with pytest.raises(InvalidConfigError, match=r"my_agent\(question\) in .* cannot be called as my_agent\(resource"):
        load_script(path, "my_agent")


def test_imported_functions_are_taken_by_name(tmp_path):
    script(tmp_path, "def solve(resource, task): return 6\n", "library_of_agents.py")
    path = script(tmp_path, "from library_of_agents import solve\n")
    assert load_script(path, "solve")(None, None) == 6
    with pytest.raises(InvalidConfigError, match="found: no functions"):
        load_script(path, None)
    path = script(tmp_path, "from library_of_agents import solve as agent_func\n", "renamed.py")
    assert load_script(path, None)(None, None) == 6


def test_a_class_is_an_agent_when_its_objects_are():
    class Solver:
        def __call__(self, resource, task):
            return 8

    assert unpack_agent(pack_agent(Solver))[0](None, None) == 8
    assert unpack_agent(pack_agent(Solver()))[0](None, None) == 8


def test_a_script_imports_its_neighbours_and_shadows_nothing(tmp_path):
    script(tmp_path, "VALUE = 5", "neighbour_of_the_agent.py")
    path = script(tmp_path, "import json\nfrom neighbour_of_the_agent import VALUE\ndef agent(r, t): return VALUE\n")
    assert load_script(path, None)(None, None) == 5
    path = script(tmp_path, "import json\ndef agent(r, t): return json.dumps(1)\n", "json.py")
    assert load_script(path, None)(None, None) == "1"


def test_split_script(tmp_path):
    path = script(tmp_path, "")
    assert split_script(path) == (path, None)
    assert split_script(f"{path}:run") == (path, "run")
    with pytest.raises(InvalidConfigError, match="agent script not found: nowhere.py"):
        pack_agent("nowhere.py:run")


def test_what_cannot_be_sent_says_what_to_do():
    lock = threading.Lock()
    with pytest.raises(InvalidConfigError, match="inside the agent function"):
        pack_agent(lambda resource, task: lock.acquire())
    with pytest.raises(InvalidConfigError, match="got int"):
        pack_agent(3)


def test_a_function_of_a_module_that_workers_cannot_import_is_sent_by_value(tmp_path):
    """A fresh interpreter, without the module on its path, loads and calls what was packed."""
    path = script(
        tmp_path, "FACTOR = 7\ndef times(x): return x * FACTOR\ndef agent(r, t): return times(t)\n", "away.py"
    )
    sys.path.insert(0, str(tmp_path))
    import away

    sys.path.remove(str(tmp_path))
    assert path == away.__file__
    packed = pack_agent(away.agent)
    code = f"from agent_lightning.agent_source import unpack_agent; print(unpack_agent({packed!r})[0](None, 6))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sys.path[0] or None)
    assert done.stdout.strip() == "42", done.stderr


def test_a_package_that_workers_cannot_import_is_sent_as_a_whole(tmp_path):
    (tmp_path / "away_package").mkdir()
    script(tmp_path, "", "away_package/__init__.py")
    script(tmp_path, "def times(x): return x * 7\n", "away_package/helpers.py")
    text = "from away_package.helpers import times\ndef agent(r, t): return times(t)\n"
    script(tmp_path, text, "away_package/agents.py")
    sys.path.insert(0, str(tmp_path))
    from away_package import agents

    sys.path.remove(str(tmp_path))
    packed = pack_agent(agents.agent)
    code = f"from agent_lightning.agent_source import unpack_agent; print(unpack_agent({packed!r})[0](None, 6))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "42", done.stderr


def test_a_traceback_of_a_sent_agent_shows_its_own_lines():
    def agent(resource, task):
        return [1 // part for part in task]

    (frame,) = traceback_of(unpack_agent(pack_agent(agent))[0], None, [0])[-1:]
    assert (frame.filename, frame.line) == (__file__, "return [1 // part for part in task]")


def test_cached_functions_inside_of_others_can_be_sent():
    @functools.lru_cache(maxsize=3)
    def sum_to(n):
        return n and n + sum_to(n - 1)

    @functools.cache
    def agent(resource, task):
        return sum_to(task), sum_to.cache_parameters()["maxsize"], sum_to.note

    sum_to.note = "mine"
    assert unpack_agent(pack_agent(agent))[0](None, 4) == (10, 3, "mine")


def test_only_text_in_sys_path_is_a_folder_as_python_has_it(tmp_path):
    sys.path += [tmp_path, b"bytes", str(tmp_path), ""]
    sent = json.loads(json.dumps(pack_agent(script(tmp_path, "def agent(r, t): return 1"))))["sys_path"]
    assert sent == [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)] and str(tmp_path) in sent
    assert "" not in sent and sent[-1] == os.getcwd(), "workers on other machines have another working folder"


def traceback_of(function, *arguments):
    try:
        function(*arguments)
    except ZeroDivisionError as error:
        return traceback.extract_tb(error.__traceback__)
