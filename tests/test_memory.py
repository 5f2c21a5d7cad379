"""The memory estimate against what arrays and compiled programs really take, and what it advises."""

import ctypes
import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax import aot, memory, mesh
from lightning_jax import config as config_lib
from lightning_jax.model import llama, lora, shapes
from lightning_jax.policies import Policies
from lightning_jax.rl import critic, update
from lightning_jax.rl.learner import Learner
from lightning_jax.rl.packing import Batch, empty_blocks
from lightning_jax.rl.settings import compute_dtype, learner_settings

LLAMA_3B = shapes.named_shape("llama3.2-3b")
SMOLLM2 = shapes.named_shape("smollm2-135m")
TINY = shapes.named_shape("tiny")
GB = 1e9


def settings(**changes):
    config = config_lib.default_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def plan(model, limit_gb, **changes):
    config = settings(**changes)
    return memory.Plan({config.model.path: model}, config, memory.estimate(model, config), int(limit_gb * GB))


def bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "learned", [{}, {"model__lora_rank": 4}, {"model__frozen": "embed_tokens|mlp"}], ids=["all", "lora", "a part"]
)
def test_what_stays_is_exact(tmp_path, learned):
    """Against the arrays of a real policy, before and after its learner is made."""
    config = settings(
        workdir=str(tmp_path), runtime__max_seq_len=256, sampler__kv_cache_tokens=8190, sampler__max_slots=4, **learned
    )
    need = memory.estimate(TINY, config)
    policies = Policies(config)
    try:
        policy = policies.first
        executor = policy._engine._executor
        assert need.loaded + need.frozen == bytes_of(policy._initial)
        assert need.sampler == bytes_of(executor._params)
        assert bytes_of(executor._pages) < need.kv_cache
        policies.prepare_training()
        learner = policy._learner
        assert need.masters == bytes_of(learner.state.params)
        assert need.optimizer == pytest.approx(bytes_of(learner.state.opt_state), abs=64)  # and a counter or two
        assert need.frozen == bytes_of(learner.frozen)
        frozen = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(learner.frozen)}
        own = [leaf for leaf in jax.tree.leaves(learner._reference) if leaf.unsafe_buffer_pointer() not in frozen]
        assert need.reference == bytes_of(own)
        totals = jax.eval_shape(update.zero_totals, learner.state.params)
        assert need.gradients == sum(leaf.size * 4 for leaf in jax.tree.leaves(totals.grads))
        # Decoding as many rows, as far, as the pages allow: the copy that it works on.
        rows, width = max(
            (shape for shape, dense in executor._decode_shapes.items() if dense), key=lambda s: s[0] * s[1]
        )
        executor._use_workspace(rows, width)
        kept = bytes_of(executor._pages) + bytes_of([executor._workspace.arrays, executor._idle])
        assert kept <= need.kv_cache <= 2 * kept
    finally:
        policies.close()


@pytest.mark.parametrize(
    "model, blocks, length, remat, learned",
    [
        (TINY, 8, 256, "full", {}),
        (TINY, 8, 256, "none", {}),
        (TINY, 2, 2048, "full", {}),
        (TINY, 2, 2048, "full", {"model__lora_rank": 32}),
        (dataclasses.replace(SMOLLM2, num_layers=6), 8, 512, "dots", {}),
        (dataclasses.replace(SMOLLM2, num_layers=6), 8, 512, "dots", {"model__lora_rank": 16}),
        (dataclasses.replace(SMOLLM2, num_layers=6), 16, 512, "full", {}),
        (dataclasses.replace(SMOLLM2, num_layers=6), 16, 512, "full", {"model__lora_rank": 16}),
        (dataclasses.replace(SMOLLM2, num_layers=6), 16, 512, "full", {"model__frozen": "embed_tokens"}),
    ],
    ids=str,
)
def test_a_micro_batch_is_estimated_as_it_is_compiled(model, blocks, length, remat, learned):
    config = settings(
        runtime__batch_size=blocks,
        algorithm__group_size=blocks,
        runtime__gradient_accumulation=1,
        runtime__max_seq_len=length,
        runtime__remat=remat,
        **learned,
    )
    learner = learner_settings(config, jnp.dtype("float32"))
    whole = jax.eval_shape(functools.partial(llama.init_params, model), jax.random.key(0))
    specs = lora.trained_specs(model, learner.trainable)
    params = jax.eval_shape(functools.partial(llama.init_specs, specs), jax.random.key(0))
    frozen = lora.split(whole, learner.trainable)[1] or None
    dtypes = [jnp.int32, jnp.int32, jnp.int32, jnp.bool_, jnp.float32, jnp.float32, jnp.float32, jnp.bool_]
    batch = Batch(*(jax.ShapeDtypeStruct((blocks, length), dtype) for dtype in dtypes))
    num_tokens = jax.ShapeDtypeStruct((), jnp.float32)
    totals = jax.eval_shape(update.zero_totals, params)
    arguments = totals, params, whole, batch, num_tokens, frozen
    lowered = update.accumulate.lower(*arguments, config=model, settings=learner)
    compiled = lowered.compile().memory_analysis().temp_size_in_bytes
    assert 0.9 < memory.estimate(model, config).update / compiled < 1.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_the_layers_there_is_no_second_gradient_and_no_copy_in_another_dtype(dtype):
    model = dataclasses.replace(TINY, num_layers=16)
    learner = learner_settings(settings(runtime__remat="full"), jnp.dtype(dtype))
    params = jax.eval_shape(functools.partial(llama.init_params, model), jax.random.key(0))
    totals = jax.eval_shape(update.zero_totals, params)
    arguments = totals, params, None, empty_blocks(1, 64), jax.ShapeDtypeStruct((), jnp.float32)
    compiled = update.accumulate.lower(*arguments, config=model, settings=learner).compile().memory_analysis()
    layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"])) * jnp.dtype(dtype).itemsize
    assert compiled.temp_size_in_bytes < layers / 2


