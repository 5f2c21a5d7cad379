"""The forward pass against itself in its other forms, and against properties its papers state."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.model import llama, shapes, weights
from lightning_jax.model.attention import segment_attention

GOLDENS = sorted(path.parent for path in pathlib.Path(__file__).parent.glob("goldens/*/config.json"))


def inputs(config, num_tokens=20, batch=2):
    token_bt = jax.random.randint(jax.random.key(1), (batch, num_tokens), 0, config.vocab_size)
    position_bt = jnp.broadcast_to(jnp.arange(num_tokens), token_bt.shape)
    return token_bt, position_bt, segment_attention(jnp.ones_like(token_bt), position_bt, config.sliding_window)


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)
def test_token_by_token_with_a_cache_is_the_whole_row(folder):
    """Unrolled layers and a growing cache, as a sampler runs them, give the scanned forward's hidden states."""
    config, params = weights.load_model(folder)
    num_tokens = 12  # more than the sliding families' window
    token_bt, position_bt, attend = inputs(config, num_tokens)
    forward = jax.jit(functools.partial(llama.forward, config=config, attend=attend))
    expected, none = forward(params, token_bt=token_bt, position_bt=position_bt)
    assert none is None

    @jax.jit
    def step(params, token_b, t, cache):
        def attend_cached(q_btkgh, k_btkh, v_btkh, cache):
            k_bskh, v_bskh = (
                jax.lax.dynamic_update_slice_in_dim(old, new, t, 1)
                for old, new in zip(cache, (k_btkh, v_btkh), strict=True)
            )
            distance_s = t - jnp.arange(num_tokens)
            mask_s = (distance_s >= 0) & (distance_s < (config.sliding_window or num_tokens))
            q_bthh = q_btkgh.reshape(*q_btkgh.shape[:2], -1, config.head_dim)
            out = jax.nn.dot_product_attention(q_bthh, k_bskh, v_bskh, mask=mask_s[None, None, None])
            return out.reshape(q_btkgh.shape), (k_bskh, v_bskh)

        position_bt = jnp.full((len(token_b), 1), t)
        return llama.forward(params, config, token_b[:, None], position_bt, attend_cached, cache)

    unstacked = llama.unstack_layers(params)
    empty = jnp.zeros((2, num_tokens, config.num_kv_heads, config.head_dim))
    cache = [(empty, empty)] * config.num_layers
    for t in range(num_tokens):
        x_btd, cache = step(unstacked, token_bt[:, t], t, cache)
        np.testing.assert_allclose(x_btd[:, 0], expected[:, t], rtol=0, atol=2e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_remat_changes_no_gradient(stacked):
    config, params = weights.load_model(GOLDENS[0])
    params = params if stacked else llama.unstack_layers(params)
    token_bt, position_bt, attend = inputs(config)

    def loss(params, remat):
        x_btd, _ = llama.forward(params, config, token_bt, position_bt, attend, remat=remat)
        return jax.nn.logsumexp(llama.unembed(params, config, x_btd), axis=-1).mean()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    expected = grad(params, None)
    for remat in llama.REMAT_POLICIES:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grad(params, remat), expected)


def test_rotary_positions_are_relative():
    """RoPE (arXiv:2104.09864, eq. 16): only differences of positions matter."""
    config, params = weights.load_model(next(folder for folder in GOLDENS if folder.name == "llama3_scaled"))
    token_bt, position_bt, attend = inputs(config)
    here, _ = llama.forward(params, config, token_bt, position_bt, attend)
    there, _ = llama.forward(params, config, token_bt, position_bt + 57, attend)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)
    stretched, _ = llama.forward(params, config, token_bt, position_bt * 3, attend)
    assert np.abs(here - stretched).max() > 0.1


