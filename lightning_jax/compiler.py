"""Compiler options, for the platforms that are better off with some."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lightning_jax import mesh


class PlatformJit:
    """`jax.jit` of a function, with options for XLA's CPU compiler where it is compiled for that; like what jit makes.

    The options are XLA's own, which no version has to keep: one that does not know them compiles without. With options
    a function cannot be part of another that is compiled, says JAX.
    """

    def __init__(self, function: Callable, *, cpu_options: dict[str, str], **arguments: Any):
        """`arguments` are those of `jax.jit`."""

        def jitted(platform: str) -> Any:
            options = cpu_options if platform == "cpu" and are_known(cpu_options) else None
            return jax.jit(function, compiler_options=options, **arguments)

        functools.update_wrapper(self, function)
        self._jitted = functools.cache(jitted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(mesh.platform())(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted(mesh.platform()), name)


def are_known(options: dict[str, str]) -> bool:
    """Whether the compiler takes them: it compiles a constant with them."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
