"""Calls back when a module has been imported, so that nobody imports what the agent may have no use for."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType

_log = logging.getLogger(__name__)
_callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Calls `callback(module)` once the module is there: now, or right after its import. What it raises is logged."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _callbacks.setdefault(name, []).append(callback)
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _call(callback, module)


class _Finder:
    """First in `sys.meta_path`; costs every other import one look into a dictionary."""

    def __init__(self):
        self._looking_for: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _callbacks or name in self._looking_for:
            return None
        self._looking_for.add(name)
        try:
            spec = importlib.util.find_spec(name)  # by the finders behind this one
        finally:
            self._looking_for.discard(name)
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader, name)
        return spec


def _call_after(loader, name: str) -> None:
    """Has the loader call back, this once. The loader itself stays the one that everybody expects to see."""
    execute = loader.exec_module

    def exec_module(module):
        execute(module)
        if module.__name__ == name:
            loader.exec_module = execute
            for callback in _callbacks[name]:
                _call(callback, module)

    try:
        loader.exec_module = exec_module
    except AttributeError:  # a loader that takes no attributes, which no file's loader is
        _log.warning("cannot follow the import of %s", name)


def _call(callback: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        callback(module)
    except Exception:
        _log.warning("after the import of %s", module.__name__, exc_info=True)
