"""The quickstart learns what it says it learns, and learns nothing from rewards that mean nothing."""

import pytest

from tests.end_to_end import runs


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    return runs.finished(workdir), runs.metrics(workdir), workdir


def test_held_out_reward_rises(quickstart):
    result, _, _ = quickstart
    assert result["eval_reward_before"] <= 0.5
    assert result["eval_reward_after"] >= 0.9


def test_sampler_and_learner_agree_on_every_sampled_token(quickstart):
    result, metrics, _ = quickstart
    assert 0 < result["sampler_learner_logprob_diff"] < 1e-5  # fp32: rounding of two different programs
    assert all(row["policy/sampler_learner_logprob_diff_max"] < 1e-3 for row in metrics if row["step"] > 0)


def test_work_directory_holds_what_the_design_names(quickstart):
    result, metrics, workdir = quickstart
    assert [row["step"] for row in metrics] == list(range(result["total_steps"] + 1))
    assert {"reward/mean", "policy/kl", "policy/entropy", "policy/grad_norm", "time/sample_s"} <= metrics[-1].keys()
    assert (workdir / "checkpoints" / "latest").resolve().name == f"step-{result['total_steps']}"
    assert {"config.json", "store.sqlite3"} <= {path.name for path in workdir.iterdir()}
    assert all((workdir / "checkpoints" / name).exists() for name in map(str, result["checkpoints"]))


def test_shuffled_rewards_teach_nothing(quickstart, tmp_path):
    learned, metrics, _ = quickstart
    at_half = next(row["eval/reward"] for row in metrics if row["step"] == 24)
    flags = ("--config.algorithm.shuffle_rewards=true", "--config.runtime.total_steps=24")
    control = runs.finished(tmp_path / "run", *flags)
    assert control["eval_reward_before"] == learned["eval_reward_before"]
    assert control["eval_reward_after"] <= control["eval_reward_before"] + 0.1 < at_half - 0.2
