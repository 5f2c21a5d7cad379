"""How much of a device a step used, against figures from outside."""

import jax
import pytest

from lightning_jax import utilization
from lightning_jax.model import shapes


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_the_limits_are_those_of_the_very_device(monkeypatch, kind, flops):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    found = utilization.limits()
    assert (found and found[0]) == flops


@pytest.mark.parametrize(
    ("name", "published"),  # what the hub's pages count
    [("llama3.2-1b", 1_235_814_400), ("llama3.2-3b", 3_212_749_824), ("smollm2-135m", 134_515_008)],
)
def test_every_parameter_counts_once(name, published):
    assert utilization.num_params(shapes.SHAPES[name]) == published


def test_an_update_is_six_operations_a_parameter_and_token_and_less_with_adapters():
    tiny = shapes.SHAPES["tiny"]
    size = utilization.num_params(tiny)
    assert utilization.update_flops(tiny, 10, has_reference=False, only_adapters=False) == 60 * size
    assert utilization.update_flops(tiny, 10, has_reference=True, only_adapters=True) == 60 * size
    passes = {"epochs": 4, "critic": "copy", "forwards": 3}  # PPO: scored with a reference, and the critic's values
    assert utilization.update_flops(tiny, 10, has_reference=False, only_adapters=False, **passes) == 540 * size
    warmup = {"critic": "copy", "policy_learns": False, "forwards": 1}
    assert utilization.update_flops(tiny, 10, has_reference=True, only_adapters=False, **warmup) == 80 * size
    shared = {"epochs": 4, "critic": "shared", "forwards": 3}
    assert utilization.update_flops(tiny, 10, has_reference=True, only_adapters=False, **shared) == 460 * size


def test_shares_are_of_all_devices_and_of_the_steps_own_time(monkeypatch):
    """A 3B model on two H100s: 1.8e6 tokens in 10 s of 2 x 989 TFLOP/s, 1000 decode steps in 5 s of 6.7 TB/s."""
    monkeypatch.setattr(utilization, "limits", lambda: utilization.LIMITS["nvidia h100 80gb hbm3"])
    config = shapes.SHAPES["llama3.2-3b"]
    flops = utilization.update_flops(config, 1_800_000, has_reference=False, only_adapters=False)
    found = utilization.DeviceShare(config, 2, 2).metrics({"sampler/decode_steps": 1000}, flops, 5.0, 10.0)
    assert found["train/mfu"] == pytest.approx(6 * 3.2127e9 * 1.8e6 / (10 * 2 * 989e12), rel=1e-3)
    assert found["sampler/bandwidth_fraction"] == pytest.approx(1000 * 2 * 3.2127e9 / (5 * 2 * 3350e9), rel=1e-3)


def test_cache_hits_are_a_share_of_the_prompts():
    assert utilization.cache_metrics({"sampler/cached_tokens": 30, "sampler/prefill_tokens": 10}) == {
        "sampler/cache_hit_fraction": 0.75
    }
