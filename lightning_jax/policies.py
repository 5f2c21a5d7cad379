"""The trainable models of a run: mostly one, or several that learn from the same trajectories."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from lightning_jax import config_models, heap, processes
from lightning_jax.policy import Policy
from lightning_jax.rl import checkpoint
from lightning_jax.rl.trajectory import Row
from lightning_jax.sampler.device_thread import DeviceThread


class Policies(Mapping[str, Policy]):
    """The models of a run by name, the first one first. They learn in step, and are saved in one checkpoint.

    Attributes:
        checkpoint_dir: where `step-N` and `latest` are.
        step: updates made so far, of every model.
        restored: what was saved beside the newest checkpoint when these policies were restored from it; else None.
    """

    def __init__(self, settings: ml_collections.ConfigDict, leader: processes.Leader | None = None):
        """Loads the models, or restores the newest checkpoint of the work directory.

        Args:
            settings: the run's configuration (`config.py`).
            leader: of several processes; in those that follow it the models are as they were loaded.

        Raises:
            InvalidConfigError: a model cannot be read, or does not fit the settings.
        """
        self.checkpoint_dir = pathlib.Path(settings.workdir) / "checkpoints"
        self.step = 0
        self.restored: dict[str, Any] | None = None
        self._max_to_keep = settings.runtime.max_to_keep or None
        self._device = DeviceThread()
        self._leader = leader
        self._policies: dict[str, Policy] = {}
        try:
            for name, own in config_models.of_each(settings).items():
                tell = None if leader is None else functools.partial(leader.tell, Policies._replay, name)
                self._policies[name] = Policy(name, own, self._device, tell)
            if jax.process_index() == 0 and checkpoint.latest(self.checkpoint_dir) is not None:
                self.prepare_training()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Policy:
        return self._policies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._policies)

    def __len__(self) -> int:
        return len(self._policies)

    @property
    def first(self) -> Policy:
        """The one that is meant where none is named."""
        return next(iter(self.values()))

    def find(self, role: str) -> Policy | None:
        """The one of this number, from 1 on, or name; None if there is none."""
        numbered = {str(number): policy for number, policy in enumerate(self.values(), 1)}
        return numbered.get(role) or self.get(role)

    @property
    def error(self) -> BaseException | None:
        """The exception that ended the device thread, if one did."""
        return self._device.error

    @property
    def idle_s(self) -> float:
        """Seconds so far in which the device thread had nothing to do."""
        return self._device.idle_s

    def close(self) -> None:
        self._device.close()

    def checkpoint_item(self, name: str) -> str | None:
        """A model's part in checkpoints: its name, or None where there is one model and a checkpoint is all its."""
        return name if len(self) > 1 else None

    # One thread at a time ---------------------------------------------------------------------------------------------

    def prepare_training(self) -> None:
        """Makes the learners, from the newest checkpoint of the work directory if there is one."""
        if any(policy.state is None for policy in self.values()):
            newest = checkpoint.latest(self.checkpoint_dir)
            self._run(Policies._make_learners, None if newest is None else newest.name)  # the same one everywhere

    def update(self, rows: Mapping[str, Sequence[Row]], return_n: np.ndarray, group_n: np.ndarray) -> dict[str, dict]:
        """One update of each model and their publication: the next request is sampled from the new weights.

        Args:
            rows: by model; one without rows keeps its weights, under the new step's number.
            return_n, group_n: [N] each, by `Row.rollout_index`, see `algorithms.Step`.

        Returns:
            By model, the learner's metrics and "time/publish_s".
        """
        return self._run(Policies._update, rows, return_n, group_n)

    def save_checkpoint(self, extra: dict[str, Any]) -> pathlib.Path:
        """Writes weights, optimizers and `extra` (JSON-ready) to disk as `step-N`, all models' or nothing.

        Returns:
            The checkpoint's absolute path.
        """
        return self._run(Policies._save_checkpoint, extra)

    def checkpoints(self) -> list[pathlib.Path]:
        """The checkpoints that are kept, in step order."""
        return checkpoint.all_steps(self.checkpoint_dir)

    def find_checkpoint(self, name: str) -> pathlib.Path:
        """The checkpoint that `latest`, `best`, `step-N` or a path, also of a model's part of it, names.

        Raises:
            InvalidConfigError: there is none of that name, or it is another run's.
        """
        return checkpoint.resolve(self.checkpoint_dir, self.split_part(name)[0])

    def split_part(self, name: str) -> tuple[str, str | None]:
        """A checkpoint's name and the model whose part of it that is, as in a result of several models, or None."""
        above, _, last = name.rstrip("/").rpartition("/")
        return (above, last) if above and len(self) > 1 and last in self else (name, None)

    @contextlib.contextmanager
    def sampling_from(self, path: pathlib.Path):
        """Samples from a checkpoint's weights, with its step as their version, for as long as the block lasts.

        What is being trained is not touched, and is sampled from again afterwards.

        Raises:
            InvalidConfigError: the checkpoint is gone, or another model's.
        """
        try:
            self._run(Policies._publish_checkpoint, path)
            yield
        finally:
            if self.error is None:
                self._run(Policies._publish)

    def _run(self, command: Callable, *args) -> Any:
        """Runs a method on the device thread, and in all other processes as well."""
        if self._leader is None:
            return self._device.run(command, self, *args).result()
        return self._device.run(self._leader.run, command, self, *args).result()

    def _replay(self, name: str, dispatch: Callable[..., object], *args) -> None:
        self[name].replay(dispatch, *args)

    def _make_learners(self, newest: str | None) -> None:
        with self._resting():
            for name, policy in self.items():
                policy.make_learner()
                if newest is not None:
                    self.restored = policy.restore(self.checkpoint_dir / newest, self.checkpoint_item(name))
                    self.step = self.restored["step"]
            heap.give_back_freed_memory()  # of the ways that the parameters took
        self._publish()

    def _update(self, rows: Mapping[str, Sequence[Row]], return_n: np.ndarray, group_n: np.ndarray) -> dict[str, dict]:
        with self._resting():
            metrics = {name: policy.learn(rows.get(name, ()), return_n, group_n) for name, policy in self.items()}
        self.step += 1
        return {name: metrics[name] | {"time/publish_s": policy.publish(self.step)} for name, policy in self.items()}

    @contextlib.contextmanager
    def _resting(self):
        """Leaves the memory of the engines' weights to the block; whoever leaves it in order publishes."""
        for policy in self.values():
            policy.rest()
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the learner's weights may have gone with what failed
                self._publish()
            raise

    def _publish(self) -> None:
        for policy in self.values():
            policy.publish(self.step)

    def _publish_checkpoint(self, path: pathlib.Path) -> None:
        for name, policy in self.items():
            policy.publish_checkpoint(path, self.checkpoint_item(name))

    def _save_checkpoint(self, extra: dict[str, Any]) -> pathlib.Path:
        states = {name: policy.state for name, policy in self.items()}
        state = states if len(states) > 1 else self.first.state
        extra = extra | {"origins": {name: policy.origin for name, policy in self.items()}}
        return checkpoint.save(self.checkpoint_dir, self.step, state, extra, max_to_keep=self._max_to_keep)
