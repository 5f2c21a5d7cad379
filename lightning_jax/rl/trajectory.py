"""Recorded model calls to training rows.

The calls of one attempt form a forest: a call whose prompt begins with everything an earlier call held (its prompt and
what was sampled) has that call as its parent. A chain of such calls is one row, in which the text between two replies
(tool results, user turns) is context but is not trained on. Where two calls extend the same parent, one goes on with
the parent's row and the other starts a row of its own; the prefix they share is context there, so that a sampled token
is trained on in exactly one row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenCall:
    """One model call, token for token as the sampler saw it.

    Attributes:
        call_id: its number within the attempt.
        parent: index, in the attempt's list of calls, of the earlier call that this one extends; None for none.
        prompt_ids: what the model was given; never empty.
        sampled_ids: what it sampled, with the end-of-sequence id if it sampled one.
        logprobs: [len(sampled_ids)] float32, nats, under the distribution that was sampled from.
        temperature: that it was sampled with; 0 is greedy.
        constrained: a grammar, penalties or the like changed the distribution, see `SamplingParams.constrained`.
        policy_version: of the weights that sampled.
        reward: credited to this call.
        advantage: of this call's tokens, where calls have advantages of their own; None where the rollout's holds.
        masked: its tokens are context and are not trained on.
    """

    call_id: int
    parent: int | None
    prompt_ids: Sequence[int]
    sampled_ids: Sequence[int]
    logprobs: Sequence[float] | np.ndarray
    temperature: float = 1.0
    policy_version: int = 0
    reward: float = 0.0
    constrained: bool = False
    advantage: float | None = None
    masked: bool = False


@dataclasses.dataclass
class Row:
    """One sequence to train on; every array is [T].

    Attributes:
        token_ids: int32.
        loss_mask: bool, True on sampled tokens (the sampled end-of-sequence id too).
        sampler_logprob: float32, nats, as recorded; 0 where `loss_mask` is False.
        temperature: float32; 1 where `loss_mask` is False.
        rollout_index: the rollout in the step's batch that the row belongs to.
        on_policy: bool, False on tokens of a `TokenCall.constrained`; by default all are True. Those tokens are trained
            on like the others, as if the policy had drawn them itself: the more it agrees with the grammar, the truer
            that is. But their recorded log-probs are of another distribution than the learner's, and are not compared
            with its own.
        call: int32, the `TokenCall.call_id` of each sampled token, -1 elsewhere: it orders the tokens of an attempt's
            several rows.
        reward: float32, a call's `TokenCall.reward` at its last sampled token, 0 elsewhere.
        advantage: float32, 0 where `loss_mask` is False; None where the rollout's advantage is every token's.
        old_logprob: float32, nats, of the policy that the update begins with (`Learner.score`); 0 where `loss_mask` is
            False; None to have the update compute it.
        value: float32, of the state in which each token was sampled (`Learner.values`); None without a critic.
        value_target: float32, the return that the critic is to learn; None without one.
        weight: float32, of each token's policy loss (`mismatch.py`); None for 1.
        kl: float32, nats, divergence from the reference where it is in the reward (`algorithms.py`), 0 where
            `loss_mask` is False; else None.
        share: float32, 1 / (sampled tokens of the rollout, in all its rows); the learner fills it in.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    sampler_logprob: np.ndarray
    temperature: np.ndarray
    rollout_index: int
    on_policy: np.ndarray | None = None
    call: np.ndarray | None = None
    reward: np.ndarray | None = None
    advantage: np.ndarray | None = None
    old_logprob: np.ndarray | None = None
    value: np.ndarray | None = None
    value_target: np.ndarray | None = None
    weight: np.ndarray | None = None
    kl: np.ndarray | None = None
    share: np.ndarray | None = None

    def __post_init__(self):
        if self.on_policy is None:
            self.on_policy = np.ones(len(self.token_ids), bool)

    def __len__(self) -> int:
        return len(self.token_ids)


def build_rows(calls: Sequence[TokenCall], rollout_index: int) -> list[Row]:
    """The rows of one attempt. Calls that sampled nothing are context at most; a row of only such calls is left out.

    Args:
        calls: of one attempt, parents before children.
        rollout_index: stored in every row.

    Raises:
        ValueError: a call does not begin with its parent's tokens, or its log-probs do not match its tokens.
    """
    children: dict[int | None, list[int]] = {}
    for index, call in enumerate(calls):
        _check(calls, index)
        children.setdefault(call.parent, []).append(index)
    # By content, not by arrival: agents that call in parallel must give the same rows in every run.
    successor = {
        parent: min(indices, key=lambda i: (list(calls[i].prompt_ids), list(calls[i].sampled_ids)))
        for parent, indices in children.items()
        if parent is not None
    }
    rows = []
    for index, call in enumerate(calls):
        if call.parent is not None and successor[call.parent] == index:
            continue  # it continues its parent's row
        chain = [index]
        while chain[-1] in successor:
            chain.append(successor[chain[-1]])
        row = _row([calls[i] for i in chain], rollout_index)
        if row.loss_mask.any():
            rows.append(row)
    return rows


def _row(chain: Sequence[TokenCall], rollout_index: int) -> Row:
    """One row of calls each of which extends the one before."""
    token_ids = np.array([*chain[-1].prompt_ids, *chain[-1].sampled_ids], np.int32)
    row = Row(
        token_ids=token_ids,
        loss_mask=np.zeros(len(token_ids), bool),
        sampler_logprob=np.zeros(len(token_ids), np.float32),
        temperature=np.ones(len(token_ids), np.float32),
        rollout_index=rollout_index,
        call=np.full(len(token_ids), -1, np.int32),
        reward=np.zeros(len(token_ids), np.float32),
        advantage=None if chain[0].advantage is None else np.zeros(len(token_ids), np.float32),
    )
    for call in chain:
        if call.masked:
            continue
        sampled = slice(len(call.prompt_ids), len(call.prompt_ids) + len(call.sampled_ids))
        row.loss_mask[sampled] = True
        row.sampler_logprob[sampled] = call.logprobs
        row.temperature[sampled] = call.temperature
        row.on_policy[sampled] = not call.constrained
        row.call[sampled] = call.call_id
        if sampled.stop > sampled.start:
            row.reward[sampled.stop - 1] = call.reward
        if row.advantage is not None:
            row.advantage[sampled] = call.advantage
    return row


def _check(calls: Sequence[TokenCall], index: int) -> None:
    call = calls[index]
    if not len(call.prompt_ids):
        raise ValueError(f"call {call.call_id} has an empty prompt: nothing predicts its first token")
    if len(call.logprobs) != len(call.sampled_ids):
        raise ValueError(
            f"call {call.call_id} has {len(call.sampled_ids)} sampled ids and {len(call.logprobs)} log-probs"
        )
    if call.parent is None:
        return
    if not 0 <= call.parent < index:
        raise ValueError(
            f"call {call.call_id} is number {index} and names {call.parent} as its parent, not an earlier one"
        )
    parent = calls[call.parent]
    held = [*parent.prompt_ids, *parent.sampled_ids]
    if list(call.prompt_ids[: len(held)]) != held:
        raise ValueError(f"the prompt of call {call.call_id} does not begin with the tokens of call {parent.call_id}")
