"""The learner's device programs: pure functions of arrays and static settings, which can be lowered from shapes alone.

`accumulate` adds a micro-batch's gradient and metric sums to the totals. What they are divided by is of the whole
optimizer step, so that the division into micro-batches does not show in the gradient. `apply` clips the total
and takes one AdamW step. Masters, gradients and optimizer state are float32; each micro-batch computes in
`LearnerSettings.compute_dtype`. Where only a part of the parameters learns, or adapters do (`model/lora.py`), those are
what masters, gradients and optimizer state are of; the rest stays in the compute dtype.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lightning_jax import compiler
from lightning_jax import mesh as mesh_lib
from lightning_jax.model import llama, lora
from lightning_jax.rl import losses, packing
from lightning_jax.rl.packing import Batch

SUMS = ("loss", "kl", "entropy", "clipped_low", "clipped_high", "ratio", "logprob_diff", "on_policy")
MAXIMA = ("ratio_max", "logprob_diff_max")


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """What an update does. Hashable: a static argument of `jax.jit`.

    Attributes:
        kl_coef: weight of the divergence from the reference; 0 keeps no reference.
        kl_in_reward: the divergence is in the advantages (`algorithms.py`), not in the loss.
        kl_estimator, loss_mode, loss_aggregation: see `losses.py`.
        dual_clip: the ratio at which the loss of negative advantages ends; None for no end.
        loss_longest: tokens of the longest completion, the constant of the aggregation "constant".
        clip_low, clip_high: the policy ratio's gain ends at 1 - clip_low and 1 + clip_high.
        max_grad_norm: the gradient is scaled down to this global norm; None to leave it.
        weight_decay: AdamW's, on matrices (not on norms and biases).
        lr_schedule: "constant", "linear" or "cosine", what becomes of the learning rate after the warm-up.
        lr_min_ratio: of `learning_rate`, where "linear" and "cosine" end and stay.
        warmup_steps: optimizer steps over which the learning rate rises to `learning_rate`, linearly.
        decay_steps: the optimizer step, from 0 on and warm-up included, at which it has come down to its end.
        epochs: passes that an update makes over its rows.
        optimizer_steps: parts that an update's blocks are divided into, with an optimizer step for each in each pass.
        gradient_accumulation: micro-batches of an optimizer step; more, when rows are more than `batch_size`.
        batch_size: rows that one update is expected to have, and `max_seq_len` the tokens of the longest; with
            `gradient_accumulation` they bound the memory of a micro-batch.
        min_block_length: packing fills blocks at least this long.
        remat: what the backward pass keeps of each layer, see `llama.REMAT_POLICIES`; None for everything.
        offload: what is in the host's memory between uses, see `offload.py`.
        compute_dtype: "float32" or "bfloat16".
        trainable: what learns.
        critic: one of `critic.KINDS`, or None for no critic.
        critic_lr: its learning rate.
        critic_warmup: first updates, in which it learns alone.
        value_clip: how far a value may go from the old one in an update, in units of reward; None for any way.
    """

    learning_rate: float = 5e-7
    kl_coef: float = 0.001
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_in_reward: bool = False
    kl_estimator: str = "k3"
    loss_mode: str = "clip"
    loss_aggregation: str = "token-mean"
    loss_longest: int = 1024
    entropy_coef: float = 0.0
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    lr_schedule: str = "constant"
    lr_min_ratio: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    epochs: int = 1
    optimizer_steps: int = 1
    gradient_accumulation: int = 1
    batch_size: int = 256
    max_seq_len: int = 4096
    min_block_length: int = 256
    remat: str | None = None
    offload: str = "none"
    compute_dtype: str = "float32"
    trainable: lora.Trainable = lora.Trainable()
    critic: str | None = None
    critic_lr: float = 1e-5
    critic_warmup: int = 0
    value_clip: float | None = None

    def most_blocks(self, length: int) -> int:
        """The most blocks of `length` tokens that a micro-batch has: as many tokens as with the longest rows."""
        longest = packing.block_length(self.max_seq_len, minimum=self.min_block_length)
        return max(1, -(-self.batch_size // self.gradient_accumulation) * longest // length)


@flax.struct.dataclass
class TrainState:
    """Everything an update changes."""

    params: llama.Params  # what learns: float32, stacked layers
    opt_state: optax.OptState
    step: jax.Array  # int32, optimizer steps taken
    critic: Any = None  # `critic.CriticState`, where there is one; `apply` takes and gives the rest


@flax.struct.dataclass
class Totals:
    """What the micro-batches of an optimizer step add up to."""

    grads: llama.Params  # float32
    sums: dict[str, jax.Array]  # float32 scalars, by the names in SUMS
    maxima: dict[str, jax.Array]  # float32 scalars, by the names in MAXIMA


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def policy_logprobs(
    params: llama.Params,
    batch: Batch,
    frozen: llama.Params | None = None,
    *,
    config: llama.LlamaConfig,
    settings: LearnerSettings,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy of a batch's sampled tokens, [B, T] float32 each; see `losses.token_logprobs`.

    Args:
        params: what learns; or, without `frozen`, all parameters.
        frozen: the rest.
    """
    params = lora.whole(params, frozen, settings.trainable)
    params = llama.cast_outer_params(params, jnp.dtype(settings.compute_dtype))
    attend = batch.attend(config.sliding_window)
    x_btd, _ = llama.forward(params, config, batch.token_bt, batch.position_bt, attend, remat=settings.remat)
    return losses.token_logprobs(params, config, x_btd, batch.token_bt, batch.temperature_bt, batch.loss_mask_bt)


