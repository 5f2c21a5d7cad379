"""The model on eight simulated devices: init, load, forward and gradient equal those of one device."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import mesh
from lightning_jax.model import llama, shapes

ON_EIGHT = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from lightning_jax import mesh
from lightning_jax.model import llama, weights
from lightning_jax.model.attention import segment_attention

folder = pathlib.Path(sys.argv[1])
config, one = weights.load_model(folder)
# 576 tokens are more than attention computes at once.
batches = [jax.random.randint(jax.random.key(0), (8, t), 0, config.vocab_size) for t in (16, 576)]

@jax.jit
def loss_and_grad(params, token_bt):
    position_bt = jnp.broadcast_to(jnp.arange(token_bt.shape[1]), token_bt.shape)
    def loss(params):
        attend = segment_attention(jnp.ones_like(token_bt), position_bt)
        x_btd, _ = llama.forward(params, config, token_bt, position_bt, attend, remat="full")
        return jax.nn.logsumexp(llama.unembed(params, config, x_btd), -1).mean()
    return jax.value_and_grad(loss)(params)

expected = [loss_and_grad(one, token_bt) for token_bt in batches]
init = lambda key: llama.init_params(config, key)
init_one = jax.jit(init)(jax.random.key(3))
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
for sizes in ((8, 1, 1), (2, 2, 2)):
    devices = mesh.make_mesh(*sizes)
    shardings = mesh.shardings(devices, llama.abstract_params(config))
    with jax.set_mesh(devices):
        _, params = weights.load_model(folder, shardings=shardings)
        assert params["layers"]["gate_df"].sharding == shardings["layers"]["gate_df"]
        part = params["layers"]["gate_df"].addressable_shards[0].data.size
        assert part * sizes[1] * sizes[2] == params["layers"]["gate_df"].size
        spec = mesh.partition_spec(devices, (8, 16), ("batch", None))
        batch = jax.device_put(batches, jax.NamedSharding(devices, spec))
        jax.tree.map(close, [loss_and_grad(params, token_bt) for token_bt in batch], expected)
        made = jax.jit(init, out_shardings=shardings)(jax.random.key(3))
        jax.tree.map(close, made, init_one)
print("all equal")
"""


def test_eight_devices_compute_what_one_does():
    folder = pathlib.Path(__file__).parent / "goldens" / "qwen3"
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr


def test_axes_that_do_not_divide_stay_whole():
    abstract = jax.sharding.AbstractMesh((1, 2, 2), mesh.AXES)
    specs = llama.abstract_params(shapes.named_shape("smollm2-135m"))["layers"]  # 3 key/value heads over 2 devices
    spec = mesh.partition_spec(abstract, specs["k_dkh"].shape, specs["k_dkh"].logical_axes)
    assert spec == PartitionSpec(None, ("fsdp",), None, None)


def test_too_few_devices():
    with pytest.raises(InvalidConfigError, match="needs 1000 devices; there are"):
        mesh.make_mesh(data=1000)
