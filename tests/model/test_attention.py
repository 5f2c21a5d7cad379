"""Packed attention against `jax.nn.dot_product_attention` on each sequence alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import gpu
from lightning_jax import mesh as mesh_lib
from lightning_jax.model import attention
from lightning_jax.model.attention import segment_attention

K, G, h = 2, 3, 8


def qkv(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (1, num_tokens, K, G, h), (1, num_tokens, K, h), (1, num_tokens, K, h)
    return tuple(normal(rng, shape) for shape in shapes)


def normal(rng, shape):
    """By NumPy: of each new shape `jax.random` would compile a program."""
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def alone(q, k, v, window):
    """One sequence, by JAX's own attention."""
    t = q.shape[1]
    window = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(q.reshape(1, t, K * G, h), k, v, is_causal=True, local_window_size=window)
    return out.reshape(q.shape)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "lengths, padding", [((5, 1, 9), 3), ((20,), 0), ((300, 700), 24), ((600,), 40), ((1024,), 512)]
)
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
    """1024 queries are computed by blocks, whose scores are recomputed in the backward pass."""
    q, k, v = qkv(1024)
    position = jnp.arange(1024)[None]
    attend = segment_attention(jnp.ones((1, 1024), jnp.int32), position)
    weight = normal(np.random.default_rng(9), q.shape)
    ours = jax.grad(lambda qkv: (attend(*qkv, None)[0] * weight).sum())((q, k, v))
    expected = jax.grad(lambda qkv: (alone(*qkv, None) * weight).sum())((q, k, v))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("lengths", "prefix", "window", "dtype"),
    [
        ((200, 300, 60), [1, 2, 3, 0], None, jnp.float32),
        ((200, 300, 60), [1, 2, 3, 0], 40, jnp.float32),
        ((330, 90, 100, 30), [1, 1, 1, 4, 0], None, jnp.float32),
        ((200, 300, 60), [1, 2, 3, 0], None, jnp.bfloat16),
    ],
)
def test_long_rows_by_blocks_are_as_rows_whole(monkeypatch, lengths, prefix, window, dtype):
    """Values and gradients of two rows of 576 tokens: in blocks, some of them seen by nobody, and in one piece."""
    segment, position = (jnp.tile(x, (2, 1)) for x in packed(576, lengths))
    prefix_bt = jnp.asarray(prefix)[segment - 1] if prefix[1] == 1 else None
    for follower in (2, 3) if prefix_bt is not None else ():  # they go on where the prefix ends
        position += jnp.where(segment == follower, lengths[0], 0)
    real = (segment > 0)[..., None, None, None]
    inputs = tuple(jnp.concatenate(pair).astype(dtype) for pair in zip(qkv(576), qkv(576, seed=1), strict=True))
    weight = normal(np.random.default_rng(9), (2, 576, K, G, h)) * real

    def computed(inputs):
        attend = segment_attention(segment, position, window, prefix_bt)
        out, *gradients = value_and_gradients(
            lambda *qkv: attend(*qkv, None)[0], inputs, weight.astype(inputs[0].dtype)
        )
        return out * real, *gradients

    blocks = jax.jit(computed)(inputs)
    monkeypatch.setattr(attention, "LONGEST_DENSE", 576)
    # Of `computed` itself JAX would take the program that it has.
    whole = jax.jit(lambda inputs: computed(inputs))(tuple(x.astype(jnp.float32) for x in inputs))
    tolerance = {"rtol": 0, "atol": 2e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.05}
    for ours, expected in zip(blocks, whole, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, **tolerance)


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
    inputs, weight = qkv(256), normal(np.random.default_rng(9), (1, 256, K, G, h)) * real

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


# cuDNN, without a GPU -------------------------------------------------------------------------------------------------


FORWARD, BACKWARD = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"


def lowered_for_gpu(dtype, total=256, width=64, window=None) -> str:
    """The StableHLO of attention and its gradients, as a process with a GPU makes it."""
    segment, position = packed(total, (total // 2, total // 4))
    shapes = (1, total, K, G, width), (1, total, K, width), (1, total, K, width)

    def loss(*inputs):
        return segment_attention(segment, position, window)(*inputs, None)[0].astype(jnp.float32).sum()

    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        # JAX promises nothing about these calls for programs that are stored; this one is only read.
        calls = map(jax.export.DisabledSafetyCheck.custom_call, (FORWARD, BACKWARD))
        exported = jax.export.export(grad, platforms=["cuda"], disabled_checks=tuple(calls))(*inputs)
    return exported.mlir_module()


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX asks the library for its version before it makes a call to it, and this package asks the GPU for its own."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(gpu, "has_cudnn", lambda: True)


@pytest.mark.parametrize("window", [None, 40])
def test_cudnn_is_called_forward_and_backward(with_cudnn, window):
    text = lowered_for_gpu(jnp.bfloat16, window=window)
    assert text.count(f"@{FORWARD}(") == text.count(f"@{BACKWARD}(") == 1
    assert f"tensor<1x{K * G}x256x256x" not in text  # nobody keeps scores


@pytest.mark.parametrize(
    "unsuited", [{"dtype": jnp.float32}, {"total": 255}, {"width": 12}, {"width": 136}], ids=lambda x: next(iter(x))
)
def test_what_cudnn_does_not_take_goes_the_plain_path(with_cudnn, unsuited):
    assert "@__cudnn" not in lowered_for_gpu(**{"dtype": jnp.bfloat16} | unsuited)


@pytest.mark.parametrize(
    "capability, number", [("9.0", 9.0), ("10.3", 10.3), ("8.0", 8.0), ("7.5", 7.5), ("gfx942", 0.0)]
)
def test_what_gpus_can(monkeypatch, capability, number):
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert gpu.compute_capability() == number


@pytest.mark.parametrize("capability, called", [(8.0, True), (7.5, False)])
def test_cudnn_is_called_from_ampere_on(with_cudnn, monkeypatch, capability, called):
    monkeypatch.setattr(gpu, "compute_capability", lambda: capability)
    assert ("@__cudnn" in lowered_for_gpu(jnp.bfloat16)) is called


def test_without_cudnn_a_gpu_goes_the_plain_path():
    assert "@__cudnn" not in lowered_for_gpu(jnp.bfloat16)
