"""Two models between which a task is split: the reward of their common answer teaches both, and neither suffices."""

from tests.end_to_end import runs

FLAGS = (
    "--config.runtime.total_steps=4",
    "--config.runtime.eval_interval=0",
    "--config.runtime.checkpoint_interval=0",
)


def test_together_they_reach_what_neither_reaches_alone(tmp_path):
    """In the controls one of them learns from the same rewards, and the other stays as it is."""
    both = runs.finished(tmp_path / "both", *FLAGS, config="configs/two_models.py")
    assert both["eval_reward_before"] <= 0.1
    assert both["eval_reward_after"] >= 0.5
    for frozen in ("query", "answer"):
        flag = f"--config.models.{frozen}.learning_rate=0"
        alone = runs.finished(tmp_path / f"no_{frozen}", *FLAGS, flag, config="configs/two_models.py")
        assert alone["eval_reward_before"] == both["eval_reward_before"]
        assert alone["eval_reward_after"] <= 0.15

    workdir = tmp_path / "both"
    last = runs.metrics(workdir)[-1]
    for name in ("query", "answer"):
        assert both["model_checkpoints"][name] == [str(workdir / "checkpoints" / "step-4" / name)]
        assert last[f"{name}/policy/kl"] > 0 and last[f"{name}/policy/sampler_learner_logprob_diff"] < 1e-5
