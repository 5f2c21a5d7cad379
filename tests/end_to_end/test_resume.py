"""A run that is killed goes on to the very curve that an undisturbed run has."""

import signal
import subprocess
import time

import pytest

from tests.end_to_end import runs

FLAGS = (
    "--config.runtime.total_steps=6",
    "--config.runtime.batch_size=64",
    "--config.runtime.checkpoint_interval=2",
    "--config.runtime.eval_interval=3",
    "--config.agent.nworkers=4",
    "--config.algorithm.lr_schedule=cosine",
    "--config.algorithm.warmup_steps=2",
)


def curve(workdir) -> list[dict]:
    """What training computed, to the last bit; not how long it took or how busy the sampler was.

    How the sampler's log-probs differ from the learner's is left out: that is rounding, at 1e-7 here, which may depend
    on who shares a batch, and nothing is computed from it.
    """
    groups = ("step", "reward/", "policy/", "eval/", "completion/", "rollout/", "train/tokens", "train/sampled_tokens")
    return [
        {
            key: value
            for key, value in row.items()
            if key.startswith(groups) and not key.startswith("policy/sampler_learner") and "per_s" not in key
        }
        for row in runs.metrics(workdir)
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.finished(workdir, *FLAGS)
    return curve(workdir)


@pytest.mark.parametrize("at_step", [0, 3])
def test_killed_and_started_again_gives_the_same_curve(undisturbed, tmp_path, at_step):
    workdir = tmp_path / "run"
    runs.run_until_killed(workdir, *FLAGS, at_step=at_step)
    result = runs.finished(workdir, *FLAGS)
    assert curve(workdir) == undisturbed
    assert result["train_rewards"] == [row["reward/mean"] for row in undisturbed if row["step"] > 0]


def test_interrupted_twice_it_ends_at_once_and_goes_on_to_the_same_curve(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(runs.command(workdir, *FLAGS), cwd=runs.ROOT, stderr=subprocess.PIPE, text=True)
    while not any(row["step"] >= 1 for row in runs.metrics(workdir)) and process.poll() is None:
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output = process.communicate(timeout=100)[1]
    assert process.returncode == 130 and "stopping now" in output and "Traceback" not in output, output
    runs.finished(workdir, *FLAGS)
    assert curve(workdir) == undisturbed
