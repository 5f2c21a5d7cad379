"""The learner's and the sampler's programs compiled from shapes alone, for devices that need not be there.

`described_mesh` makes a mesh of TPU chips or GPUs that are only described; their compilers run on any x86 machine.
`compile_learner` and `compile_decode` lower what `rl.learner` and `sampler.executor` run, with the same shardings.
"""

import dataclasses
import functools
import math
import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import gpu, hlo_costs
from lightning_jax import mesh as mesh_lib
from lightning_jax.model import llama, lora
from lightning_jax.rl import critic, offload, packing, update
from lightning_jax.sampler import kv_cache, programs


@dataclasses.dataclass(frozen=True)
class SamplerShapes:
    """What decoding is compiled for.

    Attributes:
        rows: sequences that are decoded together.
        length: positions that each one's page table covers.
        num_pages, page_size: of the KV cache.
        steps: tokens per dispatch.
        dtype: of weights and pages.
    """

    rows: int
    length: int
    num_pages: int
    page_size: int
    steps: int
    dtype: str


def described_mesh(topology: str, *, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """A mesh of a TPU topology's chips, such as "v5e:4x4", or of GPUs, "h100:8"; to compile programs for, not to run.

    Raises:
        InvalidConfigError: there is no such compiler, it does not know the topology, or the chips are fewer.
    """
    kind, _, size = topology.partition(":")
    devices = _described_chips(topology) if kind.startswith("v") else gpu.described_devices(kind, int(size or 1))
    count = data * fsdp * tensor
    if count > len(devices):
        raise InvalidConfigError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {count} chips; {topology} has {len(devices)}"
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(mesh_lib.AXES)
    return jax.make_mesh((data, fsdp, tensor), mesh_lib.AXES, axis_types=axis_types, devices=devices[:count])


def _described_chips(topology: str) -> list[Any]:
    """The chips of a TPU topology, in JAX's experimental interface, which only this function and `gpu` use."""
    from jax.experimental import topologies

    # Else libtpu asks the cloud's metadata server which machine this is, and wants to be the only one of it.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings(action="ignore"):
            return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "libtpu" not in str(error):
            raise InvalidConfigError(
                f"the TPU compiler knows no topology {topology!r}: {error}", hint="such as v5e:4x4, v6e:2x2, v5p:2x2x1"
            ) from error
        raise InvalidConfigError(
            f"the TPU compiler could not be loaded: {error}",
            hint="pip install the release of libtpu that jax[tpu] names (for JAX 0.10.2: libtpu==0.0.42.*)",
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------------------------


def compile_learner(
    config: llama.LlamaConfig,
    settings: update.LearnerSettings,
    mesh: jax.sharding.Mesh,
    *,
    blocks: int,
    length: int,
) -> dict[str, Any]:
    """`update.accumulate` for a micro-batch of [blocks, length] tokens, and `update.apply`, compiled; a critic's too.

    Returns:
        `jax.stages.Compiled` by the programs' names.
    """
    state = abstract_state(config, settings, mesh)
    totals = _abstract_totals(state.params, mesh)
    batch_spec = mesh_lib.partition_spec(mesh, (blocks, length), ("batch", None))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((blocks, length), x.dtype, sharding=NamedSharding(mesh, batch_spec)),
        packing.empty_blocks(1, 1),
    )
    whole = abstract_params(config, mesh, settings.compute_dtype)
    frozen = lora.split(whole, settings.trainable)[1]
    frozen = frozen if jax.tree.leaves(frozen) else None
    reference = None
    if settings.kl_coef:
        reference = frozen if settings.trainable.lora_rank else whole
    if "reference" in offload.parts(settings):
        reference, batch = None, batch.replace(reference_logprob_bt=batch.advantage_bt)  # of that shape
    if settings.critic:
        batch = batch.replace(value_bt=batch.advantage_bt, value_target_bt=batch.advantage_bt)
    num_tokens = _whole(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    statics = {"config": config, "settings": settings, "mesh": mesh}
    with jax.set_mesh(mesh):
        lowered = {
            "accumulate": update.accumulate.lower(
                totals, state.params, reference, batch, num_tokens, frozen, **statics
            ),
            "apply": update.apply.lower(state, totals, num_tokens, **statics),
        }
        if settings.critic:
            value, values = _abstract_critic(config, settings, state.params, mesh)
            lowered |= {
                "critic.accumulate": critic.accumulate.lower(
                    values, value.params, state.params, batch, num_tokens, frozen, **statics
                ),
                "critic.apply": critic.apply.lower(value, values, num_tokens, **statics),
            }
        return {name: program.compile() for name, program in lowered.items()}


def compile_decode(config: llama.LlamaConfig, shapes: SamplerShapes, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """`programs.decode` on pages, compiled; see `compile_learner`."""
    params = abstract_params(config, mesh, shapes.dtype)
    params |= {"layers": _unstacked(params["layers"], config.num_layers)}
    control = jax.ShapeDtypeStruct((shapes.rows, 2 + shapes.length // shapes.page_size), jnp.int32)
    host = (_whole(control, mesh), _whole(jax.ShapeDtypeStruct((), jnp.int32), mesh))
    with jax.set_mesh(mesh):
        pages = abstract_pages(config, shapes, mesh)
        state = jax.eval_shape(lambda: programs.init_state(shapes.rows))
        decode = programs.jitted().decode
        lowered = decode.lower(params, pages, None, _whole(state, mesh), *host, config=config, steps=shapes.steps)
        return {"decode": lowered.compile()}


# ---------------------------------------------------------------------------------------------------------------------
# Shapes with shardings
# ---------------------------------------------------------------------------------------------------------------------


def abstract_params(config: llama.LlamaConfig, mesh: jax.sharding.Mesh, dtype: str = "float32") -> llama.Params:
    """The stacked parameters' shapes and shardings."""
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding),
        llama.abstract_params(config),
        update.param_shardings(config, mesh),
    )


def abstract_state(
    config: llama.LlamaConfig, settings: update.LearnerSettings, mesh: jax.sharding.Mesh
) -> update.TrainState:
    """The learner's state: float32 masters, optimizer, counter."""
    trained = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), lora.trained_specs(config, settings.trainable)
    )
    state = jax.eval_shape(functools.partial(update.init_state, settings), trained)
    return _placed(state, update.state_shardings(config, settings, mesh))


def abstract_pages(config: llama.LlamaConfig, shapes: SamplerShapes, mesh: jax.sharding.Mesh) -> Any:
    """The KV cache, its heads split as `sampler.executor` does."""
    dtype = jnp.dtype(shapes.dtype)
    axes = (shapes.num_pages, shapes.page_size, config.num_kv_heads, config.head_dim), (None, None, "kv_heads", None)
    sharding = NamedSharding(mesh, mesh_lib.partition_spec(mesh, *axes))
    device = sharding if isinstance(mesh, jax.sharding.Mesh) else None  # of an abstract mesh nothing can be made
    pages = jax.eval_shape(lambda: kv_cache.init_pages(config, shapes.num_pages, shapes.page_size, dtype, device))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), pages)


