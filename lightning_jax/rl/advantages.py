"""Rewards to advantages. NumPy in float64: a step has hundreds of rollouts, and rounding here is bias everywhere."""

import numpy as np


def trained_rollouts(return_n: np.ndarray, group_n: np.ndarray) -> np.ndarray:
    """Which rollouts take part in the update: those that succeeded, in groups with at least two such.

    Args:
        return_n: [N] float, a trajectory's total reward; NaN or infinite marks a failed rollout.
        group_n: [N] int, the group (task) that each trajectory belongs to.

    Returns:
        [N] bool.
    """
    survived_n = np.isfinite(return_n)
    group_index_n = np.unique(group_n, return_inverse=True)[1]
    survivors_g = np.bincount(group_index_n, weights=survived_n)
    return survived_n & (survivors_g[group_index_n] >= 2)


SCALES = ("group", "batch", "none")


def zero_variance_groups(return_n: np.ndarray, group_n: np.ndarray) -> np.ndarray:
    """[N] bool: the rollouts of groups whose survivors all have the same return, and so nothing to compare."""
    flat_n = np.zeros(len(return_n), bool)
    for group in np.unique(group_n):
        member_n = np.asarray(group_n) == group
        flat_n |= member_n & (len(np.unique(return_n[member_n & np.isfinite(return_n)])) < 2)
    return flat_n


def grpo_advantages(
    return_n: np.ndarray, group_n: np.ndarray, *, scale: str = "group", std_eps: float = 1e-6
) -> np.ndarray:
    """Group-relative advantages (DeepSeekMath, arXiv:2402.03300, section 4.1.2, outcome supervision).

    A group with one survivor has nothing to be compared with, and gets 0 (verl gives it its raw return).

    Args:
        return_n: [N] float32, a trajectory's total reward; NaN or infinite marks a failed rollout.
        group_n: [N] int32, the group (task) that each trajectory belongs to.
        scale: what returns less their group's mean are divided by: the standard deviation of the "group" or of the
            returns of the whole "batch" (arXiv:2508.08221, section 4.1), or "none" (Dr. GRPO, arXiv:2503.20783, eq. 3).
        std_eps: added to the Bessel-corrected standard deviation.

    Returns:
        [N] float32; 0 for failed rollouts and for groups with fewer than two survivors.
    """
    trained_n = trained_rollouts(return_n, group_n)
    advantage_n = np.zeros(len(return_n), np.float32)
    divisor = 1.0
    if scale == "batch" and trained_n.any():
        divisor = np.asarray(return_n, np.float64)[trained_n].std(ddof=1) + std_eps
    for group in np.unique(np.asarray(group_n)[trained_n]):
        member_n = trained_n & (group_n == group)
        return_m = np.asarray(return_n)[member_n]
        if scale == "group":
            advantage_n[member_n] = normalise(return_m, std_eps)
        else:
            advantage_n[member_n] = (return_m.astype(np.float64) - return_m.astype(np.float64).mean()) / divisor
    return advantage_n


def rloo_advantages(return_n: np.ndarray, group_n: np.ndarray) -> np.ndarray:
    """Returns less the mean of the group's others: REINFORCE leave-one-out (arXiv:2402.14740, section 3.2).

    Arguments and result as for `grpo_advantages`.
    """
    trained_n = trained_rollouts(return_n, group_n)
    advantage_n = np.zeros(len(return_n), np.float32)
    for group in np.unique(np.asarray(group_n)[trained_n]):
        member_n = trained_n & (group_n == group)
        return_m = np.asarray(return_n, np.float64)[member_n]
        others_m = (return_m.sum() - return_m) / (len(return_m) - 1)
        advantage_n[member_n] = return_m - others_m
    return advantage_n


def discounted_returns(reward_m: np.ndarray, gamma: float) -> np.ndarray:
    """What follows each token, its own reward included: G_t = r_t + gamma G_(t+1) (REINFORCE++, arXiv:2501.03262).

    Args:
        reward_m: [M] float, of a trajectory's sampled tokens alone, in order: other tokens discount nothing.
        gamma: the discount of a token.

    Returns:
        [M] float64.
    """
    return_m = np.zeros(len(reward_m))
    following = 0.0
    for m in range(len(reward_m) - 1, -1, -1):
        following = return_m[m] = float(reward_m[m]) + gamma * following
    return return_m


def whiten(value_m: np.ndarray) -> np.ndarray:
    """[M] float64: the values of all of a batch's sampled tokens with mean 0 and Bessel-corrected variance 1."""
    value_m = np.asarray(value_m, np.float64)
    if len(value_m) < 2:
        return np.zeros_like(value_m)
    return (value_m - value_m.mean()) / np.sqrt(value_m.var(ddof=1) + 1e-8)


def normalise(return_m: np.ndarray, std_eps: float) -> np.ndarray:
    """[M] float64: returns less their mean, over their Bessel-corrected standard deviation; 0 for a single one."""
    return_m = return_m.astype(np.float64)
    if len(return_m) < 2:
        return np.zeros_like(return_m)
    return (return_m - return_m.mean()) / (return_m.std(ddof=1) + std_eps)
