"""Choosing tokens on the device: temperature, top-k, top-p, log-probs, and noise that depends on nothing else.

A token is found by inverting the cumulative distribution at one uniform number, which comes from the request's own key
and the token's position. So what a request samples does not depend on its batch, its slot, or when it runs, and drawing
costs two numbers per row instead of one per vocabulary entry. Nothing here sorts the vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax import mesh


def uniform_noise(key_b2: jax.Array, position_bt: jax.Array) -> jax.Array:
    """One uniform number for each position of each request's stream: `jax.random`'s bits of (key folded with position).

    Args:
        key_b2: [B, 2] uint32, the requests' noise keys.
        position_bt: [B, T] int32, the position in its sequence of the token to be drawn.

    Returns:
        [B, T] float32, multiples of 2**-24 in [0, 1).
    """
    key_bt = [jnp.broadcast_to(k_b[:, None], position_bt.shape) for k_b in key_b2.T]
    zero_bt = jnp.zeros_like(position_bt, jnp.uint32)
    folded_bt = _threefry(key_bt, (zero_bt, position_bt.astype(jnp.uint32)))
    high_bt, low_bt = _threefry(folded_bt, (zero_bt, zero_bt))
    return ((high_bt ^ low_bt) >> 8).astype(jnp.float32) * 2.0**-24


def sample(
    logits_bv: jax.Array, temperature_b: jax.Array, top_k_b: jax.Array, top_p_b: jax.Array, uniform_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
        logits_bv: [B, V] float32.
        temperature_b: [B] float32; 0 takes the likeliest token, the first of equals.
        top_k_b: [B] int32; 0 keeps all. Tokens that tie with the k-th are kept.
        top_p_b: [B] float32; 1 keeps all. Applied to what top-k kept; tokens that tie with the last are kept.
        uniform_b: [B] float32 in [0, 1), see `uniform_noise`.

    Returns:
        token_b: [B] int32.
        logprob_b: [B] float32, nats, of the distribution drawn from; of softmax(logits) in greedy rows.
    """
    return draw(temper(logits_bv, temperature_b), temperature_b, top_k_b, top_p_b, uniform_b)


def temper(logits_bv: jax.Array, temperature_b: jax.Array) -> jax.Array:
    """Logits by temperature, [B, V] float32; as they are in greedy rows.

    In a branch of its own: XLA rounds a division in one way among what comes before or after it and in another alone.
    """
    divisor_b1 = _divisor(temperature_b)
    return jax.lax.cond(jnp.all(divisor_b1 == 1.0), lambda x: x, lambda x: x / divisor_b1, logits_bv)


