"""Programs compiled for TPUs and GPUs that are not there, and what is read from them. In processes of their own: their
compilers stay out of the tests' own."""

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
GPU_COMPILER = Path(sys.prefix) / "gpu-compiler"  # where scripts/test.sh puts it
needs_gpu_compiler = pytest.mark.skipif(
    not GPU_COMPILER.is_dir(), reason="needs JAX's CUDA packages, which scripts/test.sh installs for Linux on x86"
)


def plan(*flags, **environment):
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


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


@needs_gpu_compiler
def test_learner_and_decode_compile_for_gpu_with_its_kernel():
    """Without cuDNN, which would be a gigabyte more; `tests/model/test_attention.py` looks at calls to it."""
    flags = "--model=tiny", "--topology=h100:2", "--mesh=1,1,2", "--seq_len=256", "--slots=8", "--json"
    done = plan(*flags, PYTHONPATH=str(GPU_COMPILER))
    assert not done.returncode, done.stderr
    told = json.loads(done.stdout)
    assert told["fits"] and told["programs"]["decode"]["kernels"] == {"paged_attention": 4}
    assert told["programs"]["accumulate"]["collectives"] and told["programs"]["accumulate"]["seconds"] > 0


def run_with_gpu_compiler(code):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(GPU_COMPILER)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr


FOR_H100 = r"""
import dataclasses, re
from lightning_jax import aot
from lightning_jax.model.shapes import named_shape

config = dataclasses.replace(named_shape("llama3.2-1b"), num_layers=2)
mesh = aot.described_mesh("h100:1", data=1, fsdp=1, tensor=1)
shapes = aot.SamplerShapes(rows=64, length=384, num_pages=64 * 24, page_size=16, steps=8, dtype="bfloat16")
compiled = aot.compile_decode(config, shapes, mesh)["decode"]
text = compiled.as_text()
page = re.escape(f"bf16[{shapes.num_pages + 1},16,8,64]") + "|" + re.escape(f"bf16[{16 * (shapes.num_pages + 1)},8,64]")

# Nobody copies, gathers or turns round a cache: pages are written where they are, and read by the kernel alone.
assert re.search(page, text)
assert not re.search(rf"= ({page})\S* (copy|transpose|convert|gather)\(", text)
assert compiled.memory_analysis().alias_size_in_bytes >= 2 * 2 * shapes.num_pages * 16 * 8 * 64 * 2
assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 2
assert not re.search(r"= f32\[64,128256\]\S* copy\(", text)  # nor the logits

# A step: 13 kernels in a layer, no loop but in the filters' branch, which few steps take.
body = re.search(r" while\(.*?body=%([\w.]+)", text[text.index("ENTRY"):]).group(1)
lines = re.search(rf"\n%{re.escape(body)} \(.*?\n}}", text, re.DOTALL).group().splitlines()
layers = [line for line in lines if "jit(block)" in line and re.search(r" (fusion|custom-call|copy)\(", line)]
assert len(layers) == 26, len(layers)
assert not any(" while(" in line for line in lines)
"""


@needs_gpu_compiler
def test_a_decode_step_on_an_h100_is_few_kernels_and_copies_no_cache():
    run_with_gpu_compiler(FOR_H100)


LEARNER_FOR_H100 = r"""
import dataclasses, re
from lightning_jax import aot
from lightning_jax.model.shapes import named_shape
from lightning_jax.rl.update import LearnerSettings

config = dataclasses.replace(named_shape("llama3.2-1b"), num_layers=3)
mesh = aot.described_mesh("h100:1", data=1, fsdp=1, tensor=1)
settings = LearnerSettings(kl_coef=0.0, batch_size=12, max_seq_len=512, compute_dtype="bfloat16")
text = aot.compile_learner(config, settings, mesh, blocks=12, length=512)["accumulate"].as_text()

# The layers keep what they compute where it is, not in arrays of all layers. 4 chunks of logits are added up in place.
assert re.search(r"= bf16\[(12,512|6144),8192\]", text)
assert not re.search(r"\[3,(12,512|6144),", text)
assert re.search(r"= f32\[1536,128256\]", text)
assert not re.search(r"= \S*\[128256,2048\]\S* copy\(", text)
"""


@needs_gpu_compiler
def test_the_learner_on_an_h100_stacks_no_activations_and_copies_no_gradient_of_the_unembedding():
    run_with_gpu_compiler(LEARNER_FOR_H100)


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


def test_costs_are_the_least_of_what_ends_sooner_or_has_branches():
    """A loop's constant bound counts beside one that only the device knows, and of two branches the shorter."""

    def program(x, count, some):
        def step(state):
            return state[0] + 1, jnp.tanh(state[1] @ state[1])

        _, x = jax.lax.while_loop(lambda state: (state[0] < 5) & (state[0] < count), step, (0, x))
        return jax.lax.cond(some, lambda x: x @ x @ x @ x, lambda x: x @ x, x)

    shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((), int), jax.ShapeDtypeStruct((), bool)
    costs = hlo_costs.of_program(jax.jit(program).lower(*shapes).compile().as_text())
    assert costs.flops == (5 + 1) * 2 * 64**3


def test_a_collective_moves_what_a_ring_does():
    hlo = """HloModule m
ENTRY %main (p: f32[8,128]) -> f32[32,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %ag = f32[32,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}"""
    assert hlo_costs.of_program(hlo).collectives == {"all-gather": (1, 3 * 8 * 128 * 4)}
