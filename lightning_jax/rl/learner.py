"""The learner: packed rows and advantages in, one policy update out.

1. `Learner.update` packs the rows into blocks and divides them into micro-batches of few different shapes.
2. `update.accumulate` sums up the micro-batches' gradients on the device.
3. `update.apply` takes the optimizer step, and the host reads the metrics: one synchronisation per update.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import mesh as mesh_lib
from lightning_jax.model import llama
from lightning_jax.rl import packing, update
from lightning_jax.rl.packing import Batch
from lightning_jax.rl.trajectory import Row
from lightning_jax.rl.update import LearnerSettings, TrainState

_log = logging.getLogger(__name__)


class Learner:
    """A policy that is being trained.

    `state` may be replaced, by a checkpoint restored to `abstract_state()`. Every update donates the state before it:
    whoever else needs the parameters takes a copy (the engine casts and unstacks them into its own).
    """

    def __init__(
        self,
        config: llama.LlamaConfig,
        params: llama.Params,
        settings: LearnerSettings,
        *,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Copies `params` twice: as float32 masters and, when there is a KL term, as the frozen reference.

        Args:
            config: the model's.
            params: the initial policy, any dtype; a resumed run gives these too, since they are the reference.
            settings: the update's.
            mesh: to shard over; None for one device.
        """
        self.config = config
        self.settings = settings
        self._mesh = mesh
        # Everything is put where it belongs by name, not left on the default device: arrays that JAX regards as placed
        # (those of a checkpoint are) and arrays that it may move have programs compiled for them separately.
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            self._params_sharding = self._state_sharding = self._scalar_sharding = device
        else:
            self._params_sharding = update.param_shardings(config, mesh)
            self._state_sharding = update.state_shardings(config, settings, mesh)
            self._scalar_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._reference = self._place(params, settings.compute_dtype) if settings.kl_coef else None
        init_state = jax.jit(functools.partial(update.init_state, settings), out_shardings=self._state_sharding)
        self.state = init_state(self._place(params, "float32"))
        totals_sharding = update.Totals(self._params_sharding, self._scalar_sharding, self._scalar_sharding)
        self._zero_totals = jax.jit(update.zero_totals, out_shardings=totals_sharding)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of `state`, for `checkpoint.restore`."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)

    def update(self, rows: Sequence[Row], advantage_n: np.ndarray) -> dict[str, float]:
        """One policy update (`settings.optimizer_steps` optimizer steps). Without rows nothing happens.

        The policy that sampled is taken to be the one the update begins with, and its log-probs are computed here, so
        that the sampler's rounding has no part in the curve. The recorded ones are compared with them in
        `policy/sampler_learner_logprob_diff`, where they are of the same distribution (`Row.on_policy`).

        Args:
            rows: of the rollouts to train on (see `advantages.trained_rollouts`), in any order.
            advantage_n: [N] float32, by `Row.rollout_index`, for rows that bring no advantages of their own.

        Returns:
            Metrics by name; means are over sampled tokens. "policy/kl" is there when there is a reference.
        """
        if not rows:
            return {"train/tokens": 0, "train/sampled_tokens": 0}
        steps = self._divide(rows, advantage_n)
        metrics = _metrics(jax.device_get(self._optimizer_steps(steps)), has_reference=self._reference is not None)
        if skipped := metrics["policy/skipped_steps"]:
            _log.warning("%d of %d optimizer steps skipped: the gradient was not finite", skipped, len(steps))

        tokens = sum(len(row) for row in rows)
        places = sum(batch.token_bt.size for batches in steps for batch in batches)
        return metrics | {
            "train/tokens": tokens,
            "train/sampled_tokens": sum(int(row.loss_mask.sum()) for row in rows),
            "train/padding_fraction": 1 - tokens / places,
        }

    def _divide(self, rows: Sequence[Row], advantage_n: np.ndarray) -> list[list[Batch]]:
        """Rows to micro-batches, by optimizer step."""
        s = self.settings
        length = packing.block_length(max(len(row) for row in rows), minimum=s.min_block_length)
        packed = packing.pack(rows, advantage_n, length)
        per_step = -(-packed.token_bt.shape[0] // s.optimizer_steps)
        size = packing.micro_batch_size(
            per_step,
            s.gradient_accumulation,
            limit=s.most_blocks(length),
            multiple=1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"],
        )
        steps = packing.micro_batches(packed, per_step)
        return [packing.micro_batches(step, size) for step in steps]

    def _optimizer_steps(self, steps: list[list[Batch]]) -> list[dict[str, jax.Array]]:
        """Takes them all; their metrics stay on the device."""
        statics = {"config": self.config, "settings": self.settings}
        old = [[None] * len(batches) for batches in steps]  # a single step's own forward pass gives them
        if len(steps) > 1:
            old = [
                [update.policy_logprobs(self.state.params, self._put(b), **statics)[0] for b in batches]
                for batches in steps
            ]
        metrics = []
        for batches, old_logprobs in zip(steps, old, strict=True):
            num_tokens = np.float32(sum(batch.loss_mask_bt.sum() for batch in batches))
            num_tokens = jax.device_put(num_tokens, self._scalar_sharding)
            totals = self._zero_totals(self.state.params)
            for batch, old_logprob_bt in zip(batches, old_logprobs, strict=True):
                batch = self._put(batch)
                totals = update.accumulate(
                    totals,
                    self.state.params,
                    self._reference,
                    batch,
                    old_logprob_bt,
                    num_tokens,
                    mesh=self._mesh,
                    **statics,
                )
            self.state, step_metrics = update.apply(self.state, totals, num_tokens, mesh=self._mesh, **statics)
            metrics.append(step_metrics)
        return metrics

    def _put(self, batch: Batch) -> Batch:
        """To the device, or spread over the mesh's batch axes."""
        if self._mesh is None:
            return jax.device_put(batch, self._scalar_sharding)
        spec = mesh_lib.partition_spec(self._mesh, batch.token_bt.shape, ("batch", None))
        return jax.device_put(batch, jax.sharding.NamedSharding(self._mesh, spec))

    def _place(self, params: llama.Params, dtype: str) -> llama.Params:
        """A copy of `params` in a dtype, on the device or spread over the mesh; a copy, since updates donate."""

        def copy(x: Any) -> Any:
            # A NumPy leaf goes from the host to its shards, never through one device as a whole.
            return np.array(x, jnp.dtype(dtype)) if isinstance(x, np.ndarray) else jnp.array(x, dtype)

        return jax.device_put(jax.tree.map(copy, params), self._params_sharding)


def _metrics(steps: Sequence[dict[str, np.ndarray]], has_reference: bool) -> dict[str, float]:
    """The update's metrics from those of its optimizer steps."""

    def column(name: str) -> np.ndarray:
        return np.array([step[name] for step in steps], np.float64)

    num_tokens = column("num_tokens").sum()
    metrics = {
        "policy/loss": column("loss").mean(),
        "policy/entropy": column("entropy").sum() / num_tokens,
        "policy/clip_fraction": column("clipped").sum() / num_tokens,
        "policy/ratio_mean": column("ratio").sum() / num_tokens,
        "policy/ratio_max": column("ratio_max").max(),
        "policy/grad_norm": column("grad_norm").mean(),
        "policy/learning_rate": column("learning_rate")[-1],
        "policy/skipped_steps": column("skipped").sum(),
    }
    if compared := column("on_policy").sum():
        metrics["policy/sampler_learner_logprob_diff"] = column("logprob_diff").sum() / compared
        metrics["policy/sampler_learner_logprob_diff_max"] = column("logprob_diff_max").max()
    if has_reference:
        metrics["policy/kl"] = column("kl").sum() / num_tokens
    return {name: float(value) for name, value in metrics.items()}