def test_init_follows_the_abstract_tree():
    config = shapes.named_shape("tiny")
    specs = llama.abstract_params(config)
    params = llama.init_params(config, jax.random.key(0), jnp.bfloat16)
    jax.tree.map(
        lambda spec, leaf: (spec.shape, jnp.bfloat16) == (leaf.shape, leaf.dtype) or pytest.fail(), specs, params
    )
    # A model that knows nothing predicts nearly uniformly: its loss is about log V.
    token_bt, position_bt, attend = inputs(config, 64)
    params = llama.cast_params(params, jnp.float32)
    x_btd, _ = llama.forward(params, config, token_bt, position_bt, attend)
    logp_btv = jax.nn.log_softmax(llama.unembed(params, config, x_btd))
    nll = -jnp.take_along_axis(logp_btv[:, :-1], token_bt[:, 1:, None], -1).mean()
    assert abs(nll - np.log(config.vocab_size)) < 0.3


def test_bfloat16_stays_close_to_float32():
    """Norms, angles and softmax are float32, so bfloat16 weights cost about their own rounding."""
    config, params = weights.load_model(next(folder for folder in GOLDENS if folder.name == "qwen3"))
    token_bt, position_bt, attend = inputs(config)
    exact, _ = llama.forward(params, config, token_bt, position_bt, attend)
    half = llama.cast_params(params, jnp.bfloat16)
    x_btd, _ = llama.forward(half, config, token_bt, position_bt, attend)
    assert x_btd.dtype == jnp.bfloat16 and llama.unembed(half, config, x_btd).dtype == jnp.float32
    assert np.sqrt(np.mean((np.asarray(x_btd, np.float32) - exact) ** 2)) < 0.03 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize(
    "name, count",  # what the models' pages state
    [("llama3.2-1b", 1_235_814_400), ("llama3.2-3b", 3_212_749_824), ("smollm2-135m", 134_515_008)],
)
def test_named_shapes_have_the_published_size(name, count):
    config = shapes.named_shape(name)
    assert sum(int(np.prod(spec.shape)) for spec in jax.tree.leaves(llama.abstract_params(config))) == count
    assert hash(config) == hash(llama.LlamaConfig.from_hf(config.to_hf())) and config.from_hf(config.to_hf()) == config


def test_the_shape_tiny_is_the_model_that_ships():
    assert shapes.named_shape("tiny") == weights.load_config("builtin:tiny")


def test_rows_that_are_not_wanted_get_no_further_than_their_keys_and_values():
    config, params = weights.load_model("builtin:tiny")
    params, arguments, wanted_n = llama.unstack_layers(params), inputs(config, batch=8), jnp.array([5, 0])

    def hidden(params, wanted_n):
        return llama.forward(params, config, *arguments, wanted_n=wanted_n)[0]

    whole, some = (jax.jit(hidden).lower(params, wanted).compile() for wanted in (None, wanted_n))
    np.testing.assert_allclose(some(params, wanted_n), whole(params, None)[wanted_n], rtol=0, atol=1e-5)
    layer = params["layers"][0]
    saved = 2 * 6 * arguments[0].shape[1] * sum(layer[name].size for name in ("o_kghd", "gate_df", "up_df", "down_fd"))
    assert whole.cost_analysis()["flops"] - some.cost_analysis()["flops"] == pytest.approx(saved, rel=0.1)


def test_unstacked_layers_are_traced_once(monkeypatch):
    config, params = weights.load_model("builtin:tiny")
    traced = []
    monkeypatch.setattr(llama, "_block", lambda *args, block=llama._block: traced.append(args) or block(*args))
    jax.eval_shape(lambda params: llama.forward(params, config, *inputs(config)), llama.unstack_layers(params))
    assert config.num_layers > 1 and len(traced) == 1


def test_a_cache_needs_unstacked_layers():
    config, params = weights.load_model(GOLDENS[0])
    for of_layers in ({"cache": [None] * config.num_layers}, {"wanted_n": jnp.array([0])}):
        with pytest.raises(ValueError, match="unstack_layers"):
            llama.forward(params, config, *inputs(config), **of_layers)
