"""Two processes with half of the devices each run the job that one process with all of them runs, or end together."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.end_to_end import runs

SMALL = (
    "--config.model.tensor_parallel=2",
    "--config.runtime.total_steps=2",
    "--config.runtime.batch_size=16",
    "--config.runtime.max_seq_len=64",
    "--config.algorithm.group_size=4",
    "--config.sampler.max_slots=8",
    "--config.sampler.page_size=16",
    "--config.sampler.prefill_chunk=16",
    "--config.sampler.kv_cache_tokens=512",
    "--config.agent.nworkers=2",
    "--config.data.test_file=",
)


def processes(command: list[str], num_devices: int) -> list[subprocess.Popen]:
    """Two of them, with so many simulated devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": str(runs.ROOT),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": runs.ROOT}
    return [subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]


def test_two_processes_run_the_job_of_one(tmp_path, monkeypatch):
    both = processes(runs.command(tmp_path / "two", *SMALL), 2)
    outputs = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n\n".join(outputs)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    runs.finished(tmp_path / "one", *SMALL)
    two, one = runs.metrics(tmp_path / "two"), runs.metrics(tmp_path / "one")
    assert [row["step"] for row in two] == [1, 2] and one[1]["reward/std"] > 0 < one[1]["policy/kl"]
    for actual, expected in zip(two, one, strict=True):
        assert actual.keys() == expected.keys()
        names = [name for name in one[0] if name.startswith(("reward/", "policy/", "completion/", "train/tokens"))]
        for name in (name for name in names if "per_s" not in name):
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


FAILING = """
import os, sys, threading, time
import jax
from lightning_jax import config, processes
from agent_lightning.exceptions import TrainingError
from tests.end_to_end import failing

settings = config.default_config().distributed
settings.coordinator = os.environ["JAX_COORDINATOR_ADDRESS"]
settings.num_processes, settings.process_id = 2, int(os.environ["JAX_PROCESS_ID"])
team = processes.join(settings)
assert jax.device_count() == 2 and jax.local_device_count() == 1
if isinstance(team, processes.Leader):
    assert team.run(failing.ranks, "target", 1) == [0, 1]
    try:
        team.run(failing.everywhere, "target")
    except TrainingError as error:
        print("told of:", error)
    getattr(failing, sys.argv[1])(team)
    time.sleep(60)
else:
    team.follow("target")
"""


@pytest.mark.parametrize(
    "case, codes, said",
    [
        ("well", [0, 0], ""),
        ("follower_is_killed", [1, -9], "process 1 has ended; process 0 ends with it"),
        ("leader_is_killed", [-9, 1], "process 0 has ended; process 1 ends with it"),
        ("leader_is_terminated", [-15, 1], "process 0 has ended; process 1 ends with it"),
        ("follower_fails", [1, 1], "only_in_the_follower failed in process 1 alone: ValueError: mine"),
        ("leader_fails", [1, 1], "only_in_the_leader failed in process 0 alone: ValueError('mine')"),
    ],
)
def test_processes_end_together(case, codes, said):
    both = processes([sys.executable, "-c", FAILING, case], 1)
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == codes, "\n\n".join(outputs)
    assert "told of: all alike" in outputs[0] or case == "leader_is_killed"
    assert said in "".join(outputs)
