"""Token log-probs without ever holding [B, T, V] logits, and the policy losses made of them.

Axes as in `model/llama.py`. Everything per token is about the token at its own position: `logprob_bt[b, t]` is the
log-prob of token t given the tokens before it, and is 0 at t = 0, which nothing predicts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import mesh
from lightning_jax.model import llama

# Logits of one chunk, [chunk, V] float32: 256 MB, on GPU 1 GB. Smaller chunks add the [D, V] gradient up more often
# than the matrix product takes, which on GPU is sooner done; larger ones cost memory and gain nothing.
_CHUNK_LOGITS, _GPU_CHUNK_LOGITS = 1 << 26, 1 << 28
_SMALL_CHUNK = 1024  # tokens, which are not divided to skip some of them

# exp() of a larger difference of log-probs says nothing more and overflows float32 at 88.
_MAX_LOG_RATIO = 20.0


def token_logprobs(
    params: llama.Params,
    config: llama.LlamaConfig,
    x_btd: jax.Array,
    token_bt: jax.Array,
    temperature_bt: jax.Array,
    wanted_bt: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each wanted token and entropy of the distribution it was drawn from, at the token's temperature.

    Logits are made, reduced and forgotten a chunk of tokens at a time, and made again in the backward pass; where one
    chunk is all, they are kept for it. Wanted tokens come first, and chunks without any are left out: of prompts and
    padding there are no logits.

    Args:
        params: whose unembedding is used.
        x_btd: [B, T, D], final hidden states of `llama.forward`.
        token_bt: [B, T] int32, the tokens that `x_btd` was computed of.
        temperature_bt: [B, T] float32, that each token was sampled with; 0 (greedy) counts as 1.
        wanted_bt: [B, T] bool.
        chunk: tokens at a time, a divisor of a device's B * T; by default `chunk_length`.

    Returns:
        logprob_bt: [B, T] float32, nats; 0 where the token is not wanted, and at position 0.
        entropy_bt: [B, T] float32, nats; likewise.
    """
    w, axes = (params["embed_vd"], "vd") if config.tie_embeddings else (params["unembed_dv"], "dv")
    of_rows = functools.partial(_token_logprobs, axes=axes, chunk=chunk)
    return mesh.on_own_rows(of_rows, w, x_btd, token_bt, temperature_bt, wanted_bt)


