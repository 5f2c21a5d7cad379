"""Recorded rollouts to training rows: each model's calls to rows of its own, and what the rollouts earned."""

import dataclasses
from collections.abc import Sequence, Set

import ml_collections
import numpy as np

from lightning_jax import outcomes
from lightning_jax.rl import advantages, credit, trajectory
from lightning_jax.store import CallRecord, RolloutRecord


def of_step(
    records: Sequence[RolloutRecord], config: ml_collections.ConfigDict, models: Sequence[str], step: int
) -> tuple[dict[str, list[trajectory.Row]], np.ndarray, np.ndarray]:
    """What a training step learns from, as `Policies.update` takes it.

    Args:
        records: the step's rollouts.
        config: the run's; its section `algorithm` says what counts.
        models: the names of those that learn.
        step: its number, for the noise of `algorithm.shuffle_rewards`.

    Returns:
        By model, the rows of the rollouts that are trained on.
        return_n: [N] float32, the rollouts' total rewards as they are trained on; NaN for those left out.
        group_n: [N] int32, the group of each.
    """
    a = config.algorithm
    if a.overlong_buffer:
        records = [_with_overlong_penalty(r, config.sampler.max_tokens, a.overlong_buffer) for r in records]
    return_n = np.array([outcomes.total_reward(r) for r in records], np.float32)
    group_n = np.array([r.group for r in records], np.int32)
    if a.shuffle_rewards:
        return_n = _shuffled(return_n, np.random.default_rng((config.seed, step)))
    rewards = call_rewards(records, return_n, is_shuffled=a.shuffle_rewards)
    if a.filter_groups:
        return_n[advantages.zero_variance_groups(return_n, group_n)] = np.nan
    credits = step_advantages(records, rewards, return_n, group_n) if a.credit == "step" else None
    trained_n = advantages.trained_rollouts(return_n, group_n)
    rows = {
        name: build(
            records, trained_n, name if len(models) > 1 else None, credits, rewards, mask_truncated=a.mask_truncated
        )
        for name in models
    }
    return rows, return_n, group_n


def informative_groups(records: Sequence[RolloutRecord], config: ml_collections.ConfigDict, step: int) -> int:
    """How many groups `algorithm.filter_groups` leaves of a step's rollouts."""
    _, return_n, group_n = of_step(records, config, [], step)
    return len(np.unique(group_n[np.isfinite(return_n)]))