CPU_OPTIONS = {
    # The library that XLA would give attention's products to computes each of them on one core.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    # The pass that would sum bfloat16 over devices in float32 ends the process: "Invalid binary instruction opcode".
    "xla_disable_hlo_passes": "all-reduce-promotion",
}


@functools.partial(
    compiler.PlatformJit,
    cpu_options=CPU_OPTIONS,
    static_argnames=("config", "settings", "mesh"),
    donate_argnames="totals",
)
def accumulate(
    totals: Totals,
    params: llama.Params,
    reference: llama.Params | None,
    batch: Batch,
    divisor: jax.Array,
    frozen: llama.Params | None = None,
    *,
    config: llama.LlamaConfig,
    settings: LearnerSettings,
    mesh: jax.sharding.Mesh | None = None,
) -> Totals:
    """Adds a micro-batch's gradient and metric sums to the totals, which are donated.

    Args:
        totals: of the optimizer step so far.
        params: float32 masters of what learns.
        reference: all parameters, in the compute dtype; None without a KL term, or where the batch has its log-probs.
        batch: [B, T] each; without `old_logprob_bt` the policy that sampled is taken to be `params`.
        divisor: float32 scalar, of the whole optimizer step, see `losses.divisor`.
        frozen: the parameters that do not learn, in the compute dtype; None where all do.
    """
    reference_logprob_bt = batch.reference_logprob_bt
    if reference is not None and not settings.kl_in_reward:
        with jax.named_scope("reference"):
            reference_logprob_bt, _ = policy_logprobs(reference, batch, config=config, settings=settings)

    def loss(params: llama.Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        logprob_bt, entropy_bt = policy_logprobs(params, batch, frozen, config=config, settings=settings)
        old_bt = jax.lax.stop_gradient(logprob_bt) if batch.old_logprob_bt is None else batch.old_logprob_bt
        loss, scalars = losses.grpo_loss(
            logprob_bt,
            old_bt,
            reference_logprob_bt,
            entropy_bt,
            batch.advantage_bt,
            batch.loss_mask_bt,
            divisor,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            kl_coef=settings.kl_coef,
            entropy_coef=settings.entropy_coef,
            loss_mode=settings.loss_mode,
            dual_clip=settings.dual_clip,
            kl_estimator=settings.kl_estimator,
            segment_bt=batch.segment_bt,
            weight_bt=batch.weight_bt,
            share_bt=batch.share_bt if settings.loss_aggregation == "seq-mean-token-mean" else None,
        )
        compared_bt = batch.loss_mask_bt & batch.on_policy_bt
        diff_bt = jnp.where(compared_bt, jnp.abs(old_bt - batch.sampler_logprob_bt), 0.0)
        scalars |= {"logprob_diff": jnp.sum(diff_bt), "logprob_diff_max": jnp.max(diff_bt)}
        return loss, scalars | {"on_policy": jnp.sum(compared_bt, dtype=jnp.float32)}

    value, backward, scalars = jax.vjp(loss, params, has_aux=True)
    grads = add_gradient(totals.grads, backward, value, in_place=frozen is None)
    if mesh is not None:
        grads = jax.lax.with_sharding_constraint(grads, trained_shardings(config, settings, mesh))
    return Totals(
        grads=grads,
        sums={name: total + scalars.get(name, 0.0) for name, total in totals.sums.items()},
        maxima={name: jnp.maximum(largest, scalars[name]) for name, largest in totals.maxima.items()},
    )


def add_gradient(totals: Any, backward: Callable, value: jax.Array, *, in_place: bool) -> Any:
    """The totals and what `backward`, of `jax.vjp`, finds as the gradient of the scalar `value`.

    In place each layer's gradient is added where its total is, and is nowhere else. That cannot be where some of a
    layer's parameters do not learn: between those that the scan over layers takes as they are and others, JAX 0.10
    mixes up.
    """
    if not in_place:
        return jax.tree.map(jnp.add, totals, *backward(jnp.ones_like(value)))
    refs = jax.tree.map(jax.new_ref, totals)
    backward.with_refs(refs)(jnp.ones_like(value))
    return jax.tree.map(jax.freeze, refs)


@functools.partial(jax.jit, static_argnames=("config", "settings", "mesh"), donate_argnames="state")
def apply(
    state: TrainState,
    totals: Totals,
    num_tokens: jax.Array,
    *,
    config: llama.LlamaConfig,
    settings: LearnerSettings,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, and its metrics as float32 scalars. `state` is donated.

    A gradient that is not finite changes nothing but the "skipped" metric.
    """
    grad_norm = optax.tree.norm(totals.grads)
    updates, opt_state = make_optimizer(settings).update(totals.grads, state.opt_state, state.params)
    stepped = TrainState(params=optax.apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1)
    finite = jnp.isfinite(grad_norm)
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    if mesh is not None:
        new_state = jax.lax.with_sharding_constraint(new_state, state_shardings(config, settings, mesh))
    return new_state, {
        **totals.sums,
        **totals.maxima,
        "num_tokens": num_tokens,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate(settings)(state.step),
        "skipped": 1.0 - finite,
    }


def make_optimizer(settings: LearnerSettings) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) behind clipping by global norm."""
    adamw = optax.adamw(
        learning_rate(settings),
        b1=settings.adam_b1,
        b2=settings.adam_b2,
        weight_decay=settings.weight_decay,
        mask=lambda params: jax.tree.map_with_path(_is_decayed, params),
    )
    if settings.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


def learning_rate(settings: LearnerSettings) -> optax.Schedule:
    """Linear warm-up whose first step already moves and whose last is at the peak, then `lr_schedule` from there on.

    A function of the optimizer steps taken, which checkpoints hold, and of nothing else.
    """
    peak, rise = settings.learning_rate, max(0, settings.warmup_steps - 1)
    if settings.lr_schedule == "cosine":  # SGDR, arXiv:1608.03983, eq. 5, once and without restarts
        after = optax.cosine_decay_schedule(peak, settings.decay_steps - rise, alpha=settings.lr_min_ratio)
    elif settings.lr_schedule == "linear":
        end = peak * settings.lr_min_ratio
        falling = optax.linear_schedule(peak, end, settings.decay_steps - rise)

        def after(step: jax.Array) -> jax.Array:
            return jnp.maximum(falling(step), end)  # in float32 it falls a little below, also below 0
    else:
        after = optax.constant_schedule(peak)
    if not rise:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / settings.warmup_steps, peak, rise), after], [rise])


