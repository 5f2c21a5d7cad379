"""What the program says when it cannot run: one clear error, at once, and nothing lost."""

import contextlib
import shutil
import socket

import pytest
import safetensors.numpy

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import config
from lightning_jax.policies import Policies
from lightning_jax.store import Store
from tests.end_to_end import runs


def refused(workdir, *flags: str, **options) -> str:
    done = runs.run(workdir, *flags, timeout_s=120, **options)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_missing_model(tmp_path):
    error = refused(tmp_path / "run", "--config.model.path=no/such/folder")
    assert "InvalidConfigError" in error and "no/such/folder" in error


def test_missing_agent_script(tmp_path):
    error = refused(tmp_path / "run", "--config.agent.script=no_agent.py")
    assert "InvalidConfigError" in error and "no_agent.py" in error


def test_misspelt_setting(tmp_path):
    error = refused(tmp_path / "run", "--config.algorithm.learning_rat=1")
    assert "learning_rat" in error and "'algorithm.learning_rate'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"question": "1+1=?"}\n[1, 2]\n', "line 2"),
        ('{"question": "1+1=?"}\n\n{"answer": 2}\n', "line 3"),
        ('{"question": "1+1=?"\n', "line 1"),
    ],
)
def test_bad_tasks_name_their_line(tmp_path, content, problem):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(content)
    error = refused(tmp_path / "run", f"--config.data.train_file={tasks}")
    assert "DataError" in error and f"{tasks}, {problem}" in error


def test_missing_tasks(tmp_path):
    error = refused(tmp_path / "run", "--config.data.train_file=nowhere.jsonl")
    assert "nowhere.jsonl" in error


def test_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(tmp_path / "run", f"--config.server.port={port}")
    assert f"127.0.0.1:{port}" in error


def test_work_directory_of_another_run(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    config.save_json(config.default_config(), workdir / "config.json")
    before = (workdir / "config.json").read_text()
    error = refused(workdir, "--config.algorithm.kl_coef=0.5", "--config.seed=3")
    assert "other settings" in error and "seed: 0 there, 3 here" in error
    assert "algorithm.kl_coef: 0.001 there, 0.5 here" in error and "--config.workdir" in error
    error = refused(workdir, "--config.model.path=some/folder", "--config.seed=3")
    assert "some/folder" in error and "does not exist" in error and "other settings" not in error
    with contextlib.closing(Store(workdir / "store.sqlite3")):
        error = refused(workdir, "--config.seed=3")
        team = ("--config.distributed.coordinator=localhost:1", "--config.distributed.num_processes=2")
        of_two = refused(workdir, "--config.seed=3", *team, "--config.distributed.process_id=1")
    assert "open in another process" in error and "other settings" not in error
    assert "other settings" in of_two, "the store is process 0's alone, and the others start beside it"
    assert (workdir / "config.json").read_text() == before
    (workdir / "config.json").write_text("{")
    assert f"{workdir / 'config.json'} is damaged" in refused(workdir, "--config.seed=3")


OF_TWO_MODELS = """
from lightning_jax import config

def get_config():
    of_two = config.default_config()
    of_two.mode, of_two.server.port, of_two.runtime.max_seq_len = "serve", 0, 64
    of_two.sampler.max_slots, of_two.sampler.kv_cache_tokens = 2, 256
    of_two.models = {{name: {{"path": "builtin:tiny"}} for name in {names}}}
    return of_two
"""


def test_models_in_another_order_than_the_run_has(tmp_path):
    """Agents would call another one by the same URL."""
    models = {name: {"path": "builtin:tiny"} for name in ("query", "answer")}
    sizes = {"runtime": {"max_seq_len": 64}, "sampler": {"max_slots": 2, "kv_cache_tokens": 256}}
    run = config.merge(sizes | {"models": models, "workdir": str(tmp_path / "run")}, environ={})
    with contextlib.closing(Policies(run)) as policies:
        policies.prepare_training()
        policies.save_checkpoint({"job_id": "", "step": 0})
    (tmp_path / "swapped.py").write_text(OF_TWO_MODELS.format(names=("answer", "query")))
    error = refused(tmp_path / "run", config=str(tmp_path / "swapped.py"))
    assert "InvalidConfigError" in error and "query, answer there, answer, query here" in error


def test_a_model_of_the_same_sizes_with_other_weights(tmp_path):
    """Adapters of one mean nothing to the other."""
    model = shutil.copytree(runs.ROOT / "lightning_jax/builtin/tiny", tmp_path / "model")
    sizes = {"runtime": {"max_seq_len": 64}, "sampler": {"max_slots": 2, "kv_cache_tokens": 256}}
    own = {"model": {"path": str(model), "lora_rank": 2}, "workdir": str(tmp_path / "run")}
    run = config.merge(sizes | own, environ={})
    with contextlib.closing(Policies(run)) as policies:
        policies.prepare_training()
        saved = policies.save_checkpoint({"job_id": "", "step": 0})
    (tmp_path / "model").rename(tmp_path / "moved")
    run.model.path = str(tmp_path / "moved")
    with contextlib.closing(Policies(run)) as policies:
        assert policies.restored is not None
    tensors = safetensors.numpy.load_file(tmp_path / "moved" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    safetensors.numpy.save_file(tensors, tmp_path / "moved" / "model.safetensors")
    said = f"{saved} began with the weights that were in {model} then; those in {tmp_path / 'moved'} are others"
    with pytest.raises(InvalidConfigError, match=said):
        Policies(run)


def test_agent_that_always_fails_ends_the_job_with_its_traceback(tmp_path):
    script = tmp_path / "agent.py"
    script.write_text("def agent(resource, task):\n    raise KeyError('the tool is missing')\n")
    flags = (f"--config.agent.script={script}", "--config.agent.nworkers=2", "--config.data.test_file=")
    done = runs.run(tmp_path / "run", *flags, timeout_s=120)
    assert done.returncode == 1
    error = done.stderr.rpartition("\nTrainingError: ")[2]
    assert "KeyError: 'the tool is missing'" in error and str(script) in error
    assert done.stderr.count("Traceback") == 1 and "/lightning_jax/" not in done.stderr
