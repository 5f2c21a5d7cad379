"""Checkpoints under the things that go wrong: kills, full disks, other meshes, other models."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.rl import checkpoint, update
from lightning_jax.rl.learner import Learner, LearnerSettings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = LearnerSettings(
    learning_rate=1e-3, kl_coef=0.1, entropy_coef=0.02, batch_size=12, max_seq_len=32, min_block_length=32
)
EXTRA = {"seed": 3, "history": [0.1, 1 / 3], "tasks": {"epoch": 1, "position": 7}}


def run_python(code, *arguments, **kwargs):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def make_state(value, size=100):
    """A state all of whose numbers are `value`."""
    params = {"layers": {"w_df": jnp.full((2, size, 50), value, jnp.float32)}, "embed_vd": jnp.full((size, 50), value)}
    state = update.init_state(SETTINGS, params)
    return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


def test_a_restored_learner_goes_on_to_the_same_bits(config, params, rows, advantages, tmp_path):
    straight = Learner(config, params, SETTINGS)
    straight.update(rows, advantages)
    checkpoint.save(tmp_path, 1, straight.state, EXTRA)
    expected = [straight.update(rows, advantages * (1 + i)) for i in range(2)]

    resumed = Learner(config, params, SETTINGS)
    resumed.state, extra = checkpoint.restore(tmp_path, resumed.abstract_state())
    assert extra == EXTRA
    assert [resumed.update(rows, advantages * (1 + i)) for i in range(2)] == expected
    assert_equal(resumed.state, straight.state)


def test_parameters_alone_in_another_dtype(tmp_path):
    state = make_state(1.5)
    checkpoint.save(tmp_path, 3, state, EXTRA)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state.params)
    for path in (tmp_path, tmp_path / "latest", tmp_path / "step-3"):
        params = checkpoint.restore_params(path, wanted)
        assert_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
        assert checkpoint.read_extra(path) == EXTRA


def test_the_newest_are_kept_and_latest_points_to_the_last(tmp_path):
    assert checkpoint.latest(tmp_path / "nothing") is None and checkpoint.all_steps(tmp_path / "nothing") == []
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, step, make_state(step), {}, max_to_keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-10", "step-11"]
    assert checkpoint.all_steps(tmp_path) == [tmp_path / "step-10", tmp_path / "step-11"]
    assert os.readlink(tmp_path / "latest") == "step-11"  # relative: the folder may be moved

    checkpoint.save(tmp_path, 3, make_state(3), {}, max_to_keep=2)  # a run that began anew
    assert checkpoint.latest(tmp_path) == tmp_path / "step-3"
    assert_equal(checkpoint.restore(tmp_path, abstract(make_state(0)))[0], make_state(3))


def test_a_step_saved_again_is_replaced(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path, 5, make_state(value), {"value": value})
    state, extra = checkpoint.restore(tmp_path, abstract(make_state(0)))
    assert_equal(state, make_state(2))
    assert extra == {"value": 2} and sorted(os.listdir(tmp_path)) == ["latest", "step-5"]


def test_without_the_link_the_highest_step_is_the_latest(tmp_path):
    for step in (9, 10):
        checkpoint.save(tmp_path, step, make_state(step), {})
    (tmp_path / "latest").unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"
    (tmp_path / "latest").symlink_to("step-99")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"


def test_the_best_is_kept_however_old_and_found_by_its_name(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, make_state(step), {}, max_to_keep=2)
        if step == 1:
            assert checkpoint.best(tmp_path) is None
            checkpoint.mark_best(tmp_path / "step-1")
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "step-1", "step-3", "step-4"]
    assert checkpoint.best(tmp_path) == tmp_path / "step-1" and os.readlink(tmp_path / "best") == "step-1"

    (tmp_path / "tmp.best").symlink_to("step-1")  # left by a process that was killed between two calls
    checkpoint.mark_best(tmp_path / "step-4")
    checkpoint.save(tmp_path, 5, make_state(5), {}, max_to_keep=2)
    assert sorted(os.listdir(tmp_path)) == ["best", "latest", "step-4", "step-5"]
    assert_equal(checkpoint.restore(tmp_path / "best", abstract(make_state(0)))[0], make_state(4))


def test_a_copy_whose_links_have_become_folders_goes_on(tmp_path):
    """As `cp -rL` and object stores make them."""
    checkpoint.save(tmp_path / "run", 1, make_state(1), {})
    checkpoint.mark_best(tmp_path / "run" / "step-1")
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert (copied / "latest").is_dir() and not (copied / "latest").is_symlink()
    assert checkpoint.latest(copied) == copied / "step-1" and checkpoint.best(copied) is None

    checkpoint.mark_best(copied / "step-1")
    checkpoint.save(copied, 2, make_state(2), {})
    assert sorted(os.listdir(copied)) == ["best", "latest", "step-1", "step-2"]
    assert checkpoint.latest(copied) == copied / "step-2" and checkpoint.best(copied) == copied / "step-1"


def test_names_are_resolved_as_users_write_them(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(InvalidConfigError, match=r"no checkpoint 'latest' in .*\n.*none has been saved yet"):
        checkpoint.resolve(folder, "latest")
    for step in (3, 20):
        checkpoint.save(folder, step, make_state(step), {})
    with pytest.raises(InvalidConfigError, match="there are step-3, step-20, latest; the best is known once held-out"):
        checkpoint.resolve(folder, "best")
    checkpoint.mark_best(folder / "step-3")
    for name, step in {
        "latest": 20,
        "best": 3,
        "step-3": 3,
        "checkpoints/latest": 20,
        "checkpoints/step-20": 20,
        str(folder / "step-20"): 20,
        str(folder / "best"): 3,
        "/elsewhere/copies/step-3": 3,  # the client's, on another machine
    }.items():
        assert checkpoint.resolve(folder, name) == folder / f"step-{step}", name
    for name in ("step-4", "step-03", "newest", "", "../checkpoints", "step-3/params", str(folder)):
        with pytest.raises(InvalidConfigError, match="there are step-3, step-20, latest, best"):
            checkpoint.resolve(folder, name)
    with pytest.raises(InvalidConfigError, match="is not of this run"):
        checkpoint.resolve(tmp_path / "other" / "checkpoints", str(folder / "step-3"))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert checkpoint.resolve(folder, str(tmp_path / "link/checkpoints/step-3")) == folder / "step-3"


def test_what_does_not_fit_is_refused_with_words(tmp_path):
    with pytest.raises(InvalidConfigError, match="no checkpoint at"):
        checkpoint.restore(tmp_path, abstract(make_state(0)))
    checkpoint.save(tmp_path, 1, make_state(1), {})
    with pytest.raises(InvalidConfigError, match=r"another model's: .*embed_vd'\]\", \(100, 50\).*\(101, 50\)"):
        checkpoint.restore(tmp_path, abstract(make_state(0, size=101)))
    other_optimizer = dataclasses.replace(SETTINGS, max_grad_norm=None)
    wanted = jax.eval_shape(lambda p: update.init_state(other_optimizer, p), make_state(0).params)
    with pytest.raises(InvalidConfigError, match="cannot be restored.*opt_state"):
        checkpoint.restore(tmp_path, wanted)
    with pytest.raises(InvalidConfigError, match="another model's"):
        checkpoint.restore_params(tmp_path, {"other": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(InvalidConfigError, match="no checkpoint at .*step-2"):
        checkpoint.restore_params(tmp_path / "step-2", {})


def test_what_a_checkpoint_holds_is_looked_up_once_until_it_is_replaced(tmp_path, monkeypatch):
    look, looked_up = checkpoint.ocp.StandardCheckpointHandler.metadata, []

    def counted(handler, folder):
        looked_up.append(folder)
        return look(handler, folder)

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "metadata", counted)
    checkpoint.save(tmp_path, 1, make_state(1), {})
    for _ in range(3):
        checkpoint.restore_params(tmp_path, abstract(make_state(0).params))
    assert looked_up == [tmp_path / "step-1/params"]
    checkpoint.save(tmp_path, 1, make_state(1, size=101), {})
    with pytest.raises(InvalidConfigError, match="another model's"):
        checkpoint.restore_params(tmp_path, abstract(make_state(0).params))
    assert_equal(
        checkpoint.restore_params(tmp_path, abstract(make_state(0, size=101).params)), make_state(1, size=101).params
    )


SAVE_FOR_EVER = """
import sys, itertools, jax, numpy as np
from pathlib import Path
from lightning_jax.rl import checkpoint, update
noise = np.random.default_rng(0).normal(size=(2000, 1000)).astype(np.float32)  # does not compress
for step in itertools.count(int(sys.argv[2])):
    state = update.init_state(update.LearnerSettings(), {"embed_vd": jax.device_put(noise + step)})
    checkpoint.save(Path(sys.argv[1]), step, state, {"step": step}, max_to_keep=2)
    print(step, flush=True)
