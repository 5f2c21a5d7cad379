"""The GPU that programs are made for: what it can, and its compiler, which needs none.

XLA compiles for GPUs that are only described, on any x86 or ARM Linux machine with JAX's CUDA packages (the extras
`cuda12` and `cuda13`). The result can be read, not run.
"""

import importlib.util
import os
import re
from typing import Any

import jax

from agent_lightning.exceptions import InvalidConfigError

# What XLA asks a GPU for, an H100 SXM: its properties by CUDA's names, and the versions that the packages have.
_H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"  device_vendor: "NVIDIA Corporation"  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 }
  device_address_bits: 64  device_memory_size: 84942979072  ecc_enabled: true
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  pcie_bandwidth: 34359738368
  clock_rate_ghz: 1.98  core_count: 132  fpus_per_core: 128
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  driver_version: "12.9.0"  runtime_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compute_capability() -> float:
    """Of the NVIDIA GPU, such as 9.0 for an H100, which one that is only described is taken to be; else 0."""
    if jax.default_backend() != "gpu":
        return 9.0  # as Pallas does where there is none
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0


def has_cudnn() -> bool:
    """Whether programs can call its attention: on a GPU, and for one that is described where it is installed."""
    return jax.default_backend() == "gpu" or (has_compiler() and _is_installed("nvidia.cudnn"))


def has_compiler() -> bool:
    """Whether JAX's CUDA packages are installed."""
    return any(_is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def described_devices(kind: str, count: int) -> list[Any]:
    """GPUs to compile for, that need not be there. JAX must not have looked for devices yet.

    Raises:
        InvalidConfigError: the kind is not "h100", or the compiler is not there.
    """
    from jax.experimental import topologies

    if kind != "h100":
        raise InvalidConfigError(f"GPUs of the kind {kind!r} are not described", hint="such as h100:1, h100:8")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which asks the driver
    try:
        return list(
            topologies.get_topology_desc(kind, platform="cuda", target_config=_H100, topology=f"1x1x{count}").devices
        )
    except NotImplementedError as error:
        raise InvalidConfigError(
            f"the GPU compiler could not be loaded: {error}", hint="pip install 'lightning-jax[cuda12]'"
        ) from error


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what it is in
        return False
