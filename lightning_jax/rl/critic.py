"""The critic: what a state is worth, by a head of one number a position.

`copy`: the head stands on a trunk of the critic's own, which begins as a copy of what learns of the initial policy and
learns with the head; what does not learn (`model/lora.py`) it has in common with the policy. `shared`: it stands on the
policy's trunk, and only reads it: no gradient of the value loss reaches the policy, and the critic's memory is next to
nothing.

A value, like a log-prob, is about the token at its own position: `value_bt[b, t]` is the value of the state in which
token t was sampled, and is made of the hidden state before it; at a row's first token it has no meaning. The head
begins at zero, so that the first values are 0 whatever the model is.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lightning_jax import mesh as mesh_lib
from lightning_jax.model import llama, lora
from lightning_jax.rl import update
from lightning_jax.rl.packing import Batch
from lightning_jax.rl.update import LearnerSettings

KINDS = ("copy", "shared")


def settings_of(algorithm: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings `algorithm.*` say, as parts of `LearnerSettings`; what is left out is as in the reference."""
    if algorithm["name"] != "ppo":
        return {}
    default = {"critic": "copy", "critic_lr": 1e-5, "critic_warmup": 0, "value_clip": 0.2}
    return {name: value if algorithm[name] is None else algorithm[name] for name, value in default.items()}


@flax.struct.dataclass
class CriticState:
    """Everything that an update of the critic changes."""

    params: dict[str, Any]  # float32: "head_d" [D], and in a copy "trunk", what learns of it (`TrainState.params`)
    opt_state: optax.OptState
    step: jax.Array  # int32, optimizer steps taken
    updates: jax.Array  # int32, calls of `Learner.update` that it has learned from


@flax.struct.dataclass
class CriticTotals:
    """What the micro-batches of an optimizer step add up to."""

    grads: dict[str, Any]  # float32
    loss: jax.Array  # float32 scalar
    clipped: jax.Array  # float32 scalar, tokens whose value the bound holds back


