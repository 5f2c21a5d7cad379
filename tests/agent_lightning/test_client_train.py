"""`Client.train`, folders to download to and the command line against a real server that trains the packaged model."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from agent_lightning import InvalidConfigError, TrainingError, cli
from tests.agent_lightning.conftest import TASKS, ask, is_alive, wait_until, written_pids

ROOT = Path(__file__).resolve().parents[2]


def test_train(client, training, policies, capfd):
    seen_before, begun_at = len(training[1].jobs()), policies.step
    result = client.train(ask, nworkers=2, epochs=2, batch_size=2, eval_interval=2, metadata={"use_cot": True})
    assert result.total_steps == 4 and len(result.train_rewards) == 4
    assert len(result.test_rewards) == 3  # before, after step 2, after step 4
    assert all(0 <= reward <= 1 for reward in result.train_rewards + result.test_rewards)
    assert result.final_reward == result.test_rewards[-1]
    assert result.total_time > 0
    assert Path(result.checkpoints[-1]).is_dir()
    job = training[1].jobs()[seen_before]
    assert (job["status"], job["job_id"]) == ("succeeded", result.job_id)
    assert job["spec"]["metadata"] == {"use_cot": True}
    lines = capfd.readouterr().err.splitlines()
    steps = [line.split("  ")[0] for line in lines if line.startswith("step")]
    assert steps == [f"step {begun_at + i}/{begun_at + 4}" for i in range(1, 5)]
    assert sum(line.startswith("held-out reward") for line in lines) == 3


def test_checkpoints_are_copied_to_a_folder_here(client, policies, tmp_path):
    from lightning_jax.model import weights

    result = client.train(ask, 2, 1, 4, None, str(tmp_path / "copies"), 50)  # in the reference's order
    (path,) = result.checkpoints
    assert sorted(os.listdir(tmp_path / "copies")) == ["latest", Path(path).name]
    assert os.readlink(tmp_path / "copies" / "latest") == Path(path).name
    _, copied = weights.load_model(tmp_path / "copies" / "latest")
    jax.tree.map(np.testing.assert_array_equal, copied, jax.device_get(policies.first.state.params))


def test_test_tasks_may_be_another_files(client, training, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"question": "other"}\n')

    def agent(resource, task):
        return float(task.question == "other")

    result = client.train(agent, nworkers=1, batch_size=4, test_file=str(tmp_path / "other.jsonl"))
    assert result.test_rewards == [1.0, 1.0] and result.train_rewards == [0.0]
    assert client.evaluate(agent, nworkers=1).mean == 0.0, "the dataset has its own test tasks still"


def test_an_agent_that_always_fails(client):
    def agent(resource, task):
        raise ZeroDivisionError("the agent's own mistake")

    with pytest.raises(TrainingError, match=r"(?s)rollouts of step \d+ failed.*raise ZeroDivisionError"):
        client.train(agent, nworkers=1, batch_size=2)


def test_an_agent_that_cannot_be_loaded_ends_the_job(client, training, tmp_path, monkeypatch):
    of_threads = []
    monkeypatch.setattr(threading, "excepthook", of_threads.append)
    script = tmp_path / "broken.py"
    script.write_text("import no_such_package_at_all\n")
    with pytest.raises(TrainingError, match="No module named 'no_such_package_at_all'"), client:
        client.train(str(script), nworkers=1, batch_size=2)
    job_id = training[1].jobs()[-1]["job_id"]
    wait_until(lambda: training[1].job(job_id)["status"] in ("failed", "stopped"))
    wait_until(lambda: not any("_follow" in thread.name for thread in threading.enumerate()))
    assert not of_threads


def test_a_script_that_trains_when_it_is_imported_is_refused(client, training, tmp_path):
    """Its workers would start workers, and those workers, and so on."""
    script = tmp_path / "both.py"
    script.write_text(
        f"""
import pathlib
from agent_lightning import Client
with open({str(tmp_path / "imports")!r}, "a") as imports:
    imports.write("x")
assert pathlib.Path(imports.name).stat().st_size < 5

def my_agent(resource, task):
    return 1.0

Client({training[0]!r}).train(__file__, nworkers=1, batch_size=2, data_id="sums")
"""
    )
    jobs = len(training[1].jobs())
    with pytest.raises(InvalidConfigError, match=r"(?s)starts a job whenever it is imported.*__name__ =="):
        client.train(str(script), nworkers=1, batch_size=2)
    assert len(training[1].jobs()) == jobs + 1 and (tmp_path / "imports").read_text() == "x"


SCRIPT = """
import os, pathlib, sys, time
from agent_lightning import Client

folder, pause = pathlib.Path(sys.argv[2]), float(sys.argv[3])

def agent(resource, task):
    (folder / str(os.getpid())).touch()
    from tests.agent_lightning.conftest import ask
    time.sleep(pause)
    return ask(resource, task)

if len(sys.argv) > 4:
    Client(sys.argv[1]).evaluate(agent, sys.argv[4], nworkers=2)