def test_of_a_critics_layers_there_is_no_second_gradient():
    model = dataclasses.replace(TINY, num_layers=16)
    learner = learner_settings(settings(algorithm__name="ppo", runtime__remat="full"), jnp.dtype("float32"))
    params = jax.eval_shape(functools.partial(llama.init_params, model), jax.random.key(0))
    state = jax.eval_shape(functools.partial(critic.init_state, learner, model), params)
    totals = jax.eval_shape(critic.zero_totals, state.params)
    batch = empty_blocks(1, 64)
    batch = batch.replace(value_bt=batch.advantage_bt, value_target_bt=batch.advantage_bt)
    arguments = totals, state.params, params, batch, jax.ShapeDtypeStruct((), jnp.float32)
    compiled = critic.accumulate.lower(*arguments, config=model, settings=learner).compile().memory_analysis()
    assert compiled.temp_size_in_bytes < sum(leaf.size * 4 for leaf in jax.tree.leaves(params["layers"])) / 2


def test_a_compiled_plan_knows_the_critics_programs():
    learner = learner_settings(settings(algorithm__name="ppo"), jnp.dtype("float32"))
    compiled = aot.compile_learner(TINY, learner, mesh.make_mesh(1, 1, 1), blocks=1, length=64)
    assert {"critic.accumulate", "critic.apply"} < set(compiled)


@pytest.mark.parametrize(
    "changes", [{"model__dtype": "bfloat16"}, {"model__lora_rank": 8, "runtime__remat": "dots"}], ids=str
)
def test_a_compiled_plan_is_near_the_real_peak(changes):
    """Of an update: the arrays that the learner's program gets and makes, and what it works with."""
    config = settings(
        runtime__batch_size=8,
        algorithm__group_size=8,
        runtime__gradient_accumulation=1,
        runtime__max_seq_len=256,
        **changes,
    )
    estimated = memory.Plan({config.model.path: TINY}, config, memory.estimate(TINY, config), None)
    need = estimated.compiled().need
    dtype = compute_dtype(config.model.dtype)
    learner_of = learner_settings(config, dtype)
    learner = Learner(TINY, llama.init_params(TINY, jax.random.key(0)), learner_of)
    batch = jax.tree.map(jnp.asarray, empty_blocks(8, 256))
    totals = update.zero_totals(learner.state.params)
    arguments = totals, learner.state.params, learner._reference, batch, jnp.float32(1), learner.frozen
    compiled = update.accumulate.lower(*arguments, config=TINY, settings=learner_of).compile()
    sizes = compiled.memory_analysis()
    real = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes - bytes_of(batch)
    real += sizes.output_size_in_bytes - sizes.alias_size_in_bytes + bytes_of(learner.state.opt_state)
    others = need.process + need.kv_cache  # the sampler's weights are not there meanwhile
    assert need.peak - others == pytest.approx(real, rel=0.1)


def test_adapters_need_a_fraction():
    """Of a published size: the reference is the frozen model, and only two copies in bfloat16 are left."""
    full = memory.estimate(LLAMA_3B, settings(model__dtype="bfloat16"))
    need = memory.estimate(LLAMA_3B, settings(model__dtype="bfloat16", model__lora_rank=32))
    num_adapter = 28 * 32 * (2 * (3072 + 3072) + 2 * (3072 + 1024) + 3 * (3072 + 8192))  # q and o, k and v, the MLP
    assert need.masters == 4 * num_adapter and need.optimizer == 8 * num_adapter and need.reference == need.loaded == 0
    assert need.frozen == need.sampler == full.masters // 2
    kept = [n.training - n.kv_cache - n.process for n in (need, full)]
    assert kept[0] < 0.25 * kept[1]