def value_loss(
    value_bt: jax.Array,
    old_value_bt: jax.Array,
    target_bt: jax.Array,
    loss_mask_bt: jax.Array,
    num_tokens: jax.Array,
    *,
    value_clip: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Half the squared error, where a value that strayed from the old one does not gain by it (OpenAI's PPO2; verl).

        1/2 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)

    Args:
        value_bt: [B, T] float32, of the critic that learns.
        old_value_bt: [B, T] float32, that the advantages were estimated with.
        target_bt: [B, T] float32, the returns.
        loss_mask_bt: [B, T] bool; other positions have no part in anything.
        num_tokens: float32 scalar, masked tokens of the whole optimizer step.
        value_clip: c, in units of reward; None for the plain squared error.

    Returns:
        The loss, and the number of masked tokens where the bound holds; float32 scalars.
    """
    value_bt, old_value_bt, target_bt = (jnp.where(loss_mask_bt, x, 0.0) for x in (value_bt, old_value_bt, target_bt))
    error_bt = (value_bt - target_bt) ** 2
    clipped_bt = jnp.zeros_like(loss_mask_bt)
    if value_clip is not None:
        near_bt = jnp.clip(value_bt, old_value_bt - value_clip, old_value_bt + value_clip)
        near_error_bt = (near_bt - target_bt) ** 2
        clipped_bt = (near_error_bt > error_bt) & loss_mask_bt
        error_bt = jnp.maximum(error_bt, near_error_bt)
    return 0.5 * jnp.sum(error_bt) / num_tokens, jnp.sum(clipped_bt, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def token_values(
    params: dict[str, Any],
    policy: llama.Params,
    batch: Batch,
    frozen: llama.Params | None = None,
    *,
    config: llama.LlamaConfig,
    settings: LearnerSettings,
) -> jax.Array:
    """The value of the state in which each token of a batch was sampled, [B, T] float32.

    Args:
        params: of `CriticState`.
        policy: `TrainState.params`, whose trunk is read where the critic has none of its own.
        frozen: the parameters that do not learn, in the compute dtype; None where all do.
    """
    trunk = params["trunk"] if "trunk" in params else jax.lax.stop_gradient(policy)
    trunk = lora.whole(trunk, frozen, settings.trainable)
    trunk = llama.cast_outer_params(trunk, jnp.dtype(settings.compute_dtype))
    attend = batch.attend(config.sliding_window)
    x_btd, _ = llama.forward(trunk, config, batch.token_bt, batch.position_bt, attend, remat=settings.remat)
    with jax.named_scope("value_head"):
        value_bt = jnp.einsum("btd,d->bt", x_btd.astype(jnp.float32), params["head_d"])
        return jnp.roll(value_bt, 1, axis=1).at[:, 0].set(0.0)


@functools.partial(jax.jit, static_argnames=("config", "settings", "mesh"), donate_argnames="totals")
def accumulate(
    totals: CriticTotals,
    params: dict[str, Any],
    policy: llama.Params,
    batch: Batch,
    num_tokens: jax.Array,
    frozen: llama.Params | None = None,
    *,
    config: llama.LlamaConfig,
    settings: LearnerSettings,
    mesh: jax.sharding.Mesh | None = None,
) -> CriticTotals:
    """Adds a micro-batch's gradient and metric sums to the totals, which are donated; as `update.accumulate`."""

    def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        return value_loss(
            token_values(params, policy, batch, frozen, config=config, settings=settings),
            batch.value_bt,
            batch.value_target_bt,
            batch.loss_mask_bt,
            num_tokens,
            value_clip=settings.value_clip,
        )

    value, backward, clipped = jax.vjp(loss, params, has_aux=True)
    grads = update.add_gradient(totals.grads, backward, value, in_place=frozen is None)
    if mesh is not None:
        grads = jax.lax.with_sharding_constraint(grads, param_shardings(config, settings, mesh))
    return CriticTotals(grads=grads, loss=totals.loss + value, clipped=totals.clipped + clipped)


@functools.partial(jax.jit, static_argnames=("config", "settings", "mesh"), donate_argnames="state")
def apply(
    state: CriticState,
    totals: CriticTotals,
    num_tokens: jax.Array,
    *,
    config: llama.LlamaConfig,
    settings: LearnerSettings,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[CriticState, dict[str, jax.Array]]:
    """One optimizer step, and its metrics as float32 scalars. `state` is donated.

    A gradient that is not finite changes nothing but the "skipped" metric.
    """
    grad_norm = optax.tree.norm(totals.grads)
    updates, opt_state = make_optimizer(settings).update(totals.grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    stepped = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
    finite = jnp.isfinite(grad_norm)
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    if mesh is not None:
        new_state = jax.lax.with_sharding_constraint(new_state, state_shardings(config, settings, mesh))
    return new_state, {
        "loss": totals.loss,
        "clipped": totals.clipped,
        "num_tokens": num_tokens,
        "grad_norm": grad_norm,
        "learning_rate": update.learning_rate(with_own_rate(settings))(state.step),
        "skipped": 1.0 - finite,
    }


def make_optimizer(settings: LearnerSettings) -> optax.GradientTransformation:
    """The policy's, with a learning rate of its own, on a schedule that begins with the critic's first update."""
    return update.make_optimizer(with_own_rate(settings))


def with_own_rate(settings: LearnerSettings) -> LearnerSettings:
    """The settings that the critic's optimizer is made of; it comes down when the policy does, which began later."""
    alone = settings.critic_warmup * settings.epochs * settings.optimizer_steps
    return dataclasses.replace(settings, learning_rate=settings.critic_lr, decay_steps=settings.decay_steps + alone)


def create(
    config: llama.LlamaConfig, settings: LearnerSettings, policy: llama.Params, mesh: jax.sharding.Mesh | None
) -> CriticState:
    """A new critic where its arrays belong, beside the initial policy (`TrainState.params`), which it copies."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:
        sharding = state_shardings(config, settings, mesh)
    if settings.critic == "copy":
        policy = jax.tree.map(jnp.copy, policy)  # updates donate both
    return jax.jit(functools.partial(init_state, settings, config), out_shardings=sharding)(policy)


def abstract_params(config: llama.LlamaConfig, settings: LearnerSettings) -> dict[str, Any]:
    """The tree of `llama.ParamSpec` that a critic of this kind has."""
    head = {"head_d": llama.ParamSpec((config.hidden_size,), ("embed",), jax.nn.initializers.zeros)}
    if settings.critic == "shared":
        return head
    return head | {"trunk": _without_unembedding(lora.trained_specs(config, settings.trainable))}


def init_state(settings: LearnerSettings, config: llama.LlamaConfig, policy: llama.Params) -> CriticState:
    """A critic that has learned nothing; `policy` is the initial `TrainState.params`."""
    params = {"head_d": jnp.zeros(config.hidden_size, jnp.float32)}
    if settings.critic == "copy":
        params["trunk"] = _without_unembedding(policy)
    count = jnp.zeros((), jnp.int32)
    return CriticState(params, make_optimizer(settings).init(params), count, count)


def zero_totals(params: dict[str, Any]) -> CriticTotals:
    return CriticTotals(jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()))


def param_shardings(config: llama.LlamaConfig, settings: LearnerSettings, mesh: jax.sharding.Mesh) -> Any:
    return mesh_lib.shardings(mesh, abstract_params(config, settings))


def state_shardings(config: llama.LlamaConfig, settings: LearnerSettings, mesh: jax.sharding.Mesh) -> CriticState:
    """As `update.state_shardings`."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    specs = lora.trained_specs(config, settings.trainable)
    policy = jax.eval_shape(functools.partial(llama.init_specs, specs), jax.random.key(0))
    state = jax.eval_shape(functools.partial(init_state, settings, config), policy)
    shardings = param_shardings(config, settings, mesh)
    opt_state = optax.tree_map_params(
        make_optimizer(settings), lambda _, s: s, state.opt_state, shardings, transform_non_params=lambda _: whole
    )
    return CriticState(shardings, opt_state, whole, whole)


def _without_unembedding(params: Any) -> Any:
    """What hidden states are made with; an embedding to which the unembedding is tied reads tokens as well."""
    return {name: leaf for name, leaf in params.items() if name != "unembed_dv"}