def _shuffled(return_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rewards dealt out anew among the step's surviving rollouts: the control that must not learn."""
    survivor_n = np.flatnonzero(np.isfinite(return_n))
    shuffled_n = return_n.copy()
    shuffled_n[survivor_n] = return_n[rng.permutation(survivor_n)]
    return shuffled_n


def _with_overlong_penalty(record: RolloutRecord, longest: int, buffer: int) -> RolloutRecord:
    """The rollout with its calls' rewards less what their lengths cost."""
    calls = [
        dataclasses.replace(call, reward=call.reward + credit.overlong_penalty(len(call.sampled_ids), longest, buffer))
        for call in record.calls
    ]
    return dataclasses.replace(record, calls=calls)


def calls_of(record: RolloutRecord, model: str | None) -> list[CallRecord]:
    """The rollout's calls of one model, with parents as positions among these; all calls where `model` is None."""
    if model is None:
        return record.calls
    chosen = [i for i, call in enumerate(record.calls) if call.model == model]
    position = {i: n for n, i in enumerate(chosen)}  # a parent is the same model's: nobody extends another's call
    return [dataclasses.replace(record.calls[i], parent=position.get(record.calls[i].parent)) for i in chosen]


def call_rewards(
    records: Sequence[RolloutRecord], return_n: np.ndarray, *, is_shuffled: bool = False
) -> list[np.ndarray]:
    """For each rollout [J] float64, what each of its calls earned: AIR's, and on the last one the agent's return too.

    Args:
        records: a step's rollouts.
        return_n: [N] float32, their total rewards; NaN for those that failed.
        is_shuffled: `return_n` is of other rollouts (`algorithm.shuffle_rewards`), and all that there is to credit.
    """
    rewards = []
    for record, total in zip(records, return_n, strict=True):
        of_calls = [0.0 if is_shuffled else call.reward for call in record.calls]
        rewards.append(credit.transition_rewards(of_calls, total if is_shuffled else record.reward or 0.0))
    return rewards


def step_advantages(
    records: Sequence[RolloutRecord], rewards: Sequence[np.ndarray], return_n: np.ndarray, group_n: np.ndarray
) -> list[dict[int, float]]:
    """For each rollout its calls' advantages, by `CallRecord.index`, where `algorithm.credit` is "step".

    A call is credited with what came after it, whichever model was called.

    Args:
        records: a step's rollouts.
        rewards: from `call_rewards`.
        return_n: [N] float32, their total rewards; NaN for those that failed.
        group_n: [N] int32, the group of each.
    """
    by_call = credit.step_advantages(rewards, group_n, advantages.trained_rollouts(return_n, group_n))
    return [
        {call.index: float(advantage) for call, advantage in zip(record.calls, advantage_j, strict=True)}
        for record, advantage_j in zip(records, by_call, strict=True)
    ]


def build(
    records: Sequence[RolloutRecord],
    trained_n: np.ndarray,
    model: str | None = None,
    call_advantages: Sequence[dict[int, float]] | None = None,
    rewards: Sequence[np.ndarray] | None = None,
    *,
    mask_truncated: bool = False,
) -> list[trajectory.Row]:
    """The rows of a step's rollouts.

    Args:
        records: `Row.rollout_index` counts them.
        trained_n: [N] bool, the rollouts to take.
        model: take this model's calls alone.
        call_advantages: from `step_advantages`; None where a rollout's advantage is that of all its calls.
        rewards: from `call_rewards`; None where nobody asks for `Row.reward`. What a call earned that is in no row (it
            is another model's, or sampled nothing) counts for the call before it: it came after that one's tokens.
        mask_truncated: calls that were cut off at their length are context alone (DAPO, arXiv:2503.14476, section 3.4,
            overlong filtering); their rollouts' rewards count all the same.
    """

    def token_calls(i: int, record: RolloutRecord) -> list[trajectory.TokenCall]:
        of_call = call_advantages[i] if call_advantages is not None else {}
        calls = calls_of(record, model)
        masked = {call.index for call in calls if mask_truncated and call.finish_reason == "length"}
        reward_j = np.zeros(len(calls)) if rewards is None else _earned(record, calls, rewards[i], masked)
        return [
            _token_call(call, float(reward), of_call.get(call.index), call.index in masked)
            for call, reward in zip(calls, reward_j, strict=True)
        ]

    return [
        row
        for i, record in enumerate(records)
        if trained_n[i]
        for row in trajectory.build_rows(token_calls(i, record), i)
    ]


def _earned(record: RolloutRecord, calls: Sequence[CallRecord], reward_j: np.ndarray, masked: Set[int]) -> np.ndarray:
    """[len(calls)] float64: the rewards of all the record's calls, each at the last of `calls` trained on by then."""
    earned = np.zeros(len(calls))
    with_tokens = {call.index: n for n, call in enumerate(calls) if len(call.sampled_ids) and call.index not in masked}
    latest = None
    for call, reward in zip(record.calls, reward_j, strict=True):
        latest = with_tokens.get(call.index, latest)
        if latest is not None:
            earned[latest] += reward
    return earned


def _token_call(call: CallRecord, reward: float, advantage: float | None, masked: bool) -> trajectory.TokenCall:
    return trajectory.TokenCall(
        call_id=call.index,
        parent=call.parent,
        prompt_ids=call.prompt_ids,
        sampled_ids=call.sampled_ids,
        logprobs=call.logprobs,
        temperature=call.temperature,
        policy_version=call.policy_version,
        reward=reward,
        constrained=call.constrained,
        advantage=advantage,
        masked=masked,
    )
