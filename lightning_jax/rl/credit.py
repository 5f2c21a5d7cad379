"""Which of a trajectory's transitions is credited with which of its rewards (`algorithm.credit`).

`trajectory`: the trajectory's total is one return, and every transition has its advantage (DeepSeekMath,
arXiv:2402.03300, section 4.1.2, outcome supervision: `advantages.grpo_advantages`).

`step`: a transition is credited with what came from it on. Its return is the sum of the rewards from its own to the
last one's, G_ij = sum over k >= j of r_ik, and its advantage is group-relative over all transitions of the group:

    A_ij = (G_ij - mean(G)) / (std(G) + eps),    G = {G_ij : i in the group, j a transition of trajectory i}

The neighbour is DeepSeekMath's process supervision (section 4.1.3), which normalises the single rewards r_ij in the
same way and sums afterwards, so that a trajectory with more rewarded steps has larger advantages; here the
normalisation comes last, and advantages keep unit variance whatever the number of steps. With one transition in each
trajectory `step` and `trajectory` are the same.
"""

from collections.abc import Sequence

import numpy as np

from lightning_jax.rl import advantages


def transition_rewards(call_rewards: Sequence[float], agent_return: float) -> np.ndarray:
    """[J] float64, the rewards of a trajectory's transitions: their own, and on the last one the agent's return too."""
    reward_j = np.array(call_rewards, np.float64)
    reward_j[-1:] += agent_return
    return reward_j


def step_advantages(
    rewards: Sequence[np.ndarray], group_n: np.ndarray, trained_n: np.ndarray, *, std_eps: float = 1e-6
) -> list[np.ndarray]:
    """Group-relative advantages of returns-to-go; see the module's text.

    Args:
        rewards: N trajectories, each [J] float, the rewards of its transitions in order.
        group_n: [N] int, the group (task) that each trajectory belongs to.
        trained_n: [N] bool, those that take part (`advantages.trained_rollouts`).
        std_eps: added to the group's Bessel-corrected standard deviation.

    Returns:
        For each trajectory [J] float32; 0 where it takes no part.
    """
    # Sums from the end, in float64: rounding here is bias everywhere.
    returns = [np.cumsum(np.asarray(reward_j, np.float64)[::-1])[::-1] for reward_j in rewards]
    result = [np.zeros(len(return_j), np.float32) for return_j in returns]
    for group in np.unique(np.asarray(group_n)[trained_n]):
        members = [int(n) for n in np.flatnonzero(trained_n & (group_n == group)) if len(returns[n])]
        if members:
            normalised = advantages.normalise(np.concatenate([returns[n] for n in members]), std_eps)
            ends = np.cumsum([len(returns[n]) for n in members])[:-1]
            for n, advantage_j in zip(members, np.split(normalised, ends), strict=True):
                result[n][:] = advantage_j
    return result
