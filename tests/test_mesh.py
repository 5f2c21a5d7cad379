"""The whole of a model's life on eight simulated devices: every mesh gives what one device gives.

A process of its own has the eight devices. It trains, samples, saves and exports on each mesh, and compares with a
learner and an engine on its first device alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import mesh

ON_EIGHT = """
import dataclasses, sys
import jax, numpy as np
from pathlib import Path
from lightning_jax import memory, mesh
from lightning_jax import config as config_lib
from lightning_jax.model import export, llama
from lightning_jax.rl import checkpoint
from lightning_jax.rl.learner import Learner
from lightning_jax.rl.update import LearnerSettings
from lightning_jax.rl.trajectory import Row
from lightning_jax.sampler.engine import SamplingParams
from tests.sampler.conftest import Model, random_model, run

assert jax.device_count() == 8
folder = Path(sys.argv[1])
CONFIG = llama.LlamaConfig(
    vocab_size=104, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8,
    max_seq_len=64, eos_ids=(103,), tie_embeddings=False,
)
SETTINGS = LearnerSettings(
    learning_rate=1e-3, kl_coef=0.1, entropy_coef=0.02, batch_size=8, max_seq_len=32, min_block_length=32, remat="full"
)
ENGINE = {"max_seq_len": 64, "prefill_chunk": 16, "max_slots": 4, "num_pages": 32, "row_floor": 4}
model = random_model(CONFIG)
params = jax.device_get(model.params)
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 100, 5 + 8 * i).tolist() for i in range(5)]
sampling = [SamplingParams(max_tokens=12, noise_key=(i, 1), temperature=float(i != 3)) for i in range(5)]
requests = [(str(i), prompt, sampling[i]) for i, prompt in enumerate(prompts)]


def make_row(i, length):
    loss_mask = np.arange(length) >= length // 2
    logprob = np.where(loss_mask, -rng.random(length), 0).astype(np.float32)
    token = rng.integers(0, 100, length).astype(np.int32)
    return Row(token, loss_mask, logprob, np.ones(length, np.float32), rollout_index=i)


rows = [make_row(i, length) for i, length in enumerate((32, 30, 32, 29, 31, 32, 30, 28, 32, 27))]
advantages = rng.normal(size=10).astype(np.float32)


def curve(learner, steps=5):
    return [learner.update(rows, advantages) for _ in range(steps)]


def assert_same_curve(actual, expected, name, error=1e-4):
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        for key in b:
            if key != "train/padding_fraction":  # as many blocks as the mesh asks for
                np.testing.assert_allclose(a[key], b[key], rtol=error, atol=error, err_msg=f"{name} step {step}: {key}")


def assert_same(actual, expected, atol, name):
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=f"{name} {jax.tree_util.keystr(path)}")


one = Learner(CONFIG, params, SETTINGS)
expected = curve(one)
assert expected[0]["policy/kl"] == 0 < expected[4]["policy/kl"] and expected[4]["policy/ratio_max"] == 1
moved = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one.state.params, params)), strict=True))
assert moved > 4e-3  # far more than what is compared to
scores = one.score(rows)
checkpoint.save(folder, 1, one.state, {"step": 1})
sampled = run(model.engine(**ENGINE), requests)
settings = config_lib.default_config()

MESHES, SAMPLED = ([tuple(map(int, name.split("x"))) for name in names.split(",")] for names in sys.argv[2:])
for sizes in MESHES:
    devices = mesh.make_mesh(*sizes)
    learner = Learner(CONFIG, params, SETTINGS, mesh=devices)
    assert len(learner.state.params["layers"]["gate_df"].sharding.device_set) == np.prod(sizes)
    assert_same_curve(curve(learner), expected, sizes)
    assert_same(learner.state.params, one.state.params, 1e-4, sizes)
    for a, b in zip(learner.score(rows), scores, strict=True):
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-4)
        np.testing.assert_allclose(a.reference_logprob, b.reference_logprob, atol=1e-4)
    # What memory.py says that a device holds.
    settings.model.update({"tensor_parallel": sizes[2], "fsdp": sizes[1]})
    need = memory.estimate(CONFIG, settings, int(np.prod(sizes)))
    held = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    assert held(learner.state.params) == need.masters, sizes

    if sizes not in SAMPLED:
        continue
    engine = Model(CONFIG, jax.device_put(params, mesh.shardings(devices, llama.abstract_params(CONFIG)))).engine(
        **ENGINE, mesh=devices
    )
    done = run(engine, requests)
    for name in sampled:
        assert done[name].token_ids == sampled[name].token_ids, (sizes, name)
        np.testing.assert_allclose(done[name].logprobs, sampled[name].logprobs, atol=1e-4)
    assert held(engine._executor._params) == need.sampler, sizes
    assert engine._executor._pages[0].k.addressable_shards[0].data.shape[2] == CONFIG.num_kv_heads // sizes[2]
    engine.publish(learner.state.params, 1)  # weights go from learner to sampler where they are
    assert held(engine._executor._params) == need.sampler, sizes

