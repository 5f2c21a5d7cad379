"""One trainable model, with its weights, tokenizer, engine and learner.

HTTP handlers and the training loop never touch JAX: they hand requests and commands to the `DeviceThread`.
"""

import concurrent.futures
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import mesh as mesh_lib
from lightning_jax import utilization
from lightning_jax.model import llama, lora, weights
from lightning_jax.rl import algorithms, checkpoint
from lightning_jax.rl import learner as learner_lib
from lightning_jax.rl.settings import compute_dtype, learner_settings
from lightning_jax.rl.trajectory import Row
from lightning_jax.rl.update import TrainState
from lightning_jax.sampler import engine as engine_lib
from lightning_jax.sampler.device_thread import DeviceThread
from lightning_jax.text import tokenizer as tokenizer_lib

_KIND = ("lora_rank", "lora_alpha", "lora_targets", "frozen")  # settings of a model that a checkpoint is tied to


class Policy:
    """One model, as `Policies` makes it: samples for any thread, and learns by the device thread.

    Attributes:
        name: what `/v1/models` and `resource.model_names` say.
        config: the model's sizes.
        tokenizer: its tokenizer.
        trainable: what learns of it.
        max_seq_len: tokens of a conversation, prompt and replies together.
        dtype: what it computes in.
        version: of the weights that the engine samples from; the number of updates behind them.
    """

    def __init__(
        self,
        name: str,
        settings: ml_collections.ConfigDict,
        device: DeviceThread,
        tell: Callable[..., None] | None = None,
    ):
        """Loads the model and makes its engine.

        Args:
            settings: the run's configuration as this model has it (`config_models.of_each`).
            device: shared by all policies.
            tell: see `Engine`.

        Raises:
            InvalidConfigError: the model cannot be read, or does not fit the settings.
        """
        self._settings = settings
        self.dtype = compute_dtype(settings.model.dtype)
        self.trainable = lora.Trainable.of(settings.model)
        self._mesh = None
        self.name = name
        self.tokenizer = tokenizer_lib.load_tokenizer(settings.model.path)
        shardings = None
        if jax.device_count() > 1:  # so that no device holds a large model as a whole
            model = weights.load_config(settings.model.path)
            self._mesh = mesh_lib.make_mesh(*mesh_lib.sizes_for(model, settings, jax.device_count()))
            shardings = mesh_lib.shardings(self._mesh, llama.abstract_params(model))
        self.config, self._initial = weights.load_model(settings.model.path, self._loaded_dtype, shardings)
        self._fingerprint = weights.fingerprint(settings.model.path)
        self.trainable.check(self.config)
        self.max_seq_len = min(settings.runtime.max_seq_len, self.config.max_seq_len)
        self._learner: learner_lib.Learner | None = None
        self._request_ids = itertools.count()
        self._device = device
        self._engine = self._device.run(self._make_engine, tell).result()
        self._device.add_engine(self._engine)

    @property
    def version(self) -> int:
        return self._engine.version

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling (any thread)
    # -----------------------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompt_ids: Sequence[int],
        sampling: engine_lib.SamplingParams,
        *,
        should_stop: Callable[[list[int]], int | None] | None = None,
        on_tokens: Callable[[list[int], np.ndarray, tuple[int, int]], None] | None = None,
        on_top_logprobs: Callable[[list[list[tuple[int, float]]] | None], None] | None = None,
        fairness_key: str = "",
    ) -> concurrent.futures.Future:
        """Queues one sample; the future has its `Completion`, and an attribute `request_id` for `cancel`.

        Raises:
            QueueFull: too many requests wait.
            RuntimeError: the device thread has ended.
            ValueError: the prompt does not leave room for a token.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.request_id = f"{self.name}:{next(self._request_ids)}"
        request = engine_lib.Request(
            request_id=future.request_id,
            prompt_ids=list(prompt_ids),
            sampling=sampling,
            on_done=future.set_result,
            should_stop=should_stop,
            on_tokens=on_tokens,
            on_top_logprobs=on_top_logprobs,
            fairness_key=fairness_key,
        )
        self._engine.submit(request)
        self._device.wake()
        return future

    def check_room(self, count: int) -> None:
        """Raises QueueFull where so many more samples, which belong together, would be too many."""
        self._engine.check_room(count)

    def cancel(self, request_id: str) -> None:
        """Ends a request early; its future gets what was sampled, with finish reason "cancelled"."""
        self._engine.cancel(request_id)
        self._device.wake()

    def score(self, token_ids: Sequence[int]) -> concurrent.futures.Future:
        """Log-probs of a sequence, at temperature 1 under the weights that are sampled from.

        Between two rounds of sampling, in one forward; the first one of a length's power of two is compiled then.

        Returns:
            The future of a `sampler.scoring.Scores`.
        """
        return self._device.run(self._engine.score, list(token_ids))

    def warmup(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles the sampler's programs."""
        self._device.run(self._engine.warmup, progress).result()

    def sampler_metrics(self) -> dict[str, float]:
        return {f"sampler/{name}": value for name, value in self._engine.stats().items()}

    def step_metrics(
        self, before: Mapping[str, float], updated: Mapping[str, float], sample_s: float, train_s: float
    ) -> dict[str, float]:
        """What a step made of the prefix cache and of the devices.

        Args:
            before: the sampler's metrics at its start.
            updated: the learner's, of its update.
            sample_s, train_s: seconds that sampling and the update took.
        """
        spent = {name: value - before[name] for name, value in self.sampler_metrics().items()}
        devices = 1 if self._mesh is None else self._mesh.size
        learner, algorithm = self._learner.settings, algorithms.settings_of(self._settings)
        policy_learns = "policy/loss" in updated  # in the critic's warm-up it does not
        are_scored = algorithm.needs_scores or (policy_learns and learner.epochs * learner.optimizer_steps > 1)
        flops = utilization.update_flops(
            self.config,
            updated["train/tokens"],
            has_reference=learner.kl_coef > 0 and not algorithm.kl_in_reward,
            only_adapters=self.trainable.lora_rank > 0,
            epochs=learner.epochs,
            policy_learns=policy_learns,
            critic=learner.critic,
            forwards=are_scored * (1 + (learner.kl_coef > 0)) + (learner.critic is not None),
        )
        share = utilization.DeviceShare(self.config, self.dtype.itemsize, devices)
        return utilization.cache_metrics(spent) | share.metrics(spent, flops, sample_s, train_s)

    def read_weights(self, path: pathlib.Path | None, dtype: np.dtype, item: str | None = None) -> llama.Params:
        """A checkpoint's parameters as NumPy arrays of `dtype`, in the master form; None reads the model itself.

        Adapters are merged into their matrices. From the disk, in any thread: the device is not touched. `item` as in
        `restore`. Raises InvalidConfigError.
        """
        if path is None:
            return weights.load_arrays(self._settings.model.path, dtype)[1]
        trained = self.read_trained(path, np.float32 if self.trainable.lora_rank else dtype, item)
        if self.trainable.is_whole:
            return trained
        loaded = weights.load_arrays(self._settings.model.path, self._loaded_dtype)[1]
        frozen = lora.split(loaded, self.trainable)[1]
        return lora.merged_arrays(lora.whole(trained, frozen, self.trainable), dtype)

    def read_trained(self, path: pathlib.Path, dtype: np.dtype, item: str | None = None) -> llama.Params:
        """What a checkpoint holds, the parameters that learn or the adapters; otherwise as `read_weights`."""
        self._check_kind(path, item)
        nothing = np.zeros((), dtype)  # stands for arrays of every shape without their memory
        specs = lora.trained_specs(self.config, self.trainable)
        specs = jax.tree.map(lambda spec: np.broadcast_to(nothing, spec.shape), specs)
        return checkpoint.restore_params(path, specs, item=item)

    @property
    def origin(self) -> dict[str, Any]:
        """What a checkpoint needs beside it to be this policy: the model that it began with, and what learns of it."""
        settings = self._settings.model
        return {name: settings[name] for name in ("path", *_KIND)} | {"fingerprint": self._fingerprint}

    def _check_kind(self, path: pathlib.Path, item: str | None) -> None:
        """Raises InvalidConfigError where something else learned in the run that made a checkpoint."""
        origins = checkpoint.read_extra(path, item=item).get("origins", {})
        saved = origins.get(self.name) if item else next(iter(origins.values()), None)
        differences = [
            f"model.{name}={saved[name]!r} there, {self.origin[name]!r} here"
            for name in _KIND
            if saved and saved[name] != self.origin[name]
        ]
        if saved and saved.get("fingerprint", self._fingerprint) != self._fingerprint:
            raise InvalidConfigError(
                f"checkpoint {path} began with the weights that were in {saved['path']} then; those in "
                f"{self.origin['path']} are others",
                hint="use the model that it was made with, or choose another workdir",
            )
        if differences:
            raise InvalidConfigError(
                f"checkpoint {path} was made by a run in which something else learned: {', '.join(differences)}",
                hint="use the settings that it was made with, or choose another workdir",
            )

    def _loaded_dtype(self, name: str) -> jnp.dtype:
        """Of a parameter in memory: float32 if it learns, or else what it is computed with."""
        return self.dtype if self.trainable.is_frozen(name) else jnp.dtype("float32")

    def replay(self, dispatch: Callable[..., object], *args) -> None:
        """Makes a dispatch that process 0's engine told of."""
        self._engine.replay(dispatch, *args)

    def _make_engine(self, tell: Callable[..., None] | None) -> engine_lib.Engine:
        s = self._settings.sampler
        return engine_lib.Engine(
            self.config,
            self._initial,
            max_slots=s.max_slots,
            page_size=s.page_size,
            num_pages=-(-s.kv_cache_tokens // s.page_size),
            max_seq_len=self.max_seq_len,
            decode_steps=s.decode_steps,
            prefill_chunk=s.prefill_chunk,
            max_queue=s.max_queue,
            dtype=self.dtype,
            eos_ids=self.tokenizer.eos_ids,
            mesh=self._mesh,
            tell=tell,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Learning (the device thread)
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> TrainState | None:
        """Weights and optimizer; None before `make_learner`. An update donates it: take a copy of what must last."""
        return None if self._learner is None else self._learner.state

    @property
    def _samples_while_learning(self) -> bool:
        """Not in several processes, which keep to one order of programs."""
        return self._settings.runtime.max_staleness > 0 and jax.process_count() == 1

    def make_learner(self) -> None:
        if self._learner is not None:  # another model's could not be made
            return
        settings = learner_settings(self._settings, self.dtype)
        options = {"mesh": self._mesh, "seed": self._settings.seed}
        if self._samples_while_learning:
            options["between"] = self._device.rounds
        self._learner = learner_lib.Learner(self.config, self._initial, settings, **options)
        self._initial = None

    def restore(self, path: pathlib.Path, item: str | None) -> dict[str, Any]:
        """Takes weights and optimizer from a checkpoint; returns what was saved beside them.

        Args:
            item: this model's in a checkpoint of several; None in one of a single model.
        """
        self._check_kind(path, item)
        abstract, self._learner.state = self._learner.abstract_state(), None  # there is no room for two
        state, extra = checkpoint.restore(path, abstract, item=item)
        self._learner.restore(state)
        return extra

    def rest(self) -> None:
        """Leaves the memory of the engine's weights to the learner until `publish`, where nobody samples meanwhile."""
        if not self._samples_while_learning:
            self._engine.rest()

    def learn(self, rows: Sequence[Row], return_n: np.ndarray, group_n: np.ndarray) -> dict[str, float]:
        """One update, see `algorithms.Step` and `Learner.update`."""
        step = algorithms.Step(rows, return_n, group_n, self._learner.score, self._learner.values)
        return self._learner.update(*algorithms.prepare(algorithms.settings_of(self._settings), step))

    def publish(self, version: int) -> float:
        """Gives the engine the learner's weights: the next request is sampled from them. Returns the seconds taken."""
        start = time.monotonic()
        self._engine.publish(self._initial if self._learner is None else self._learner.params, version)
        return time.monotonic() - start

    def publish_checkpoint(self, path: pathlib.Path, item: str | None) -> None:
        """Gives the engine a checkpoint's weights, with its step as their version; the learner keeps its own."""
        self._check_kind(path, item)
        # In the sampler's own dtype: there is no room to be counted on for a second set of master weights. Adapters are
        # small, and merged in float32.
        dtype = jnp.float32 if self.trainable.lora_rank else self.dtype
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), self._learner.abstract_state().params
        )
        trained = checkpoint.restore_params(path, abstract, item=item)
        self._engine.publish(lora.whole(trained, self._learner.frozen, self.trainable), checkpoint.step_of(path))
