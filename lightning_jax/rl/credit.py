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

With a critic (PPO) it is tokens that are credited, along their row (`gae.py`), and `seen_rewards` says with what, where
a trajectory has several rows.
"""

from collections.abc import Sequence

import numpy as np

from lightning_jax.rl import advantages
from lightning_jax.rl.trajectory import Row


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


def seen_rewards(rows: Sequence[Row]) -> list[np.ndarray]:
    """For each row [T] float64, the rewards of its rollout where the row's tokens meet them.

    To a row, the calls of its rollout that are in other rows are a part of the world: what such a call earned comes at
    the end of the row's last call before it. So the sum of rewards from a call on is the same G_ij as `step` has, and
    where an agent rewrites its history, and each call is a row of its own, every call is paid by what came of it.

    Args:
        rows: of whole rollouts, in any order.
    """
    earned: dict[int, dict[int, float]] = {}  # rollout -> call -> reward
    for row in rows:
        of_rollout = earned.setdefault(row.rollout_index, {})
        for call in np.unique(row.call[row.loss_mask]).tolist():
            of_rollout[call] = float(row.reward[row.call == call].sum(dtype=np.float64))
    seen = []
    for row in rows:
        reward_t = np.where(row.loss_mask, row.reward, 0.0).astype(np.float64)
        calls = np.unique(row.call[row.loss_mask]).tolist()
        for call, following in zip(calls, [*calls[1:], np.inf], strict=True):
            between = sum(reward for k, reward in earned[row.rollout_index].items() if call < k < following)
            reward_t[np.flatnonzero(row.call == call)[-1]] += between
        seen.append(reward_t)
    return seen


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """Soft over-long punishment (DAPO, arXiv:2503.14476, eq. 13): 0, then falling to -1 over the last tokens.

    Args:
        length: sampled tokens of a call.
        longest: the most that a call may sample.
        buffer: tokens over which the penalty grows.
    """
    return float(np.clip((longest - buffer - length) / buffer, -1.0, 0.0))
