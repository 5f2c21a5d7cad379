"""The Llama family: one forward pass, shared by the learner and the sampler.

Axes, everywhere in this package: `B` batch, `T` query position, `S` key position, `L` layer, `D` model width, `F`
feed-forward width, `H` query heads, `K` key/value heads, `G` query heads per key/value head, `h` head width, `V`
vocabulary, `P` page. A name ends in its axes: `x_btd` is [B, T, D].

Parameters are a plain pytree. In the master form every leaf of `params["layers"]` has a leading axis `L`, and the
forward pass scans over it (fast to compile, what training wants). `unstack_layers` gives a list of layers instead, and
then the forward pass is unrolled and threads one cache per layer (no copy of a stacked cache, what decoding wants).
How queries meet keys is the caller's: `attend` is segment-masked attention in the learner, paged attention in the
sampler.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lightning_jax import mesh
from lightning_jax.model.config import LlamaConfig, RopeScaling

__all__ = [
    "Attend",
    "LlamaConfig",
    "ParamSpec",
    "RopeScaling",
    "abstract_params",
    "adapter_names",
    "cast_outer_params",
    "cast_params",
    "forward",
    "init_params",
    "init_specs",
    "rope_frequencies",
    "turn_matrices",
    "unembed",
    "unstack_layers",
]

Params = dict[str, Any]
# (q_btkgh, k_btkh, v_btkh, cache of this layer) -> (out_btkgh, the cache's successor)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

_PART_INPUTS, _FEW_ROWS = 512, 64  # see `_turned_product`

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter before it exists; shapes, shardings and initial values all derive from it."""

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]  # one name per axis; `mesh.py` maps names to mesh axes
    init: Callable[..., jax.Array]  # (key, shape, dtype) -> array


def abstract_params(config: LlamaConfig) -> dict[str, Any]:
    """The tree of `ParamSpec` that a model with this config has, in the master (stacked) form."""
    c = config
    k, g, h = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
    ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros

    def normal(fan_in: int) -> Callable[..., jax.Array]:
        return jax.nn.initializers.normal(fan_in**-0.5)

    def layer(shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable[..., jax.Array]) -> ParamSpec:
        return ParamSpec((c.num_layers, *shape), ("layers", *axes), init)

    residual = 2 * c.num_layers  # sums into the residual stream; GPT-2 divides their variance by it
    layers = {
        "attn_norm_d": layer((c.hidden_size,), ("embed",), ones),
        "q_dkgh": layer((c.hidden_size, k, g, h), ("embed", "kv_heads", None, None), normal(c.hidden_size)),
        "k_dkh": layer((c.hidden_size, k, h), ("embed", "kv_heads", None), normal(c.hidden_size)),
        "v_dkh": layer((c.hidden_size, k, h), ("embed", "kv_heads", None), normal(c.hidden_size)),
        "o_kghd": layer((k, g, h, c.hidden_size), ("kv_heads", None, None, "embed"), normal(k * g * h * residual)),
        "mlp_norm_d": layer((c.hidden_size,), ("embed",), ones),
        "gate_df": layer((c.hidden_size, c.intermediate_size), ("embed", "mlp"), normal(c.hidden_size)),
        "up_df": layer((c.hidden_size, c.intermediate_size), ("embed", "mlp"), normal(c.hidden_size)),
        "down_fd": layer(
            (c.intermediate_size, c.hidden_size), ("mlp", "embed"), normal(c.intermediate_size * residual)
        ),
    }
    if c.attention_bias:
        layers["q_bias_kgh"] = layer((k, g, h), ("kv_heads", None, None), zeros)
        layers["k_bias_kh"] = layer((k, h), ("kv_heads", None), zeros)
        layers["v_bias_kh"] = layer((k, h), ("kv_heads", None), zeros)
    if c.qk_norm:
        layers["q_norm_h"] = layer((h,), (None,), ones)
        layers["k_norm_h"] = layer((h,), (None,), ones)
    params: dict[str, Any] = {
        "embed_vd": ParamSpec((c.vocab_size, c.hidden_size), ("vocab", "embed"), jax.nn.initializers.normal(0.02)),
        "layers": layers,
        "final_norm_d": ParamSpec((c.hidden_size,), ("embed",), ones),
    }
    if not c.tie_embeddings:
        params["unembed_dv"] = ParamSpec((c.hidden_size, c.vocab_size), ("embed", "vocab"), normal(c.hidden_size))
    return params


