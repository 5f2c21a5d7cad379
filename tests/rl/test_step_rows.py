"""Recorded rollouts to rows under the settings that decide which of them count, and for how much."""

import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config as config_lib
from lightning_jax import rows
from lightning_jax.store import CallRecord, RolloutRecord


def settings(**algorithm):
    flags = {f"algorithm.{name}": str(value) for name, value in algorithm.items()}
    return config_lib.merge(environ={}, flag_overrides=flags | {"sampler.max_tokens": "8"})


def rollout(group, reward, *calls):
    calls = list(calls) or [call(0, [5, 6])]
    failed = {"cause": "crash", "error": "E", "traceback": ""} if reward is None else {}
    rest = {"rollout_id": 0, "task_id": "t", "task_index": group, "sample": 0, "step": 1, "mode": "train"}
    of_it = {"cause": None, "error": None, "traceback": None, "attempt": 1, "duration_s": 1.0} | failed
    status = "failed" if reward is None else "succeeded"
    return RolloutRecord(**rest, **of_it, group=group, status=status, reward=reward, calls=calls)


def call(index, sampled, **changes):
    prompt = changes.pop("prompt", [1, 2])
    return CallRecord(np.array(prompt), np.array(sampled), np.full(len(sampled), -1.0), index=index, **changes)


def test_zero_variance_groups_are_left_out_and_counted():
    records = [rollout(0, 1.0), rollout(0, 1.0), rollout(1, 0.0), rollout(1, 1.0), rollout(2, 0.0), rollout(2, None)]
    made, return_n, group_n = rows.of_step(records, settings(filter_groups=True), ["m"], 1)
    np.testing.assert_array_equal(return_n, [np.nan, np.nan, 0, 1, np.nan, np.nan])
    assert [row.rollout_index for row in made["m"]] == [2, 3] and group_n.tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.informative_groups(records, settings(filter_groups=True), 1) == 1
    made, _, _ = rows.of_step(records, settings(), ["m"], 1)
    assert [row.rollout_index for row in made["m"]] == [0, 1, 2, 3]


def test_the_groups_that_are_counted_are_those_that_are_learned_from():
    """Also where chance deals out the rewards: for each step anew."""
    records = [rollout(group, float(sample)) for group in range(8) for sample in range(2)]
    chance = settings(filter_groups=True, shuffle_rewards=True)
    counts = set()
    for step in range(6):
        _, return_n, group_n = rows.of_step(records, chance, ["m"], step)
        counts.add(rows.informative_groups(records, chance, step))
        assert rows.informative_groups(records, chance, step) == len(set(group_n[np.isfinite(return_n)]))
    assert len(counts) > 1


def test_truncated_calls_are_context_and_their_rollouts_count():
    """The second reply of the conversation was cut off; the other rollout was cut off at once."""
    first, second = call(0, [3]), call(1, [5, 6], prompt=[1, 2, 3, 4], parent=0, finish_reason="length", reward=0.5)
    records = [rollout(0, 1.0, first, second), rollout(0, 0.0, call(0, [7], finish_reason="length"))]
    made, return_n, _ = rows.of_step(records, settings(mask_truncated=True), ["m"], 1)
    (row,) = made["m"]
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.loss_mask.tolist() == [0, 0, 1, 0, 0, 0]
    assert row.reward.tolist() == [0, 0, 1.5, 0, 0, 0]  # what came after it came after this token
    assert return_n.tolist() == [1.5, 0]
    kept, _, _ = rows.of_step(records, settings(), ["m"], 1)
    assert [row.loss_mask.sum() for row in kept["m"]] == [3, 1]


def test_long_calls_cost_their_rollout():
    """max_tokens 8 and a buffer of 4: nothing up to 4 tokens, 0.5 at 6 and 1 at 8."""
    lengths = (4, 6, 8)
    records = [rollout(0, 1.0, call(0, [3] * length)) for length in lengths]
    made, return_n, _ = rows.of_step(records, settings(overlong_buffer=4), ["m"], 1)
    assert return_n.tolist() == [1, 0.5, 0]
    assert [row.reward[row.loss_mask][-1] for row in made["m"]] == [1, 0.5, 0]


def test_what_another_model_earned_counts_for_the_call_before():
    calls = call(0, [3], model="a"), call(1, [4], model="b", reward=2.0), call(2, [5], model="a", reward=4.0)
    made, _, _ = rows.of_step([rollout(0, 1.0, *calls), rollout(0, 0.0)], settings(), ["a", "b"], 1)
    earned = {name: [float(row.reward.sum()) for row in of_model] for name, of_model in made.items()}
    assert earned == {"a": [2.0, 5.0], "b": [7.0]}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"name": "rloo", "scale_rewards": "none"},
            "algorithm.scale_rewards is a setting of 'grpo', and",
        ),
        ({"name": "reinforce++", "credit": "step"}, "algorithm.credit is a setting of 'grpo'"),
        ({"gamma": 0.9}, "algorithm.gamma is a setting of 'reinforce\\+\\+' and 'ppo'"),
        ({"loss_mode": "gspo", "dual_clip": 3}, "algorithm.dual_clip bounds the ratio of loss_mode 'clip'"),
        ({"kl_in_reward": True, "kl_coef": 0}, "algorithm.kl_in_reward is without effect where algorithm.kl_coef is 0"),
        (
            {"credit": "step", "scale_rewards": "none"},
            "algorithm.scale_rewards does not go with algorithm.credit",
        ),
        (
            {"credit": "step", "filter_groups": True},
            "algorithm.filter_groups goes by total rewards, and algorithm.credit",
        ),
        ({"importance_cap": 3}, "algorithm.importance_cap bounds the weights of algorithm.importance_correction"),
        ({"max_gen_batches": 2}, "algorithm.max_gen_batches is for algorithm.filter_groups"),
        ({"overlong_buffer": 5000}, "algorithm.overlong_buffer must be at most sampler.max_tokens \\(8\\), not 5000"),
        ({"kl_estimator": "k1", "kl_coef": 0}, "algorithm.kl_estimator is without effect where algorithm.kl_coef is 0"),
        ({"dual_clip": 1}, "algorithm.dual_clip must be greater than 1"),
        ({"kl_estimator": "k4"}, "algorithm.kl_estimator must be one of 'k1'"),
    ],
)
def test_settings_that_do_not_go_together(given, says):
    with pytest.raises(InvalidConfigError, match=f"{says}.*flag --config.algorithm"):
        settings(**given)


@pytest.mark.parametrize("cut", [{"sampler.top_p": "0.9"}, {"sampler.top_k": "5"}])
def test_importance_weights_need_the_whole_distribution(cut):
    flags = {"runtime.max_staleness": "1", "algorithm.importance_correction": "token_truncate"}
    config_lib.merge(environ={}, flag_overrides=flags)
    with pytest.raises(InvalidConfigError, match="importance_correction weighs tokens by their whole distribution"):
        config_lib.merge(environ={}, flag_overrides=flags | cut)
