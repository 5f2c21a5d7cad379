"""Attention over pages as one kernel for NVIDIA's GPUs, in Pallas by way of Triton.

FlashAttention-2 (https://arxiv.org/abs/2307.08691) whose keys lie in pages: one program for each row, key/value head
and tile of queries finds the keys by the row's page table, so nothing is gathered, and the queries of a key/value
head share what is read. Where that makes too few programs to keep the GPU busy, each row's keys are divided between
several, and their results are weighed together (Flash-Decoding).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lightning_jax import gpu
from lightning_jax import mesh as mesh_lib

_TILE, _SMALLEST_TILE = 64, 16  # queries of one program; the tensor cores' products have at least 16
_BLOCK = 64  # keys that are read at a time
_PROGRAMS, _MOST_SPLITS = 256, 16  # two programs for each of an H100's 132 processors
_MASKED, _LOWEST = -1e30, -1e6  # as in `kv_cache`


def fits(head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes such heads: products of 16 bits, of sizes that are powers of two; from Ampere on."""
    is_power = head_dim & (head_dim - 1) == 0 and 16 <= head_dim <= 128
    return dtype in (jnp.bfloat16, jnp.float16) and is_power and gpu.compute_capability() >= 8.0


def attention(
    q_btkgh: jax.Array,
    k_pskh: jax.Array,
    v_pskh: jax.Array,
    page_table_bp: jax.Array,
    start_b: jax.Array,
    length_b: jax.Array,
    sliding_window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of a chunk of each row over the row's pages, where the chunk's own keys are already.

    Args:
        q_btkgh: queries of T consecutive positions; those from a row's length on are padding, with results of no
            meaning.
        k_pskh, v_pskh: [pages, page_size, K, h].
        page_table_bp: [B, P] int32.
        start_b: [B] int32, the first query's position.
        length_b: [B] int32, queries that are no padding.
        sliding_window: positions that a query sees, itself included; None for all.
        interpret: run it without a GPU, slowly.

    Returns:
        [B, T, K, G, h], in the dtype of the queries.
    """
    attend = functools.partial(_attention, sliding_window=sliding_window, interpret=interpret)
    heads, whole = mesh_lib.axes_of(q_btkgh.shape[2], "kv_heads"), PartitionSpec()
    of_heads = PartitionSpec(None, None, heads)
    attend = mesh_lib.on_each_device(
        attend, in_specs=(of_heads, of_heads, of_heads, whole, whole, whole), out_specs=of_heads
    )
    return attend(q_btkgh, k_pskh, v_pskh, page_table_bp, start_b, length_b)


def _attention(
    q_btkgh: jax.Array,
    k_pskh: jax.Array,
    v_pskh: jax.Array,
    page_table_bp: jax.Array,
    start_b: jax.Array,
    length_b: jax.Array,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    b, t, k, g, h = q_btkgh.shape
    page_size = k_pskh.shape[1]
    tile = min(_TILE, max(_SMALLEST_TILE, pl.next_power_of_2(t * g)))
    tiles = -(-t * g // tile)
    splits = num_splits(b * k, page_table_bp.shape[1] * page_size) if tiles == 1 else 1

    def whole(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

    arrays = q_btkgh.astype(k_pskh.dtype), *(x.reshape(-1, *x.shape[2:]) for x in (k_pskh, v_pskh))
    rows = page_table_bp, start_b, length_b
    results = [
        jax.ShapeDtypeStruct((splits, *q_btkgh.shape), q_btkgh.dtype if splits == 1 else jnp.float32),
        jax.ShapeDtypeStruct((splits, *q_btkgh.shape[:-1]), jnp.float32),
    ]
    out_nbtkgh, logsum_nbtkg = pl.pallas_call(
        functools.partial(_kernel, tile=tile, splits=splits, page_size=page_size, sliding_window=sliding_window),
        grid=(tiles * splits, k, b),
        in_specs=[whole(x) for x in (*arrays, *rows)],
        out_specs=[whole(x) for x in results],
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(*arrays, *rows)
    if splits == 1:
        return out_nbtkgh[0]
    share_nbtkg = jax.nn.softmax(logsum_nbtkg, axis=0)
    return jnp.sum(out_nbtkgh * share_nbtkg[..., None], axis=0).astype(q_btkgh.dtype)


def num_splits(programs: int, most_keys: int) -> int:
    """Between how many programs each row's keys are divided where there would be `programs` of them."""
    return max(1, min(_MOST_SPLITS, _PROGRAMS // programs, -(-most_keys // _BLOCK)))


def _kernel(
    q_ref,  # [B, T, K, G, h]
    k_ref,  # [pages * page_size, K, h]
    v_ref,
    page_table_ref,  # [B, P]
    start_ref,  # [B]
    length_ref,  # [B]
    out_ref,  # [splits, B, T, K, G, h]
    logsum_ref,  # [splits, B, T, K, G], nats
    *,
    tile: int,
    splits: int,
    page_size: int,
    sliding_window: int | None,
) -> None:
    """A tile of the queries of one row and head, by t and then g, with the keys of one split."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    _, t, _, g, h = q_ref.shape
    part, head, row = (pl.program_id(axis) for axis in range(3))
    start, first_query = start_ref[row], part // splits * tile
    x = first_query + jnp.arange(tile, dtype=jnp.int32)
    t_x, g_x = jax.lax.div(x, jnp.int32(g)), jax.lax.rem(x, jnp.int32(g))
    is_query_x1, h_1h = (t_x < t)[:, None], jnp.arange(h, dtype=jnp.int32)[None]
    of_query = row, t_x[:, None], head, g_x[:, None], h_1h
    q_xh = triton.load(q_ref.at[of_query], mask=is_query_x1, other=0.0)

    # The blocks of keys that any of the queries sees, and this split's of them; none of padding.
    length = length_ref[row]
    after = pl.cdiv(start + jnp.minimum((first_query + tile - 1) // g + 1, length), _BLOCK)
    after = jnp.where(first_query // g < length, after, 0)
    first = 0
    if sliding_window is not None:
        first = jnp.maximum(start + first_query // g - sliding_window + 1, 0) // _BLOCK
    each = pl.cdiv(after - first, splits)
    first += part % splits * each

    def visit(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        out_xh, most_x, sum_x = carry
        key_s = i * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        page_s = jnp.minimum(jax.lax.div(key_s, jnp.int32(page_size)), page_table_ref.shape[1] - 1)
        place_s = page_table_ref[row, page_s] * page_size + jax.lax.rem(key_s, jnp.int32(page_size))
        of_keys = place_s[:, None], head, h_1h
        distance_xs = (start + t_x)[:, None] - key_s[None, :]
        is_seen_xs = distance_xs >= 0
        if sliding_window is not None:
            is_seen_xs &= distance_xs < sliding_window
        score_xs = triton.dot(q_xh, k_ref[of_keys], trans_b=True) * (h**-0.5 * math.log2(math.e))
        score_xs = jnp.where(is_seen_xs, score_xs, _MASKED)
        new_x = jnp.maximum(most_x, score_xs.max(axis=1))
        kept_x, weight_xs = jnp.exp2(most_x - new_x), jnp.exp2(score_xs - new_x[:, None])
        # Where the row has not been, a page may hold what is not finite, which a weight of 0 would not make 0.
        v_sh = triton.load(v_ref.at[of_keys], mask=(key_s < start + length)[:, None], other=0.0)
        more_xh = triton.dot(weight_xs.astype(v_ref.dtype), v_sh)
        return out_xh * kept_x[:, None] + more_xh, new_x, sum_x * kept_x + weight_xs.sum(axis=1)

    zeros_x = jnp.zeros(tile, jnp.float32)
    begin = jnp.zeros((tile, h), jnp.float32), zeros_x + _LOWEST, zeros_x
    out_xh, most_x, sum_x = jax.lax.fori_loop(first, jnp.minimum(first + each, after), visit, begin)
    sum_x = jnp.where(sum_x > 0.0, sum_x, 1.0)  # of padding, and where a split has no keys
    out_xh = (out_xh / sum_x[:, None]).astype(out_ref.dtype)
    split = part % splits
    triton.store(out_ref.at[split, *of_query], out_xh, mask=is_query_x1)
    logsum_x = (most_x + jnp.log2(sum_x)) * math.log(2.0)
    triton.store(logsum_ref.at[split, row, t_x, head, g_x], logsum_x, mask=t_x < t)
