"""How an agent travels to the workers: a Python object (cloudpickle, by value) or a script on disk.

With it goes what `agent_lightning.runtime` was told in this process: settings, and AIR's handlers.
"""

import ast
import base64
import contextlib
import dis
import functools
import inspect
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from importlib import util as importlib_util

from agent_lightning.exceptions import InvalidConfigError
from agent_lightning.runtime import air, worker_side

USUAL_NAMES = ("agent_func", "my_agent", "agent")
MAX_ANNOTATION_CHARS = 1000
_LOADS_IN_CLASS_BODIES = ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")  # cloudpickle knows LOAD_GLOBAL alone


def pack_agent(agent: Callable | str | os.PathLike) -> dict:
    """Describes an agent so that a worker can load it.

    Args:
        agent: a callable `(resource, task) -> reward` (also async, closure, lambda, method), or a script as
            `file.py` or `file.py:function`.

    Raises:
        InvalidConfigError: no such script, not callable, or it refers to something that cannot be pickled.
    """
    handlers = air.registered()
    # Python passes over what is no text, and takes "" for the working folder, which is another one on other machines.
    sys_path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    source = {"settings": worker_side.settings(), "sys_path": sys_path, "data": None}
    if isinstance(agent, (str, os.PathLike)):
        path, function = split_script(os.fspath(agent))
        source |= {"kind": "script", "path": path, "function": function}
        if any(handlers.values()):
            source["data"] = _pickled(None, handlers)
        return source
    if not callable(agent):
        raise InvalidConfigError(
            f"the agent must be a function (resource, task) -> reward or a script path, got {type(agent).__name__}"
        )
    return source | {"kind": "pickle", "data": _pickled(agent, handlers)}


def unpack_agent(source: dict) -> tuple[Callable, dict[str, list[Callable]]]:
    """The callable that `pack_agent` described, and AIR's handlers of the process that packed it, by kind.

    Runs in the worker. Whatever loading raises is passed on.
    """
    with _unpacking():
        if source["kind"] == "pickle":
            sys.path[:] = source["sys_path"]
            agent, handlers = _unpickled(source["data"])
            return ready_to_call(agent), handlers
        agent = load_script(source["path"], source["function"])
        if source["data"] is None:
            return agent, {}
        sys.path += [folder for folder in source["sys_path"] if folder not in sys.path]
        return agent, _unpickled(source["data"])[1]


def refuse_jobs_while_unpacking() -> None:
    """Raises InvalidConfigError in a worker that is loading its agent: each worker would start workers, without end."""
    if _is_unpacking:
        raise InvalidConfigError(
            "the agent's script starts a job whenever it is imported, as each worker does",
            hint='put what starts it under `if __name__ == "__main__":`',
        )


_is_unpacking = False


@contextlib.contextmanager
def _unpacking():
    global _is_unpacking
    _is_unpacking = True
    try:
        yield
    finally:
        _is_unpacking = False


# ---- by value ----


