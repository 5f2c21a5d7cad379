"""Pages in the layout of the TPU's kernel, and what it is called with, against the plain path over pages.

Neither of Pallas's interpreters runs this kernel (JAX 0.10: one knows no reshaped references, the other no scalar
indices in stores). What stands in for it here is the definition of its result that JAX gives beside it, called with the
same arguments; `tests/test_aot.py` compiles the kernel itself.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from lightning_jax.model.shapes import named_shape
from lightning_jax.sampler import kv_cache, ragged_pages

TINY = dataclasses.replace(named_shape("tiny"), num_layers=1)  # 4 key/value heads of width 32, 2 queries each
PAGE, PAGES = 16, 12


@pytest.mark.parametrize(
    "starts, lengths, chunk, window",
    [((40, 3), (1, 1), 1, 8), ((0, 19), (32, 7), 32, None)],
    ids=["decode, sliding window", "prefill"],
)
def test_kernel_computes_what_the_plain_path_does(starts, lengths, chunk, window, monkeypatch):
    """Several chunks one after another, so that keys of earlier ones are read from the pages."""

    def defined(*args, num_kv_pages_per_block, num_queries_per_block, **kwargs):
        return kernel.ref_ragged_paged_attention(*args, **kwargs)

    monkeypatch.setattr(kernel, "ragged_paged_attention", defined)
    rng = np.random.default_rng(0)
    rows = len(starts)
    table = jnp.asarray(1 + rng.permutation(PAGES)[: rows * 4].reshape(rows, 4), jnp.int32)
    plain = kv_cache.init_pages(TINY, PAGES, PAGE, jnp.float32)[0]
    ragged = ragged_pages.init(plain.k.shape, jnp.float32, None)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def run(pages, position, valid, q, k, v):
        attend = kv_cache.prefill_attention(table, position, valid, window)
        column = [x.reshape(-1, 1, *x.shape[2:]) for x in (q, k, v)]
        out, pages = attend(*column, pages)
        return out.reshape(q.shape), pages

    longest = max(starts)
    history = [(jnp.zeros(rows, jnp.int32), jnp.asarray(starts), longest)] if longest else []
    for start, length, t in [*history, (jnp.asarray(starts), jnp.asarray(lengths), chunk)]:
        position = start[:, None] + jnp.arange(t)
        valid = jnp.arange(t) < length[:, None]
        inputs = normal(rows, t, 4, 2, 32), normal(rows, t, 4, 32), normal(rows, t, 4, 32)
        expected, plain = run(plain, position, valid, *inputs)
        out, ragged = run(ragged, position, valid, *inputs)
        np.testing.assert_allclose(out[valid], expected[valid], rtol=0, atol=2e-5)


def test_pages_fit_the_kernel_by_their_heads():
    assert all(ragged_pages.fits(k, jnp.bfloat16) for k in (1, 2, 4, 8, 16))
    assert not any(ragged_pages.fits(k, jnp.bfloat16) for k in (3, 5, 6))  # SmolLM2 has 3: it goes the plain way