# The reference's own default: bfloat16 with float32 masters, group 8, conversations of 4096 tokens, KL term.
ON_80_GB = {"model__dtype": "bfloat16", "runtime__gradient_accumulation": 256, "algorithm__group_size": 8}


def test_a_3b_model_trains_on_one_gpu_of_80_gb():
    def need(**changes):
        return memory.estimate(LLAMA_3B, settings(**ON_80_GB, **changes), 1, "gpu")

    plain, hosted, both, adapters = (
        need(),
        *(need(runtime__offload=o) for o in ("optimizer", "both")),
        need(model__lora_rank=32),
    )
    assert 80 * GB > plain.peak > hosted.peak > both.peak
    assert hosted.hosted_optimizer == plain.optimizer == pytest.approx(8 * 3.21e9, rel=0.01)
    assert hosted.peak == plain.training  # the moments come back for the optimizer's step
    assert both.peak == hosted.peak - plain.reference
    assert adapters.peak < 30 * GB
    assert memory.estimate(LLAMA_3B, settings(**ON_80_GB, runtime__offload="both"), 1, "cpu").hosted_optimizer == 0


@pytest.mark.parametrize("kind", ["copy", "shared"])
def test_a_critic_is_exact(kind):
    config = settings(algorithm__name="ppo", algorithm__critic=kind)
    params = jax.eval_shape(functools.partial(llama.init_params, TINY), jax.random.key(0))
    init = functools.partial(critic.init_state, learner_settings(config, jnp.dtype("float32")), TINY)
    made = jax.eval_shape(init, params)
    need = memory.estimate(TINY, config)
    assert need.critic == pytest.approx(sum(leaf.size * 4 for leaf in jax.tree.leaves(made)), abs=64)
    assert need.peak - memory.estimate(TINY, settings()).peak == need.critic


def test_devices_share_what_divides():
    alone, four = (memory.estimate(LLAMA_3B, settings(model__tensor_parallel=ways), ways) for ways in (1, 4))
    assert alone.masters == pytest.approx(4 * 3.2e9, rel=0.01)
    for part in ("masters", "optimizer", "sampler", "kv_cache"):
        assert getattr(four, part) == pytest.approx(getattr(alone, part) / 4, rel=0.001)
    shards = memory.estimate(LLAMA_3B, settings(), 4)
    for part in ("masters", "optimizer", "sampler"):
        assert getattr(shards, part) == pytest.approx(getattr(alone, part) / 4, rel=0.001)
    assert shards.kv_cache == alone.kv_cache
    copies = memory.estimate(LLAMA_3B, settings(model__fsdp=1), 4)
    assert (copies.masters, copies.kv_cache) == (alone.masters, alone.kv_cache)
    assert shards.update == copies.update < 0.3 * alone.update  # all layers' gradients are in neither
    assert shards.gradients < copies.gradients
    with pytest.raises(InvalidConfigError, match="tensor_parallel 3 does not divide .* 8 key/value heads"):
        memory.estimate(LLAMA_3B, settings(model__tensor_parallel=3), 3)


def test_two_models_need_both_and_work_one_at_a_time(monkeypatch):
    two = {"models.query.path": "a", "models.answer.path": "b", "models.answer.tensor_parallel": 4}
    config = config_lib.merge(environ={}, flag_overrides=two)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    both = memory.estimate_all({"query": TINY, "answer": LLAMA_3B}, config)
    small = memory.estimate(TINY, settings())
    large = memory.estimate(LLAMA_3B, settings(model__tensor_parallel=4))
    for part in ("sampler", "masters", "optimizer", "kv_cache"):
        assert getattr(both, part) == getattr(small, part) + getattr(large, part)
    assert (both.update, both.process) == (large.update, small.process)


# Whether it fits, and what to change ----------------------------------------------------------------------------------


def advised(text: str) -> dict[str, str]:
    """{"runtime.max_seq_len": "512"} of "set runtime.max_seq_len to 512 (now 4096)"."""
    return dict(re.findall(r"([\w.]+) to (\S+) \(now", text))


@pytest.fixture
def on_machine(monkeypatch):
    """Lets devices have so many GB."""

    def of(limit_gb):
        monkeypatch.setattr(memory, "device_bytes", lambda: int(limit_gb * GB))

    return of


def test_what_fits_is_not_spoken_of(on_machine):
    on_machine(64)
    assert plan(TINY, 64, mode="serve").check() is None
    assert plan(TINY, 64, mode="train", agent__script="a.py", data__train_file="b").check() is None


def test_a_plan_is_of_settings_that_the_model_can_have(on_machine):
    on_machine(64)
    with pytest.raises(InvalidConfigError, match="model.frozen 'wte' finds none"):
        memory.plan(settings(model__frozen="wte"))


