"""Token log-probs without ever holding [B, T, V] logits, and the policy losses made of them.

Axes as in `model/llama.py`. Everything per token is about the token at its own position: `logprob_bt[b, t]` is the
log-prob of token t given the tokens before it, and is 0 at t = 0, which nothing predicts.
"""

import jax
import jax.numpy as jnp

from lightning_jax.model import llama

# Logits of one chunk, [B, chunk, V] float32: 256 MB. Smaller chunks add the [D, V] gradient up more often than the
# matrix product takes; larger ones cost memory and gain nothing.
_CHUNK_LOGITS = 1 << 26

# exp() of a larger difference of log-probs says nothing more and overflows float32 at 88.
_MAX_LOG_RATIO = 20.0


def token_logprobs(
    params: llama.Params,
    config: llama.LlamaConfig,
    x_btd: jax.Array,
    token_bt: jax.Array,
    temperature_bt: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each token and entropy of the distribution it was drawn from, at the token's temperature.

    Logits are made, reduced and forgotten a chunk of positions at a time, in the backward pass too.

    Args:
        params: whose unembedding is used.
        x_btd: [B, T, D], final hidden states of `llama.forward`.
        token_bt: [B, T] int32, the tokens that `x_btd` was computed of.
        temperature_bt: [B, T] float32, that each token was sampled with; 0 (greedy) counts as 1.
        chunk: positions at a time, a divisor of T; by default, what keeps the logits under 256 MB.

    Returns:
        logprob_bt: [B, T] float32, nats.
        entropy_bt: [B, T] float32, nats.
    """
    b, t = token_bt.shape
    chunk = chunk or chunk_length(b, t, config.vocab_size)
    target_bt = jnp.roll(token_bt, -1, axis=1)
    next_temperature_bt = jnp.roll(jnp.where(temperature_bt == 0, 1.0, temperature_bt), -1, axis=1)

    # The parameters are an argument: what a checkpointed function closes over is saved, not computed again.
    @jax.checkpoint
    def score(params, x_bcd, target_bc, temperature_bc):
        logprob_bcv = jax.nn.log_softmax(llama.unembed(params, config, x_bcd) / temperature_bc[..., None])
        # A masked sum, not a gather: its gradient needs no scatter, and it works on a sharded vocabulary.
        chosen_bcv = jnp.arange(config.vocab_size) == target_bc[..., None]
        logprob_bc = jnp.sum(jnp.where(chosen_bcv, logprob_bcv, 0.0), axis=-1)
        entropy_bc = -jnp.sum(jnp.exp(logprob_bcv) * logprob_bcv, axis=-1)
        return logprob_bc, entropy_bc

    with jax.named_scope("token_logprobs"):
        if chunk == t:
            logprob_bt, entropy_bt = score(params, x_btd, target_bt, next_temperature_bt)
        else:
            chunks = [
                x.reshape(b, t // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)
                for x in (x_btd, target_bt, next_temperature_bt)
            ]
            scores = jax.lax.map(lambda chunk_of: score(params, *chunk_of), chunks)
            logprob_bt, entropy_bt = (x.swapaxes(0, 1).reshape(b, t) for x in scores)
        return tuple(jnp.roll(x, 1, axis=1).at[:, 0].set(0.0) for x in (logprob_bt, entropy_bt))


def chunk_length(b: int, t: int, vocab_size: int) -> int:
    """The largest T / 2**n that keeps a chunk's logits within bounds."""
    chunk = t
    while chunk % 2 == 0 and b * chunk * vocab_size > _CHUNK_LOGITS:
        chunk //= 2
    return chunk


def clipped_surrogate(
    logprob_bt: jax.Array, old_logprob_bt: jax.Array, advantage_bt: jax.Array, *, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The clipped policy loss (PPO, arXiv:1707.06347, eq. 7, negated; separate bounds as in DAPO, arXiv:2503.14476).

    Args:
        logprob_bt: [B, T] float32, under the policy that learns.
        old_logprob_bt: [B, T] float32, under the policy that sampled; no gradient flows into it.
        advantage_bt: [B, T] float32.
        clip_low, clip_high: the ratio's gain ends at 1 - clip_low and 1 + clip_high.

    Returns:
        loss_bt, ratio_bt: [B, T] float32.
        clipped_bt: [B, T] bool, where the bound holds the gradient back.
    """
    log_ratio_bt = logprob_bt - jax.lax.stop_gradient(old_logprob_bt)
    ratio_bt = jnp.exp(jnp.clip(log_ratio_bt, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    gain_bt = ratio_bt * advantage_bt
    bounded_bt = jnp.clip(ratio_bt, 1 - clip_low, 1 + clip_high) * advantage_bt
    return -jnp.minimum(gain_bt, bounded_bt), ratio_bt, bounded_bt < gain_bt


def k3_divergence(logprob_bt: jax.Array, reference_logprob_bt: jax.Array) -> jax.Array:
    """Unbiased, never negative estimate of KL(policy || reference) from sampled tokens (DeepSeekMath, eq. 4).

    Both arguments and the result are [B, T] float32, nats. No gradient flows into the reference.
    """
    log_ratio_bt = jax.lax.stop_gradient(reference_logprob_bt) - logprob_bt
    log_ratio_bt = jnp.clip(log_ratio_bt, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.exp(log_ratio_bt) - log_ratio_bt - 1


def grpo_loss(
    logprob_bt: jax.Array,
    old_logprob_bt: jax.Array,
    reference_logprob_bt: jax.Array | None,
    entropy_bt: jax.Array,
    advantage_bt: jax.Array,
    loss_mask_bt: jax.Array,
    num_tokens: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """GRPO's objective, negated (DeepSeekMath, eq. 3), averaged over tokens (DAPO, eq. 8) and with an entropy bonus.

    Args:
        logprob_bt, entropy_bt: [B, T] float32, of the policy that learns, from `token_logprobs`.
        old_logprob_bt: [B, T] float32, of the policy that sampled.
        reference_logprob_bt: [B, T] float32, of the frozen reference; None when `kl_coef` is 0.
        advantage_bt: [B, T] float32.
        loss_mask_bt: [B, T] bool; other positions have no part in anything.
        num_tokens: float32 scalar, masked tokens of the whole update, so that the losses of its micro-batches add up
            to the loss of the whole.

    Returns:
        The loss, a float32 scalar.
        Sums over the masked tokens, by name, for the metrics: "loss" (its share of the update's), "kl", "entropy",
        "clipped", "ratio"; and "ratio_max", their maximum.
    """

    def total(x_bt: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(loss_mask_bt, x_bt, 0.0))

    # Masked before exp(): where() alone would hide an overflow's value and let its gradient through as NaN.
    logprob_bt = jnp.where(loss_mask_bt, logprob_bt, 0.0)
    old_logprob_bt = jnp.where(loss_mask_bt, old_logprob_bt, 0.0)
    loss_bt, ratio_bt, clipped_bt = clipped_surrogate(
        logprob_bt, old_logprob_bt, advantage_bt, clip_low=clip_low, clip_high=clip_high
    )
    sums = {"clipped": total(clipped_bt), "ratio": total(ratio_bt), "entropy": total(entropy_bt)}
    sums["ratio_max"] = jnp.max(jnp.where(loss_mask_bt, ratio_bt, 0.0))
    if reference_logprob_bt is not None:
        kl_bt = k3_divergence(logprob_bt, jnp.where(loss_mask_bt, reference_logprob_bt, 0.0))
        loss_bt += kl_coef * kl_bt
        sums["kl"] = total(kl_bt)
    if entropy_coef:
        loss_bt -= entropy_coef * entropy_bt
    loss = total(loss_bt) / num_tokens
    return loss, sums | {"loss": loss}
