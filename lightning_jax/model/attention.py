"""Attention over packed rows: several sequences side by side in one row, told apart by segment ids.

`segment_attention` chooses by platform: a flash attention kernel on TPU (Splash, which comes with JAX) and on GPU
(cuDNN's), where they take the shapes, and everywhere else the plain path, which is also what they are tested against.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lightning_jax import gpu
from lightning_jax import mesh as mesh_lib
from lightning_jax.model.llama import Attend

LONGEST_DENSE = 512  # tokens of a row whose scores are all computed at once
SCORE_BLOCK = 256  # the most queries and keys of a block of scores of a longer one
_QUERY_UNIT = 64  # of which those are a multiple
NEAR_QUERIES = 32  # that are computed with the same keys, where rows hold many short sequences


class Reach(NamedTuple):
    """How many tokens of its row a query sees at the most: other arrays' shapes, so it is static."""

    own: int  # of its own sequence before it; a multiple of NEAR_QUERIES, as the other
    prefix: int  # of the prefix it shares

    @property
    def keys(self) -> int:
        """That each query meets."""
        return self.own + NEAR_QUERIES + self.prefix


def segment_attention(
    segment_bt: jax.Array,
    position_bt: jax.Array,
    sliding_window: int | None = None,
    prefix_bt: jax.Array | None = None,
    reach: Reach | None = None,
) -> Attend:
    """Causal attention within segments, for whole rows (no cache).

    Args:
        segment_bt: [B, T] int32, the sequence each token belongs to; 0 for padding, which no other token sees.
        position_bt: [B, T] int32, positions within the sequence; a query sees keys at its own position and before.
        sliding_window: how many positions a query sees, itself included; None for all.
        prefix_bt: [B, T] int32, the segment before it in the row that each token sees beside its own, or its own: what
            several sequences begin with is there once. None where no sequences share anything.
        reach: one that `takes_reach`, of rows in which sequences with the same prefix stand together; None to let a
            query meet all of its row, or, of a long row, the blocks in which somebody sees somebody.

    A sequence's tokens stand in their row in the order of their positions, side by side but for what is shared, as
    packing puts them.

    Returns:
        An `attend` for `llama.forward`; softmax in float32.
    """
    query = (segment_bt, position_bt) + (() if prefix_bt is None else (prefix_bt,))

    def sees(query: tuple[jax.Array, ...], key_segment_bs: jax.Array, key_position_bs: jax.Array) -> jax.Array:
        query_segment_bt, query_position_bt, *query_prefix = query
        distance_bts = query_position_bt[:, :, None] - key_position_bs[:, None, :]
        mask_bts = query_segment_bt[:, :, None] == key_segment_bs[:, None, :]
        for query_prefix_bt in query_prefix:
            mask_bts |= query_prefix_bt[:, :, None] == key_segment_bs[:, None, :]
        mask_bts &= distance_bts >= 0
        if sliding_window is not None:
            mask_bts &= distance_bts < sliding_window
        return mask_bts

    def attend(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, cache: None) -> tuple[jax.Array, None]:
        if prefix_bt is None and (kernel := _kernel(q_btkgh)):
            return kernel(q_btkgh, k_bskh, v_bskh, segment_bt, sliding_window), cache
        if prefix_bt is not None and sliding_window is None and _kernel(q_btkgh) is cudnn_attention:
            return cudnn_attention(q_btkgh, k_bskh, v_bskh, segment_bt, None, prefix_bt=prefix_bt), cache

        if reach is not None:
            return _near_attention(q_btkgh, k_bskh, v_bskh, query, sees, reach), cache

        t = segment_bt.shape[1]
        if t <= LONGEST_DENSE or t % _QUERY_UNIT:
            return _masked_attention(q_btkgh, k_bskh, v_bskh, sees(query, segment_bt, position_bt)), cache
        return _blockwise_attention(q_btkgh, k_bskh, v_bskh, query, sees), cache

    return attend