"""


def test_a_save_that_was_killed_never_looks_finished(tmp_path):
    """SIGKILL at several moments of a real save; what `latest` names is whole each time, and the next save works."""
    noise = np.random.default_rng(0).normal(size=(2000, 1000)).astype(np.float32)
    wanted = jax.eval_shape(lambda p: update.init_state(LearnerSettings(), p), {"embed_vd": noise})
    finished, interrupted = 0, 0
    for delay_s in (0.0, 0.02, 0.05, 0.1):
        process = run_python(SAVE_FOR_EVER, tmp_path, finished + 1)
        finished = int(process.stdout.readline() or finish(process))
        until = time.monotonic() + 60
        while not list(tmp_path.glob("tmp.step-*")) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        later = [int(line) for line in process.stdout.read().split()]

        state, extra = checkpoint.restore(tmp_path, wanted)
        assert extra["step"] >= max(later, default=finished), "a save that had returned was lost"
        finished = extra["step"]
        np.testing.assert_array_equal(state.params["embed_vd"], noise + np.float32(finished))
        interrupted += bool(list(tmp_path.glob("tmp.*")))
    assert interrupted, "no kill came in the middle of a save"
    checkpoint.save(tmp_path, finished + 1, make_state(0), {}, max_to_keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", f"step-{finished + 1}"]


SAVE_TWO_AND_DIE = """
import os, signal, sys, jax.numpy as jnp
from pathlib import Path
from lightning_jax.rl import checkpoint, update

