"""Attention over packed rows: several sequences side by side in one row, told apart by segment ids."""

import jax
import jax.numpy as jnp

from lightning_jax.model.llama import Attend

# Longer rows are computed this many queries at a time, so that scores are [B, H, 512, T] and never [B, H, T, T].
QUERY_CHUNK = 512


def segment_attention(segment_bt: jax.Array, position_bt: jax.Array, sliding_window: int | None = None) -> Attend:
    """Causal attention within segments, for whole rows (no cache).

    Args:
        segment_bt: [B, T] int32, the sequence each token belongs to; 0 for padding, which no other token sees.
        position_bt: [B, T] int32, positions within the sequence; a query sees keys at its own position and before.
        sliding_window: how many positions a query sees, itself included; None for all.

    Returns:
        An `attend` for `llama.forward`; softmax in float32.
    """

    def attend(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, cache: None) -> tuple[jax.Array, None]:
        def chunk(query: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q_btkgh, query_segment_bt, query_position_bt = query
            distance_bts = query_position_bt[:, :, None] - position_bt[:, None, :]
            mask_bts = (query_segment_bt[:, :, None] == segment_bt[:, None, :]) & (distance_bts >= 0)
            if sliding_window is not None:
                mask_bts &= distance_bts < sliding_window
            return _masked_attention(q_btkgh, k_bskh, v_bskh, mask_bts)

        query = (q_btkgh, segment_bt, position_bt)
        b, t = segment_bt.shape
        if t <= QUERY_CHUNK or t % QUERY_CHUNK:
            return chunk(query), cache
        chunked = jax.tree.map(lambda x: x.reshape(b, -1, QUERY_CHUNK, *x.shape[2:]).swapaxes(0, 1), query)
        out = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), chunked)
        return out.swapaxes(0, 1).reshape(q_btkgh.shape), cache

    return attend


def _masked_attention(q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, mask_bts: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(h)) v where the mask is True; every query must see a key."""
    score_bkgts = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh, preferred_element_type=jnp.float32)
    score_bkgts *= q_btkgh.shape[-1] ** -0.5
    score_bkgts = jnp.where(mask_bts[:, None, None], score_bkgts, jnp.finfo(jnp.float32).min)
    weight_bkgts = jax.nn.softmax(score_bkgts, axis=-1).astype(v_bskh.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weight_bkgts, v_bskh)