# From one mesh to all others and to one device: to the bit, and the same export.
checkpoint.save(folder, 2, learner.state, {"step": 2})
saved = jax.device_get(learner.state)
export.save_hf(folder / "from mesh", CONFIG, learner.state.params)
targets = [Learner(CONFIG, params, SETTINGS, mesh=mesh.make_mesh(*sizes)) for sizes in ((1, 4, 2), (1, 2, 1))]
for target in (*targets, Learner(CONFIG, params, SETTINGS)):
    target.state, extra = checkpoint.restore(folder / "step-2", target.abstract_state())
    assert extra == {"step": 2}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(target.state), saved)
export.save_hf(folder / "from one", CONFIG, target.state.params)
weights = [(folder / name / "model.safetensors").read_bytes() for name in ("from mesh", "from one")]
assert weights[0] == weights[1]
learner.state, _ = checkpoint.restore(folder / "step-1", learner.abstract_state())
assert_same_curve(curve(learner, 1), curve(one, 1), "one device's checkpoint goes on on a mesh")

# In bfloat16, up to its rounding.
settings = dataclasses.replace(SETTINGS, compute_dtype="bfloat16")
expected = curve(Learner(CONFIG, params, settings), 2)
learner = Learner(CONFIG, params, settings, mesh=mesh.make_mesh(2, 2, 2))
assert_same_curve(curve(learner, 2), expected, "bfloat16", 1e-2)
print("all equal")
"""
FEW = "8x1x1,1x8x1,1x1x4,1x2x4,2x2x2", "1x2x4,2x2x2"  # trained on, and sampled on
ALL = ("8x1x1,4x2x1,4x1x2,2x4x1,2x2x2,2x1x4,1x8x1,1x4x2,1x2x4,1x1x4,1x4x1,1x2x1,2x1x1,1x1x2",) * 2


def test_every_mesh_gives_what_one_device_gives(tmp_path):
    """On a few of them, since compiling takes its time; with the variable EVERY_MESH set on all."""
    done = on_eight_devices(ON_EIGHT, tmp_path, *(ALL if "EVERY_MESH" in os.environ else FEW))
    assert done.stdout.strip() == "all equal", done.stderr


def on_eight_devices(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )


LOOP = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from lightning_jax import hlo_costs, mesh

devices = mesh.make_mesh(2, 2, 2)
w_dv = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(devices, P("fsdp", "tensor")))
x_btd = jax.ShapeDtypeStruct((8, 12, 16), jnp.float32, sharding=NamedSharding(devices, P(("data", "fsdp"))))


def loss(w_dv, x_btd, chunks):
    def in_chunks(w_dv, x_btd):
        parts = jnp.split(x_btd, chunks, axis=1)
        return jax.lax.map(lambda x_bcd: jnp.sum(jnp.tanh(x_bcd @ w_dv), (1, 2)), jnp.stack(parts)).sum(0)
    return mesh.on_own_rows(in_chunks, w_dv, x_btd).sum()


with jax.set_mesh(devices):
    for chunks in (2, 6):
        program = jax.jit(jax.grad(loss), static_argnums=2).lower(w_dv, x_btd, chunks).compile()
        print(hlo_costs.of_program(program.as_text()).collective_bytes)
"""