class Dying(dict):
    def items(self):
        for name, state in super().items():
            if name == "b" and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield name, state

for step in (1, 2):
    state = update.init_state(update.LearnerSettings(), {"embed_vd": jnp.full((3, 2), step)})
    checkpoint.save(Path(sys.argv[1]), step, Dying(a=state, b=state), {"step": step}, max_to_keep=1)
"""


def test_several_models_are_saved_together_or_not_at_all(tmp_path):
    """A kill between the two models' files: both are still there as of the step before."""
    process = run_python(SAVE_TWO_AND_DIE, tmp_path)
    _, error = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, error
    assert (tmp_path / "tmp.step-2" / "a" / "params").is_dir(), "the kill came behind the first"
    assert checkpoint.all_steps(tmp_path) == [tmp_path / "step-1"]
    wanted = jax.eval_shape(lambda p: update.init_state(LearnerSettings(), p), {"embed_vd": np.zeros((3, 2))})
    for item in ("a", "b"):
        state, extra = checkpoint.restore(tmp_path, wanted, item=item)
        assert extra == checkpoint.read_extra(tmp_path, item=item) == {"step": 1}
        assert_equal(state.params, checkpoint.restore_params(tmp_path, wanted.params, item=item))
        np.testing.assert_array_equal(state.params["embed_vd"], np.ones((3, 2)))
    with pytest.raises(InvalidConfigError, match="holds no model 'c'\n.*it holds the models a, b"):
        checkpoint.restore_params(tmp_path, wanted.params, item="c")
    with pytest.raises(InvalidConfigError, match="no parameters of a single model"):
        checkpoint.restore(tmp_path, wanted)


SAVE_WITHOUT_SPACE = """
import sys, json, resource, jax
from pathlib import Path
from agent_lightning.exceptions import TrainingError
from lightning_jax.rl import checkpoint, update
folder, errors = Path(sys.argv[1]), []
noise = jax.random.normal(jax.random.key(0), (2000, 100))  # does not compress
state = update.init_state(update.LearnerSettings(), {"embed_vd": noise})
checkpoint.save(folder, 1, state, {"step": 1})
for limit in (10, 1000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(folder, 2, state, {"step": 2})
        errors.append("saved")
    except TrainingError as error:
        errors.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
found = str(checkpoint.latest(folder))
checkpoint.save(folder, 3, state, {"step": 3})
print(json.dumps({"errors": errors, "found": found}))
"""