def draw(
    x_bv: jax.Array, temperature_b: jax.Array, top_k_b: jax.Array, top_p_b: jax.Array, uniform_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`sample` of what `temper` returned."""
    x_bv = _filtered(x_bv, temperature_b, top_k_b, top_p_b)
    x_bnm = _in_blocks(x_bv, -jnp.inf)
    most_bn, sum_bn = _block_sums(x_bnm)
    most_b = jnp.max(most_bn, axis=-1)
    sum_bn *= jnp.exp(most_bn - most_b[:, None])
    passed_bn = jnp.cumsum(sum_bn, axis=-1)

    # The block in which the running sum passes the threshold, or the first with a largest entry, and the entry in it.
    threshold_b, greedy_b = uniform_b * passed_bn[:, -1], temperature_b <= 0.0
    block_b = jnp.where(greedy_b, jnp.argmax(most_bn, axis=-1), _first_above(passed_bn, sum_bn, threshold_b))
    before_b, block_most_b = (_entry(x_bn, block_b) for x_bn in (passed_bn - sum_bn, most_bn))
    x_bm = jnp.take_along_axis(x_bnm, block_b[:, None, None], axis=1)[:, 0]
    weight_bm = jnp.exp(x_bm - block_most_b[:, None]) * jnp.exp(block_most_b - most_b)[:, None]
    drawn_b = _first_above(jnp.cumsum(weight_bm, axis=-1), weight_bm, threshold_b - before_b)
    inner_b = jnp.where(greedy_b, jnp.argmax(x_bm, axis=-1), drawn_b)
    return block_b * x_bm.shape[-1] + inner_b, _entry(x_bm, inner_b) - most_b - jnp.log(passed_bn[:, -1])


def rank(
    x_bv: jax.Array, temperature_b: jax.Array, top_k_b: jax.Array, top_p_b: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens of the distributions that `draw` draws from.

    Returns:
        token_bn: [B, count] int32, likeliest first.
        logprob_bn: [B, count] float32, nats; -inf for tokens without any probability.
    """
    x_bv = _filtered(x_bv, temperature_b, top_k_b, top_p_b)
    most_b1 = _reduced(jnp.maximum, x_bv)[:, None]
    top_bn, token_bn = jax.lax.top_k(x_bv, count)  # the first of them would be a slice, for which XLA on CPU sorts all
    relative_bn = top_bn - most_b1
    total_b = _reduced(jnp.add, x_bv, lambda x_bv: jnp.exp(x_bv - most_b1))
    return token_bn, jnp.where(jnp.exp(relative_bn) > 0.0, relative_bn - jnp.log(total_b)[:, None], -jnp.inf)


class Penalties(NamedTuple):
    """What penalties and biases do to logits."""

    bias_bv: jax.Array  # [B, V] float32, added
    seen_bw: jax.Array  # [B, W] uint32, a bit for each token: whether the repetition penalty holds for it
    repetition_b: jax.Array  # [B] float32


def shape(x_bv: jax.Array, temperature_b: jax.Array, allowed_bw: jax.Array, penalties: Penalties | None) -> jax.Array:
    """What `temper` returned after penalties and biases, and -inf for tokens that are not allowed.

    Penalties belong to the logits, but it is tempered ones that are shaped: XLA divides by the temperature where it
    multiplies matrices and rounds otherwise anywhere else, and who is not shaped must not notice those who are.

    Args:
        allowed_bw: [B, W] uint32; bit v % 32 of word v // 32 is token v's.
        penalties: None for none.
    """
    if penalties is not None:
        repetition_b1 = penalties.repetition_b[:, None]
        repeated_bv = jnp.where(x_bv > 0.0, x_bv / repetition_b1, x_bv * repetition_b1)
        seen_bv = _unpack(penalties.seen_bw, x_bv.shape[-1])
        x_bv = jnp.where(seen_bv, repeated_bv, x_bv) + penalties.bias_bv / _divisor(temperature_b)
    return jnp.where(_unpack(allowed_bw, x_bv.shape[-1]), x_bv, -jnp.inf)


def _threefry(key: Sequence[jax.Array], counter: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Two words for each key and counter of two, all uint32: Threefry-2x32 of 20 rounds (Salmon et al., SC 2011).

    `jax.random` has the same. A round at a time on CPU: a fifth of what XLA took to compile a decode round were JAX's
    four at a time.
    """
    words = jnp.stack([*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)])
    rotations = jnp.array([13, 15, 26, 6, 17, 29, 16, 24], jnp.uint32)

    def one_round(i: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left = rotations[i % 8]
        low = x[0] + x[1]
        high = low ^ ((x[1] << left) | (x[1] >> (32 - left)))
        group = i // 4 + 1
        ends = i % 4 == 3
        low = jnp.where(ends, low + words[group % 3], low)
        return low, jnp.where(ends, high + words[(group + 1) % 3] + jnp.uint32(group), high)

    unroll = mesh.platform() != "cpu"
    return jax.lax.fori_loop(0, 20, one_round, (counter[0] + words[0], counter[1] + words[1]), unroll=unroll)


def _divisor(temperature_b: jax.Array) -> jax.Array:
    return jnp.where(temperature_b <= 0.0, 1.0, temperature_b)[:, None]


def _unpack(bits_bw: jax.Array, vocab_size: int) -> jax.Array:
    bits_bwn = (bits_bw[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_bwn.reshape(bits_bw.shape[0], -1)[:, :vocab_size] > 0


def _filtered(x_bv: jax.Array, temperature_b: jax.Array, top_k_b: jax.Array, top_p_b: jax.Array) -> jax.Array:
    """-inf for tokens that top-k and top-p leave out."""
    filtered_b = ((top_k_b > 0) | (top_p_b < 1.0)) & (temperature_b > 0.0)

    def lowest(x_bv: jax.Array) -> jax.Array:
        most_b1 = _reduced(jnp.maximum, x_bv)[:, None]
        weight_bv = jnp.exp(x_bv - most_b1)
        least_b1 = _least_weight(weight_bv, top_k_b, top_p_b)[:, None]
        kept_bv = (weight_bv >= least_b1) & (weight_bv > 0.0)
        return jnp.where(filtered_b, _reduced(jnp.minimum, jnp.where(kept_bv, x_bv, jnp.inf)), -jnp.inf)

    # One number a row: logits that a branch only passes on are copied.
    lowest_b = jax.lax.cond(
        jnp.any(filtered_b), lowest, lambda _: jnp.full(filtered_b.shape, -jnp.inf, x_bv.dtype), x_bv
    )
    return jnp.where(x_bv < lowest_b[:, None], -jnp.inf, x_bv)


def _in_blocks(x_bv: jax.Array, fill: float) -> jax.Array:
    """[B, N, M], N and M about the root of V; the last block is filled up."""
    b, v = x_bv.shape
    size = 1 << ((v - 1).bit_length() + 1) // 2
    blocks = -(-v // size)
    return jnp.pad(x_bv, ((0, 0), (0, blocks * size - v)), constant_values=fill).reshape(b, blocks, size)


def _block_sums(x_bnm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each block's largest entry (finite, also where there is none) and its sum of exponentials beside that, [B, N].

    Beside its own largest entry, and not the row's, which all of the row would have to be read for first.
    """
    most_bn = jnp.maximum(_reduced(jnp.maximum, x_bnm), jnp.finfo(x_bnm.dtype).min)
    return most_bn, _reduced(jnp.add, x_bnm, lambda x_bnm: jnp.exp(x_bnm - most_bn[..., None]))


def _reduced(ufunc: jnp.ufunc, x: jax.Array, of: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
    """Reduces the last axis of `of(x)`, elementwise, by a ufunc that may take entries in any order.

    On CPU by eighths, each entry with those at its place in the others, for XLA's own reductions are many times slower.
    """
    width, rest = divmod(x.shape[-1], 8)
    if mesh.platform() != "cpu" or rest or width < 8:
        return ufunc.reduce(of(x), axis=-1)
    eighths = [of(x[..., i * width : (i + 1) * width]) for i in range(8)]
    return _reduced(ufunc, functools.reduce(ufunc, eighths))


def _entry(x_bn: jax.Array, index_b: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_bn, index_b[:, None], axis=-1)[:, 0]


def _first_above(cumulative_bn: jax.Array, weight_bn: jax.Array, threshold_b: jax.Array) -> jax.Array:
    """First index with positive weight whose running sum exceeds the threshold; the last such if rounding left none."""
    index = jnp.arange(weight_bn.shape[-1], dtype=jnp.int32)
    positive_bn = weight_bn > 0.0
    above_bn = positive_bn & (cumulative_bn > threshold_b[:, None])
    first_b = jnp.min(jnp.where(above_bn, index, index.size), axis=-1)
    last_b = jnp.max(jnp.where(positive_bn, index, 0), axis=-1)
    return jnp.minimum(first_b, last_b)


def _least_weight(weight_bv: jax.Array, top_k_b: jax.Array, top_p_b: jax.Array) -> jax.Array:
    """The least weight that top-k and then top-p keep, [B] float32.

    Found by bisection over the bits of the float, which order like integers for numbers >= 0: exact, in as many passes
    as there are bits or a third of it, with no sort; and only what somebody asks for. No weight may be above 1.
    """
    on_cpu = mesh.platform() == "cpu"
    at_once = 1 if on_cpu else 3  # bits: elsewhere several sums are made of what is read once
    weight_bnm = weight_bv[:, None] if on_cpu else _in_blocks(weight_bv, 0.0)

    def amounts_from(of: Callable[[jax.Array], jax.Array], least_b: jax.Array) -> jax.Array:
        """What each block's weights from the least on add up to, [B, N]."""

        def kept(weight_bnm: jax.Array) -> jax.Array:
            return jnp.where(weight_bnm >= least_b[:, None, None], of(weight_bnm), 0)

        return _reduced(jnp.add, weight_bnm, kept)

    def highest(of: Callable[[jax.Array], jax.Array], least_b: jax.Array, enough_b: jax.Array) -> jax.Array:
        """The highest threshold, [B] float32, from which on, and from the least on, they still add up to enough."""

        def step(i: jax.Array, low_b: jax.Array) -> jax.Array:
            place = 30 - at_once * (i + 1)  # bit 30 is that of 2 and more
            bits_kb = low_b + (jnp.arange(1, 1 << at_once, dtype=jnp.int32)[:, None] << place)
            threshold_kb = jnp.maximum(jax.lax.bitcast_convert_type(bits_kb, jnp.float32), least_b)
            amount_kbn = jnp.stack([amounts_from(of, threshold_b) for threshold_b in threshold_kb])
            return low_b + (jnp.sum(jnp.sum(amount_kbn, axis=-1) >= enough_b, axis=0, dtype=jnp.int32) << place)

        low_b = jax.lax.fori_loop(0, 30 // at_once, step, jnp.zeros(least_b.size, jnp.int32))
        return jnp.minimum(jax.lax.bitcast_convert_type(low_b, jnp.float32), 1.0)  # top_p 0 keeps the likeliest

    def by_count(nothing_b: jax.Array) -> jax.Array:
        return highest(jnp.ones_like, nothing_b, jnp.where(top_k_b > 0, top_k_b, weight_bv.shape[-1]))

    def by_mass(least_b: jax.Array) -> jax.Array:
        itself = jnp.positive
        least_of_mass_b = highest(itself, least_b, top_p_b * jnp.sum(amounts_from(itself, least_b), axis=-1))
        return jnp.where(top_p_b < 1.0, jnp.maximum(least_of_mass_b, least_b), least_b)

    nothing_b = jnp.zeros(weight_bv.shape[0], weight_bv.dtype)
    least_b = jax.lax.cond(jnp.any(top_k_b > 0), by_count, lambda nothing_b: nothing_b, nothing_b)
    return jax.lax.cond(jnp.any(top_p_b < 1.0), by_mass, lambda least_b: least_b, least_b)