result = Client(sys.argv[1]).train(agent, nworkers=2, epochs=1000, batch_size=2, data_id="sums")
print("steps", result.total_steps, "checkpoints", len(result.checkpoints))
"""


@pytest.fixture
def script(client, training, tmp_path):
    """Starts a client process that trains for very long; (process, folder of its workers' ids)."""
    folder = tmp_path / "pids"
    folder.mkdir()
    started = []

    def start(seconds_per_rollout: float, *test_file: str):
        command = [sys.executable, "-c", SCRIPT, training[0], str(folder), str(seconds_per_rollout), *test_file]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        wait_until(lambda: written_pids(folder), timeout_s=120)
        return started[-1], folder

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_once_ends_after_the_step_with_a_checkpoint(script, training):
    process, folder = script(0.0)
    job_id = training[1].jobs()[-1]["job_id"]
    wait_until(lambda: training[1].job(job_id)["step"] >= 2, timeout_s=300)  # it may have to compile
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    job = training[1].job(job_id)
    assert job["status"] == "stopped"
    assert out == f"steps {job['step']} checkpoints {len(job['result']['checkpoints'])}\n"
    assert Path(job["result"]["checkpoints"][-1]).is_dir()
    assert "stopping after this step" in err
    assert not any(map(is_alive, written_pids(folder)))


def test_ctrl_c_twice_ends_at_once(script, training):
    process, folder = script(1000.0)
    job_id = training[1].jobs()[-1]["job_id"]
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    wait_until(lambda: training[1].job(job_id)["status"] in ("stopped", "failed"))
    assert not any(map(is_alive, written_pids(folder)))


def test_ctrl_c_ends_an_evaluation_at_once(script, training, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "1"}\n{"question": "2"}\n')
    process, folder = script(1000.0, str(tmp_path / "test.jsonl"))
    job_id = training[1].jobs()[-1]["job_id"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err and "stopping after this step" not in err
    wait_until(lambda: training[1].job(job_id)["status"] == "stopped")
    assert not any(map(is_alive, written_pids(folder)))


def test_sigterm_ends_the_job_too(script, training):
    """Or the server would wait for the dead client's workers, and all others with it."""
    process, folder = script(1000.0)
    job_id = training[1].jobs()[-1]["job_id"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    wait_until(lambda: training[1].job(job_id)["status"] == "stopped")
    assert not any(map(is_alive, written_pids(folder)))


def test_command_line(training, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AGENT_LIGHTNING_SERVER_URL", training[0])
    (tmp_path / "train.jsonl").write_text(TASKS)
    (tmp_path / "agent.py").write_text("def my_agent(resource, task):\n    return len(task.question)\n")
    assert cli.main(["data", "upload", "--train", str(tmp_path / "train.jsonl"), "--data-id", "from-cli"]) == 0
    assert capsys.readouterr().out == "from-cli\n"
    command = ["train", "--agent-script", str(tmp_path / "agent.py"), "--data-id", "from-cli", "--nworkers", "2"]
    assert cli.main([*command, "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "final reward: 5.0000" in out
    assert "steps: 1 in" in out


def model_files(folder):
    return {path.name for path in Path(folder).iterdir()}


def test_a_download_fills_the_folder_one_stands_in(client, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert client.download_model(".", "initial") == tmp_path / "model"
    assert {"config.json", "model.safetensors"} <= set(os.listdir())
    assert model_files(tmp_path) == {"model", "train.jsonl", "test.jsonl"}


INTO_A_MOUNT = """
import os, sys
from pathlib import Path
from agent_lightning import Client

url, target, old = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
for name in old:
    (target / name).write_text("old")
print(Client(url).download_model(target, "initial"))
print(sorted(os.listdir(target)), (target / "model.safetensors").stat().st_size > 1000)
"""


@pytest.mark.parametrize("old", [(), ("model.safetensors", "adapter_config.json", "mine.txt")], ids=["empty", "old"])
@pytest.mark.parametrize("mount", ["mount -t tmpfs none model", "mount --bind volume model"], ids=["disk", "bind"])
def test_a_mount_point_can_be_downloaded_into(client, tmp_path, mount, old):
    """As a container's volume is one; a bind mount may even be of the file system around it."""
    for name in ("model", "volume"):
        (tmp_path / name).mkdir()
    unshared = ["unshare", "--user", "--map-root-user", "--mount"]
    if os.getuid() == 0:
        unshared = ["unshare", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshared, "sh", "-c", mount], cwd=tmp_path).returncode:
        pytest.skip("this machine lets no test mount anything")
    download = [sys.executable, "-c", INTO_A_MOUNT, client.server_url, str(tmp_path / "model"), *old]
    done = subprocess.run(
        [*unshared, "sh", "-c", f'{mount} && exec "$@"', "sh", *download],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = model_files(client.download_model(tmp_path / "new", "initial")) | ({"mine.txt"} if old else set())
    assert done.stdout.splitlines() == [str(tmp_path / "model"), f"{sorted(names)} True"]
