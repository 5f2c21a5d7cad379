"""A run whose rollouts are sampled while it learns: it learns, and a kill in the middle loses no step and no task."""

import collections
import contextlib

from lightning_jax import data
from lightning_jax.store import Store
from lightning_jax.store.trajectories import Filter
from tests.end_to_end import runs

STEPS, TASKS, SAMPLES = 6, 16, 8
FLAGS = (
    "--config.runtime.max_staleness=1",
    "--config.algorithm.importance_correction=token_truncate",
    f"--config.runtime.total_steps={STEPS}",
    f"--config.runtime.batch_size={TASKS * SAMPLES}",
    "--config.runtime.checkpoint_interval=2",
    "--config.runtime.eval_interval=0",
    "--config.agent.nworkers=4",
)


def test_killed_in_the_middle_it_finishes_every_step_and_learns(tmp_path):
    workdir = tmp_path / "run"
    runs.run_until_killed(workdir, *FLAGS, at_step=3)
    result = runs.finished(workdir, *FLAGS)
    rows = [row for row in runs.metrics(workdir) if row["step"]]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert result["train_rewards"] == [row["reward/mean"] for row in rows]
    assert max(row["rollout/staleness_max"] for row in rows) == 1
    assert result["eval_reward_after"] > result["eval_reward_before"] + 0.2

    with contextlib.closing(Store(workdir / "store.sqlite3")) as store:
        order = data.task_batches(store, "config", TASKS, 1, seed=0)
        expected = {step: {item.task_index: SAMPLES for item in next(order)} for step in range(1, STEPS + 1)}
        trained = {step: collections.Counter() for step in expected}
        for _, record in store.ended_rollouts(Filter(mode="train")):
            trained[record.step][record.task_index] += 1
            assert all(0 <= record.step - 1 - call.policy_version <= 1 for call in record.calls)
    assert trained == expected
