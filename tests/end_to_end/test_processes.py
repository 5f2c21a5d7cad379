"""Two processes with half of the devices each run the job that one process with all of them runs, or end together."""

import concurrent.futures
import multiprocessing.connection
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

import lightning_jax.processes
from agent_lightning import Client
from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config
from lightning_jax.rl import checkpoint
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


def processes(command: list[str], num_devices: int, *others: str) -> list[subprocess.Popen]:
    """Two of them, with so many simulated devices each; `others` are more arguments of the second."""
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
    commands = [command, [*command, *others]]
    return [subprocess.Popen(commands[i], env=env | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]


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


def test_two_processes_plan(tmp_path):
    both = processes(runs.command(tmp_path / "two", *SMALL, "--config.mode=plan"), 2)
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n\n".join(outputs)
    assert "everything fits" in outputs[0]


@pytest.mark.parametrize("case", ["settings", "weights", "workdir"])
def test_processes_that_are_not_one_job(tmp_path, case):
    """Each would train a model of its own, or wait for the others' part of a checkpoint."""
    changed = shutil.copytree(runs.ROOT / "lightning_jax/builtin/tiny", tmp_path / "changed")
    tensors = safetensors.numpy.load_file(changed / "model.safetensors")
    safetensors.numpy.save_file({name: -tensor for name, tensor in tensors.items()}, changed / "model.safetensors")
    others, said = {
        "settings": (
            "--config.algorithm.learning_rate=0.5",
            r"learning_rate: .* in process 0, 0.5 in process 1",
        ),
        "weights": (f"--config.model.path={changed}", "the processes differ: weights of "),
        "workdir": (f"--config.workdir={tmp_path / 'other'}", "not one folder for all .*: process 1 does not see"),
    }[case]
    both = processes(runs.command(tmp_path / "run", *SMALL), 1, others)
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1], "\n\n".join(outputs)
    assert all(re.search(f"InvalidConfigError: .*{said}", output) for output in outputs), "\n\n".join(outputs)
    assert not list(tmp_path.glob("run/*")) and not (tmp_path / "other").exists()


def test_a_job_that_fails_ends_all_with_its_error(tmp_path):
    agent = tmp_path / "agent.py"
    agent.write_text("def agent(resource, task):\n    raise KeyError('the tool is missing')\n")
    both = processes(runs.command(tmp_path / "run", *SMALL, f"--config.agent.script={agent}"), 1)
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [1, 1], "\n\n".join(outputs)
    assert "TrainingError: " in outputs[0] and "the tool is missing" in outputs[0] and "Fatal" not in outputs[0]


def test_an_interrupt_of_both_loses_nothing_and_its_checkpoint_is_evaluated_and_downloaded(tmp_path):
    workdir = tmp_path / "run"
    both = processes(runs.command(workdir, *SMALL, "--config.runtime.total_steps=50"), 1)
    while not runs.metrics(workdir) and both[0].poll() is None:
        time.sleep(0.02)
    for process in both:  # as a terminal or a launcher does
        process.send_signal(signal.SIGINT)
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n\n".join(outputs)
    step = runs.metrics(workdir)[-1]["step"]
    assert 0 < step < 12, "before the first checkpoint"
    assert checkpoint.latest(workdir / "checkpoints").name == f"step-{step}"

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serving = ("--config.mode=serve", f"--config.server.port={port}", "--config.runtime.total_steps=50")
    both = processes(runs.command(workdir, *SMALL, *serving), 1)
    tasks = tmp_path / "test.jsonl"
    tasks.write_text('{"question": "1+2", "ground_truth": "3"}\n')
    try:
        with Client(f"http://127.0.0.1:{port}", max_retries=20, timeout=60) as client:
            folder = client.download_model(tmp_path / "model")
            assert (folder / "model.safetensors").exists()
            agent = str(runs.ROOT / "scripts/agents/additions.py")
            assert client.evaluate(agent, str(tasks), "latest", nworkers=1).step == step
    finally:
        both[0].send_signal(signal.SIGINT)
        outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n\n".join(outputs)
    assert f"continuing behind step {step}" in outputs[0]


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


HANDLED = """
import multiprocessing, threading, time
from lightning_jax import processes
from agent_lightning.exceptions import TrainingError
from tests.end_to_end import failing

processes._PATIENCE_S = 1.0
pipes = {number: multiprocessing.Pipe() for number in (1, 2)}
for _, theirs in pipes.values():
    threading.Thread(target=processes.Follower(theirs).follow, args=["target"]).start()
leader = processes.Leader({number: ours for number, (ours, _) in pipes.items()})
try:
    leader.run(failing.everywhere, "target")
except TrainingError:
    time.sleep(2.0)
leader.close()
"""


def test_strangers_at_the_port_keep_nobody_out():
    """A port scanner hangs up, a browser speaks first."""
    key = b"key"
    with multiprocessing.connection.Listener(("127.0.0.1", 0), authkey=key) as listener:
        socket.create_connection(listener.address).close()
        with socket.create_connection(listener.address) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            with concurrent.futures.ThreadPoolExecutor() as pool:
                accepted = pool.submit(lightning_jax.processes._accept, listener, 1)
                with multiprocessing.connection.Client(listener.address, authkey=key) as client:
                    client.send(1)
                    assert list(accepted.result(30)) == [1]


def test_an_error_that_all_had_alike_ends_nobody_later():
    done = subprocess.run([sys.executable, "-c", HANDLED], cwd=runs.ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "coordinator, num_processes, process_id, said",
    [
        ("localhost", 2, 0, "distributed.coordinator must be HOST:PORT, not 'localhost'"),
        ("localhost:abc", 2, 1, "distributed.coordinator must be HOST:PORT, not 'localhost:abc'"),
        ("localhost:99999", 2, 0, "distributed.coordinator must be HOST:PORT, not 'localhost:99999'"),
        ("localhost:{taken}", 2, 0, "process 0 cannot listen on port {taken}: Address already in use"),
        ("", 2, -1, "distributed.num_processes and process_id need a distributed.coordinator"),
        ("", 0, 1, "distributed.num_processes and process_id need a distributed.coordinator"),
    ],
)
def test_settings_that_processes_cannot_meet_by(coordinator, num_processes, process_id, said):
    settings = config.default_config().distributed
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        settings.coordinator = coordinator.format(taken=taken)
        settings.num_processes, settings.process_id = num_processes, process_id
        with pytest.raises(InvalidConfigError, match=said.format(taken=taken)) as error:
            lightning_jax.processes.join(settings)
    assert "HOST:PORT of process 0" in error.value.hint
