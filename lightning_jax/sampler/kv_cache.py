"""Keys and values in pages, and attention over them.

Each layer has its own page arrays, [P, page_size, K, h]; page 0 is scratch, where writes of padding go. A prefill
writes its keys to the pages and then reads them back block by block. Decoding does the same at every step or, where
there is memory for it, keeps a dense copy of its rows that suits the matrix unit: a row is loaded from its pages when
it begins to decode, each step appends to the copy, and each round writes what is new to the pages.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax import mesh as mesh_lib
from lightning_jax.model.llama import Attend, LlamaConfig
from lightning_jax.sampler import paged_attention, ragged_pages
from lightning_jax.sampler.ragged_pages import RaggedPages

BLOCK_TOKENS = 64  # keys that prefill attends to at a time
_ROW_GROUPS = 4  # of a prefill's rows, each of which attends by itself
_MASKED = -1e30  # not -inf: a block with every key masked must not make NaNs
_LOWEST = -1e6  # running maximum before the first key; far above _MASKED, so that masked keys weigh nothing


class Pages(NamedTuple):
    """One layer's pages."""

    k: jax.Array  # [P, page_size, K, h]
    v: jax.Array  # [P, page_size, K, h]


class Dense(NamedTuple):
    """One layer's keys and values of a decode round's rows, by position."""

    k: jax.Array  # [B, K, h, S]: with keys in columns, XLA's CPU kernels are 2 to 5 times faster on a single query
    v: jax.Array  # [B, K, S, w], the head width and zeros up to `_value_width`


class Copies(NamedTuple):
    """Spans of a prefill chunk, each as long as a page, that go to one more page each (0: nowhere)."""

    row_n: jax.Array  # [N] int32, the row of the chunk
    first_n: jax.Array  # [N] int32, the span's first token in the chunk
    page_n: jax.Array  # [N] int32


class Packing(NamedTuple):
    """Where the tokens of rows that are not full stand in a column without gaps, and the other way round."""

    n_bt: jax.Array  # [B, T] int32, a row's token in the column; of those past its length any
    bt_n: jax.Array  # [N] int32, b * T + t of a token of the column; of those past the last row's any


def pack(length_b: jax.Array, chunk: int, tokens: int) -> Packing:
    """The rows' first `length_b` of `chunk` tokens, one row after the other, in a column of `tokens`."""
    end_b = jnp.cumsum(length_b)
    first_b = end_b - length_b
    n = jnp.arange(tokens, dtype=jnp.int32)
    row_n = jnp.minimum(jnp.sum(end_b <= n[:, None], axis=1, dtype=jnp.int32), length_b.shape[0] - 1)
    offset_n = jnp.minimum(n - first_b[row_n], chunk - 1)
    n_bt = jnp.minimum(first_b[:, None] + jnp.arange(chunk, dtype=jnp.int32), tokens - 1)
    return Packing(n_bt, row_n * chunk + offset_n)


def init_pages(
    config: LlamaConfig, num_pages: int, page_size: int, dtype: jnp.dtype, device: jax.sharding.Sharding | None = None
) -> list[Pages] | list[RaggedPages]:
    """Zeroed pages for every layer, plus the scratch page; `device` shards each array.

    For TPU, where its kernel takes the model's heads, they are `RaggedPages`.
    """
    shape = (num_pages + 1, page_size, config.num_kv_heads, config.head_dim)
    heads = shape[2] if device is None else device.shard_shape(shape)[2]
    if mesh_lib.platform() == "tpu" and ragged_pages.fits(heads, dtype):
        return [ragged_pages.init(shape, dtype, device) for _ in range(config.num_layers)]
    return [
        Pages(jnp.zeros(shape, dtype, device=device), jnp.zeros(shape, dtype, device=device))
        for _ in range(config.num_layers)
    ]


