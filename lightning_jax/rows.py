"""Recorded rollouts to training rows: each model's calls to rows of its own."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lightning_jax.rl import advantages, credit, trajectory
from lightning_jax.store import CallRecord, RolloutRecord


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
) -> list[trajectory.Row]:
    """The rows of a step's rollouts.

    Args:
        records: `Row.rollout_index` counts them.
        trained_n: [N] bool, the rollouts to take.
        model: take this model's calls alone.
        call_advantages: from `step_advantages`; None where a rollout's advantage is that of all its calls.
        rewards: from `call_rewards`; None where nobody asks for `Row.reward`. What a call earned that is in no row (it
            is another model's, or sampled nothing) counts for the call before it: it came after that one's tokens.
    """

    def token_calls(i: int, record: RolloutRecord) -> list[trajectory.TokenCall]:
        of_call = call_advantages[i] if call_advantages is not None else {}
        calls = calls_of(record, model)
        reward_j = np.zeros(len(calls)) if rewards is None else _earned(record, calls, rewards[i])
        return [
            _token_call(call, float(reward), of_call.get(call.index))
            for call, reward in zip(calls, reward_j, strict=True)
        ]

    return [
        row
        for i, record in enumerate(records)
        if trained_n[i]
        for row in trajectory.build_rows(token_calls(i, record), i)
    ]


def _earned(record: RolloutRecord, calls: Sequence[CallRecord], reward_j: np.ndarray) -> np.ndarray:
    """[len(calls)] float64: the rewards of all the record's calls, each at the last of `calls` with tokens by then."""
    earned = np.zeros(len(calls))
    with_tokens = {call.index: n for n, call in enumerate(calls) if len(call.sampled_ids)}
    latest = None
    for call, reward in zip(record.calls, reward_j, strict=True):
        latest = with_tokens.get(call.index, latest)
        if latest is not None:
            earned[latest] += reward
    return earned


def _token_call(call: CallRecord, reward: float, advantage: float | None) -> trajectory.TokenCall:
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
    )