def _token_logprobs(w, x_btd, token_bt, temperature_bt, wanted_bt, *, axes, chunk):
    """`token_logprobs` on one device, of its rows; their tokens are one axis, `N`, which is `I` chunks of `C`."""
    b, t = token_bt.shape
    chunk = chunk or chunk_length(b * t, w.shape[axes.index("v")], mesh.platform())
    temperature_bt = jnp.where(temperature_bt == 0, 1.0, temperature_bt)
    wanted_bt &= jnp.arange(t) > 0
    # What is known of the next token, at the position of the hidden state that predicts it.
    target_n, temperature_n, wanted_n = (
        jnp.roll(x, -1, axis=1).reshape(b * t) for x in (token_bt, temperature_bt, wanted_bt)
    )
    arrays = [x_btd.reshape(b * t, -1), target_n, temperature_n, wanted_n]
    with jax.named_scope("token_logprobs"):
        if chunk < b * t:
            order_n = jnp.argsort(~wanted_n, stable=True)
            arrays = [x[order_n] for x in arrays]
        scores = _scores(axes, w, *(x.reshape(-1, chunk, *x.shape[1:]) for x in arrays))
        scores = [x_ic.reshape(b * t) for x_ic in scores]
        if chunk < b * t:
            place_n = jnp.argsort(order_n)
            scores = [x_n[place_n] for x_n in scores]
        return tuple(jnp.where(wanted_bt, jnp.roll(x_n.reshape(b, t), 1, axis=1), 0.0) for x_n in scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    axes: str, w: jax.Array, x_icd: jax.Array, target_ic: jax.Array, temperature_ic: jax.Array, wanted_ic: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of chunks of tokens, [I, C] float32 each; 0 where nothing of a chunk is wanted.

    With a backward pass of its own: JAX's would reduce the logits of each chunk again, and add up the gradients of `w`,
    the unembedding with axes "vd" or "dv", in the dtype of `w`.
    """
    return _scores_forward(axes, w, x_icd, target_ic, temperature_ic, wanted_ic)[0]


def _scores_forward(
    axes: str, w: jax.Array, x_icd: jax.Array, target_ic: jax.Array, temperature_ic: jax.Array, wanted_ic: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    axis, chunks = _vocab_axis(), (x_icd, target_ic, temperature_ic)

    def score(x_cd: jax.Array, target_c: jax.Array, temperature_c: jax.Array) -> tuple[jax.Array, ...]:
        logits = _logits(axes, w, x_cd, temperature_c)
        most_c = jnp.max(logits, axis)
        weight = jnp.exp(logits - jnp.expand_dims(most_c, axis))
        sum_c = jnp.sum(weight, axis)
        # A masked sum, not a gather: it works on a sharded vocabulary.
        logit_c = jnp.sum(jnp.where(_is_target(target_c, logits.shape), logits, 0.0), axis)
        logprob_c = logit_c - most_c - jnp.log(sum_c)
        logsum_c = most_c + jnp.log(sum_c)
        entropy_c = logsum_c - jnp.sum(weight * logits, axis) / sum_c
        return logprob_c, entropy_c, logsum_c, logits

    def add_chunk(i: jax.Array, results: list[jax.Array], *chunk: jax.Array) -> list[jax.Array]:
        return [x_ic.at[i].set(x_c) for x_ic, x_c in zip(results, score(*chunk)[:3], strict=True)]

    if len(x_icd) == 1:
        *results, logits = score(*(x[0] for x in chunks))
        logprob_ic, entropy_ic, logsum_ic = (x_c[None] for x_c in results)
    else:
        nothing, logits = [jnp.zeros(target_ic.shape)] * 3, None
        logprob_ic, entropy_ic, logsum_ic = _each_wanted(add_chunk, nothing, wanted_ic, chunks)
    return (logprob_ic, entropy_ic), (w, chunks, wanted_ic, (entropy_ic, logsum_ic), logits)


def _scores_backward(axes: str, saved: tuple, d_scores: tuple[jax.Array, jax.Array]) -> tuple[jax.Array | None, ...]:
    w, chunks, wanted_ic, results, logits = saved
    axis, chunks = _vocab_axis(), (*chunks, *results, *d_scores)
    out, product = "vc" if axis == 0 else "cv", functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def gradients(
        logits: jax.Array, x_cd: jax.Array, target_c: jax.Array, *per_token: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        temperature, entropy, logsum, d_logprob, d_entropy = (jnp.expand_dims(x_c, axis) for x_c in per_token)
        logprobs = logits - logsum
        d_logits = jnp.where(_is_target(target_c, logits.shape), d_logprob, 0.0)
        d_logits -= jnp.exp(logprobs) * (d_logprob + d_entropy * (logprobs + entropy))
        # Products in the dtype to compute in: in float32 they would take twice as long on GPU.
        d_logits = (d_logits / temperature).astype(w.dtype)
        return product(f"{out},cd->{axes}", d_logits, x_cd), product(f"{out},{axes}->cd", d_logits, w)

    def add_chunk(i: jax.Array, sums: tuple[jax.Array, jax.Array], *chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_cd, target_c, temperature_c, *_ = chunk
        d_w, d_x_cd = gradients(_logits(axes, w, x_cd, temperature_c), *chunk)
        return sums[0] + d_w, sums[1].at[i].set(d_x_cd.astype(x_cd.dtype))

    if logits is not None:
        d_w, d_x_cd = gradients(logits, *(x[0] for x in chunks))
        d_x_icd = d_x_cd[None].astype(chunks[0].dtype)
    else:
        nothing = jnp.zeros(w.shape), jnp.zeros_like(chunks[0])
        d_w, d_x_icd = _each_wanted(add_chunk, nothing, wanted_ic, chunks)
    return d_w.astype(w.dtype), d_x_icd, None, None, None


_scores.defvjp(_scores_forward, _scores_backward)


def _each_wanted(visit: Callable, carry: Any, wanted_ic: jax.Array, arrays: tuple[jax.Array, ...]) -> Any:
    """`visit(i, carry, *chunk)` with each chunk `i` of the arrays in which a token is wanted; those come first."""
    count = jnp.sum(jnp.any(wanted_ic, axis=1), dtype=jnp.int32)

    def step(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        i, carry = state
        chunk = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in arrays)
        return i + 1, visit(i, carry, *chunk)

    def goes_on(state: tuple[jax.Array, Any]) -> jax.Array:
        return (state[0] < len(wanted_ic)) & (state[0] < count)  # the constant tells `hlo_costs` the most turns

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), carry))[1]


def _vocab_axis() -> int:
    """Of a chunk's logits. The compiler for CPU is slow at products of many columns, and at sums along them."""
    return 0 if mesh.platform() == "cpu" else 1


def _logits(axes: str, w: jax.Array, x_cd: jax.Array, temperature_c: jax.Array) -> jax.Array:
    """[V, C] or [C, V] float32, see `_vocab_axis`, at each token's temperature."""
    axis = _vocab_axis()
    operands = (f"{axes},cd->vc", w, x_cd) if axis == 0 else (f"cd,{axes}->cv", x_cd, w)
    with jax.named_scope("unembed"):
        logits = jnp.einsum(*operands, preferred_element_type=jnp.float32)
    return logits / jnp.expand_dims(temperature_c, axis)


def _is_target(target_c: jax.Array, shape: tuple[int, int]) -> jax.Array:
    axis = _vocab_axis()
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) == jnp.expand_dims(target_c, axis)