def write(
    pages: Pages | RaggedPages,
    page_table_bp: jax.Array,
    position_bt: jax.Array,
    valid_bt: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
) -> Pages | RaggedPages:
    """Puts keys and values at their rows' positions; those not valid go to the scratch page."""
    page_size = pages[0].shape[1]
    page_bt = jnp.take_along_axis(page_table_bp, position_bt // page_size, axis=1, mode="clip")
    index_bt = jnp.where(valid_bt, page_bt * page_size + position_bt % page_size, 0)

    def put(array: jax.Array, new_btkh: jax.Array) -> jax.Array:
        flat = array.reshape(-1, *array.shape[2:])
        return flat.at[index_bt].set(new_btkh.astype(array.dtype), mode="promise_in_bounds").reshape(array.shape)

    return _put(put, pages, k_btkh, v_btkh)


def write_copies(
    pages: Pages | RaggedPages, copies: Copies, k_btkh: jax.Array, v_btkh: jax.Array
) -> Pages | RaggedPages:
    """Puts page-sized spans of the rows' new keys and values into other pages as well."""
    page_size = pages[0].shape[1]
    offset_p = jnp.arange(page_size, dtype=jnp.int32)
    from_np = copies.first_n[:, None] + offset_p
    to_np = copies.page_n[:, None] * page_size + offset_p

    def put(array: jax.Array, new_btkh: jax.Array) -> jax.Array:
        flat = array.reshape(-1, *array.shape[2:])
        new_npkh = new_btkh.at[copies.row_n[:, None], from_np].get(mode="promise_in_bounds").astype(array.dtype)
        return flat.at[to_np].set(new_npkh, mode="promise_in_bounds").reshape(array.shape)

    return _put(put, pages, k_btkh, v_btkh)


def _put(
    put: Callable[[jax.Array, jax.Array], jax.Array], pages: Pages | RaggedPages, k_btkh: jax.Array, v_btkh: jax.Array
) -> Pages | RaggedPages:
    """`put(array, new)` of each of a layer's arrays."""
    if isinstance(pages, RaggedPages):
        return RaggedPages(put(pages.kv, ragged_pages.combined(k_btkh, v_btkh)))
    return Pages(put(pages.k, k_btkh), put(pages.v, v_btkh))


def prefill_attention(
    page_table_bp: jax.Array,
    position_bt: jax.Array,
    valid_bt: jax.Array,
    sliding_window: int | None,
    copies: Copies | None = None,
    packing: Packing | None = None,
) -> Attend:
    """Attention of a chunk of each row over the row's pages, the chunk's own tokens included.

    Keys are visited in blocks counted from position 0, with a running softmax (arXiv:2205.14135), by a few rows at a
    time, as many as the longest of them needs. So there is no shape per context length, memory does not grow with it,
    and a query's result does not depend on where its chunk began. The softmax is to the base 2 and its running maximum
    a whole number: then rescaling multiplies by powers of two, which is exact, whether or not the compiler fuses it
    with the addition.

    Args:
        page_table_bp: [B, P] int32.
        position_bt: [B, T] int32, each token's position in its row.
        valid_bt: [B, T] bool, False for padding.
        sliding_window: positions that a query sees, itself included; None for all.
        copies: where else to put some of the chunk's keys and values.
        packing: where the tokens are in the column, if not each row's T after those of the row before.

    Returns:
        An `attend` for `llama.forward` of all tokens in one column, [B * T, 1] or as packed, whose cache is a list of
        `Pages`, or of `RaggedPages`. Over these a TPU kernel computes the same, and over `Pages` a GPU kernel.
    """
    b, t = position_bt.shape
    # Rows without tokens come last, and most groups of them are left out.
    group = b // _ROW_GROUPS if b % _ROW_GROUPS == 0 else 1
    used = jnp.max(jnp.where(valid_bt, jnp.arange(b, dtype=jnp.int32)[:, None] // group + 1, 0))

    def in_rows(x_n1: jax.Array) -> jax.Array:
        x_n = x_n1[:, 0]
        return x_n.reshape(b, t, *x_n.shape[1:]) if packing is None else x_n[packing.n_bt]

    def in_column(out_btkgh: jax.Array) -> jax.Array:
        out_nkgh = out_btkgh.reshape(b * t, *out_btkgh.shape[2:])
        return (out_nkgh if packing is None else out_nkgh[packing.bt_n])[:, None]

    def attend(q_n1kgh: jax.Array, k_n1kh: jax.Array, v_n1kh: jax.Array, pages: Pages) -> tuple[jax.Array, Pages]:
        q_btkgh, k_btkh, v_btkh = in_rows(q_n1kgh), in_rows(k_n1kh), in_rows(v_n1kh)
        pages = write(pages, page_table_bp, position_bt, valid_bt, k_btkh, v_btkh)
        if copies is not None:
            pages = write_copies(pages, copies, k_btkh, v_btkh)
        if isinstance(pages, RaggedPages):
            out_btkgh = ragged_pages.attention(q_btkgh, pages, page_table_bp, position_bt[:, 0], sliding_window)
            return in_column(out_btkgh), pages
        if mesh_lib.platform() == "gpu" and paged_attention.fits(q_btkgh.shape[-1], pages.k.dtype):
            length_b = jnp.sum(valid_bt, axis=1, dtype=jnp.int32)
            out_btkgh = paged_attention.attention(
                q_btkgh, *pages, page_table_bp, position_bt[:, 0], length_b, sliding_window
            )
            return in_column(out_btkgh), pages

        def visit(i: jax.Array, x_btkgh: jax.Array) -> jax.Array:  # results take the place of queries
            q_xtkgh, table_xp, position_xt, valid_xt = (
                jax.lax.dynamic_slice_in_dim(x, i * group, group)
                for x in (x_btkgh, page_table_bp, position_bt, valid_bt)
            )
            out_xtkgh = _visit_pages(q_xtkgh, pages, table_xp, position_xt, valid_xt, sliding_window)
            return jax.lax.dynamic_update_slice_in_dim(x_btkgh, out_xtkgh.astype(x_btkgh.dtype), i * group, axis=0)

        return _in_place(in_column(jax.lax.fori_loop(0, used, visit, q_btkgh))), pages

    return attend


def _visit_pages(
    q_btkgh: jax.Array,
    pages: Pages,
    page_table_bp: jax.Array,
    position_bt: jax.Array,
    valid_bt: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    """`prefill_attention` of some rows by XLA's own operations, [B, T, K, G, h] float32."""
    end_b = jnp.max(jnp.where(valid_bt, position_bt, 0), axis=1) + 1
    page_size = pages.k.shape[1]
    block = block_length(page_size)
    block_pages = block // page_size
    table_bp = jnp.pad(page_table_bp, ((0, 0), (0, -page_table_bp.shape[1] % block_pages)))
    b, t, k, g, h = q_btkgh.shape

    def visit(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        out_bkgth, max_bkgt, sum_bkgt = carry
        block_table_bp = jax.lax.dynamic_slice_in_dim(table_bp, i * block_pages, block_pages, axis=1)
        dense = gather(pages, block_table_bp)
        key_s = i * block + jnp.arange(block, dtype=jnp.int32)
        v_bksw = _no_values_after(dense.v, key_s, end_b)
        mask_bts = _mask(position_bt, key_s, sliding_window)
        score_bkgts = jnp.where(mask_bts[:, None, None], _scores(q_btkgh, dense.k), _MASKED)
        new_max_bkgt = jnp.maximum(max_bkgt, jnp.ceil(jnp.max(score_bkgts, axis=-1)))
        scale_bkgt = _power_of_two(max_bkgt - new_max_bkgt)
        weight_bkgts = jnp.exp2(score_bkgts - new_max_bkgt[..., None])
        sum_bkgt = sum_bkgt * scale_bkgt + jnp.sum(weight_bkgts, axis=-1)
        out_bkgth = out_bkgth * scale_bkgt[..., None] + _weighted(weight_bkgts, v_bksw)[..., :h]
        return out_bkgth, new_max_bkgt, sum_bkgt

    zeros_bkgt = jnp.zeros((b, k, g, t), jnp.float32)
    carry = (jnp.zeros((b, k, g, t, h), jnp.float32), zeros_bkgt + _LOWEST, zeros_bkgt)
    out_bkgth, _, sum_bkgt = jax.lax.fori_loop(0, -(-jnp.max(end_b) // block), visit, carry)
    return jnp.moveaxis(out_bkgth * (1.0 / sum_bkgt)[..., None], 3, 1)


def decode_attention(position_b: jax.Array, sliding_window: int | None, page_size: int) -> Attend:
    """Attention of one token of each row over the dense copy, which the token is added to.

    The arithmetic is `prefill_attention`'s, block for block, so that both give the same to the last bit where the
    matrix products do.

    Args:
        position_b: [B] int32, each token's position in its row. A row that has stopped may be one past the copy; its
            write is dropped.
        sliding_window: positions that a query sees, itself included; None for all.
        page_size: of the pages that the copy is of.

    Returns:
        An `attend` for `llama.forward`, whose cache is a list of `Dense`.
    """
    row_b = jnp.arange(position_b.shape[0])

    def attend(q_btkgh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, dense: Dense) -> tuple[jax.Array, Dense]:
        dense = Dense(
            dense.k.at[row_b, :, :, position_b].set(k_btkh[:, 0].astype(dense.k.dtype), mode="drop"),
            dense.v.at[row_b, :, position_b].set(_pad(v_btkh[:, 0]).astype(dense.v.dtype), mode="drop"),
        )
        b, k, h, length = dense.k.shape
        block = min(length, block_length(page_size))
        blocks = length // block
        mask_bts = _mask(position_b[:, None], jnp.arange(length, dtype=jnp.int32), sliding_window)
        score_bkgts = jnp.where(mask_bts[:, None, None], _scores(q_btkgh, dense.k), _MASKED)
        score_bkgns = score_bkgts.reshape(b, k, -1, blocks, block)
        max_bkgn = jnp.maximum(jax.lax.cummax(jnp.ceil(jnp.max(score_bkgns, axis=-1)), axis=3), _LOWEST)
        weight_bkgns = jnp.exp2(score_bkgns - max_bkgn[..., None])
        sum_bkgn = jnp.sum(weight_bkgns, axis=-1)
        # Each block is one more entry of the batch: no slice of the values is copied.
        weight_bxgns = jnp.moveaxis(weight_bkgns, 3, 2).reshape(b, k * blocks, -1, 1, block)
        out_bxgtw = _weighted(weight_bxgns, dense.v.reshape(b, k * blocks, block, -1))
        out_bkngh = out_bxgtw[..., :h].reshape(b, k, blocks, -1, h)

        out_bkgh, sum_bkg = out_bkngh[:, :, 0], sum_bkgn[..., 0]
        if blocks > 1:
            scale_bkgn = _power_of_two(max_bkgn[..., :-1] - max_bkgn[..., 1:])

            def merge(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                scale_bkg = scale_bkgn[..., n - 1]
                return carry[0] * scale_bkg[..., None] + out_bkngh[:, :, n], carry[1] * scale_bkg + sum_bkgn[..., n]

            out_bkgh, sum_bkg = jax.lax.fori_loop(1, blocks, merge, (out_bkgh, sum_bkg))
        return _in_place((out_bkgh * (1.0 / sum_bkg)[..., None])[:, None]), dense

    return attend


def init_dense(
    config: LlamaConfig, rows: int, length: int, dtype: jnp.dtype, device: jax.sharding.Sharding | None = None
) -> list[Dense]:
    """An empty dense copy for every layer."""
    k_shape = (rows, config.num_kv_heads, config.head_dim, length)
    v_shape = (rows, config.num_kv_heads, length, _value_width(config.head_dim))
    return [
        Dense(jnp.zeros(k_shape, dtype, device=device), jnp.zeros(v_shape, dtype, device=device))
        for _ in range(config.num_layers)
    ]


def load(pages: Pages, dense: Dense, page_table_bp: jax.Array, load_b: jax.Array, length_b: jax.Array) -> Dense:
    """Copies the pages of some rows into the dense copy, as far as the rows go, [B] int32 positions.

    `load_b` begins with these rows' indices and goes on with -1.
    """

    def row(i: jax.Array, dense: Dense) -> Dense:
        new = gather(pages, page_table_bp[load_b[i]][None])
        v_bksw = _no_values_after(new.v, jnp.arange(new.v.shape[2], dtype=jnp.int32), length_b[load_b[i]][None])
        return Dense(
            jax.lax.dynamic_update_slice_in_dim(dense.k, new.k, load_b[i], axis=0),
            jax.lax.dynamic_update_slice_in_dim(dense.v, v_bksw, load_b[i], axis=0),
        )

    return jax.lax.fori_loop(0, jnp.sum(load_b >= 0), row, dense)


def gather(pages: Pages, page_table_bp: jax.Array) -> Dense:
    """The rows' pages side by side; S is P * page_size."""
    b, p = page_table_bp.shape
    _, page_size, k, h = pages.k.shape
    k_bskh = pages.k.at[page_table_bp].get(mode="promise_in_bounds").reshape(b, p * page_size, k, h)
    v_bskh = pages.v.at[page_table_bp].get(mode="promise_in_bounds").reshape(b, p * page_size, k, h)
    return Dense(jnp.transpose(k_bskh, (0, 2, 3, 1)), _pad(jnp.transpose(v_bskh, (0, 2, 1, 3))))


def write_back(
    pages: Pages, dense: Dense, page_table_bp: jax.Array, position_b: jax.Array, valid_b: jax.Array, count: int
) -> Pages:
    """Copies `count` positions of each row, from `position_b` on, from the dense copy to the pages."""
    position_bt = position_b[:, None] + jnp.arange(count, dtype=jnp.int32)
    inside_bt = valid_b[:, None] & (position_bt < dense.v.shape[2])
    index_bt = jnp.minimum(position_bt, dense.v.shape[2] - 1)
    row_b1 = jnp.arange(position_b.shape[0])[:, None]
    k_btkh = dense.k.at[row_b1, :, :, index_bt].get(mode="promise_in_bounds")
    v_btkh = dense.v.at[row_b1, :, index_bt].get(mode="promise_in_bounds")[..., : pages.v.shape[-1]]
    return write(pages, page_table_bp, position_bt, inside_bt, k_btkh, v_btkh)


def block_length(page_size: int) -> int:
    """Keys that are attended to at a time, whole pages."""
    return max(BLOCK_TOKENS, page_size)


def _no_values_after(v_bksw: jax.Array, key_s: jax.Array, end_b: jax.Array) -> jax.Array:
    """Zeros where a row has not been: pages are not cleared, and a weight of 0 makes NaN of what is not finite."""
    return jnp.where((key_s < end_b[:, None])[:, None, :, None], v_bksw, 0)


def _mask(position_bt: jax.Array, key_s: jax.Array, sliding_window: int | None) -> jax.Array:
    distance_bts = position_bt[:, :, None] - key_s
    mask_bts = distance_bts >= 0
    if sliding_window is not None:
        mask_bts &= distance_bts < sliding_window
    return mask_bts


def _scores(q_btkgh: jax.Array, k_bkhs: jax.Array) -> jax.Array:
    """Scaled dot products in bits instead of nats (2**score is what softmax weighs by), [B, K, G, T, S] float32."""
    b, t, k, g, h = q_btkgh.shape
    q_bkxh = jnp.moveaxis(q_btkgh, 1, 3).reshape(b, k, g * t, h)
    score_bkxs = jax.lax.dot_general(
        q_bkxh, k_bkhs, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    # Without the barrier XLA may turn the product round, and then it depends on T to the last bit and on CPU is slow.
    return jax.lax.optimization_barrier(score_bkxs).reshape(b, k, g, t, -1) * (h**-0.5 * math.log2(math.e))


def _weighted(weight_bkgts: jax.Array, v_bksw: jax.Array) -> jax.Array:
    """Sums of values, [B, K, G, T, w] float32."""
    return jnp.einsum(
        "bkgts,bksw->bkgtw", weight_bkgts.astype(v_bksw.dtype), v_bksw, preferred_element_type=jnp.float32
    )


def _in_place(out_btkgh: jax.Array) -> jax.Array:
    """Without the barrier XLA multiplies with another order of the heads, and at every step turns the weights that
    come next into it.
    """
    return jax.lax.optimization_barrier(out_btkgh)


def _value_width(head_dim: int) -> int:
    """Width of values where they are multiplied. On CPU, products of other than 64, 128, ... columns do not sum in the
    same order for few rows and for many.
    """
    return -(-head_dim // 64) * 64 if mesh_lib.platform() == "cpu" else head_dim


def _pad(v: jax.Array) -> jax.Array:
    h = v.shape[-1]
    return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, _value_width(h) - h)])


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent, exactly, for whole numbers of at most 0; 0 where that is below the normal range."""
    bits = (jnp.maximum(exponent, -126.0).astype(jnp.int32) + 127) << 23
    return jnp.where(exponent < -126.0, 0.0, jax.lax.bitcast_convert_type(bits, jnp.float32))
