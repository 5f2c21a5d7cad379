"""What `algorithm.name` means: from a step's rows and returns to the advantages that the learner is given.

Each algorithm is one entry of `_ALGORITHMS`. What is per rollout is computed in `advantages.py`, what is per token from
the rows' own arrays: `Row.reward` (what each call earned, at its last token) and, where an algorithm asks `score` for
them, the log-probs of the policy and of the reference.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from lightning_jax.rl import advantages, credit, gae, losses, mismatch, packing
from lightning_jax.rl.learner import Scores
from lightning_jax.rl.trajectory import Row


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
    """How rewards become advantages; what the update does with them is in `update.LearnerSettings`.

    Attributes:
        name: one of NAMES.
        scale_rewards: of GRPO, see `advantages.grpo_advantages`.
        gamma: discount from a sampled token to the next.
        gae_lambda: of PPO's advantages, see `gae.token_gae`.
        kl_in_reward: each sampled token's reward is less by `kl_coef` times its divergence from the reference.
        kl_estimator: one of `losses.KL_ESTIMATORS`, for that.
        importance_correction, importance_cap: see `mismatch.py`.
    """

    name: str = "grpo"
    scale_rewards: str = "group"
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_coef: float = 0.001
    kl_in_reward: bool = False
    kl_estimator: str = "k1"
    importance_correction: str = "none"
    importance_cap: float = 2.0

    @property
    def needs_scores(self) -> bool:
        """Whether the models are asked what they say of the rows, before the update."""
        return self.kl_in_reward or self.importance_correction != "none"


def settings_of(config: ml_collections.ConfigDict) -> AlgorithmSettings:
    """What the configuration says of advantages."""
    a, default = config.algorithm, AlgorithmSettings()
    return AlgorithmSettings(
        name=a.name,
        scale_rewards=a.scale_rewards,
        gamma=default.gamma if a.gamma is None else a.gamma,
        gae_lambda=default.gae_lambda if a.gae_lambda is None else a.gae_lambda,
        kl_coef=a.kl_coef,
        kl_in_reward=kl_in_reward(config),
        kl_estimator=kl_estimator(config),
        importance_correction=a.importance_correction,
        importance_cap=a.importance_cap,
    )


def loss_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the configuration says of the loss: those of `update.LearnerSettings`."""
    a = config.algorithm
    return {
        "kl_coef": a.kl_coef,
        "kl_in_reward": kl_in_reward(config),
        "kl_estimator": kl_estimator(config),
        "loss_mode": a.loss_mode,
        "loss_aggregation": a.loss_aggregation,
        "loss_longest": config.sampler.max_tokens,
        "clip_low": a.clip_range if a.clip_low is None else a.clip_low,
        "clip_high": a.clip_range if a.clip_high is None else a.clip_high,
        "dual_clip": a.dual_clip,
        "entropy_coef": a.entropy_coef,
    }


def kl_in_reward(config: ml_collections.ConfigDict) -> bool:
    """Whether the divergence from the reference is in the reward: as it is set, or as the algorithm's paper has it."""
    a = config.algorithm
    return bool(a.kl_coef) and (a.name == "reinforce++" if a.kl_in_reward is None else a.kl_in_reward)


def kl_estimator(config: ml_collections.ConfigDict) -> str:
    """The one that is set; else k1 in the reward, which is the divergence's own sum, and k3 in the loss."""
    return config.algorithm.kl_estimator or ("k1" if kl_in_reward(config) else "k3")


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
    rows = list(step.rows)
    if rows and settings.needs_scores:
        scores = step.score(rows)
        kls = _kls(scores, settings.kl_estimator) if settings.kl_in_reward else [None] * len(rows)
        rows = [_scored(settings, *of_row) for of_row in zip(rows, scores, kls, strict=True)]
    return_n = np.array(step.return_n, np.float64)
    for row, given in zip(rows, step.rows, strict=True):  # KL in the reward is a part of the return
        if settings.kl_in_reward:
            return_n[row.rollout_index] += np.sum(row.reward - given.reward, dtype=np.float64)
    return _ALGORITHMS[settings.name](settings, dataclasses.replace(step, rows=rows, return_n=return_n))


