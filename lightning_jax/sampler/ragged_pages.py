"""Keys and values in the layout of JAX's ragged paged attention kernel for TPU, and attention by it.

One array per layer holds both, [P, page_size, 2K, w]: each key/value head's keys and then its values, with zeros up to
the width w that the TPU's registers have, a multiple of 128, which its memory pads a narrower head to in any case. The
kernel reads each sequence's pages once, as far as the sequence goes, and
takes prefills and decoding alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lightning_jax import mesh as mesh_lib

_LANES = 128
_BLOCK_TOKENS, _BLOCK_QUERIES = 256, 32  # what the kernel works on at a time


class RaggedPages(NamedTuple):
    """One layer's pages."""

    kv: jax.Array  # [P, page_size, 2K, w]


def fits(num_kv_heads: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel can be used for so many heads on a device: its rows must fill whole tiles."""
    rows, rest = divmod(2 * num_kv_heads, 4 // jnp.dtype(dtype).itemsize)
    return not rest and (rows in (1, 2, 4, 8) or rows % 8 == 0)


def init(shape: tuple[int, ...], dtype: jnp.dtype, device: jax.sharding.Sharding | None) -> RaggedPages:
    """Zeroed pages for keys, and for values, of this shape, [P, page_size, K, h]."""
    num_pages, page_size, k, h = shape
    return RaggedPages(jnp.zeros((num_pages, page_size, 2 * k, _width(h)), dtype, device=device))


def combined(k_btkh: jax.Array, v_btkh: jax.Array) -> jax.Array:
    """Keys and values as the pages hold them, [B, T, 2K, w]."""
    b, t, k, h = k_btkh.shape
    kv_btxh = jnp.stack([k_btkh, v_btkh], axis=3).reshape(b, t, 2 * k, h)
    return jnp.pad(kv_btxh, ((0, 0), (0, 0), (0, 0), (0, _width(h) - h)))


def attention(
    q_btkgh: jax.Array,
    pages: RaggedPages,
    page_table_bp: jax.Array,
    start_b: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    """Attention of a chunk of each row over the row's pages, where the chunk's own keys are already.

    Args:
        q_btkgh: queries of T consecutive positions; those after a row's last are padding, with results of no meaning.
        page_table_bp: [B, P] int32.
        start_b: [B] int32, the first query's position.
        sliding_window: positions that a query sees, itself included; None for all.

    Returns:
        [B, T, K, G, h], in the dtype of the queries.
    """
    b, t, k, g, h = q_btkgh.shape
    page_size = pages.kv.shape[1]
    # Padding may go on past the table; the kernel must find a page there (the scratch page).
    page_table_bp = jnp.pad(page_table_bp, ((0, 0), (0, -(-t // page_size))))
    q_nxh = jnp.pad(q_btkgh.reshape(b * t, k * g, h), ((0, 0), (0, 0), (0, _width(h) - h)))
    first_n = jnp.arange(b + 1, dtype=jnp.int32) * t

    def attend(q_nxh: jax.Array, kv: jax.Array, length_b: jax.Array, page_table_bp: jax.Array) -> jax.Array:
        return _kernel(q_nxh, kv, length_b, page_table_bp, first_n, scale=h**-0.5, sliding_window=sliding_window)

    heads = mesh_lib.axes_of(k, "kv_heads")
    attend = mesh_lib.on_each_device(
        attend,
        in_specs=(PartitionSpec(None, heads), PartitionSpec(None, None, heads), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, heads),
    )
    out_nxh = attend(q_nxh, pages.kv, start_b + t, page_table_bp)
    return out_nxh[..., :h].reshape(q_btkgh.shape)


def _kernel(
    q_nxh: jax.Array,
    kv: jax.Array,
    length_b: jax.Array,
    page_table_bp: jax.Array,
    first_n: jax.Array,
    *,
    scale: float,
    sliding_window: int | None,
) -> jax.Array:
    """JAX's kernel, whose interface is experimental; only this function knows it."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    page_size, pages_per_row = kv.shape[1], page_table_bp.shape[1]
    return kernel.ragged_paged_attention(
        q_nxh.astype(kv.dtype),
        kv,
        length_b,
        page_table_bp,
        first_n,
        jnp.array([length_b.shape[0]], jnp.int32),
        sm_scale=scale,
        sliding_window=sliding_window,
        # Given, since the kernel's own table asks the default device, which is not there when compiling ahead of time.
        num_kv_pages_per_block=min(pages_per_row, max(1, _BLOCK_TOKENS // page_size)),
        num_queries_per_block=min(_BLOCK_QUERIES, q_nxh.shape[0]),
    ).astype(q_nxh.dtype)


def _width(head_dim: int) -> int:
    return -(-head_dim // _LANES) * _LANES