def _is_decayed(path: tuple, _: Any) -> bool:
    """Whether weight decay pulls at a parameter: norms and biases are left alone."""
    return "norm" not in path[-1].key and "bias" not in path[-1].key


def init_state(settings: LearnerSettings, params: llama.Params) -> TrainState:
    return TrainState(params=params, opt_state=make_optimizer(settings).init(params), step=jnp.zeros((), jnp.int32))


def zero_totals(params: llama.Params) -> Totals:
    return Totals(
        grads=jax.tree.map(jnp.zeros_like, params),
        sums={name: jnp.zeros(()) for name in SUMS},
        maxima={name: jnp.zeros(()) for name in MAXIMA},
    )


def param_shardings(config: llama.LlamaConfig, mesh: jax.sharding.Mesh) -> Any:
    return mesh_lib.shardings(mesh, llama.abstract_params(config))


def trained_shardings(config: llama.LlamaConfig, settings: LearnerSettings, mesh: jax.sharding.Mesh) -> Any:
    """Of what learns."""
    return mesh_lib.shardings(mesh, lora.trained_specs(config, settings.trainable))


def state_shardings(config: llama.LlamaConfig, settings: LearnerSettings, mesh: jax.sharding.Mesh) -> TrainState:
    """Optimizer moments live where their parameters do; counters everywhere."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    specs = lora.trained_specs(config, settings.trainable)
    params = jax.eval_shape(functools.partial(llama.init_specs, specs), jax.random.key(0))
    state = jax.eval_shape(functools.partial(init_state, settings), params)
    shardings = trained_shardings(config, settings, mesh)
    opt_state = optax.tree_map_params(
        make_optimizer(settings), lambda _, s: s, state.opt_state, shardings, transform_non_params=lambda _: whole
    )
    return TrainState(params=shardings, opt_state=opt_state, step=whole)