def _kls(scores: Sequence[Scores], estimator: str) -> list[np.ndarray]:
    """[T] float32 of each row, of all rows at once and at a power of two tokens: JAX compiles for each new shape."""
    ends = np.cumsum([len(score.logprob) for score in scores])
    both = np.zeros((2, packing.block_length(int(ends[-1]), minimum=1)), np.float32)
    both[:, : ends[-1]] = np.concatenate([[score.logprob, score.reference_logprob] for score in scores], axis=1)
    return np.split(np.asarray(losses.kl_divergence(*both, estimator)), ends)[: len(scores)]


def _scored(settings: AlgorithmSettings, row: Row, score: Scores, kl: np.ndarray | None) -> Row:
    """A row with the policy's log-probs and what follows from them."""
    changes: dict[str, np.ndarray] = {"old_logprob": score.logprob}
    if settings.kl_in_reward:
        changes["kl"] = np.where(row.loss_mask, kl, 0.0)
        changes["reward"] = np.where(row.loss_mask, row.reward - settings.kl_coef * kl, 0.0)
    if settings.importance_correction != "none":
        changes["weight"] = mismatch.weights(
            row, score.logprob, settings.importance_correction, settings.importance_cap
        )
    return dataclasses.replace(row, **changes)


def _grpo(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    advantage_n = advantages.grpo_advantages(step.return_n, step.group_n, scale=settings.scale_rewards)
    return list(step.rows), advantage_n


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


def _rloo(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    return list(step.rows), advantages.rloo_advantages(step.return_n, step.group_n)


def _reinforce_baseline(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    """REINFORCE++-baseline (arXiv:2501.03262): the group's mean is taken off, then all tokens are whitened together."""
    centred_n = advantages.grpo_advantages(step.return_n, step.group_n, scale="none")
    tokens = [np.full(row.loss_mask.sum(), centred_n[row.rollout_index]) for row in step.rows]
    return _whitened(step.rows, tokens), centred_n


def _reinforce(settings: AlgorithmSettings, step: Step) -> tuple[list[Row], np.ndarray]:
    """REINFORCE++ (arXiv:2501.03262): discounted returns of each token, whitened over all tokens.

    A rollout's tokens are in the order in which they were sampled, whatever rows they are in.
    """
    rows = list(step.rows)
    returns = [np.zeros(len(row)) for row in rows]
    for places in sampled_order(rows).values():
        reward_m = np.array([rows[i].reward[t] for i, t in places], np.float64)
        for (i, t), value in zip(places, advantages.discounted_returns(reward_m, settings.gamma), strict=True):
            returns[i][t] = value
    return _whitened(rows, [of_row[row.loss_mask] for of_row, row in zip(returns, rows, strict=True)]), step.return_n


def sampled_order(rows: Sequence[Row]) -> dict[int, list[tuple[int, int]]]:
    """For each rollout the (row, position) of its sampled tokens, in the order of its calls."""
    order: dict[int, list[tuple[int, int, int]]] = {}
    for i, row in enumerate(rows):
        places = [(int(row.call[t]), i, int(t)) for t in np.flatnonzero(row.loss_mask)]
        order.setdefault(row.rollout_index, []).extend(places)
    return {rollout: [(i, t) for _, i, t in sorted(places)] for rollout, places in order.items()}


def _whitened(rows: Sequence[Row], tokens: Sequence[np.ndarray]) -> list[Row]:
    """The rows with advantages: these values of their sampled tokens, whitened over all of them."""
    if not rows:
        return []
    ends = np.cumsum([len(of_row) for of_row in tokens])[:-1]
    result = []
    for row, value_m in zip(rows, np.split(advantages.whiten(np.concatenate(tokens)), ends), strict=True):
        advantage = np.zeros(len(row), np.float32)
        advantage[row.loss_mask] = value_m
        result.append(dataclasses.replace(row, advantage=advantage))
    return result


_ALGORITHMS = {
    "grpo": _grpo,
    "ppo": _ppo,
    "rloo": _rloo,
    "reinforce++": _reinforce,
    "reinforce++-baseline": _reinforce_baseline,
}
NAMES = tuple(_ALGORITHMS)
