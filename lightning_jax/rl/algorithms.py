"""What `algorithm.name` means: from a step's rows and returns to the advantages that the learner is given.

Each algorithm is one entry of `_ALGORITHMS`. What is per rollout is computed in `advantages.py`, what is per token from
the rows' own arrays: `Row.reward` (what each call earned, at its last token) and, where an algorithm asks `score` for
them, the log-probs of the policy and of the reference.
"""

import dataclasses
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from lightning_jax.rl import advantages, credit, gae
from lightning_jax.rl.learner import Scores
from lightning_jax.rl.trajectory import Row


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
    """How rewards become advantages; what the update does with them is in `update.LearnerSettings`.

    Attributes:
        name: one of NAMES.
        gamma: discount from a sampled token to the next.
        gae_lambda: of PPO's advantages, see `gae.token_gae`.
    """

    name: str = "grpo"
    gamma: float = 1.0
    gae_lambda: float = 0.95


def settings_of(config: ml_collections.ConfigDict) -> AlgorithmSettings:
    """What the configuration says of advantages."""
    a, default = config.algorithm, AlgorithmSettings()
    return AlgorithmSettings(
        name=a.name,
        gamma=default.gamma if a.gamma is None else a.gamma,
        gae_lambda=default.gae_lambda if a.gae_lambda is None else a.gae_lambda,
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """One model's part in a training step.

    Attributes:
        rows: of the rollouts that are trained on, in any order.
        return_n: [N] float32, the rollouts' total rewards; NaN or infinite marks a failed one.
        group_n: [N] int32, the group (task) that each rollout belongs to.
        score: what the models say of rows, in their order (`Learner.score`).
        values: what the critic says of them (`Learner.values`).
    """

    rows: Sequence[Row]
    return_n: np.ndarray
    group_n: np.ndarray
    score: Callable[[Sequence[Row]], list[Scores]]
    values: Callable[[Sequence[Row]], list[np.ndarray]]


def prepare(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    """The rows as `Learner.update` takes them, and [N] float32 advantages of those without advantages of their own."""
    return _ALGORITHMS[settings.name](settings, step)


def _grpo(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    return list(step.rows), advantages.grpo_advantages(step.return_n, step.group_n)


def _ppo(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    """Whitened advantages of a critic (`gae.py`); groups have no part in them."""
    values, rewards = step.values(step.rows), credit.seen_rewards(step.rows)
    shape = len(step.rows), max((len(row) for row in step.rows), default=0)
    value_nt, reward_nt, mask_nt = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for n, row in enumerate(step.rows):
        value_nt[n, : len(row)], reward_nt[n, : len(row)], mask_nt[n, : len(row)] = values[n], rewards[n], row.loss_mask
    advantage_nt, return_nt = gae.token_gae(
        reward_nt, value_nt, mask_nt, gamma=settings.gamma, gae_lambda=settings.gae_lambda
    )
    advantage_nt = gae.whiten(advantage_nt, mask_nt)

    def of_row(x_nt: np.ndarray, n: int) -> np.ndarray:
        return x_nt[n, : len(step.rows[n])].astype(np.float32)

    rows = [
        dataclasses.replace(row, advantage=of_row(advantage_nt, n), value=values[n], value_target=of_row(return_nt, n))
        for n, row in enumerate(step.rows)
    ]
    return rows, np.zeros(len(step.return_n), np.float32)


_ALGORITHMS = {"grpo": _grpo, "ppo": _ppo}
NAMES = tuple(_ALGORITHMS)