def _pickled(agent: Callable | None, handlers: dict[str, list[Callable]]) -> str:
    """Both as text, in one go since they may share globals; with all of their modules that the workers cannot import.

    Raises:
        InvalidConfigError: one of them refers to something that cannot be pickled.
    """
    import cloudpickle

    functions = [agent, *(handler for of_kind in handlers.values() for handler in of_kind)]
    modules = {sys.modules.get(getattr(_innermost(function), "__module__", None) or "") for function in functions}
    modules = [module for module in modules - {None} if not _workers_can_import(module)]
    by_value = {sys.modules.get(module.__name__.partition(".")[0], module) for module in modules}  # whole packages
    registered = []
    try:
        for module in by_value:
            cloudpickle.register_pickle_by_value(module)
            registered.append(module)
        return base64.b64encode(_dumped((agent, handlers))).decode()
    except Exception as error:
        what = ["the agent"] * (agent is not None) + ["AIR's handlers"] * any(handlers.values())
        raise InvalidConfigError(
            f"{' or '.join(what)} cannot be sent to the workers: {type(error).__name__}: {error}",
            hint="create clients, locks and connections inside the agent function or the handlers, or put the agent in "
            "a file and pass its path ('my_agent.py:my_agent')",
        ) from error
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _innermost(function):
    """What `functools.partial` was given, which has the module."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _dumped(value) -> bytes:
    """`(value, globals)` as cloudpickle does it, but for code, caches and __main__.

    Code keeps the name of its file, which cloudpickle leaves out since 3.1.3: a traceback from a worker shows the
    agent's own lines, and `air.merge` knows copies of a handler by it. Functions of __main__ become functions of the
    worker's __main__, where pickle and annotations look for what is defined there; with them go the `globals`, those
    that the value names without any function loading them.
    """
    import cloudpickle

    main, named, also = vars(sys.modules["__main__"]), set(), {}

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj):
            if isinstance(obj, types.CodeType) and obj.co_filename:
                return _code_of_file, (obj.replace(co_filename=""), obj.co_filename)
            if type(obj) is functools.cached_property:  # up to Python 3.11 it has a lock
                return type(obj), (obj.func,), {"attrname": obj.attrname}
            if type(obj) in _REMADE and _is_sent_by_value(obj):
                return _REMADE[type(obj)](obj)
            is_function = isinstance(obj, types.FunctionType)
            if obj.__globals__ is main if is_function else isinstance(obj, type) and obj.__module__ == "__main__":
                named.update(_named_by(obj, main))
            return super().reducer_override(obj)

    while True:
        buffer = io.BytesIO()
        pickler = Pickler(buffer)
        pickler.globals_ref[id(main)] = _MainGlobals()
        pickler.dump((value, also))
        if named <= also.keys():
            return buffer.getvalue()
        also = {name: main[name] for name in named}


# What cloudpickle has a worker import wherever it comes from, and how it is made anew.
_REMADE = {
    functools._lru_cache_wrapper: lambda obj: (
        _cached,
        (obj.__wrapped__, obj.cache_parameters()),
        {name: value for name, value in vars(obj).items() if name != "__wrapped__"},
    ),
    typing.NewType: lambda obj: (typing.NewType, (obj.__name__, obj.__supertype__), vars(obj)),
    typing.ParamSpec: lambda obj: (typing.ParamSpec, (obj.__name__,)),
}


def _is_sent_by_value(obj) -> bool:
    """Whether cloudpickle would send a function or class so, were it one that is defined in this one's place."""
    import cloudpickle

    modules = {"__main__"} | cloudpickle.list_registry_pickle_by_value()
    return "<locals>" in getattr(obj, "__qualname__", "") or any(
        f"{obj.__module__}.".startswith(f"{module}.") for module in modules
    )


def _cached(function: Callable, parameters: dict) -> Callable:
    return functools.lru_cache(**parameters)(function)


class _MainGlobals:
    """Pickled, stands for the globals of __main__ in the process that loads it."""

    def __reduce__(self):
        return _main_globals, ()


def _main_globals() -> dict:
    return vars(sys.modules["__main__"])


def _named_by(obj: Callable | type, main: dict) -> set[str]:
    """Globals of __main__ that one of its functions or classes needs there, besides those that its code loads."""
    names, texts = {"__file__", "__package__"}, []
    if isinstance(obj, type):
        texts += vars(obj).get("__annotations__", {}).values()
    else:
        texts += obj.__annotations__.values()
        codes = [obj.__code__]
        for code in codes:
            constants = [c for value in code.co_consts for c in (value if isinstance(value, tuple) else [value])]
            codes += [c for c in constants if isinstance(c, types.CodeType)]
            texts += constants
            loaded = {i.argval for i in dis.get_instructions(code) if i.opname in _LOADS_IN_CLASS_BODIES}
            names |= {name for name in loaded if not name.startswith("__")}
    names |= {name for text in texts for name in _names_in(text) if _may_annotate(main.get(name))}
    if main.get(obj.__name__) is obj:  # where pickle will look for it
        names.add(obj.__name__)
    return names & main.keys()


def _names_in(text) -> set[str]:
    """The names in a string that may be an annotation."""
    if not isinstance(text, str) or len(text) > MAX_ANNOTATION_CHARS:
        return set()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _may_annotate(value) -> bool:
    kinds = type | types.ModuleType | types.GenericAlias | types.UnionType
    return isinstance(value, kinds) or type(value).__module__ == "typing"


