"""Copies of checkpoints on the client's machine: whole, in order, and never what ends a training."""

import os
import threading
from pathlib import Path

import pytest

from agent_lightning import AgentLightningError, InvalidConfigError
from agent_lightning.checkpoint_copies import CheckpointCopies


class Downloads:
    """Stands for the server: writes a model folder in two pieces, or fails."""

    def __init__(self):
        self.asked, self.failing = [], set()
        self.between = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, output_dir, checkpoint):
        self.asked.append(checkpoint)
        os.makedirs(output_dir)
        (Path(output_dir) / "config.json").write_text(checkpoint)
        self.between.set()
        assert self.go_on.wait(20)
        if checkpoint in self.failing:
            raise AgentLightningError(f"{checkpoint} is gone")
        (Path(output_dir) / "model.safetensors").write_text("weights")


@pytest.fixture
def downloads():
    return Downloads()


def found(folder):
    return {path.name: (path / "config.json").read_text() for path in folder.iterdir()}


def test_every_checkpoint_is_copied_as_it_comes_and_latest_is_the_last(tmp_path, downloads):
    folder = tmp_path / "new" / "copies"
    copies = CheckpointCopies(folder, downloads)
    downloads.go_on.clear()
    copies.add("/srv/run/checkpoints/step-9")
    assert downloads.between.wait(20)
    assert not (folder / "step-9").exists(), "a half-finished copy does not look finished"
    downloads.go_on.set()
    copies.add("C:\\run\\checkpoints\\step-10")
    copies.finish(["/srv/run/checkpoints/step-9", "/srv/run/checkpoints/step-10"])
    assert found(folder) == {"step-9": "step-9", "step-10": "step-10", "latest": "step-10"}
    assert os.readlink(folder / "latest") == "step-10"
    assert downloads.asked == ["step-9", "step-10"], "each once"


def test_what_an_earlier_job_left_is_replaced(tmp_path, downloads):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "old").touch()
    (tmp_path / "tmp.step-1").mkdir()
    copies = CheckpointCopies(tmp_path, downloads)
    copies.finish(["/c/step-1"])
    assert sorted(os.listdir(tmp_path / "step-1")) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-1"]


def test_a_copy_that_fails_is_tried_again_at_the_end_and_then_said(tmp_path, downloads):
    copies = CheckpointCopies(tmp_path, downloads)
    downloads.failing = {"step-1", "step-2"}
    for step in (1, 2, 3):
        copies.add(f"/c/step-{step}")
    with pytest.warns(UserWarning, match="not copied to .*: step-2: step-2 is gone"):
        copies.finish(["/c/step-2", "/c/step-3"])  # the server keeps step-1 no longer
    assert downloads.asked == ["step-1", "step-2", "step-3", "step-2"]
    assert os.readlink(tmp_path / "latest") == "step-3"


def test_a_folder_named_latest_is_left_alone_and_said_once(tmp_path, downloads):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "config.json").write_text("mine")
    copies = CheckpointCopies(tmp_path, downloads)
    copies.add("/c/step-1")
    copies.add("/c/step-2")
    with pytest.warns(UserWarning, match="latest is a folder") as warned:
        copies.finish(["/c/step-1", "/c/step-2"])
    assert len(warned) == 1
    assert found(tmp_path) == {"latest": "mine", "step-1": "step-1", "step-2": "step-2"}


def test_a_folder_that_cannot_be_made_is_said_before_the_training(tmp_path, downloads):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfigError, match="checkpoint_dir=.*file/sub' cannot be written"):
        CheckpointCopies(tmp_path / "file" / "sub", downloads)