def init_params(config: LlamaConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random parameters in the master form; jit it with `out_shardings` to make a large model in place."""
    return init_specs(abstract_params(config), key, dtype)


def init_specs(specs: dict[str, Any], key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random parameters for a tree of `ParamSpec`."""
    specs, treedef = jax.tree.flatten(specs)
    keys = jax.random.split(key, len(specs))
    return treedef.unflatten([spec.init(k, spec.shape, dtype) for spec, k in zip(specs, keys, strict=True)])


def unstack_layers(params: Params) -> Params:
    """The same parameters with `layers` as a list of `L` dicts, which `forward` unrolls."""
    num_layers = len(params["layers"]["attn_norm_d"])
    return params | {"layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(num_layers)]}


def turn_matrices(params: Params) -> Params:
    """Unstacked parameters with every matrix stored the other way round, outputs first, and in parts of its inputs.

    `gate_fd` for `gate_df` is a list of [F, 512] and what is left, as is `embed_vd`. `forward` and `unembed` take
    either form. There must be no adapters.
    """

    def parts(w_oi: jax.Array) -> list[jax.Array]:
        return [w_oi[..., first : first + _PART_INPUTS] for first in range(0, w_oi.shape[-1], _PART_INPUTS)]

    def turned(leaves: Params) -> Params:
        new = {}
        for name, leaf in leaves.items():
            if name == "embed_vd":
                new[name] = parts(leaf)
            elif "norm" in name or "bias" in name:
                new[name] = leaf
            else:
                w_io = leaf.reshape(-1, *leaf.shape[_num_inputs(name) :])
                new[_turned(name)] = parts(jnp.moveaxis(w_io, 0, -1))
        return new

    top = {name: leaf for name, leaf in params.items() if name != "layers"}
    return turned(top) | {"layers": [turned(layer) for layer in params["layers"]]}


def cast_params(params: Params, dtype: jnp.dtype) -> Params:
    """All parameters in the dtype to compute in."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def cast_outer_params(params: Params, dtype: jnp.dtype) -> Params:
    """All but the layers' in the dtype to compute in; those `forward` casts, a layer at a time."""
    return params | cast_params({name: leaf for name, leaf in params.items() if name != "layers"}, dtype)


def forward(
    params: Params,
    config: LlamaConfig,
    token_bt: jax.Array,
    position_bt: jax.Array,
    attend: Attend,
    cache: Any = None,
    *,
    rope: tuple[jax.Array, jax.Array] | None = None,
    wanted_n: jax.Array | None = None,
    remat: str | None = None,
) -> tuple[jax.Array, Any]:
    """Token ids to the final hidden states. Computes in the dtype of `params`; norms and rotary angles in float32.

    Args:
        params: stacked (scanned, `cache` must be None) or with a list of layers (unrolled).
        token_bt: [B, T] int32.
        position_bt: [B, T] int32, each token's position in its own sequence.
        attend: attention over this call's keys and whatever `cache` holds; it also applies the masks.
        cache: None, or a list with one entry per layer, given to `attend` and replaced by what it returns.
        rope: `rope_angles` of the positions, if they are known already.
        wanted_n: [N] int, the rows whose hidden states are wanted, with unstacked layers; None for all. In the last
            layer the others get no further than their keys and values.
        remat: None, or a key of `REMAT_POLICIES`: what the backward pass keeps of each layer.

    Returns:
        x_btd: [B, T, D], or [N, T, D] of the wanted rows, after the final norm; `unembed` makes logits of it.
        The list of the layers' new caches, or None when `cache` was None.
    """
    layers = params["layers"]
    if rope is None:
        rope = (rope_angles if isinstance(layers, dict) else _rope_angles_once)(config, position_bt)

    def block(x_btd: jax.Array, layer: Params, layer_cache: Any, wanted_n: jax.Array | None = None):
        # Cast one by one: of masters in float32 there is no copy of all layers, nor of their gradients.
        return _block(config, cast_params(layer, x_btd.dtype), x_btd, rope, attend, layer_cache, wanted_n)

    if remat is not None:
        # Inside a scan nothing can be merged across the barrier that prevent_cse makes, which costs fusion.
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=not isinstance(layers, dict))

    with jax.named_scope("embed"):
        embed_vd = params["embed_vd"]
        if cache is None:  # the batch is divided, and weights are gathered; few rows go to the weights instead
            # Looked up in shards of columns it would be moved twice.
            embed_vd = jax.tree.map(lambda part_vd: mesh.constrain(part_vd, "vocab", None), embed_vd)
        x_btd = jnp.concatenate([part_vd[token_bt] for part_vd in jax.tree.leaves(embed_vd)], axis=-1)
        if cache is None:
            x_btd = mesh.constrain(x_btd, "batch", None, None)
    if isinstance(layers, dict):
        if cache is not None or wanted_n is not None:
            raise ValueError("a cache and a choice of rows need unstacked layers; see unstack_layers")
        # A loop stacks what its backward pass needs, and also what XLA would rather compute again.
        unroll = remat is None and mesh.platform() == "gpu"
        x_btd, _ = jax.lax.scan(lambda x, layer: (block(x, layer, None)[0], None), x_btd, layers, unroll=unroll)
    else:
        block = jax.jit(block)  # traced and lowered once for all layers; XLA inlines it
        caches = []
        for i, (layer, layer_cache) in enumerate(zip(layers, cache or [None] * len(layers), strict=True), 1):
            x_btd, layer_cache = block(x_btd, layer, layer_cache, wanted_n if i == len(layers) else None)
            caches.append(layer_cache)
        cache = caches if cache is not None else None
    with jax.named_scope("final_norm"):
        return _rms_norm(x_btd, params["final_norm_d"], config.rms_norm_eps), cache


def unembed(params: Params, config: LlamaConfig, x: jax.Array) -> jax.Array:
    """Logits in float32, [..., V], of hidden states [..., D]; the product itself is in the dtype of `x`."""
    with jax.named_scope("unembed"):
        turned = params.get("embed_vd" if config.tie_embeddings else "unembed_vd")
        if isinstance(turned, list):
            return _turned_product(x, turned)
        axes, w = ("vd", turned) if config.tie_embeddings else ("dv", params["unembed_dv"])
        return jnp.einsum(f"...d,{axes}->...v", x, w, preferred_element_type=jnp.float32)


def _block(
    config: LlamaConfig,
    layer: Params,
    x_btd: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    attend: Attend,
    cache: Any,
    wanted_n: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); of the wanted rows."""
    with jax.named_scope("attention"):
        y_btd = _rms_norm(x_btd, layer["attn_norm_d"], config.rms_norm_eps)
        q_btkgh = _project("btd,dkgh->btkgh", y_btd, layer, "q_dkgh")
        k_btkh = _project("btd,dkh->btkh", y_btd, layer, "k_dkh")
        v_btkh = _project("btd,dkh->btkh", y_btd, layer, "v_dkh")
        if config.attention_bias:
            q_btkgh, k_btkh, v_btkh = (
                q_btkgh + layer["q_bias_kgh"],
                k_btkh + layer["k_bias_kh"],
                v_btkh + layer["v_bias_kh"],
            )
        if config.qk_norm:
            q_btkgh = _rms_norm(q_btkgh, layer["q_norm_h"], config.rms_norm_eps)
            k_btkh = _rms_norm(k_btkh, layer["k_norm_h"], config.rms_norm_eps)
        q_btkgh, k_btkh = _rotate(q_btkgh, rope), _rotate(k_btkh, rope)
        out_btkgh, cache = attend(q_btkgh, k_btkh, v_btkh, cache)
        if wanted_n is not None:
            x_btd, out_btkgh = x_btd[wanted_n], out_btkgh[wanted_n]
        x_btd = x_btd + _project("btkgh,kghd->btd", out_btkgh.astype(x_btd.dtype), layer, "o_kghd")
    with jax.named_scope("mlp"):
        y_btd = _rms_norm(x_btd, layer["mlp_norm_d"], config.rms_norm_eps)
        gate_btf = _project("btd,df->btf", y_btd, layer, "gate_df")
        up_btf = _project("btd,df->btf", y_btd, layer, "up_df")
        if _turned("down_fd") in layer and _are_few(x_btd):  # between products that have and take features first
            hidden_btf = (jax.nn.silu(gate_btf.T) * up_btf.T).T
        else:
            hidden_btf = jax.nn.silu(gate_btf) * up_btf
        x_btd = x_btd + _project("btf,fd->btd", hidden_btf, layer, "down_fd")
    return x_btd, cache


def _project(axes: str, x: jax.Array, layer: Params, name: str) -> jax.Array:
    """x W, and (x A) B more where the matrix has an adapter (see `lora.py`); `axes` are those of x W."""
    if (turned := _turned(name)) in layer:
        return _turned_product(x.reshape(*x.shape[:2], -1), layer[turned]).astype(x.dtype)
    w, cut = layer[name], _num_inputs(name)
    # As a product of two matrices: XLA's CPU compiler would turn the gradient round, a sum over two axes.
    inputs = math.prod(w.shape[:cut])
    product = (x.reshape(-1, inputs) @ w.reshape(inputs, -1)).reshape(*x.shape[:2], *w.shape[cut:])
    a, b = adapter_names(name)
    if a not in layer:
        return product
    x_axes, out_axes = axes.split(",")[0], axes.split("->")[1]
    low_rank = jnp.einsum(f"{x_axes},{a.rpartition('_')[2]}->btr", x, layer[a])
    return product + jnp.einsum(f"btr,{b.rpartition('_')[2]}->{out_axes}", low_rank, layer[b])


def _turned_product(x: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """x W in float32, [..., O], of x [..., I] and what `turn_matrices` makes of W.

    For XLA's CPU library, which packs the second operand at each call: of few rows and a matrix, that is to be the
    rows. And it sums more than 512 inputs in parts, whose length depends on the number of rows where there are fewer
    than 64. In parts of its own a row has the same sums, to the last bit, beside any number of others.
    """
    x_ni = x.reshape(-1, x.shape[-1])
    w_oi_parts = [w.reshape(-1, w.shape[-1]) for w in parts]
    ends = [i * _PART_INPUTS for i in range(1, len(parts))]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if _are_few(x):  # without the barriers XLA may exchange the operands again, or pick each part from `x_ni`
        x_in = jax.lax.optimization_barrier(x_ni.T)
        products = [product("oi,in->on", *pair) for pair in zip(w_oi_parts, jnp.split(x_in, ends), strict=True)]
        product_no = jax.lax.optimization_barrier(functools.reduce(jnp.add, products)).T
    else:
        products = [product("ni,oi->no", *pair) for pair in zip(jnp.split(x_ni, ends, axis=1), w_oi_parts, strict=True)]
        product_no = functools.reduce(jnp.add, products)
    return product_no.reshape(*x.shape[:-1], *parts[0].shape[:-1])


def _are_few(x: jax.Array) -> bool:
    return math.prod(x.shape[:-1]) <= _FEW_ROWS


def adapter_names(name: str) -> tuple[str, str]:
    """Names of a matrix's adapter: ("q_a_dr", "q_b_rkgh") of "q_dkgh"."""
    stem, axes, cut = name.rpartition("_")[0], _axes(name), _num_inputs(name)
    return f"{stem}_a_{axes[:cut]}r", f"{stem}_b_r{axes[cut:]}"


def _turned(name: str) -> str:
    """The name of a matrix that is stored outputs first: "q_kghd" of "q_dkgh"."""
    stem, axes, cut = name.rpartition("_")[0], _axes(name), _num_inputs(name)
    return f"{stem}_{axes[cut:]}{axes[:cut]}"


def _axes(name: str) -> str:
    return name.rpartition("_")[2]


def _num_inputs(name: str) -> int:
    """How many of a matrix's first axes it is multiplied over: "d", or all but "d"."""
    axes = _axes(name)
    return 1 if axes[0] == "d" else len(axes) - 1


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (arXiv:1910.07467), in float32, result in the dtype of `x`."""
    x_f32 = x.astype(jnp.float32)
    x_f32 = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + eps)
    return x_f32.astype(x.dtype) * scale


def rope_frequencies(config: LlamaConfig, xp: Any = jnp) -> jax.Array:
    """Rotary frequencies, [h / 2] float32, radians per position (arXiv:2104.09864; Llama 3.1's scaling).

    `xp` is the array module to compute with: `numpy` where no device is to be touched.
    """
    freq = config.rope_theta ** -(xp.arange(0, config.head_dim, 2, dtype=xp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.original_max_position_embeddings is None:
        return freq / scaling.factor
    turns = scaling.original_max_position_embeddings * freq / (2 * xp.pi)  # over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = xp.clip(keep, 0.0, 1.0)
    return keep * freq + (1 - keep) * freq / scaling.factor


def rope_angles(config: LlamaConfig, position_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of each position's angles, [B, T, h / 2] float32."""
    angle_bth = position_bt[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.sin(angle_bth), jnp.cos(angle_bth)


def _rope_angles_once(config: LlamaConfig, position_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`rope_angles` for unrolled layers. Of XLA's compilers the CPU's would compute them anew for each layer and head,
    unless they are found under a condition that it does not know to hold.
    """
    angles = functools.partial(rope_angles, config)
    if mesh.platform() != "cpu":
        return angles(position_bt)
    zeros_bth = jnp.zeros((*position_bt.shape, config.head_dim // 2), jnp.float32)
    return jax.lax.cond(jnp.all(position_bt >= 0), angles, lambda _: (zeros_bth, zeros_bth), position_bt)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates (x[i], x[i + h/2]) by the position's angle i; `x` is [B, T, ..., h], result in its dtype."""
    heads = tuple(range(2, x.ndim - 1))
    sin, cos = (jnp.expand_dims(part, heads) for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
