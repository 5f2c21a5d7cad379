"""The GPU's kernel for attention over pages, run by Pallas's interpreter, against the plain path.

`tests/test_aot.py` compiles it, and the programs around it, for an H100.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.sampler import kv_cache, paged_attention

ROOT = Path(__file__).resolve().parents[2]
PAGE = 16


def case(starts, lengths, chunk, heads, dtype=jnp.float32):
    """Pages that hold what comes before `starts`, in a random order, and a chunk of queries, keys and values.

    Behind that their values are not numbers, as an earlier request may have left them.
    """
    k, g, h = heads
    rows, pages_per_row = len(starts), -(-max(map(sum, zip(starts, lengths, strict=True))) // PAGE)
    rng = np.random.default_rng(0)
    table = jnp.asarray(1 + rng.permutation(rows * pages_per_row).reshape(rows, pages_per_row), jnp.int32)
    shape = rows * pages_per_row + 1, PAGE, k, h
    k_pskh, v_pskh = rng.standard_normal((2, *shape))
    for row, start in enumerate(starts):
        after = np.arange(pages_per_row * PAGE).reshape(-1, PAGE) >= start
        v_pskh[table[row]] = np.where(after[..., None, None], np.nan, v_pskh[table[row]])
    pages = kv_cache.Pages(jnp.asarray(k_pskh, dtype), jnp.asarray(v_pskh, dtype))
    position = jnp.asarray(starts, jnp.int32)[:, None] + jnp.arange(chunk, dtype=jnp.int32)
    valid = jnp.arange(chunk) < jnp.asarray(lengths)[:, None]
    new = [jnp.asarray(rng.standard_normal((rows, chunk, *s)), dtype) for s in [(k, g, h), (k, h), (k, h)]]
    return pages, table, position, valid, new


def by_both(pages, table, position, valid, new, window):
    column = [x.reshape(-1, 1, *x.shape[2:]) for x in new]
    plain, pages = jax.jit(kv_cache.prefill_attention(table, position, valid, window))(*column, pages)
    kernel = functools.partial(paged_attention.attention, sliding_window=window, interpret=True)
    out = jax.jit(kernel)(new[0], *pages, table, position[:, 0], valid.sum(axis=1))
    return out, plain.reshape(out.shape)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    "starts, lengths, chunk, heads, splits",
    [
        ((299, 3, 0, 64), (1, 1, 1, 0), 1, (2, 4, 32), 5),
        ((130,) * 48 + (7,) * 16, (1,) * 64, 1, (4, 2, 16), 1),
        ((0, 19, 150), (64, 37, 1), 64, (3, 3, 64), 1),
        ((90, 5), (4, 3), 4, (1, 5, 128), 2),
    ],
    ids=["decode, split", "decode, many rows", "prefill", "few tokens"],
)
def test_kernel_computes_what_the_plain_path_does(starts, lengths, chunk, heads, splits, window):
    pages, table, position, valid, new = case(starts, lengths, chunk, heads)
    assert chunk * heads[1] > 64 or paged_attention.num_splits(len(starts) * heads[0], table.shape[1] * PAGE) == splits
    out, plain = by_both(pages, table, position, valid, new, window)
    np.testing.assert_allclose(out[valid], plain[valid], rtol=0, atol=2e-5)
    assert np.isfinite(out).all()  # of padding, too


def test_kernel_in_bfloat16():
    out, plain = by_both(*case((299, 31), (1, 1), 1, (2, 4, 64), jnp.bfloat16), window=None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(plain, np.float32), rtol=0, atol=1e-2)


ON_EIGHT = """
import jax, numpy as np
from lightning_jax import mesh
from tests.sampler.test_paged_attention import by_both, case

arguments = case((50, 3), (8, 5), 8, (4, 2, 16))
_, plain = by_both(*arguments, window=None)
with jax.set_mesh(mesh.make_mesh(data=2, tensor=4)):
    divided, _ = by_both(*arguments, window=None)
valid = arguments[3]
np.testing.assert_allclose(divided[valid], plain[valid], rtol=0, atol=2e-5)
assert len(divided.sharding.device_set) == 8
"""


def test_heads_are_divided_over_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr


def test_splits_fill_the_gpu_and_no_more():
    assert paged_attention.num_splits(512, 4096) == 1  # 64 rows of 8 heads
    assert paged_attention.num_splits(8, 4096) == 16  # one row
    assert paged_attention.num_splits(8, 128) == 2  # that has two blocks of keys
    assert paged_attention.num_splits(64, 4096) == 4
