"""Where arrays live: the mesh's axes, and which of them each logical axis of an array is split over.

    data     whole copies of the model, each with its part of the batch
    fsdp     the batch is split here too, and so are the parameters, which are gathered layer by layer
    tensor   heads, feed-forward columns and vocabulary

Arrays name logical axes (`batch`, `embed`, `kv_heads`, ...); `RULES` is the only place that knows the mesh's.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from agent_lightning.exceptions import InvalidConfigError

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


class HasAxes(Protocol):
    """What `shardings` needs to know of an array; `model.llama.ParamSpec` is one."""

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]


def axis_sizes(
    num_devices: int, *, tensor: int, fsdp: int, width: int, kv_heads: int, mlp: int
) -> tuple[int, int, int]:
    """How many devices each axis of `AXES` has, so that all of them are used.

    Args:
        num_devices: of all processes.
        tensor: `model.tensor_parallel`.
        fsdp: `model.fsdp`; -1 for as many as `tensor` leaves and the model's width can be divided over. What is left
            after both holds copies (`data`).
        width, kv_heads, mlp: the model's sizes that are divided: hidden size, KV heads, feed-forward columns.

    Raises:
        InvalidConfigError: the devices or the model's sizes do not divide; names values that do.
    """
    heads = math.gcd(kv_heads, mlp)
    if num_devices % tensor or heads % tensor:
        fitting = [n for n in range(1, num_devices + 1) if num_devices % n == 0 and heads % n == 0]
        raise InvalidConfigError(
            f"model.tensor_parallel {tensor} does not divide what it is to: there are {num_devices} devices, and the "
            f"model has {kv_heads} key/value heads and {mlp} feed-forward columns",
            hint=f"set it to {' or '.join(map(str, fitting))}; model.fsdp can use the other devices",
        )
    rest = num_devices // tensor
    if fsdp == -1:
        fsdp = math.gcd(rest, width)
    if rest % fsdp or width % fsdp:
        fitting = [n for n in range(1, rest + 1) if rest % n == 0 and width % n == 0]
        raise InvalidConfigError(
            f"model.fsdp {fsdp} does not divide what it is to: there are {rest} devices for each part of "
            f"model.tensor_parallel {tensor}, and the model is {width} wide",
            hint=f"set it to {' or '.join(map(str, fitting))}, or to -1, which chooses",
        )
    return rest // fsdp, fsdp, tensor


def sizes_for(model: Any, settings: ml_collections.ConfigDict, num_devices: int) -> tuple[int, int, int]:
    """`axis_sizes` for a model (a `model.llama.LlamaConfig`) and the settings of `config.py`."""
    return axis_sizes(
        num_devices,
        tensor=settings.model.tensor_parallel,
        fsdp=settings.model.fsdp,
        width=model.hidden_size,
        kv_heads=model.num_kv_heads,
        mlp=model.intermediate_size,
    )


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first `data * fsdp * tensor` devices; `jax.set_mesh` makes it current.

    Raises:
        InvalidConfigError: there are fewer devices than that.
    """
    count, devices = data * fsdp * tensor, jax.devices()
    if count > len(devices):
        raise InvalidConfigError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} needs {count} devices; there are {len(devices)}",
            hint="lower model.tensor_parallel or model.fsdp, or start with more devices",
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def current(mesh: jax.sharding.Mesh | None) -> Any:
    """A context in which `mesh` is the one that `constrain` means; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform() -> str:
    """What programs are made for, "cpu", "gpu" or "tpu": the current mesh's devices, else JAX's default ones.

    A mesh of described devices is one too, so that programs for them can be compiled where there are none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def partition_spec(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]
) -> PartitionSpec:
    """Mesh axes of an array with these logical axes; an axis that does not divide evenly stays whole."""
    entries = []
    for size, name in zip(shape, logical_axes, strict=True):
        axes = RULES[name] if name is not None else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        ways = 1
        for axis in axes:
            ways *= mesh.shape[axis]
        entries.append(axes if axes and size % ways == 0 else None)
    return PartitionSpec(*entries)


def shardings(mesh: jax.sharding.Mesh, abstract_tree: Any) -> Any:
    """The tree of `NamedSharding` for a tree of `HasAxes` (as `model.llama.abstract_params` makes)."""

    def sharding(leaf: HasAxes) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(mesh, leaf.shape, leaf.logical_axes))

    return jax.tree.map(sharding, abstract_tree)


def put(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Host arrays, the same in every process, to where they belong."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def parts(x: np.ndarray) -> jax.Array:  # device_put would compare the processes' arrays first
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    return jax.tree.map(parts, tree)


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole in every process, however they are spread; all processes must call it."""

    def whole(x: jax.Array) -> jax.Array:
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        return jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)

    return jax.device_get(jax.tree.map(whole, tree))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Inside jit under `jax.set_mesh`: keeps `x` split along these axes. Without a mesh: `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, x.shape, logical_axes))


def axes_of(size: int, logical_axis: str) -> Any:
    """The current mesh's axes that an array's axis of this size is split over; None for none. An entry of a spec."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else partition_spec(mesh, (size,), (logical_axis,))[0]


def on_each_device(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """Inside jit under `jax.set_mesh`: `function` of each device's own parts, for kernels that XLA cannot divide.

    Without a mesh: `function` itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_own_rows(function: Callable, weights: Any, *arrays: jax.Array) -> Any:
    """Inside jit under `jax.set_mesh`: `function(weights, *arrays)` of each device's own rows of the batch.

    Weights are gathered from `data` and `fsdp` once, and their gradients, which a loop in `function` may add up, are
    summed over devices once, after it. `tensor` is left to the compiler. Where rows are not divided: `function` itself.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    divided = tuple(axis for axis in axes_of(len(arrays[0]), "batch") or () if sizes[axis] > 1)
    if not divided:
        return function(weights, *arrays)
    in_specs = (PartitionSpec(), *(PartitionSpec(divided) for _ in arrays))
    of_rows = jax.shard_map(
        function, in_specs=in_specs, out_specs=PartitionSpec(divided), axis_names=set(divided), check_vma=False
    )
    # Copies, which XLA does not make: JAX 0.12 adds no gradient of what is not divided to a `Ref` (`add_gradient`).
    return of_rows(jax.tree.map(jnp.copy, weights), *arrays)
