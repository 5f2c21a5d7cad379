"""Packed attention against `jax.nn.dot_product_attention` on each sequence alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import mesh as mesh_lib
from lightning_jax.model import attention
from lightning_jax.model.attention import segment_attention

K, G, h = 2, 3, 8


def qkv(num_tokens, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (num_tokens, K, G, h), (num_tokens, K, h), (num_tokens, K, h)
    return tuple(jax.random.normal(key, (1, *shape)) for key, shape in zip(keys, shapes, strict=True))


def alone(q, k, v, window):
    """One sequence, by JAX's own attention."""
    t = q.shape[1]
    window = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(q.reshape(1, t, K * G, h), k, v, is_causal=True, local_window_size=window)
    return out.reshape(q.shape)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths, padding", [((5, 1, 9), 3), ((20,), 0), ((300, 700), 24), ((1024,), 512)])
def test_packed_sequences_do_not_see_each_other(lengths, padding, window):
    total = sum(lengths) + padding
    q, k, v = qkv(total)
    ids = range(1, len(lengths) + 1)
    segment = jnp.concatenate([jnp.full(n, i) for i, n in zip((*ids, 0), (*lengths, padding), strict=True)])[None]
    position = jnp.concatenate([jnp.arange(n) for n in (*lengths, padding)])[None]
    out, cache = jax.jit(lambda q, k, v: segment_attention(segment, position, window)(q, k, v, None))(q, k, v)
    assert cache is None and np.isfinite(out).all()
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        expected = alone(q[:, part], k[:, part], v[:, part], window)
        np.testing.assert_allclose(out[:, part], expected, rtol=0, atol=2e-6)
        start += n


def test_gradients_of_long_rows_match_jax():
    """1024 queries go through the chunked path, whose scores are recomputed in the backward pass."""
    q, k, v = qkv(1024)
    position = jnp.arange(1024)[None]
    attend = segment_attention(jnp.ones((1, 1024), jnp.int32), position)
    weight = jax.random.normal(jax.random.key(9), q.shape)
    ours = jax.grad(lambda qkv: (attend(*qkv, None)[0] * weight).sum())((q, k, v))
    expected = jax.grad(lambda qkv: (alone(*qkv, None) * weight).sum())((q, k, v))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


# Kernels against the plain path ---------------------------------------------------------------------------------------


def packed(total, lengths):
    """Segments and positions of sequences side by side, and padding."""
    padding = total - sum(lengths)
    ids = (*range(1, len(lengths) + 1), 0)
    segment = np.repeat(ids, (*lengths, padding))[None].astype(np.int32)
    position = np.concatenate([np.arange(n) for n in (*lengths, padding)])[None].astype(np.int32)
    return jnp.asarray(segment), jnp.asarray(position)


def value_and_gradients(attend, inputs, weight):
    """Of a weighted sum of the outputs."""
    value, pull = jax.vjp(attend, *inputs)
    return value, *pull(weight)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_compute_what_the_plain_path_does(kernel, window):
    """Values and gradients. Splash is interpreted; in cuDNN's place JAX's own attention takes the same arguments."""
    segment, position = packed(256, (100, 90, 41))
    real = segment[..., None, None, None] > 0
    inputs, weight = qkv(256), jax.random.normal(jax.random.key(9), (1, 256, K, G, h)) * real

    def by_kernel(q, k, v):
        if kernel == "splash":
            return attention.splash_attention(q, k, v, segment, window, interpret=True)
        return attention.cudnn_attention(q, k, v, segment, window, implementation="xla")

    plain = segment_attention(segment, position, window)
    expected = jax.jit(lambda x: value_and_gradients(lambda *qkv: plain(*qkv, None)[0], x, weight))(inputs)
    ours = jax.jit(lambda x: value_and_gradients(by_kernel, x, weight))(inputs)
    np.testing.assert_allclose(ours[0] * real, expected[0] * real, rtol=0, atol=2e-6)
    for a, b in zip(ours[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_splash_on_a_mesh_divides_batch_and_heads():
    """One device's part is the whole computation on its rows and heads, so a mesh of one shows that specs fit."""
    segment, _ = packed(128, (70, 50))
    inputs = qkv(128)
    alone = attention.splash_attention(*inputs, segment, None, interpret=True)
    with jax.set_mesh(mesh_lib.make_mesh()):
        meshed = jax.jit(lambda *x: attention.splash_attention(*x, segment, None, interpret=True))(*inputs)
    np.testing.assert_allclose(meshed, alone, rtol=0, atol=1e-6)
