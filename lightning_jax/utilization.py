"""How much of the device a step used: its arithmetic, its memory bandwidth, its memory.

The shares are of the limits in `LIMITS`, which are the vendors' figures. Of a device that is not in the table, of CPUs
in particular, nothing is said: a made-up limit would make a made-up share.
"""

import dataclasses
import resource
import sys
from collections.abc import Mapping

import jax
import numpy as np

from lightning_jax.model import llama
from lightning_jax.model.config import LlamaConfig

# JAX's device_kind, in lower case, begins with -> (dense bfloat16 FLOP/s, bytes/s of its memory); the longest wins.
# Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture"; NVIDIA's figures, as
# pages that quote its data sheets have them: bfloat16 with sparsity is twice the dense rate.
LIMITS = {
    "tpu v4": (275e12, 1200e9),
    "tpu v5 lite": (197e12, 819e9),
    "tpu v5e": (197e12, 819e9),
    "tpu v5": (459e12, 2765e9),
    "tpu v6 lite": (918e12, 1638e9),
    "tpu v6e": (918e12, 1638e9),
    "nvidia a100-sxm4-40gb": (312e12, 1555e9),
    "nvidia a100-sxm4-80gb": (312e12, 2039e9),
    "nvidia a100 80gb pcie": (312e12, 1935e9),
    "nvidia h100 80gb hbm3": (989e12, 3350e9),
    "nvidia h100 pcie": (756e12, 2000e9),
    "nvidia h200": (989e12, 4800e9),
    "nvidia l4": (121e12, 300e9),
    "nvidia l40s": (362e12, 864e9),
}


def limits() -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of one of this process's devices, or None where they are not known."""
    kind = jax.local_devices()[0].device_kind.lower()
    known = [name for name in LIMITS if kind == name or kind.startswith(name + " ")]
    return LIMITS[max(known, key=len)] if known else None


def num_params(config: LlamaConfig) -> int:
    """Parameters that a token is multiplied with: the embedding table counts once, where the head is."""
    params = llama.abstract_params(config)
    sizes = [int(np.prod(spec.shape)) for spec in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "shape"))]
    return sum(sizes) - (0 if config.tie_embeddings else config.vocab_size * config.hidden_size)


def update_flops(
    config: LlamaConfig,
    tokens: int,
    *,
    has_reference: bool,
    only_adapters: bool,
    epochs: int = 1,
    policy_learns: bool = True,
    critic: str | None = None,
    forwards: int = 0,
) -> float:
    """Of an update over `tokens`: 2 a parameter forward, 2 for activations backward, 2 for the weights that learn.

    As often again for a critic that is a "copy", 2 for the trunk that it has "shared", and 2 for a reference in the
    loss, all of it `epochs` times; and 2 for each of `forwards`, which say something of the tokens before. What is
    computed anew (`runtime.remat`) is no progress and does not count; attention's own products are left out too
    (arXiv:2204.02311, appendix B, without its last term).
    """
    learning = 4 + 2 * (not only_adapters)
    of_critic = {None: 0, "copy": learning, "shared": 2}[critic]
    epoch = policy_learns * (learning + 2 * has_reference) + of_critic
    return (epochs * epoch + 2 * forwards) * num_params(config) * tokens


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """A model on its devices.

    Attributes:
        itemsize: bytes of a parameter in the sampler.
        num_devices: over which it is spread.
    """

    config: LlamaConfig
    itemsize: int
    num_devices: int

    def metrics(self, spent: Mapping[str, float], flops: float, sample_s: float, train_s: float) -> dict[str, float]:
        """Shares of arithmetic and bandwidth; nothing for a device whose limits are not known.

        Args:
            spent: by how much the sampler's counters rose in the step.
            flops: of the update, see `update_flops`.
            sample_s, train_s: seconds that sampling and the update took.
        """
        if (known := limits()) is None:
            return {}
        flops_per_s, bytes_per_s = (limit * self.num_devices for limit in known)
        read_bytes = spent["sampler/decode_steps"] * num_params(self.config) * self.itemsize
        return {
            "train/mfu": flops / (train_s * flops_per_s),
            "sampler/bandwidth_fraction": read_bytes / (sample_s * bytes_per_s),
        }


def cache_metrics(spent: Mapping[str, float]) -> dict[str, float]:
    """How much of the step's prompts was in the KV cache, from the rise of the sampler's counters."""
    prompt_tokens = spent["sampler/cached_tokens"] + spent["sampler/prefill_tokens"]
    return {"sampler/cache_hit_fraction": spent["sampler/cached_tokens"] / prompt_tokens if prompt_tokens else 0.0}


def memory_metrics() -> dict[str, float]:
    """The most memory that the process has held so far: of its first device where JAX tells, and of the host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"memory/host_peak_bytes": peak} | ({} if device is None else {"memory/device_peak_bytes": device})
