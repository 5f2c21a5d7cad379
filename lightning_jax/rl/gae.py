"""Generalized advantage estimation over tokens (arXiv:1506.02438). NumPy in float64, like `advantages.py`.

An action is a sampled token, and its state is everything before it. What stands between two sampled tokens of a row (a
tool's result, the user's next message) is part of the step from one to the other: it has no value and no reward of its
own, and the token sampled after it succeeds the one sampled before it. So credit crosses turns as it crosses tokens.
"""

import numpy as np

_WHITEN_EPS = 1e-8  # added to the variance


def token_gae(
    reward_nt: np.ndarray, value_nt: np.ndarray, mask_nt: np.ndarray, *, gamma: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of sampled tokens (arXiv:1506.02438, eq. 12 and 16; the row's end has the value 0).

        delta_t = r_t + gamma V_t' - V_t,    A_t = delta_t + gamma lambda A_t',    G_t = A_t + V_t

    where t' is the next sampled token of the row, and V_t the value of the state in which token t was sampled.

    Args:
        reward_nt: [N, T] float, of each token; only those of sampled tokens count.
        value_nt: [N, T] float, likewise.
        mask_nt: [N, T] bool, the sampled tokens.
        gamma: discount from a sampled token to the next, 0 to 1.
        gae_lambda: 0 to 1; at 1 an advantage is the discounted sum of rewards less the value.

    Returns:
        advantage_nt, return_nt: [N, T] float64; 0 where `mask_nt` is False.
    """
    mask_nt = np.asarray(mask_nt, bool)
    reward_nt = np.where(mask_nt, reward_nt, 0.0).astype(np.float64)
    value_nt = np.where(mask_nt, value_nt, 0.0).astype(np.float64)
    advantage_nt = np.zeros_like(value_nt)
    next_value_n = next_advantage_n = np.zeros(len(value_nt))
    for t in reversed(range(value_nt.shape[1])):
        delta_n = reward_nt[:, t] + gamma * next_value_n - value_nt[:, t]
        advantage_nt[:, t] = np.where(mask_nt[:, t], delta_n + gamma * gae_lambda * next_advantage_n, 0.0)
        next_advantage_n = np.where(mask_nt[:, t], advantage_nt[:, t], next_advantage_n)
        next_value_n = np.where(mask_nt[:, t], value_nt[:, t], next_value_n)
    return advantage_nt, advantage_nt + value_nt


def whiten(advantage_nt: np.ndarray, mask_nt: np.ndarray) -> np.ndarray:
    """Advantages of mean 0 and Bessel-corrected variance 1 over the masked tokens of all rows.

    Args:
        advantage_nt: [N, T] float.
        mask_nt: [N, T] bool.

    Returns:
        [N, T] float64; 0 where `mask_nt` is False, and everywhere if it holds fewer than two tokens.
    """
    masked_m = np.asarray(advantage_nt, np.float64)[mask_nt]
    whitened_nt = np.zeros(np.shape(advantage_nt))
    if len(masked_m) > 1:
        whitened_nt[mask_nt] = (masked_m - masked_m.mean()) / np.sqrt(masked_m.var(ddof=1) + _WHITEN_EPS)
    return whitened_nt


def explained_variance(value_m: np.ndarray, return_m: np.ndarray) -> float:
    """1 - Var(G - V) / Var(G): 1 for a perfect critic, 0 for a constant one; NaN where all returns are the same.

    Args:
        value_m, return_m: [M] float, of sampled tokens.
    """
    variance = np.var(return_m, dtype=np.float64)
    return float(1 - np.var(return_m - value_m, dtype=np.float64) / variance) if variance else float("nan")