def test_no_room_on_the_disk_is_said_and_leaves_the_older_checkpoint(tmp_path):
    """A limit on the size of files: writes fail in the middle, at several places of the save."""
    report = json.loads(finish(run_python(SAVE_WITHOUT_SPACE, tmp_path)).splitlines()[-1])
    for error in report["errors"]:
        assert error.startswith(f"could not write checkpoint {tmp_path / 'step-2'}"), error
        assert "File too large" in error and "GB are free there" in error
        assert f"the newest whole checkpoint is {tmp_path / 'step-1'}" in error
    assert report["found"] == str(tmp_path / "step-1")
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-1", "step-3"]


def test_a_damaged_array_is_said_with_what_else_there_is(tmp_path):
    state = make_state(1.0, size=100_000)
    checkpoint.save(tmp_path, 1, state, {})
    path = checkpoint.save(tmp_path, 2, state, {})
    largest = max(path.glob("params/**/d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises(InvalidConfigError, match=f"checkpoint {path} is damaged: .*\n  hint: .*step-1 is the newest"):
        checkpoint.restore(tmp_path, abstract(state))


def test_a_checkpoint_that_finds_no_room_in_memory_is_not_damaged(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, make_state(1.0), {})
    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        checkpoint.restore(tmp_path, abstract(make_state(1.0)))


@pytest.mark.parametrize(
    "name",
    ["params/_METADATA", "params/manifest.ocdbt", "optimizer/_METADATA", "optimizer/manifest.ocdbt", "extra/metadata"],
)
@pytest.mark.parametrize("is_there", [True, False], ids=["emptied", "gone"])
def test_a_damaged_file_is_said_with_what_else_there_is(tmp_path, name, is_there):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, make_state(1.0), {})
    (path / name).write_bytes(b"") if is_there else (path / name).unlink()
    with pytest.raises(InvalidConfigError, match=f"checkpoint {path} is damaged: .*\n  hint: .*step-1 is the newest"):
        checkpoint.restore(tmp_path, abstract(make_state(1.0)))
    if not name.startswith("optimizer"):
        read = checkpoint.read_extra if name.startswith("extra") else checkpoint.restore_params
        arguments = [abstract(make_state(1.0).params)] if read is checkpoint.restore_params else []
        with pytest.raises(InvalidConfigError, match="is damaged.*\n  hint: .*step-1 is the newest"):
            read(tmp_path, *arguments)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="JSON serializable"):
        checkpoint.save(tmp_path, 1, make_state(1), {"array": np.zeros(3)})
    assert os.listdir(tmp_path) == []


CONTINUE_ON_A_MESH = """
import sys, pickle, jax, numpy as np
from pathlib import Path
from lightning_jax import mesh
from lightning_jax.rl import checkpoint
from lightning_jax.rl.learner import Learner
folder = Path(sys.argv[1])
config, params, settings, rows, advantages = pickle.loads((folder / "case.pickle").read_bytes())
learner = Learner(config, params, settings, mesh=mesh.make_mesh(data=2, fsdp=2, tensor=2))
learner.state, _ = checkpoint.restore(folder / "step-1", learner.abstract_state())
assert len(learner.state.params["layers"]["gate_df"].sharding.device_set) == 8
assert learner.state.params["layers"]["gate_df"].addressable_shards[0].data.shape[-1] == 48 // 2
learner.update(rows, advantages)
checkpoint.save(folder, 2, learner.state, {})
alone = Learner(config, params, settings, mesh=mesh.make_mesh(fsdp=4))
alone.state, _ = checkpoint.restore(folder / "step-2", alone.abstract_state())
jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone.state), jax.device_get(learner.state))
"""


def test_a_checkpoint_goes_on_on_another_mesh(config, params, rows, advantages, tmp_path):
    """One device to 8 simulated ones (data x fsdp x tensor), an update there, on to 4, and back to one."""
    learner = Learner(config, params, SETTINGS)
    learner.update(rows, advantages)
    checkpoint.save(tmp_path, 1, learner.state, {})
    (tmp_path / "case.pickle").write_bytes(pickle.dumps((config, params, SETTINGS, rows, advantages)))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    finish(run_python(CONTINUE_ON_A_MESH, tmp_path, env=flags))

    metrics = learner.update(rows, advantages)
    restored, _ = checkpoint.restore(tmp_path / "step-2", learner.abstract_state())
    assert restored.step == 2 and metrics["policy/skipped_steps"] == 0
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(learner.state), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)