def _masked_attention(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, mask_bts: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(h)) v where the mask is True; every query must see a key.

    As products of matrices, one for each key/value head, whose scores have the keys last: of other forms XLA's CPU
    compiler makes products with the keys first, and turns the scores round before and after the softmax.
    """
    b, t, k, g, h = q_btkgh.shape
    q_bkxh = jnp.moveaxis(q_btkgh, 1, 3).reshape(b, k, g * t, h)
    k_bksh, v_bksh = jnp.moveaxis(k_bskh, 1, 2), jnp.moveaxis(v_bskh, 1, 2)
    score_bkxs = jnp.einsum("bkxh,bksh->bkxs", q_bkxh, k_bksh, preferred_element_type=jnp.float32)
    score_bkgts = score_bkxs.reshape(b, k, g, t, -1) * h**-0.5
    score_bkgts = jnp.where(mask_bts[:, None, None], score_bkgts, jnp.finfo(jnp.float32).min)
    weight_bkgts = jax.nn.softmax(score_bkgts, axis=-1).astype(v_bskh.dtype)
    out_bkxh = jnp.einsum("bkxs,bksh->bkxh", weight_bkgts.reshape(score_bkxs.shape), v_bksh)
    return jnp.moveaxis(out_bkxh.reshape(b, k, g, t, h), 3, 1)


def _blockwise_attention(
    q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, query: tuple[jax.Array, ...], sees: Callable
) -> jax.Array:
    """`_masked_attention` of long rows, in which no query sees a key behind it: a block of scores at a time."""
    of_row = _row_attention(sees)

    def attend(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, *query: jax.Array) -> jax.Array:
        _, t, k, g, h = q_btkgh.shape
        c = max(n for n in range(_QUERY_UNIT, SCORE_BLOCK + 1, _QUERY_UNIT) if t % n == 0)

        def row(arrays: tuple) -> jax.Array:
            q_tkgh, k_skh, v_skh, query = arrays
            q_nkxh = jnp.moveaxis(q_tkgh.reshape(-1, c, k, g, h), 1, 3).reshape(-1, k, g * c, h)
            k_nksh, v_nksh = (jnp.moveaxis(x_skh.reshape(-1, c, k, h), 1, 2) for x_skh in (k_skh, v_skh))
            out_nkxh = of_row(q_nkxh, k_nksh, v_nksh, tuple(x_t.reshape(-1, c) for x_t in query))
            return jnp.moveaxis(out_nkxh.reshape(-1, k, g, c, h), 3, 1).reshape(t, k, g, h)

        return jax.lax.map(row, (q_btkgh, k_bskh, v_bskh, query))

    rows, heads = mesh_lib.axes_of(q_btkgh.shape[0], "batch"), mesh_lib.axes_of(q_btkgh.shape[2], "kv_heads")
    spec = PartitionSpec(rows, None, heads)
    in_specs = (spec, spec, spec, *(PartitionSpec(rows) for _ in query))
    return mesh_lib.on_each_device(attend, in_specs=in_specs, out_specs=spec)(q_btkgh, k_bskh, v_bskh, *query)


def _row_attention(sees: Callable) -> Callable:
    """Attention of one row of N blocks of c tokens, given as [N, K, G * c, h] and twice [N, K, c, h], with its [N, c].

    FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithms 1 and 2) without the blocks in which nobody sees
    anybody: forwards softmax is corrected as larger scores come, backwards the scores are computed anew.
    """
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def mask_of(query_nc: tuple[jax.Array, ...], i: jax.Array, j: jax.Array) -> jax.Array:
        of_query = [x_nc[i][None] for x_nc in query_nc]
        return sees(of_query, query_nc[0][j][None], query_nc[1][j][None])[0]

    def scores(q_kxh: jax.Array, k_ksh: jax.Array, mask_ts: jax.Array) -> jax.Array:
        score_kxs = dot("kxh,ksh->kxs", q_kxh, k_ksh) * q_kxh.shape[-1] ** -0.5
        score_kgts = score_kxs.reshape(len(score_kxs), -1, *mask_ts.shape)
        return jnp.where(mask_ts, score_kgts, -jnp.inf).reshape(score_kxs.shape)

    @jax.custom_vjp
    def of_row(q_nkxh: jax.Array, k_nksh: jax.Array, v_nksh: jax.Array, query_nc: tuple[jax.Array, ...]) -> jax.Array:
        return forward(q_nkxh, k_nksh, v_nksh, query_nc)[0]

    def forward(q_nkxh: jax.Array, k_nksh: jax.Array, v_nksh: jax.Array, query_nc: tuple[jax.Array, ...]) -> tuple:
        def of_queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            def of_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                mask_ts = mask_of(query_nc, i, j)

                def seen(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    most_kx, sum_kx, out_kxh = carry
                    score_kxs = scores(q_nkxh[i], k_nksh[j], mask_ts)
                    new_kx = jnp.maximum(most_kx, score_kxs.max(axis=-1))
                    kept_kx, weight_kxs = jnp.exp(most_kx - new_kx), jnp.exp(score_kxs - new_kx[..., None])
                    more_kxh = dot("kxs,ksh->kxh", weight_kxs.astype(v_nksh.dtype), v_nksh[j])
                    return new_kx, kept_kx * sum_kx + weight_kxs.sum(axis=-1), kept_kx[..., None] * out_kxh + more_kxh

                return jax.lax.cond(mask_ts.any(), seen, lambda carry: carry, carry)

            out_kxh = jnp.zeros(q_nkxh.shape[1:], jnp.float32)
            begin = jnp.full_like(out_kxh[..., 0], jnp.finfo(jnp.float32).min), out_kxh[..., 0], out_kxh
            most_kx, sum_kx, out_kxh = jax.lax.fori_loop(0, i + 1, of_keys, begin)
            return (out_kxh / sum_kx[..., None]).astype(v_nksh.dtype), most_kx + jnp.log(sum_kx)

        out_nkxh, logsum_nkx = jax.lax.map(of_queries, jnp.arange(len(q_nkxh)))
        return out_nkxh, (q_nkxh, k_nksh, v_nksh, query_nc, out_nkxh, logsum_nkx)

    def backward(saved: tuple, d_out_nkxh: jax.Array) -> tuple:
        q_nkxh, k_nksh, v_nksh, query_nc, out_nkxh, logsum_nkx = saved
        inner_nkx = (d_out_nkxh.astype(jnp.float32) * out_nkxh).sum(axis=-1)

        def of_queries(d_keys: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple, jax.Array]:
            q_kxh, d_out_kxh = q_nkxh[i], d_out_nkxh[i]

            def of_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                d_q_kxh, d_k_nksh, d_v_nksh = carry
                mask_ts = mask_of(query_nc, i, j)

                def seen() -> tuple[jax.Array, ...]:
                    weight_kxs = jnp.exp(scores(q_kxh, k_nksh[j], mask_ts) - logsum_nkx[i][..., None])
                    d_weight_kxs = dot("kxh,ksh->kxs", d_out_kxh, v_nksh[j])
                    d_score_kxs = weight_kxs * (d_weight_kxs - inner_nkx[i][..., None]) * q_kxh.shape[-1] ** -0.5
                    d_score_kxs, weight_kxs = d_score_kxs.astype(q_kxh.dtype), weight_kxs.astype(q_kxh.dtype)
                    d_k_ksh = dot("kxs,kxh->ksh", d_score_kxs, q_kxh)
                    d_v_ksh = dot("kxs,kxh->ksh", weight_kxs, d_out_kxh)
                    return dot("kxs,ksh->kxh", d_score_kxs, k_nksh[j]), d_k_ksh, d_v_ksh

                nothing = jax.tree.map(jnp.zeros_like, (d_q_kxh, d_k_nksh[0], d_v_nksh[0]))
                more_kxh, d_k_ksh, d_v_ksh = jax.lax.cond(mask_ts.any(), seen, lambda: nothing)
                return d_q_kxh + more_kxh, d_k_nksh.at[j].add(d_k_ksh), d_v_nksh.at[j].add(d_v_ksh)

            begin = jnp.zeros(q_kxh.shape, jnp.float32), *d_keys
            d_q_kxh, *d_keys = jax.lax.fori_loop(0, i + 1, of_keys, begin)
            return tuple(d_keys), d_q_kxh.astype(q_kxh.dtype)

        nothing = jnp.zeros(k_nksh.shape, jnp.float32), jnp.zeros(v_nksh.shape, jnp.float32)
        (d_k_nksh, d_v_nksh), d_q_nkxh = jax.lax.scan(of_queries, nothing, jnp.arange(len(q_nkxh)))
        d_query = jax.tree.map(lambda x_nc: np.zeros(x_nc.shape, jax.dtypes.float0), query_nc)
        return d_q_nkxh, d_k_nksh.astype(k_nksh.dtype), d_v_nksh.astype(v_nksh.dtype), d_query

    of_row.defvjp(forward, backward)
    return of_row


def _near_attention(
    q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, query: tuple[jax.Array, ...], sees: Callable, reach: Reach
) -> jax.Array:
    """`_masked_attention` of each block of queries with the keys that `reach` leaves it.

    Those are its own and `reach.own` before it, and the prefix of its first query: a later query's is the same one, or
    begins inside what is there already.
    """
    segment_bt, position_bt, *prefix = query
    b, t = segment_bt.shape
    first_n = np.arange(0, t, NEAR_QUERIES)
    if reach.prefix:
        begin_bn = jnp.argmax(segment_bt[:, None, :] == prefix[0][:, ::NEAR_QUERIES, None], axis=-1)

    def near(x_bt: jax.Array, fill: int = 0) -> jax.Array:
        """[B * N, S, ...] of [B, T, ...]: what belongs to the keys of each block of queries."""
        padded = jnp.pad(x_bt, ((0, 0), (reach.own, 0), *((0, 0),) * (x_bt.ndim - 2)), constant_values=fill)
        shape = (b, len(first_n), NEAR_QUERIES, *x_bt.shape[2:])
        parts = [padded[:, i : i + t].reshape(shape) for i in range(0, reach.own + 1, NEAR_QUERIES)]
        if reach.prefix:
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=reach.prefix)
            parts.insert(0, jax.vmap(jax.vmap(cut, (None, 0)))(x_bt, begin_bn))
        return jnp.concatenate(parts, axis=2).reshape(b * len(first_n), -1, *x_bt.shape[2:])

    # What of the prefix is among the tokens before the block as well counts once.
    place_ns = near(jnp.broadcast_to(jnp.arange(t), (b, t)), fill=-1)
    is_before_ns = place_ns < (np.tile(first_n, b) - reach.own)[:, None]
    counts_ns = is_before_ns | (np.arange(place_ns.shape[1]) >= reach.prefix)
    key_segment_ns = jnp.where(counts_ns, near(segment_bt, fill=-1), -1)
    query_nt = [x_bt.reshape(-1, NEAR_QUERIES) for x_bt in query]
    mask_nts = sees(query_nt, key_segment_ns, near(position_bt))
    q_ntkgh = q_btkgh.reshape(-1, NEAR_QUERIES, *q_btkgh.shape[2:])
    return _masked_attention(q_ntkgh, near(k_bskh), near(v_bskh), mask_nts).reshape(q_btkgh.shape)


def takes_reach(reach: Reach, length: int) -> bool:
    """Whether rows of `length` tokens are computed with it."""
    # More keys would be more scores at once than LONGEST_DENSE allows.
    is_less = reach.keys <= min(LONGEST_DENSE, 0.75 * length)
    return is_less and length % NEAR_QUERIES == 0 and mesh_lib.platform() == "cpu"


def takes_prefixes(sliding_window: int | None) -> bool:
    """Whether sequences that share a prefix are as fast here as others.

    Splash compares segments' numbers alone, and cuDNN measures a window along the row: they would leave such rows to
    the plain path.
    """
    return mesh_lib.platform() == "cpu" or (mesh_lib.platform() == "gpu" and sliding_window is None)


def length_unit() -> int:
    """Rows a multiple of this long are computed as fast as those of a power of two."""
    return _SPLASH_BLOCK if mesh_lib.platform() == "tpu" else _QUERY_UNIT


# Kernels --------------------------------------------------------------------------------------------------------------


def _kernel(q_btkgh: jax.Array) -> Callable | None:
    """The kernel for these queries on the current platform; None for the plain path."""
    platform, (_, t, _, _, h) = mesh_lib.platform(), q_btkgh.shape
    if platform == "tpu" and t % _SPLASH_UNIT == 0:
        return splash_attention
    if platform == "gpu" and _cudnn_takes(q_btkgh.dtype, t, h):
        return cudnn_attention
    return None


def _cudnn_takes(dtype: jnp.dtype, t: int, h: int) -> bool:
    """Whether its flash kernel does, with a bias and a backward pass; wider heads it takes on some GPUs alone."""
    takes = dtype in (jnp.bfloat16, jnp.float16) and t % 2 == 0 and h % 8 == 0 and h <= 128
    return takes and gpu.compute_capability() >= 8.0 and gpu.has_cudnn()  # the kernel is of Ampere's generation


_SPLASH_UNIT = 128  # a block's tokens are a multiple of the TPU's lanes
_SPLASH_BLOCK = 512


def splash_attention(
    q_btkgh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_bt: jax.Array,
    sliding_window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments by JAX's Splash kernel for TPU, its backward pass too.

    Nothing of the size [T, T] is kept, and blocks above the diagonal are not computed. The kernel's interface is
    experimental; only this function knows it.

    Args:
        q_btkgh, k_bskh, v_bskh: T must be a multiple of 128.
        segment_bt: [B, T] int32.
        sliding_window: as in `segment_attention`.
        interpret: run it without a TPU, slowly.

    Returns:
        [B, T, K, G, h] in the dtype of the values.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    b, t, k, g, h = q_btkgh.shape
    block = _SPLASH_BLOCK if t % _SPLASH_BLOCK == 0 else _SPLASH_UNIT
    mask = splash.CausalMask((t, t))
    if sliding_window is not None:
        mask = splash.LocalMask((t, t), window_size=(sliding_window - 1, 0), offset=0)

    def attend(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, segment_bt: jax.Array) -> jax.Array:
        b, t, k, g, h = q_btkgh.shape
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * (k * g)),
            block_sizes=splash.BlockSizes(
                **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), block),
                use_fused_bwd_kernel=True,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q_bxth = jnp.moveaxis((q_btkgh * h**-0.5).astype(q_btkgh.dtype).reshape(b, t, k * g, h), 1, 2)
        k_bkth, v_bkth = jnp.moveaxis(k_bskh, 1, 2), jnp.moveaxis(v_bskh, 1, 2)
        out_bxth = jax.vmap(kernel)(q_bxth, k_bkth, v_bkth, splash.SegmentIds(segment_bt, segment_bt))
        return jnp.moveaxis(out_bxth, 2, 1).reshape(b, t, k, g, h).astype(v_bskh.dtype)

    spec = PartitionSpec(mesh_lib.axes_of(b, "batch"), None, mesh_lib.axes_of(k, "kv_heads"))
    attend = mesh_lib.on_each_device(attend, in_specs=(spec, spec, spec, PartitionSpec(spec[0])), out_specs=spec)
    return attend(q_btkgh, k_bskh, v_bskh, segment_bt)


def cudnn_attention(
    q_btkgh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    segment_bt: jax.Array,
    sliding_window: int | None,
    *,
    prefix_bt: jax.Array | None = None,
    implementation: str = "cudnn",
) -> jax.Array:
    """Causal attention within segments by cuDNN's flash kernel, through `jax.nn.dot_product_attention`.

    cuDNN knows segments as a bias alone: [B, 1, T, T] in the dtype of the queries, 34 MB a row of 4096 tokens, once for
    all layers and heads. Scores are never in memory.

    Args:
        prefix_bt: as in `segment_attention`; it does not go with a window.
        implementation: "xla" computes the same without cuDNN, for comparison.
    """
    b, t, k, g, h = q_btkgh.shape
    mask_bts = segment_bt[:, :, None] == segment_bt[:, None, :]
    if prefix_bt is not None:
        mask_bts |= prefix_bt[:, :, None] == segment_bt[:, None, :]
    out_btxh = jax.nn.dot_product_attention(
        q_btkgh.reshape(b, t, k * g, h),
        k_bskh,
        v_bskh,
        mask=mask_bts[:, None],
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation=implementation,
    )
    return out_btxh.reshape(b, t, k, g, h)
