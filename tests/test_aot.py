"""Programs compiled for TPUs that are not there, and what is read from them. In processes of their own: libtpu stays
out of the tests' own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lightning_jax import hlo_costs

ROOT = Path(__file__).resolve().parent.parent
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


def plan(*flags):
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, which is there for Linux on x86 (the dev extra)")
def test_learner_and_decode_compile_for_tpu_with_its_kernels():
    done = plan("--model=tiny", "--topology=v5e:2x2", "--mesh=1,2,2", "--seq_len=256", "--slots=8", "--json")
    assert not done.returncode, done.stderr
    told = json.loads(done.stdout)
    assert told["fits"] and told["kept_bytes"]["optimizer"] == pytest.approx(
        2 * told["kept_bytes"]["gradients"], abs=64
    )
    programs = told["programs"]
    learner, decode = programs["accumulate"]["kernels"], programs["decode"]["kernels"]
    # The reference's forward, the policy's, and the policy's again for its backward pass: in each of 4 layers.
    assert sum(n for name, n in learner.items() if name.startswith("splash_mha_fwd")) == 12
    assert sum(n for name, n in learner.items() if name.startswith("splash_mha_dkv")) == 4
    assert decode == {"ragged_paged_attention_kernel": 4}
    assert programs["accumulate"]["collectives"] and programs["accumulate"]["seconds"] > 0


def test_memory_on_a_gpu_is_told_without_one():
    done = plan("--model=llama3.2-3b", "--topology=h100:1", "--json")
    assert not done.returncode, done.stderr
    kept = json.loads(done.stdout)["kept_bytes"]
    assert kept["learner's weights, float32"] == pytest.approx(4 * 3.21e9, rel=0.01)
    assert kept["KV pages"] == pytest.approx(65536 * 28 * 2 * 8 * 128 * 2, rel=0.001)


def test_costs_of_loops_count_as_often_as_they_run():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((7, 64, 64), jnp.float32)
    costs = hlo_costs.of_program(jax.jit(layers).lower(*shapes).compile().as_text())
    assert costs.flops == 7 * 2 * 32 * 64 * 64
    assert costs.bytes < 7 * 4 * (64 * 64 + 20 * 32 * 64)  # one layer's weights at a time, not all seven


def test_a_collective_moves_what_a_ring_does():
    hlo = """HloModule m
ENTRY %main (p: f32[8,128]) -> f32[32,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %ag = f32[32,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}"""
    assert hlo_costs.of_program(hlo).collectives == {"all-gather": (1, 3 * 8 * 128 * 4)}
