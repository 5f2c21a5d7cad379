"""Recorded rollouts to training rows: each model's calls to rows of its own."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lightning_jax.rl import trajectory
from lightning_jax.store import CallRecord, RolloutRecord


def calls_of(record: RolloutRecord, model: str | None) -> list[CallRecord]:
    """The rollout's calls of one model, with parents as positions among these; all calls where `model` is None."""
    if model is None:
        return record.calls
    chosen = [i for i, call in enumerate(record.calls) if call.model == model]
    position = {i: n for n, i in enumerate(chosen)}  # a parent is the same model's: nobody extends another's call
    return [dataclasses.replace(record.calls[i], parent=position.get(record.calls[i].parent)) for i in chosen]


def build(records: Sequence[RolloutRecord], trained_n: np.ndarray, model: str | None = None) -> list[trajectory.Row]:
    """The rows of a step's rollouts.

    Args:
        records: `Row.rollout_index` counts them.
        trained_n: [N] bool, the rollouts to take.
        model: take this model's calls alone.
    """
    return [
        row
        for i, record in enumerate(records)
        if trained_n[i]
        for row in trajectory.build_rows([_token_call(call) for call in calls_of(record, model)], i)
    ]


def _token_call(call: CallRecord) -> trajectory.TokenCall:
    return trajectory.TokenCall(
        call_id=call.index,
        parent=call.parent,
        prompt_ids=call.prompt_ids,
        sampled_ids=call.sampled_ids,
        logprobs=call.logprobs,
        temperature=call.temperature,
        policy_version=call.policy_version,
        reward=call.reward,
        constrained=call.constrained,
    )