def chunk_length(num_tokens: int, vocab_size: int, platform: str) -> int:
    """The largest part of so many tokens that keeps a chunk's logits within bounds and leaves some chunks to skip."""
    count, most = 1, (_GPU_CHUNK_LOGITS if platform == "gpu" else _CHUNK_LOGITS) // vocab_size
    while num_tokens // count > most or (count < 4 and num_tokens // count > _SMALL_CHUNK):
        count = next(n for n in range(count + 1, num_tokens + 1) if num_tokens % n == 0)
    return num_tokens // count


LOSS_MODES = ("clip", "gspo", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3", "k3+")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")


def clipped_surrogate(
    logprob_bt: jax.Array,
    old_logprob_bt: jax.Array,
    advantage_bt: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The clipped policy loss (PPO, arXiv:1707.06347, eq. 7, negated; separate bounds as in DAPO, arXiv:2503.14476).

    Args:
        logprob_bt: [B, T] float32, under the policy that learns.
        old_logprob_bt: [B, T] float32, under the policy that sampled; no gradient flows into it.
        advantage_bt: [B, T] float32.
        clip_low, clip_high: the ratio's gain ends at 1 - clip_low and 1 + clip_high.
        dual_clip: the loss of a negative advantage ends at this ratio (arXiv:1912.09729, eq. 5); None for no end.

    Returns:
        loss_bt, ratio_bt: [B, T] float32.
        clipped_bt: [B, T] bool, where a bound holds the gradient back.
    """
    ratio_bt = importance_ratio(logprob_bt, old_logprob_bt)
    gain_bt = ratio_bt * advantage_bt
    bounded_bt = jnp.clip(ratio_bt, 1 - clip_low, 1 + clip_high) * advantage_bt
    loss_bt, clipped_bt = -jnp.minimum(gain_bt, bounded_bt), bounded_bt < gain_bt
    if dual_clip is not None:
        most_bt = -dual_clip * advantage_bt
        beyond_bt = (advantage_bt < 0) & (loss_bt > most_bt)
        loss_bt, clipped_bt = jnp.where(beyond_bt, most_bt, loss_bt), clipped_bt | beyond_bt
    return loss_bt, ratio_bt, clipped_bt


def importance_ratio(logprob_bt: jax.Array, old_logprob_bt: jax.Array) -> jax.Array:
    """[B, T] float32: exp(logprob - old_logprob), without a gradient into the latter."""
    log_ratio_bt = logprob_bt - jax.lax.stop_gradient(old_logprob_bt)
    return jnp.exp(jnp.clip(log_ratio_bt, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def sequence_logprobs(
    logprob_bt: jax.Array, old_logprob_bt: jax.Array, loss_mask_bt: jax.Array, segment_bt: jax.Array
) -> jax.Array:
    """What takes `logprob_bt`'s place in the clipped loss for GSPO's ratio (arXiv:2507.18071, eq. 7 and 14).

    A sequence is a row, so that several in a block have ratios of their own. Every token's value is that of its
    sequence's mean log-ratio above its own old log-prob, and its gradient that of its own log-prob.

    Args:
        logprob_bt, old_logprob_bt: [B, T] float32, 0 where `loss_mask_bt` is False.
        loss_mask_bt: [B, T] bool.
        segment_bt: [B, T] int32, the sequence that each token belongs to, at most T.
    """

    def mean(log_ratio_t: jax.Array, mask_t: jax.Array, segment_t: jax.Array) -> jax.Array:
        def total(x_t: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(x_t, segment_t, num_segments=x_t.shape[0] + 1)[segment_t]

        return total(log_ratio_t) / jnp.maximum(total(mask_t.astype(jnp.float32)), 1.0)

    log_ratio_bt = jax.lax.stop_gradient(logprob_bt - old_logprob_bt)
    mean_bt = jax.vmap(mean)(jnp.where(loss_mask_bt, log_ratio_bt, 0.0), loss_mask_bt, segment_bt)
    return jax.lax.stop_gradient(old_logprob_bt) + mean_bt + (logprob_bt - jax.lax.stop_gradient(logprob_bt))


def cispo(
    logprob_bt: jax.Array, old_logprob_bt: jax.Array, advantage_bt: jax.Array, *, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5, negated): the weight is clipped, every token has a gradient.

    Arguments and results as for `clipped_surrogate`; `clipped_bt` is where the weight is.
    """
    ratio_bt = jax.lax.stop_gradient(importance_ratio(logprob_bt, old_logprob_bt))
    weight_bt = jnp.clip(ratio_bt, 1 - clip_low, 1 + clip_high)
    return -weight_bt * advantage_bt * logprob_bt, ratio_bt, weight_bt != ratio_bt


def kl_divergence(logprob_bt: jax.Array, reference_logprob_bt: jax.Array, estimator: str = "k3") -> jax.Array:
    """Estimate of KL(policy || reference) from sampled tokens (Schulman, "Approximating KL divergence", 2020).

    With d = log policy - log reference: k1 = d and k2 = d^2 / 2; k3 = exp(-d) + d - 1, unbiased and never negative
    (DeepSeekMath, eq. 4). As a loss, k2 alone has the gradient of the divergence in expectation: "k3+" is k3 with the
    gradient of k2.

    Arguments and result are [B, T] float32, nats. No gradient flows into the reference.
    """
    log_ratio_bt = jax.lax.stop_gradient(reference_logprob_bt) - logprob_bt
    if estimator == "k1":
        return -log_ratio_bt
    k2_bt = 0.5 * jnp.square(log_ratio_bt)
    if estimator == "k2":
        return k2_bt
    log_ratio_bt = jnp.clip(log_ratio_bt, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    k3_bt = jnp.exp(log_ratio_bt) - log_ratio_bt - 1
    if estimator == "k3":
        return k3_bt
    return k2_bt + jax.lax.stop_gradient(k3_bt - k2_bt)


def divisor(aggregation: str, loss_mask_bt: np.ndarray, share_bt: np.ndarray | None, longest: float) -> float:
    """What the sum of an optimizer step's token losses is divided by, so that its micro-batches add up to the whole.

    A sequence is a rollout, whatever number of rows it has.

        token-mean           the mean over tokens (DAPO, arXiv:2503.14476, eq. 8)
        seq-mean-token-mean  the mean over rollouts of their tokens' mean (GRPO: DeepSeekMath, eq. 3)
        seq-mean-token-sum   the mean over rollouts of their tokens' sum
        constant             that over a constant (Dr. GRPO, arXiv:2503.20783, listing 1)

    Args:
        aggregation: one of AGGREGATIONS.
        loss_mask_bt: [B, T] bool, of the whole optimizer step.
        share_bt: [B, T] float32, 1 / (tokens of the rollout) at its tokens and 0 elsewhere, so that its sum counts
            rollouts, those in part too; unused for the mean over tokens.
        longest: the constant.
    """
    if aggregation == "token-mean":
        return float(loss_mask_bt.sum())
    rollouts = float(np.sum(share_bt, dtype=np.float64))
    return rollouts * longest if aggregation == "constant" else rollouts


def grpo_loss(
    logprob_bt: jax.Array,
    old_logprob_bt: jax.Array,
    reference_logprob_bt: jax.Array | None,
    entropy_bt: jax.Array,
    advantage_bt: jax.Array,
    loss_mask_bt: jax.Array,
    divisor: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
    loss_mode: str = "clip",
    dual_clip: float | None = None,
    kl_estimator: str = "k3",
    segment_bt: jax.Array | None = None,
    weight_bt: jax.Array | None = None,
    share_bt: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective of GRPO and its relatives, negated (DeepSeekMath, eq. 3), with an entropy bonus.

    Args:
        logprob_bt, entropy_bt: [B, T] float32, of the policy that learns, from `token_logprobs`.
        old_logprob_bt: [B, T] float32, of the policy that sampled.
        reference_logprob_bt: [B, T] float32, of the frozen reference; None without a KL term.
        advantage_bt: [B, T] float32.
        loss_mask_bt: [B, T] bool; other positions have no part in anything.
        divisor: float32 scalar, from the function of this name.
        loss_mode: one of LOSS_MODES.
        segment_bt: [B, T] int32, the rows' numbers in their block, for GSPO.
        weight_bt: [B, T] float32, of each token's policy loss (not of its KL and entropy); None for 1.
        share_bt: [B, T] float32, of each token's whole loss, where rollouts are averaged over; None for 1.

    Returns:
        The loss, a float32 scalar.
        Sums over the masked tokens, by name, for the metrics: "loss" (its share of the update's), "kl", "entropy",
        "clipped_low" and "clipped_high" (at the ratio's bounds below and above 1), "ratio"; and "ratio_max", their
        maximum.
    """

    def total(x_bt: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(loss_mask_bt, x_bt, 0.0))

    # Masked before exp(): where() alone would hide an overflow's value and let its gradient through as NaN.
    logprob_bt = jnp.where(loss_mask_bt, logprob_bt, 0.0)
    old_logprob_bt = jnp.where(loss_mask_bt, old_logprob_bt, 0.0)
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    if loss_mode == "cispo":
        loss_bt, ratio_bt, clipped_bt = cispo(logprob_bt, old_logprob_bt, advantage_bt, **clip)
    else:
        compared_bt = logprob_bt
        if loss_mode == "gspo":
            compared_bt = sequence_logprobs(logprob_bt, old_logprob_bt, loss_mask_bt, segment_bt)
        loss_bt, ratio_bt, clipped_bt = clipped_surrogate(
            compared_bt, old_logprob_bt, advantage_bt, **clip, dual_clip=dual_clip
        )
    if weight_bt is not None:
        loss_bt *= weight_bt
    sums = {"clipped_low": total(clipped_bt & (ratio_bt < 1)), "clipped_high": total(clipped_bt & (ratio_bt > 1))}
    sums |= {"ratio": total(ratio_bt), "entropy": total(entropy_bt)}
    sums["ratio_max"] = jnp.max(jnp.where(loss_mask_bt, ratio_bt, 0.0))
    if reference_logprob_bt is not None:
        kl_bt = kl_divergence(logprob_bt, jnp.where(loss_mask_bt, reference_logprob_bt, 0.0), kl_estimator)
        loss_bt += kl_coef * kl_bt
        sums["kl"] = total(kl_bt)
    if entropy_coef:
        loss_bt -= entropy_coef * entropy_bt
    if share_bt is not None:
        loss_bt *= share_bt
    loss = total(loss_bt) / divisor
    return loss, sums | {"loss": loss}
