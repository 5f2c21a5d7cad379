"""The sampler is not the learner: importance weights for what was sampled by slightly other numbers.

The sampler computes with other kernels, batch sizes and caches than the learner, and in bfloat16 or with quantised
weights its probabilities differ. With r = learner's probability / sampler's, of a token or of a row's sampled tokens
together, the policy loss is weighted with

    truncated   min(r, cap)                 truncated importance sampling (TIS)
    masked      r where r <= cap, else 0    masked importance sampling (MIS)

(Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; Liu et al., "When speed
kills stability", 2025). Tokens that are not `Row.on_policy` were drawn from another distribution on purpose; they have
no part in a ratio, and the weight 1 where ratios are the tokens' own.
"""

import numpy as np

from lightning_jax.rl.trajectory import Row

CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# exp() of a larger difference of log-probs says nothing more.
_MAX_LOG_RATIO = 20.0


def weights(row: Row, logprob: np.ndarray, correction: str, cap: float) -> np.ndarray:
    """The weight of each token's policy loss.

    Args:
        row: with the sampler's log-probs.
        logprob: [T] float32, the learner's, before the update.
        correction: one of CORRECTIONS but "none".
        cap: the largest weight.

    Returns:
        [T] float32; 1 where `loss_mask` is False.
    """
    level, _, kind = correction.partition("_")
    compared = row.loss_mask & row.on_policy
    log_ratio = np.where(compared, np.float64(logprob) - row.sampler_logprob, 0.0)
    if level == "sequence":
        log_ratio = np.where(row.loss_mask, log_ratio.sum(), 0.0)
    ratio = np.exp(np.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    weight = np.minimum(ratio, cap) if kind == "truncate" else np.where(ratio <= cap, ratio, 0.0)
    return weight.astype(np.float32)