def test_a_loop_over_rows_sends_its_weights_gradient_once():
    """The [V, D] gradient of the unembedding, summed over devices in each chunk, is most of what is sent otherwise."""
    few, many = map(float, on_eight_devices(LOOP).stdout.split())
    assert 0 < many == few


CHUNKS = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from lightning_jax import mesh
from lightning_jax.model import llama
from lightning_jax.rl import losses

B, T, D, V = 8, 32, 16, 64
config = llama.LlamaConfig(V, D, 1, 1, 1, 1, D, tie_embeddings=True)
rng = np.random.default_rng(0)
w_vd, x_btd, weight_bt = (rng.normal(size=shape).astype(np.float32) for shape in ((V, D), (B, T, D), (B, T)))
token_bt, ones_bt = rng.integers(V, size=(B, T)).astype(np.int32), np.ones((B, T), np.float32)
wanted_bt = (np.arange(T) > 3) & (np.arange(T) < 4 + 3 * np.arange(B)[:, None])


def loss(w_vd, x_btd):
    arrays = x_btd, token_bt, ones_bt, wanted_bt
    logprob_bt, entropy_bt = losses.token_logprobs({"embed_vd": w_vd}, config, *arrays, chunk=8)
    return jnp.sum(logprob_bt * weight_bt + 0.3 * entropy_bt)


value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
expected = value_and_grad(w_vd, x_btd)
for sizes in ((1, 2, 4), (2, 2, 2)):
    devices = mesh.make_mesh(*sizes)
    specs = P("tensor", "fsdp"), P(("data", "fsdp"))
    with jax.set_mesh(devices):
        placed = (jax.device_put(x, NamedSharding(devices, spec)) for x, spec in zip((w_vd, x_btd), specs))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), value_and_grad(*placed), expected)
print("all equal")
"""


def test_each_device_visits_the_chunks_that_its_rows_need():
    """Rows with none to 21 wanted tokens: devices differ in how often their loop turns, beside a divided vocabulary."""
    done = on_eight_devices(CHUNKS)
    assert done.stdout.strip() == "all equal", done.stderr


LLAMA_3B = {"width": 3072, "kv_heads": 8, "mlp": 8192}
SMOLLM2 = {"width": 576, "kv_heads": 3, "mlp": 1536}


@pytest.mark.parametrize(
    "devices, tensor, fsdp, model, expected",
    [
        (1, 1, -1, LLAMA_3B, (1, 1, 1)),
        (8, 1, -1, LLAMA_3B, (1, 8, 1)),
        (8, 2, -1, LLAMA_3B, (1, 4, 2)),
        (8, 2, 2, LLAMA_3B, (2, 2, 2)),
        (8, 1, 1, LLAMA_3B, (8, 1, 1)),
        (10, 1, -1, SMOLLM2, (5, 2, 1)),  # 576 columns cannot be divided over 10
        (6, 3, -1, SMOLLM2, (1, 2, 3)),
    ],
)
def test_all_devices_are_used(devices, tensor, fsdp, model, expected):
    assert mesh.axis_sizes(devices, tensor=tensor, fsdp=fsdp, **model) == expected


@pytest.mark.parametrize(
    "devices, tensor, fsdp, model, problem, hint",
    [
        (8, 3, -1, LLAMA_3B, "tensor_parallel 3 .* 8 devices", "set it to 1 or 2 or 4 or 8;"),
        (8, 2, -1, SMOLLM2, "tensor_parallel 2 .* 3 key/value heads", "set it to 1;"),
        (16, 16, -1, LLAMA_3B, "tensor_parallel 16 .* 8 key/value heads", "set it to 1 or 2 or 4 or 8;"),
        (1, 4, -1, LLAMA_3B, "tensor_parallel 4 .* 1 devices", "set it to 1;"),
        (8, 2, 3, LLAMA_3B, "fsdp 3 .* 4 devices", "set it to 1 or 2 or 4, or to -1"),
        (10, 1, 5, SMOLLM2, "fsdp 5 .* 576 wide", "set it to 1 or 2, or to -1"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(devices, tensor, fsdp, model, problem, hint):
    with pytest.raises(InvalidConfigError, match=problem) as caught:
        mesh.axis_sizes(devices, tensor=tensor, fsdp=fsdp, **model)
    assert hint in caught.value.hint
