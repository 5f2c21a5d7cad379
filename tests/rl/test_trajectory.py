"""Calls to rows: what was sampled is trained on, once, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_jax.rl.trajectory import TokenCall, build_rows


def call(call_id, parent, prompt, sampled, **kwargs):
    logprobs = [-(token / 100) for token in sampled]
    return TokenCall(call_id, parent, prompt, sampled, logprobs, **kwargs)


def test_a_conversation_is_one_row_with_its_observations_masked():
    first = call(0, None, [1, 2], [3, 4], temperature=0.5)
    second = call(1, 0, [1, 2, 3, 4, 5, 6], [7], temperature=0.25)
    (row,) = build_rows([first, second], 3)
    np.testing.assert_array_equal(row.token_ids, [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(row.loss_mask, [0, 0, 1, 1, 0, 0, 1])
    np.testing.assert_allclose(row.sampler_logprob, [0, 0, -0.03, -0.04, 0, 0, -0.07])
    np.testing.assert_allclose(row.temperature, [1, 1, 0.5, 0.5, 1, 1, 0.25])
    assert row.rollout_index == 3
    assert (row.token_ids.dtype, row.sampler_logprob.dtype) == (np.int32, np.float32)


def test_a_calls_reward_is_its_last_tokens():
    first = call(0, None, [1, 2], [3, 4], reward=0.5)
    second = call(1, 0, [1, 2, 3, 4, 5], [6], reward=-1.0)
    (row,) = build_rows([first, second], 0)
    np.testing.assert_array_equal(row.reward, [0, 0, 0, 0.5, 0, -1])
    np.testing.assert_array_equal(row.call, [-1, -1, 0, 0, -1, 1])


def test_tokens_of_constrained_calls_are_trained_on_and_marked():
    first = call(0, None, [1, 2], [3, 4], constrained=True)
    second = call(1, 0, [1, 2, 3, 4, 5], [6])
    (row,) = build_rows([first, second], 0)
    np.testing.assert_array_equal(row.loss_mask, [0, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(row.on_policy, [1, 1, 0, 0, 1, 1])


def test_calls_that_do_not_extend_one_another_are_rows_of_their_own():
    rows = build_rows([call(0, None, [1], [2]), call(1, None, [1, 2], [3])], 0)
    assert [row.token_ids.tolist() for row in rows] == [[1, 2], [1, 2, 3]]
    assert [row.loss_mask.tolist() for row in rows] == [[False, True], [False, False, True]]


def test_a_branch_has_the_shared_prefix_as_context_only():
    calls = [call(0, None, [1], [2, 3]), call(1, 0, [1, 2, 3, 4], [5]), call(2, 0, [1, 2, 3, 6], [7])]
    rows = build_rows(calls, 0)
    assert [row.token_ids.tolist() for row in rows] == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]]
    np.testing.assert_array_equal(rows[0].loss_mask, [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(rows[1].loss_mask, [0, 0, 0, 0, 1])


def test_parallel_calls_give_the_same_rows_in_any_order_of_arrival():
    root, left, right = call(0, None, [1], [2]), call(1, 0, [1, 2, 8], [9]), call(2, 0, [1, 2, 4], [5])

    def content(rows):
        return sorted((row.token_ids.tolist(), row.loss_mask.tolist()) for row in rows)

    assert content(build_rows([root, left, right], 0)) == content(build_rows([root, right, left], 0))


def test_a_call_that_sampled_nothing_leaves_no_row_but_may_be_extended():
    assert build_rows([call(0, None, [1, 2], [])], 0) == []
    (row,) = build_rows([call(0, None, [1, 2], []), call(1, 0, [1, 2, 3], [4])], 0)
    np.testing.assert_array_equal(row.loss_mask, [0, 0, 0, 1])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([call(0, None, [], [1])], "empty prompt"),
        ([TokenCall(0, None, [1], [2, 3], [-0.1])], "2 sampled ids and 1 log-probs"),
        ([call(0, None, [1], [2]), call(1, 0, [1, 3], [4])], "does not begin with the tokens of call 0"),
        ([call(0, None, [1], [2]), call(1, 1, [1, 2], [4])], "names 1 as its parent"),
    ],
)
def test_a_broken_record_is_refused(calls, message):
    with pytest.raises(ValueError, match=message):
        build_rows(calls, 0)


@st.composite
def attempts(draw):
    """Calls that extend any earlier call, or none; every sampled id is unique, so that it can be found again."""
    calls, fresh = [], iter(range(1000, 10000))
    for call_id in range(draw(st.integers(1, 8))):
        parent = draw(st.none() | st.integers(0, call_id - 1)) if call_id else None
        held = [] if parent is None else [*calls[parent].prompt_ids, *calls[parent].sampled_ids]
        prompt = held + draw(st.lists(st.integers(0, 9), min_size=0 if held else 1, max_size=3))
        sampled = [next(fresh) for _ in range(draw(st.integers(0, 3)))]
        calls.append(call(call_id, parent, prompt, sampled))
    return calls


@given(attempts())
def test_every_sampled_token_is_trained_on_exactly_once_after_its_own_context(calls):
    trained = {}
    for row in build_rows(calls, 0):
        for position in np.flatnonzero(row.loss_mask):
            token = int(row.token_ids[position])
            assert token not in trained
            trained[token] = (row.token_ids[:position].tolist(), float(row.sampler_logprob[position]))
    expected = {}
    for one in calls:
        for i, token in enumerate(one.sampled_ids):
            expected[token] = ([*one.prompt_ids, *one.sampled_ids[:i]], float(np.float32(one.logprobs[i])))
    assert trained == expected