def test_serving_that_cannot_fit_is_refused_before_anything_is_allocated(on_machine):
    on_machine(26)
    tight = plan(LLAMA_3B, 26, model__dtype="bfloat16", sampler__kv_cache_tokens=65536)
    with pytest.raises(InvalidConfigError, match="does not fit: serving it needs at least .* GB") as caught:
        tight.check()
    (key, value), *_ = advised(caught.value.hint).items()
    assert key == "sampler.kv_cache_tokens"
    changed = settings(model__dtype="bfloat16", sampler__kv_cache_tokens=int(value))
    assert memory.estimate(LLAMA_3B, changed).serving <= 26 * GB
    more = settings(model__dtype="bfloat16", sampler__kv_cache_tokens=int(value) + 2048)
    assert memory.estimate(LLAMA_3B, more).serving > 26 * GB


def test_an_update_that_may_not_fit_is_a_warning_with_a_number(on_machine):
    on_machine(16)
    warning = plan(SMOLLM2, 16, mode="serve").check()
    assert "as long as it may be" in warning
    number = int(advised(warning)["runtime.gradient_accumulation"])
    assert memory.estimate(SMOLLM2, settings(runtime__gradient_accumulation=number)).peak <= 16 * GB
    assert memory.estimate(SMOLLM2, settings(runtime__gradient_accumulation=number // 2)).peak > 16 * GB


def test_several_settings_where_one_is_not_enough(on_machine):
    on_machine(9)
    config = {"runtime.gradient_accumulation": 4, "sampler.kv_cache_tokens": 65536}
    warning = plan(SMOLLM2, 9, mode="serve").check()
    changes = advised(warning)
    assert len(changes) > 1 and " and " in warning
    changed = settings()
    for key, value in changes.items():
        changed.update_from_flattened_dict({key: value if key == "model.dtype" else int(float(value))})
    assert memory.estimate(SMOLLM2, changed).peak <= 9 * GB
    assert config.keys() <= changes.keys()


def test_what_no_setting_mends_says_so(on_machine):
    on_machine(1)
    with pytest.raises(InvalidConfigError, match="choose a smaller model"):
        plan(LLAMA_3B, 1, mode="train").check()


def test_offloading_and_adapters_are_advised_where_they_help(on_machine, monkeypatch):
    on_machine(66)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    warning = plan(LLAMA_3B, 66, mode="train", agent__script="a", data__train_file="b", **ON_80_GB).check()
    assert advised(warning)["runtime.offload"] == "reference"
    on_machine(50)
    config = {"mode": "train", "agent__script": "a", "data__train_file": "b", "runtime__offload": "both"}
    with pytest.raises(InvalidConfigError) as caught:
        plan(LLAMA_3B, 50, **config, **ON_80_GB).check()
    assert advised(caught.value.hint)["model.lora_rank"] == "32"


def test_the_plan_tells_what_is_offloaded(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lines = plan(LLAMA_3B, 80, runtime__offload="optimizer", **ON_80_GB).table()
    assert any(line.startswith("of that, on the host between uses") and line.endswith("25.7 GB") for line in lines)


needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")


def output_of(script, *arguments, **environment):
    """Of a Python process that has no other settings for malloc than these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout


FREED = """
import ctypes, resource, sys
from lightning_jax import heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "kept":
    heap.keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(1 << 28))
    libc.memset(block, 1, 1 << 28)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
def test_large_blocks_that_are_freed_are_used_again():
    """The pages that the system makes for a block of 256 MB, when one of that size was there and was freed before."""

    def faults(how, **environment):
        return int(output_of(FREED, how, **environment))

    assert faults("kept") < 1000 < 50_000 < faults("as it is")
    assert faults("kept", MALLOC_ARENA_MAX="4") > 50_000  # whoever has settings of their own keeps them


HELD = """
import ctypes
from lightning_jax import heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
heap.keep_freed_memory()
heap.give_back_freed_memory()
before = heap.resident_bytes()
for size in (3 << 30, 1 << 27):
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    libc.memset(block, 1, ctypes.c_size_t(size))
    libc.free(block)
    kept = heap.resident_bytes() - before
    heap.give_back_freed_memory()
    print(kept, heap.resident_bytes() - before)
"""


@needs_glibc
def test_freed_memory_is_kept_beyond_two_gigabytes_until_it_is_given_back():
    megabytes = [round(int(number) / (1 << 20)) for number in output_of(HELD).split()]
    kept, left, kept_of_little, left_of_little = megabytes
    assert kept == pytest.approx(3 << 10, abs=16) and left < 16
    assert kept_of_little == left_of_little == pytest.approx(128 + left, abs=16)  # not worth it
