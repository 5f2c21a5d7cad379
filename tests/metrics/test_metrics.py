"""A run's curves: the JSONL file, across kills and resumes, and the same numbers in TensorBoard and W&B."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_each_write_is_one_json_object_on_the_disk_at_once(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(0, {"reward/mean": 0.25, "train/tokens": 12})
        lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 0, "reward/mean": 0.25, "train/tokens": 12}]
        writer.write(1, {"reward/mean": 0.5})
    assert read_metrics(tmp_path / "new" / "run")[1] == {"step": 1, "reward/mean": 0.5}


def test_scalars_of_numpy_and_jax_are_numbers_and_keep_their_value(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    with MetricsWriter(tmp_path) as writer:
        writer.write(np.int64(3), {"a/f64": np.float64(0.1), "a/i32": np.int32(7), "a/jax": jnp.float32(0.5)})
    assert read_metrics(tmp_path) == [{"step": 3, "a/f64": 0.1, "a/i32": 7, "a/jax": 0.5}]


def test_what_json_has_no_number_for_becomes_null(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"policy/kl": float("nan"), "policy/ratio_max": np.inf, "policy/loss": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "policy/kl": None,
        "policy/ratio_max": None,
        "policy/loss": 1.0,
    }


@pytest.mark.parametrize("metrics", [{"loss": 1.0}, {"Policy/Loss": 1.0}, {"a/b": "high"}, {"a/b": np.zeros(2)}])
def test_a_bad_name_or_value_is_an_error_and_writes_nothing(tmp_path, metrics):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError):
        writer.write(1, metrics)
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_gives_the_file_that_an_uninterrupted_one_gives(tmp_path):
    def write(folder, first, last):
        with MetricsWriter(folder) as writer:
            if first:
                writer.truncate_after(first - 1)
            for step in range(first, last + 1):
                writer.write(step, {"reward/mean": step / 7})

    write(tmp_path / "whole", 0, 6)
    write(tmp_path / "killed", 0, 4)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward/me')  # the kill
    write(tmp_path / "killed", 3, 6)  # from the checkpoint of step 2
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert killed == whole


def test_a_line_that_a_kill_cut_short_is_not_glued_to_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a/b": 1}\n{"step": 1, "a/')
    assert read_metrics(tmp_path) == [{"step": 0, "a/b": 1}]
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a/b": 2})
    assert read_metrics(tmp_path) == [{"step": 0, "a/b": 1}, {"step": 1, "a/b": 2}]


def test_a_foreign_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nhello\n{"step": 1}\n')
    with pytest.raises(InvalidConfigError, match="metrics.jsonl, line 2"):
        read_metrics(tmp_path)


KILLED = """
import os, signal, sys
from lightning_jax.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1])
writer.write(1, {"a/b": 1})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_survives_kill_9(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    assert read_metrics(tmp_path) == [{"step": 1, "a/b": 1}]


def test_tensorboard_reads_the_curve_and_forgets_what_was_cut(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in range(5):
            writer.write(step, {"reward/mean": step / 8})
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.truncate_after(2)
        writer.write(3, {"reward/mean": 0.75})
    curve = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    curve.Reload()
    assert [(e.step, e.value) for e in curve.Scalars("reward/mean")] == [(0, 0), (1, 0.125), (2, 0.25), (3, 0.75)]


def test_wandb_logs_offline_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (1, 2):
        with MetricsWriter(tmp_path, wandb_project="lightning-jax-tests", config={"seed": 1}) as writer:
            writer.write(step, {"reward/mean": 0.5})
            writer.truncate_after(step)
            ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 30  # W&B's own process may write a file after the run has finished
    while not all(b"reward/mean" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert files


LOGGED_AND_KILLED = """
import os, signal, sys
from lightning_jax.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1], wandb_project="lightning-jax-tests")
for step, value in enumerate((0.0625, 0.1875, 0.3125)):
    writer.write(step, {"a/b": value, "a/none": float("nan")})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_wandb_is_given_again_what_a_kill_took(tmp_path, monkeypatch):
    """And once: what a run has written that ended in order is there."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process
    command = [sys.executable, "-c", LOGGED_AND_KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -9
    contents = []
    for step, value in ((2, "0.4375"), (3, "0.5625")):
        before = set((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
        with MetricsWriter(tmp_path, wandb_project="lightning-jax-tests") as writer:
            writer.truncate_after(step - 1)
            writer.write(step, {"a/b": float(value)})
        (file,) = set((tmp_path / "wandb").glob("offline-run-*/*.wandb")) - before
        deadline = time.monotonic() + 30  # as above
        while value.encode() not in file.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        contents.append(file.read_bytes())
    values = (b"0.0625", b"0.1875", b"0.3125", b"0.4375", b"0.5625")
    logged = [[value for value in values if value in content] for content in contents]
    assert logged == [[b"0.0625", b"0.1875", b"0.4375"], [b"0.5625"]]


SAMPLES = [
    {"task_id": "train-1", "rollout_id": 7, "reward": 0.25, "completion": "so\n\n4 <b>"},
    {"task_id": "train-0", "rollout_id": 3, "reward": 1.0, "completion": "5"},
]


def test_samples_are_a_text_in_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write_samples(3, SAMPLES)
    curve = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    curve.Reload()
    assert curve.summary_metadata["samples"].plugin_data.plugin_name == "text"
    (event,) = curve.Tensors("samples")
    (text,) = event.tensor_proto.string_val
    assert event.step == 3 and b"**train-1**, reward 0.25" in text and b"    4 <b>" in text


def test_what_comes_later_is_added_to_the_step(tmp_path):
    """To its line, nulls and all, and to its curves, where the samples stay."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.add(0, {"eval/reward": 0.25})
        writer.write_samples(1, SAMPLES)
        writer.write(1, {"reward/mean": 0.5, "policy/kl": math.nan, "time/total_s": 4.0})
        writer.add(1, {"eval/reward": 0.75, "time/total_s": 5.0})
        writer.write(2, {"reward/mean": 0.625})
    assert read_metrics(tmp_path) == [
        {"step": 0, "eval/reward": 0.25},
        {"step": 1, "reward/mean": 0.5, "policy/kl": None, "time/total_s": 5.0, "eval/reward": 0.75},
        {"step": 2, "reward/mean": 0.625},
    ]
    curve = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    curve.Reload()
    assert [(e.step, e.value) for e in curve.Scalars("eval/reward")] == [(0, 0.25), (1, 0.75)]
    assert [(e.step, e.value) for e in curve.Scalars("reward/mean")] == [(1, 0.5), (2, 0.625)]
    assert [(e.step, e.value) for e in curve.Scalars("time/total_s")] == [(1, 4.0)], "a curve has one value a step"
    assert [event.step for event in curve.Tensors("samples")] == [1]


def test_samples_are_a_table_in_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with MetricsWriter(tmp_path, wandb_project="lightning-jax-tests") as writer:
        writer.write_samples(3, SAMPLES)
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/samples*.json")
    columns = ["task_id", "rollout_id", "reward", "completion"]
    assert json.loads(table.read_text())["data"] == [[sample[name] for name in columns] for sample in SAMPLES]


@pytest.mark.parametrize("package, option", [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb_project": "p"})])
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, package, option):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself keeps for a package that cannot be imported
    with pytest.raises(InvalidConfigError, match=f"pip install {package}"):
        MetricsWriter(tmp_path, **option)
