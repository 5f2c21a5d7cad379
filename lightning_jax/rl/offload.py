"""What waits in the host's memory while no pass needs it (`runtime.offload`).

JAX's memories hold it: an array there has its sharding, with the memory kind `pinned_host`. It is copied whole to the
device for the pass that needs it, and the pass computes what it would have computed without.
"""

from typing import Any

import jax

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.rl.update import LearnerSettings

_PARTS = {"none": (), "reference": ("reference",), "optimizer": ("optimizer",), "both": ("reference", "optimizer")}
CHOICES = tuple(_PARTS)
_HOST = "pinned_host"


def parts(settings: LearnerSettings) -> tuple[str, ...]:
    """What of "reference" and "optimizer" waits there; the reference of adapters does not, being the frozen model."""
    has_own_reference = settings.kl_coef and not settings.trainable.lora_rank
    return tuple(part for part in _PARTS[settings.offload] if part != "reference" or has_own_reference)


def to_host(tree: Any) -> Any:
    """A copy of arrays in the memory of their devices' hosts; the copies on the devices go when nobody holds them.

    Raises:
        InvalidConfigError: the devices have no such memory.
    """
    device = jax.local_devices()[0]
    if _HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise InvalidConfigError(
            f"runtime.offload needs memory of the host that {device.device_kind} can copy from, and JAX gives it none",
            hint="set runtime.offload to 'none'",
        )
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(_HOST)), tree)


def to_device(tree: Any) -> Any:
    """A copy of arrays in their devices' own memory, spread over them as before."""
    kind = jax.local_devices()[0].default_memory().kind
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)
