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


def grpo_advantages(return_n: np.ndarray, group_n: np.ndarray, *, std_eps: float = 1e-6) -> np.ndarray:
    """Group-relative advantages (DeepSeekMath, arXiv:2402.03300, section 4.1.2, outcome supervision).

    Args:
        return_n: [N] float32, a trajectory's total reward; NaN or infinite marks a failed rollout.
        group_n: [N] int32, the group (task) that each trajectory belongs to.
        std_eps: added to the group's Bessel-corrected standard deviation.

    Returns:
        [N] float32; 0 for failed rollouts and for groups with fewer than two survivors.
    """
    trained_n = trained_rollouts(return_n, group_n)
    advantage_n = np.zeros(len(return_n), np.float32)
    for group in np.unique(np.asarray(group_n)[trained_n]):
        member_n = trained_n & (group_n == group)
        advantage_n[member_n] = normalise(np.asarray(return_n)[member_n], std_eps)
    return advantage_n


def normalise(return_m: np.ndarray, std_eps: float) -> np.ndarray:
    """[M] float64: returns less their mean, over their Bessel-corrected standard deviation; 0 for a single one."""
    return_m = return_m.astype(np.float64)
    if len(return_m) < 2:
        return np.zeros_like(return_m)
    return (return_m - return_m.mean()) / (return_m.std(ddof=1) + std_eps)
