"""The learner: packed rows and advantages in, one policy update out.

1. `Learner.update` packs the rows into blocks and divides them into micro-batches of few different shapes.
2. `update.accumulate` sums up the micro-batches' gradients on the device.
3. `update.apply` takes the optimizer step, and the host reads the metrics: one synchronisation per update.

Where there is a critic it takes its own optimizer steps first, over the same micro-batches (`critic.py`).
"""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import heap
from lightning_jax import mesh as mesh_lib
from lightning_jax.model import attention, llama, lora
from lightning_jax.rl import critic, gae, losses, offload, packing, update
from lightning_jax.rl.packing import Batch
from lightning_jax.rl.trajectory import Row
from lightning_jax.rl.update import LearnerSettings, TrainState

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the models say of a row's sampled tokens; [T] float32 arrays, without meaning at the others.

    Attributes:
        logprob: of each token, nats, under the policy.
        reference_logprob: likewise under the frozen reference; None where there is none.
    """

    logprob: np.ndarray
    reference_logprob: np.ndarray | None = None


class Learner:
    """A policy that is being trained: all of it, a part, or adapters beside it (`LearnerSettings.trainable`).

    `frozen` are the parameters that do not learn, in the compute dtype, or None. `state` may be replaced, by a
    checkpoint restored to `abstract_state()`. Every update donates the state before it: whoever else needs the
    parameters takes a copy (the engine casts and unstacks them into its own).
    """

    def __init__(
        self,
        config: llama.LlamaConfig,
        params: llama.Params,
        settings: LearnerSettings,
        *,
        mesh: jax.sharding.Mesh | None = None,
        seed: int = 0,
        between: Callable[[], object] = lambda: None,
    ):
        """Copies what learns of `params`: those are the float32 masters, which updates donate.

        The reference and what does not learn are not copied if they are where and as they should be.

        Args:
            config: the model's.
            params: the initial policy, any dtype; a resumed run gives these too, since they are the reference.
            settings: the update's.
            mesh: to shard over; None for one device.
            seed: of the adapters' initial values.
            between: called after each program of an update, once it is dispatched: others may use the device.
        """
        self.config = config
        self.settings = settings
        self._mesh, self._between, self._warned_of_blocks = mesh, between, False
        with mesh_lib.current(mesh):
            self._shares_prefixes = attention.takes_prefixes(config.sliding_window)
            self._length_unit = attention.length_unit()
        # Everything is put where it belongs by name, not left on the default device: arrays that JAX regards as placed
        # (those of a checkpoint are) and arrays that it may move have programs compiled for them separately.
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            self._trained_sharding = self._state_sharding = self._scalar_sharding = frozen_sharding = device
        else:
            frozen_sharding = lora.split(update.param_shardings(config, mesh), settings.trainable)[1]
            self._trained_sharding = update.trained_shardings(config, settings, mesh)
            self._state_sharding = update.state_shardings(config, settings, mesh)
            self._scalar_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        trained, frozen = lora.split(params, settings.trainable)
        self.frozen = self._in_compute_dtype(frozen, frozen_sharding) if frozen else None
        self._offloaded = offload.parts(settings)
        self._reference = None
        if settings.kl_coef and settings.trainable.lora_rank:
            self._reference = self.frozen  # the adapters switched off
        elif settings.kl_coef:
            reference = self._in_compute_dtype(trained, self._trained_sharding)
            if "reference" in self._offloaded:
                reference = offload.to_host(reference)
            self._reference = lora.whole(reference, self.frozen, settings.trainable)
        init_state = functools.partial(update.init_state, settings)
        init_state = jax.jit(init_state, out_shardings=self._state_sharding, donate_argnums=0)
        if settings.trainable.lora_rank:
            specs = lora.trained_specs(config, settings.trainable)
            init = functools.partial(llama.init_specs, specs)
            self.state = init_state(jax.jit(init, out_shardings=self._trained_sharding)(jax.random.key(seed)))
        else:
            self.state = init_state(self._masters(trained))
        totals_sharding = update.Totals(self._trained_sharding, self._scalar_sharding, self._scalar_sharding)
        self._zero_totals = jax.jit(update.zero_totals, out_shardings=totals_sharding)
        if settings.critic:
            created = critic.create(config, settings, self.state.params, mesh)
            self.state = self.state.replace(critic=created)
            shardings = jax.tree.map(lambda x: x.sharding, created.params)
            totals_sharding = critic.CriticTotals(shardings, self._scalar_sharding, self._scalar_sharding)
            self._zero_critic_totals = jax.jit(critic.zero_totals, out_shardings=totals_sharding)
        self.restore(self.state)

    def restore(self, state: TrainState) -> None:
        """Goes on from a state that has the shapes and shardings of `abstract_state`."""
        if "optimizer" in self._offloaded:
            state = state.replace(opt_state=offload.to_host(state.opt_state))
        self.state = state

    @property
    def params(self) -> llama.Params:
        """The policy for the sampler: all parameters, with adapters beside the matrices that have one."""
        return lora.whole(self.state.params, self.frozen, self.settings.trainable)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of `state`, for `checkpoint.restore`."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """What the models, as they are now, say of each row; in the programs' shapes of an update with these rows."""
        statics = {"config": self.config, "settings": self.settings}

        def logprobs(params: llama.Params, frozen: llama.Params | None) -> list[np.ndarray]:
            return self._of_rows(rows, lambda batch: update.policy_logprobs(params, batch, frozen, **statics)[0])

        own = logprobs(self.state.params, self.frozen)
        references = [None] * len(rows)
        if self._reference is not None:
            references = logprobs(offload.to_device(self._reference), None)
        return [Scores(*of_row) for of_row in zip(own, references, strict=True)]

    def values(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """[T] float32 for each row: the critic's value of each token's state; see `critic.py`."""
        statics = {"config": self.config, "settings": self.settings}
        models = self.state.critic.params, self.state.params
        return self._of_rows(rows, lambda batch: critic.token_values(*models, batch, self.frozen, **statics))

    def _of_rows(self, rows: Sequence[Row], score: Callable[[Batch], jax.Array]) -> list[np.ndarray]:
        """[T] float32 for each row of a function that gives [B, T] for a micro-batch."""
        if not rows:
            return []
        steps = self._divide(rows, np.zeros(1 + max(row.rollout_index for row in rows), np.float32))
        places = packing.place(rows, steps[0][0].token_bt.shape[1], share=self._shares_prefixes)
        blocks = packing.even_parts(1 + max(at.block for at in places), self.settings.optimizer_steps)

        with mesh_lib.current(self._mesh):
            scored = [[self._dispatched(score(self._put(batch))) for batch in step] for step in steps]
        # A step's last micro-batch may be filled up behind the step's own blocks.
        steps_bt = [np.concatenate(mesh_lib.to_host(of_step)) for of_step in scored]
        score_bt = np.concatenate([step_bt[:count] for step_bt, count in zip(steps_bt, blocks, strict=True)])
        return [score_bt[at.block, at.position_t] for at in places]

    def update(self, rows: Sequence[Row], advantage_n: np.ndarray) -> dict[str, float]:
        """One policy update (`settings.epochs` x `settings.optimizer_steps` steps). Without rows nothing happens.

        The policy that sampled is taken to be the one the update begins with. Its log-probs are `Row.old_logprob`, or
        are computed here, so that the sampler's rounding has no part in the curve. The recorded ones are compared with
        them in `policy/sampler_learner_logprob_diff`, where they are of the same distribution (`Row.on_policy`).

        A critic learns first, from `Row.value` and `Row.value_target`, and alone in its first `critic_warmup` updates.

        Args:
            rows: of the rollouts to train on (see `advantages.trained_rollouts`), in any order.
            advantage_n: [N] float32, by `Row.rollout_index`, for rows that bring no advantages of their own.

        Returns:
            Metrics by name; means are over sampled tokens. "policy/kl" is there when there is a reference (where it is
            in the reward, from `Row.kl`), no "policy/" where the policy did not learn, and "critic/" where there is a
            critic.
        """
        if not rows:
            return {"train/tokens": 0, "train/sampled_tokens": 0}
        is_warmup = self.state.critic is not None and int(self.state.critic.updates) < self.settings.critic_warmup
        if self.settings.epochs * self.settings.optimizer_steps > 1 and rows[0].old_logprob is None and not is_warmup:
            scores = self.score(rows)  # a single step's own forward pass gives them
            rows = [
                dataclasses.replace(row, old_logprob=score.logprob) for row, score in zip(rows, scores, strict=True)
            ]
        if self.settings.loss_aggregation != "token-mean":
            rows = _with_shares(rows)
        steps = self._divide(rows, advantage_n)
        metrics = {}
        with mesh_lib.current(self._mesh):
            if self.state.critic is not None:
                metrics |= _critic_metrics(jax.device_get(self._critic_steps(steps)), rows)
            if not is_warmup:
                taken = jax.device_get(self._optimizer_steps(steps))
                has_kl = self._reference is not None and not self.settings.kl_in_reward
                metrics |= _metrics(taken, has_reference=has_kl)
                if rows[0].kl is not None:  # in the reward, of the policy that the update began with
                    kl_m = np.concatenate([row.kl[row.loss_mask] for row in rows])
                    metrics["policy/kl"] = float(kl_m.mean(dtype=np.float64))
        for name in ("policy", "critic"):
            if skipped := metrics.get(f"{name}/skipped_steps"):
                _log.warning("%d optimizer steps of the %s skipped: the gradient was not finite", skipped, name)

        filled = np.concatenate([batch.segment_bt > 0 for batches in steps for batch in batches])
        return metrics | {
            "train/tokens": int(filled.sum()),
            "train/sampled_tokens": sum(int(row.loss_mask.sum()) for row in rows),
            "train/padding_fraction": 1 - float(np.mean(filled)),
        }

    def _divide(self, rows: Sequence[Row], advantage_n: np.ndarray) -> list[list[Batch]]:
        """Rows to micro-batches, by optimizer step."""
        with mesh_lib.current(self._mesh):
            length = self._block_length(rows)
            packed = packing.pack(rows, advantage_n, length, share=self._shares_prefixes)
        size = self._step_blocks(len(packed.token_bt), length)[1]
        ends = np.cumsum(packing.even_parts(len(packed.token_bt), self.settings.optimizer_steps)).tolist()
        if len(ends) < self.settings.optimizer_steps and not self._warned_of_blocks:
            self._warned_of_blocks = True
            _log.warning(
                "an update of %d blocks of %d tokens takes %d optimizer steps in a pass instead of %d, and the "
                "learning rate's schedule is behind",
                *(len(packed.token_bt), length, len(ends), self.settings.optimizer_steps),
            )
        spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        return [packing.micro_batches(jax.tree.map(lambda x, at=at: x[at], packed), size) for at in spans]

    def _block_length(self, rows: Sequence[Row]) -> int:
        """Of `packing.block_lengths` the first, unless a later one saves a twentieth of the work, and so on."""
        lengths = packing.block_lengths(
            max(len(row) for row in rows), minimum=self.settings.min_block_length, unit=self._length_unit
        )
        needed = packing.tokens_needed(rows, share=self._shares_prefixes)
        places = packing.place(rows, lengths[0], share=self._shares_prefixes)
        best, least = lengths[0], math.inf
        for length in lengths:
            reach = packing.reach(places, length)  # the same in blocks of any length, or all of the block
            if length > 2 * lengths[0] and (reach is None or length > self.settings.most_blocks(1)):
                continue  # so long blocks are for rows that see little of them
            work_of_token = 1 + (length if reach is None else reach.keys) * _attention_share(self.config)
            if needed * work_of_token >= 0.95 * least:
                continue  # even without padding
            if length != lengths[0]:
                places = packing.place(rows, length, share=self._shares_prefixes)
            per_step, size = self._step_blocks(1 + max(at.block for at in places), length)
            computed = self.settings.optimizer_steps * -(-per_step // size) * size
            if (work := computed * length * work_of_token) < 0.95 * least:
                best, least = length, work
        return best

    def _step_blocks(self, num_blocks: int, length: int) -> tuple[int, int]:
        """Blocks of the largest optimizer step, and of each micro-batch."""
        per_step = -(-num_blocks // self.settings.optimizer_steps)
        return per_step, packing.micro_batch_size(
            per_step,
            self.settings.gradient_accumulation,
            limit=self.settings.most_blocks(length),
            multiple=1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"],
        )

    def _optimizer_steps(self, steps: list[list[Batch]]) -> list[dict[str, jax.Array]]:
        """Takes them all; their metrics stay on the device."""
        statics = {"config": self.config, "settings": self.settings}
        metrics, reference = [], self._reference
        if "reference" in self._offloaded:
            steps, reference = self._with_reference(steps), None
        for batches in steps * self.settings.epochs:
            num_tokens = self._num_tokens(batches)
            divisor = jax.device_put(np.float32(self._divisor(batches)), self._scalar_sharding)
            totals = self._zero_totals(self.state.params)
            for batch in batches:
                totals = update.accumulate(
                    totals,
                    self.state.params,
                    reference,
                    self._put(batch),
                    divisor,
                    self.frozen,
                    mesh=self._mesh,
                    **statics,
                )
                self._dispatched(totals)
            beside, state = self.state.critic, self.state.replace(critic=None)
            if "optimizer" in self._offloaded:
                state = state.replace(opt_state=offload.to_device(state.opt_state))
            state, step_metrics = update.apply(state, totals, num_tokens, mesh=self._mesh, **statics)
            del totals  # before the next ones are made
            self.restore(state.replace(critic=beside))
            metrics.append(self._dispatched(step_metrics))
        return metrics

    def _with_reference(self, steps: list[list[Batch]]) -> list[list[Batch]]:
        """The micro-batches with the reference's log-probs, for which it comes to the device and goes again."""
        if self.settings.kl_in_reward:
            return steps
        score = functools.partial(update.policy_logprobs, config=self.config, settings=self.settings)
        reference = offload.to_device(self._reference)
        scored = [[score(reference, self._put(batch))[0] for batch in batches] for batches in steps]
        return [
            [batch.replace(reference_logprob_bt=mesh_lib.to_host(x)) for batch, x in zip(batches, of_step, strict=True)]
            for batches, of_step in zip(steps, scored, strict=True)
        ]

    def _critic_steps(self, steps: list[list[Batch]]) -> list[dict[str, jax.Array]]:
        """The critic's, on the policy as it is; their metrics stay on the device."""
        statics = {"config": self.config, "settings": self.settings, "mesh": self._mesh}
        state, metrics = self.state.critic, []
        updates = mesh_lib.put(np.int32(int(state.updates) + 1), self._scalar_sharding)
        for batches in steps * self.settings.epochs:
            num_tokens = self._num_tokens(batches)
            totals = self._zero_critic_totals(state.params)
            for batch in batches:
                totals = critic.accumulate(
                    totals, state.params, self.state.params, self._put(batch), num_tokens, self.frozen, **statics
                )
                self._dispatched(totals)
            state, step_metrics = critic.apply(state, totals, num_tokens, **statics)
            metrics.append(step_metrics)
        self.state = self.state.replace(critic=state.replace(updates=updates))
        return metrics

    def _dispatched(self, result: Any) -> Any:
        """`result`, of a program that has just been dispatched: others may use the device now."""
        self._between()
        if mesh_lib.platform() == "cpu":  # which would take the next one's work space beside this one's
            jax.block_until_ready(result)
            # The next one's may not fit where this one's was, for a small block there; then both would be held.
            heap.give_back_freed_memory()
        return result

    def _num_tokens(self, batches: list[Batch]) -> jax.Array:
        """Loss tokens of an optimizer step."""
        num_tokens = np.float32(sum(batch.loss_mask_bt.sum() for batch in batches))
        return mesh_lib.put(num_tokens, self._scalar_sharding)

    def _divisor(self, batches: Sequence[Batch]) -> float:
        mask_bt = np.concatenate([batch.loss_mask_bt for batch in batches])
        shares = [batch.share_bt for batch in batches if batch.share_bt is not None]
        share_bt = np.concatenate(shares) if shares else None
        return losses.divisor(self.settings.loss_aggregation, mask_bt, share_bt, self.settings.loss_longest)

    def _put(self, batch: Batch) -> Batch:
        """To the device, or spread over the mesh's batch axes."""
        if self._mesh is None:
            return jax.device_put(batch, self._scalar_sharding)
        spec = mesh_lib.partition_spec(self._mesh, batch.token_bt.shape, ("batch", None))
        return mesh_lib.put(batch, jax.sharding.NamedSharding(self._mesh, spec))

    def _masters(self, params: llama.Params) -> llama.Params:
        """A float32 copy of `params`, on the device or spread over the mesh."""

        def copy(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
            if isinstance(x, np.ndarray):  # from the host to its shards, never through one device as a whole
                return mesh_lib.put(np.array(x, np.float32), sharding)
            return jax.device_put(jnp.array(x, jnp.float32), sharding)

        return jax.tree.map(copy, params, jax.tree.broadcast(self._trained_sharding, params))

    def _in_compute_dtype(self, params: llama.Params, sharding: Any) -> llama.Params:
        """What does not learn, on the device or spread over the mesh; not a copy where it is so already."""
        dtype = jnp.dtype(self.settings.compute_dtype)
        return jax.device_put(jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params), sharding)


def _attention_share(config: llama.LlamaConfig) -> float:
    """Attention's products with one key, in units of a token's products with a layer's matrices."""
    heads, width = config.num_heads * config.head_dim, config.hidden_size
    matrices = width * (2 * heads + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size)
    return 2 * heads / matrices


def _with_shares(rows: Sequence[Row]) -> list[Row]:
    """The rows with `Row.share`."""
    tokens = collections.Counter()
    for row in rows:
        tokens[row.rollout_index] += int(row.loss_mask.sum())
    return [
        dataclasses.replace(row, share=np.where(row.loss_mask, np.float32(1 / tokens[row.rollout_index]), 0))
        for row in rows
    ]


def _metrics(steps: Sequence[dict[str, np.ndarray]], has_reference: bool) -> dict[str, float]:
    """The update's metrics from those of its optimizer steps."""

    def column(name: str) -> np.ndarray:
        return np.array([step[name] for step in steps], np.float64)

    num_tokens = column("num_tokens").sum()
    metrics = {
        "policy/loss": column("loss").mean(),
        "policy/entropy": column("entropy").sum() / num_tokens,
        "policy/clip_fraction": (column("clipped_low") + column("clipped_high")).sum() / num_tokens,
        "policy/clip_fraction_low": column("clipped_low").sum() / num_tokens,
        "policy/clip_fraction_high": column("clipped_high").sum() / num_tokens,
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


def _critic_metrics(steps: Sequence[dict[str, np.ndarray]], rows: Sequence[Row]) -> dict[str, float]:
    """The critic's metrics from those of its optimizer steps, and from the values that it had before them."""
    num_tokens = sum(float(step["num_tokens"]) for step in steps)
    value_m = np.concatenate([row.value[row.loss_mask] for row in rows]).astype(np.float64)
    target_m = np.concatenate([row.value_target[row.loss_mask] for row in rows]).astype(np.float64)
    metrics = {
        "critic/value_loss": np.mean([step["loss"] for step in steps]),
        "critic/clip_fraction": sum(float(step["clipped"]) for step in steps) / num_tokens,
        "critic/grad_norm": np.mean([step["grad_norm"] for step in steps]),
        "critic/learning_rate": steps[-1]["learning_rate"],
        "critic/skipped_steps": sum(float(step["skipped"]) for step in steps),
        "critic/value_mean": value_m.mean(),
        "critic/return_mean": target_m.mean(),
        "critic/explained_variance": gae.explained_variance(value_m, target_m),
    }
    return {name: float(value) for name, value in metrics.items()}
