"""A function compiled with options for one platform, and what becomes of options that a compiler does not know."""

import jax
import jax.numpy as jnp
import pytest

from lightning_jax import compiler
from lightning_jax.rl import update

ARGUMENTS = jnp.ones((6, 64, 16)), jnp.ones((6, 32, 16))
UNKNOWN = [{"xla_cpu_no_such_option": "x"}, dict.fromkeys(update.CPU_OPTIONS, "NO_SUCH_TYPE")]


def products(x, y):
    return jnp.einsum("bxh,bsh->bxs", x, y)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="its option is the CPU compiler's")
def test_the_learners_option_is_known_and_has_its_effect():
    """Should a version of XLA drop it, this says so; the learner itself goes on."""
    assert compiler.are_known(update.CPU_OPTIONS)
    plain, without_library = jax.jit(products), compiler.PlatformJit(products, cpu_options=update.CPU_OPTIONS)
    counts = [f.lower(*ARGUMENTS).compile().as_text().count("__ynn_fusion") for f in (plain, without_library)]
    assert counts == [1, 0]
    assert jnp.array_equal(without_library(*ARGUMENTS), plain(*ARGUMENTS))
    assert without_library._cache_size() == 1


@pytest.mark.parametrize("options", UNKNOWN)
def test_unknown_options_are_left_out(options):
    assert not compiler.are_known(options)
    function = compiler.PlatformJit(products, cpu_options=options)
    assert jnp.array_equal(function(*ARGUMENTS), jax.jit(products)(*ARGUMENTS))
    assert function.__name__ == "products"