def _code_of_file(code: types.CodeType, filename: str) -> types.CodeType:
    return code.replace(co_filename=filename)


def _unpickled(data: str):
    import cloudpickle

    value, also = cloudpickle.loads(base64.b64decode(data))
    _main_globals().update(also)
    return value


# ---- scripts ----


def split_script(text: str) -> tuple[str, str | None]:
    """`"a.py:run"` -> (absolute path, "run"); `"a.py"` -> (absolute path, None)."""
    match = re.fullmatch(r"(?P<path>.*?)(?::(?P<function>[A-Za-z_]\w*))?", text)
    path, function = (match["path"], match["function"]) if match else (text, None)
    if not os.path.isfile(path):
        raise InvalidConfigError(f"agent script not found: {path}", hint="give it as file.py or file.py:function")
    return os.path.abspath(path), function


def load_script(path: str, function: str | None) -> Callable:
    """Runs a script as a module and picks its agent.

    An agent is anything that can be called with (resource, task): a function, async or not, an object, or a class whose
    objects can be, of which one is made. Without a name it is what `agent_func`, `my_agent` or `agent` names, else the
    only one of the script's own, not imported, that takes exactly two arguments.

    Raises:
        InvalidConfigError: there is none of that name, it cannot be called so, or there is more than one candidate;
            lists what was found.
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
    return ready_to_call(_pick(module, path, function))


def ready_to_call(agent: Callable) -> Callable:
    """The agent itself, or an object of it where it is a class."""
    return agent() if inspect.isclass(agent) else agent


def _pick(module, path: str, name: str | None) -> Callable:
    own = {n: v for n, v in vars(module).items() if _is_own(v, module) and _parameters(v) is not None}
    made = {type(v) for v in own.values()}  # where there is an object, its class is not meant
    own = {n: v for n, v in own.items() if v not in made}
    if name:
        agent = getattr(module, name, None)
        if callable(agent) and _accepts_two(agent):
            return agent
        problem = f"{path} has no function {name!r}"
        if callable(agent):
            problem = f"{name}{_parameters(agent) or ''} in {path} cannot be called as {name}(resource, task)"
    else:
        for usual in USUAL_NAMES:
            if callable(agent := getattr(module, usual, None)) and _accepts_two(agent):
                return agent
        handlers = [handler for of_kind in air.registered().values() for handler in of_kind]
        candidates = [v for v in own.values() if _takes_two(v) and v not in handlers]  # these may take two as well
        if len(candidates) == 1:
            return candidates[0]
        problem = f"{path} does not show which function is the agent"
    found = ", ".join(f"{n}{_parameters(v)}" for n, v in own.items()) or "no functions"
    raise InvalidConfigError(
        f"{problem}; found: {found}",
        hint=f"pass {os.path.basename(path)}:FUNCTION, or name the function {' or '.join(USUAL_NAMES)}",
    )


def _is_own(value, module) -> bool:
    """Whether a module defines this callable itself, be it behind a decorator, or its class."""
    if not callable(value):
        return False
    original = inspect.unwrap(value) if inspect.isfunction(value) else getattr(value, "__wrapped__", value)
    homes = [getattr(thing, "__module__", None) for thing in (value, original, type(value))]
    return module.__name__ in homes


def _parameters(agent: Callable) -> inspect.Signature | None:
    """What the agent is called with (of a class, its objects); None where that is not known or not possible."""
    try:
        if not inspect.isclass(agent):
            return inspect.signature(agent)
        inspect.signature(agent).bind()  # an object of it is made without arguments
        signature = inspect.signature(vars(agent)["__call__"])
        return signature.replace(parameters=list(signature.parameters.values())[1:])
    except (TypeError, ValueError, KeyError):
        return None


def _accepts_two(agent: Callable) -> bool:
    signature = _parameters(agent)
    if signature is None:
        return not inspect.isclass(agent)
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def _takes_two(agent: Callable) -> bool:
    """Exactly two, so that a helper that has two and a few more with defaults is no candidate."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in _parameters(agent).parameters.values() if p.kind in kinds]
    return len(positional) == 2 and _accepts_two(agent)


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
