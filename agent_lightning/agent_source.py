"""How an agent travels to the workers: a Python object (cloudpickle, by value) or a script on disk."""

import base64
import inspect
import os
import re
import sys
from collections.abc import Callable
from importlib import util as importlib_util

from agent_lightning.exceptions import InvalidConfigError

USUAL_NAMES = ("agent_func", "my_agent", "agent")


def pack_agent(agent: Callable | str | os.PathLike) -> dict:
    """Describes an agent so that a worker can load it.

    Args:
        agent: a callable `(resource, task) -> reward` (also async, closure, lambda, method), or a script as
            `file.py` or `file.py:function`.

    Raises:
        InvalidConfigError: no such script, not callable, or it refers to something that cannot be pickled.
    """
    if isinstance(agent, (str, os.PathLike)):
        path, function = split_script(os.fspath(agent))
        return {"kind": "script", "path": path, "function": function}
    if not callable(agent):
        raise InvalidConfigError(
            f"the agent must be a function (resource, task) -> reward or a script path, got {type(agent).__name__}"
        )
    import cloudpickle

    module = sys.modules.get(getattr(agent, "__module__", None) or "")
    by_value = module is not None and not _workers_can_import(module)
    try:
        if by_value:
            cloudpickle.register_pickle_by_value(module)
        data = cloudpickle.dumps(agent)
    except Exception as error:
        raise InvalidConfigError(
            f"the agent cannot be sent to the workers: {type(error).__name__}: {error}",
            hint="create clients, locks and connections inside the agent function, or put the agent in a file "
            "and pass its path ('my_agent.py:my_agent')",
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return {"kind": "pickle", "data": base64.b64encode(data).decode(), "sys_path": sys.path}


def unpack_agent(source: dict) -> Callable:
    """The callable that `pack_agent` described; runs in the worker. Whatever loading raises is passed on."""
    if source["kind"] == "script":
        return load_script(source["path"], source["function"])
    import cloudpickle

    sys.path[:] = source["sys_path"]
    return cloudpickle.loads(base64.b64decode(source["data"]))


def split_script(text: str) -> tuple[str, str | None]:
    """`"a.py:run"` -> (absolute path, "run"); `"a.py"` -> (absolute path, None)."""
    match = re.fullmatch(r"(?P<path>.*?)(?::(?P<function>[A-Za-z_]\w*))?", text)
    path, function = (match["path"], match["function"]) if match else (text, None)
    if not os.path.isfile(path):
        raise InvalidConfigError(f"agent script not found: {path}", hint="give it as file.py or file.py:function")
    return os.path.abspath(path), function


def load_script(path: str, function: str | None) -> Callable:
    """Runs a script as a module and picks its agent function.

    Without a name: `agent_func`, `my_agent` or `agent`, else the only function with two parameters.

    Raises:
        InvalidConfigError: the function is missing or there is more than one candidate; lists what was found.
    """
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules:  # never shadow an installed package that the script itself may import
        name = f"agent_script_{name}"
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib_util.spec_from_file_location(name, path)
    if spec is None:
        raise InvalidConfigError(f"not a Python file: {path}")
    module = importlib_util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return _pick_function(module, path, function)


def _pick_function(module, path: str, function: str | None) -> Callable:
    for name in (function,) if function else USUAL_NAMES:
        if callable(getattr(module, name, None)):
            return getattr(module, name)
    own = {n: v for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__}
    if not function:
        two_parameters = [v for v in own.values() if _takes_two(v)]
        if len(two_parameters) == 1:
            return two_parameters[0]
    found = ", ".join(f"{n}{inspect.signature(v)}" for n, v in own.items()) or "no functions"
    problem = (
        f"{path} has no function {function!r}" if function else f"{path} does not show which function is the agent"
    )
    raise InvalidConfigError(
        f"{problem}; found: {found}",
        hint=f"pass {os.path.basename(path)}:FUNCTION, or name the function {' or '.join(USUAL_NAMES)}",
    )


def _takes_two(function: Callable) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in kinds]
    others_required = [p for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY and p.default is p.empty]
    return len(positional) == 2 and not others_required


def _workers_can_import(module) -> bool:
    """Whether a fresh process with the same `sys.path` finds this very module by its name."""
    if module.__name__ == "__main__":
        return True  # cloudpickle sends __main__ by value of its own accord
    top_name = module.__name__.partition(".")[0]
    file = getattr(module, "__file__", None)
    for finder in sys.meta_path:
        spec = finder.find_spec(top_name, None)
        if spec is None:
            continue
        if file is None or spec.submodule_search_locations is None:
            return spec.origin in (file, "built-in", "frozen")
        return any(os.path.abspath(file).startswith(place + os.sep) for place in spec.submodule_search_locations)
    return False