def bytes_per_device(tree: Any) -> int:
    """Of arrays given as shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _abstract_totals(params: llama.Params, mesh: jax.sharding.Mesh) -> update.Totals:
    totals = jax.eval_shape(update.zero_totals, params)
    return update.Totals(params, _whole(totals.sums, mesh), _whole(totals.maxima, mesh))


def _abstract_critic(
    config: llama.LlamaConfig, settings: update.LearnerSettings, policy: llama.Params, mesh: jax.sharding.Mesh
) -> tuple[critic.CriticState, critic.CriticTotals]:
    state = jax.eval_shape(functools.partial(critic.init_state, settings, config), policy)
    state = _placed(state, critic.state_shardings(config, settings, mesh))
    scalar = _whole(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    return state, critic.CriticTotals(state.params, scalar, scalar)


def _unstacked(layers: dict[str, Any], num_layers: int) -> list[dict[str, Any]]:
    def layer(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    return [jax.tree.map(layer, layers) for _ in range(num_layers)]


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes with these shardings, a tree like theirs."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def _whole(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """On every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read from programs
# ---------------------------------------------------------------------------------------------------------------------


def kept_bytes(
    config: llama.LlamaConfig,
    settings: update.LearnerSettings,
    shapes: SamplerShapes,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> dict[str, int]:
    """Bytes on a device of what a job that trains keeps there, by kind."""
    state = abstract_state(config, settings, mesh)
    masters = bytes_per_device(state.params)
    whole = abstract_params(config, mesh, settings.compute_dtype)
    frozen = lora.split(whole, settings.trainable)[1]
    with jax.set_mesh(mesh) if isinstance(mesh, jax.sharding.Mesh) else jax.sharding.use_abstract_mesh(mesh):
        pages = abstract_pages(config, shapes, mesh)
    return {
        "learner's weights, float32": masters,
        "frozen weights": bytes_per_device(frozen),
        "optimizer": bytes_per_device(state.opt_state),
        "gradients": masters,
        "reference": bytes_per_device(whole) if settings.kl_coef and not settings.trainable.lora_rank else 0,
        "sampler's weights": bytes_per_device(abstract_params(config, mesh, shapes.dtype)),
        "KV pages": bytes_per_device(pages),
    }


def kernel_costs(
    config: llama.LlamaConfig, shapes: SamplerShapes, mesh: jax.sharding.Mesh, *, blocks: int, length: int
) -> dict[str, hlo_costs.Kernel]:
    """One call's cost, on a device, of the kernels that the programs use, of which the compiler knows nothing.

    Splash and cuDNN: half of a square of scores, two products forward and five backward (arXiv:2205.14135), each array
    read or written once. Paged attention: the pages are full, and all of them are read.
    """

    def local(size: int, axis: str) -> int:
        return NamedSharding(mesh, mesh_lib.partition_spec(mesh, (size,), (axis,))).shard_shape((size,))[0]

    kv_heads = local(config.num_kv_heads, "kv_heads")
    heads = kv_heads * (config.num_heads // config.num_kv_heads)
    rows = local(blocks, "batch")
    product = rows * heads * length * length * config.head_dim  # 2 FLOPs, of half the square
    token_bytes = 2 * (heads + kv_heads) * config.head_dim * jnp.dtype(shapes.dtype).itemsize
    arrays = rows * length * token_bytes
    kv_bytes = shapes.num_pages * shapes.page_size * 2 * kv_heads * config.head_dim * jnp.dtype(shapes.dtype).itemsize
    tokens = shapes.num_pages * shapes.page_size
    forward, backward = hlo_costs.Kernel(2 * product, arrays), hlo_costs.Kernel(5 * product, 2 * arrays)
    paged = hlo_costs.Kernel(4 * tokens * heads * config.head_dim, kv_bytes)
    return {
        "splash_mha_fwd": forward,
        "splash_mha_dkv": backward,
        "dot_product_attention_fwd": forward,
        "dot_product_attention_bwd": backward,
        "ragged_paged_attention": paged,
        "paged_attention": paged,
    }
